"""make_layout on every backend: the worked example, and every field against the oracle.

The worked example is drawn in worked_example.py.
"""

from typing import Any

import numpy as np
import pytest
import routings
from backends import LAYOUT_ARRAYS, Backend, JaxBackend
from hypothesis import given
from routings import Case, RoutedCase, assert_same_bits, routed_cases
from worked_example import EXAMPLE_IDS, EXAMPLE_LAYOUTS

import jax_ep
from jax_ep import layout as layout_module
from jax_ep import reference

pytestmark = pytest.mark.usefixtures("poison")

EXAMPLE = Case(2, 3, 2, 4, hidden=8, expert_alignment=2)


def assert_equals_oracle(backend: Backend, case: Case, topk_idx: np.ndarray) -> None:
    expected = case.reference_layout(topk_idx)
    layout = backend.make_layout(case, topk_idx)
    for name in LAYOUT_ARRAYS:
        try:
            assert_same_bits(getattr(layout, name), getattr(expected, name))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.versions
@pytest.mark.parametrize("capacity", EXAMPLE_LAYOUTS)
def test_example(backend: Backend, capacity: int) -> None:
    layout = backend.make_layout(EXAMPLE.with_capacity(capacity), EXAMPLE_IDS)
    for name, expected in EXAMPLE_LAYOUTS[capacity].items():
        dtype = np.bool_ if name in ("kept", "row_valid") else np.int32
        assert_same_bits(getattr(layout, name), np.array(expected, dtype))
    assert_same_bits(layout.topk_idx, EXAMPLE_IDS)
    assert_same_bits(layout.expert_counts, np.array([[3, 1], [4, 0]], np.int32))
    assert_same_bits(layout.expert_load, np.array([[3, 1, 4, 0], [3, 1, 4, 0]], np.int32))
    assert_same_bits(layout.num_invalid, np.array([0, 1], np.int32))


@pytest.mark.parametrize("kind", routings.ROUTING_KINDS)
@pytest.mark.parametrize("case", routings.STATIC_SIZES, ids=str)
def test_default_capacity(device_backend: JaxBackend, case: Case, kind: str) -> None:
    # One compilation a case: every kind of routing runs through the same program.
    topk_idx = routings.topk_ids(np.random.default_rng(1), case, kind)
    assert_equals_oracle(device_backend, case, topk_idx)


@routings.examples(45)
@given(routed=routed_cases())
def test_any_routing_and_capacity(device_backend: JaxBackend, routed: RoutedCase) -> None:
    assert_equals_oracle(device_backend, routed.case, routed.topk_idx)


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_any_number_of_ranks(device_backend: JaxBackend, num_ranks: int) -> None:
    case = Case(num_ranks, 5, 2, 3 * num_ranks, hidden=8, capacity=8, expert_alignment=4)
    ids = routings.topk_ids(np.random.default_rng(num_ranks), case, "uniform")
    assert case.reference_layout(ids).num_dropped.any() or num_ranks == 1
    assert_equals_oracle(device_backend, case, ids)


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_one_token(device_backend: JaxBackend, num_ranks: int) -> None:
    case = Case(num_ranks, 1, 1, num_ranks, hidden=8)
    for ids in (np.arange(num_ranks)[::-1], np.zeros(num_ranks), np.full(num_ranks, -1)):
        assert_equals_oracle(device_backend, case, ids.astype(np.int32).reshape(-1, 1, 1))


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_default_capacity_never_drops_distinct_experts(backend: Backend, kind: str) -> None:
    # All tokens of all ranks choose the experts of rank 1 only, all of them: the default holds
    # exactly that when A = 1.
    for alignment in (1, 16):
        case = Case(2, 6, 2, 4, hidden=8, expert_alignment=alignment)
        for seed in range(3):
            ids = routings.topk_ids(np.random.default_rng(seed), case, kind)
            assert not backend.make_layout(case, ids).num_dropped.any()
        ids = np.broadcast_to(np.array([3, 2], np.int32), (2, 6, 2))
        layout = backend.make_layout(case, ids)
        assert layout.num_recv.tolist() == [0, 24]
        assert layout.num_dropped.tolist() == [0, 0]
    # Duplicates may overflow it: K = 2 rows a token, but min(K, L) = 1.
    case = Case(2, 6, 2, 2, hidden=8)
    layout = backend.make_layout(case, np.ones((2, 6, 2), np.int32))
    assert layout.num_recv.tolist() == [0, 12]
    assert layout.num_dropped.tolist() == [0, 12]


@pytest.mark.versions
def test_stats(device_backend: JaxBackend) -> None:
    # The scalars with a leading axis of 1; the harness adds the ranks' axis in front.
    def stats(topk_idx: Any) -> Any:
        return jax_ep.make_layout(
            topk_idx, num_experts=4, axis_name="ep", capacity=4, expert_alignment=2
        ).stats()

    found = device_backend.run(2, stats, EXAMPLE_IDS)
    assert sorted(found) == ["num_dropped", "num_invalid", "num_recv"]
    assert_same_bits(found["num_recv"], np.array([[3], [4]], np.int32))
    assert_same_bits(found["num_dropped"], np.array([[1], [0]], np.int32))
    assert_same_bits(found["num_invalid"], np.array([[0], [1]], np.int32))


