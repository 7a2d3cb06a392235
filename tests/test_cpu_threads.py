"""What jax_ep says where XLA's CPU client has too few threads."""

import warnings

import jax
import pytest

from jax_ep import _native, compat, runtime


@pytest.fixture(autouse=True)
def forget():
    runtime._look_for_few_threads.cache_clear()
    yield
    runtime._look_for_few_threads.cache_clear()
    _native.cpu.set_advice("")


@pytest.mark.versions
@pytest.mark.parametrize("version", ["0.10.2", "0.11.2"])
def test_warns_once(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    num_devices = len(jax.local_devices(backend="cpu"))
    assert num_devices > 1
    monkeypatch.setattr(compat, "jaxlib_version", lambda: version)
    monkeypatch.setenv("NPROC", str(2 * num_devices - 1))
    with pytest.warns(RuntimeWarning, match=f"set NPROC={2 * num_devices} before .*README"):
        runtime._look_for_few_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime._look_for_few_threads()


@pytest.mark.versions
@pytest.mark.parametrize(("version", "factor"), [("0.11.2", 2), ("0.12.0.1", 1), ("1.0.0", 1)])
@pytest.mark.filterwarnings("error")
def test_is_silent_with_enough_threads(
    monkeypatch: pytest.MonkeyPatch, version: str, factor: int
) -> None:
    monkeypatch.setattr(compat, "jaxlib_version", lambda: version)
    monkeypatch.setenv("NPROC", str(factor * len(jax.local_devices(backend="cpu"))))
    runtime._look_for_few_threads()
