"""What one process of a multi-process test does: `worker.py SCENARIO [ARGUMENT...]`.

Started by launcher.py. A scenario that returns lets the interpreter exit the usual way, through
jax_ep's and JAX's own tear-down; one that ends with os._exit says why.
"""

import ctypes
import faulthandler
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

PROCESS = int(os.environ["JAX_EP_TEST_PROCESS"])
NUM_PROCESSES = int(os.environ["JAX_EP_TEST_NUM_PROCESSES"])
OUT = pathlib.Path(os.environ["JAX_EP_TEST_OUT"])

NUM_TOKENS, TOP_K, HIDDEN = 24, 3, 128
LAYOUT_FIELDS = (
    "send_row",
    "recv_src",
    "recv_order",
    "group_sizes",
    "expert_counts",
    "expert_load",
    "num_recv",
    "num_dropped",
    "num_invalid",
)


def join(**options: Any) -> None:
    """Makes this process one of the job, for JAX."""
    if NUM_PROCESSES > 1:
        address = f"127.0.0.1:{os.environ['JAX_EP_TEST_PORT']}"
        jax.distributed.initialize(address, NUM_PROCESSES, PROCESS, **options)


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...], order: Any = None) -> Mesh:
    devices = np.array(jax.devices())
    if order is not None:
        devices = devices[np.asarray(order)]
    return Mesh(devices.reshape(shape), names)


def put(mesh: Mesh, array: np.ndarray, spec: P) -> jax.Array:
    """The array, made global: every process has all of it and gives its shards."""
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )


def per_shard(mesh: Mesh, f: Callable[..., Any]) -> Callable[..., Any]:
    """Jits `f` of shards without the leading axis, which is over all axes of the mesh."""

    def body(*arrays: Any) -> Any:
        return jax.tree.map(lambda a: a[None], f(*(a[0] for a in arrays)))

    spec = P(mesh.axis_names)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def local_parts(tree: Any) -> Iterator[tuple[str, int, np.ndarray]]:
    """(name, index along the leading axis, data) of what this process has of each global array."""
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        for shard in array.addressable_shards:
            data = np.asarray(shard.data)
            if data.dtype.itemsize != 4:  # bfloat16 and float8 cannot be saved as they are
                data = data.view(f"u{data.dtype.itemsize}")
            yield jax.tree_util.keystr(path), shard.index[0].start or 0, data[0]


def example(
    mesh: Mesh, num_ranks: int, seed: int = 0, num_tokens: int = NUM_TOKENS
) -> tuple[np.ndarray, ...]:
    """ids, x bf16, weights, and a cotangent, for every device of the mesh."""
    rng = np.random.default_rng(seed)
    shape = (mesh.size, num_tokens)
    ids = np.argsort(rng.random((*shape, 2 * num_ranks)), -1)[..., :TOP_K].astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    ids[0, 0, 0] = 10**6  # invalid
    x = rng.standard_normal((*shape, HIDDEN)).astype(ml_dtypes.bfloat16)
    weights = rng.random((*shape, TOP_K)).astype(np.float32)
    g = rng.standard_normal((*shape, HIDDEN)).astype(ml_dtypes.bfloat16)
    return ids, x, weights, g


def verbs(axis_name: Any, num_ranks: int, capacity: int | None, alignment: int) -> Any:
    """Everything that the verbs give for one shard."""

    def f(ids: Any, x: Any, weights: Any, g: Any) -> Any:
        layout = jax_ep.make_layout(
            ids,
            num_experts=2 * num_ranks,
            axis_name=axis_name,
            capacity=capacity,
            expert_alignment=alignment,
        )
        rows = jnp.arange(layout.capacity, dtype=jnp.bfloat16)[:, None]

        def layer(x: Any, weights: Any) -> Any:
            recv = jax_ep.dispatch(x, layout, weights)
            return jax_ep.combine(recv.tokens * 2 + rows, layout, recv.weights)

        def plain(x: Any) -> Any:
            return jax_ep.combine(jax_ep.dispatch(x, layout).tokens + rows, layout)

        out, vjp = jax.vjp(layer, x, weights)
        out_plain, vjp_plain = jax.vjp(plain, x)
        fp8 = {
            f"{scales} {dequantize}": tuple(
                jax_ep.dispatch(x, layout, weights, fp8=scales, dequantize=dequantize)[:3]
            )
            for scales in ("float32", "power_of_two")
            for dequantize in (False, True)
        }
        return {
            "layout": {name: getattr(layout, name) for name in LAYOUT_FIELDS},
            "dispatch": tuple(jax_ep.dispatch(x, layout, weights)[:2]),
            "integers": jax_ep.dispatch(ids.repeat(4, axis=1), layout).tokens,
            "fp8": fp8,
            "combine": (out, out_plain),
            "gradients": (vjp(g), vjp_plain(g)),
        }

    return f


