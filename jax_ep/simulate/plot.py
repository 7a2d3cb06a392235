"""Draws the model beside what was published, and what it predicts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jax_ep.simulate.published import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    points: Sequence[Point], computed: Sequence[float], predicted: Mapping[int, Mapping[str, float]]
) -> "Figure":
    """Two panels.

    Args:
        points: published figures.
        computed: what the model gives in their place.
        predicted: by the number of ranks, us by what they are of.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(point.name for point in points):
        pairs = [(p.figure, c) for p, c in zip(points, computed, strict=True) if p.name == name]
        left.plot(*zip(*pairs, strict=True), "o", alpha=0.7, label=name)
    left.axline((50, 50), slope=1, color="grey", linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="published: GB/s, or us of low latency")
    left.set(ylabel="model", title="DeepEP as published, and the model")
    for name in next(iter(predicted.values())):
        style = "o--" if "combine" in name else "o-"  # dispatch takes nearly as long
        right.plot(list(predicted), [us[name] for us in predicted.values()], style, label=name)
    right.set(xscale="log", yscale="log", xlabel="EP", ylabel="us, slowest rank")
    right.set(title="jax_ep on H200: predicted, not measured")
    right.set_xticks(list(predicted), [str(ranks) for ranks in predicted])
    right.set_xticks([], minor=True)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
