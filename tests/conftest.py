"""Set-up of the whole suite: eight CPU devices, and the backends that can run here."""

import gc
import importlib
import importlib.util
import os

from cpu_devices import cpu_devices, shared_compilations

# Before JAX is imported.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {cpu_devices(8)['XLA_FLAGS']}"
os.environ.setdefault("NPROC", cpu_devices(8)["NPROC"])
os.environ.update(shared_compilations())

from collections.abc import Iterator
from typing import Any

import backends
import pytest
from backends import Backend, JaxBackend

from jax_ep import _cpu

# Its assertions say what they compared, as those in test files do.
pytest.register_assert_rewrite("sharded_layers")


def _backend(request: pytest.FixtureRequest) -> Backend:
    backend = backends.BACKENDS[request.param]
    reason = backend.unavailable()
    if reason is not None:
        pytest.skip(f"backend {backend.name}: {reason}")
    return backend


@pytest.fixture(scope="session", params=list(backends.BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend, the oracle included: for expectations that do not come from the oracle."""
    return _backend(request)


@pytest.fixture(scope="session", params=[n for n in backends.BACKENDS if n != "reference"])
def device_backend(request: pytest.FixtureRequest) -> JaxBackend:
    """Every backend but the oracle: for comparisons with the oracle."""
    device_backend = _backend(request)
    assert isinstance(device_backend, JaxBackend)
    return device_backend


@pytest.fixture(scope="module")
def poison() -> Iterator[None]:
    """Fills every output with 0xff before its operation: NaN in floats, -1 in integers.

    What an operation forgets to write is then seen, instead of being zero by luck.
    """
    modules = [_cpu]
    if importlib.util.find_spec("jax_ep._cuda") is not None:
        modules.append(importlib.import_module("jax_ep._cuda"))
    for module in modules:
        module.set_poison_outputs(True)
    yield
    for module in modules:
        module.set_poison_outputs(False)


# Files whose tests take long: they begin first, so that at the end no worker has one alone.
_SLOW = ("test_multi_process", "test_examples", "test_native", "test_compilation", "test_ordering")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return _SLOW.index(item.path.stem) if item.path.stem in _SLOW else len(_SLOW)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What was imported and collected stays, so the collector need not look at it each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests share jobs and programs, so one worker has them all; slow files first."""
    config.option.loadscopereorder = False
    return importlib.import_module("xdist.scheduler").LoadFileScheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for backend in backends.BACKENDS.values():
        reason = backend.unavailable()
        if reason is not None:
            terminalreporter.write_line(f"backend {backend.name} was skipped: {reason}")
