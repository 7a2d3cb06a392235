"""Programs of random calls that check themselves (on_device.py), run until there were enough.

How long it goes on is set by JAX_EP_TEST_CALLS (of all stress tests of a session together) and
JAX_EP_TEST_SECONDS (for each; what was begun is ended).
"""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import on_device
import pytest
from backends import AXIS, JaxBackend
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from on_device import CHECKS, NOT_YET, Kind

NUM_CALLS = int(os.environ.get("JAX_EP_TEST_CALLS", "80"))
SECONDS = float(os.environ.get("JAX_EP_TEST_SECONDS", "1e9"))
CALLS_AT_ONCE = 500  # in one program


def program(
    mesh: Mesh, backend: JaxBackend, kinds: tuple[Kind, ...], num_calls: int, late: bool
) -> Callable[[int], Any]:
    """Makes so many calls from that number on; counts come as NumPy arrays of all ranks."""
    num_devices, axes = mesh.size, mesh.axis_names
    function = on_device.stress(kinds, num_calls, late, axes)

    def shard(first_call: jax.Array) -> Any:
        return jax.tree.map(lambda a: a[None], function(first_call[0]))

    run = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P(axes), out_specs=P(axes)))

    def calls_from(first_call: int) -> Any:
        first_calls = np.full(num_devices, first_call, np.int32)
        placed = jax.make_array_from_callback(
            first_calls.shape, NamedSharding(mesh, P(axes)), first_calls.__getitem__
        )
        return backend.fetch(num_devices, jax.block_until_ready(run(placed)))

    return calls_from


def check(
    request: pytest.FixtureRequest,
    backend: JaxBackend,
    name: str,
    kinds: tuple[Kind, ...],
    late: bool,
    mesh: Mesh | None = None,
) -> None:
    """Makes this test's share of the calls, and asserts that none was wrong.

    Args:
        request: of the test, which is named `test_random_calls`; what was done is recorded there.
        backend: that makes the calls.
        name: of the kinds together.
        kinds: of calls.
        late: whether ranks come late, or calls queue as fast as it goes.
        mesh: of all devices; along AXIS if not given.
    """
    if mesh is None:
        mesh = Mesh(np.array(backend.devices()), (AXIS,))
    wanted = -(-NUM_CALLS // _num_chosen(request))
    at_once = min(wanted, CALLS_AT_ONCE)
    calls_from = program(mesh, backend, kinds, at_once, late)
    start, num_done, num_calls = time.monotonic(), 0, np.zeros(len(kinds), int)
    while num_done < wanted and backend.agree(time.monotonic() - start < SECONDS):
        found = calls_from(num_done)
        wrong = {
            f"{kinds[number].name} {check}".strip(): found["wrong"][:, number, i].tolist()
            for number in range(len(kinds))
            for i, check in enumerate(CHECKS)
            if found["wrong"][:, number, i].any()
        }
        assert not wrong, (
            f"wrong calls by rank: {wrong}, of {at_once} from call {num_done} on; the first by "
            f"rank: {np.where(found['first_wrong'] == NOT_YET, -1, found['first_wrong'])}"
        )
        assert (found["calls"] == found["calls"][0]).all()
        num_calls += found["calls"][0]
        num_done += int(found["calls"][0].sum())
    late_text = ", late ranks" if late else ""
    record = request.node.user_properties.append
    record((f"calls, {name}{late_text}", num_done))
    if len(kinds) > 1:
        counts = (f"{kind.name}: {n}" for kind, n in zip(kinds, num_calls, strict=True))
        record((f"of them{late_text}", ", ".join(counts)))


def _num_chosen(request: pytest.FixtureRequest) -> int:
    """How many tests share the calls: those of this one that `-k` has left on this backend."""
    backend = request.node.callspec.params["device_backend"]
    return sum(
        getattr(item, "originalname", None) == "test_random_calls"
        and item.callspec.params["device_backend"] == backend
        for item in request.session.items
    )
