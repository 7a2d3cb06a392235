"""dispatch on every backend: rows are copies, everything else is zero, fp8 is the oracle's."""

import itertools
from typing import Any

import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
import routings
from backends import BACKENDS, Backend, JaxBackend, Received
from hypothesis import given
from numpy.typing import DTypeLike, NDArray
from routings import Case, RoutedCase, assert_same_bits, routed_cases
from test_layout import EXAMPLE
from worked_example import EXAMPLE_DATA, EXAMPLE_IDS, EXAMPLE_WEIGHTS, EXAMPLE_X

from jax_ep import reference

pytestmark = pytest.mark.usefixtures("poison")

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
FP8_SCALES = ("float32", "power_of_two")
ORACLE = BACKENDS["reference"]


def rows_shape(case: Case, hidden: int | None = None) -> tuple[int, int, int]:
    return case.num_ranks, case.num_tokens, hidden or case.hidden


def assert_same_received(
    actual: Received, expected: Received, specified: NDArray[np.bool_]
) -> None:
    """Bitwise, in the rows bool [R, C] that have a specified value."""
    for name in ("tokens", "weights", "scales"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), f"{name}: only one side has it"
        if ours is None:
            continue
        assert ours.shape == theirs.shape, f"{name}: shape {ours.shape}, expected {theirs.shape}"
        try:
            assert_same_bits(ours[specified], theirs[specified])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def check_dispatch(
    backend: Backend, case: Case, ids: NDArray[np.int32], x: Any, weights: Any, **options: Any
) -> None:
    theirs = ORACLE.make_layout(case, ids)
    ours = backend.make_layout(case, ids)
    assert_same_received(
        backend.dispatch(x, ours, weights, **options),
        ORACLE.dispatch(x, theirs, weights, **options),
        reference.specified_rows(theirs.handle),
    )


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("capacity", EXAMPLE_DATA)
def test_example(backend: Backend, capacity: int, dtype: DTypeLike) -> None:
    # The example's two channels four times, so that a row is whole 16 bytes.
    expected = EXAMPLE_DATA[capacity]
    layout = backend.make_layout(EXAMPLE.with_capacity(capacity), EXAMPLE_IDS)
    x = np.tile(EXAMPLE_X, 4).astype(dtype)
    received = backend.dispatch(x, layout, EXAMPLE_WEIGHTS)
    tokens = np.array(expected["tokens"], dtype)
    assert received.tokens.dtype == dtype
    np.testing.assert_array_equal(received.tokens, np.stack([tokens, -tokens] * 4, axis=-1))
    assert received.weights is not None
    assert_same_bits(received.weights, np.array(expected["weights"], F32))
    assert received.scales is None
    assert backend.dispatch(x, layout).weights is None


@routings.examples(28)
@given(routed=routed_cases(), dtype=st.sampled_from([BF16, F16, F32]), weighted=st.booleans())
def test_any_routing(
    device_backend: JaxBackend, routed: RoutedCase, dtype: DTypeLike, weighted: bool
) -> None:
    # Zeros of both signs, subnormals and the largest numbers among the rows. zero_tail is drawn:
    # without it the tail is not looked at. Poisoned outputs show padding that was not zeroed.
    rng, case = routed.rng, routed.case
    x = routings.random_rows(rng, rows_shape(case), dtype, specials=True)
    weights = routings.random_weights(rng, case) if weighted else None
    check_dispatch(device_backend, case, routed.topk_idx, x, weights)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32])
