"""Runs pytest in every process of a job, in step: the suite on one rank a process."""

import json
import os
import pathlib
from typing import Any

import hypothesis
import jax
import pytest
from exchange import SocketExchange
from job import NUM_PROCESSES, OUT, PLATFORM, PROCESS, connect

import jax_ep


class Report:
    """A pytest plugin: counts by file, reasons, and what tests recorded, into a JSON file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.files: dict[str, dict[str, Any]] = {}
        self.failures: list[str] = []
        self.running: str | None = None  # the test that has begun and not ended
        self.compilations: list[float] = []  # seconds of each
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event.endswith("/backend_compile_duration"):
            self.compilations.append(seconds)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid
        self._write()  # as far as it got, should this process be stopped

    def pytest_runtest_logfinish(self) -> None:
        self.running = None
        self._write()

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = pathlib.Path(report.nodeid.split("::")[0]).name
        file = self.files.setdefault(
            name, {"passed": 0, "failed": 0, "seconds": 0.0, "skipped": {}, "notes": []}
        )
        file["seconds"] += report.duration
        if report.when == "teardown":
            file["notes"] += [f"{key}: {value}" for key, value in report.user_properties]
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected"
            reason = reason.removeprefix("Skipped: ")
            file["skipped"][reason] = file["skipped"].get(reason, 0) + 1
        elif report.failed:
            file["failed"] += 1
            self.failures.append(f"{report.nodeid} ({report.when})\n{report.longreprtext}")
        elif report.when == "call":
            file["passed"] += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}\n{report.longreprtext}")

    def pytest_sessionfinish(self) -> None:
        self._write()

    def _write(self) -> None:
        found = {
            "files": self.files,
            "failures": self.failures,
            "running": self.running,
            "compilations": self.compilations,
        }
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(found))
        beside.replace(self.path)  # whole, whenever this process is stopped


def run_pytest(*arguments: str) -> int:
    """Runs pytest here; with several processes, on the backend that spans them."""
    if NUM_PROCESSES > 1:
        connect(timeout=60, staging_bytes=int(os.environ.get("JAX_EP_TEST_STAGING_BYTES", "0")))
        print(f"process {PROCESS} of {NUM_PROCESSES} has joined")
    hypothesis.settings.register_profile(
        "in_step",
        derandomize=True,  # the same examples in every process and every run
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("in_step")
    if NUM_PROCESSES > 1:
        import backends  # not before: its settings take what the profile leaves

        exchange = SocketExchange(OUT / "exchange", PROCESS, NUM_PROCESSES)
        backends.use_processes(PLATFORM, exchange)
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-o", "faulthandler_timeout=60"]
    report = Report(OUT / f"report_{PROCESS}.json")
    status = int(pytest.main([*options, *arguments], plugins=[report]))
    if NUM_PROCESSES > 1:
        if status <= 1:
            exchange.all_gather(None)  # nobody leaves while others still need it
        jax_ep.finalize()
    return status
