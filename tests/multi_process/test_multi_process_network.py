"""The network between nodes, as far as it is a matter of processes that agree: without NVSHMEM."""

import pathlib

from launcher import run_scenario

CASES = pathlib.Path(__file__).with_name("scenarios") / "network.py"


def test_start_and_end(tmp_path: pathlib.Path) -> None:
    """All start or none, all hear of who fails, and who does not come holds nobody up for long."""
    finished = run_scenario(
        CASES, "cases", num_processes=3, num_devices=1, out=tmp_path, timeout=100
    )
    for process in finished:
        assert len(process.lines("RIGHT")) == 10
