"""Decoding: many steps in a loop, each of which needs the one before, with few tokens or none."""

import functools
from collections.abc import Callable

import numpy as np
from backends import JaxBackend
from decode_loop import (
    assert_right,
    expected_steps,
    first_rows,
    loop_case,
    one_step,
    scan_of_steps,
    while_of_steps,
)


def _steps(backend: JaxBackend) -> int:
    return 1000 if backend.platform != "cpu" else 50


def test_scan(device_backend: JaxBackend, record_property: Callable[[str, object], None]) -> None:
    """lax.scan: as fast as it goes, two times, on other data."""
    case, steps = loop_case(device_backend.num_devices), _steps(device_backend)
    function = scan_of_steps(case, steps)
    for seed in (1, 2):
        x = first_rows(case, seed)
        found = device_backend.run(case.num_ranks, function, x)
        assert_right(found, expected_steps(case, x, steps))
    record_property("steps, lax.scan", 2 * steps)


def test_while(device_backend: JaxBackend, record_property: Callable[[str, object], None]) -> None:
    """lax.while_loop whose end is data, with ranks that come late."""
    case, steps = loop_case(device_backend.num_devices), _steps(device_backend)
    function = while_of_steps(case, steps)
    for seed, wanted in ((3, 3), (4, steps)):
        x = first_rows(case, seed)
        ends = np.full(case.num_ranks, wanted, np.int32)
        rows, told = device_backend.run(case.num_ranks, function, x, ends)
        assert_right((rows, told[:, :wanted]), expected_steps(case, x, wanted))
    record_property("steps, lax.while_loop, late ranks", 3 + steps)


def test_calls(device_backend: JaxBackend, record_property: Callable[[str, object], None]) -> None:
    """A program a step, called again and again on what the last one gave."""
    case, steps = loop_case(device_backend.num_devices), _steps(device_backend)

    step = functools.partial(one_step, case)
    x = first = first_rows(case, 5)
    told = []
    for number in range(steps):
        numbers = np.full(case.num_ranks, number, np.int32)
        x, of_step = device_backend.call(case.num_ranks, step, x, numbers)
        told.append(of_step)
    rows, told = device_backend.fetch(case.num_ranks, (x, told))
    assert_right((rows, np.stack(told, axis=1)), expected_steps(case, first, steps))
    record_property("steps, a program each", steps)
