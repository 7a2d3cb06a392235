"""Sizes at the limits of int32: what make_layout takes fits in it, and the rest is named.

Such layouts are too large to make here. So the arithmetic of the kernels is repeated in Python,
where every number that they keep in 32 bits is checked, and compared with Python's own.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import JaxBackend
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from routings import Case, assert_same_bits

import jax_ep
from jax_ep import limits, reference

MAX_ROWS = 2**31 - 2**20
MOST_RANKS = 72


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What decides over numbers of rows: R, T, K, E, A and, if it is not the default, C or M."""

    num_ranks: int
    num_tokens: int
    top_k: int
    num_experts: int
    expert_alignment: int = 1
    capacity: int | None = None
    expert_capacity: int | None = None

    def __str__(self) -> str:
        capacity = "" if self.capacity is None else f"-C{self.capacity}"
        if self.expert_capacity is not None:
            capacity = f"-M{self.expert_capacity}"
        return (
            f"R{self.num_ranks}-T{self.num_tokens}-K{self.top_k}-E{self.num_experts}"
            f"-A{self.expert_alignment}{capacity}"
        )

    @property
    def num_ids(self) -> int:
        return self.num_ranks * self.num_tokens * self.top_k

    @property
    def given_capacity(self) -> int:
        """C, if it is not the default; else 0."""
        if self.expert_capacity is not None:
            return self.num_experts // self.num_ranks * self.expert_capacity
        return self.capacity or 0

    @property
    def fits(self) -> bool:
        """The rule."""
        num_rows = self.num_ids + self.num_experts * self.expert_alignment
        return num_rows <= MAX_ROWS and self.given_capacity <= MAX_ROWS


def refusal(sizes: Sizes) -> str | None:
    """What make_layout says, traced for shapes alone; None if it takes the sizes."""
    make = functools.partial(
        jax_ep.make_layout,
        num_experts=sizes.num_experts,
        axis_name="ep",
        capacity=sizes.capacity,
        expert_alignment=sizes.expert_alignment,
        expert_capacity=sizes.expert_capacity,
    )
    f = jax.shard_map(
        lambda ids: make(ids).send_row,
        mesh=AbstractMesh((sizes.num_ranks,), ("ep",), axis_types=(AxisType.Auto,)),
        in_specs=P("ep"),
        out_specs=P("ep"),
    )
    ids = jax.ShapeDtypeStruct((sizes.num_ranks * sizes.num_tokens, sizes.top_k), jnp.int32)
    try:
        jax.eval_shape(f, ids)
    except ValueError as error:
        return str(error)
    return None


# Arithmetic in 32 bits ----------------------------------------------------------------------------


def i32(value: int) -> int:
    """A number that C++ keeps in an int32_t."""
    if not -(2**31) <= value < 2**31:
        raise OverflowError(value)
    return value


