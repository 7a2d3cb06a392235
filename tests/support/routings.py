"""Routings that the whole suite shares: static sizes, expert ids, capacities, and data to send.

`STATIC_SIZES` are few, because every static size is one compilation in the compiled backends.
`topk_ids` makes the ids of a named kind, `capacities` finds the capacities that are interesting for
given ids, and `routed_cases` is the hypothesis strategy over all of it. `expert_rows` applies
experts to rows as a user would.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, settings
from numpy.typing import DTypeLike, NDArray

from jax_ep import reference

INT32 = np.iinfo(np.int32)

_EXAMPLES = float(os.environ.get("JAX_EP_TEST_EXAMPLES", "1"))


def examples(number: int) -> settings:
    """Hypothesis' settings for so many examples, or the part JAX_EP_TEST_EXAMPLES of them.

    Most examples have a capacity of their own, so a compilation of their own. Where devices are
    few, examples with more ranks are rejected, and that may be most of them.
    """
    return settings(
        max_examples=max(3, round(number * _EXAMPLES)),
        deadline=None,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )


oracle_examples = settings(max_examples=60, deadline=None)
"""Hypothesis' settings for tests of the oracle alone, which compile nothing."""

Draw = Callable[[st.SearchStrategy[Any]], Any]
"""The `draw` argument of a composite strategy."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The static sizes of one layout.

    Attributes:
        num_ranks: R.
        num_tokens: T, tokens per rank.
        top_k: K.
        num_experts: E, a multiple of R.
        hidden: H, a multiple of 8: a row is whole 16 bytes in every dtype of two bytes or more.
        capacity: C, a multiple of expert_alignment; None for the default.
        expert_alignment: A.
        zero_tail: as in `make_layout`.
        expert_capacity: M, in place of a capacity.
        num_sms: that calls may use on CUDA, which no result depends on; None: theirs.
    """

    num_ranks: int
    num_tokens: int
    top_k: int
    num_experts: int
    hidden: int
    capacity: int | None = None
    expert_alignment: int = 1
    zero_tail: bool = True
    expert_capacity: int | None = None
    num_sms: int | None = None

    def __str__(self) -> str:
        """A short name, for test ids."""
        capacity = "" if self.capacity is None else f"-C{self.capacity}"
        if self.expert_capacity is not None:
            capacity = f"-M{self.expert_capacity}"
        return (
            f"R{self.num_ranks}-T{self.num_tokens}-K{self.top_k}-E{self.num_experts}"
            f"-H{self.hidden}-A{self.expert_alignment}{capacity}"
        )

    @property
    def num_local_experts(self) -> int:
        """L = E / R."""
        return self.num_experts // self.num_ranks

    @property
    def default_capacity(self) -> int:
        """The capacity that stands for None."""
        return reference.default_capacity(
            self.num_tokens, self.top_k, self.num_ranks, self.num_experts, self.expert_alignment
        )

    @property
    def num_rows(self) -> int:
        """C, whatever says it."""
        if self.expert_capacity is not None:
            return self.num_local_experts * self.expert_capacity
        return self.default_capacity if self.capacity is None else self.capacity

    def with_capacity(self, capacity: int | None) -> "Case":
        """The same sizes with another capacity."""
        return dataclasses.replace(self, capacity=capacity, expert_capacity=None)

    def with_expert_capacity(self, expert_capacity: int) -> "Case":
        """The same sizes with so much room for each expert."""
        return dataclasses.replace(self, capacity=None, expert_capacity=expert_capacity)

    def reference_layout(self, topk_idx: NDArray[np.int32]) -> reference.ReferenceLayout:
        """The oracle's layout of these ids, int32 [R, T, K]."""
        return reference.make_layout(
            topk_idx,
            num_experts=self.num_experts,
            capacity=self.capacity,
            expert_alignment=self.expert_alignment,
            expert_capacity=self.expert_capacity,
            zero_tail=self.zero_tail,
        )


STATIC_SIZES: tuple[Case, ...] = (
    Case(1, 1, 1, 1, hidden=8),
    Case(2, 3, 2, 4, hidden=8),
    Case(5, 2, 1, 5, hidden=16),
    Case(1, 6, 3, 4, hidden=16, expert_alignment=16),
    Case(3, 7, 3, 6, hidden=24),
    Case(4, 16, 4, 8, hidden=64, expert_alignment=128),
    Case(8, 4, 16, 16, hidden=16, expert_alignment=16),
    Case(2, 48, 8, 16, hidden=32, expert_alignment=16),
    Case(8, 12, 8, 64, hidden=128),
)
"""From small to large, so that a failing example shrinks to the left."""


