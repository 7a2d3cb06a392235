"""A layer of everything that peers touch on GPUs, and what the oracle makes of its data.

Several processes may share a GPU, so nothing here uses XLA's own collectives.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from job import CALL_ERRORS
from layers import NUM_TOKENS, example, local_parts, make_mesh, per_shard, put

import jax_ep
from jax_ep import reference


class Layer:
    """A layer and a part of its gradient, compiled once, with data and what the oracle makes of it.

    It has every kind of buffer that peers touch: ids, rows (as they are, quantised, dequantised,
    with scales), weights, scales, partial sums, and values that are collected.
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
            float8 = jax.lax.bitcast_convert_type(x, jnp.float8_e5m2).reshape(x.shape[0], -1)
            scaled = jax_ep.dispatch(float8, layout, scales=x[:, :2].astype(jnp.float32))
            once, pull_once = jax.vjp(
                lambda x, w: jax_ep.dispatch(x, layout, w, expand=False)[:2], x, weights
            )
            return {
                "recv_src": layout.recv_src,
                "received": recv,
                "quantized": (quantized.tokens, quantized.scales, quantized.weights),
                "dequantized": dequantized.tokens,
                "scaled": (scaled.tokens, scaled.scales),
                "out": out,
                "gradients": pull((recv[0], recv[1] * 2)),
                "not_expanded": once,
                "gradients_not_expanded": pull_once(once),
            }

        self.program = per_shard(self.mesh, layer)
        ids, x, weights, _ = example(self.mesh, self.mesh.size, seed=1, num_tokens=num_tokens)
        self.data = [put(self.mesh, array, self._spec()) for array in (ids, x, weights)]
        ids = np.where(ids >= self.num_experts, -1, ids)
        oracle = reference.make_layout(ids, num_experts=self.num_experts)
        recv = reference.dispatch(x, oracle, weights)
        once = reference.dispatch(x, oracle, weights, expand=False)
        assert recv[1] is not None
        quantized = reference.quantize(x, scale_format="float32")
        dequantized = reference.dequantize(*quantized, x.dtype)
        scaled = x.view(ml_dtypes.float8_e5m2), x[..., :2].astype(np.float32)
        self.expected = {
            "recv_src": oracle.recv_src,
            "received": recv,
            "quantized": (*(reference.dispatch(part, oracle)[0] for part in quantized), recv[1]),
            "dequantized": reference.dispatch(dequantized, oracle)[0],
            "scaled": tuple(reference.dispatch(part, oracle)[0] for part in scaled),
            "out": reference.combine(recv[0], oracle, recv[1]),
            "gradients": reference.dispatch_vjp(oracle, recv[0], recv[1] * 2),
            "not_expanded": once,
            "gradients_not_expanded": reference.dispatch_vjp(oracle, *once, expand=False),
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


def connect(**options: Any) -> None:
    """Calls initialize(), and prints the path that it chose."""
    jax_ep.initialize(**options)
    print("PATH", jax_ep.runtime.describe())
