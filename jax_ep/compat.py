"""The only module that knows what differs between JAX versions, or is not public in them.

Supported: JAX 0.10.2 and newer. Everything taken from ``jax._src`` or ``jaxlib`` is taken here.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jaxlib.version
import jaxlib.xla_client
import numpy as np
from jax import lax
from jax._src import ad_checkpoint as _ad_checkpoint
from jax._src import config as _config
from jax._src import core as _core
from jax._src import distributed as _distributed
from jax._src import xla_bridge as _xla_bridge
from jax._src.interpreters import partial_eval as _partial_eval
from jax._src.lib import _jax  # type: ignore[attr-defined]
from jax.extend.core import Primitive
from jax.interpreters import mlir


def varying_axes(x: Any) -> frozenset[str]:
    """Mesh axes over which ``x`` is known to differ between shards (empty if unchecked)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_over(x: Any, axes: Iterable[str]) -> Any:
    """``x``, marked as varying over ``axes`` as well (a no-op where JAX does not track it)."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def tracks_varying(axis: str) -> bool:
    """Whether ``shard_map`` follows what varies over ``axis`` (``check_vma=True``)."""
    return axis in varying_axes(lax.axis_index(axis))


def manual_mesh() -> Any:
    """The abstract mesh whose axes ``shard_map`` has bound here."""
    return jax.sharding.get_abstract_mesh()


def lowering_mesh(ctx: Any) -> Any:
    """The mesh that ``ctx`` lowers for: concrete, or abstract. Hashable."""
    return ctx.module_context.axis_context.mesh


def automatic_axes(ctx: Any) -> tuple[str, ...]:
    """Axes of the mesh that ``ctx`` lowers for which ``shard_map`` leaves to the compiler."""
    manual = ctx.module_context.axis_context.manual_axes
    mesh = lowering_mesh(ctx)
    return tuple(n for n in mesh.axis_names if n not in manual and mesh.shape[n] > 1)


def mesh_devices(mesh: Any) -> tuple[tuple[str, ...], np.ndarray | None, tuple[int, ...]]:
    """A mesh's axis names, its devices (None if it is abstract), its shape."""
    devices = None if isinstance(mesh, jax.sharding.AbstractMesh) else mesh.devices
    return tuple(mesh.axis_names), devices, tuple(mesh.axis_sizes)


def after_each_compilation(function: Callable[[], None]) -> None:
    """Calls ``function`` when a thread has compiled a program, or found it in JAX's cache."""

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            function()

    jax.monitoring.register_event_duration_secs_listener(listen)


def replace_where_recomputed(
    primitive: Primitive, name: str, replace: Callable[[Any], Any]
) -> None:
    """What ``jax.checkpoint`` recomputes in place of an equation of ``primitive``.

    If its policy saves what ``checkpoint_name`` calls ``name``: ``replace`` of the equation, which
    gives the same values. Else, or where they are saved themselves, what it would without this.
    """

    def recomputes(saveable: Callable[..., Any], what: Any, aval: Any, **params: Any) -> bool:
        policy = _partial_eval.ensure_enum(saveable(what, *aval, **params))
        return isinstance(policy, _partial_eval.RecomputeType)

    def rule(
        saveable: Callable[..., Any],
        unknown: Sequence[bool],
        available: Sequence[bool],
        equation: Any,
    ) -> tuple[Any, Any, list[bool], list[bool], list[Any]]:
        avals = [v.aval for v in equation.invars]
        no, yes = ([value] * len(equation.outvars) for value in (False, True))
        if any(unknown):
            known, staged, is_unknown = None, equation, yes
        elif not recomputes(saveable, equation.primitive, avals, **equation.params):
            return equation, None, no, no, []
        else:
            known, staged, is_unknown = equation, equation, no
            if not recomputes(saveable, _ad_checkpoint.name_p, avals[:1], name=name):
                staged = replace(equation)
        there = dict(zip(equation.invars, available, strict=True))
        missing = [v for v in staged.invars if isinstance(v, _core.Var) and not there[v]]
        return known, staged, is_unknown, yes, missing

    _partial_eval.partial_eval_jaxpr_custom_rules[primitive] = rule