@pytest.mark.parametrize("weighted", [False, True])
def test_integer_rows(device_backend: JaxBackend, dtype: DTypeLike, weighted: bool) -> None:
    case, rng = (
        Case(3, 7, 3, 6, hidden=32, capacity=20, expert_alignment=4),
        np.random.default_rng(3),
    )
    ids = routings.topk_ids(rng, case, "nowhere")
    x = routings.random_rows(rng, rows_shape(case), dtype)
    weights = routings.random_weights(rng, case) if weighted else None
    check_dispatch(device_backend, case, ids, x, weights)


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_wide_integer_rows(device_backend: JaxBackend, dtype: DTypeLike) -> None:
    case, rng = Case(3, 7, 3, 6, hidden=6), np.random.default_rng(4)
    ids = routings.topk_ids(rng, case, "uniform")
    x = routings.random_rows(rng, rows_shape(case), dtype)
    with jax.enable_x64(True):
        check_dispatch(device_backend, case, ids, x, None)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_rows_are_copies_of_any_bits(device_backend: JaxBackend, dtype: DTypeLike) -> None:
    # All 2**16 patterns of a 16-bit type, NaNs with their payloads included, as float rows.
    case, rng = Case(2, 32, 1, 2, hidden=1024), np.random.default_rng(5)
    bits = np.arange(2**16, dtype=np.uint16).reshape(rows_shape(case))
    if np.dtype(dtype).itemsize == 4:
        bits = rng.integers(0, 2**32, bits.shape, dtype=np.uint32)
    ids = routings.topk_ids(rng, case, "uniform")
    layout = device_backend.make_layout(case, ids)
    tokens = device_backend.dispatch(bits.view(dtype), layout).tokens
    expected = ORACLE.dispatch(bits, ORACLE.make_layout(case, ids)).tokens
    np.testing.assert_array_equal(tokens.view(bits.dtype), expected)


@pytest.mark.parametrize("hidden", [8, 24, 40, 136, 1000, 4104])
def test_any_row_of_whole_16_bytes(device_backend: JaxBackend, hidden: int) -> None:
    case, rng = Case(2, 5, 2, 4, hidden=hidden), np.random.default_rng(hidden)
    ids = routings.topk_ids(rng, case, "uniform")
    x = routings.random_rows(rng, rows_shape(case), BF16)
    check_dispatch(device_backend, case, ids, x, routings.random_weights(rng, case))


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_weights_are_cast(device_backend: JaxBackend, dtype: DTypeLike) -> None:
    case, rng = Case(2, 5, 2, 4, hidden=8), np.random.default_rng(6)
    ids = routings.topk_ids(rng, case, "uniform")
    weights = routings.random_weights(rng, case).astype(dtype)
    weights[0, 0] = [-0.0, ml_dtypes.finfo(dtype).smallest_subnormal]
    check_dispatch(device_backend, case, ids, np.ones(rows_shape(case), F32), weights)


@pytest.mark.parametrize("zero_tail", [True, False])
def test_padding_and_tail(backend: Backend, zero_tail: bool) -> None:
    # Without the oracle: one token, so 15 rows of padding and, at this capacity, a long tail.
    case = Case(2, 3, 1, 4, hidden=8, capacity=48, expert_alignment=16, zero_tail=zero_tail)
    ids = np.full((2, 3, 1), -1, np.int32)
    ids[1, 2] = 1  # the second expert of rank 0
    layout = backend.make_layout(case, ids)
    x = np.full((2, 3, 8), 7, F32)
    received = backend.dispatch(x, layout, np.full((2, 3, 1), 0.5, F32))
    group = (received.tokens[0, :16], received.weights[0, :16])
    expected = np.zeros((16, 8), F32), np.zeros(16, F32)
    expected[0][0], expected[1][0] = 7, 0.5
    assert_same_bits(group[0], expected[0])
    assert_same_bits(group[1], expected[1])
    if zero_tail:
        for rest in (received.tokens[0, 16:], received.weights[0, 16:]):
            assert_same_bits(rest, np.zeros_like(rest))
        assert_same_bits(received.tokens[1], np.zeros((48, 8), F32))
        assert_same_bits(received.weights[1], np.zeros(48, F32))