# Expert ids ---------------------------------------------------------------------------------------

ROUTING_KINDS: tuple[str, ...] = (
    "uniform",
    "one_expert",
    "empty_ranks",
    "nowhere",
    "silent_ranks",
    "invalid",
    "repeated",
    "zipf",
)


def topk_ids(rng_or_draw: np.random.Generator | Draw, case: Case, kind: str) -> NDArray[np.int32]:
    """Makes expert ids of a named kind.

    * "uniform": every set of K distinct experts is as likely as any other.
    * "one_expert": every choice is the same expert.
    * "empty_ranks": at least one rank is nobody's choice (with R = 1: nothing is routed). Distinct
      experts as long as the other ranks have K of them.
    * "nowhere": choices are -1 here and there, and at least one token has no other.
    * "silent_ranks": at least one rank routes no token, and at least one does if R > 1.
    * "invalid": at least one id is below -1 or at least E, the ends of int32 among them.
    * "repeated": with K > 1 every token has some expert twice or more.
    * "zipf": distinct experts, a few of them wanted by nearly every token.

    Args:
        rng_or_draw: a generator, or hypothesis' draw, from which a seed is drawn.
        case: the sizes.
        kind: one of ROUTING_KINDS.

    Returns:
        int32 [R, T, K].
    """
    if isinstance(rng_or_draw, np.random.Generator):
        rng = rng_or_draw
    else:
        rng = np.random.default_rng(rng_or_draw(st.integers(0, 2**32 - 1)))
    num_ranks, num_tokens, num_experts = case.num_ranks, case.num_tokens, case.num_experts
    shape = (num_ranks, num_tokens, case.top_k)

    def distinct(scores: NDArray[np.float64]) -> NDArray[np.int64]:
        """The K experts of largest score, per token; scores are [R, T, E]."""
        return np.argsort(-scores, axis=-1)[..., : case.top_k]

    ids: NDArray[np.int64] = distinct(rng.random((num_ranks, num_tokens, num_experts)))
    somewhere = (int(rng.integers(num_ranks)), int(rng.integers(num_tokens)))
    match kind:
        case "uniform":
            pass
        case "one_expert":
            ids = np.full(shape, rng.integers(num_experts))
        case "empty_ranks":
            num_chosen = int(rng.integers(1, num_ranks)) if num_ranks > 1 else 0
            chosen = rng.permutation(num_ranks)[:num_chosen]
            rank_of_expert = np.arange(num_experts) // case.num_local_experts
            experts = np.flatnonzero(np.isin(rank_of_expert, chosen))
            if experts.size == 0:
                ids = np.full(shape, -1)
            elif experts.size < case.top_k:
                ids = rng.choice(experts, shape)
            else:
                ids = experts[distinct(rng.random((num_ranks, num_tokens, experts.size)))]
        case "nowhere":
            ids[rng.random(shape) < 0.3] = -1
            ids[rng.random(shape[:2]) < 0.2] = -1
            ids[somewhere] = -1
        case "silent_ranks":
            num_silent = int(rng.integers(1, max(2, num_ranks)))
            ids[rng.permutation(num_ranks)[:num_silent]] = -1
        case "invalid":
            wrong = rng.random(shape) < 0.3
            wrong[(*somewhere, int(rng.integers(case.top_k)))] = True
            pool = [-2, -num_experts, num_experts, num_experts + 1, INT32.min, INT32.max]
            pool = [expert for expert in pool if expert != -1]  # -E is -1 with one expert
            ids[wrong] = rng.choice(pool, np.count_nonzero(wrong))
        case "repeated":
            few = ids[..., : (case.top_k + 1) // 2]  # fewer than K experts if K > 1
            ids = np.take_along_axis(few, rng.integers(few.shape[-1], size=shape), axis=-1)
        case "zipf":
            popularity = rng.permutation((1.0 + np.arange(num_experts)) ** -1.5)
            gumbel = rng.gumbel(size=(num_ranks, num_tokens, num_experts))
            ids = distinct(np.log(popularity) + gumbel)
        case _:
            raise ValueError(f"kind must be one of {ROUTING_KINDS}, got {kind!r}")
    return ids.astype(np.int32)


# Capacities ---------------------------------------------------------------------------------------

CAPACITY_KINDS: tuple[str, ...] = (
    "default",
    "exact",
    "one_unit_under",
    "inside_group",
    "between_groups",
    "far_under",
    "minimum",
)


def capacities(topk_idx: NDArray[np.int32], case: Case) -> dict[str, int]:
    """Finds the capacities that are interesting for these ids.

    All are the same on every rank, multiples of A, and at least A. No capacity cuts padding only:
    the last A rows of a group hold at least one real row, and capacities are multiples of A.

    * "default": never drops while experts are distinct; usually leaves a long tail.
    * "exact": the smallest that drops nothing: the fullest rank has no tail.
    * "one_unit_under": A rows less. Drops the end of the last group of the fullest rank.
    * "inside_group": some group is cut between two of its real rows.
    * "between_groups": some rank keeps a group whole, padding included, and drops all of the next.
    * "far_under": about a quarter of exact.
    * "minimum": A.

    Args:
        topk_idx: int32 [R, T, K].
        case: the sizes; its capacity is not looked at.

    Returns:
        The capacity of each kind that exists for these ids, in the order above.
    """
    alignment, shape = case.expert_alignment, (case.num_ranks, case.num_local_experts)
    valid = topk_idx[(topk_idx >= 0) & (topk_idx < case.num_experts)]
    counts = np.bincount(valid, minlength=case.num_experts).reshape(shape)
    padded = -(-counts // alignment) * alignment
    end = np.cumsum(padded, axis=1)
    start = end - padded
    exact = max(int(end.max()), alignment)

    found = {"default": case.default_capacity, "exact": exact}
    if exact > alignment:
        found["one_unit_under"] = exact - alignment
    inside = [
        capacity
        for first, count in zip(start.flat, counts.flat, strict=True)
        for capacity in range(int(first) + alignment, int(first + count), alignment)
    ]
    if inside:
        found["inside_group"] = sorted(inside)[len(inside) // 2]
    between = start[(start > 0) & (counts > 0)]
    if between.size:
        found["between_groups"] = int(np.sort(between)[between.size // 2])
    found["far_under"] = max(exact // 4 // alignment, 1) * alignment
    found["minimum"] = alignment
    return found


EXPERT_CAPACITY_KINDS: tuple[str, ...] = ("each_exact", "each_mean", "each_minimum")


def expert_capacities(topk_idx: NDArray[np.int32], case: Case) -> dict[str, int]:
    """Finds the rooms of an expert that are interesting for these ids: multiples of A.

    * "each_exact": the smallest that drops nothing.
    * "each_mean": what the mean load takes; drops where the load is uneven.
    * "each_minimum": A.

    Args:
        topk_idx: int32 [R, T, K].
        case: the sizes; its capacities are not looked at.

    Returns:
        The room of each kind, in the order above.
    """
    valid = topk_idx[(topk_idx >= 0) & (topk_idx < case.num_experts)]
    counts = np.bincount(valid, minlength=case.num_experts)

    def aligned(rows: float) -> int:
        return max(1, -int(-rows // case.expert_alignment)) * case.expert_alignment

    return {
        "each_exact": aligned(counts.max()),
        "each_mean": aligned(counts.mean()),
        "each_minimum": case.expert_alignment,
    }


# The strategy -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class RoutedCase:
    """What `routed_cases` draws.

    Attributes:
        case: the sizes, capacity included.
        topk_idx: int32 [R, T, K].
        kind: how the ids were made: one of ROUTING_KINDS, or "drawn" one by one.
        capacity_kind: how the capacity was chosen: one of CAPACITY_KINDS, or of
            EXPERT_CAPACITY_KINDS.
        seed: for the data of the test.
    """

    case: Case
    topk_idx: NDArray[np.int32]
    kind: str
    capacity_kind: str
    seed: int

    @property
    def rng(self) -> np.random.Generator:
        """A fresh generator for the data of the test."""
        return np.random.default_rng(self.seed)

    def reference_layout(self) -> reference.ReferenceLayout:
        """The oracle's layout."""
        return self.case.reference_layout(self.topk_idx)


@st.composite
def routed_cases(
    draw: st.DrawFn,
    sizes: Sequence[Case] = STATIC_SIZES,
    kinds: Sequence[str] = ROUTING_KINDS,
    capacity_kinds: Sequence[str] = CAPACITY_KINDS + EXPERT_CAPACITY_KINDS,
) -> RoutedCase:
    """Draws sizes, ids and a capacity.

    Ids of small cases are sometimes drawn one by one, because those shrink.

    Args:
        draw: given by hypothesis.
        sizes: which sizes to draw from.
        kinds: which kinds of ids; "drawn" is added for small cases where all kinds are asked for.
        capacity_kinds: which kinds of capacity; "default" is taken where none of them exists.

    Returns:
        A strategy of `RoutedCase`.
    """
    case = draw(st.sampled_from(sizes))
    shape = (case.num_ranks, case.num_tokens, case.top_k)
    small = np.prod(shape) <= 32 and set(kinds) == set(ROUTING_KINDS)
    kind = draw(st.sampled_from(("drawn", *kinds) if small else tuple(kinds)))
    if kind == "drawn":
        size = int(np.prod(shape))
        ids = draw(st.lists(st.integers(-2, case.num_experts), min_size=size, max_size=size))
        topk_idx = np.array(ids, np.int32).reshape(shape)
    else:
        topk_idx = topk_ids(draw, case, kind)
    shared, own = capacities(topk_idx, case), expert_capacities(topk_idx, case)
    possible = [name for name in capacity_kinds if name in shared or name in own] or ["default"]
    capacity_kind = draw(st.sampled_from(possible))
    if capacity_kind in own:
        case = case.with_expert_capacity(own[capacity_kind])
    else:
        case = case.with_capacity(shared[capacity_kind])
    case = dataclasses.replace(case, zero_tail=draw(st.booleans()))
    return RoutedCase(case, topk_idx, kind, capacity_kind, draw(st.integers(0, 2**32 - 1)))


# Data ---------------------------------------------------------------------------------------------


def random_rows(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: DTypeLike, *, specials: bool = False
) -> NDArray[Any]:
    """Makes rows to send.

    Args:
        rng: the generator.
        shape: of the result.
        dtype: an integer dtype gives any bits; a float dtype gives both signs and magnitudes from
            about 2**-8 to 2**8.
        specials: one in eight floats is a zero of either sign, a subnormal, or the largest finite.

    Returns:
        Array of that shape and dtype.
    """
    dtype = np.dtype(dtype)
    if dtype.kind in "iu":
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(rng.bytes(size), dtype).reshape(shape).copy()
    rows = (rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 7, shape)).astype(dtype)
    if specials:
        info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
        values = [0.0, info.smallest_subnormal, 3 * info.smallest_subnormal, info.tiny, info.max]
        pool = np.array([*values, *(-np.array(values, dtype))], dtype)
        chosen = rng.random(shape) < 1 / 8
        rows[chosen] = rng.choice(pool, np.count_nonzero(chosen))
    return rows


def random_weights(rng: np.random.Generator, case: Case) -> NDArray[np.float32]:
    """Makes routing weights, float32 [R, T, K] in (0, 1], each token's sum about 1."""
    logits = rng.standard_normal((case.num_ranks, case.num_tokens, case.top_k))
    weights = np.exp(logits)
    normalized: NDArray[np.float32] = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
    return normalized


def expert_rows(
    layout: reference.ReferenceLayout,
    tokens: NDArray[Any],
    expert_fn: Callable[[int, NDArray[np.float64]], NDArray[Any]],
    num_outputs: int,
    dtype: DTypeLike,
) -> NDArray[Any]:
    """Applies the experts group by group, as a user would. Padding and tail become NaN."""
    y = np.full((*tokens.shape[:2], num_outputs), np.nan, dtype)
    num_local_experts = layout.num_experts // layout.num_ranks
    for rank in range(layout.num_ranks):
        start = 0
        for local, size in enumerate(layout.group_sizes[rank].tolist()):
            rows = tokens[rank, start : start + size].astype(np.float64)
            expert = rank * num_local_experts + local
            y[rank, start : start + size] = expert_fn(expert, rows).astype(dtype)
            start += size
    y[~layout.row_valid] = np.nan
    return y


def assert_same_bits(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    """Checks shape, dtype and every bit, zeros' signs included; any NaN equals any NaN.

    Args:
        actual: what came.
        expected: what was required.

    Raises:
        AssertionError: naming the first few places that differ.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if actual.size == 0:
        return
    itemsize = actual.dtype.itemsize
    as_bytes = [
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(*array.shape, itemsize)
        for array in (actual, expected)
    ]
    different = (as_bytes[0] != as_bytes[1]).any(axis=-1)
    different &= ~((actual != actual) & (expected != expected))
    places = np.argwhere(different)
    shown = "; ".join(
        f"{tuple(place.tolist())}: {actual[tuple(place)]!r}, expected {expected[tuple(place)]!r}"
        for place in places[:8]
    )
    assert len(places) == 0, f"{len(places)} of {actual.size} differ. At {shown}"
