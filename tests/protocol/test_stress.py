"""Many random calls and races of reader and writer, made and checked on the devices.

How long it goes on is set by JAX_EP_TEST_CALLS (of all stress tests together) and
JAX_EP_TEST_SECONDS (for each; what was begun is ended). On CPU a few calls show that the checks
themselves are right; tests/gpu/run_tiers.py asks for many.
"""

import os
import time
from collections.abc import Callable

import numpy as np
import on_device
import pytest
from backends import JaxBackend
from on_device import CHECKS, EXPANDED, NOT_YET, RACE_CHECKS, STORED_ON, Form, Race
from routings import Case

NUM_CALLS = int(os.environ.get("JAX_EP_TEST_CALLS", "80"))
SECONDS = float(os.environ.get("JAX_EP_TEST_SECONDS", "1e9"))
CALLS_AT_ONCE = 500  # in one program


def sizes(num_ranks: int) -> dict[str, Case]:
    """Some that drop rows and some that do not."""
    rows = 16 * 4  # T * K of "tight"
    return {
        "tight": Case(num_ranks, 16, 4, 4 * num_ranks, hidden=32, capacity=rows),
        "one_token": Case(num_ranks, 1, 2, 2 * num_ranks, hidden=8),
        "aligned": Case(
            num_ranks, 33, 4, 4 * num_ranks, hidden=136, capacity=192, expert_alignment=16
        ),
        "own_room": Case(num_ranks, 24, 4, 4 * num_ranks, hidden=32, expert_capacity=24),
    }


# Not expanded, no receiver is between what peers wrote and the kernel after. Two scales are stored
# in words of four bytes, not by the copy engine.
NOT_EXPANDED, TWO_SCALES = Form(expand=False), Form(num_scales=2)
IN_ONE = Form(in_one=True)

# (sizes, whether ranks come late, SMs of a call where that can be said, what dispatch is asked for)
STRESS = [
    ("tight", False, None, EXPANDED),
    ("tight", True, None, EXPANDED),
    ("one_token", False, None, EXPANDED),
    ("aligned", True, 8, EXPANDED),
    ("own_room", False, None, EXPANDED),
    ("tight", True, None, NOT_EXPANDED),
    ("tight", False, None, TWO_SCALES),
    ("tight", True, None, IN_ONE),
]


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "late", "num_sms", "form"),
    STRESS,
    ids=lambda value: str(value).lower().replace("none", ""),
)
def test_random_calls(
    device_backend: JaxBackend,
    record_property: Callable[[str, object], None],
    name: str,
    late: bool,
    num_sms: int | None,
    form: Form,
) -> None:
    backend, num_ranks = device_backend, device_backend.num_devices
    wanted = -(-NUM_CALLS // len(STRESS))
    at_once = min(wanted, CALLS_AT_ONCE)
    function = on_device.stress(sizes(num_ranks)[name], at_once, late, num_sms, form)
    start, num_done = time.monotonic(), 0
    while num_done < wanted and backend.agree(time.monotonic() - start < SECONDS):
        found = backend.run(num_ranks, function, np.full(num_ranks, num_done, np.int32))
        wrong = {
            check: count.tolist()
            for check, count in zip(CHECKS, found["wrong"].T, strict=True)
            if count.any()
        }
        assert not wrong, (
            f"wrong calls by rank: {wrong}, of {at_once} from call {num_done} on; the first by "
            f"rank: {np.where(found['first_wrong'] == NOT_YET, -1, found['first_wrong'])}"
        )
        num_done += at_once
    rows = "" if form == EXPANDED else f", {form}"
    record_property(f"calls, {name}{', late ranks' if late else ''}{rows}", num_done)


@pytest.mark.once
@pytest.mark.parametrize("form", [EXPANDED, NOT_EXPANDED, TWO_SCALES], ids=str)
def test_a_wrong_call_would_be_seen(device_backend: JaxBackend, form: Form) -> None:
    """The last rank is told of other calls than the rest: whatever depends on others is wrong."""
    num_ranks = min(device_backend.num_devices, 4)
    if num_ranks == 1:
        pytest.skip("one rank has no others")
    case = sizes(num_ranks)["tight"]
    first_call = np.full(num_ranks, 1000, np.int32)
    first_call[-1] = 2000
    found = device_backend.run(num_ranks, on_device.stress(case, 8, False, form=form), first_call)
    wrong = dict(zip(CHECKS, found["wrong"].T, strict=True))
    # Where a row goes depends on all ranks' ids.
    assert (wrong["recv_src"] >= 7).all(), wrong
    assert (wrong["tokens"] >= 7).all(), wrong
    assert (wrong["scales"] >= (7 if form.num_scales > 0 else 0)).all(), wrong
    assert (wrong["out"] > 0).all(), wrong


@pytest.mark.once
@pytest.mark.parametrize("top_k", [1, 2])
def test_race(
    device_backend: JaxBackend, record_property: Callable[[str, object], None], top_k: int
) -> None:
    """Nobody sees rows too early or too late. Fails on kernels built with JAX_EP_BREAK_ORDER."""
    backend, num_ranks = device_backend, device_backend.num_devices
    if num_ranks == 1:
        pytest.skip("one rank has nobody to race with")
    on_gpu = backend.platform != "cpu"
    # 32 MB in all to one rank: tens of microseconds, many times what a kernel takes to start.
    race = Race(4096 // num_ranks, 2048, top_k) if on_gpu else Race(24, 64, top_k)
    num_calls, num_programs = (100, 3) if on_gpu else (2 * num_ranks, 2)
    x, wrong = on_device.race_rows(num_ranks, race), np.zeros((num_ranks, len(RACE_CHECKS)), int)
    function = on_device.race(num_ranks, race, num_calls)
    for program in range(num_programs):
        first_call = np.full(num_ranks, program * num_calls, np.int32)
        x, found, _ = backend.run(num_ranks, function, x, first_call)
        wrong += found
    seen = {
        check: count.tolist()
        for check, count in zip(RACE_CHECKS, wrong.T, strict=True)
        if count.any()
    }
    assert not seen, f"stale or early rows, by rank: {seen}"
    x = x.copy()
    x[-1] += 1  # what the last rank's rows of the next time are
    first_call = np.full(num_ranks, num_programs * num_calls, np.int32)
    _, wrong, _ = backend.run(num_ranks, function, x, first_call)
    not_seen = {c for c, n in zip(RACE_CHECKS[1:], wrong[:, 1:].any(axis=0), strict=True) if not n}
    assert not_seen == ({STORED_ON} if top_k == 1 else set()), f"a wrong row was not seen: {wrong}"
    record_property(f"calls, race, K = {top_k}", num_calls * num_programs)
