"""What ``overlap=True`` brings: micro-batches through layers of experts, timed as whole programs.

A layer is make_layout, dispatch, two matrix products with the rows of all local experts, combine
and the sum with what came in; its micro-batches do not depend on one another. Its experts share
their matrices, which changes no size: rows are as many as the capacity. One program has the calls
on all SMs, none beside anything; others have them on fewer SMs, with ``overlap=True``. Beside these
stand the products alone, and the calls alone.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

import jax_ep
from jax_ep.bench import measure
from jax_ep.bench.operations import AXIS
from jax_ep.bench.report import Row
from jax_ep.bench.traffic import Point

NUM_MICRO_BATCHES = 2
# What is measured unless the command line says otherwise.
_EXPERTS_PER_RANK = 8
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"tokens": [64], "hidden": [128], "top_k": [2], "num_sms": [24], "repeats": 5},
    "gpu": {"tokens": [8192], "hidden": [4096], "top_k": [2], "num_sms": [16, 24, 32]},
}

HEADER = (
    f"{'program':34}{'median ms':>10}{'p10':>9}{'p90':>9}{'of plain':>10}{'beside':>9}"
    f"{'temp MB':>9}"
)

_LEGEND = """\
Times are those of whole programs, in bursts of {burst}: {layers} x make_layout, dispatch, experts,
combine for each of {halves} micro-batches of T tokens a rank
plain: the calls on all SMs, one after the other; of plain: the time over that program's
beside: of the asynchronous calls in the compiled program, those that have a matrix product between
their start and their done; temp MB: what XLA allocates, a device"""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A program.

    Attributes:
        name: for the table.
        num_sms: of its calls.
        overlap: of its calls.
        has_calls: else it has the matrix products alone.
        has_experts: else it has the calls alone.
    """

    name: str
    num_sms: int | None = None
    overlap: bool = False
    has_calls: bool = True
    has_experts: bool = True


PLAIN = Variant("plain")


def variants(num_sms: list[int]) -> list[Variant]:
    """The programs, plain first."""
    return [
        PLAIN,
        Variant("experts alone", has_calls=False),
        Variant("calls alone", has_experts=False),
        *(Variant(f"calls alone, {n} SMs", n, has_experts=False) for n in num_sms),
        *(Variant(f"overlap=True, {n} SMs", n, overlap=True) for n in num_sms),
    ]


def defaults(of_bench: dict[str, Any], platform: str, num_ranks: int) -> dict[str, Any]:
    """Of the command line, from those of the whole benchmark on a platform."""
    base = {name: v[:1] if isinstance(v, list) else v for name, v in of_bench.items()}
    sizes = {"capacity": ["1.25"], "experts": _EXPERTS_PER_RANK * num_ranks}
    return base | sizes | _DEFAULTS[platform]


def legend(num_layers: int) -> str:
    """What the table has in it."""
    return _LEGEND.format(burst=measure.BURST, layers=num_layers, halves=NUM_MICRO_BATCHES)