def results() -> None:
    """Saves what every verb gives on several meshes of eight devices."""
    join()
    jax_ep.initialize()
    jax_ep._cpu.set_poison_outputs(True)
    permuted = [5, 0, 6, 3, 1, 7, 4, 2]  # neighbours live in different processes
    saved = {}
    for name, mesh, axis_name, num_ranks, capacity, alignment in (
        ("ep", make_mesh((8,), ("ep",)), "ep", 8, None, 1),
        ("ep, dropping", make_mesh((8,), ("ep",)), "ep", 8, 64, 16),
        ("permuted", make_mesh((8,), ("ep",), permuted), "ep", 8, None, 8),
        ("dp, ep", make_mesh((2, 4), ("dp", "ep")), "ep", 4, None, 1),
        ("ep, dp", make_mesh((4, 2), ("ep", "dp")), "ep", 4, 80, 8),
        ("tuple", make_mesh((2, 2, 2), ("a", "dp", "b"), permuted), ("b", "a"), 4, None, 1),
    ):
        data = [put(mesh, array, P(mesh.axis_names)) for array in example(mesh, num_ranks)]
        f = per_shard(mesh, verbs(axis_name, num_ranks, capacity, alignment))
        for key, index, part in local_parts(f(*data)):
            saved[f"{name}|{key}|{index}"] = part
    np.savez(OUT / f"process_{PROCESS}.npz", **saved)


