"""The backends under one interface, so that one behaviour suite runs on all of them.

A backend takes the global view of `jax_ep.reference`: NumPy arrays with a leading axis over the
ranks, in and out. `ReferenceBackend` is the oracle itself; `JaxBackend` runs `jax_ep` on the
devices of a platform, one rank each; `ProcessesBackend` does so with one process for each rank. A
further backend is one more entry of `BACKENDS`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, Protocol

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import DTypeLike, NDArray
from routings import Case

import jax_ep
from jax_ep import reference, runtime

Array = NDArray[Any]

AXIS = "ep"

LAYOUT_ARRAYS = (
    "topk_idx",
    "send_row",
    "recv_src",
    "recv_order",
    "recv_offsets",
    "group_sizes",
    "expert_counts",
    "expert_load",
    "num_recv",
    "num_dropped",
    "num_invalid",
    "kept",
    "row_valid",
    "row_token",
)
"""Names of a layout's arrays, in the oracle and in `jax_ep.Layout`."""

DERIVED_ARRAYS = ("kept", "row_valid", "row_token")
"""Those that are made of the others when they are asked for."""


@dataclasses.dataclass(frozen=True, eq=False)
class BackendLayout:
    """A layout as a backend made it.

    Attributes:
        case: the sizes.
        arrays: by the names in LAYOUT_ARRAYS, each with a leading axis over the ranks. They are
            attributes as well.
        handle: what the backend's own operations take.
        derive: gives DERIVED_ARRAYS, which most tests have no use for, where `arrays` has them not.
    """

    case: Case
    arrays: dict[str, Array]
    handle: Any
    derive: Callable[[], dict[str, Array]] = dict

    def __getattr__(self, name: str) -> Array:
        if name in DERIVED_ARRAYS and name not in self.arrays:
            self.arrays.update(self.derive())
        try:
            return self.arrays[name]
        except KeyError:
            raise AttributeError(name) from None


class Received(tuple[Array, Array | None, Array | None]):
    """Tokens [R, C, H], weights [R, C] or None, scales [R, C, S] or None.

    With expand=False tokens and scales have R * T + 1 rows in place of C.
    """

    tokens = property(lambda self: self[0])
    weights = property(lambda self: self[1])
    scales = property(lambda self: self[2])


class Backend:
    """One way to compute the three verbs and their gradients."""

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run here, or None if it can."""
        return None

    def make_layout(self, case: Case, topk_idx: NDArray[np.int32]) -> BackendLayout:
        """The layout of these ids, int32 [R, T, K]."""
        raise NotImplementedError

    def dispatch(
        self,
        x: Array,
        layout: BackendLayout,
        topk_weights: Array | None = None,
        *,
        fp8: Any = None,
        dequantize: bool = False,
        expand: bool = True,
        scales: Array | None = None,
    ) -> Received:
        """Puts x [R, T, H], its scales [R, T, S] and topk_weights [R, T, K] into expert order."""
        raise NotImplementedError

    def layout_and_dispatch(
        self,
        case: Case,
        topk_idx: NDArray[np.int32],
        x: Array,
        topk_weights: Array | None = None,
        *,
        scales: Array | None = None,
        **form: Any,
    ) -> tuple[BackendLayout, Received]:
        """The two above in one call; ``form`` are dispatch's other options."""
        raise NotImplementedError

    def combine(self, y: Array, layout: BackendLayout, weights: Array | None = None) -> Array:
        """Sums y [R, C, H'] times weights [R, C] into [R, T, H']."""
        raise NotImplementedError

    def dispatch_vjp(
        self,
        layout: BackendLayout,
        d_tokens: Array,
        d_weights: Array | None = None,
        *,
        weights_dtype: DTypeLike = np.float32,
        expand: bool = True,
    ) -> tuple[Array, Array | None]:
        """Cotangents of x, and of topk_weights of that dtype."""
        raise NotImplementedError

    def combine_vjp(
        self, y: Array, layout: BackendLayout, weights: Array | None, g: Array
    ) -> tuple[Array, Array | None]:
        """Cotangents of y and weights."""
        raise NotImplementedError


