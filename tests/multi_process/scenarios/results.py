"""What every verb gives on several meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from job import NUM_PROCESSES, OUT, PROCESS, join
from layers import example, local_parts, make_mesh, per_shard, put

import jax_ep

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


def verbs(
    axis_name: Any, num_ranks: int, capacity: int | None, alignment: int, every_kind: bool
) -> Any:
    """What the verbs give for one shard: plain rows, or rows of every kind."""

    def f(ids: Any, x: Any, weights: Any, g: Any) -> Any:
        options = {
            "num_experts": 2 * num_ranks,
            "axis_name": axis_name,
            "capacity": capacity,
            "expert_alignment": alignment,
        }
        layout = jax_ep.make_layout(ids, **options)
        rows = jnp.arange(layout.capacity, dtype=jnp.bfloat16)[:, None]

        def layer(x: Any, weights: Any) -> Any:
            recv = jax_ep.dispatch(x, layout, weights)
            return jax_ep.combine(recv.tokens * 2 + rows, layout, recv.weights)

        def plain(x: Any) -> Any:
            return jax_ep.combine(jax_ep.dispatch(x, layout).tokens + rows, layout)

        out, vjp = jax.vjp(layer, x, weights)
        out_plain, vjp_plain = jax.vjp(plain, x)
        results = {
            "layout": {name: getattr(layout, name) for name in LAYOUT_FIELDS},
            "dispatch": tuple(jax_ep.dispatch(x, layout, weights)[:2]),
            "combine": (out, out_plain),
            "gradients": (vjp(g), vjp_plain(g)),
        }
        if not every_kind:
            return results
        fp8 = {
            f"{scales} {dequantize} {expand}": tuple(
                jax_ep.dispatch(
                    x, layout, weights, fp8=scales, dequantize=dequantize, expand=expand
                )[:3]
            )
            for scales, dequantize, expand in (
                ("float32", False, True),
                ("float32", True, False),
                ("power_of_two", False, False),
                ("power_of_two", True, True),
            )
        }
        once, vjp_once = jax.vjp(
            lambda x, w: jax_ep.dispatch(x, layout, w, expand=False)[:2], x, weights
        )
        as_float8 = jax.lax.bitcast_convert_type(x, jnp.float8_e5m2).reshape(x.shape[0], -1)
        scaled = jax_ep.dispatch(as_float8, layout, weights, scales=x[:, :2].astype(jnp.float32))

        def in_one(x: Any, weights: Any) -> Any:
            layout, recv = jax_ep.layout_and_dispatch(x, ids, weights, **options)
            out = jax_ep.combine(recv.tokens * 2 + rows, layout, recv.weights)
            return out, {name: getattr(layout, name) for name in LAYOUT_FIELDS}

        out_in_one, vjp_in_one, layout_in_one = jax.vjp(in_one, x, weights, has_aux=True)
        _, quantized = jax_ep.layout_and_dispatch(
            x, ids, weights, fp8="float32", expand=False, **options
        )
        return results | {
            "in one": (layout_in_one, out_in_one, vjp_in_one(g), tuple(quantized[:3])),
            "once": (once, vjp_once((once[0] * 3, once[1] * 2))),
            "integers": jax_ep.dispatch(ids.repeat(4, axis=1), layout).tokens,
            "fp8": fp8,
            "scaled": tuple(scaled[:3]),
        }

    return f


def results() -> None:
    """Saves what every verb gives on four meshes of eight devices, or two for many processes."""
    join()
    jax_ep.initialize()
    jax_ep._cpu.set_poison_outputs(True)
    permuted = [5, 0, 6, 3, 1, 7, 4, 2]  # neighbours live in different processes
    saved = {}
    for name, mesh, axis_name, num_ranks, *sizes in (
        ("every kind", make_mesh((8,), ("ep",), permuted), "ep", 8, 64, 16),
        ("dp, ep", make_mesh((2, 4), ("dp", "ep")), "ep", 4, None, 1),
        ("ep, dp", make_mesh((4, 2), ("ep", "dp")), "ep", 4, 80, 8),
        ("tuple", make_mesh((2, 2, 2), ("a", "dp", "b"), permuted), ("b", "a"), 4, None, 1),
    ):
        if NUM_PROCESSES > 2 and name not in ("every kind", "tuple"):
            continue
        data = [put(mesh, array, P(mesh.axis_names)) for array in example(mesh, num_ranks)]
        f = per_shard(mesh, verbs(axis_name, num_ranks, *sizes, name == "every kind"))
        for key, index, part in local_parts(f(*data)):
            saved[f"{name}|{key}|{index}"] = part
    path = OUT / f"process_{PROCESS}.npz"
    np.savez(path, **saved)
    print("RESULTS", path)
