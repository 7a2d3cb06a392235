"""What the CUDA kernels cannot do is refused when a program is lowered for CUDA.

Also without a GPU, and in an export: the limits are the kernels', not the machine's. CPU has none
of them.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import jax_ep

CHECKS = [
    jax.export.DisabledSafetyCheck.custom_call(f"jax_ep_{op}")
    for op in ("layout", "dispatch", "combine", "combine_gradient")
]


def layer(
    *,
    num_ranks: int = 2,
    num_tokens: int = 8,
    top_k: int = 2,
    num_experts: int = 0,
    hidden: int = 128,
    num_scales: int = 0,
    **options: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A layer without experts, whose rows may cross as fp8 or be it, and its arguments' types."""
    fp8 = {name: options.pop(name) for name in ("fp8", "dequantize") if name in options}
    num_experts = num_experts or num_ranks * top_k

    def f(x: Any, ids: Any, topk_weights: Any) -> Any:
        layout = jax_ep.make_layout(
            ids, num_experts=num_experts, axis_name="ep", capacity=16, **options
        )
        rows, scales = x, None
        if num_scales > 0:
            rows, scales = x.astype(jnp.float8_e4m3fn), jnp.ones((num_tokens, num_scales))
        recv = jax_ep.dispatch(rows, layout, topk_weights, **fp8, scales=scales)
        return jax_ep.combine(recv.tokens.astype(x.dtype), layout, recv.weights)

    mesh = AbstractMesh((num_ranks,), ("ep",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(f, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    rows = num_ranks * num_tokens
    return run, (
        jax.ShapeDtypeStruct((rows, hidden), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, top_k), jnp.int32),
        jax.ShapeDtypeStruct((rows, top_k), jnp.float32),
    )


def lower(f: Callable[..., Any], args: tuple[Any, ...], *platforms: str) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=platforms).as_text()


# Sizes at a limit, what goes beyond it, and what is then said.
LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "top_k": (
        {"top_k": 32},
        {"top_k": 33},
        "jax_ep.make_layout: for CUDA k, the second axis of topk_idx, must be at most 32; got 33. "
        "Make a layout for each part of topk_idx's columns, and add what combine returns",
    ),
    "experts": (
        {"num_experts": 1024},
        {"num_experts": 1026},
        "jax_ep.make_layout: for CUDA num_experts must be at most 1024; got 1026. Make a layout "
        "for each part of the experts, with -1 for the others' ids, and add what combine returns",
    ),
    "ranks": (
        {"num_ranks": 72},
        {"num_ranks": 73},
        "jax_ep.make_layout: for CUDA the group's ranks must be at most 72; got 73. Make the "
        "mesh axes of axis_name smaller",
    ),
    "fp8_channels": (
        {"hidden": 2**15, "fp8": "float32"},
        {"hidden": 2**15 + 128, "fp8": "float32"},
        "jax_ep.dispatch: for CUDA H of fp8 rows must be at most 32768; got 32896. Dispatch x "
        "without fp8, or in parts of its channels",
    ),
    "dequantized_channels": (
        {"hidden": 2**15, "fp8": "power_of_two", "dequantize": True},
        {"hidden": 2**15 + 128, "fp8": "power_of_two", "dequantize": True},
        "jax_ep.dispatch: for CUDA H of fp8 rows must be at most 32768; got 32896.",
    ),
    "scaled_row_bytes": (
        {"hidden": 2**15, "num_scales": 2**12},
        {"hidden": 2**15, "num_scales": 2**13},
        "jax_ep.dispatch: for CUDA the bytes of a row of x with its scales must be at most 49152; "
        "got 65536. Dispatch the scales on their own, as rows, or x in parts of its channels",
    ),
    "tokens_of_an_sm": (
        {"num_tokens": 2 * (2**24 - 1), "num_sms": 2},
        {"num_tokens": 2 * (2**24 - 1) + 1, "num_sms": 2},
        "jax_ep.dispatch: for CUDA the tokens of a call with num_sms = 2 must be at most 33554430; "
        "got 33554431. Split them into several calls, or raise num_sms",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limit(name: str) -> None:
    at_limit, beyond, message = LIMITS[name]
    assert "jax_ep_combine" in lower(*layer(**at_limit), "cuda")
    f, args = layer(**beyond)
    assert "jax_ep_combine" in lower(f, args, "cpu")
    for platforms in (["cuda"], ["cpu", "cuda"]):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            lower(f, args, *platforms)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            jax.export.export(jax.jit(f), platforms=platforms, disabled_checks=CHECKS)(*args)


def test_no_limit_without_fp8() -> None:
    assert "jax_ep_combine" in lower(*layer(hidden=2**24), "cuda")


def test_layout_that_was_made_elsewhere() -> None:
    """Every operation on a layout checks what it takes."""
    mesh = AbstractMesh((2,), ("ep",), axis_types=(AxisType.Auto,))

    def shard_map(f: Callable[..., Any]) -> Callable[..., Any]:
        return jax.shard_map(f, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))

    def make(ids: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=66, axis_name="ep", capacity=16)
        return jax.tree.map(lambda a: a[None], layout)

    def dispatch(x: Any, layout: Any) -> Any:
        return jax_ep.dispatch(x, jax.tree.map(lambda a: a[0], layout)).tokens

    def combine(y: Any, layout: Any) -> Any:
        return jax_ep.combine(y, jax.tree.map(lambda a: a[0], layout))

    layout = jax.eval_shape(shard_map(make), jax.ShapeDtypeStruct((16, 33), jnp.int32))
    for verb, rows in ((dispatch, 8), (combine, 16)):
        args = jax.ShapeDtypeStruct((2 * rows, 128), jnp.bfloat16), layout
        name = verb.__name__
        assert f"jax_ep_{name}" in lower(shard_map(verb), args, "cpu")
        with pytest.raises(ValueError, match=rf"^jax_ep\.{name}: for CUDA k, .* most 32; got 33"):
            lower(shard_map(verb), args, "cuda")
