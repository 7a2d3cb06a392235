"""What the benchmark counts: ids, rows and bytes that must move, and the least time that takes."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from bench_point import POINT, RANKS, FakeProbe

from jax_ep.bench import link, traffic
from jax_ep.bench.traffic import Movement, Point

EXPERTS, ALIGNMENT = 8, 4


# What is counted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [{}, {"capacity": 4}, {"expert_capacity": 2}])
def test_traffic_counts_what_a_slow_loop_counts(room: dict[str, int]) -> None:
    ids = traffic.expert_ids(POINT, RANKS, EXPERTS, seed=1, zipf_exponent=1.5)
    moved = traffic.measure_traffic(ids, EXPERTS, room, 1)
    arrived: dict[int, set[tuple[int, int]]] = {r: set() for r in range(RANKS)}
    rows = dict.fromkeys(range(RANKS), 0)
    dropped = 0
    for expert in range(EXPERTS):  # placement is by expert, source, token, k
        of_expert = 0
        for source in range(RANKS):
            for token in range(POINT.tokens):
                for k in range(POINT.top_k):
                    if ids[source, token, k] != expert:
                        continue
                    rank = expert // (EXPERTS // RANKS)
                    is_full = rows[rank] == room.get("capacity")
                    if is_full or of_expert == room.get("expert_capacity"):
                        dropped += 1
                        continue
                    rows[rank] += 1
                    of_expert += 1
                    arrived[rank].add((source, token))
    received = {r: sum(s != r for s, _ in arrived[r]) for r in arrived}
    sent = {r: sum(s == r for q in arrived if q != r for s, _ in arrived[q]) for r in arrived}
    assert moved.kept_rows == max(rows.values())
    assert moved.distinct_rows == max(len(pairs) for pairs in arrived.values())
    assert moved.wire_rows == max(*received.values(), *sent.values())
    assert moved.dropped_rows == dropped
    assert (dropped > 0) == bool(room)
    senders = set().union(*arrived.values())
    assert moved.source_tokens == max(sum(s == r for s, _ in senders) for r in range(RANKS))


def test_ids_are_distinct_and_zipf_is_skewed() -> None:
    point = dataclasses.replace(POINT, tokens=256)
    loads = {}
    for routing in traffic.ROUTINGS:
        ids = traffic.expert_ids(
            dataclasses.replace(point, routing=routing), RANKS, EXPERTS, 0, zipf_exponent=2.0
        )
        assert ids.shape == (RANKS, 256, 3)
        assert ids.dtype == np.int32
        assert np.all(np.diff(np.sort(ids, axis=2), axis=2) > 0)
        loads[routing] = np.bincount(ids.ravel(), minlength=EXPERTS)
    # Uniform: 3072 draws over 8 experts, binomial with deviation below 20, so 384 +- 100 is safe.
    assert np.all(abs(loads["uniform"] - 384) < 100)
    assert loads["zipf"].max() > 900  # of at most 1024
    assert loads["zipf"].min() < 100


def test_group_limited_ids_lie_in_four_of_eight_groups() -> None:
    point = dataclasses.replace(POINT, tokens=64, top_k=6, routing="group-limited")
    ids = traffic.expert_ids(point, RANKS, 32, 0, zipf_exponent=1.0)
    groups = [len(set(token // 4)) for token in ids.reshape(-1, 6)]
    assert max(groups) == 4
    uniform = dataclasses.replace(point, routing="uniform")
    ids = traffic.expert_ids(uniform, RANKS, 32, 0, zipf_exponent=1.0)
    assert max(len(set(token // 4)) for token in ids.reshape(-1, 6)) > 4


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_node_traffic_counts_what_a_slow_loop_counts(ranks_per_node: int) -> None:
    ids = traffic.expert_ids(POINT, RANKS, EXPERTS, seed=1, zipf_exponent=1.5)
    sent, received, nodes = [0] * RANKS, [0] * RANKS, 0
    for source, token in np.ndindex(ids.shape[:2]):
        of_token = {expert // (EXPERTS // RANKS) // ranks_per_node for expert in ids[source, token]}
        nodes += len(of_token)
        for node in of_token - {source // ranks_per_node}:
            sent[source] += 1
            received[node * ranks_per_node + source % ranks_per_node] += 1
    counted = traffic.measure_node_traffic(ids, EXPERTS, ranks_per_node)
    assert counted.nodes_per_token == pytest.approx(nodes / ids[..., 0].size)
    assert counted.rows == max(*sent, *received)
    assert (counted.rows == 0) == (ranks_per_node == RANKS)


@pytest.mark.parametrize("kind", ["tight", "expert-tight"])
def test_tight_room_is_what_the_fullest_receives(kind: str) -> None:
    point = dataclasses.replace(POINT, capacity=kind)
    ids = traffic.expert_ids(point, RANKS, EXPERTS, seed=1, zipf_exponent=1.0)
    ((name, rows),) = traffic.room(point, ids, EXPERTS, ALIGNMENT).items()
    assert name == ("capacity" if kind == "tight" else "expert_capacity")
    fits = traffic.measure_traffic(ids, EXPERTS, {name: rows}, ALIGNMENT)
    less = traffic.measure_traffic(ids, EXPERTS, {name: rows - ALIGNMENT}, ALIGNMENT)
    assert fits.dropped_rows == 0
    assert less.dropped_rows > 0


def test_room_by_factors() -> None:
    ids = traffic.expert_ids(POINT, RANKS, EXPERTS, seed=1, zipf_exponent=1.0)

    def room(kind: str) -> dict[str, int]:
        return traffic.room(dataclasses.replace(POINT, capacity=kind), ids, EXPERTS, 1)

    # 4 ranks x 6 tokens x 3 choices over 8 experts: 9 rows an expert, 18 a rank.
    assert room("default") == {}
    assert room("1.5") == {"capacity": 27}
    assert room("expert-1.5") == {"expert_capacity": 14}


def test_bytes_of_the_published_case() -> None:
    """T = 4096, H = 7168, top-8 of 256 over two ranks: 58.5 MB bf16 on the wire, 30.2 MB fp8."""
    point = Point(4096, 7168, 8, "uniform", "tight", "bfloat16", "none", None)
    ids = traffic.expert_ids(point, 2, 256, seed=0, zipf_exponent=1.0)
    moved = traffic.measure_traffic(ids, 256, traffic.room(point, ids, 256, 1), 1)
    sent = traffic.dispatch_movement(point, moved)
    fp8 = traffic.dispatch_movement(dataclasses.replace(point, fp8="float32"), moved)
    # 1 - C(128, 8) / C(256, 8) of 4096 tokens have an expert on the other rank: 0.9966, +- 4 rows.
    assert sent.wire_bytes == pytest.approx(58.52e6, rel=2e-3)
    assert fp8.wire_bytes == pytest.approx(30.18e6, rel=2e-3)
    assert sent.logical_bytes == pytest.approx(2 * sent.wire_bytes, rel=2e-3)
    # 32768 rows on average are written, and the fullest rank has at least as many.
    assert 469e6 < sent.stored_bytes < 480e6
    assert sent.memory_bytes == sent.stored_bytes + 4096 * 14336
    assert sent.copies == 4
    combined = traffic.combine_movement(point, moved)
    assert combined.memory_bytes == sent.memory_bytes
    assert combined.wire_bytes == sent.wire_bytes
    # A row per (token, rank), and one of zeros: a quarter of the rows. The gradient reads them.
    once = traffic.dispatch_movement(point, moved, expand=False)
    assert once.wire_bytes == sent.wire_bytes
    assert once.stored_bytes == (2 * 4096 + 1) * 14336
    assert once.copies == 1
    summed = traffic.combine_movement(point, moved, expand=False)
    assert summed.read_bytes == once.logical_bytes + once.wire_bytes


@pytest.mark.parametrize(
    ("hidden", "wire", "received"),
    [
        (7168, 7168 + 224, 7168 + 224),
        (128, 128 + 16, 128 + 4),
        (640, 640 + 32, 640 + 20),  # 5 scales of 4 bytes, filled up to 32
        (2880, 2880 + 96, 2880 + 92),  # 22 blocks of 128 and one of 64
    ],
)
def test_a_quantised_row_is_filled_up_to_16_bytes_on_the_wire(
    hidden: int, wire: int, received: int
) -> None:
    """As cuda/core/wire_row.h says; the caller gets rows and scales apart, without filling."""
    point = dataclasses.replace(POINT, hidden=hidden, fp8="float32")
    assert (point.wire_row_bytes, point.received_row_bytes) == (wire, received)
    dequantized = dataclasses.replace(point, fp8="float32+dequantize")
    assert (dequantized.wire_row_bytes, dequantized.received_row_bytes) == (wire, 2 * hidden)


# The bound ----------------------------------------------------------------------------------------


def test_bound_is_the_slower_of_link_and_memory() -> None:
    limits = link.measure_link(FakeProbe(), [0, 1, 2])
    assert limits.wire_bytes_per_s == pytest.approx(100)  # the slowest pair
    assert limits.memory_bytes_per_s == pytest.approx(1000)
    assert limits.flag_hop_s == 3.5
    on_wire = Movement(wire_bytes=1000, logical_bytes=0, memory_bytes=5000)
    in_memory = Movement(
        wire_bytes=100, logical_bytes=0, memory_bytes=5000, stored_bytes=4600, copies=3
    )
    assert limits.bound([on_wire], None, 128) == pytest.approx(10)
    assert limits.bound([in_memory], None, 128) == pytest.approx(5)
    assert limits.bound([on_wire, in_memory], None, 128) == pytest.approx(15)
    # On 2 SMs a row copy with 3 copies stores 46 B/s, one with 8 copies 56 B/s; 60 B/s are read.
    assert limits.bound([in_memory], 2, 128) == pytest.approx(100)
    assert limits.bound([on_wire], 2, 128) == pytest.approx(10)
    summed = Movement(1000, 0, memory_bytes=5000, read_bytes=4800, stored_bytes=560, copies=8)
    assert limits.bound([summed], 2, 128) == pytest.approx(80)
    assert limits.bound([summed], None, 128) == pytest.approx(10)
    spread = dataclasses.replace(summed, read_bytes=600, stored_bytes=5600)
    assert limits.bound([spread], 2, 128) == pytest.approx(100)
    assert limits.wire_on(2) == pytest.approx(50)
    text = "\n".join(limits.lines([2]))
    assert "slowest pair" in text
    assert "2 SMs: W = " in text
    assert json.loads(json.dumps(limits.as_json([2])))["on_sms"]["2"] == pytest.approx(
        {"wire_bytes_per_s": 50, "stored_bytes_per_s": 42, "read_bytes_per_s": 60}
    )


class H200Probe:
    """Two H200: W = 366 GB/s, B = 4.3 TB/s; an SM reads 109, copies 50, stores up to 61 GB/s."""

    def device(self, ordinal: int) -> dict[str, Any]:
        return {"num_sms": 132}

    def link_copy(
        self, first: int, second: int, rows: int, row_bytes: int, rounds: int, sms: int, n: int
    ) -> list[float]:
        return [rows * row_bytes / 366e9] * n

    def flag_hop(self, first: int, second: int, trips: int, n: int) -> list[float]:
        return [0.63e-6] * n

    def memory_copy(self, ordinal: int, num_bytes: int, n: int) -> list[float]:
        return [2 * num_bytes / 4.3e12] * n

    def row_copy(
        self, ordinal: int, rows: int, row_bytes: int, copies: int, rounds: int, sms: int, n: int
    ) -> list[float]:
        per_copy = {0: 1 / 109e9, 1: 1 / 50e9, 4: 4 / 59e9, 8: 8 / 61e9}[copies]
        return [rows * row_bytes * per_copy / sms] * n


@pytest.mark.parametrize(
    ("top_k", "num_sms", "microseconds"),
    [
        (8, 24, 202),  # (32768 + 4082) rows of 14336 B to read at 24 x 109 GB/s
        (1, 16, 81),  # 2048 rows on the wire: longer than to read 6144 or to store 4096
        (1, 4, 240),  # 4096 rows to store at 4 x 61 GB/s, 6144 to read take 202
        (8, None, 160),  # the wire
    ],
)
def test_bound_of_combine_counts_reads_as_reads(
    top_k: int, num_sms: int | None, microseconds: float
) -> None:
    limits = link.measure_link(H200Probe(), [0, 1])
    point = Point(4096, 7168, top_k, "uniform", "tight", "bfloat16", "none", num_sms)
    ids = traffic.expert_ids(point, 2, 256, seed=0, zipf_exponent=1.0)
    moved = traffic.measure_traffic(ids, 256, traffic.room(point, ids, 256, 1), 1)
    bound = limits.bound([traffic.combine_movement(point, moved)], num_sms, point.row_bytes)
    # The fullest rank has up to 2 % more than half of the rows.
    assert bound * 1e6 == pytest.approx(microseconds, rel=0.03)


def test_one_gpu_has_no_link() -> None:
    limits = link.measure_link(FakeProbe(), [1])
    assert limits.wire_bytes_per_s is None
    assert limits.wire_on(2) is None
    assert limits.bound([Movement(10**9, 0, 1001)], None, 128) == pytest.approx(1)
    assert "W: n/a, there is one GPU" in limits.lines([])[0]


def test_rows_longer_than_a_stage_are_copied_in_equal_parts() -> None:
    assert link._piece(14336) == 14336
    assert link._piece(28672) == 14336
    assert 2 * 8192 < link._piece(16400) * 2 <= 16400 + 32
