"""make_layout(expert_capacity=M): every expert has the same room, M rows.

Routings at large, all verbs and their gradients: the other files, whose cases have such rooms too.
Here are rows by hand, every routing of a small case, and what is said of M alone.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routings
from backends import AXIS, LAYOUT_ARRAYS, Backend, JaxBackend
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from routings import Case, assert_same_bits

import jax_ep

pytestmark = [pytest.mark.usefixtures("poison")]

# Two ranks, T = 3, K = 2, two experts a rank with room for two rows each:
#
#   rank 0: tokens choose (0, 2), (0, 3), (0, -1); rank 1: (2, 0), (7, 2), (2, 2)
#
#   rank 0  row 0  (0, t0, k0)  expert 0     rank 1  row 0  (0, t0, k1)  expert 2
#           row 1  (0, t1, k0)                       row 1  (1, t0, k0)
#           row 2  zero         expert 1             row 2  (0, t1, k1)  expert 3
#           row 3  zero                              row 3  zero
#
# Dropped: of expert 0 the rows of (0, t2, k0) and (1, t0, k1); of expert 2 those of (1, t1, k1),
# (1, t2, k0) and (1, t2, k1). Expert 3 has its room although expert 2 is full.
BY_HAND = Case(2, 3, 2, 4, hidden=8, expert_capacity=2, zero_tail=False)
IDS = np.array([[[0, 2], [0, 3], [0, -1]], [[2, 0], [7, 2], [2, 2]]], np.int32)


def test_by_hand(backend: Backend) -> None:
    layout = backend.make_layout(BY_HAND, IDS)
    expected: dict[str, Any] = {
        "send_row": [[[0, 0], [1, 2], [-1, -1]], [[1, -1], [-1, -1], [-1, -1]]],
        "recv_src": [[0, 2, -1, -1], [1, 6, 3, -1]],
        "recv_order": [[0, 1, -1, -1], [0, 2, 1, -1]],
        "recv_offsets": [[0, 1, 2, 2, 2, 2, 2], [0, 1, 2, 2, 3, 3, 3]],
        "group_sizes": [[2, 2], [2, 2]],
        "expert_counts": [[4, 0], [5, 1]],
        "expert_load": [[4, 0, 5, 1]] * 2,
        "num_recv": [2, 3],
        "num_dropped": [2, 3],
        "num_invalid": [0, 1],
    }
    for name, values in expected.items():
        assert_same_bits(getattr(layout, name), np.array(values, np.int32))
    # Rows that no token has are zero as padding is: also where the tail is not specified.
    x = np.arange(1, 7, dtype=np.float32).reshape(2, 3, 1) * np.ones(8, np.float32)
    tokens = backend.dispatch(x, layout).tokens
    assert_same_bits(tokens[:, :, 0], np.array([[1, 2, 0, 0], [1, 4, 2, 0]], np.float32))
    assert backend.combine(tokens, layout)[:, :, 0].tolist() == [[2, 4, 0], [4, 0, 0]]


@pytest.mark.parametrize(("expert_capacity", "alignment"), [(2, 1), (2, 2), (4, 2), (6, 1)])
def test_every_routing(device_backend: JaxBackend, expert_capacity: int, alignment: int) -> None:
    """Two ranks with two tokens: every choice of four experts, -1 and one that is invalid."""
    case = Case(2, 2, 1, 4, 8, expert_alignment=alignment, expert_capacity=expert_capacity)
    choices = [-1, 0, 1, 2, 3, 4]
    ids = np.array(list(itertools.product(choices, repeat=4)), np.int32).reshape(-1, 2, 2, 1)

    def layouts(ids: jax.Array) -> Any:
        def one(carry: None, ids: jax.Array) -> Any:
            layout = jax_ep.make_layout(
                ids,
                num_experts=4,
                axis_name=AXIS,
                expert_alignment=alignment,
                expert_capacity=expert_capacity,
            )
            return carry, {name: getattr(layout, name) for name in LAYOUT_ARRAYS}

        return jax.lax.scan(one, None, ids)[1]

    found = device_backend.run(2, layouts, ids.swapaxes(0, 1))
    for number, some in enumerate(ids):
        expected = case.reference_layout(some)
        for name in LAYOUT_ARRAYS:
            assert_same_bits(found[name][:, number], getattr(expected, name))


def test_many_rows_of_padding(device_backend: JaxBackend) -> None:
    """Rooms that nearly no token has, and none for most: poison must not stay between them."""
    case = Case(2, 40, 2, 6, hidden=8, expert_capacity=3000)
    ids = routings.topk_ids(np.random.default_rng(2), case, "nowhere")
    ids[ids == 4] = 5
    layout, expected = device_backend.make_layout(case, ids), case.reference_layout(ids)
    for name in LAYOUT_ARRAYS:
        assert_same_bits(getattr(layout, name), getattr(expected, name))
    assert not expected.num_dropped.any()


def test_tokens_reshape(device_backend: JaxBackend) -> None:
    """Expert by expert: row i of expert e is [e, i], and no expert takes another's room."""
    case = Case(2, 64, 2, 8, hidden=8, expert_capacity=16)
    ids = routings.topk_ids(np.random.default_rng(3), case, "zipf")
    layout = device_backend.make_layout(case, ids)
    assert layout.num_dropped.any()
    x = np.arange(128, dtype=np.float32).reshape(2, 64, 1) * np.ones(8, np.float32)
    tokens = device_backend.dispatch(x + 1, layout).tokens.reshape(8, 16, 8)
    for expert in range(8):
        wanted = np.flatnonzero((ids.reshape(128, 2) == expert).any(axis=1))[:16]
        room = np.zeros((16, 8), np.float32)
        room[: wanted.size] = wanted[:, None] + 1
        assert_same_bits(tokens[expert], room)


