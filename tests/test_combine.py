"""combine on every backend: the roundings of the contract to the bit, and nothing else read.

`ROUNDINGS`, numbers written by hand, is in roundings.py: each entry says what one token's rows are
and what comes out.
"""

from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import routings
from backends import BACKENDS, Backend, BackendLayout, JaxBackend
from hypothesis import given
from numpy.typing import DTypeLike, NDArray
from roundings import ROUNDINGS
from routings import Case, RoutedCase, assert_same_bits, routed_cases
from test_layout import EXAMPLE
from worked_example import EXAMPLE_DATA, EXAMPLE_IDS

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, on NaN and overflow
]

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
ORACLE = BACKENDS["reference"]


def random_y(
    rng: np.random.Generator, layout: BackendLayout, hidden: int, dtype: DTypeLike, **options: Any
) -> NDArray[Any]:
    """Experts' results [R, C, H'], NaN where no token is."""
    y = routings.random_rows(rng, (*layout.row_valid.shape, hidden), dtype, **options)
    y[~layout.row_valid] = np.nan
    return y


def random_row_weights(rng: np.random.Generator, layout: BackendLayout) -> NDArray[np.float32]:
    """Weights [R, C] of both signs and some zeros, NaN where no token is."""
    weights = rng.standard_normal(layout.row_valid.shape).astype(F32)
    weights[rng.random(weights.shape) < 0.1] = 0
    weights[~layout.row_valid] = np.nan
    return weights


def check_combine(
    backend: Backend, case: Case, ids: NDArray[np.int32], y: Any, weights: Any
) -> NDArray[Any]:
    out = backend.combine(y, backend.make_layout(case, ids), weights)
    assert_same_bits(out, ORACLE.combine(y, ORACLE.make_layout(case, ids), weights))
    return out


def as_example_rows(values: Any, dtype: DTypeLike) -> NDArray[Any]:
    """The example's two channels four times, so that a row is whole 16 bytes."""
    first = np.array(values, dtype)
    return np.stack([first, -first] * 4, axis=-1)


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("capacity", EXAMPLE_DATA)
def test_example(backend: Backend, capacity: int, dtype: DTypeLike) -> None:
    expected = EXAMPLE_DATA[capacity]
    layout = backend.make_layout(EXAMPLE.with_capacity(capacity), EXAMPLE_IDS)
    y = as_example_rows(expected["y"], dtype)  # NaN in padding and tail
    weights = np.array(expected["weights"], F32)
    weights[~layout.row_valid] = np.nan
    out = backend.combine(y, layout, weights)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, as_example_rows(expected["out"], dtype))
    out = backend.combine(y, layout)
    expected_out = as_example_rows(expected["out_without_weights"], dtype)
    np.testing.assert_array_equal(out, expected_out)


def rounding_groups() -> list[tuple[str, int, bool]]:
    """One compilation for all entries of ROUNDINGS with these: dtype, rows a token, weights."""
    found = {
        (np.dtype(dtype).name, len(rows), weights is not None)
        for dtype, rows, weights, _ in ROUNDINGS.values()
    }
    return sorted(found)


@pytest.mark.parametrize(("dtype", "top_k", "weighted"), rounding_groups())
def test_rounding(backend: Backend, dtype: str, top_k: int, weighted: bool) -> None:
    # Signed zeros, subnormals, ties, overflow, order of addition: three ranks; the token is the
    # second of a source rank, its neighbour has no row. Choice k goes to local expert K - 1 - k, so
    # the order of the rows is the reverse of the order of k. All other rows are NaN.
    case = Case(3, 2, top_k, 3 * top_k, hidden=8, expert_alignment=4)
    entries = {
        name: entry
        for name, entry in ROUNDINGS.items()
        if (np.dtype(entry[0]).name, len(entry[1]), entry[2] is not None)
        == (dtype, top_k, weighted)
    }
    for (name, (_, choices, weights, expected)), source in zip(
        entries.items(), np.arange(len(entries)) % 3, strict=True
    ):
        ids = np.full((3, 2, top_k), -1, np.int32)
        ids[source, 1] = [rank * top_k + top_k - 1 - k for k, (rank, _) in enumerate(choices)]
        layout = backend.make_layout(case, ids)
        y = np.full((*layout.row_valid.shape, 8), np.nan, dtype)
        row_weights = np.full(layout.row_valid.shape, np.nan, F32)
        for k, (rank, value) in enumerate(choices):
            y[rank, layout.send_row[source, 1, k]] = value
            if weights is not None:
                row_weights[rank, layout.send_row[source, 1, k]] = weights[k]
        out = backend.combine(y, layout, row_weights if weighted else None)
        expected_out = np.zeros((3, 2, 8), dtype)
        expected_out[source, 1] = expected
        try:
            assert_same_bits(out, expected_out)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@routings.examples(35)