class ReferenceBackend(Backend):
    """The oracle."""

    name = "reference"

    def make_layout(self, case: Case, topk_idx: NDArray[np.int32]) -> BackendLayout:
        layout = case.reference_layout(topk_idx)
        return BackendLayout(case, {n: getattr(layout, n) for n in LAYOUT_ARRAYS}, layout)

    def dispatch(
        self,
        x: Array,
        layout: BackendLayout,
        topk_weights: Array | None = None,
        *,
        fp8: Any = None,
        dequantize: bool = False,
        expand: bool = True,
        scales: Array | None = None,
    ) -> Received:
        if fp8 is not None:
            q, scales = reference.quantize(x, scale_format=fp8)
            if dequantize:
                x, scales = reference.dequantize(q, scales, x.dtype), None
            else:
                x = q
        tokens, weights = reference.dispatch(x, layout.handle, topk_weights, expand=expand)
        if scales is None:
            return Received((tokens, weights, None))
        recv_scales, _ = reference.dispatch(scales, layout.handle, expand=expand)
        return Received((tokens, weights, recv_scales))

    def layout_and_dispatch(
        self,
        case: Case,
        topk_idx: NDArray[np.int32],
        x: Array,
        topk_weights: Array | None = None,
        *,
        scales: Array | None = None,
        **form: Any,
    ) -> tuple[BackendLayout, Received]:
        layout = self.make_layout(case, topk_idx)
        return layout, self.dispatch(x, layout, topk_weights, scales=scales, **form)

    def combine(self, y: Array, layout: BackendLayout, weights: Array | None = None) -> Array:
        return reference.combine(y, layout.handle, weights)

    def dispatch_vjp(
        self,
        layout: BackendLayout,
        d_tokens: Array,
        d_weights: Array | None = None,
        *,
        weights_dtype: DTypeLike = np.float32,
        expand: bool = True,
    ) -> tuple[Array, Array | None]:
        d_x, d_topk_weights = reference.dispatch_vjp(
            layout.handle, d_tokens, d_weights, expand=expand
        )
        return d_x, None if d_topk_weights is None else d_topk_weights.astype(weights_dtype)

    def combine_vjp(
        self, y: Array, layout: BackendLayout, weights: Array | None, g: Array
    ) -> tuple[Array, Array | None]:
        return reference.combine_vjp(y, layout.handle, weights, g)


