"""The benchmark's timeline, from a made-up build: what it reads, sums up, plots and refuses."""

from pathlib import Path

import jax
import pytest
from bench_point import POINT, RANKS

from jax_ep import _native
from jax_ep.bench import cli, options, timeline


class NotingCuda:
    """A timeline build, on two devices whose clocks are a second apart.

    Block b of ``dispatch`` begins b us late, its messenger tells progress 10 and 30 us after that,
    with fences that end there and have taken 2 and 5 us; on device 1 all takes 1 us more.
    """

    @staticmethod
    def timeline(ordinal: int) -> list[tuple[str, int, str, str, int, int, int, int]]:
        clock = 7_000_000_000 + 1_000_000_000 * ordinal
        rows: list[tuple[str, int, str, str, int, int, int, int]] = []
        for block in range(3):
            start, late = clock + 1000 * block, 1000 * ordinal

            def note(
                role: str, event: str, *times: int, block: int = block, start: int = start
            ) -> None:
                total = (sum(times) - 1000) % 2**32  # as if a number had gone once round
                first, last = start + times[0], start + times[-1]
                rows.append(("dispatch", block, role, event, first, last, total, len(times)))

            note("block", "start", 0)
            note("messenger", "fence begin", 8000 + late, 25000 + late)
            note("messenger", "fence end", 10000 + late, 30000 + late)
            note("messenger", "P1", 10000 + late, 30000 + late)
            if block < 2:
                note("receiver", "P2", 12000 + late)
            note("block", "end", 40000 + late)
        rows.append(("layout", 0, "block", "start", clock, clock, 0, 1))
        return rows


def test_timeline_is_relative_to_the_kernels_start_on_each_device() -> None:
    marks = timeline.read(NotingCuda, [0, 1])
    ends = {(m.device, m.block): m.last_ns for m in marks if m.event == "end"}
    assert ends == {(d, b): 40000 + 1000 * (d + b) for d in range(2) for b in range(3)}
    layout = [m for m in marks if m.operation == "layout"]
    assert [(m.device, m.first_ns) for m in layout] == [(0, 0), (1, 0)]


def test_timeline_summary() -> None:
    """Median and maximum over blocks and devices, in microseconds; worked out by hand."""
    text = timeline.summary(timeline.read(NotingCuda, [0, 1]))
    found = {(line[:12].strip(), line[12:25].strip()): line[25:].split() for line in text}
    assert any(line.startswith("dispatch: 6 blocks on 2 device(s)") for line in text)
    assert any(line.startswith("layout: 2 blocks on 2 device(s)") for line in text)
    # Begins at 10 us, later by block and by device: 10 11 11 12 12 13.
    assert found["messenger", "P1"] == ["11.5", "13.0", "31.5", "33.0", "2"]
    assert found["receiver", "P2"] == ["13.0", "14.0", "13.0", "14.0", "1"]
    assert found["block", "end"] == ["41.5", "43.0", "41.5", "43.0", "1"]
    assert found["messenger", "in fences"] == ["7.0", "7.0", "(the", "last:", "5.0", "5.0)"]


def test_timeline_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timeline.plot(tmp_path / "out.png", timeline.read(NotingCuda, [0, 1]), "two devices")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_timeline_of_one_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way a GPU goes, on CPU devices with a made-up timeline build."""
    pytest.importorskip("matplotlib")
    mesh = jax.make_mesh((RANKS,), ("ep",), devices=jax.devices("cpu")[:RANKS])
    monkeypatch.setattr(_native, "cuda", NotingCuda)
    text = f"--experts 8 --alignment 4 --timeline {tmp_path / 'out.png'}"
    args = options.make_parser().parse_args(text.split())
    cli._Bench(args, mesh, None).show_timeline(POINT, "made up")
    assert "dispatch: 12 blocks on 4 device(s)" in capsys.readouterr().out
    assert (tmp_path / "out.png").exists()
    args.only = ["make_layout", "dispatch"]
    with pytest.raises(ValueError, match="one operation: --only one of make_layout, dispatch,"):
        cli._Bench(args, mesh, None).show_timeline(POINT, "made up")


def test_timeline_needs_its_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for cuda, told in (
        (None, "-C cmake.define.JAX_EP_TIMELINE=ON"),
        (object(), "-C cmake.define.JAX_EP_TIMELINE=ON"),
        (NotingCuda, "it is the GPU's kernels that note"),
    ):
        monkeypatch.setattr(_native, "cuda", cuda)
        with pytest.raises(SystemExit):
            cli.main(["--platform", "cpu", "--timeline", str(tmp_path / "out.png")])
        assert told in capsys.readouterr().err
