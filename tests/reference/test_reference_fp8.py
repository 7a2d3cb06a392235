"""The NumPy oracle's quantization to fp8 and back: scales, rounding, NaN and infinity."""

import itertools
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import routings
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray
from roundings import BF16_MAX, F32_MAX
from routings import assert_same_bits, oracle_examples

from jax_ep import reference

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
FP8 = ml_dtypes.float8_e4m3fn


def group(values: Sequence[float], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """One group of 128 channels: the values, then zeros."""
    row = np.zeros(128, dtype)
    row[: len(values)] = values
    return row


@pytest.mark.parametrize("scale_format", ["float32", "power_of_two"])
def test_quantize_rounds_to_nearest_even(scale_format: Any) -> None:
    # With a 448 in each group both scale and inverse are exactly 1, and what remains is the
    # conversion. Codes 0..126 of e4m3fn are its non-negative finite numbers in ascending order.
    numbers = np.arange(127, dtype=np.uint8).view(FP8).astype(np.float32)
    assert [numbers[0], numbers[1], numbers[126]] == [0, 2.0**-9, 448]
    assert (np.diff(numbers) > 0).all()
    values, codes = list(numbers), list(range(127))
    for code, (low, high) in enumerate(itertools.pairwise(numbers)):
        middle = (low + high) / 2  # exact
        values += [np.nextafter(middle, low), middle, np.nextafter(middle, high)]
        codes += [code, code + code % 2, code + 1]
    values += [-value for value in values]
    codes += [code + 128 for code in codes]
    for start in range(0, len(values), 127):
        part = values[start : start + 127]
        q, scales = reference.quantize(group([*part, 448.0]), scale_format=scale_format)
        assert_same_bits(scales, np.ones(1, np.float32))
        assert q.view(np.uint8)[: len(part)].tolist() == codes[start : start + 127]


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (448.0, 1.0),
        (np.nextafter(np.float32(448), np.float32(449)), 2.0),  # the quotient rounds to 1 + 2**-23
        (449.0, 2.0),
        (896.0, 2.0),
        (56.0, 2.0**-3),
        (1.0, 2.0**-8),  # 2**-9 = 1 / 512 < 1 / 448 <= 2**-8
        (2.0**-100, 2.0**-108),  # the floor: 2**-109 < 2**-100 / 448 <= 2**-108
        (0.0, 2.0**-108),
        (F32_MAX, 2.0**120),  # 2**119 < (2**128 - 2**104) / 448 <= 2**120
    ],
)
def test_quantize_power_of_two_scale(amax: float, scale: float) -> None:
    q, scales = reference.quantize(group([0.0, -amax]), scale_format="power_of_two")
    assert_same_bits(scales, np.array([scale], np.float32))
    # The division by a power of two is exact here, so only e4m3fn's own rounding remains.
    assert q[1] == np.float32(-amax / scale).astype(FP8)


@pytest.mark.parametrize("amax", [448.0, 1.0, 3.0, 2.0**-99, 1e30, F32_MAX])
def test_quantize_f32_scale(amax: float) -> None:
    q, scales = reference.quantize(group([amax, -amax, amax / 2]), scale_format="float32")
    assert_same_bits(scales, np.array([np.float32(amax) / np.float32(448)], np.float32))
    assert q[:3].astype(np.float32).tolist() == [448, -448, 224]


def test_quantize_multiplies_by_the_rounded_inverse() -> None:
    # 448 / 13 rounds up by 1.76e-6 in float32. 9.75 times that is 1.72e-5 above 336, more than half
    # the spacing 2**-15 = 3.05e-5 there, so it is no longer the tie between 320 and 352. (Division
    # by the scale would give 336, and 320.)
    q, _ = reference.quantize(group([13.0, 9.75]), scale_format="float32")
    assert q[:2].astype(np.float32).tolist() == [448, 352]
    # 448 / 31 rounds down by 4.3e-7; 23.25 times that is 1.0e-5 below 336, which rounds to 336: a
    # tie, to even.
    q, _ = reference.quantize(group([31.0, 23.25]), scale_format="float32")
    assert q[:2].astype(np.float32).tolist() == [448, 320]