@given(
    routed=routed_cases(),
    dtype=st.sampled_from([BF16, F16, F32]),
    weighted=st.booleans(),
    hidden=st.sampled_from([8, 40, 264]),
    specials=st.booleans(),
)
def test_any_routing(
    device_backend: JaxBackend,
    routed: RoutedCase,
    dtype: DTypeLike,
    weighted: bool,
    hidden: int,
    specials: bool,
) -> None:
    # H' has nothing to do with the H of what was dispatched; neither has the dtype.
    layout, rng = ORACLE.make_layout(routed.case, routed.topk_idx), routed.rng
    y = random_y(rng, layout, hidden, dtype, specials=specials)
    weights = random_row_weights(rng, layout) if weighted else None
    out = check_combine(device_backend, routed.case, routed.topk_idx, y, weights)
    if not specials:
        # Bounded numbers: the NaN of padding and tail would be the only source of a NaN.
        assert not np.isnan(out.astype(F32)).any()


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("weighted", [False, True])
def test_subnormal_range(device_backend: JaxBackend, dtype: DTypeLike, weighted: bool) -> None:
    # Every product, sum and result is around the subnormals of y's dtype: flushing any of them to
    # zero changes most results.
    case, rng = Case(4, 16, 4, 8, hidden=64), np.random.default_rng(10)
    ids = routings.topk_ids(rng, case, "uniform")
    layout = ORACLE.make_layout(case, ids)
    info = ml_dtypes.finfo(dtype)
    scale = float(info.tiny) * 2.0 ** rng.integers(-6, 3, (*layout.row_valid.shape, 64))
    y = (rng.standard_normal(scale.shape) * scale).astype(dtype)
    weights = random_row_weights(rng, layout) if weighted else None
    out = check_combine(device_backend, case, ids, y, weights).astype(np.float64)
    subnormal = (np.abs(out) < float(info.tiny)) & (out != 0)
    assert subnormal.mean() > 0.25, "the data misses the point"


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_overflow_range(device_backend: JaxBackend, dtype: DTypeLike) -> None:
    # Sums near the largest number: some reach infinity on a rank, some at the end, some are NaN
    # because infinities of two ranks cancel.
    case, rng = Case(4, 16, 4, 8, hidden=64), np.random.default_rng(11)
    ids = routings.topk_ids(rng, case, "uniform")
    layout = ORACLE.make_layout(case, ids)
    largest = float(ml_dtypes.finfo(dtype).max)
    y = (rng.uniform(-1, 1, (*layout.row_valid.shape, 64)) * largest).astype(dtype)
    out = check_combine(device_backend, case, ids, y, np.full(y.shape[:2], 1.5, F32))
    assert np.isinf(out.astype(F32)).any()
    assert np.isnan(out.astype(F32)).any()
    assert np.isfinite(out.astype(F32)).any()


@pytest.mark.parametrize("filler", [np.nan, np.inf, -np.inf])
def test_padding_and_tail_are_not_read(backend: Backend, filler: float) -> None:
    case = Case(3, 5, 2, 6, hidden=8, capacity=48, expert_alignment=16)
    ids = routings.topk_ids(np.random.default_rng(12), case, "nowhere")
    layout = backend.make_layout(case, ids)
    y, weights = np.ones((3, 48, 8), F32), np.ones((3, 48), F32)
    for weights_or_none in (weights, None):
        clean = backend.combine(y, layout, weights_or_none)
        np.testing.assert_array_equal(clean[..., 0], layout.kept.sum(axis=-1))
        dirty_y, dirty_weights = y.copy(), weights.copy()
        dirty_y[~layout.row_valid] = filler
        dirty_weights[~layout.row_valid] = filler
        dirty = dirty_weights if weights_or_none is not None else None
        assert_same_bits(backend.combine(dirty_y, layout, dirty), clean)


