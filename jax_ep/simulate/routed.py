"""How many rows a routing moves between ranks and nodes, by the layout's rule of placement.

Expert e lives on rank e // L, and nothing is dropped. Counts alone are kept: a layout of 256 ranks
would be gigabytes.
"""

import dataclasses
import functools

import jax
import numpy as np
from numpy.typing import NDArray

from jax_ep import routing

Counts = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Problem:
    """R ranks, their T tokens each, and a router: K of E experts.

    A token chooses within the best ``top_groups`` of ``num_groups`` groups of consecutive experts.
    """

    num_ranks: int
    tokens: int = 4096
    top_k: int = 8
    num_experts: int = 256
    num_groups: int = 8
    top_groups: int = 4
    ranks_per_node: int = 8

    @property
    def num_nodes(self) -> int:
        """Nodes of the group."""
        return self.num_ranks // self.ranks_per_node


@dataclasses.dataclass(frozen=True, eq=False)
class Routed:
    """Counts by source rank: tokens with a row on a node or rank, and rows, one for each choice."""

    problem: Problem
    to_node: Counts  # [R, nodes]
    to_rank: Counts  # [R, R]
    choices: Counts  # [R, R]

    @property
    def nodes_per_token(self) -> float:
        """On which a token has a row, the mean."""
        return float(self.to_node.sum() / self.problem.num_ranks / self.problem.tokens)


@functools.cache
def route(problem: Problem, seed: int = 0) -> Routed:
    """Routes random tokens by ``jax_ep.routing.group_limited``."""
    options = {name: getattr(problem, name) for name in ("top_k", "num_groups", "top_groups")}
    choose = jax.jit(functools.partial(routing.group_limited, **options))
    rng = np.random.default_rng(seed)
    shape = (problem.tokens, problem.num_experts)
    ids = [choose(rng.standard_normal(shape, np.float32))[0] for _ in range(problem.num_ranks)]
    return count(problem, np.stack(ids))


def count(problem: Problem, ids: NDArray[np.int32]) -> Routed:
    """Counts the rows of these experts, [R, T, K]."""
    ranks = ids // (problem.num_experts // problem.num_ranks)
    return Routed(
        problem,
        _tokens_with(ranks // problem.ranks_per_node, problem.num_nodes),
        _tokens_with(ranks, problem.num_ranks),
        np.stack([np.bincount(own.ravel(), minlength=problem.num_ranks) for own in ranks]),
    )


def _tokens_with(places: NDArray[np.int32], num_places: int) -> Counts:
    """[R, places]: tokens of each rank that have a choice there."""
    places = np.sort(places, axis=-1)
    is_first = np.diff(places, axis=-1, prepend=-1) > 0
    found = zip(places, is_first, strict=True)
    return np.stack([np.bincount(own[first], minlength=num_places) for own, first in found])