def replace_where_unused(
    primitive: Primitive, replace: Callable[[Any, Sequence[bool]], Any]
) -> None:
    """What stays of an equation of ``primitive`` where JAX drops what nothing uses.

    ``jax.checkpoint`` does so with what it recomputes. ``replace`` takes the equation and which of
    its results are used, one at least; its equation takes none but operands of that one.
    """

    def rule(used: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
        equation = rest[-1]  # JAX 0.12 says before it which operands are alive
        if not any(used):
            return [False] * len(equation.invars), None
        left = replace(equation, used)
        return [any(v is operand for operand in left.invars) for v in equation.invars], left

    _partial_eval.dce_rules[primitive] = rule


def lower_on_axes(
    ctx: Any,
    axis_sizes: Mapping[str, int],
    function: Callable[..., Sequence[Any]],
    *operands: tuple[Any, Any],
) -> Sequence[Any]:
    """Lowers ``function``, which may use the mesh's axes; operands are pairs (value, type).

    What varies over which axis is not checked: it may ask for its index along automatic ones.
    """
    values, types = zip(*operands, strict=True) if operands else ((), ())
    with _core.extend_axis_env_nd(axis_sizes.items()), _config._check_vma(False):
        lowered: Sequence[Any] = mlir.lower_fun(function, multiple_results=True)(
            ctx.replace(avals_in=list(types)), *values
        )
    return lowered


def jaxlib_version() -> str:
    """Of the XLA client."""
    return str(jaxlib.version.__version__)


def cpu_client_threads(num_devices: int) -> int | None:
    """Threads on which XLA runs CPU programs; None where a launch never waits for one of them.

    Before jaxlib 0.12 launches hold threads while they wait for their turn, so that the devices of
    the launch whose turn it is may find none. Twice as many threads as devices are enough for
    launches from one thread.
    """
    if tuple(map(int, jaxlib_version().split(".")[:2])) >= (0, 12):
        return None
    wanted = os.environ.get("NPROC", "")
    threads = (
        int(wanted) if wanted.isdecimal() and int(wanted) > 0 else len(os.sched_getaffinity(0))
    )
    return max(threads, num_devices)


def has_live_client(platform: str) -> bool:
    """Whether this process has created a client for ``platform`` ("cpu", "cuda")."""
    clients = _xla_bridge._backends
    return any(platform in (name, client.platform) for name, client in clients.items()) or (
        platform == "cuda" and "gpu" in {client.platform for client in clients.values()}
    )


def register_cpu_targets(
    state_name: str, state_type: Mapping[str, Any], handlers: Mapping[str, Mapping[str, Any]]
) -> None:
    """Registers stateful handlers with the CPU platform, before or after its client exists.

    A target that is registered before the client is queued, and so is its state's type; but the
    client takes the queue of targets first and fails on the unknown type. Installing the type
    handler that the client would install makes the type known at once.
    """
    jaxlib.xla_client.register_custom_type_handler("cpu", _jax.register_custom_type)
    jaxlib.xla_client.register_custom_type(state_name, dict(state_type), platform="cpu")
    for name, stages in handlers.items():
        jax.ffi.register_ffi_target(name, dict(stages), platform="cpu")


def register_cuda_targets(
    state_name: str, state_type: Mapping[str, Any], handlers: Mapping[str, Mapping[str, Any]]
) -> None:
    """Registers stateful handlers with CUDA; the plugin takes queued types before targets."""
    jaxlib.xla_client.register_custom_type(state_name, dict(state_type), platform="CUDA")
    for name, stages in handlers.items():
        jax.ffi.register_ffi_target(name, dict(stages), platform="CUDA")


def process_count() -> int:
    """Processes of the job; 1 without ``jax.distributed``. Creates no client."""
    return int(_distributed.global_state.num_processes or 1)


def process_index() -> int:
    """This process's number in the job. Creates no client."""
    return int(_distributed.global_state.process_id or 0)


def coordination_client() -> Any:
    """The key-value store of ``jax.distributed``, or None if it is not initialised."""
    return _distributed.global_state.client
