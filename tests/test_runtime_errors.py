"""What ranks get when one never comes, and how long is waited."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routings
from backends import AXIS, BackendLayout, JaxBackend
from numpy.typing import NDArray
from routings import Case, assert_same_bits
from usable import check_usable

import jax_ep
from jax_ep import _native, timeouts

pytestmark = pytest.mark.usefixtures("poison")

F32 = np.float32

Verb = Callable[..., Any]


# A rank that never comes --------------------------------------------------------------------------


# Ends a test soon, and is long enough for ranks that do come.
SHORT = 1.0


@contextlib.contextmanager
def timeout(seconds: float) -> Iterator[None]:
    before = jax_ep.get_timeout()
    jax_ep.set_timeout(seconds)
    try:
        yield
    finally:
        jax_ep.set_timeout(**before._asdict())


def three_ranks(device_backend: JaxBackend) -> tuple[BackendLayout, NDArray[np.float32]]:
    case = Case(3, 4, 2, 6, hidden=8)
    ids = routings.topk_ids(np.random.default_rng(42), case, "uniform")
    x = routings.random_rows(np.random.default_rng(43), (3, 4, 8), F32)
    return device_backend.make_layout(case, ids), x


def unless_absent(layout: Any, x: Any, absent: Any, verb: str) -> Any:
    """The verb on every rank but those in `absent`, which is bool [R] on each rank."""

    def call(layout: Any, x: Any) -> Any:
        if verb == "layout":
            made = jax_ep.make_layout(layout.topk_idx, num_experts=6, axis_name=AXIS)
            return made.group_sizes[0].astype(F32)
        if verb == "dispatch":
            return jax_ep.dispatch(x, layout).tokens.sum()
        return jax_ep.combine(jnp.tile(x, (layout.capacity // 4, 1)), layout).sum()

    here = absent[jax.lax.axis_index(AXIS)]
    return jax.lax.cond(here, lambda _, x: x[0, 0], call, layout, x)


ABSENT_FUNCTIONS: dict[str, Verb] = {
    "layout": lambda layout, x, absent: unless_absent(layout, x, absent, "layout"),
    "dispatch": lambda layout, x, absent: unless_absent(layout, x, absent, "dispatch"),
    "combine": lambda layout, x, absent: unless_absent(layout, x, absent, "combine"),
}


@pytest.mark.versions
@pytest.mark.parametrize("verb", ["layout", "dispatch", "combine"])
@pytest.mark.parametrize("absent", [(0,), (1,), (0, 2)])
def test_absent_rank(device_backend: JaxBackend, verb: str, absent: tuple[int, ...]) -> None:
    if device_backend.platform != "cpu":
        pytest.skip("ranks that meet on the device time out otherwise")
    layout, x = three_ranks(device_backend)
    function = ABSENT_FUNCTIONS[verb]
    nobody = np.zeros((3, 3), np.bool_)
    present = device_backend.run(3, function, layout.handle, x, nobody)
    some = nobody.copy()
    some[:, list(absent)] = True
    came = [rank for rank in range(3) if rank not in absent]
    message = (
        f"DEADLINE_EXCEEDED: jax_ep_{verb}: rank {', '.join(map(str, absent))} of group 0 did not "
        f"come within the timeout (came: {', '.join(map(str, came))}); every rank of a group must "
        "call the operation. jax_ep.set_timeout and JAX_EP_TIMEOUT set how long is waited"
    )
    start = time.monotonic()
    with timeout(SHORT), pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(message)):
        device_backend.run(3, function, layout.handle, x, some)
    elapsed = time.monotonic() - start
    # Not before the timeout, and with room for a slow machine not long after it.
    assert SHORT * 0.9 < elapsed < SHORT + 20
    # The same program, and others, work at once.
    again = device_backend.run(3, function, layout.handle, x, nobody)
    assert_same_bits(again, present)
    check_usable(device_backend)


def test_what_may_keep_ranks_from_coming_is_said(device_backend: JaxBackend) -> None:
    """As where XLA has fewer threads than devices: such a rank is absent for another reason."""
    if device_backend.platform != "cpu":
        pytest.skip("ranks that meet on the device time out otherwise")
    layout, x = three_ranks(device_backend)
    absent = np.zeros((3, 3), np.bool_)
    absent[:, 1] = True
    _native.cpu.set_advice("Set NPROC=16 before JAX starts")
    try:
        message = (
            r"rank 1 of group 0 did not come .*how long is waited\. Set NPROC=16 before JAX starts"
        )
        with timeout(SHORT), pytest.raises(jax.errors.JaxRuntimeError, match=message):
            device_backend.run(3, ABSENT_FUNCTIONS["dispatch"], layout.handle, x, absent)
    finally:
        _native.cpu.set_advice("")


def sum_after_a_wait(layout: Any, x: Any, num_steps: Any) -> Any:
    """Dispatches after num_steps of work, a number of each rank's own."""

    def step(_: Any, value: Any) -> Any:
        return jnp.sin(value) + 1

    value = jax.lax.fori_loop(0, num_steps, step, x)
    # The work's result enters the sum, or it would be removed; it is 0 * a finite number.
    return jax_ep.dispatch(x + 0 * value, layout).tokens.sum()


