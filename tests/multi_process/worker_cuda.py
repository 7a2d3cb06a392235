"""What one process of a multi-process test on GPUs does: `worker_cuda.py SCENARIO [ARGUMENT...]`.

As worker.py, and with its helpers. Several processes may share a GPU, so no scenario uses XLA's own
collectives. JAX_EP_TEST_STAGED names processes that take the staged path.
"""

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

if os.environ["JAX_EP_TEST_PROCESS"] in os.environ.get("JAX_EP_TEST_STAGED", "").split():
    os.environ["JAX_EP_PATH"] = "staged"  # read when jax_ep is imported

import jax
import numpy as np
from worker import (
    NUM_PROCESSES,
    NUM_TOKENS,
    OUT,
    PROCESS,
    coordinator_leaves_last,
    example,
    join,
    leave_as,
    local_parts,
    make_mesh,
    per_shard,
    put,
    wait_for_files,
)

import jax_ep
from jax_ep import reference

NUM_GPUS = int(os.environ["JAX_EP_TEST_NUM_GPUS"])
IS_LAST = PROCESS == NUM_PROCESSES - 1
# JAX's own is a RuntimeError; where it waits for several arrays at once it raises a ValueError.
CALL_ERRORS = (RuntimeError, ValueError)


def join_with_gpu() -> None:
    """Makes this process one of the job, with one GPU; alone it has all of them."""
    if NUM_PROCESSES > 1:
        join(local_device_ids=[PROCESS % NUM_GPUS])


def connect(**options: Any) -> None:
    jax_ep.initialize(**options)
    print("PATH", jax_ep.runtime.describe())


class Layer:
    """A layer and a part of its gradient, compiled once, with data and what the oracle makes of it.

    It has every kind of buffer that peers touch: ids, rows (as they are, quantised, dequantised),
    weights, scales, partial sums, and values that are collected.
    """

    def __init__(self, num_tokens: int = NUM_TOKENS) -> None:
        self.mesh = make_mesh((len(jax.devices()),), ("ep",))
        self.num_experts = 2 * self.mesh.size

        def layer(ids: Any, x: Any, weights: Any) -> Any:
            layout = jax_ep.make_layout(ids, num_experts=self.num_experts, axis_name="ep")
            recv, pull = jax.vjp(lambda x, w: jax_ep.dispatch(x, layout, w)[:2], x, weights)
            out = jax_ep.combine(recv[0], layout, recv[1])
            quantized = jax_ep.dispatch(x, layout, weights, fp8="float32")
            dequantized = jax_ep.dispatch(x, layout, fp8="float32", dequantize=True)
            return {
                "recv_src": layout.recv_src,
                "received": recv,
                "quantized": (quantized.tokens, quantized.scales, quantized.weights),
                "dequantized": dequantized.tokens,
                "out": out,
                "gradients": pull((recv[0], recv[1] * 2)),
            }

        self.program = per_shard(self.mesh, layer)
        ids, x, weights, _ = example(self.mesh, self.mesh.size, seed=1, num_tokens=num_tokens)
        self.data = [put(self.mesh, array, self._spec()) for array in (ids, x, weights)]
        ids = np.where(ids >= self.num_experts, -1, ids)
        oracle = reference.make_layout(ids, num_experts=self.num_experts)
        recv = reference.dispatch(x, oracle, weights)
        assert recv[1] is not None
        quantized = reference.quantize(x, scale_format="float32")
        dequantized = reference.dequantize(*quantized, x.dtype)
        self.expected = {
            "recv_src": oracle.recv_src,
            "received": recv,
            "quantized": (*(reference.dispatch(part, oracle)[0] for part in quantized), recv[1]),
            "dequantized": reference.dispatch(dequantized, oracle)[0],
            "out": reference.combine(recv[0], oracle, recv[1]),
            "gradients": reference.dispatch_vjp(oracle, recv[0], recv[1] * 2),
        }

    def _spec(self) -> Any:
        return jax.sharding.PartitionSpec("ep")

    def call(self) -> Any:
        return jax.block_until_ready(self.program(*self.data))

    def check(self, times: int = 3) -> None:
        """Calls, and compares this process's ranks with the oracle to the bit."""
        expected = {
            jax.tree_util.keystr(path): array
            for path, array in jax.tree_util.tree_leaves_with_path(self.expected)
        }
        for _ in range(times):
            for name, rank, part in local_parts(self.call()):
                right = np.ascontiguousarray(expected[name][rank])
                assert part.shape == right.shape, (name, rank, part.shape, right.shape)
                assert part.tobytes() == right.tobytes(), f"{name} of rank {rank} is wrong"
        jax_ep.check()
        print("RIGHT")

    def print_error(self, word: str) -> None:
        """Calls, and prints the error that the call raises."""
        start = time.monotonic()
        try:
            self.call()
        except CALL_ERRORS as error:
            print(f"{word} {time.monotonic() - start:.2f} {error}".replace("\n", " "))


def right(num_tokens: str, staging_bytes: str) -> None:
    """Every verb on whatever path the environment chooses."""
    join_with_gpu()
    connect(staging_bytes=int(staging_bytes))
    Layer(int(num_tokens)).check()


