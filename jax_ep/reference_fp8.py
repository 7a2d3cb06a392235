"""The specification of rows that cross as float8: their numbers, and their scales.

A part of ``jax_ep.reference``, which has the rest.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from jax_ep.reference_checks import (
    BFLOAT16,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    check_dtype,
    check_shape,
)

QUANTIZATION_GROUP = 128
"""Channels that share one scale."""

FLOAT8_MAX = np.float32(448)
"""The largest finite float8_e4m3fn."""

SMALLEST_AMAX = np.float32(2.0**-100)
"""Floor of a group's largest magnitude; keeps scale and inverse normal float32 numbers."""


def quantize(
    x: NDArray[Any], *, scale_format: Literal["float32", "power_of_two"]
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Quantises to float8_e4m3fn with one scale per 128 channels.

    The last group may be shorter. All operations are float32, rounded to nearest even. Per group,
    amax is the largest magnitude, NaN ignored (0 if there is nothing else), and at least 2**-100.
    Then

    * "float32": scale = amax / 448 and inverse = 448 / amax;
    * "power_of_two": scale = the smallest power of two >= amax / 448, and inverse = 1 / scale,
      which is exact;

    and q = float8_e4m3fn(clamp(x * inverse, -448, 448)). NaN stays NaN. An infinity makes its
    group's scale infinite and the inverse 0: the infinity itself becomes NaN, its finite neighbours
    become zeros, and all of them NaN once dequantised. Finite magnitudes within half an e4m3fn step
    of 2**128 can dequantise to infinity.

    Args:
        x: [..., H] bfloat16, float16 or float32.
        scale_format: "float32" or "power_of_two".

    Returns:
        q: float8_e4m3fn [..., H].
        scales: float32 [..., ceil(H / 128)].

    Raises:
        TypeError: x has another dtype.
        ValueError: x has no channels, or scale_format is unknown.
    """
    x = np.asarray(x)
    check_dtype("x", x.dtype, BFLOAT16, FLOAT16, FLOAT32)
    if scale_format not in ("float32", "power_of_two"):
        raise ValueError(f"scale_format must be 'float32' or 'power_of_two', got {scale_format!r}")
    groups = _groups("x", x).astype(np.float32)
    with np.errstate(all="ignore"):
        largest = np.fmax.reduce(np.abs(groups), axis=-1, initial=0, keepdims=True)
        amax: NDArray[np.float32] = np.maximum(largest, SMALLEST_AMAX)
        scale: NDArray[np.float32] = amax / FLOAT8_MAX
        inverse: NDArray[np.float32] = FLOAT8_MAX / amax
        if scale_format == "power_of_two":
            scale = _round_up_to_power_of_two(scale)
            inverse = np.float32(1) / scale
        clamped = np.clip(groups * inverse, -FLOAT8_MAX, FLOAT8_MAX)  # NaN stays NaN
        q = clamped.astype(FLOAT8)
    return _without_groups(q, x.shape), scale[..., 0]


def dequantize(
    q: NDArray[Any], scales: NDArray[np.float32], dtype: DTypeLike = np.float32
) -> NDArray[Any]:
    """Returns dtype(float32(q) * scale): one float32 product, then one rounding.

    Args:
        q: float8_e4m3fn [..., H].
        scales: float32 [..., ceil(H / 128)].
        dtype: bfloat16, float16 or float32.

    Returns:
        [..., H] of dtype.

    Raises:
        TypeError: q, scales or dtype has another dtype.
        ValueError: q has no channels, or scales has another shape.
    """
    q, scales = np.asarray(q), np.asarray(scales)
    check_dtype("q", q.dtype, FLOAT8)
    check_dtype("scales", scales.dtype, FLOAT32)
    result_dtype = np.dtype(dtype)
    check_dtype("dtype", result_dtype, BFLOAT16, FLOAT16, FLOAT32)
    groups = _groups("q", q)
    check_shape("scales", scales, groups.shape[:-1])
    with np.errstate(all="ignore"):
        product = groups.astype(np.float32) * scales[..., None]
        return _without_groups(product.astype(result_dtype), q.shape)


def _groups(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Reshapes [..., H] to [..., ceil(H / 128), 128], the last group filled up with zeros."""
    hidden = array.shape[-1] if array.ndim else 0
    if hidden < 1:
        raise ValueError(f"{name} must have a last axis of at least 1, got shape {array.shape}")
    num_groups = -(-hidden // QUANTIZATION_GROUP)
    shape = (*array.shape[:-1], num_groups * QUANTIZATION_GROUP)
    filled = np.zeros(shape, array.dtype)
    filled[..., :hidden] = array
    return filled.reshape(*shape[:-1], num_groups, QUANTIZATION_GROUP)


def _without_groups(groups: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """What `_groups` made of an array of this shape, back in it."""
    return groups.reshape(*shape[:-1], -1)[..., : shape[-1]]


def _round_up_to_power_of_two(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The smallest power of two >= each value; positive normal numbers, or +inf, which stays."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(np.uint32)
    rounded: NDArray[np.float32] = (exponent << np.uint32(23)).view(np.float32)
    return rounded
