"""Scenario of the tier `overlap`: the same bits with and without, in the forms that programs have.

Numbers are small and whole, or eighths, so that sums are exact in any order: XLA fuses a program
with `overlap` in another way. No program has a collective of XLA's, so ranks may share a GPU.
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from job import PLATFORM, connect
from thunks import recorded_thunks

import jax_ep

HIDDEN, FFN, TOP_K, EXPERTS_PER_RANK, NUM_LAYERS = 256, 128, 4, 4, 2
NUM_RUNS = 24 if PLATFORM != "cpu" else 3  # of each, queued before a result is looked at
SCALE = 1 if PLATFORM != "cpu" else 8


def _micro_batch(
    options: dict[str, Any], num_experts: int, x: Any, ids: Any, weights: Any, up: Any, down: Any
) -> Any:
    """A layer for some of a shard's tokens: x [t, H], ids and weights [t, K]."""
    expand = options.get("expand", True)
    options = {name: value for name, value in options.items() if name != "expand"}
    if options.pop("in_one", False):
        layout, recv = jax_ep.layout_and_dispatch(
            x, ids, weights, num_experts=num_experts, axis_name="ep", expand=expand, **options
        )
    else:
        layout = jax_ep.make_layout(ids, num_experts=num_experts, axis_name="ep", **options)
        recv = jax_ep.dispatch(x, layout, weights, expand=expand)
    rows = recv.tokens if expand else recv.tokens[layout.row_token]
    y = jax.nn.relu(rows @ up) @ down
    return jnp.clip(x + jax_ep.combine(y, layout, recv.weights), -3, 3)


def _layers(options: dict[str, Any], num_experts: int, *, remat: bool) -> Callable[..., Any]:
    """Two micro-batches through all layers; up and down have a leading axis of layers."""

    def f(x: Any, weights: Any, up: Any, down: Any, ids: Any) -> Any:
        halves = [(i[: len(i) // 2], i[len(i) // 2 :]) for i in (ids, weights)]

        def step(parts: Any, matrices: Any) -> Any:
            results = [
                _micro_batch(options, num_experts, part, *routing, *matrices)
                for part, *routing in zip(parts, *halves, strict=True)
            ]
            return tuple(results), None

        if remat:
            policy = jax.checkpoint_policies.save_only_these_names("jax_ep_layout")
            step = jax.checkpoint(step, policy=policy)
        parts = x[: len(x) // 2], x[len(x) // 2 :]
        return jnp.concatenate(lax.scan(step, parts, (up, down))[0])

    return f


def _program(mesh: Mesh, options: dict[str, Any], *, remat: bool) -> Callable[..., Any]:
    """x, weights, up, down, ids, cotangent -> out, and gradients of the first four."""
    f = _layers(options, EXPERTS_PER_RANK * mesh.size, remat=remat)

    def shard(*args: Any) -> Any:
        *primals, ids, cotangent = args
        out, pull = jax.vjp(lambda *primals: f(*primals, ids), *primals)
        return out, *pull(cotangent)

    matrices = P(None, "ep")
    specs = (P("ep"), P("ep"), matrices, matrices, P("ep"), P("ep"))
    outs = (P("ep"), P("ep"), P("ep"), matrices, matrices)
    return jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=outs)


def _arguments(mesh: Mesh, num_tokens: int, seed: int) -> list[jax.Array]:
    """Of both micro-batches, num_tokens a rank in all."""
    rng = np.random.default_rng(seed)
    rows, num_experts = mesh.size * num_tokens, EXPERTS_PER_RANK * mesh.size

    def sparse(*shape: int) -> np.ndarray:
        signs = rng.integers(0, 2, shape) * 2 - 1
        return np.where(rng.random(shape) < 1 / 16, signs, 0).astype(np.float32)

    ids = np.argsort(rng.random((rows, num_experts)), axis=1)[:, :TOP_K].astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    arrays = [
        (rng.integers(-3, 4, (rows, HIDDEN)).astype(np.float32), P("ep")),
        (rng.integers(1, 9, (rows, TOP_K)).astype(np.float32) / 8, P("ep")),
        (sparse(NUM_LAYERS, mesh.size * HIDDEN, FFN), P(None, "ep")),
        (sparse(NUM_LAYERS, mesh.size * FFN, HIDDEN), P(None, "ep")),
        (ids, P("ep")),
        (rng.integers(-1, 2, (rows, HIDDEN)).astype(np.float32), P("ep")),
    ]
    return [
        jax.make_array_from_callback(
            array.shape, NamedSharding(mesh, spec), lambda index, array=array: array[index]
        )
        for array, spec in arrays
    ]


def beside() -> None:
    """Each form of program: queued in turn with the one without `overlap`, on data that changes."""
    connect()
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh = Mesh(np.array(jax.devices(PLATFORM)), ("ep",))
    dump = pathlib.Path(os.environ["JAX_EP_TEST_DUMP"])
    # Tokens of a rank, options of the layout and its rows, whether layers are recomputed.
    forms: dict[str, tuple[int, dict[str, Any], bool]] = {
        "gradient": (512, {}, False),
        "recomputed": (512, {}, True),
        "rows per token, drops": (512, {"expand": False, "num_sms": 16, "capacity": 512}, False),
        "in one call": (64, {"in_one": True}, False),  # in slots, if there are some
    }
    for name, (num_tokens, options, remat) in forms.items():
        data = [_arguments(mesh, num_tokens // SCALE, seed) for seed in range(3)]
        programs = []
        for overlap in (False, True):
            program = _program(mesh, {"overlap": overlap, **options}, remat=remat)
            folder = dump / f"{name.replace(' ', '_')}-{overlap}"
            options_of_xla = {} if PLATFORM == "cpu" else {"xla_dump_to": os.fspath(folder)}
            lowered = jax.jit(program).lower(*data[0])
            programs.append(lowered.compile(compiler_options=options_of_xla))
            if overlap and PLATFORM != "cpu":
                num_starts = programs[-1].as_text().count(" call-start(")
                assert num_starts > 2, name
                inside, outside = recorded_thunks(folder)
                assert inside == 0, name
                assert outside >= num_starts, name
                print(f"NOTE: {name}: {num_starts} asynchronous calls, none recorded")
        results: list[list[Any]] = [[], []]
        for i in range(NUM_RUNS):
            # Not always the same one first, and two of a kind in a row.
            for which in ((0, 1), (1, 0), (1, 1, 0, 0))[i % 3]:
                results[which].append((i % 3, programs[which](*data[i % 3])))
        expected: dict[int, Any] = {}
        for seed, result in (*results[0], *results[1]):
            jax.block_until_ready(result)
            arrays = [np.asarray(s.data) for a in result for s in a.addressable_shards]
            assert any(np.any(array) for array in arrays), name
            for array, right in zip(arrays, expected.setdefault(seed, arrays), strict=True):
                np.testing.assert_array_equal(array, right, name)
        jax_ep.check()
    print(f"NOTE: {len(forms)} forms of programs: same bits")
