"""Compiles programs of two micro-batches with XLA:GPU, on a machine without a GPU.

    python compile_for_cuda.py DIR

writes to DIR/NAME, for each of PROGRAMS, what XLA has scheduled, ``scheduled.hlo``, and what XLA
dumps. It needs the plugin's wheels, of JAX's version, and no library of CUDA: nothing runs.
"""

import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _cpu, _native, overlap

NUM_RANKS, NUM_TOKENS, HIDDEN, FFN, TOP_K, NUM_EXPERTS = 2, 8192, 4096, 512, 2, 16
CAPACITY = jax_ep.capacity(NUM_TOKENS, TOP_K, NUM_RANKS, 1.25, num_experts=NUM_EXPERTS)
BATCHES = ("first", "second")

# Sizes that an array of the experts' GEMMs has, and no other GEMM's.
EXPERT_SIZES = (CAPACITY, FFN)


def register_stand_ins() -> None:
    """Handlers of any kind, where ours are not built: XLA asks whether there is one."""
    handlers = _cpu.handlers()
    handlers["jax_ep_combine_gradient"] = handlers["jax_ep_combine"]
    for name, stages in handlers.items():
        execute = {"execute": stages["execute"]}
        for target in (name, overlap.target(name)):
            jax.ffi.register_ffi_target(target, execute, platform="CUDA")


def layer(
    options: dict[str, Any], x: tuple[Any, Any], router: Any, up: Any, down: Any
) -> list[jax.Array]:
    """Both micro-batches through a layer whose experts are one matrix, as far as GEMMs go."""

    def micro_batch(x: Any) -> jax.Array:
        weights, ids = lax.top_k(jax.nn.softmax((x @ router).astype(jnp.float32)), TOP_K)
        layout = jax_ep.make_layout(
            ids, num_experts=NUM_EXPERTS, axis_name="ep", capacity=CAPACITY, **options
        )
        recv = jax_ep.dispatch(x, layout, weights)
        y = jax.nn.silu(recv.tokens @ up) @ down
        return x + jax_ep.combine(y, layout, recv.weights)

    results = []
    for name, part in zip(BATCHES, x, strict=True):
        with jax.named_scope(name):
            results.append(micro_batch(part))
    return results


def forward(options: dict[str, Any], mesh: Mesh) -> Callable[..., Any]:
    """One layer, and a mean over all devices: a collective that XLA makes asynchronous."""
    run = jax.shard_map(
        lambda *args: layer(options, *args),
        mesh=mesh,
        in_specs=((P("ep"), P("ep")), P(), P("ep"), P("ep")),
        out_specs=P("ep"),
    )
    return lambda *args: sum(jnp.mean(y.astype(jnp.float32) ** 2) for y in run(*args))


def layers(options: dict[str, Any], mesh: Mesh, *, remat: bool) -> Callable[..., Any]:
    """A scan over layers; no collective of XLA's in it."""

    def step(router: Any, x: Any, weights: Any) -> tuple[Any, None]:
        return tuple(layer(options, x, router, *weights)), None

    if remat:
        policy = jax.checkpoint_policies.save_only_these_names("jax_ep_layout")
        step = jax.checkpoint(step, policy=policy)

    def body(x: Any, router: Any, up: Any, down: Any) -> Any:
        return lax.scan(lambda x, weights: step(router, x, weights), tuple(x), (up, down))[0]

    stacked = P(None, "ep")
    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=((P("ep"), P("ep")), P(), stacked, stacked),
        out_specs=P("ep"),
    )
    return lambda *args: sum(jnp.mean(y.astype(jnp.float32) ** 2) for y in run(*args))


def gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(f, argnums=(0, 1, 2, 3))


def arguments(mesh: Mesh, num_layers: int | None) -> tuple[Any, ...]:
    """The types of x (a pair), router, up and down."""

    def array(shape: tuple[int, ...], *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    stack = () if num_layers is None else (num_layers,)
    before = [None] * len(stack)
    x = array((NUM_RANKS * NUM_TOKENS, HIDDEN), "ep")
    return (
        (x, x),
        array((HIDDEN, NUM_EXPERTS)),
        array((*stack, NUM_RANKS * HIDDEN, FFN), *before, "ep"),
        array((*stack, NUM_RANKS * FFN, HIDDEN), *before, "ep"),
    )


OVERLAP = {"overlap": True}
IN_FLIGHT = {"xla_gpu_experimental_parallel_collective_overlap_limit": 4}
PROGRAMS: dict[str, tuple[Callable[[Mesh], Callable[..., Any]], int | None, dict[str, Any]]] = {
    "forward": (lambda mesh: forward(OVERLAP, mesh), None, {}),
    "gradient": (lambda mesh: gradient(forward(OVERLAP, mesh)), None, {}),
    "without": (lambda mesh: gradient(forward({"num_sms": 24}, mesh)), None, {}),
    "scan": (lambda mesh: layers(OVERLAP, mesh, remat=False), 4, {}),
    "remat": (lambda mesh: gradient(layers(OVERLAP, mesh, remat=True)), 4, {}),
    "in_flight": (lambda mesh: forward(OVERLAP, mesh), None, IN_FLIGHT),
    "streams": (
        lambda mesh: forward(OVERLAP, mesh),
        None,
        IN_FLIGHT | {"xla_gpu_experimental_enable_collective_multi_streaming": True},
    ),
}


def main(folder: pathlib.Path) -> None:
    target = (pathlib.Path(__file__).parent / "h100.pbtxt").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=f"1x1x{NUM_RANKS}"
    )
    if _native.cuda is None:
        register_stand_ins()
    mesh = Mesh(np.array(topology.devices), ("ep",))
    for name, (make, num_layers, options) in PROGRAMS.items():
        f = make(mesh)

        lowered = jax.jit(f).lower(*arguments(mesh, num_layers))
        out = folder / name
        compiled = lowered.compile(compiler_options=options | {"xla_dump_to": os.fspath(out)})
        (out / "scheduled.hlo").write_text(compiled.as_text())


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