def test_static_fields(device_backend: JaxBackend) -> None:
    layout = device_backend.make_layout(BY_HAND, IDS).handle
    assert isinstance(layout, jax_ep.Layout)
    assert (layout.capacity, layout.expert_capacity) == (4, 2)
    assert device_backend.make_layout(BY_HAND.with_capacity(4), IDS).handle.expert_capacity is None


def test_messages_tell_of_the_room() -> None:
    """What tells two layouts of the same capacity apart."""

    def f(ids: jax.Array) -> jax.Array:
        layout = jax_ep.make_layout(ids, num_experts=4, axis_name=AXIS, expert_capacity=3)
        return jax_ep.combine(jnp.zeros((4, 8)), layout)

    mesh = AbstractMesh((2,), (AXIS,), axis_types=(AxisType.Auto,))
    run = jax.shard_map(f, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
    message = r"the layout \(4 experts with 3 rows each, 2 ranks along .* has capacity 6"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, IDS.reshape(6, 2))


# jax_ep.expert_capacity ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "factor", "alignment", "expected"),
    [
        # (T, K, R, E): ceil(factor * R * T * K / E), up to a multiple of A.
        ((128, 8, 8, 64), 1.0, 1, 128),
        ((128, 8, 8, 64), 1.25, 1, 160),
        ((128, 8, 8, 64), 1.25, 128, 256),
        ((100, 3, 4, 8), 1.0, 1, 150),
        ((100, 3, 4, 12), 1.01, 1, 101),
        ((1, 1, 2, 64), 1.0, 8, 8),  # 2 / 64 of a row
        # Never more than R * T, up to a multiple of A.
        ((128, 8, 8, 64), 100.0, 1, 1024),
        ((3, 2, 2, 4), 100.0, 4, 8),
        ((3, 2, 2, 4), None, 4, 8),
        ((128, 8, 8, 64), None, 1, 1024),
    ],
)
def test_expert_capacity_by_hand(
    sizes: tuple[int, int, int, int], factor: float | None, alignment: int, expected: int
) -> None:
    num_tokens, top_k, num_ranks, num_experts = sizes
    found = jax_ep.expert_capacity(
        num_tokens, top_k, num_ranks, factor, num_experts=num_experts, expert_alignment=alignment
    )
    assert type(found) is int
    assert found == expected


def test_room_that_cannot_overflow(backend: Backend) -> None:
    """All tokens choose one expert: factor=None holds them all, and one row less does not."""
    case, ids = Case(2, 6, 1, 4, hidden=8), np.full((2, 6, 1), 2, np.int32)
    room = jax_ep.expert_capacity(6, 1, 2, None, num_experts=4)
    assert backend.make_layout(case.with_expert_capacity(room), ids).num_dropped.tolist() == [0, 0]
    less = backend.make_layout(case.with_expert_capacity(room - 1), ids)
    assert less.num_dropped.tolist() == [0, 1]


def test_expert_capacity_errors() -> None:
    """Those of ``jax_ep.capacity``, under its own name."""
    sizes = {"num_tokens": 4, "top_k": 2, "num_ranks": 2, "num_experts": 8}
    for change, message in (
        ({"top_k": 9}, "top_k must be at most num_experts = 8; got 9"),
        ({"factor": 0.0}, "factor must be positive and finite; got 0.0"),
        ({"expert_alignment": 0}, "expert_alignment must be at least 1; got 0"),
        ({"num_experts": 9}, "num_experts must be a multiple of num_ranks = 2; got 9. Pad the"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            jax_ep.expert_capacity(**(sizes | change))  # type: ignore[arg-type]
        assert str(caught.value).startswith(f"jax_ep.expert_capacity: {message}")