def test_quantize_floors_the_largest_magnitude() -> None:
    # Below 2**-100 the scale is that of 2**-100, and a zero group stays zero with its signs.
    floor = np.float32(2.0**-100)
    for values, codes in (([0.0, -0.0], [0, 128]), ([2.0**-149, -(2.0**-149)], [0, 128])):
        q, scales = reference.quantize(group(values), scale_format="float32")
        assert_same_bits(scales, np.array([floor / np.float32(448)], np.float32))
        assert q.view(np.uint8)[:2].tolist() == codes
    # Half of the floor has half of the largest number.
    q, _ = reference.quantize(group([2.0**-101]), scale_format="float32")
    assert float(q[0]) == 224


@pytest.mark.parametrize("scale_format", ["float32", "power_of_two"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_quantize_groups_are_independent(scale_format: Any, dtype: DTypeLike) -> None:
    rng = np.random.default_rng(3)
    x = routings.random_rows(rng, (2, 3, 384), dtype)
    q, scales = reference.quantize(x, scale_format=scale_format)
    assert q.dtype == FP8
    assert q.shape == x.shape
    assert scales.dtype == np.float32
    assert scales.shape == (2, 3, 3)
    for place in np.ndindex(2, 3, 3):
        channels = slice(place[2] * 128, place[2] * 128 + 128)
        one = x[place[0], place[1], channels].astype(np.float32)
        q_one, scale_one = reference.quantize(one, scale_format=scale_format)
        assert_same_bits(q[place[0], place[1], channels].view(np.uint8), q_one.view(np.uint8))
        assert_same_bits(scales[place], scale_one[0])
        assert np.abs(one).max() > 0
        # The largest magnitude lands in the top binade, so no range is given away.
        assert np.abs(q_one.astype(np.float32)).max() >= 224


@pytest.mark.parametrize("scale_format", ["float32", "power_of_two"])
@pytest.mark.parametrize("hidden", [1, 16, 127, 129, 192, 2880])
def test_a_last_group_that_is_shorter_is_a_group(scale_format: Any, hidden: int) -> None:
    # Each group by itself, and the last one by itself filled up with what cannot be its largest.
    rng = np.random.default_rng(hidden)
    x = routings.random_rows(rng, (3, hidden), F32)
    q, scales = reference.quantize(x, scale_format=scale_format)
    assert q.shape == x.shape
    assert scales.shape == (3, (hidden + 127) // 128)
    back = reference.dequantize(q, scales, F32)
    assert back.shape == x.shape
    for row, begin in itertools.product(range(3), range(0, hidden, 128)):
        end = min(begin + 128, hidden)
        alone = group([*x[row, begin:end]])
        q_alone, scale_alone = reference.quantize(alone, scale_format=scale_format)
        assert_same_bits(scales[row, begin // 128 :][:1], scale_alone)
        assert_same_bits(q[row, begin:end].view(np.uint8), q_alone[: end - begin].view(np.uint8))
        product = q[row, begin:end].astype(F32) * scale_alone
        assert_same_bits(back[row, begin:end], product)


@oracle_examples
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([BF16, F16, F32]),
    st.sampled_from(["float32", "power_of_two"]),
    st.integers(-6, 6),
)
def test_quantization_error_is_bounded(
    seed: int, dtype: DTypeLike, scale_format: Any, exponent: int
) -> None:
    # e4m3fn has 4 significant bits: a normal number is off by at most 2**-4 of itself, a subnormal
    # (spacing 2**-9) by at most 2**-10, in units of the scale. Scale, inverse and two products are
    # float32, each off by 2**-24: below 2**-21 together, also of the rounded value.
    x = (
        routings.random_rows(np.random.default_rng(seed), (4, 256), np.float32) * 2.0**exponent
    ).astype(dtype)
    q, scales = reference.quantize(x, scale_format=scale_format)
    back = reference.dequantize(q, scales, np.float32).astype(np.float64)
    exact = x.astype(np.float64)
    step = np.repeat(scales.astype(np.float64), 128, axis=-1)
    bound = np.maximum(2.0**-4 * np.abs(exact), 2.0**-10 * step) + 2.0**-20 * np.abs(exact)
    assert (np.abs(back - exact) <= bound).all()
    amax = np.abs(exact).reshape(4, 2, 128).max(axis=-1)
    if scale_format == "power_of_two":
        assert (np.frexp(scales)[0] == 0.5).all()
        quotient = (amax.astype(np.float32) / np.float32(448)).astype(np.float64)
        assert ((scales >= quotient) & (scales / 2 < quotient)).all()


@pytest.mark.parametrize("scale_format", ["float32", "power_of_two"])
def test_quantize_nan(scale_format: Any) -> None:
    # NaN does not count for the scale, wherever it stands, and stays NaN.
    for place in (0, 1, 127):
        x = group([3.0, -448.0, 5.0])
        x[place] = np.nan
        without = np.where(np.isnan(x), np.float32(0), x)
        q, scales = reference.quantize(x, scale_format=scale_format)
        q_without, scales_without = reference.quantize(without, scale_format=scale_format)
        assert_same_bits(scales, scales_without)
        others = np.arange(128) != place
        assert np.isnan(q[place])
        assert_same_bits(q.view(np.uint8)[others], q_without.view(np.uint8)[others])
        assert np.isnan(reference.dequantize(q, scales, BF16)[place])
    q, scales = reference.quantize(np.full(128, np.nan, np.float32), scale_format=scale_format)
    assert np.isnan(q).all()
    _, scales_of_zeros = reference.quantize(group([]), scale_format=scale_format)
    assert_same_bits(scales, scales_of_zeros)


@pytest.mark.parametrize("scale_format", ["float32", "power_of_two"])
@pytest.mark.parametrize("sign", [1, -1])
def test_quantize_infinity(scale_format: Any, sign: int) -> None:
    x = np.concatenate([group([1.0, sign * np.inf, -2.0, np.nan]), group([448.0])])
    q, scales = reference.quantize(x, scale_format=scale_format)
    assert_same_bits(scales, np.array([np.inf, 1.0], np.float32))
    codes = q.view(np.uint8)
    assert np.isnan(q[1])
    assert np.isnan(q[3])
    assert codes[[0, 2, 4]].tolist() == [0, 128, 0]
    back = reference.dequantize(q, scales)
    assert np.isnan(back[:128]).all()
    assert back[128] == 448


def test_dequantize_rounds_once() -> None:
    # bf16: 2 * (1 + 2**-8) is a tie beside 2, to even; 3 + 3 * 2**-8 rounds up to 3 + 2**-6, and
    # would be 3 if the scale were rounded to bf16 first.
    q = group([2.0, 1.0, 3.0, -0.0]).astype(FP8)
    scales = np.array([1 + 2.0**-8], np.float32)
    back = reference.dequantize(q, scales, BF16)
    assert_same_bits(back[:3], np.array([2.0, 1.0, 3.0 + 2.0**-6], BF16))
    scales = np.array([1 + 2.0**-23], np.float32)
    back = reference.dequantize(q, scales)
    assert back.dtype == np.float32
    # Exact is 3 + 3 * 2**-23 between 3 + 2**-22 and 3 + 2**-21; the even neighbour is the latter.
    assert back[2] == np.float32(3 + 2.0**-21)
    assert_same_bits(back[3:4], np.array([-0.0], np.float32))
    scales = np.array([2.0**15], np.float32)
    back = reference.dequantize(q, scales, F16)
    assert_same_bits(back[:2], np.array([np.inf, 2.0**15], F16))


def test_dequantize_applies_each_groups_scale() -> None:
    q = np.ones((2, 256), FP8)
    scales = np.array([[1, 2], [4, 8]], np.float32)
    back = reference.dequantize(q, scales)
    assert_same_bits(back, np.repeat(scales, 128, axis=-1))


def test_largest_numbers_dequantize_to_infinity() -> None:
    # The scale is 2**120, the quotient rounds up to 256, and 2**8 * 2**120 overflows.
    for dtype, largest in ((F32, F32_MAX), (BF16, BF16_MAX)):
        q, scales = reference.quantize(group([largest], dtype), scale_format="power_of_two")
        assert float(q[0]) == 256
        assert np.isposinf(reference.dequantize(q, scales, dtype)[0])
