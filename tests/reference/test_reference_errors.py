"""What the NumPy oracle says of bad input, word by word."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from worked_example import EXAMPLE_IDS, EXAMPLE_WEIGHTS, EXAMPLE_X, example_layout

from jax_ep import reference

BF16, F16, F64 = ml_dtypes.bfloat16, np.float16, np.float64
FP8 = ml_dtypes.float8_e4m3fn

Failures = list[tuple[str, Callable[[], Any]]]

LAYOUT = example_layout(6)
Y, ROW_WEIGHTS = np.zeros((2, 6, 2), np.float32), np.zeros((2, 6), np.float32)
FP8_ROW, ONE_SCALE = np.zeros(128, FP8), np.ones(1, np.float32)


def make(topk_idx: NDArray[Any] = EXAMPLE_IDS, num_experts: int = 4, **options: Any) -> Any:
    return reference.make_layout(topk_idx, num_experts=num_experts, **options)


def dispatch(x: NDArray[Any] = EXAMPLE_X, topk_weights: Any = None) -> Any:
    return reference.dispatch(x, LAYOUT, topk_weights)


def combine(y: NDArray[Any] = Y, weights: Any = None) -> Any:
    return reference.combine(y, LAYOUT, weights)


def dispatch_vjp(d_tokens: NDArray[Any] = Y, d_weights: Any = None) -> Any:
    return reference.dispatch_vjp(LAYOUT, d_tokens, d_weights)


def combine_vjp(
    y: NDArray[Any] = Y, weights: Any = ROW_WEIGHTS, g: NDArray[Any] = EXAMPLE_X
) -> Any:
    return reference.combine_vjp(y, LAYOUT, weights, g)


def quantize(x: NDArray[Any], scale_format: Any = "float32") -> Any:
    return reference.quantize(x, scale_format=scale_format)


def dense(
    x: NDArray[Any] = EXAMPLE_X,
    topk_idx: NDArray[Any] = EXAMPLE_IDS,
    topk_weights: NDArray[Any] = EXAMPLE_WEIGHTS,
    num_experts: int = 4,
) -> Any:
    return reference.moe_dense(x, topk_idx, topk_weights, lambda _, rows: rows, num_experts)


FLOATS = "bfloat16, float16, float32 or float64"

TYPE_ERRORS: Failures = [
    ("topk_idx must be int32, got int64", lambda: make(EXAMPLE_IDS.astype(np.int64))),
    ("topk_idx must be int32, got float32", lambda: make(EXAMPLE_IDS.astype(np.float32))),
    (
        "topk_weights must be bfloat16, float16 or float32, got int32",
        lambda: dispatch(topk_weights=EXAMPLE_IDS),
    ),
    (
        "topk_weights must be bfloat16, float16 or float32, got float64",
        lambda: dispatch(topk_weights=EXAMPLE_WEIGHTS.astype(F64)),
    ),
    (f"y must be {FLOATS}, got int32", lambda: combine(Y.astype(np.int32))),
    (f"y must be {FLOATS}, got float8_e4m3fn", lambda: combine(Y.astype(FP8))),
    ("weights must be float32, got bfloat16", lambda: combine(weights=ROW_WEIGHTS.astype(BF16))),
    ("weights must be float32, got float64", lambda: combine(weights=ROW_WEIGHTS.astype(F64))),
    (
        "weights must be float32 or float64, got float16",
        lambda: combine(Y.astype(F64), ROW_WEIGHTS.astype(F16)),
    ),
    (
        "values must be float32 or float64, got int32",
        lambda: reference.collect(ROW_WEIGHTS.astype(np.int32), LAYOUT),
    ),
    (f"d_tokens must be {FLOATS}, got int8", lambda: dispatch_vjp(Y.astype(np.int8))),
    (
        "d_weights must be float32 or float64, got bfloat16",
        lambda: dispatch_vjp(d_weights=ROW_WEIGHTS.astype(BF16)),
    ),
    (f"y must be {FLOATS}, got int64", lambda: combine_vjp(Y.astype(np.int64))),
    ("g must be bfloat16, got float32", lambda: combine_vjp(Y.astype(BF16))),
    ("weights must be float32, got float16", lambda: combine_vjp(weights=ROW_WEIGHTS.astype(F16))),
    (
        "x must be bfloat16, float16 or float32, got float64",
        lambda: quantize(np.zeros(128)),
    ),
    (
        "q must be float8_e4m3fn, got uint8",
        lambda: reference.dequantize(np.zeros(128, np.uint8), ONE_SCALE),
    ),
    (
        "scales must be float32, got float64",
        lambda: reference.dequantize(FP8_ROW, np.ones(1)),  # type: ignore[arg-type]
    ),
    (
        "dtype must be bfloat16, float16 or float32, got int32",
        lambda: reference.dequantize(FP8_ROW, ONE_SCALE, np.int32),
    ),
    ("topk_idx must be int32, got uint32", lambda: dense(topk_idx=EXAMPLE_IDS.astype(np.uint32))),
]

VALUE_ERRORS: Failures = [
    # default_capacity(T, K, R, E, A)
    ("num_tokens must be at least 1, got 0", lambda: reference.default_capacity(0, 1, 1, 1, 1)),
    ("top_k must be at least 1, got 0", lambda: reference.default_capacity(1, 0, 1, 1, 1)),
    ("num_ranks must be at least 1, got 0", lambda: reference.default_capacity(1, 1, 0, 1, 1)),
    ("num_experts must be at least 1, got -1", lambda: reference.default_capacity(1, 1, 1, -1, 1)),
    (
        "expert_alignment must be at least 1, got 0",
        lambda: reference.default_capacity(1, 1, 1, 1, 0),
    ),
    (
        "num_experts must be a multiple of num_ranks (3), got 4",
        lambda: reference.default_capacity(1, 1, 3, 4, 1),
    ),
    (
        "top_k must be at most num_experts (4), got 5",
        lambda: reference.default_capacity(1, 5, 2, 4, 1),
    ),
    # make_layout
    ("topk_idx must be [R, T, K], got shape (3, 2)", lambda: make(EXAMPLE_IDS[0])),
    ("num_tokens must be at least 1, got 0", lambda: make(EXAMPLE_IDS[:, :0])),
    ("top_k must be at least 1, got 0", lambda: make(EXAMPLE_IDS[:, :, :0])),
    ("num_experts must be a multiple of num_ranks (2), got 5", lambda: make(num_experts=5)),
    ("top_k must be at most num_experts (4), got 6", lambda: make(np.tile(EXAMPLE_IDS, 3))),
    ("expert_alignment must be at least 1, got 0", lambda: make(expert_alignment=0)),
    ("ranks_per_node must divide num_ranks (2), got 0", lambda: make(ranks_per_node=0)),
    ("ranks_per_node must divide num_ranks (2), got 4", lambda: make(ranks_per_node=4)),
    (
        "capacity must be a positive multiple of expert_alignment (1), got 0",
        lambda: make(capacity=0),
    ),
    (
        "capacity must be a positive multiple of expert_alignment (4), got -4",
        lambda: make(capacity=-4, expert_alignment=4),
    ),
    (
        "capacity must be a positive multiple of expert_alignment (4), got 6",
        lambda: make(capacity=6, expert_alignment=4),
    ),
    (
        "expert_capacity must be a positive multiple of expert_alignment (4), got 6",
        lambda: make(expert_capacity=6, expert_alignment=4),
    ),
    (
        "expert_capacity must be a positive multiple of expert_alignment (1), got 0",
        lambda: make(expert_capacity=0),
    ),
    (
        "capacity must be None with expert_capacity, which says what it is",
        lambda: make(capacity=8, expert_capacity=4),
    ),
    (
        "capacity must be at most 2146435072, got 2147483648",
        lambda: make(expert_capacity=2**30),
    ),
    (
        "R * T * K + E * A must be at most 2146435072, got 2147485696",
        lambda: make(np.broadcast_to(np.int32(0), (2**11, 2**11, 2**9)), 2**11, capacity=1),
    ),
    ("capacity must be at most 2146435072, got 2147483648", lambda: make(capacity=2**31)),
    # The verbs and their gradients
    ("x must have three axes, got shape (3, 2)", lambda: dispatch(EXAMPLE_X[0])),
    ("x must have shape (2, 3, 2), got (2, 2, 2)", lambda: dispatch(EXAMPLE_X[:, :2])),
    (
        "topk_weights must have shape (2, 3, 2), got (2, 3, 1)",
        lambda: dispatch(topk_weights=EXAMPLE_WEIGHTS[:, :, :1]),
    ),
    ("y must have three axes, got shape (6, 2)", lambda: combine(Y[0])),
    ("y must have shape (2, 6, 2), got (2, 4, 2)", lambda: combine(Y[:, :4])),
    ("weights must have shape (2, 6), got (2, 3, 2)", lambda: combine(weights=EXAMPLE_WEIGHTS)),
    (
        "values must have shape (2, 6), got (2, 5)",
        lambda: reference.collect(ROW_WEIGHTS[:, :5], LAYOUT),
    ),
    ("d_tokens must have shape (2, 6, 2), got (2, 4, 2)", lambda: dispatch_vjp(Y[:, :4])),
    (
        "d_weights must have shape (2, 6), got (1, 6)",
        lambda: dispatch_vjp(d_weights=ROW_WEIGHTS[:1]),
    ),
    ("y must have shape (2, 6, 2), got (2, 3, 2)", lambda: combine_vjp(Y[:, :3])),
    ("weights must have shape (2, 6), got (1, 6)", lambda: combine_vjp(weights=ROW_WEIGHTS[:1])),
    ("g must have shape (2, 3, 2), got (2, 3, 1)", lambda: combine_vjp(g=EXAMPLE_X[:, :, :1])),
    # fp8
    (
        "x must have a last axis of at least 1, got shape ()",
        lambda: quantize(np.zeros((), np.float32)),
    ),
    (
        "x must have a last axis of at least 1, got shape (2, 0)",
        lambda: quantize(np.zeros((2, 0), np.float32)),
    ),
    (
        "scale_format must be 'float32' or 'power_of_two', got 'e8m0'",
        lambda: quantize(np.zeros(128, np.float32), "e8m0"),
    ),
    (
        "q must have a last axis of at least 1, got shape (0,)",
        lambda: reference.dequantize(FP8_ROW[:0], ONE_SCALE),
    ),
    (
        "scales must have shape (1,), got (2,)",
        lambda: reference.dequantize(FP8_ROW, np.ones(2, np.float32)),
    ),
    # moe_dense
    ("num_experts must be at least 1, got 0", lambda: dense(num_experts=0)),
    ("x must have three axes, got shape (3, 2)", lambda: dense(EXAMPLE_X[0])),
    (
        "topk_idx must be [R, T, K] with x's R and T (2, 3), got shape (2, 2, 2)",
        lambda: dense(topk_idx=EXAMPLE_IDS[:, :2]),
    ),
    (
        "topk_weights must have shape (2, 3, 2), got (2, 3, 1)",
        lambda: dense(topk_weights=EXAMPLE_WEIGHTS[:, :, :1]),
    ),
]


@pytest.mark.parametrize(("message", "call"), TYPE_ERRORS, ids=[m for m, _ in TYPE_ERRORS])
def test_type_errors(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(("message", "call"), VALUE_ERRORS, ids=[m for m, _ in VALUE_ERRORS])
def test_value_errors(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert str(caught.value) == message