class JaxBackend(Backend):
    """`jax_ep` on the devices of one platform: jit of shard_map, one rank a device.

    Compiled functions are kept by their static sizes and options (here and in jax.jit), so many
    routings of the same sizes cost one compilation.
    """

    def __init__(self, name: str, platform: str):
        self.name = name
        self.platform = platform
        self.per_rank = functools.cache(self._per_rank)

    def unavailable(self) -> str | None:
        try:
            jax.devices(self.platform)
            if self.platform == "cuda":
                runtime.require_cuda("the tests")
        except RuntimeError as error:
            return str(error)
        return None

    def devices(self) -> list[jax.Device]:
        """By rank."""
        return jax.devices(self.platform)

    no_collectives: str | None = None
    """Why XLA's own collectives do not work here, or None if they do."""

    @property
    def num_devices(self) -> int:
        """The largest group that can be had here."""
        return len(self.devices())

    def mesh(self, num_ranks: int) -> jax.sharding.Mesh:
        """The first devices as a mesh with the one axis AXIS."""
        devices = self.devices()
        if num_ranks > len(devices):
            if hypothesis.currently_in_test_context():
                hypothesis.reject()  # another example may fit
            pytest.skip(f"backend {self.name}: {num_ranks} ranks, but {len(devices)} devices")
        return jax.sharding.Mesh(np.array(devices[:num_ranks]), (AXIS,))

    def agree(self, value: Any) -> Any:
        """One process's opinion where the processes may differ, as with clocks: the first one's."""
        return value

    def _per_rank(self, num_ranks: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of one rank's arrays, as a compiled function of all ranks' stacked arrays.

        Arguments and results are pytrees. Results come as NumPy arrays. Kept by the identity of
        `function`: pass one that lives as long as its caller, not a lambda made for each call.
        """

        def shard(*args: Any) -> Any:
            return jax.tree.map(
                lambda a: jnp.asarray(a)[None], function(*jax.tree.map(lambda a: a[0], args))
            )

        spec = PartitionSpec(AXIS)
        return jax.jit(
            jax.shard_map(shard, mesh=self.mesh(num_ranks), in_specs=spec, out_specs=spec)
        )

    def call(self, num_ranks: int, function: Callable[..., Any], *args: Any) -> Any:
        """Calls `per_rank(num_ranks, function)`; the results stay where they are."""
        return self.per_rank(num_ranks, function)(*args)

    def fetch(self, num_ranks: int, results: Any) -> Any:
        """What `call` gave, as NumPy arrays of all ranks."""
        return jax.device_get(results)

    def run(self, num_ranks: int, function: Callable[..., Any], *args: Any) -> Any:
        """Calls `per_rank(num_ranks, function)` and fetches the results."""
        return self.fetch(num_ranks, self.call(num_ranks, function, *args))

    def make_layout(self, case: Case, topk_idx: NDArray[np.int32]) -> BackendLayout:
        return self._layout(case, self.call(case.num_ranks, _layout_function(case), topk_idx))

    def _layout(self, case: Case, layout: Any) -> BackendLayout:
        arrays = {n: getattr(layout, n) for n in LAYOUT_ARRAYS if n not in DERIVED_ARRAYS}
        derive = functools.partial(self.run, case.num_ranks, _derived, layout)
        return BackendLayout(case, self.fetch(case.num_ranks, arrays), layout, derive)

    def dispatch(
        self,
        x: Array,
        layout: BackendLayout,
        topk_weights: Array | None = None,
        *,
        fp8: Any = None,
        dequantize: bool = False,
        expand: bool = True,
        scales: Array | None = None,
    ) -> Received:
        function = _dispatch_function(fp8, dequantize, expand)
        arguments = layout.handle, x, topk_weights, scales
        return Received(self.run(layout.case.num_ranks, function, *arguments))

    def layout_and_dispatch(
        self,
        case: Case,
        topk_idx: NDArray[np.int32],
        x: Array,
        topk_weights: Array | None = None,
        *,
        scales: Array | None = None,
        **form: Any,
    ) -> tuple[BackendLayout, Received]:
        function = _layout_and_dispatch_function(case, tuple(form.items()))
        layout, received = self.call(case.num_ranks, function, topk_idx, x, topk_weights, scales)
        return self._layout(case, layout), Received(self.fetch(case.num_ranks, received))

    def combine(self, y: Array, layout: BackendLayout, weights: Array | None = None) -> Array:
        out: Array = self.run(layout.case.num_ranks, _combine, layout.handle, y, weights)
        return out

    def dispatch_vjp(
        self,
        layout: BackendLayout,
        d_tokens: Array,
        d_weights: Array | None = None,
        *,
        weights_dtype: DTypeLike = np.float32,
        expand: bool = True,
    ) -> tuple[Array, Array | None]:
        shape = layout.topk_idx.shape
        x = np.zeros((*shape[:2], d_tokens.shape[-1]), d_tokens.dtype)
        topk_weights = None if d_weights is None else np.zeros(shape, weights_dtype)
        function = _dispatch_vjp_function(expand)
        results: tuple[Array, Array | None] = self.run(
            shape[0], function, layout.handle, x, topk_weights, d_tokens, d_weights
        )
        return results

    def combine_vjp(
        self, y: Array, layout: BackendLayout, weights: Array | None, g: Array
    ) -> tuple[Array, Array | None]:
        results: tuple[Array, Array | None] = self.run(
            layout.case.num_ranks, _combine_vjp, layout.handle, y, weights, g
        )
        return results


class Exchange(Protocol):
    """How the processes of a job tell each other what they have, without their devices."""

    process: int
    num_processes: int

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's value, by process. Collective."""
        raise NotImplementedError


class ProcessesBackend(JaxBackend):
    """One process a rank, all of which run the same tests in the same order.

    Rank r is process r with its first device. Every process makes all ranks' data, feeds its own
    shard, and learns the others' results through the exchange, on the host: so tests compare all
    ranks and pass or fail in every process alike, and no collective of XLA is in the programs. An
    error in one process becomes an error in all. A group that is smaller than the job leaves
    processes out: they trace the function, and hold shapes where the others hold arrays.
    """

    def __init__(self, platform: str, exchange: Exchange):
        super().__init__("processes", platform)
        self.exchange = exchange
        if os.environ.get("JAX_EP_TEST_RANKS_PER_GPU", "1") != "1":
            self.no_collectives = "XLA's own collectives refuse two ranks on one GPU"

    def devices(self) -> list[jax.Device]:
        first: dict[int, jax.Device] = {}
        for device in jax.devices(self.platform):
            first.setdefault(device.process_index, device)
        return [first[process] for process in sorted(first)]

    def agree(self, value: Any) -> Any:
        return self.exchange.all_gather(value)[0]

    def call(self, num_ranks: int, function: Callable[..., Any], *args: Any) -> Any:
        sharding = NamedSharding(self.mesh(num_ranks), PartitionSpec(AXIS))
        takes_part = self.exchange.process < num_ranks

        def place(argument: Any) -> Any:
            if isinstance(argument, jax.Array | jax.ShapeDtypeStruct):
                return argument
            array = np.asarray(argument)
            if not takes_part:
                return jax.ShapeDtypeStruct(array.shape, array.dtype)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        results, error = None, None
        try:
            compiled, placed = self.per_rank(num_ranks, function), jax.tree.map(place, args)
            if takes_part:
                results = jax.block_until_ready(compiled(*placed))
            else:
                results = jax.eval_shape(compiled, *placed)
        except Exception as caught:  # whatever it is, the other processes must hear of it
            error = caught
        told = self.exchange.all_gather(None if error is None else repr(error))
        if error is not None:
            raise error
        for process, text in enumerate(told):
            if text is not None:
                raise RuntimeError(f"process {process}: {text}")
        return results

    def fetch(self, num_ranks: int, results: Any) -> Any:
        leaves, structure = jax.tree.flatten(results)
        mine = None
        if self.exchange.process < num_ranks:
            mine = [np.asarray(leaf.addressable_shards[0].data) for leaf in leaves]
        parts = self.exchange.all_gather(mine)[:num_ranks]
        return structure.unflatten([np.concatenate(shards) for shards in zip(*parts, strict=True)])


def layout_options(case: Case) -> dict[str, Any]:
    """What `make_layout` is given beside the ids."""
    return {
        "num_experts": case.num_experts,
        "axis_name": AXIS,
        "capacity": case.capacity,
        "expert_alignment": case.expert_alignment,
        "expert_capacity": case.expert_capacity,
        "zero_tail": case.zero_tail,
        "num_sms": case.num_sms,
    }


def _derived(layout: Any) -> dict[str, jax.Array]:
    return {name: getattr(layout, name) for name in DERIVED_ARRAYS}


@functools.cache
def _layout_function(case: Case) -> Callable[..., Any]:
    return lambda topk_idx: jax_ep.make_layout(topk_idx, **layout_options(case))


@functools.cache
def _layout_and_dispatch_function(
    case: Case, form: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    def function(ids: Any, x: Any, topk_weights: Any, scales: Any) -> Any:
        layout, received = jax_ep.layout_and_dispatch(
            x, ids, topk_weights, scales=scales, **layout_options(case), **dict(form)
        )
        return layout, (received.tokens, received.weights, received.scales)

    return function


@functools.cache
def _dispatch_function(fp8: Any, dequantize: bool, expand: bool) -> Callable[..., Any]:
    def dispatch_function(
        layout: Any, x: jax.Array, topk_weights: jax.Array | None, scales: jax.Array | None
    ) -> Any:
        received = jax_ep.dispatch(
            x,
            layout,
            topk_weights,
            fp8=fp8,
            dequantize=dequantize,
            expand=expand,
            scales=scales,
        )
        return received.tokens, received.weights, received.scales

    return dispatch_function


def _combine(layout: Any, y: jax.Array, weights: jax.Array | None) -> jax.Array:
    return jax_ep.combine(y, layout, *(() if weights is None else (weights,)))


@functools.cache
def _dispatch_vjp_function(expand: bool) -> Callable[..., Any]:
    def dispatch_vjp(layout: Any, x: Any, topk_weights: Any, d_tokens: Any, d_weights: Any) -> Any:
        def dispatch(x: Any, topk_weights: Any = None) -> Any:
            return jax_ep.dispatch(x, layout, topk_weights, expand=expand)[:2]

        if topk_weights is None:
            _, pull = jax.vjp(lambda x: dispatch(x)[0], x)
            return *pull(d_tokens), None
        _, pull = jax.vjp(dispatch, x, topk_weights)
        return pull((d_tokens, d_weights))

    return dispatch_vjp


def _combine_vjp(layout: Any, y: jax.Array, weights: jax.Array | None, g: jax.Array) -> Any:
    if weights is None:
        _, pull = jax.vjp(lambda y: jax_ep.combine(y, layout), y)
        return *pull(g), None
    _, pull = jax.vjp(lambda y, w: jax_ep.combine(y, layout, w), y, weights)
    return pull(g)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (ReferenceBackend(), JaxBackend("cpu", "cpu"), JaxBackend("cuda", "cuda"))
}


def use_processes(platform: str, exchange: Exchange) -> None:
    """Puts the job's processes in the place of the backends on this process's devices."""
    for name in ("cpu", "cuda"):
        del BACKENDS[name]
    BACKENDS["processes"] = ProcessesBackend(platform, exchange)
