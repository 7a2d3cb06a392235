"""The model of both hops: its limits, and how far it is from what others have published."""

import dataclasses
import pathlib

import numpy as np
import pytest
import routings
from documents import ROOT
from routings import Case

from jax_ep.bench import traffic
from jax_ep.simulate import __main__ as cli
from jax_ep.simulate.model import Design, Machine, directly, memory_bytes, two_hops
from jax_ep.simulate.published import BF16, H200, POINTS, Point
from jax_ep.simulate.routed import Problem, count, route

INF = float("inf")
EP16 = Problem(16, tokens=256)
FREE_SMS = dataclasses.replace(H200, sm_push=INF, sm_store=INF)


def test_counts_are_those_of_the_layout() -> None:
    case = Case(8, 40, 4, 16, hidden=8)
    problem = Problem(8, tokens=40, top_k=4, num_experts=16, ranks_per_node=2)
    ids = routings.topk_ids(np.random.default_rng(70), case, "zipf")
    routed, moved = count(problem, ids), traffic.measure_traffic(ids, 16, {}, 1)
    crossing = routed.to_rank - np.diag(np.diag(routed.to_rank))
    assert moved.distinct_rows == routed.to_rank.sum(axis=0).max()
    assert moved.wire_rows == max(crossing.sum(axis=0).max(), crossing.sum(axis=1).max())
    recv_src = moved.layout.recv_src  # of each row, (rank * 40 + token) * 4 + k
    for rank in range(8):
        rows = recv_src[rank][recv_src[rank] >= 0]
        assert (np.bincount(rows // 160, minlength=8) == routed.choices[:, rank]).all()
    for node in range(4):
        rows = recv_src[2 * node : 2 * node + 2]
        tokens = np.unique(rows[rows >= 0] // 4)
        assert (np.bincount(tokens // 40, minlength=8) == routed.to_node[:, node]).all()


def test_one_node_is_a_single_hop() -> None:
    routed = route(Problem(8, tokens=256))
    time = two_hops(routed, BF16, FREE_SMS, Design())
    crossing = routed.to_rank - np.diag(np.diag(routed.to_rank))
    most = max(crossing.sum(axis=0).max(), crossing.sum(axis=1).max())
    assert time.parts == {"NVLink": most * BF16 / H200.nvlink, "SMs": 0}
    assert time.seconds == H200.start + time.parts["NVLink"]
    assert time.bound == "NVLink"


def test_a_network_without_limits_leaves_nvlink() -> None:
    """However few the credits: the forwarding ranks never stand still."""
    free = dataclasses.replace(FREE_SMS, nic=INF, nic_latency=0)
    routed = route(EP16)
    for credits in (1, 8):
        time = two_hops(routed, BF16, free, Design(credits=credits))
        assert time.bound == "NVLink"
        assert 0 < time.parts["network"] < time.parts["NVLink"]
    assert directly(routed, BF16, free).parts["network"] == 0


@pytest.mark.parametrize(("num_rows", "num_chunks"), [(160, 10), (7, 1), (37, 3)])
def test_chunks_and_credits_by_hand(num_rows: int, num_chunks: int) -> None:
    """Two nodes of one rank, all rows for rank 1: with one credit chunks and credits take turns."""
    machine = Machine(INF, 1e9, 3e-6, start=0, start_direct=0, sm_push=INF, sm_store=INF)
    problem = Problem(2, num_rows, top_k=1, num_experts=2, ranks_per_node=1)
    routed = count(problem, np.ones((2, num_rows, 1), np.int32))
    sending = num_rows * 1000 / 1e9
    for credits, ways in ((1, 2 * num_chunks - 1), (100, 1)):
        time = two_hops(routed, 1000, machine, Design(credits=credits))
        assert time.seconds == pytest.approx(sending + ways * 3e-6)


def test_more_takes_longer_and_better_is_no_slower() -> None:
    routed = route(EP16)

    def with_machine(**changes: float) -> float:
        return two_hops(routed, BF16, dataclasses.replace(H200, **changes), Design()).seconds

    def with_design(**changes: int) -> float:
        return two_hops(routed, BF16, H200, Design(**changes)).seconds

    base = with_design()
    assert two_hops(routed, 2 * BF16, H200, Design()).seconds > base
    more_tokens = route(dataclasses.replace(EP16, tokens=512))
    assert two_hops(more_tokens, BF16, H200, Design()).seconds > base
    assert with_machine(nic=H200.nic / 2) > base > with_machine(nic=2 * H200.nic)
    assert with_machine(nic_latency=50e-6) > base
    assert with_machine(nvlink=H200.nvlink / 10) > base
    assert with_design(credits=1) > with_design(credits=2) >= base >= with_design(credits=64)
    assert with_design(num_sms=1) > base >= with_design(num_sms=132)
    once, longer = (directly(routed, size, H200).seconds for size in (BF16, 2 * BF16))
    assert once < longer
    assert once < directly(routed, BF16, H200, once_per_choice=True).seconds


def test_group_limited_routing_bounds_the_nodes() -> None:
    """Eight groups on eight nodes: at most four nodes a token."""
    routed = route(Problem(64, tokens=64))
    assert 3 < routed.nodes_per_token <= 4
    assert route(Problem(64, 64, num_groups=1, top_groups=1)).nodes_per_token > 5
    assert (routed.choices.sum(axis=1) == 64 * 8).all()


def test_memory() -> None:
    assert memory_bytes(Problem(8), BF16, Design(), 1)["staging"] == 0
    memory = memory_bytes(Problem(256), BF16, Design(chunk_rows=16, credits=8), 128)
    assert memory == {
        "staging": 2 * 31 * 8 * 16 * BF16,
        "slots": 256 * 128 * BF16,
        "tables": 256 * 256 * 4,
    }


# The others take long to route; `python -m jax_ep.simulate` shows them all.
QUICK = [p for p in POINTS if p.num_ranks <= 16 or (p.num_ranks <= 32 and p.tokens <= 4096)]


@pytest.mark.parametrize("point", QUICK, ids=lambda p: f"{p.name} EP{p.num_ranks}")
def test_published_points(point: Point) -> None:
    error = abs(point.computed() / point.figure - 1)
    assert error < (0.02 if point.fitted else 0.12)


def test_the_document_has_what_the_model_gives(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    plot = tmp_path / "plot.png"
    cli.main(["--ep", "16", "--skip-published", "--plot", str(plot)])
    assert plot.stat().st_size > 5000
    *_, header, rule, row = capsys.readouterr().out.splitlines()
    document = (ROOT / "docs/multi_node.md").read_text()
    assert f"{header}\n{rule}\n{row}\n" in document
    for point in QUICK[:3]:
        cli.print_comparison(point)
        assert capsys.readouterr().out in document


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("--ep", "4 12 24 512", "must be a multiple of 8 ranks on a node that divides 256 experts"),
        ("--credits", "0 -1", "must be at least 1"),
        ("--chunk-rows", "0", "must be at least 1"),
        ("--num-sms", "0", "must be at least 1"),
        ("--tokens", "0", "must be at least 1"),
    ],
)
def test_options_without_a_meaning(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    values: str,
    message: str,
) -> None:
    """They are refused: no table of zeros, no simulation without an end."""
    monkeypatch.setattr(cli, "print_prediction", lambda *_: None)
    for value in values.split():
        with pytest.raises(SystemExit):
            cli.main(["--skip-published", option, value])
        assert f"argument {option}: {value}: {message}" in capsys.readouterr().err