def emulate_ids(sizes: Sizes, num_sms: int) -> None:
    """How cuda/direct/layout.cu shares the ids out: all of them, to one warp each.

    Mirrors Plan (num_blocks, ids_per_block, ids_per_warp), the constructor of TableBuilder
    (block_begin to end), and the loops of count_ids and place_rows, which add 128 and 32.
    """
    num_ids = sizes.num_tokens * sizes.top_k * sizes.num_ranks  # int64_t
    with_one = (num_ids + 511) // 512
    most = min(num_sms, 128)
    num_blocks = 1 if with_one <= 4 else min(most, max(min(with_one, 64), with_one // 2))
    ids_per_block = i32((num_ids + num_blocks - 1) // num_blocks)

    i32(sizes.num_tokens * sizes.top_k)
    i32(num_ids)
    expected_begin = 0
    for block in range(num_blocks):
        block_begin = i32(block * ids_per_block)
        block_end = min(num_ids, i32(block_begin + ids_per_block))
        ids_per_warp = i32(i32(ids_per_block // 16 + 31) // 32 * 32)
        for warp in range(16):
            begin = min(block_end, i32(block_begin + i32(warp * ids_per_warp)))
            end = block_end if warp == 15 else min(block_end, i32(begin + ids_per_warp))
            assert begin in (expected_begin, end)
            expected_begin = max(expected_begin, end)
            for lane in (0, 31):  # first = begin + lane; first < end; first += 128
                first = i32(begin + lane)
                i32(first + max(0, -(-(end - first) // 128)) * 128)
            if end > begin:  # step = begin; step < end; step += 32; and flat = step + lane
                i32(begin + -(-(end - begin) // 32) * 32 + 31)
    assert expected_begin == num_ids
    i32(sizes.num_ranks * sizes.num_tokens + 1)  # recv_offsets' length, and what flat / K reaches


def emulate_rows(sizes: Sizes, capacity: int, load: list[int]) -> None:
    """Where cuda/direct/layout.cu puts the rows of experts with ``load`` rows each.

    Mirrors place_experts (offset by a scan over a rank's experts; first_row and left; the sums),
    the row in place_rows and the last step of fill_padding.
    xla_ffi/cpu/ops/layout_op.cc reckons in 64 bits and stores the same numbers in int32.
    """
    alignment, room = sizes.expert_alignment, sizes.expert_capacity
    num_local = sizes.num_experts // sizes.num_ranks
    if room is None:
        occupied = [i32(i32(n + alignment - 1) // alignment * alignment) for n in load]
    else:
        occupied = [i32(room)] * len(load)
    offset = []
    for first in range(0, len(load), num_local):
        of_rank = occupied[first : first + num_local]
        offset += itertools.accumulate(of_rank[:-1], lambda a, b: i32(a + b), initial=0)
        i32(offset[-1] + of_rank[-1])  # what the scan ends with
    most_parts = 128 * 16  # warps of as many blocks as there can be, for one expert

    for rank in range(sizes.num_ranks):
        used = received = routed = exact = 0
        for e in range(rank * num_local, (rank + 1) * num_local):
            assert offset[e] == exact
            exact += -(-load[e] // alignment) * alignment if room is None else room
            most = i32(max(0, capacity - offset[e]) if room is None else room)
            for before in (0, load[e] // 2, load[e]):  # the block's first id of the expert
                first_row = i32(offset[e] + min(before, most))
                left = i32(most - min(before, most))
                kept_here = min(i32(load[e] - before), left)  # of the block's ids and all behind
                assert min(before, most) + kept_here == min(load[e], most)
                assert left == 0 or i32(first_row + left) <= capacity
            kept = max(0, min(offset[e] + load[e], offset[e] + most) - offset[e])
            size = i32(min(occupied[e], most))
            i32(offset[e] + size)
            i32(
                size + 2 * most_parts * 32
            )  # where filling its padding ends, begun by the last warp
            used, received, routed = i32(used + size), i32(received + kept), i32(routed + load[e])
        assert used == min(exact, capacity)
        assert i32(routed - received) >= 0


def loads(sizes: Sizes) -> Iterator[list[int]]:
    """Rows of every expert of the group: piled up, even, and with the most padding there can be."""
    num_experts, num_ids = sizes.num_experts, sizes.num_ids
    first, last, half = ([0] * num_experts for _ in range(3))
    first[0] = last[-1] = num_ids
    for e in range(num_experts // 2):  # rows for the lower experts only
        half[e] = num_ids // (num_experts // 2) + (e == 0) * (num_ids % (num_experts // 2))
    even = [num_ids // num_experts + (e < num_ids % num_experts) for e in range(num_experts)]
    one_each = [int(e < num_ids) for e in range(num_experts)]
    piled_first, piled_last = list(one_each), list(one_each)
    piled_first[0] += num_ids - sum(one_each)
    piled_last[-1] += num_ids - sum(one_each)
    yield from (first, last, even, piled_first, piled_last)
    if num_experts > 1:
        yield half


def emulate(sizes: Sizes) -> None:
    capacity = sizes.given_capacity or jax_ep.capacity(
        sizes.num_tokens,
        sizes.top_k,
        sizes.num_ranks,
        None,
        num_experts=sizes.num_experts,
        expert_alignment=sizes.expert_alignment,
    )
    i32(capacity)
    for num_sms in (1, 7, 78, 132, 160):
        emulate_ids(sizes, num_sms)
    for load in loads(sizes):
        assert sum(load) == sizes.num_ids
        emulate_rows(sizes, capacity, load)


def largest(low: int, high: int, fits: object) -> int:
    """The largest of low, .., high - 1 for which ``fits`` holds, as it does up to some number."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)  # type: ignore[operator]
    return low


def around_the_limits() -> Iterator[Sizes]:
    """One size up to its limit and beyond, for small, usual and large values of the others."""
    top = 2**32
    for ranks, per_rank in itertools.product((1, 2, 8, MOST_RANKS), (1, 4, 14)):
        for top_k, alignment in itertools.product((1, 8, 32), (1, 16, 128, 4096)):
            experts = ranks * per_rank
            if top_k > experts:
                continue
            base = Sizes(ranks, 1, top_k, experts, alignment)
            most = largest(1, top, lambda n, b=base: dataclasses.replace(b, num_tokens=n).fits)
            for n in (most, most + 1):
                yield dataclasses.replace(base, num_tokens=n)
    for ranks, tokens, per_rank in itertools.product((1, 8), (1, 4096), (1, 128, 1024)):
        base = Sizes(ranks, tokens, 1, ranks * per_rank)
        fits = lambda n, b=base: dataclasses.replace(b, expert_alignment=n).fits  # noqa: E731
        most = largest(1, top, fits)
        for n in (most, most + 1):
            capacity = n if n <= MAX_ROWS else None
            yield dataclasses.replace(base, expert_alignment=n, capacity=capacity)
    for alignment in (1, 16, 128):
        base = Sizes(8, 4096, 8, 256, alignment)
        most = MAX_ROWS // alignment * alignment
        for n in (most, most + alignment, 2**31, 2**40 // alignment * alignment):
            yield dataclasses.replace(base, capacity=n)
    for ranks, per_rank in itertools.product((1, 8, MOST_RANKS), (1, 14, 1024)):
        for alignment in (1, 128):
            base = Sizes(ranks, 4096, 1, ranks * per_rank, alignment)
            most = MAX_ROWS // per_rank // alignment * alignment
            for n in (alignment, most, most + alignment):
                yield dataclasses.replace(base, expert_capacity=n)
    # As many ids as there can be, of which an expert keeps few or none loses its place.
    for n in (1, MAX_ROWS // 8, MAX_ROWS // 8 + 1):
        yield Sizes(8, 2**25 - 2**15, 4, 64, expert_capacity=n)
    # k, then experts, without padding: as far as what else must hold goes.
    yield from (Sizes(1, 1, 2**29, 2**30), Sizes(1, 1, 2**30, 2**30), Sizes(1, 1, 2**30, 2**31))
    yield Sizes(1, 1, 1, 2**31)


SIZES = list(around_the_limits())
EXPERTS_IN_A_LIST = 2**16  # more are not summed up here; their rule is the same


def test_sizes_stand_on_both_sides_of_the_limits() -> None:
    fitting = sum(sizes.fits for sizes in SIZES)
    assert min(fitting, len(SIZES) - fitting) > 100


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_is_accepted_fits_and_the_rest_is_named(sizes: Sizes) -> None:
    message = refusal(sizes)
    if message is None:
        assert sizes.fits
        if sizes.num_experts <= EXPERTS_IN_A_LIST:
            emulate(sizes)
        return
    assert not sizes.fits  # nothing else is refused
    with pytest.raises(ValueError, match=rf"must be at most {MAX_ROWS}, got "):
        reference.make_layout(  # of ids that are one number in memory
            np.broadcast_to(np.int32(0), (sizes.num_ranks, sizes.num_tokens, sizes.top_k)),
            num_experts=sizes.num_experts,
            capacity=sizes.capacity,
            expert_alignment=sizes.expert_alignment,
            expert_capacity=sizes.expert_capacity,
        )
    assert message.startswith("jax_ep.make_layout: rows are counted in int32: ")
    assert f"must be at most {MAX_ROWS}; got " in message
    if sizes.num_ids + sizes.num_experts * sizes.expert_alignment > MAX_ROWS:
        assert re.search(
            r"ranks \* tokens \* k \+ num_experts \* expert_alignment .*; got "
            rf"{sizes.num_ranks} \* {sizes.num_tokens} \* {sizes.top_k} \+ "
            rf"{sizes.num_experts} \* {sizes.expert_alignment} = \d+\. Split the tokens",
            message,
        )
    elif sizes.expert_capacity is None:
        assert f"capacity must be at most {MAX_ROWS}; got {sizes.capacity}." in message
    else:
        product = f"{sizes.num_experts // sizes.num_ranks} * {sizes.expert_capacity}"
        assert f"got {product} = {sizes.given_capacity}." in message


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(1, 4096, 8, 1024, 2**22, 2**22),  # offsets
        Sizes(1, 2**28 - 1, 8, 8),  # ids of the last block's warps
        Sizes(8, 2**28, 1, 8),  # ids
        Sizes(1, 1, 1, 8, 1, None, 2**28),  # offsets of experts with room of their own
    ],
    ids=str,
)
def test_emulation_overflows_beyond(sizes: Sizes) -> None:
    """The control: that int32 is too small for some of what is refused is seen."""
    with pytest.raises(OverflowError):
        emulate(sizes)
    assert refusal(sizes) is not None


def test_one_rule() -> None:
    """C++, Python and the specification have the same number."""
    assert limits.MAX_ROWS == reference.MAX_ROWS == MAX_ROWS


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_largest_alignment(device_backend: JaxBackend, num_ranks: int) -> None:
    """As much padding as there can be, with most experts beyond the capacity."""
    num_experts, num_tokens, top_k = 1024, 64, 8
    alignment = (MAX_ROWS - num_ranks * num_tokens * top_k) // num_experts
    case = Case(
        num_ranks,
        num_tokens,
        top_k,
        num_experts,
        hidden=8,
        capacity=2 * alignment,
        expert_alignment=alignment,
    )
    rng = np.random.default_rng(60)
    ids = rng.integers(0, num_experts, (num_ranks, num_tokens, top_k), dtype=np.int32)
    expected = case.reference_layout(ids)
    assert (expected.num_recv > 0).any()
    assert (expected.num_dropped > 400).all()
    layout = device_backend.make_layout(case, ids)
    for name in ("send_row", "recv_src", "group_sizes", "num_recv", "num_dropped"):
        assert_same_bits(layout.arrays[name], getattr(expected, name))
