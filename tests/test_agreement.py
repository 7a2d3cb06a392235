"""CPU and CUDA give the same bits in everything that the contract fixes to the bit.

Through the oracle that follows from the other files; here the two meet directly, on larger and
odder sizes, forward and backward.
"""

import ml_dtypes
import numpy as np
import pytest
import routings
from backends import BACKENDS, LAYOUT_ARRAYS, JaxBackend
from numpy.typing import DTypeLike
from routings import Case, assert_same_bits

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32

SIZES = [
    Case(1, 65, 3, 8, hidden=264),
    Case(2, 333, 8, 64, hidden=1032, capacity=2752, expert_alignment=16),
    Case(2, 1, 8, 16, hidden=7168),
    Case(4, 77, 5, 20, hidden=520, capacity=400, expert_alignment=8),
    Case(2, 150, 6, 24, hidden=264, expert_capacity=72, expert_alignment=8),
]


@pytest.fixture(scope="module")
def pair() -> tuple[JaxBackend, JaxBackend]:
    found = [BACKENDS.get(name) for name in ("cpu", "cuda")]
    for backend in found:
        if backend is None:
            pytest.skip("this job spreads its ranks over processes")
        if reason := backend.unavailable():
            pytest.skip(f"backend {backend.name}: {reason}")
    first, second = found
    assert isinstance(first, JaxBackend)
    assert isinstance(second, JaxBackend)
    return first, second


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_cpu_and_cuda(pair: tuple[JaxBackend, JaxBackend], case: Case, dtype: DTypeLike) -> None:
    rng = np.random.default_rng(50)
    ids = routings.topk_ids(rng, case, "nowhere")
    x = routings.random_rows(rng, (case.num_ranks, case.num_tokens, case.hidden), dtype)
    topk_weights = routings.random_weights(rng, case)
    g = routings.random_rows(rng, x.shape, dtype)
    d_rows = rng.standard_normal((case.num_ranks, case.num_rows))
    results, magnitude = [], None
    for backend in pair:
        layout = backend.make_layout(case, ids)
        found = {name: getattr(layout, name) for name in LAYOUT_ARRAYS}
        received = backend.dispatch(x, layout, topk_weights)
        y = received.tokens
        found |= {"tokens": y, "weights": received.weights}
        found["out"] = backend.combine(y, layout, received.weights)
        found["plain"] = backend.combine(y, layout)
        found["d_y"], d_weights = backend.combine_vjp(y, layout, received.weights, g)
        found["d_x"], found["d_topk"] = backend.dispatch_vjp(layout, y, d_rows.astype(F32))
        rows = backend.dispatch(g, layout).tokens.astype(np.float64)
        magnitude = np.abs(rows * y.astype(np.float64)).sum(axis=-1)
        results.append((found, d_weights))
    (ours, our_d), (theirs, their_d) = results
    for name in ours:
        try:
            assert_same_bits(ours[name], theirs[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    # Each is a float32 sum of H products in an order of its own: off by less than (H + 1) * 2**-24
    # times the sum of magnitudes (to first order; 1 % for the second). They differ by twice that.
    bound = 2 * 1.01 * (case.hidden + 1) * 2.0**-24 * magnitude
    assert (np.abs(our_d.astype(np.float64) - their_d) <= bound).all()