def test_token_without_a_row_is_positive_zero(backend: Backend) -> None:
    case = Case(2, 4, 2, 4, hidden=8, capacity=1)
    ids = np.full((2, 4, 2), -1, np.int32)
    ids[0, 0] = [0, 0]  # the second is dropped: capacity 1
    ids[0, 1] = [0, 4]  # dropped, and an invalid id
    layout = backend.make_layout(case, ids)
    out = backend.combine(np.full((2, 1, 8), -3, F32), layout, np.full((2, 1), 2, F32))
    expected = np.zeros((2, 4, 8), F32)
    expected[0, 0] = -6
    assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_weights_are_cast_to_float32(device_backend: JaxBackend, dtype: DTypeLike) -> None:
    case, rng = Case(2, 5, 2, 4, hidden=8), np.random.default_rng(13)
    ids = routings.topk_ids(rng, case, "uniform")
    layout = device_backend.make_layout(case, ids)
    y = random_y(rng, layout, 8, F32)
    weights = random_row_weights(rng, layout).astype(dtype)
    out = device_backend.combine(y, layout, weights)
    oracle = ORACLE.combine(y, ORACLE.make_layout(case, ids), weights.astype(F32))
    assert_same_bits(out, oracle)


@pytest.mark.parametrize("hidden", [4, 12, 260, 4100])
def test_any_row_of_whole_16_bytes(device_backend: JaxBackend, hidden: int) -> None:
    case, rng = Case(2, 5, 2, 4, hidden=8), np.random.default_rng(hidden)
    ids = routings.topk_ids(rng, case, "uniform")
    layout = ORACLE.make_layout(case, ids)
    weights = random_row_weights(rng, layout)
    check_combine(device_backend, case, ids, random_y(rng, layout, hidden, F32), weights)


def test_every_rank_count(device_backend: JaxBackend) -> None:
    rng = np.random.default_rng(14)
    for num_ranks in range(1, min(device_backend.num_devices, 8) + 1):
        case = Case(num_ranks, 3, 2, 2 * num_ranks, hidden=8)
        ids = routings.topk_ids(rng, case, "uniform")
        layout = ORACLE.make_layout(case, ids)
        weights = random_row_weights(rng, layout)
        check_combine(device_backend, case, ids, random_y(rng, layout, 8, BF16), weights)


def test_stale_state(device_backend: JaxBackend) -> None:
    # Many tokens, then one (another program), then fewer in the first program, then the many.
    rng, seen = np.random.default_rng(15), []
    many, one = Case(4, 40, 4, 8, hidden=64), Case(4, 1, 1, 4, hidden=8)
    many_ids = routings.topk_ids(rng, many, "uniform")
    few_ids = np.where(np.arange(40)[:, None] == 17, many_ids, -1).astype(np.int32)
    one_ids = routings.topk_ids(rng, one, "one_expert")
    for case, ids in ((many, many_ids), (one, one_ids), (many, few_ids), (many, many_ids)):
        layout, data = ORACLE.make_layout(case, ids), np.random.default_rng(16)
        y = random_y(data, layout, case.hidden, BF16)
        out = check_combine(device_backend, case, ids, y, random_row_weights(data, layout))
        if ids is many_ids:
            seen.append(out.tobytes())
    assert seen[0] == seen[1], "not reproducible"


def test_repeated_runs_are_bitwise_equal(device_backend: JaxBackend) -> None:
    case, rng = Case(8, 32, 8, 64, hidden=64), np.random.default_rng(17)
    ids = routings.topk_ids(rng, case, "zipf")
    layout = device_backend.make_layout(case, ids)
    y, weights = random_y(rng, layout, 64, F32), random_row_weights(rng, layout)
    first = device_backend.combine(y, layout, weights).tobytes()
    for _ in range(5):
        assert device_backend.combine(y, layout, weights).tobytes() == first