@pytest.mark.versions
def test_static_fields(device_backend: JaxBackend) -> None:
    layout = device_backend.make_layout(EXAMPLE.with_capacity(6), EXAMPLE_IDS).handle
    assert isinstance(layout, jax_ep.Layout)
    assert layout.axis_name == ("ep",)
    assert (layout.num_ranks, layout.num_experts, layout.capacity) == (2, 4, 6)
    assert (layout.expert_alignment, layout.zero_tail) == (2, True)


def test_stale_state(device_backend: JaxBackend) -> None:
    # Many tokens, then one, then the many again: nothing of a call is left for the next one.
    many, one = Case(4, 40, 4, 8, hidden=8), Case(4, 1, 1, 4, hidden=8)
    many_ids = routings.topk_ids(np.random.default_rng(0), many, "uniform")
    one_ids = np.array([2, -1, 2, 0], np.int32).reshape(4, 1, 1)
    for case, ids in ((many, many_ids), (one, one_ids)) * 2:
        assert_equals_oracle(device_backend, case, ids)
    # The same program with less routed, then nothing routed.
    for kept in (5, 0):
        ids = np.where(np.arange(40)[:, None] < kept, many_ids, -1).astype(np.int32)
        assert_equals_oracle(device_backend, many, ids)


# jax_ep.capacity ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "factor", "alignment", "expected"),
    [
        # (T, K, R, E): L = E / R; ceil(factor * T * K) + L * (A - 1), up to a multiple of A.
        ((128, 8, 8, 64), 1.0, 1, 1024),
        ((128, 8, 8, 64), 1.25, 1, 1280),  # 1.25 * 1024
        ((128, 8, 8, 64), 1.25, 16, 1408),  # 1280 + 8 * 15 = 1400, up to 1408
        ((100, 3, 4, 8), 1.1, 1, 331),  # 1.1 * 300 is a little above 330 in float64: rounded up
        ((100, 3, 4, 8), 0.5, 1, 150),
        ((10, 1, 2, 4), 0.01, 8, 16),  # ceil(0.1) = 1, + 2 * 7 = 15, up to 16
        # Never more than R*T*min(K, L) + L*(A - 1), down to a multiple of A.
        ((128, 8, 8, 64), 100.0, 1, 8192),
        ((128, 8, 8, 16), 100.0, 1, 2048),  # min(K, L) = 2
        ((3, 2, 2, 4), 100.0, 2, 14),  # 12 + 2 = 14
        ((3, 2, 2, 4), 100.0, 4, 16),  # 12 + 6 = 18, down to 16
        ((128, 8, 8, 64), None, 16, 8304),  # 8192 + 120 = 8312, down to 8304
    ],
)
def test_capacity_by_hand(
    sizes: tuple[int, int, int, int], factor: float | None, alignment: int, expected: int
) -> None:
    num_tokens, top_k, num_ranks, num_experts = sizes
    options = {"num_experts": num_experts, "expert_alignment": alignment}
    assert jax_ep.capacity(num_tokens, top_k, num_ranks, factor, **options) == expected


def test_capacity_default_factor() -> None:
    assert jax_ep.capacity(128, 8, 8, num_experts=64) == 1280


def test_default_capacity_equals_the_oracles() -> None:
    for case in routings.STATIC_SIZES:
        sizes = (case.num_tokens, case.top_k, case.num_ranks, case.num_experts)
        for alignment in (1, 8, 128):
            expected = reference.default_capacity(*sizes, alignment)
            assert layout_module.default_capacity(*sizes, alignment) == expected
            options = {"num_experts": case.num_experts, "expert_alignment": alignment}
            assert jax_ep.capacity(*sizes[:3], None, **options) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1; got 0"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"num_ranks": -1}, "num_ranks must be at least 1; got -1"),
        ({"num_experts": 0}, "num_experts must be at least 1; got 0"),
        ({"expert_alignment": 0}, "expert_alignment must be at least 1; got 0"),
        (
            {"num_experts": 9},
            "num_experts must be a multiple of num_ranks = 2; got 9. Pad the experts: pass "
            "num_experts=10 and append 1 to their weights, as jnp.pad(w, ((0, 1), (0, 0), (0, 0))) "
            "does. The router and its ids stay as they are: no token chooses the added ones",
        ),
        ({"factor": 0.0}, "factor must be positive and finite; got 0.0"),
        ({"factor": -1.0}, "factor must be positive and finite; got -1.0"),
        ({"factor": float("inf")}, "factor must be positive and finite; got inf"),
        ({"factor": float("nan")}, "factor must be positive and finite; got nan"),
    ],
)
def test_capacity_errors(change: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"num_tokens": 4, "top_k": 2, "num_ranks": 2, "num_experts": 8}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        jax_ep.capacity(**(sizes | change))
    assert str(caught.value) == f"jax_ep.capacity: {message}"


def test_capacity_of_numpy_sizes() -> None:
    """They do not overflow, and a Python int comes out."""
    large = {"num_tokens": 2**20, "top_k": 8, "num_ranks": 512, "num_experts": 512 * 8}
    for factor in (None, 1.25):
        found = jax_ep.capacity(**{k: np.int32(v) for k, v in large.items()}, factor=factor)
        assert type(found) is int
        assert found == jax_ep.capacity(**large, factor=factor)
