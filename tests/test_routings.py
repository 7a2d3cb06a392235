"""The generators and the comparison of routings.py do what they say."""

import ml_dtypes
import numpy as np
import pytest
import routings
from hypothesis import given
from routings import RoutedCase, assert_same_bits, oracle_examples, routed_cases

BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize("case", routings.STATIC_SIZES, ids=str)
@pytest.mark.parametrize("kind", routings.ROUTING_KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_routing_kinds_are_what_they_say(kind: str, case: routings.Case, seed: int) -> None:
    ids = routings.topk_ids(np.random.default_rng(seed), case, kind)
    assert ids.dtype == np.int32
    assert ids.shape == (case.num_ranks, case.num_tokens, case.top_k)
    ordered = np.sort(ids, axis=-1)
    has_repeat = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    legal = (ids >= 0) & (ids < case.num_experts)
    if kind in ("uniform", "zipf", "one_expert", "repeated"):
        assert legal.all()
    if kind in ("uniform", "zipf"):
        assert not has_repeat.any()
    if kind == "one_expert":
        assert (ids == ids[0, 0, 0]).all()
    if kind == "empty_ranks":
        ranks = set((ids[legal] // case.num_local_experts).tolist())
        assert len(ranks) < case.num_ranks
        assert (len(ranks) > 0) == (case.num_ranks > 1)
    if kind == "nowhere":
        assert (ids == -1).all(axis=-1).any()
        assert (legal | (ids == -1)).all()
    if kind == "silent_ranks":
        silent = (ids == -1).all(axis=(1, 2))
        assert silent.any()
        assert silent.all() == (case.num_ranks == 1)
    if kind == "invalid":
        assert (~legal & (ids != -1)).any()
    if kind == "repeated" and case.top_k > 1:
        assert has_repeat.all()


def test_zipf_is_skewed() -> None:
    case = routings.STATIC_SIZES[-1]
    load = {
        kind: np.bincount(
            routings.topk_ids(np.random.default_rng(0), case, kind).reshape(-1),
            minlength=case.num_experts,
        )
        for kind in ("uniform", "zipf")
    }
    assert load["zipf"].max() > 2 * load["uniform"].max()


@oracle_examples
@given(routed_cases())
def test_capacities_are_what_they_say(routed: RoutedCase) -> None:
    case, ids = routed.case, routed.topk_idx
    found = routings.capacities(ids, case)
    assert set(found) <= set(routings.CAPACITY_KINDS)
    assert all(capacity % case.expert_alignment == 0 < capacity for capacity in found.values())
    layouts = {
        name: case.with_capacity(capacity).reference_layout(ids) for name, capacity in found.items()
    }
    exact = layouts["exact"]
    assert exact.num_dropped.sum() == 0
    assert found["default"] == case.default_capacity
    assert found["minimum"] == case.expert_alignment <= found["far_under"] <= found["exact"]
    if found["exact"] > case.expert_alignment:
        assert exact.group_sizes.sum(axis=1).max() == found["exact"]
        assert layouts["one_unit_under"].num_dropped.sum() > 0
    else:
        assert "one_unit_under" not in found
    for name, partial in (("inside_group", True), ("between_groups", False)):
        if name in found:
            # The group at the cut: some of its rows kept, or none of them and all of those before.
            kept_rows = np.minimum(layouts[name].group_sizes, exact.expert_counts)
            cut = (kept_rows < exact.expert_counts) & (exact.expert_counts > 0)
            if partial:
                assert (cut & (kept_rows > 0)).any()
            else:
                at_start = np.cumsum(exact.group_sizes, axis=1) - exact.group_sizes == found[name]
                assert (cut & (kept_rows == 0) & at_start).any()


@oracle_examples
@given(routed_cases())
def test_expert_capacities_are_what_they_say(routed: RoutedCase) -> None:
    case, ids = routed.case, routed.topk_idx
    found = routings.expert_capacities(ids, case)
    assert tuple(found) == routings.EXPERT_CAPACITY_KINDS
    assert all(rows % case.expert_alignment == 0 < rows for rows in found.values())
    layouts = {n: case.with_expert_capacity(m).reference_layout(ids) for n, m in found.items()}
    assert layouts["each_exact"].num_dropped.sum() == 0
    assert found["each_minimum"] == case.expert_alignment <= found["each_mean"]
    if found["each_exact"] > case.expert_alignment:
        tighter = case.with_expert_capacity(found["each_exact"] - case.expert_alignment)
        assert tighter.reference_layout(ids).num_dropped.sum() > 0
    if found["each_mean"] < found["each_exact"]:
        assert layouts["each_mean"].num_dropped.sum() > 0


def test_bad_routing_kind() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'unifrom'"):
        routings.topk_ids(np.random.default_rng(0), routings.STATIC_SIZES[0], "unifrom")


def test_assert_same_bits_can_fail() -> None:
    zeros = np.zeros((2, 2), BF16)
    other = zeros.copy()
    other[1, 0] = -0.0
    with pytest.raises(AssertionError, match=r"1 of 4 differ. At \(1, 0\)"):
        assert_same_bits(other, zeros)
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(zeros.astype(np.float16), zeros)
    with pytest.raises(AssertionError, match="shape"):
        assert_same_bits(zeros[:1], zeros)
    nans = np.array([0x7FC0, 0xFFC1], np.uint16).view(BF16)
    assert_same_bits(nans, nans[::-1])
