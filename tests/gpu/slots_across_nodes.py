"""Calls in slots of a group that is the whole job and lies on several nodes.

Run by the tier network-slots-ep2, in every process of a job with JAX_EP_NETWORK_SLOTS=1. That calls
go through slots is seen by forms that no other way across nodes takes.
"""

from typing import Any

import numpy as np
import pytest
import routings
from across_nodes import case_of
from backends import LAYOUT_ARRAYS, JaxBackend
from routings import Case, assert_same_bits
from test_dispatch import BF16, F32, ORACLE, assert_same_received, rows_shape
from test_layout_and_dispatch import E4M3
from test_nodes import on_nodes

from jax_ep import nodes, nvshmem, reference, runtime

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def num_ranks(device_backend: JaxBackend) -> int:
    assert nvshmem.is_running()
    assert runtime.has_network_slots()
    return device_backend.num_devices


def check_rows(
    backend: JaxBackend, case: Case, ids: Any, x: Any, weights: Any, **options: Any
) -> None:
    layout, received = backend.layout_and_dispatch(case, ids, x, weights, **options)
    theirs, expected = ORACLE.layout_and_dispatch(case, ids, x, weights, **options)
    for name in LAYOUT_ARRAYS:
        assert_same_bits(getattr(layout, name), getattr(theirs, name))
    by_expert = reference.specified_rows(theirs.handle)
    assert_same_bits(received.weights[by_expert], expected.weights[by_expert])
    by_row = reference.specified_rows(theirs.handle, expand=options.get("expand", True))
    without_weights = [type(r)((r.tokens, None, r.scales)) for r in (received, expected)]
    assert_same_received(*without_weights, by_row)


@pytest.mark.parametrize("size", ["small", "aligned", "drops", "own room"])
def test_rows(device_backend: JaxBackend, num_ranks: int, size: str) -> None:
    case, rng = case_of(size, num_ranks), np.random.default_rng(1)
    for kind in routings.ROUTING_KINDS:
        ids = routings.topk_ids(rng, case, kind)
        x = routings.random_rows(rng, rows_shape(case), BF16, specials=True)
        check_rows(device_backend, case, ids, x, routings.random_weights(rng, case))


@pytest.mark.parametrize(
    "options",
    [{"fp8": "float32"}, {"fp8": "power_of_two", "dequantize": True, "expand": False}],
    ids=["quantised", "dequantised"],
)
def test_forms(device_backend: JaxBackend, num_ranks: int, options: dict[str, Any]) -> None:
    """Forms that go through slots alone."""
    case, rng = Case(num_ranks, 24, 4, 4 * num_ranks, hidden=640), np.random.default_rng(2)
    ids = routings.topk_ids(rng, case, "uniform")
    x = routings.random_rows(rng, rows_shape(case), BF16)
    check_rows(device_backend, case, ids, x, routings.random_weights(rng, case), **options)


def test_given_scales(device_backend: JaxBackend, num_ranks: int) -> None:
    case, rng = Case(num_ranks, 24, 4, 4 * num_ranks, hidden=512), np.random.default_rng(3)
    ids = routings.topk_ids(rng, case, "uniform")
    x = routings.random_rows(rng, rows_shape(case), F32).astype(E4M3)
    scales = rng.standard_normal((*x.shape[:2], 4)).astype(F32)
    weights = routings.random_weights(rng, case)
    check_rows(device_backend, case, ids, x, weights, scales=scales, expand=False)


@pytest.mark.parametrize("size", ["small", "drops"])
def test_sums(device_backend: JaxBackend, num_ranks: int, size: str) -> None:
    """combine, and the gradient of dispatch, in the order of nodes."""
    case, rng = case_of(size, num_ranks), np.random.default_rng(4)
    ranks_per_node = nodes.chosen()
    assert ranks_per_node is not None
    for kind in ("uniform", "nowhere", "empty_ranks"):
        ids = routings.topk_ids(rng, case, kind)
        layout = device_backend.make_layout(case, ids)
        theirs = on_nodes(ORACLE.make_layout(case, ids), ranks_per_node)
        shape = (num_ranks, case.num_rows, case.hidden)
        y = routings.random_rows(rng, shape, BF16, specials=True)
        y[~layout.row_valid] = np.nan
        weights = rng.standard_normal(shape[:2]).astype(F32)
        assert_same_bits(
            device_backend.combine(y, layout, weights), ORACLE.combine(y, theirs, weights)
        )
        d_x, d_topk_weights = device_backend.dispatch_vjp(layout, y, weights)
        expected, expected_weights = ORACLE.dispatch_vjp(theirs, y, weights)
        assert_same_bits(d_x, expected)
        assert_same_bits(d_topk_weights, expected_weights)


def test_call_after_call(device_backend: JaxBackend, num_ranks: int) -> None:
    """Nothing of a call is left for the next one; nor of those between that slots do not take."""
    rng = np.random.default_rng(5)
    cases = [case_of(size, num_ranks) for size in ("drops", "small", "long rows")]
    for _ in range(20):
        for case in cases:
            ids = routings.topk_ids(rng, case, str(rng.choice(routings.ROUTING_KINDS)))
            x = routings.random_rows(rng, rows_shape(case), BF16)
            check_rows(device_backend, case, ids, x, routings.random_weights(rng, case))