def pairing() -> None:
    """Independent calls, ready in different orders, on all devices of all processes."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "protocol"))
    import stress

    join()
    jax_ep.initialize()
    for scenario in ("eight_layers", "one_layer_twice", "back_to_back", "scan", "two_programs"):
        stress.SCENARIOS[scenario](jax.devices(), 40, 0)


def layer_and_data(seed: int = 0) -> tuple[Callable[..., Any], list[jax.Array], np.ndarray]:
    """Two jitted layers in one program, their data, and one result to know it by."""
    mesh = make_mesh((len(jax.devices()),), ("ep",))
    data = example(mesh, mesh.size, seed)

    @jax.jit
    def layer(ids: Any, x: Any, weights: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=2 * mesh.size, axis_name="ep")
        recv = jax_ep.dispatch(x, layout, weights)
        return jax_ep.combine(recv.tokens, layout, recv.weights), recv.tokens, layout.recv_src

    def both(ids: Any, x: Any, weights: Any) -> Any:
        return layer(ids, x, weights), layer(ids[::-1], x * 3, weights)

    arrays = [put(mesh, array, P("ep")) for array in data[:3]]
    return per_shard(mesh, both), arrays, data[0]


def check_pair(got: Any, ids: np.ndarray) -> None:
    from jax_ep import reference

    ids = np.where(ids >= 2 * len(ids), -1, ids)
    for (_, _, recv_src), expected in zip(got, (ids, ids[:, ::-1]), strict=True):
        layout = reference.make_layout(expected, num_experts=2 * len(ids))
        for shard in recv_src.addressable_shards:
            rank = shard.index[0].start or 0
            np.testing.assert_array_equal(np.asarray(shard.data)[0], layout.recv_src[rank])


def extra_compile(how: str) -> None:
    """Process 0 compiles more than the others before the call. Prints RIGHT or the error."""
    join()
    jax_ep.initialize()
    jax_ep.set_timeout(8)
    f, data, ids = layer_and_data()
    if PROCESS == 0:
        if how == "cost_analysis":
            f.lower(*data).compile().cost_analysis()
        elif how == "compiler_options":
            f.lower(*data).compile({"xla_embed_ir_in_executable": True})
        elif how == "lowered_twice":
            lowered = [f.lower(*data), jax.jit(lambda *a: f(*a)).lower(*data)]
            for one in lowered:
                one.compile()
        elif how == "local_programs":
            jax.jit(lambda x: x + 1)(np.ones(3)).block_until_ready()
    try:
        got = jax.block_until_ready(f(*data))
    except jax.errors.JaxRuntimeError as error:
        print("ERROR", error)
    else:
        check_pair(got, ids)
        print("RIGHT")
    (OUT / f"done_{PROCESS}").touch()
    wait_for_files("done", NUM_PROCESSES)


def killed() -> None:
    """The last process is killed in a loop; the others must learn it from us, and soon.

    With recoverability JAX lets the others exit with code 0, as long as the coordinator, process 0,
    leaves last.
    """
    jax.config.update("jax_enable_recoverability", True)
    join()
    jax_ep.initialize()
    jax_ep.set_timeout(60)
    f, data, _ = layer_and_data()
    start = time.monotonic()
    try:
        for step in range(100000):
            jax.block_until_ready(f(*data))
            start = time.monotonic()
            if step == 20 and PROCESS == NUM_PROCESSES - 1:
                os.kill(os.getpid(), signal.SIGKILL)
    except jax.errors.JaxRuntimeError as error:
        print(f"SECONDS {time.monotonic() - start:.2f}")
        print("ERROR", error)
    # A second call fails as well, at once, and the runtime still computes.
    try:
        jax.block_until_ready(f(*data))
    except jax.errors.JaxRuntimeError as error:
        print("AGAIN", error)
    assert float(jax.jit(jnp.sum)(np.ones(4))) == 4
    coordinator_leaves_last()


def stalled() -> None:
    """The last process never calls."""
    join()
    jax_ep.initialize()
    jax_ep.set_timeout(2)
    f, data, _ = layer_and_data()
    if PROCESS == NUM_PROCESSES - 1:
        wait_for_files("done", NUM_PROCESSES - 1)
        return
    try:
        jax.block_until_ready(f(*data))
    except jax.errors.JaxRuntimeError as error:
        print("ERROR", error)
    (OUT / f"done_{PROCESS}").touch()


def late() -> None:
    """The last process calls after the others have given up; the next call is right again."""
    join()
    jax_ep.initialize()
    f, data, ids = layer_and_data()
    check_pair(f(*data), ids)
    jax_ep.set_timeout(2)
    if PROCESS == NUM_PROCESSES - 1:
        wait_for_files("done", NUM_PROCESSES - 1)
    try:
        jax.block_until_ready(f(*data))
    except jax.errors.JaxRuntimeError as error:
        print("ERROR", error)
    (OUT / f"done_{PROCESS}").touch()
    wait_for_files("done", NUM_PROCESSES)
    jax_ep.set_timeout(60)
    check_pair(f(*data), ids)
    print("RIGHT")


def missing() -> None:
    """The last process does not call initialize(); then it does, and so do the others again."""
    join()
    if PROCESS == NUM_PROCESSES - 1:
        wait_for_files("done", NUM_PROCESSES - 1)
        return
    try:
        jax_ep.initialize(timeout=1.5)
    except RuntimeError as error:
        print("ERROR", error)
    (OUT / f"done_{PROCESS}").touch()
    wait_for_files("done", NUM_PROCESSES - 1)


def retried_after_missing() -> None:
    """The last process comes to initialize() when the others have tried twice, in vain."""
    join()
    if PROCESS < NUM_PROCESSES - 1:
        for _ in range(2):
            try:
                jax_ep.initialize(timeout=1)
            except RuntimeError as error:
                print("ERROR", error)
        (OUT / f"done_{PROCESS}").touch()
    wait_for_files("done", NUM_PROCESSES - 1)
    jax_ep.initialize(timeout=30)
    f, data, ids = layer_and_data()
    check_pair(f(*data), ids)
    print("RIGHT")


def retried_after_failure() -> None:
    """Process 1 cannot be read at first; then it can, and all try again."""
    join()
    libc = drop_ptrace_capability()
    if PROCESS == 1:
        assert libc.prctl(4, 0, 0, 0, 0) == 0  # PR_SET_DUMPABLE
    start = time.monotonic()
    try:
        jax_ep.initialize(timeout=30)
    except RuntimeError as error:
        print(f"SECONDS {time.monotonic() - start:.2f}")
        print("ERROR", error)
    # Nothing is left: this raises nothing, and a program that spans processes is refused.
    jax_ep.finalize()
    f, data, ids = layer_and_data()
    try:
        f(*data)
    except RuntimeError as error:
        print("REFUSED", error)
    if PROCESS == 1:
        assert libc.prctl(4, 1, 0, 0, 0) == 0
    (OUT / f"done_{PROCESS}").touch()
    wait_for_files("done", NUM_PROCESSES)
    jax_ep.initialize(timeout=30)
    check_pair(f(*data), ids)
    print("RIGHT")


def forgotten() -> None:
    """Nobody calls initialize()."""
    join()
    f, data, _ = layer_and_data()
    try:
        jax.block_until_ready(f(*data))
    except RuntimeError as error:
        print("ERROR", error)


def tear_down(how: str) -> None:
    """Leaves in several orders, after a call that everybody has waited for."""
    join()
    jax_ep.initialize()
    try:
        jax_ep.initialize()
    except RuntimeError as error:
        print("TWICE", error)
    f, data, ids = layer_and_data()
    check_pair(f(*data), ids)
    if how == "again":
        jax_ep.finalize()
        jax_ep.finalize()
        jax_ep.initialize()
        check_pair(f(*data), ids)
        jax_ep.finalize()
        try:
            jax.block_until_ready(f(*data))
        except RuntimeError as error:
            print("AFTER", error)
    elif how == "in_turn":
        leave_as(PROCESS)
    elif how == "in_reverse":
        leave_as(NUM_PROCESSES - 1 - PROCESS)
    elif how == "shutdown_first":
        jax.distributed.shutdown()
        jax_ep.finalize()
    elif how == "some_at_exit":
        if PROCESS == 0:
            jax_ep.finalize()
    elif how == "at_exit":
        pass
    elif how == "unblocked":
        f(*data)  # nobody waits for the last one
    else:
        raise ValueError(how)


def drop_ptrace_capability() -> ctypes.CDLL:
    """Gives up CAP_SYS_PTRACE, which root has: with it nothing is unreadable. Returns libc."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for i in range(3):
        sets[i] &= ~(1 << 19)
    assert libc.capset(header, sets) == 0
    return libc


