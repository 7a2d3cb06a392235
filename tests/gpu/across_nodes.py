"""The verbs, and gradients, of a group that is the whole job and lies on several nodes.

Run by the tiers network-ep*, in every process of a job: each of them is a rank. One group has the
network's memory, so the suite, with its groups of all sizes, cannot run there.
"""

import dataclasses

import numpy as np
import pytest
import random_calls
import routings
from backends import LAYOUT_ARRAYS, JaxBackend
from numpy.typing import DTypeLike
from on_device import Form, Kind
from routings import Case, assert_same_bits
from test_dispatch import BF16, F32, ORACLE, check_dispatch, rows_shape
from test_layout import assert_equals_oracle
from test_nodes import on_nodes

from jax_ep import nodes, nvshmem, reference

pytestmark = pytest.mark.usefixtures("poison")

# T, K, L, H and what else a case has. Long rows are one or two a chunk, and on one SM all channels
# have several times as many chunks as slots.
SIZES = {
    "small": (5, 2, 2, 8, {}),
    "aligned": (40, 4, 4, 264, {"expert_alignment": 8}),
    "drops": (64, 4, 2, 1152, {"capacity": 48}),
    "own room": (33, 3, 2, 520, {"expert_capacity": 16}),
    "any tail": (130, 8, 8, 64, {"zero_tail": False}),
    "long rows": (72, 2, 2, 7168, {"capacity": 200, "num_sms": 1}),
}


# Of random calls: several chunks, chunks of one row, fewer tokens than channels, more than a warp
# looks at, rooms that drop. Some on fewer SMs, so that channels rest in a call.
RANDOM = {
    "drops": (Case(1, 64, 4, 2, hidden=288, capacity=160), Form()),
    "one token": (Case(1, 1, 2, 2, hidden=8), Form()),
    "own room": (Case(1, 24, 4, 4, hidden=32, expert_capacity=24), Form(in_one=True)),
    "aligned": (Case(1, 33, 4, 4, hidden=136, capacity=192, expert_alignment=16), Form()),
    "long rows": (Case(1, 72, 2, 2, hidden=3584, capacity=120), Form()),
    "many tokens": (Case(1, 520, 1, 2, hidden=8), Form()),
    "not expanded": (Case(1, 96, 4, 4, hidden=520, capacity=400), Form(expand=False)),
    "two scales": (Case(1, 16, 4, 4, hidden=32, capacity=64), Form(num_scales=2)),
}


@pytest.fixture
def num_ranks(device_backend: JaxBackend) -> int:
    assert nvshmem.is_running()
    return device_backend.num_devices


def case_of(size: str, num_ranks: int) -> Case:
    num_tokens, top_k, num_local_experts, hidden, more = SIZES[size]
    return Case(num_ranks, num_tokens, top_k, num_local_experts * num_ranks, hidden, **more)


@pytest.mark.parametrize("kind", routings.ROUTING_KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_layout(device_backend: JaxBackend, num_ranks: int, size: str, kind: str) -> None:
    case = case_of(size, num_ranks)
    ids = routings.topk_ids(np.random.default_rng(1), case, kind)
    assert_equals_oracle(device_backend, case, ids)


@pytest.mark.parametrize("kind", routings.ROUTING_KINDS)
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *[(size, BF16) for size in SIZES],
        ("small", F32),
        ("aligned", np.int16),
        ("long rows", np.uint8),
    ],
)
def test_rows(
    device_backend: JaxBackend, num_ranks: int, size: str, dtype: DTypeLike, kind: str
) -> None:
    case, rng = case_of(size, num_ranks), np.random.default_rng(2)
    ids = routings.topk_ids(rng, case, kind)
    if np.issubdtype(dtype, np.integer):
        x = rng.integers(0, 128, rows_shape(case)).astype(dtype)
    else:
        x = routings.random_rows(rng, rows_shape(case), dtype, specials=True)
    for weights in (None, routings.random_weights(rng, case)):
        check_dispatch(device_backend, case, ids, x, weights)


@pytest.mark.parametrize("size", ["small", "drops"])
def test_in_one(device_backend: JaxBackend, num_ranks: int, size: str) -> None:
    """layout_and_dispatch is the two, with tables and rows to the bit."""
    case, rng = case_of(size, num_ranks), np.random.default_rng(3)
    ids = routings.topk_ids(rng, case, "uniform")
    x = routings.random_rows(rng, rows_shape(case), BF16)
    arguments = (case, ids, x, routings.random_weights(rng, case))
    layout, received = device_backend.layout_and_dispatch(*arguments)
    theirs, expected = ORACLE.layout_and_dispatch(*arguments)
    for name in LAYOUT_ARRAYS:
        assert_same_bits(getattr(layout, name), getattr(theirs, name))
    assert_same_bits(received.tokens, expected.tokens)
    assert_same_bits(received.weights, expected.weights)


