"""Many random calls and races of reader and writer, made and checked on the devices.

How long it goes on random_calls.py says. On CPU a few calls show that the checks themselves are
right; tests/gpu/run_tiers.py asks for many.
"""

from collections.abc import Callable

import numpy as np
import on_device
import pytest
import random_calls
from backends import JaxBackend
from jax.sharding import Mesh
from on_device import CHECKS, EXPANDED, RACE_CHECKS, STORED_ON, Form, Kind, Race
from routings import Case
from test_groups import mesh_shape


def sizes(num_ranks: int) -> dict[str, Case]:
    """Some that drop rows and some that do not."""
    rows = 16 * 4  # T * K of "tight"
    return {
        "tight": Case(num_ranks, 16, 4, 4 * num_ranks, hidden=32, capacity=rows),
        "one token": Case(num_ranks, 1, 2, 2 * num_ranks, hidden=8),
        "aligned": Case(
            num_ranks, 33, 4, 4 * num_ranks, hidden=136, capacity=192, expert_alignment=16
        ),
        "own room": Case(num_ranks, 24, 4, 4 * num_ranks, hidden=32, expert_capacity=24),
        "wide": Case(num_ranks, 5, 4, 4 * num_ranks, hidden=1016),
        "many tokens": Case(num_ranks, 520, 1, 2 * num_ranks, hidden=8),  # too many for slots
    }


# Not expanded, no receiver is between what peers wrote and the kernel after. Two scales are stored
# in words of four bytes, not by the copy engine.
NOT_EXPANDED, TWO_SCALES = Form(expand=False), Form(num_scales=2)
IN_ONE = Form(in_one=True)
FOUR_SCALES = Form(num_scales=4, in_one=True)  # as many as slots take, which take no two
GAPS_AND_SCALES = Form(expand=False, num_scales=4, in_one=True)
X, Y = "x", "y"  # axes of a mesh with groups along either, and of all devices


def kinds(name: str, num_devices: int, on_gpu: bool) -> tuple[Kind, ...]:
    """Calls of the sizes of that name, or of "mixed" ones.

    These are, with slots, calls in them of all sizes and forms, between calls that are not: of
    `make_layout` and `dispatch`, of too many tokens, of float8 rows with two scales; in groups of
    all devices, and along either axis of the mesh. Without a GPU sizes are left out that show
    nothing more there.
    """
    of_all = sizes(num_devices)
    if name != "mixed":
        size, form, num_sms = ALONE[name]
        return (Kind(of_all[size], form, num_sms),)
    both = (X, Y)
    found = [
        Kind(of_all["tight"], IN_ONE, axes=both, name="in one"),
        Kind(of_all["own room"], Form(expand=False, in_one=True), axes=both, name="own room"),
    ]
    for axis, num_ranks in zip(both, mesh_shape(num_devices), strict=True):
        found.append(Kind(sizes(num_ranks)["tight"], IN_ONE, axes=(axis,), name=f"along {axis}"))
    if on_gpu:
        found += [
            Kind(of_all["many tokens"], IN_ONE, axes=both, name="many tokens"),
            Kind(of_all["tight"], Form(num_scales=2, in_one=True), axes=both, name="two scales"),
            Kind(of_all["tight"], FOUR_SCALES, axes=both, name="four scales"),
            Kind(of_all["own room"], GAPS_AND_SCALES, axes=both, name="four scales, not expanded"),
            Kind(of_all["one token"], IN_ONE, axes=both, name="one token"),
            Kind(of_all["tight"], EXPANDED, axes=both, name="in two"),
            Kind(of_all["aligned"], IN_ONE, num_sms=8, axes=both, name="aligned"),
            Kind(of_all["wide"], IN_ONE, axes=both, name="wide"),
        ]
    return tuple(found)


# By name: sizes, what dispatch is asked for, SMs of a call where that can be said.
ALONE: dict[str, tuple[str, Form, int | None]] = {
    "tight": ("tight", EXPANDED, None),
    "aligned": ("aligned", EXPANDED, 8),
    "not_expanded": ("tight", NOT_EXPANDED, None),
    "two_scales": ("tight", TWO_SCALES, None),
}

# (name, whether ranks come late, or calls queue as fast as it goes)
STRESS = [
    ("tight", False),
    ("aligned", True),
    ("not_expanded", True),
    ("two_scales", False),
    ("mixed", False),
    ("mixed", True),
]


