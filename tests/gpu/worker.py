"""What one process of a job does: `worker.py SCENARIO [ARGUMENT...]`. Started by run_tiers.py.

    worker.py pytest FILE... [OPTION...]   runs pytest, in step with the other processes

The other scenarios are in scenarios.py. The job is described by JAX_EP_TEST_PROCESS,
JAX_EP_TEST_NUM_PROCESSES, JAX_EP_TEST_PORT, JAX_EP_TEST_OUT (its directory), JAX_EP_TEST_PLATFORM
and JAX_EP_TEST_DEVICE (the local device of this process; not set: all devices).
"""

import faulthandler
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax

import jax_ep

TESTS = pathlib.Path(__file__).resolve().parents[1]
PROCESS = int(os.environ["JAX_EP_TEST_PROCESS"])
NUM_PROCESSES = int(os.environ["JAX_EP_TEST_NUM_PROCESSES"])
OUT = pathlib.Path(os.environ["JAX_EP_TEST_OUT"])
PLATFORM = os.environ["JAX_EP_TEST_PLATFORM"]


def join() -> None:
    """Makes this process one of the job, for JAX and for jax_ep."""
    if NUM_PROCESSES == 1:
        return
    if sys.argv[1] == "killed":  # JAX lets the coordinator outlive it; otherwise all leave together
        jax.config.update("jax_enable_recoverability", True)
    options: dict[str, Any] = {}
    if PLATFORM != "cpu":
        options["local_device_ids"] = [int(os.environ["JAX_EP_TEST_DEVICE"])]
    address = f"127.0.0.1:{os.environ['JAX_EP_TEST_PORT']}"
    jax.distributed.initialize(address, NUM_PROCESSES, PROCESS, **options)
    jax.devices(PLATFORM)  # its client exists before jax_ep.initialize() looks for it
    jax_ep.initialize(timeout=60)


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
    import hypothesis
    import pytest

    sys.path[:0] = [str(TESTS), str(TESTS / "support")]
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
        import backends
        from exchange import SocketExchange

        exchange = SocketExchange(OUT / "exchange", PROCESS, NUM_PROCESSES)
        backends.use_processes(PLATFORM, exchange)
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-o", "faulthandler_timeout=60"]
    report = Report(OUT / f"report_{PROCESS}.json")
    status = int(pytest.main([*options, *arguments], plugins=[report]))
    if NUM_PROCESSES > 1 and status <= 1:
        exchange.all_gather(None)  # nobody leaves while others still need it
    return status


def main() -> None:
    limit = float(os.environ.get("JAX_EP_TEST_LIMIT", "600"))
    faulthandler.dump_traceback_later(max(1.0, limit - 3), exit=False)
    start = time.monotonic()
    join()
    print(f"process {PROCESS} of {NUM_PROCESSES} joined in {time.monotonic() - start:.1f} s")
    scenario, *arguments = sys.argv[1:]
    if scenario == "pytest":
        status = run_pytest(*arguments)
    else:
        import scenarios

        status = scenarios.SCENARIOS[scenario](*arguments)
    sys.stdout.flush()
    if NUM_PROCESSES > 1:
        jax_ep.finalize()
    raise SystemExit(status)


if __name__ == "__main__":
    main()
