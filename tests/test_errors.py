"""What bad input gets at trace time: an error that names argument, requirement, what came."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import AXIS, BackendLayout, JaxBackend
from bad_calls import CASE, F32, IDS, TRACE_ERRORS, Verb, make, zeros
from jax.sharding import PartitionSpec

import jax_ep

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(scope="module")
def layout(device_backend: JaxBackend) -> BackendLayout:
    return device_backend.make_layout(CASE, IDS)


@pytest.mark.versions
def test_axis_name_of_another_type(device_backend: JaxBackend) -> None:
    for bad in (None, 3, ("ep", 1)):
        message = (
            r"jax_ep\.make_layout: axis_name must be the name of a mesh axis or a tuple of names; "
            rf"got {re.escape(repr(bad))}\. It is the axis that the experts are split over"
        )
        with pytest.raises(TypeError, match=message):
            device_backend.run(
                2, lambda ids, bad=bad: jax_ep.make_layout(ids, num_experts=4, axis_name=bad), IDS
            )


@pytest.mark.versions
@pytest.mark.parametrize(
    ("error", "message", "call"),
    [entry[1:] for entry in TRACE_ERRORS],
    ids=[f"{entry[2].split(':')[0].split(';')[0]}-{entry[0]}" for entry in TRACE_ERRORS],
)
def test_trace_errors(
    device_backend: JaxBackend,
    layout: BackendLayout,
    error: type[Exception],
    message: str,
    call: Verb,
) -> None:
    def refused(ids: Any, layout: Any) -> None:
        call(ids, layout)
        raise AssertionError("it was traced")  # and is not to run: some would fill the memory

    with pytest.raises(error, match=re.escape(message)) as caught:
        device_backend.run(2, refused, IDS, layout.handle)
    assert type(caught.value) is error
    assert str(caught.value).startswith("jax_ep.")


@pytest.mark.versions
def test_int64_ids(device_backend: JaxBackend) -> None:
    message = re.escape(
        "topk_idx must be int32; got int64: cast it with topk_idx.astype(jnp.int32)"
    )
    with jax.enable_x64(True), pytest.raises(TypeError, match=message):
        device_backend.run(2, lambda ids: make(ids), IDS.astype(np.int64))


def test_int64_ids_from_numpy(device_backend: JaxBackend) -> None:
    # Without x64 narrowing makes 2**32 expert 0.
    with pytest.raises(TypeError, match="topk_idx is int64, which JAX would narrow to int32"):
        device_backend.run(2, lambda ids: make(np.full((4, 2), 2**32)), IDS)


@pytest.mark.versions
def test_float64_rows(device_backend: JaxBackend, layout: BackendLayout) -> None:
    x, y = np.zeros((2, 4, 8)), np.zeros((2, 8, 8))
    with jax.enable_x64(True):
        with pytest.raises(TypeError, match=r"x must be one of .* got float64: cast it first"):
            device_backend.run(2, lambda x, lay: jax_ep.dispatch(x, lay), x, layout.handle)
        with pytest.raises(TypeError, match=r"y must be one of .* got float64"):
            device_backend.run(2, lambda y, lay: jax_ep.combine(y, lay), y, layout.handle)


@pytest.mark.versions
@pytest.mark.parametrize("verb", ["make_layout", "dispatch", "combine", "moe"])
def test_outside_shard_map(device_backend: JaxBackend, layout: BackendLayout, verb: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "make_layout": lambda: make(IDS[0]),
        "dispatch": lambda: jax_ep.dispatch(np.zeros((4, 8), F32), layout.handle),
        "combine": lambda: jax_ep.combine(np.zeros((8, 8), F32), layout.handle),
        "moe": lambda: jax_ep.moe(
            np.zeros((4, 8), F32),
            IDS[0],
            np.ones((4, 2), F32),
            lambda tokens, _: tokens,
            num_experts=6,
            axis_name=AXIS,
        ),
    }
    named = "layout_and_dispatch" if verb == "moe" else verb
    message = re.escape(
        f"jax_ep.{named}: axis_name 'ep' is not an axis of an enclosing jax.shard_map; bound axes: "
        "none. Call the operation inside jax.shard_map"
    )
    for call in (calls[verb], lambda: jax.jit(calls[verb])()):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.versions
def test_layout_of_another_group(device_backend: JaxBackend, layout: BackendLayout) -> None:
    # Made on 2 ranks, used on 4.
    doubled = jax.tree.map(lambda a: jnp.concatenate([a, a]), jax.device_get(layout.handle))
    message = (
        r"{}: the layout was made for a group of 2 ranks along \('ep',\), but here these axes have "
        r"4; make the layout inside the same shard_map"
    )
    with pytest.raises(ValueError, match=message.format("dispatch")):
        device_backend.run(4, lambda lay: jax_ep.dispatch(zeros(4, 8), lay), doubled)
    with pytest.raises(ValueError, match=message.format("combine")):
        device_backend.run(4, lambda lay: jax_ep.combine(zeros(8, 8), lay), doubled)


@pytest.mark.versions
def test_layout_of_other_axes(device_backend: JaxBackend, layout: BackendLayout) -> None:
    """Named by the layout's axis, which this mesh does not have."""
    other = dataclasses.replace(layout.handle, axis_name=("dp", "expert"))
    message = re.escape(
        "the layout (6 experts, 2 ranks along ('dp', 'expert')) was made along an axis 'dp' that "
        "the enclosing jax.shard_map does not have; bound axes: ['ep']. Make the layout inside the "
        "same shard_map"
    )
    with pytest.raises(ValueError, match=f"jax_ep.dispatch: {message}"):
        device_backend.run(2, lambda lay: jax_ep.dispatch(zeros(4, 8), lay), other)
    with pytest.raises(ValueError, match=f"jax_ep.combine: {message}"):
        device_backend.run(2, lambda lay: jax_ep.combine(zeros(8, 8), lay), other)


@pytest.mark.versions
def test_two_layouts_in_one_shard_map(device_backend: JaxBackend) -> None:
    """Rows of one in combine with the other: the message says what the layout is."""
    devices = np.array(device_backend.mesh(4).devices).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("dp", AXIS))

    def f(ids: Any) -> Any:
        small = make(ids, expert_alignment=1)
        large = jax_ep.make_layout(ids, num_experts=8, axis_name=("dp", AXIS), capacity=16)
        return jax_ep.combine(jax_ep.dispatch(zeros(4, 8), small).tokens, large)

    spec = PartitionSpec(("dp", AXIS))
    message = "y has 8 rows, but the layout (8 experts, 4 ranks along ('dp', 'ep')) has capacity 16"
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec))(
            np.concatenate([*IDS, *IDS])
        )