def test_poison_is_seen(device_backend: JaxBackend) -> None:
    # What zero_tail=False leaves unspecified is the poison here: so a row that dispatch forgot
    # would be NaN in all tests of this file.
    case = Case(1, 1, 1, 1, hidden=128, capacity=64, zero_tail=False)
    layout = device_backend.make_layout(case, np.zeros((1, 1, 1), np.int32))
    x, weights = np.ones((1, 1, 128), F32), np.ones((1, 1, 1), F32)
    for fp8 in (None, "float32"):
        received = device_backend.dispatch(x, layout, weights, fp8=fp8)
        for result in [received.tokens, received.weights] + [received.scales] * (fp8 is not None):
            assert not np.isnan(result[0, 0].astype(F32)).any()
            assert np.isnan(result[0, 1:].astype(F32)).all()


def test_every_rank_count(device_backend: JaxBackend) -> None:
    rng = np.random.default_rng(7)
    for num_ranks in range(1, min(device_backend.num_devices, 8) + 1):
        case = Case(num_ranks, 3, 2, 2 * num_ranks, hidden=8)
        ids = routings.topk_ids(rng, case, "uniform")
        x = routings.random_rows(rng, rows_shape(case), F32)
        check_dispatch(device_backend, case, ids, x, routings.random_weights(rng, case))


def test_stale_state(device_backend: JaxBackend) -> None:
    # Many tokens, then one (another program), then fewer in the first program, then the many.
    rng, seen = np.random.default_rng(8), []
    many, one = Case(4, 40, 4, 8, hidden=64), Case(4, 1, 1, 4, hidden=8)
    many_ids = routings.topk_ids(rng, many, "uniform")
    few_ids = np.where(np.arange(40)[:, None] == 17, many_ids, -1).astype(np.int32)
    one_ids = routings.topk_ids(rng, one, "one_expert")
    x = routings.random_rows(rng, rows_shape(many), BF16)
    weights = routings.random_weights(rng, many)
    for case, ids in ((many, many_ids), (one, one_ids), (many, few_ids), (many, many_ids)):
        sent = x[:, : case.num_tokens, : case.hidden]
        sent_weights = weights[:, : case.num_tokens, : case.top_k]
        check_dispatch(device_backend, case, ids, sent, sent_weights)
        if ids is many_ids:
            layout = device_backend.make_layout(case, ids)
            seen.append(device_backend.dispatch(sent, layout, sent_weights))
    for first, again in zip(seen[0], seen[1], strict=True):
        assert first is None or first.tobytes() == again.tobytes(), "not reproducible"


# fp8 ----------------------------------------------------------------------------------------------


def fp8_sizes() -> list[Case]:
    return [
        Case(1, 1, 1, 1, hidden=128),
        Case(2, 5, 2, 4, hidden=256, expert_alignment=16),
        Case(8, 6, 4, 16, hidden=384),
        # Whose last block is shorter: the shortest there is, and 22 and a half of them.
        Case(3, 5, 2, 6, hidden=16, capacity=8),
        Case(2, 5, 2, 4, hidden=144),
        Case(2, 9, 4, 8, hidden=2880, expert_alignment=8),
        Case(2, 5, 2, 4, hidden=512),  # four scales: on GPUs rows that come with them fit slots
    ]