def test_late_rank(device_backend: JaxBackend) -> None:
    if device_backend.platform != "cpu":
        pytest.skip("ranks that meet on the device time out otherwise")
    layout, x = three_ranks(device_backend)

    def run(num_steps: int) -> Any:
        steps = np.array([0, num_steps, 0], np.int32)
        return device_backend.run(3, sum_after_a_wait, layout.handle, x, steps)

    # So many steps that rank 1 comes about three short timeouts after the others.
    expected = run(0)
    num_steps, seconds = 2**14, 0.0
    while seconds < 0.25 and num_steps < 2**29:
        num_steps *= 2
        start = time.monotonic()
        run(num_steps)
        seconds = time.monotonic() - start
    num_steps = min(int(num_steps * 3 * SHORT / seconds), 2**31 - 1)

    message = r"DEADLINE_EXCEEDED: jax_ep_dispatch: rank 1 of group 0 did not come .*\(came: 0, 2\)"
    with timeout(SHORT), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        run(num_steps)
    # Its late arrival does not meet the ranks of the next run.
    assert_same_bits(run(0), expected)
    check_usable(device_backend)
    # With the usual timeout the same is just slow.
    assert_same_bits(run(num_steps), expected)


# The timeout itself -------------------------------------------------------------------------------


@pytest.mark.versions
def test_set_timeout() -> None:
    for seconds in (0.25, 7, 3600.0):
        with timeout(seconds):
            assert jax_ep.get_timeout() == (seconds, seconds)
            for bad in (0, -1, 1e10, float("inf"), float("nan")):
                message = f"set_timeout: seconds must be above 0 and at most 1e+08; got {bad}"
                with pytest.raises(ValueError, match=re.escape(message)):
                    jax_ep.set_timeout(bad)
            with pytest.raises(TypeError, match="seconds must be a number; got '3'"):
                jax_ep.set_timeout("3")  # type: ignore[arg-type]
            assert jax_ep.get_timeout() == (seconds, seconds)  # a refused one changes nothing


@pytest.mark.versions
def test_set_one_timeout() -> None:
    with timeout(7):
        jax_ep.set_timeout(arrival=100)
        assert jax_ep.get_timeout() == jax_ep.Timeout(arrival=100, progress=7)
        jax_ep.set_timeout(progress=2)
        assert jax_ep.get_timeout() == (100, 2)
        jax_ep.set_timeout(5, arrival=6)
        assert jax_ep.get_timeout() == (6, 5)
        with pytest.raises(ValueError, match="set_timeout: progress must be above 0"):
            jax_ep.set_timeout(9, progress=0)
        with pytest.raises(TypeError, match="pass seconds, arrival or progress"):
            jax_ep.set_timeout()
        assert jax_ep.get_timeout() == (6, 5)


def clear_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TIMEOUT", "ARRIVAL_TIMEOUT", "PROGRESS_TIMEOUT"):
        monkeypatch.delenv(f"JAX_EP_{name}", raising=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [({}, "600.0 30.0"), ({"PROGRESS_TIMEOUT": "5", "TIMEOUT": "8"}, "8.0 5.0")],
)
def test_import_takes_timeouts_from_the_environment(
    values: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear_timeouts(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    for name, value in values.items():
        monkeypatch.setenv(f"JAX_EP_{name}", value)
    done = subprocess.run(
        [sys.executable, "-c", "import jax_ep; print(*jax_ep.get_timeout())"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (9, 4)),
        ({"TIMEOUT": "2.5"}, (2.5, 2.5)),
        ({"ARRIVAL_TIMEOUT": "1e2"}, (100, 4)),
        ({"PROGRESS_TIMEOUT": "5", "TIMEOUT": "8"}, (8, 5)),
    ],
)
def test_timeouts_from_the_environment(
    values: dict[str, str], expected: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clear_timeouts(monkeypatch)
    for name, value in values.items():
        monkeypatch.setenv(f"JAX_EP_{name}", value)
    with timeout(1):
        jax_ep.set_timeout(arrival=9, progress=4)
        timeouts._apply_environment()  # as the import does
        assert jax_ep.get_timeout() == expected


@pytest.mark.parametrize("name", ["TIMEOUT", "ARRIVAL_TIMEOUT", "PROGRESS_TIMEOUT"])
@pytest.mark.parametrize("value", ["soon", "-3", "nan"])
def test_bad_timeout_in_the_environment(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear_timeouts(monkeypatch)
    monkeypatch.setenv(f"JAX_EP_{name}", value)
    message = f"environment variable JAX_EP_{name} must be a number of seconds above 0; got "
    before = jax_ep.get_timeout()
    with pytest.raises(ValueError, match=re.escape(f"{message}{value!r}")):
        timeouts._apply_environment()
    assert jax_ep.get_timeout() == before