def unreadable() -> None:
    """The last process forbids others to read its memory."""
    join()
    libc = drop_ptrace_capability()
    if PROCESS == NUM_PROCESSES - 1:
        assert libc.prctl(4, 0, 0, 0, 0) == 0  # PR_SET_DUMPABLE
    try:
        jax_ep.initialize(timeout=5)
    except RuntimeError as error:
        print("ERROR", error)
    (OUT / f"done_{PROCESS}").touch()
    wait_for_files("done", NUM_PROCESSES)


def leave_as(place: int) -> None:
    """Calls finalize() when `place` processes have left before."""
    wait_for_files("left", place)
    jax_ep.finalize()
    (OUT / f"left_{PROCESS}").touch()


def coordinator_leaves_last(seconds: float = 60) -> None:
    """Process 0 returns when the other survivors of a job that lost one process have ended."""
    (OUT / f"pid_{os.getpid()}").touch()
    if PROCESS != 0:
        return
    wait_for_files("pid", NUM_PROCESSES - 1)
    others = {int(f.name.removeprefix("pid_")) for f in OUT.glob("pid_*")} - {os.getpid()}
    deadline = time.monotonic() + seconds
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in others):
        assert time.monotonic() < deadline, "the other survivors do not end"
        time.sleep(0.02)


def wait_for_files(name: str, count: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while len(list(OUT.glob(f"{name}_*"))) < count:
        assert time.monotonic() < deadline, f"the other processes left no file {name}"
        time.sleep(0.02)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100, exit=True)
    globals()[sys.argv[1]](*sys.argv[2:])
    sys.stdout.flush()