@pytest.mark.parametrize(
    ("size", "fp8", "form"),
    [
        ("aligned", "float32", {}),
        ("drops", "power_of_two", {"expand": False}),
        ("own room", "float32", {"dequantize": True}),
        ("long rows", "power_of_two", {"dequantize": True, "expand": False}),
    ],
)
def test_fp8(
    device_backend: JaxBackend, num_ranks: int, size: str, fp8: str, form: dict[str, bool]
) -> None:
    """Rows are quantised here, cross as such, and may be multiplied with their scales there."""
    case, rng = case_of(size, num_ranks), np.random.default_rng(6)
    case = dataclasses.replace(case, hidden=case.hidden // 16 * 16)
    ids = routings.topk_ids(rng, case, "uniform")
    x = routings.random_rows(rng, rows_shape(case), BF16, specials=True)
    weights = routings.random_weights(rng, case)
    layout, theirs = device_backend.make_layout(case, ids), ORACLE.make_layout(case, ids)
    received = device_backend.dispatch(x, layout, weights, fp8=fp8, **form)
    expected = ORACLE.dispatch(x, theirs, weights, fp8=fp8, **form)
    for array, right in zip(received, expected, strict=True):
        assert (array is None) == (right is None)
        if right is not None:
            assert_same_bits(array, right)


@pytest.mark.parametrize("size", ["drops", "own room", "long rows"])
def test_sums_of_rows_per_token(device_backend: JaxBackend, num_ranks: int, size: str) -> None:
    """The gradient of dispatch with expand=False."""
    case, rng = case_of(size, num_ranks), np.random.default_rng(7)
    ranks_per_node = nodes.chosen()
    assert ranks_per_node is not None
    ids = routings.topk_ids(rng, case, "uniform")
    layout = device_backend.make_layout(case, ids)
    theirs = on_nodes(ORACLE.make_layout(case, ids), ranks_per_node)
    d_tokens = routings.random_rows(
        rng, (num_ranks, num_ranks * case.num_tokens + 1, case.hidden), BF16, specials=True
    )
    d_weights = rng.standard_normal((num_ranks, case.num_rows)).astype(F32)
    d_x, d_topk_weights = device_backend.dispatch_vjp(layout, d_tokens, d_weights, expand=False)
    expected, expected_weights = ORACLE.dispatch_vjp(theirs, d_tokens, d_weights, expand=False)
    assert_same_bits(d_x, expected)
    assert_same_bits(d_topk_weights, expected_weights)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("size", SIZES)
def test_sums(device_backend: JaxBackend, num_ranks: int, size: str, dtype: DTypeLike) -> None:
    """combine, and the gradient of dispatch, in the order of nodes; that of combine is rows."""
    case, rng = case_of(size, num_ranks), np.random.default_rng(5)
    ranks_per_node = nodes.chosen()
    assert ranks_per_node is not None
    for kind in ("uniform", "nowhere", "empty_ranks"):
        ids = routings.topk_ids(rng, case, kind)
        layout = device_backend.make_layout(case, ids)
        theirs = on_nodes(ORACLE.make_layout(case, ids), ranks_per_node)
        shape = (num_ranks, case.num_rows, case.hidden)
        y = routings.random_rows(rng, shape, dtype, specials=True)
        y[~layout.row_valid] = np.nan
        weights = rng.standard_normal(shape[:2]).astype(F32)
        for given in (None, weights):
            assert_same_bits(
                device_backend.combine(y, layout, given), ORACLE.combine(y, theirs, given)
            )
        d_x, d_topk_weights = device_backend.dispatch_vjp(layout, y, weights)
        expected, expected_weights = ORACLE.dispatch_vjp(theirs, y, weights)
        assert_same_bits(d_x, expected)
        assert_same_bits(d_topk_weights, expected_weights)
        g = routings.random_rows(rng, rows_shape(case), dtype)
        d_y, _ = device_backend.combine_vjp(y, layout, None, g)
        rows = ORACLE.combine_vjp(y, theirs, None, g)[0]
        specified = reference.specified_rows(theirs.handle)
        assert_same_bits(d_y[specified], rows[specified])


@pytest.mark.parametrize("size", ["drops", "aligned"])
def test_weighted_gradient(device_backend: JaxBackend, num_ranks: int, size: str) -> None:
    """Of combine with weights: rows times weights to the bit, dot products but for their order."""
    case, rng = case_of(size, num_ranks), np.random.default_rng(8)
    ids = routings.topk_ids(rng, case, "uniform")
    layout, theirs = device_backend.make_layout(case, ids), ORACLE.make_layout(case, ids)
    shape = (num_ranks, case.num_rows, case.hidden)
    y, g = (routings.random_rows(rng, s, F32) for s in (shape, rows_shape(case)))
    weights = rng.standard_normal(shape[:2]).astype(F32)
    y[~layout.row_valid] = weights[~layout.row_valid] = np.nan
    d_y, d_weights = device_backend.combine_vjp(y, layout, weights, g)
    expected, expected_weights = ORACLE.combine_vjp(y, theirs, weights, g)
    specified = reference.specified_rows(theirs.handle)
    assert_same_bits(d_y[specified], expected[specified])
    assert d_weights is not None
    assert expected_weights is not None
    np.testing.assert_allclose(d_weights, expected_weights, rtol=1e-4, atol=1e-3)


def test_call_after_call(device_backend: JaxBackend, num_ranks: int) -> None:
    """Nothing of a call is left for the next one: chunks, credit and epochs go on through all."""
    rng = np.random.default_rng(4)
    cases = [case_of(size, num_ranks) for size in ("long rows", "small", "aligned")]
    for _ in range(20):
        for case in cases:
            ids = routings.topk_ids(rng, case, str(rng.choice(routings.ROUTING_KINDS)))
            x = routings.random_rows(rng, rows_shape(case), BF16)
            check_dispatch(device_backend, case, ids, x, routings.random_weights(rng, case))


@pytest.mark.parametrize("late", [False, True], ids=["queued", "late"])
def test_random_calls(
    device_backend: JaxBackend, num_ranks: int, request: pytest.FixtureRequest, late: bool
) -> None:
    """Thousands in one program, checked where they are: every kind in turn, or with late ranks."""
    kinds = tuple(
        Kind(
            dataclasses.replace(
                case, num_ranks=num_ranks, num_experts=num_ranks * case.num_experts
            ),
            form,
            num_sms={"aligned": 12, "long rows": 1}.get(name),
            name=name,
        )
        for name, (case, form) in RANDOM.items()
    )
    random_calls.check(request, device_backend, "across nodes", kinds, late)