@pytest.mark.parametrize(
    ("name", "late"), STRESS, ids=[f"{n}_{'late' if late else 'queued'}" for n, late in STRESS]
)
def test_random_calls(
    device_backend: JaxBackend, request: pytest.FixtureRequest, name: str, late: bool
) -> None:
    backend, num_devices = device_backend, device_backend.num_devices
    if name == "mixed" and not late and backend.platform == "cpu":
        pytest.skip("on CPU calls do not queue: with late ranks it is the same")
    if name == "aligned" and backend.platform == "cpu":
        pytest.skip("on CPU no call has a number of SMs, and padding is not treated in its own way")
    mesh = None
    if name == "mixed":
        mesh = Mesh(np.array(backend.devices()).reshape(mesh_shape(num_devices)), (X, Y))
    of_kind = kinds(name, num_devices, backend.platform != "cpu")
    random_calls.check(request, backend, name, of_kind, late, mesh)


@pytest.mark.parametrize("form", [EXPANDED, NOT_EXPANDED, TWO_SCALES], ids=str)
def test_a_wrong_call_would_be_seen(device_backend: JaxBackend, form: Form) -> None:
    """The last rank is told of other calls than the rest: whatever depends on others is wrong."""
    num_ranks = min(device_backend.num_devices, 4)
    if num_ranks == 1:
        pytest.skip("one rank has no others")
    kind = Kind(sizes(num_ranks)["tight"], form)
    first_call = np.full(num_ranks, 1000, np.int32)
    first_call[-1] = 2000
    found = device_backend.run(num_ranks, on_device.stress((kind,), 8, False), first_call)
    wrong = dict(zip(CHECKS, found["wrong"][:, 0].T, strict=True))
    # Where a row goes depends on all ranks' ids.
    assert (wrong["recv_src"] >= 7).all(), wrong
    assert (wrong["tokens"] >= 7).all(), wrong
    assert (wrong["scales"] >= (7 if form.num_scales > 0 else 0)).all(), wrong
    assert (wrong["out"] > 0).all(), wrong


@pytest.mark.parametrize(
    ("top_k", "in_one"), [(1, False), (2, False), (2, True)], ids=["1", "2", "2_in_one"]
)
def test_race(
    device_backend: JaxBackend,
    record_property: Callable[[str, object], None],
    top_k: int,
    in_one: bool,
) -> None:
    """Nobody sees rows too early or too late. Fails on kernels built with JAX_EP_BREAK_ORDER."""
    backend, num_ranks = device_backend, device_backend.num_devices
    if num_ranks == 1:
        pytest.skip("one rank has nobody to race with")
    on_gpu = backend.platform != "cpu"
    # 32 MB in all to one rank: tens of microseconds, many times what a kernel takes to start.
    race = Race(4096 // num_ranks, 2048, top_k) if on_gpu else Race(24, 64, top_k, in_one)
    if on_gpu and in_one:  # 2 MB of each rank, which fits slots
        race = Race(512, 1024, top_k, in_one)
    num_calls, num_programs = (100, 8) if on_gpu else (2 * num_ranks, 2)
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
    record_property(
        f"calls, race, K = {top_k}{', in one' if in_one else ''}", num_calls * num_programs
    )


def test_nobody_runs_ahead(
    device_backend: JaxBackend, record_property: Callable[[str, object], None]
) -> None:
    """A rank that sends and receives nothing waits for those who have yet to read."""
    backend, num_ranks = device_backend, device_backend.num_devices
    if num_ranks == 1:
        pytest.skip("one rank is never ahead")
    on_gpu = backend.platform != "cpu"
    sizes = Race(256, 1024, 1) if on_gpu else Race(24, 64, 1)
    num_turns = 100 if on_gpu else 2 * num_ranks
    function = on_device.ahead(num_ranks, sizes, num_turns)
    zero, too_new = np.zeros(num_ranks, np.int32), np.zeros(num_ranks, np.int32)
    wrong = backend.run(num_ranks, function, zero, zero)
    assert not wrong.any(), f"wrong rows, by rank: {wrong}"
    too_new[-1] = 1
    wrong = backend.run(num_ranks, function, zero, too_new)
    assert wrong[:-1].all(), f"a wrong row was not seen: {wrong}"
    num_calls = num_turns * on_device.CALLS_OF_A_TURN
    record_property("calls to a late rank that gives nothing back", num_calls)