@routings.examples(20)
@given(
    routed=routed_cases(fp8_sizes()),
    dtype=st.sampled_from([BF16, F16, F32]),
    fp8=st.sampled_from(FP8_SCALES),
    dequantize=st.booleans(),
    weighted=st.booleans(),
)
def test_fp8(
    device_backend: JaxBackend,
    routed: RoutedCase,
    dtype: DTypeLike,
    fp8: str,
    dequantize: bool,
    weighted: bool,
) -> None:
    # Rows of ordinary size, one in eight of zeros and subnormals and the largest numbers; some
    # groups of 128 all zero, all subnormal, or tiny.
    rng, case = routed.rng, routed.case
    x = routings.random_rows(rng, rows_shape(case), dtype, specials=bool(rng.integers(2)))
    tiny = float(ml_dtypes.finfo(dtype).tiny)
    for begin, factor in itertools.product(range(0, case.hidden, 128), (0, tiny, tiny / 64)):
        groups = x[:, :, begin : begin + 128]
        chosen = rng.random(groups.shape[:2]) < 0.1
        values = factor * rng.uniform(-1, 1, (chosen.sum(), groups.shape[2]))
        groups[chosen] = values.astype(dtype)
    weights = routings.random_weights(rng, case) if weighted else None
    options = {"fp8": fp8, "dequantize": dequantize}
    check_dispatch(device_backend, case, routed.topk_idx, x, weights, **options)


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("hidden", [4224, 2880])
def test_fp8_with_many_long_rows(device_backend: JaxBackend, hidden: int, dequantize: bool) -> None:
    """More tokens than a GPU's blocks take at a time, and rows longer than their buffers."""
    tokens = 90 if device_backend.platform == "cpu" else 700
    case, rng = Case(2, tokens, 4, 8, hidden=hidden, expert_alignment=8), np.random.default_rng(7)
    ids = routings.topk_ids(rng, case, "uniform")
    x = routings.random_rows(rng, rows_shape(case), BF16, specials=False)
    weights = routings.random_weights(rng, case)
    check_dispatch(device_backend, case, ids, x, weights, fp8="float32", dequantize=dequantize)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("fp8", FP8_SCALES)
@pytest.mark.parametrize("dequantize", [False, True])
def test_fp8_rounding(
    device_backend: JaxBackend, fp8: str, dequantize: bool, dtype: DTypeLike
) -> None:
    # Every finite 16-bit float (or every 2**16th float32), sorted by magnitude, 127 neighbours to a
    # group together with 448 * 2**n, so that quotients hit e4m3fn's numbers, ties and subnormals.
    # Then some of these groups again, with a NaN or an infinity in each.
    bits = np.arange(2**16, dtype=np.uint16)
    if np.dtype(dtype).itemsize == 4:
        bits = bits.astype(np.uint32) << 16 | 0x8000
    with np.errstate(invalid="ignore"):  # signalling NaNs
        magnitude = np.abs(bits.view(dtype).astype(np.float64))
    order = np.argsort(magnitude, kind="stable")  # NaNs come last, then out
    order = order[: np.isfinite(magnitude).sum()]
    order = np.resize(order, (-(-order.size // 127), 127))
    largest = np.maximum(magnitude[order].max(axis=1, keepdims=True), 2.0**-120)
    top = 448 * 2.0 ** np.ceil(np.log2(largest / 448))
    top = np.minimum(top, float(ml_dtypes.finfo(dtype).max)).astype(dtype)
    groups = np.concatenate([bits.view(dtype)[order], top], axis=1)
    special = groups[::64].copy()
    special[0::3, 5] = np.nan
    special[1::3, 6] = np.inf
    special[2::3, 127] = -np.inf
    groups = np.concatenate([groups, special])
    groups = np.resize(groups, (2, -(-len(groups) // 4), 256))
    case = Case(2, groups.shape[1], 1, 2, hidden=256)
    ids = routings.topk_ids(np.random.default_rng(9), case, "uniform")
    check_dispatch(device_backend, case, ids, groups, None, fp8=fp8, dequantize=dequantize)


def test_fp8_results(device_backend: JaxBackend) -> None:
    case = fp8_sizes()[1]
    layout = device_backend.make_layout(case, np.zeros((2, 5, 2), np.int32))
    x = np.ones((2, 5, 256), BF16)
    received = device_backend.dispatch(x, layout, fp8="float32")
    assert received.tokens.dtype == ml_dtypes.float8_e4m3fn
    assert received.scales is not None
    assert received.scales.dtype == F32
    assert received.scales.shape == (2, layout.recv_src.shape[1], 2)
    received = device_backend.dispatch(x, layout, fp8="float32", dequantize=True)
    assert received.tokens.dtype == BF16
    assert received.scales is None