class Layers:
    """The programs of a point, on the same operands.

    Args:
        point: its ``num_sms`` is not used.
        mesh: of the ranks.
        ids: int32 [R, T, K] of each micro-batch.
        num_experts: E.
        capacity: C.
        expert_hidden: F.
        num_layers: one after the other.
        seed: of operands.
    """

    def __init__(
        self,
        point: Point,
        mesh: Mesh,
        ids: list[NDArray[np.int32]],
        *,
        num_experts: int,
        capacity: int,
        expert_hidden: int,
        num_layers: int,
        seed: int,
    ) -> None:
        self.point, self.mesh = point, mesh
        self.num_experts, self.capacity, self.num_layers = num_experts, capacity, num_layers
        sharding = NamedSharding(mesh, P(AXIS))
        keys = iter(jax.random.split(jax.random.key(seed), 2 + NUM_MICRO_BATCHES))
        rows, hidden = mesh.size * point.tokens, point.hidden

        def normal(shape: tuple[int, ...], scale: float) -> jax.Array:
            def make(key: jax.Array) -> jax.Array:
                return scale * jax.random.normal(key, shape, point.dtype)

            made: jax.Array = jax.jit(make, out_shardings=sharding)(next(keys))
            return made

        self.args = (
            [jax.device_put(of_one.reshape(rows, -1), sharding) for of_one in ids],
            [normal((rows, hidden), 1.0) for _ in ids],
            normal((mesh.size * hidden, expert_hidden), hidden**-0.5),
            normal((mesh.size * expert_hidden, hidden), expert_hidden**-0.5),
        )
        self._plain_seconds: float | None = None
        self._plain_results: Any = None

    def time(self, variant: Variant, repeats: int) -> Row:
        """Compiles and times a program; with overlap its results must be those of ``PLAIN``.

        Raises:
            RuntimeError: they are not, or ``PLAIN`` has failed.
        """
        if variant.overlap and self._plain_results is None:
            raise RuntimeError("the plain program, whose results these must have, has failed")
        sharded = jax.shard_map(
            self._layers(variant), mesh=self.mesh, in_specs=P(AXIS), out_specs=P(AXIS)
        )
        compiled = jax.jit(sharded).lower(*self.args).compile()
        timing = measure.time_programs(measure.Program(compiled, self.args), repeats=repeats)
        results = jax.device_get(compiled(*self.args))
        if variant == PLAIN:
            self._plain_seconds, self._plain_results = timing.median, results
        elif variant.overlap:
            # Products of another program may add in another order.
            for one, other in zip(results[0], self._plain_results[0], strict=True):
                if not np.allclose(np.float32(one), np.float32(other), rtol=0.1, atol=0.1):
                    raise RuntimeError("results are not those of the plain program")
        num_beside, num_calls = beside(compiled.as_text() or "")
        return {
            "capacity": self.capacity,
            "num_sms": variant.num_sms,
            "overlap": variant.overlap,
            "median_s": timing.median,
            "p10_s": timing.percentile(10),
            "p90_s": timing.percentile(90),
            "of_plain": timing.median / self._plain_seconds if self._plain_seconds else None,
            "asynchronous_calls": num_calls,
            "beside_products": num_beside,
            "temp_bytes": timing.temp_bytes,
        }

    def _layers(self, variant: Variant) -> Callable[..., Any]:
        num_rows = self.capacity

        def experts(rows: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
            return jax.nn.silu(rows @ w1) @ w2

        def layer(ids: jax.Array, x: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
            if not variant.has_calls:
                rows = jnp.tile(x, (-(-num_rows // len(x)), 1))[:num_rows]
                y = experts(rows, w1, w2)
                return x + (y[: len(x)] if num_rows >= len(x) else jnp.mean(y, 0))
            layout = jax_ep.make_layout(
                ids,
                num_experts=self.num_experts,
                axis_name=AXIS,
                capacity=num_rows,
                num_sms=variant.num_sms,
                overlap=variant.overlap,
            )
            recv = jax_ep.dispatch(x, layout)
            y = experts(recv.tokens, w1, w2) if variant.has_experts else recv.tokens
            out: jax.Array = x + jax_ep.combine(y, layout)
            return out

        def layers(ids: Any, parts: Any, w1: jax.Array, w2: jax.Array) -> Any:
            # Before jaxlib 0.12 XLA's scheduler leaves programs alone that have no asynchronous
            # collective of its own (docs/overlap.md).
            ring = [(rank, (rank + 1) % self.mesh.size) for rank in range(self.mesh.size)]
            some = lax.ppermute(parts[0][:1, :8], AXIS, ring)
            for _ in range(self.num_layers):
                parts = [layer(*pair, w1, w2) for pair in zip(ids, parts, strict=True)]
            return parts, some

        return layers


_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(")
_COMPUTATION = re.compile(r"^%([\w.\-]+) \(.*?\{\n(.*?)^\}", re.DOTALL | re.MULTILINE)
_CALLED = re.compile(r"calls=%([\w.\-]+)")
_PRODUCTS = ("__cublas", " dot(")  # of a library, or of a fusion that Triton compiles


def beside(compiled: str) -> tuple[int, int]:
    """Of a compiled program's asynchronous calls, those with a matrix product beside them; all."""
    fused = {
        name
        for name, body in _COMPUTATION.findall(compiled)
        if any(text in body for text in _PRODUCTS)
    }
    under_way: dict[str, int] = {}
    found: list[int] = []
    for line in compiled.splitlines():
        operation = _OPERATION.match(line)
        if operation is None:
            continue
        if operation[2] == "call-start":
            under_way[operation[1]] = 0
        elif operation[2] == "call-done":
            start = re.search(r"call-done\(.*?%?([\w.\-]+)\)", line)
            if start is not None and start[1] in under_way:
                found.append(under_way.pop(start[1]))
        elif "__cublas" in line or fused.intersection(_CALLED.findall(line)):
            under_way = {name: count + 1 for name, count in under_way.items()}
    return sum(count > 0 for count in found), len(found)


def format_row(row: Row) -> str:
    """A line of the table."""
    if "error" in row:
        return f"{row['operation']:34}  n/a: {row['error']}"
    median, p10, p90 = (1e3 * row[f"{name}_s"] for name in ("median", "p10", "p90"))
    of_plain = "-" if row["of_plain"] is None else f"{row['of_plain']:.2f} x"
    counted = f"{row['beside_products']}/{row['asynchronous_calls']}"
    return (
        f"{row['operation']:34}{median:10.3f}{p10:9.3f}{p90:9.3f}{of_plain:>10}"
        f"{counted if row['asynchronous_calls'] else '-':>9}{row['temp_bytes'] / 1e6:9.1f}"
    )