def grown() -> None:
    """XLA's memory has grown since initialize(): an error without a staging region."""
    join_with_gpu()
    connect()
    layer = Layer(2**14)  # a rank receives rows of 16 MB, which do not fit what there was
    layer.print_error("GROWN")
    jax_ep.finalize()
    connect(staging_bytes=1 << 27)
    layer.check()


def too_small() -> None:
    """The region is too small for a call; the error says how large it has to be."""
    join_with_gpu()
    connect(staging_bytes=256)
    layer = Layer()
    layer.print_error("SMALL")
    jax_ep.finalize()
    connect(staging_bytes=1 << 20)
    layer.check()


def not_exportable() -> None:
    """XLA's memory cannot be mapped: initialize() says what to pass, and works with it."""
    join_with_gpu()
    try:
        connect()
    except RuntimeError as error:
        print("ERROR", str(error).replace("\n", " "))
    connect(staging_bytes=1 << 20)
    Layer().check()


def stalled() -> None:
    """The last rank does not call. The others are told; then all begin anew."""
    join_with_gpu()
    connect(staging_bytes=1 << 20)
    layer = Layer()
    layer.check()
    if not IS_LAST:
        jax_ep.set_timeout(1000)
        start = time.monotonic()
        results = layer.program(*layer.data)
        jax_ep.set_timeout(3)  # holds for the kernel that waits already
        jax.block_until_ready(results)
        print(f"SECONDS {time.monotonic() - start:.2f}")
        floats = [p for n, _, p in local_parts(results) if n != "['recv_src']"]
        # bfloat16 and float8 are seen as uint16 and uint8 here.
        is_nan: dict[Any, Callable[[Any], Any]] = {
            np.dtype(np.float32): np.isnan,
            np.dtype(np.uint16): lambda p: (p & 0x7FFF) > 0x7F80,
            np.dtype(np.uint8): lambda p: (p & 0x7F) == 0x7F,
        }
        nan = [is_nan[p.dtype](p) for p in floats]
        print("POISONED", all(part.all() for part in nan))
        try:
            jax_ep.check()
        except RuntimeError as error:
            print("CHECK", error)
        layer.print_error("AGAIN")
        (OUT / f"told_{PROCESS}").touch()
    wait_for_files("told", NUM_PROCESSES - 1)
    jax_ep.finalize()
    jax_ep.check()  # forgotten
    jax_ep.set_timeout(60)
    connect(staging_bytes=1 << 20)
    Layer().check()  # what XLA replays of the old program gives NaN


def killed() -> None:
    """The last process is killed between calls; the others must learn it from us, and soon.

    With recoverability JAX lets the others exit with code 0, as long as the coordinator, process 0,
    leaves last.
    """
    jax.config.update("jax_enable_recoverability", True)
    join_with_gpu()
    connect(staging_bytes=1 << 20)
    layer = Layer()
    layer.check()
    (OUT / f"right_{PROCESS}").touch()
    wait_for_files("right", NUM_PROCESSES)
    jax_ep.set_timeout(4)
    if IS_LAST:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        while time.monotonic() < start + 60:
            layer.call()
            jax_ep.check()
    except CALL_ERRORS as error:
        print(f"SECONDS {time.monotonic() - start:.2f}")
        print("ERROR", str(error).replace("\n", " "))
    layer.print_error("AGAIN")
    assert float(jax.jit(lambda x: x.sum())(np.ones(4))) == 4
    jax_ep.finalize()
    coordinator_leaves_last()


def tear_down(how: str) -> None:
    """Leaves in several orders, after a call that everybody has waited for."""
    join_with_gpu()
    connect(staging_bytes=1 << 20)
    layer = Layer()
    layer.check()
    if how == "again":
        jax_ep.finalize()
        jax_ep.finalize()
        layer.print_error("AFTER")
        for _ in range(2):
            connect(staging_bytes=1 << 20)
            layer.check()
            jax_ep.finalize()
    elif how == "in_turn":
        leave_as(PROCESS)
    elif how == "shutdown_first":
        jax.distributed.shutdown()
        jax_ep.finalize()
    elif how == "some_at_exit":
        if PROCESS == 0:
            jax_ep.finalize()
    elif how == "at_exit":
        pass
    elif how == "unblocked":
        layer.program(*layer.data)  # nobody waits for the last one
    else:
        raise ValueError(how)


def alone() -> None:
    """One process with all GPUs, everything staged; it leaves and comes back."""
    layer = Layer()
    layer.print_error("SMALL")
    jax_ep.initialize(staging_bytes=1 << 20)
    print("PATH", jax_ep.runtime.describe())
    layer.check()
    jax_ep.finalize()
    layer.print_error("AFTER")
    jax_ep.initialize()  # keeps the region
    layer.check()


SCENARIOS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (right, grown, too_small, not_exportable, stalled, killed, tear_down, alone)
}

if __name__ == "__main__":
    faulthandler.dump_traceback_later(200, exit=True)
    SCENARIOS[sys.argv[1]](*sys.argv[2:])
    sys.stdout.flush()
