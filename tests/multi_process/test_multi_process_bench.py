"""The benchmark in a job of several processes, on CPU."""

import json
import pathlib

from launcher import run_scenario

CASES = pathlib.Path(__file__).with_name("scenarios") / "measured.py"


def test_processes_measure_together(tmp_path: pathlib.Path) -> None:
    """Process 0 prints what all have measured; what one cannot do is told, the rest is measured."""
    finished = run_scenario(
        CASES, "together", num_processes=2, num_devices=2, out=tmp_path, timeout=100
    )
    told = [[json.loads(text) for text in process.lines("ROWS")] for process in finished]
    for (rows, rows_elsewhere), path in zip(
        zip(*told, strict=True), ("all", "failing", "unsupported"), strict=True
    ):
        assert len(rows) == len(rows_elsewhere), path
        for row, row_elsewhere in zip(rows, rows_elsewhere, strict=True):
            for what in ("operation", "ranks_per_node", "median_s", "p10_s", "nodes_per_token"):
                assert row.get(what) == row_elsewhere.get(what), (path, what)

    (rows, some, unsupported), _ = told
    verbs = ["make_layout+dispatch", "make_layout+dispatch+combine"]
    assert [(row["operation"], row["ranks_per_node"]) for row in rows] == [
        *((verb, 4) for verb in verbs),
        ("all_to_all+gather", 4),
        *((verb, 2) for verb in verbs),
    ]
    assert all(row["median_s"] > 0 for row in rows)
    assert [row.get("nodes_per_token", 1) > 1 for row in rows] == 3 * [False] + 2 * [True]
    for line in ("processes: 2", "2 ranks a node: hidden=64", "make_layout+dispatch "):
        assert f"\n{line}" in finished[0].log
        assert f"\n{line}" not in finished[1].log

    names = ["make_layout", "combine"]
    assert [(row["operation"], "error" in row) for row in some] == [
        (n, n != names[0]) for n in names
    ]
    assert told[1][1][1]["error"] == "MemoryError: no room for this"
    assert [(row["operation"], row["tokens"], "error" in row) for row in unsupported] == [
        (name, tokens, name != names[0]) for tokens in (3, 5) for name in names
    ]

    assert "--seed: 0 in process 0, but 1 in process 1" in finished[0].log
    assert "--seed: 1 in process 1, but 0 in process 0" in finished[1].log
    gone, mistaken = (process.lines("ENDED") for process in finished)
    assert [text.split()[0] for text in gone] == ["SystemExit", "OthersGoneError"]
    assert "process 1 failed: a mistake" in gone[1]
    assert mistaken == ["SystemExit 2", "TypeError a mistake"]
