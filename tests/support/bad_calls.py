"""Calls that are refused when they are traced, each with its error; test_errors.py tries them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import routings
from backends import AXIS
from routings import Case

import jax_ep

BF16, F32 = ml_dtypes.bfloat16, np.float32

CASE = Case(2, 4, 2, 6, hidden=8, capacity=8, expert_alignment=2)
IDS = routings.topk_ids(np.random.default_rng(40), CASE, "uniform")

Verb = Callable[..., Any]


def make(ids: Any, **change: Any) -> Any:
    options: dict[str, Any] = {"num_experts": 6, "axis_name": AXIS, "capacity": 8}
    return jax_ep.make_layout(ids, **(options | {"expert_alignment": 2} | change))


def zeros(*shape: int, dtype: Any = F32) -> jax.Array:
    return jnp.zeros(shape, dtype)


# Each is called with (ids, layout) of one rank. The message names the verb, the argument, what was
# required and what came, and where there is one, what to do.
LAYOUT_ERRORS: list[tuple[str, type[Exception], str, Verb]] = [
    (
        "ids_dtype",
        TypeError,
        "make_layout: topk_idx must be int32; got float32: it takes the ids of experts, "
        "jax.lax.top_k's second result",
        lambda ids, _: make(ids.astype(F32)),
    ),
    (
        "ids_int16",
        TypeError,
        "make_layout: topk_idx must be int32; got int16: cast it with topk_idx.astype(jnp.int32)",
        lambda ids, _: make(ids.astype(np.int16)),
    ),
    (
        "ids_list",
        TypeError,
        "make_layout: topk_idx must be an array; got list",
        lambda ids, _: make([[0, 1]]),
    ),
    (
        "ids_rank",
        ValueError,
        "make_layout: topk_idx must have shape [tokens, k]; got (4,). Fold leading axes into the "
        "first with reshape",
        lambda ids, _: make(ids[:, 0]),
    ),
    (
        "ids_batched",
        ValueError,
        "make_layout: topk_idx must have shape [tokens, k]; got (1, 4, 2). Fold leading axes into "
        "the first with reshape",
        lambda ids, _: make(ids[None]),
    ),
    (
        "no_tokens",
        ValueError,
        "make_layout: topk_idx must not be empty; got shape (0, 2)",
        lambda ids, _: make(ids[:0]),
    ),
    (
        "no_choices",
        ValueError,
        "make_layout: topk_idx must not be empty; got shape (4, 0)",
        lambda ids, _: make(ids[:, :0]),
    ),
    (
        "experts_not_divisible",
        ValueError,
        "make_layout: num_experts must be a multiple of the 2 ranks along ('ep',); got 5. Pad the "
        "experts: pass num_experts=6 and append 1 to their weights, as "
        "jnp.pad(w, ((0, 1), (0, 0), (0, 0))) does. The router and its ids stay as they are: no "
        "token chooses the added ones",
        lambda ids, _: make(ids, num_experts=5),
    ),
    (
        "experts_of_one_rank",
        ValueError,
        "make_layout: num_experts must be a multiple of the 2 ranks along ('ep',); got 1. It is "
        "the width of the router, the experts of the whole group, not those of one rank",
        lambda ids, _: make(ids[:, :1], num_experts=1),
    ),
    (
        "no_experts",
        ValueError,
        "make_layout: num_experts must be at least 1; got 0",
        lambda ids, _: make(ids, num_experts=0),
    ),
    (
        "experts_float",
        TypeError,
        "make_layout: num_experts must be a static Python int; got 6.0, a float",
        lambda ids, _: make(ids, num_experts=6.0),
    ),
    (
        "experts_bool",
        TypeError,
        "make_layout: num_experts must be a static Python int; got bool",
        lambda ids, _: make(ids, num_experts=True),
    ),
    (
        "overlap_number",
        TypeError,
        "make_layout: overlap must be a static Python bool; got int",
        lambda ids, _: make(ids, overlap=24),
    ),
    (
        "zero_tail_text",
        TypeError,
        "make_layout: zero_tail must be a static Python bool; got str",
        lambda ids, _: make(ids, zero_tail="False"),
    ),
    (
        "check_ids_traced",
        TypeError,
        "make_layout: check_ids must be a static Python bool; got an array int32[]",
        lambda ids, _: make(ids, check_ids=ids[0, 0]),
    ),
    (
        "expand_number",
        TypeError,
        "dispatch: expand must be a static Python bool; got int",
        lambda _, layout: jax_ep.dispatch(zeros(4, 8), layout, expand=0),
    ),
    (
        "capacity_traced",
        TypeError,
        "make_layout: capacity must be a static Python int; got an array int32[]",
        lambda ids, _: make(ids, capacity=ids[0, 0]),
    ),
    (
        "capacity_factor",
        TypeError,
        "make_layout: capacity must be a static Python int; got 1.25, a float. It counts rows; "
        "jax_ep.capacity computes them from a factor over the mean load",
        lambda ids, _: make(ids, capacity=1.25),
    ),
    (
        "too_many_choices",
        ValueError,
        "make_layout: topk_idx has k = 8 experts per token, but num_experts is 6",
        lambda ids, _: make(jnp.tile(ids, 4)),
    ),
    (
        "no_capacity",
        ValueError,
        "make_layout: capacity must be at least 1; got 0",
        lambda ids, _: make(ids, capacity=0),
    ),
    (
        "negative_capacity",
        ValueError,
        "make_layout: capacity must be at least 1; got -2",
        lambda ids, _: make(ids, capacity=-2),
    ),
    (
        "unaligned_capacity",
        ValueError,
        "make_layout: capacity must be a multiple of expert_alignment = 2; got 7. "
        "jax_ep.capacity(..., expert_alignment=2) computes one",
        lambda ids, _: make(ids, capacity=7),
    ),
    (
        "huge_capacity",
        ValueError,
        "make_layout: rows are counted in int32: capacity must be at most 2146435072; got "
        "4294967296. jax_ep.capacity computes one from the number of tokens",
        lambda ids, _: make(ids, capacity=2**32),
    ),
    (
        "both_capacities",
        ValueError,
        "make_layout: give capacity or expert_capacity, not both; got 8 and 4. expert_capacity "
        "alone makes it experts per rank * expert_capacity",
        lambda ids, _: make(ids, expert_capacity=4),
    ),
    (
        "unaligned_expert_capacity",
        ValueError,
        "make_layout: expert_capacity must be a multiple of expert_alignment = 2; got 7. "
        "jax_ep.expert_capacity(..., expert_alignment=2) computes one",
        lambda ids, _: make(ids, capacity=None, expert_capacity=7),
    ),
    (
        "no_expert_capacity",
        ValueError,
        "make_layout: expert_capacity must be at least 1; got 0",
        lambda ids, _: make(ids, capacity=None, expert_capacity=0),
    ),
    (
        "huge_expert_capacity",
        ValueError,
        "make_layout: rows are counted in int32: experts per rank * expert_capacity must be at "
        "most 2146435072; got 3 * 1073741824 = 3221225472. jax_ep.expert_capacity computes one "
        "from the number of tokens",
        lambda ids, _: make(ids, capacity=None, expert_capacity=2**30),
    ),
    (
        "huge_alignment",
        ValueError,
        "make_layout: rows are counted in int32: ranks * tokens * k + num_experts * "
        "expert_alignment must be at most 2146435072; got 2 * 4 * 2 + 6 * 1073741824 = 6442450960. "
        "Split the tokens of topk_idx into several calls, or lower expert_alignment",
        lambda ids, _: make(ids, capacity=2**30, expert_alignment=2**30),
    ),
    (
        "alignment",
        ValueError,
        "make_layout: expert_alignment must be at least 1; got 0",
        lambda ids, _: make(ids, expert_alignment=0),
    ),
    (
        "num_sms",
        ValueError,
        "make_layout: num_sms must be at least 1; got 0",
        lambda ids, _: make(ids, num_sms=0),
    ),
    (
        "unknown_axis",
        ValueError,
        "make_layout: axis_name 'expert' is not an axis of an enclosing jax.shard_map; bound axes: "
        "['ep']. Call the operation inside jax.shard_map over a mesh that has this axis",
        lambda ids, _: make(ids, axis_name="expert"),
    ),
    (
        "axis_twice",
        ValueError,
        "make_layout: axis_name must name one or more distinct axes; got ('ep', 'ep')",
        lambda ids, _: make(ids, axis_name=("ep", "ep")),
    ),
    (
        "no_axis",
        ValueError,
        "make_layout: axis_name must name one or more distinct axes; got ()",
        lambda ids, _: make(ids, axis_name=()),
    ),
]

DISPATCH_ERRORS: list[tuple[str, type[Exception], str, Verb]] = [
    (
        "x_dtype",
        TypeError,
        "dispatch: x must be one of bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, int8, "
        "int16, int32, int64, uint8, uint16, uint32, uint64; got complex64: cast it first",
        lambda _, layout: jax_ep.dispatch(zeros(4, 8, dtype=np.complex64), layout),
    ),
    (
        "x_bool",
        TypeError,
        "uint64; got bool: cast it first",
        lambda _, layout: jax_ep.dispatch(zeros(4, 16, dtype=bool), layout),
    ),
    (
        "x_other_fp8",
        TypeError,
        "uint64; got float8_e8m0fnu: send its bytes, jax.lax.bitcast_convert_type(x, jnp.uint8), "
        "and cast them back",
        lambda _, layout: jax_ep.dispatch(zeros(4, 16, dtype=jnp.float8_e8m0fnu), layout),
    ),
    (
        "x_int4",
        TypeError,
        "uint64; got int4: pack 2 of them into a byte with jax.lax.bitcast_convert_type, as "
        'docs/guide.md shows under "Narrow rows"',
        lambda _, layout: jax_ep.dispatch(zeros(4, 32, dtype=jnp.int4), layout),
    ),
    (
        "x_fp4",
        TypeError,
        "uint64; got float4_e2m1fn: pack 2 of them into a byte",
        lambda _, layout: jax_ep.dispatch(zeros(4, 32, dtype=jnp.float4_e2m1fn), layout),
    ),
    (
        "x_int2",
        TypeError,
        "uint64; got int2: pack 4 of them into a byte",
        lambda _, layout: jax_ep.dispatch(zeros(4, 64, dtype=jnp.int2), layout),
    ),
    (
        "x_list",
        TypeError,
        "dispatch: x must be an array; got list",
        lambda _, layout: jax_ep.dispatch([[1.0]], layout),
    ),
    (
        "x_rank",
        ValueError,
        "dispatch: x must have shape [tokens, hidden]; got (2, 2, 8). Fold leading axes into the "
        "first with reshape",
        lambda _, layout: jax_ep.dispatch(zeros(2, 2, 8), layout),
    ),
    (
        "x_empty",
        ValueError,
        "dispatch: x must not be empty; got shape (4, 0)",
        lambda _, layout: jax_ep.dispatch(zeros(4, 0), layout),
    ),
    (
        "x_tokens",
        ValueError,
        "dispatch: x has 3 tokens, but the layout (6 experts, 2 ranks along ('ep',)) was made for "
        "4",
        lambda _, layout: jax_ep.dispatch(zeros(3, 8), layout),
    ),
    (
        "x_row",
        ValueError,
        "dispatch: a row of x must be a multiple of 16 bytes; got 6 x float32 = 24 bytes. Pad the "
        "last axis",
        lambda _, layout: jax_ep.dispatch(zeros(4, 6), layout),
    ),
    (
        "x_row_int8",
        ValueError,
        "dispatch: a row of x must be a multiple of 16 bytes; got 8 x int8 = 8 bytes",
        lambda _, layout: jax_ep.dispatch(zeros(4, 8, dtype=np.int8), layout),
    ),
    (
        "weights_shape",
        ValueError,
        "dispatch: topk_weights must have shape (4, 2); got (4, 3): one for each id of topk_idx",
        lambda _, layout: jax_ep.dispatch(zeros(4, 8), layout, zeros(4, 3)),
    ),
    (
        "weights_dtype",
        TypeError,
        "dispatch: topk_weights must be floating point; got int32",
        lambda ids, layout: jax_ep.dispatch(zeros(4, 8), layout, ids),
    ),
    (
        "layout_type",
        TypeError,
        "dispatch: layout must come from jax_ep.make_layout; got dict",
        lambda _, layout: jax_ep.dispatch(zeros(4, 8), {}),
    ),
    (
        "fp8_name",
        ValueError,
        "dispatch: fp8 must be one of ['float32', 'power_of_two']; got 'e4m3'",
        lambda _, layout: jax_ep.dispatch(zeros(4, 128), layout, fp8="e4m3"),
    ),
    (
        "fp8_integer",
        TypeError,
        "dispatch: fp8 needs x in one of bfloat16, float16, float32; got int32",
        lambda _, layout: jax_ep.dispatch(zeros(4, 128, dtype=np.int32), layout, fp8="float32"),
    ),
    (
        "fp8_hidden",
        ValueError,
        "dispatch: fp8 needs a hidden size that is a multiple of 16; got 72. Pad the last axis",
        lambda _, layout: jax_ep.dispatch(zeros(4, 72), layout, fp8="float32"),
    ),
    (
        "fp8_of_fp8",
        TypeError,
        "dispatch: fp8 needs x in one of bfloat16, float16, float32; got float8_e5m2: pass rows "
        "that are float8 with their scales",
        lambda _, layout: jax_ep.dispatch(
            zeros(4, 16, dtype=jnp.float8_e5m2), layout, fp8="float32"
        ),
    ),
    (
        "scales_of_wide_rows",
        TypeError,
        "dispatch: scales need x in float8_e4m3fn or float8_e5m2; got bfloat16. To quantise it on "
        'the way pass fp8="float32" or fp8="power_of_two" instead',
        lambda _, layout: jax_ep.dispatch(
            zeros(4, 16, dtype=jnp.bfloat16), layout, scales=zeros(4, 1)
        ),
    ),
    *(
        (
            f"scales_and_{option}",
            ValueError,
            "dispatch: rows that come with scales are passed on as they are; leave out fp8 and "
            "dequantize",
            lambda _, layout, option=option, value=value: jax_ep.dispatch(
                zeros(4, 16, dtype=jnp.float8_e4m3fn),
                layout,
                scales=zeros(4, 1),
                **{option: value},
            ),
        )
        for option, value in (("fp8", "float32"), ("dequantize", True))
    ),
    (
        "scales_dtype",
        TypeError,
        "dispatch: scales must be float32; got bfloat16: cast them with scales.astype(jnp.float32)",
        lambda _, layout: jax_ep.dispatch(
            zeros(4, 16, dtype=jnp.float8_e4m3fn), layout, scales=zeros(4, 1, dtype=jnp.bfloat16)
        ),
    ),
    *(
        (
            f"scales_shape_{shape}",
            ValueError,
            "dispatch: scales must have shape (4, S), where S divides x's 2880 channels or is 23, "
            f"one for each 128 of them; got {shape}",
            lambda _, layout, shape=shape: jax_ep.dispatch(
                zeros(4, 2880, dtype=jnp.float8_e4m3fn), layout, scales=zeros(*shape)
            ),
        )
        for shape in ((4, 22), (3, 23), (4,), (4, 0), (4, 5760))
    ),
    (
        "dequantize_alone",
        ValueError,
        'dispatch: dequantize=True needs fp8="float32" or fp8="power_of_two"',
        lambda _, layout: jax_ep.dispatch(zeros(4, 128), layout, dequantize=True),
    ),
]

COMBINE_ERRORS: list[tuple[str, type[Exception], str, Verb]] = [
    (
        "y_dtype",
        TypeError,
        "combine: y must be one of bfloat16, float16, float32; got int32",
        lambda _, layout: jax_ep.combine(zeros(8, 8, dtype=np.int32), layout),
    ),
    (
        "y_fp8",
        TypeError,
        "combine: y must be one of bfloat16, float16, float32; got float8_e4m3fn",
        lambda _, layout: jax_ep.combine(zeros(8, 16, dtype=jnp.float8_e4m3fn), layout),
    ),
    (
        "y_rank",
        ValueError,
        "combine: y must have shape [capacity, hidden]; got (8,). Fold leading axes into the first",
        lambda _, layout: jax_ep.combine(zeros(8), layout),
    ),
    (
        "y_rows",
        ValueError,
        "combine: y has 6 rows, but the layout (6 experts, 2 ranks along ('ep',)) has capacity 8: "
        "experts give a row for each row of dispatch with this layout",
        lambda _, layout: jax_ep.combine(zeros(6, 8), layout),
    ),
    (
        "y_row",
        ValueError,
        "combine: a row of y must be a multiple of 16 bytes; got 4 x bfloat16 = 8 bytes. Pad the "
        "last axis",
        lambda _, layout: jax_ep.combine(zeros(8, 4, dtype=BF16), layout),
    ),
    (
        "weights_shape",
        ValueError,
        "combine: weights must have shape (8,); got (4, 2): pass recv.weights, what dispatch "
        "returned",
        lambda _, layout: jax_ep.combine(zeros(8, 8), layout, zeros(4, 2)),
    ),
    (
        "weights_dtype",
        TypeError,
        "combine: weights must be floating point; got int32",
        lambda _, layout: jax_ep.combine(zeros(8, 8), layout, zeros(8, dtype=np.int32)),
    ),
    (
        "weights_forgotten_in_dispatch",
        ValueError,
        "combine: weights is None, which dispatch returns if it was not given topk_weights: pass "
        "them to dispatch, or leave weights out for a sum without weights",
        lambda _, layout: jax_ep.combine(
            zeros(8, 8), layout, jax_ep.dispatch(zeros(4, 8), layout).weights
        ),
    ),
    (
        "layout_type",
        TypeError,
        "combine: layout must come from jax_ep.make_layout; got NoneType",
        lambda _, layout: jax_ep.combine(zeros(8, 8), None),
    ),
    (
        "swapped",
        TypeError,
        "combine: layout must come from jax_ep.make_layout; got an array float32[8, 8]",
        lambda _, layout: jax_ep.combine(layout, zeros(8, 8)),
    ),
    (
        "dispatched",
        TypeError,
        "combine: y must be an array; got Dispatched. Its tokens are what experts take",
        lambda _, layout: jax_ep.combine(jax_ep.dispatch(zeros(4, 8), layout), layout),
    ),
]


def moe(ids: Any, expert_fn: Verb) -> Any:
    options: dict[str, Any] = {"num_experts": 6, "axis_name": AXIS, "capacity": 8}
    return jax_ep.moe(zeros(4, 8), ids, jnp.ones(ids.shape, F32), expert_fn, **options)


MOE_ERRORS: list[tuple[str, type[Exception], str, Verb]] = [
    (
        "result_rows",
        ValueError,
        "moe: expert_fn's result has 6 rows, but the layout (6 experts, 2 ranks along ('ep',)) has "
        "capacity 8: experts give a row for each row of dispatch with this layout",
        lambda ids, _: moe(ids, lambda rows, _: rows[:6]),
    ),
    (
        "result_rank",
        ValueError,
        "moe: expert_fn's result must have shape [capacity, hidden]; got (2, 4, 8). Fold leading "
        "axes into the first with reshape",
        lambda ids, _: moe(ids, lambda rows, _: rows.reshape(2, 4, 8)),
    ),
    (
        "result_row",
        ValueError,
        "moe: a row of expert_fn's result must be a multiple of 16 bytes; got 2 x float32 = 8 "
        "bytes. Pad the last axis",
        lambda ids, _: moe(ids, lambda rows, _: rows[:, :2]),
    ),
    (
        "result_dtype",
        TypeError,
        "moe: expert_fn's result must be one of bfloat16, float16, float32; got int32",
        lambda ids, _: moe(ids, lambda rows, _: rows.astype(np.int32)),
    ),
    (
        "result_and_more",
        TypeError,
        "moe: expert_fn's result must be an array; got tuple",
        lambda ids, _: moe(ids, lambda rows, sizes: (rows, sizes)),
    ),
]

OTHER_ERRORS: list[tuple[str, type[Exception], str, Verb]] = [
    (
        "no_weights",
        ValueError,
        "moe: topk_weights must be an array [tokens, k]; got None. For a sum without weights call "
        "layout_and_dispatch and combine",
        lambda ids, _: jax_ep.moe(
            zeros(4, 8), ids, None, lambda rows, _: rows, num_experts=6, axis_name=AXIS
        ),
    ),
    (
        "leading_axis",
        ValueError,
        "dispatch: the layout's arrays must have the shapes of one shard, topk_idx [tokens, k] and "
        "recv_src [8]; got [1, 4, 2] and [1, 8]. If it came into shard_map with a leading axis, "
        "remove that: jax.tree.map(lambda a: a[0], layout)",
        lambda _, layout: jax_ep.dispatch(zeros(4, 8), jax.tree.map(lambda a: a[None], layout)),
    ),
    (
        "rows_of_another_shard",
        ValueError,
        "combine: the layout's arrays must have the shapes of one shard, topk_idx [tokens, k] and "
        "recv_src [8]; got [8, 2] and [16].",
        lambda _, layout: jax_ep.combine(
            zeros(8, 8), jax.tree.map(lambda a: jnp.concatenate([a, a]) if a.ndim else a, layout)
        ),
    ),
]

TRACE_ERRORS = [*LAYOUT_ERRORS, *DISPATCH_ERRORS, *COMBINE_ERRORS, *MOE_ERRORS, *OTHER_ERRORS]
