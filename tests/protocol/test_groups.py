"""Groups follow the mesh: each of its axes, several at once, any order of devices, side by side."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from backends import JaxBackend
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray
from routings import assert_same_bits

import jax_ep
from jax_ep import reference

AXES: tuple[Any, ...] = ("x", "y", ("y", "x"))  # the group of each layer
IN_ONE = ("x", ("y", "x"))  # by layout_and_dispatch: on GPUs in slots, if there are any
TOKENS, TOP_K, HIDDEN = 24, 3, 16
EXPERTS_PER_RANK = 3  # at least TOP_K, for groups of one
ROUNDS = 3
SPEC = P(("x", "y"))


def orders(num_devices: int) -> Iterator[list[int]]:
    """Of the devices in a mesh: ascending, descending, even ones first."""
    ascending = list(range(num_devices))
    yield ascending
    yield ascending[::-1]
    yield ascending[::2] + ascending[1::2]


def mesh_shape(num_devices: int) -> tuple[int, int]:
    return (2, num_devices // 2) if num_devices % 2 == 0 else (1, num_devices)


def groups(num_devices: int) -> list[NDArray[np.int64]]:
    """Of each layer, the places in the mesh of each group's ranks, in their order."""
    places = np.arange(num_devices).reshape(mesh_shape(num_devices))
    return [places.T, places, places.T.reshape(1, -1)]


def layers(data: Any) -> Any:
    """One layer for each of AXES, on one device's data."""
    results = []
    for axes, (ids, x, weights) in zip(AXES, jax.tree.map(lambda a: a[0], data), strict=True):
        options = {"num_experts": EXPERTS_PER_RANK * jax.lax.axis_size(axes), "axis_name": axes}
        if axes in IN_ONE:
            layout, recv = jax_ep.layout_and_dispatch(x, ids, weights, **options)
        else:
            layout = jax_ep.make_layout(ids, **options)
            recv = jax_ep.dispatch(x, layout, weights)
        out = jax_ep.combine(recv.tokens, layout, recv.weights)
        results.append((layout.recv_src, recv.tokens, recv.weights, out))
    return jax.tree.map(lambda a: a[None], results)


def make_data(rng: np.random.Generator, num_devices: int) -> Any:
    """(ids, x, weights) of each layer, by place in the mesh; a few ids are routed nowhere."""
    data = []
    for of_layer in groups(num_devices):
        shape = num_devices, TOKENS, TOP_K
        ids = rng.integers(-1, EXPERTS_PER_RANK * of_layer.shape[1], shape, np.int32)
        x = rng.standard_normal((num_devices, TOKENS, HIDDEN), np.float32)
        data.append((ids, x, rng.random(shape, np.float32)))
    return data


def expected(layer: int, data: Any, num_devices: int) -> Any:
    """What the oracle makes of a layer, by place in the mesh."""
    ids, x, weights = data[layer]
    of_place: dict[int, Any] = {}
    for places in groups(num_devices)[layer]:
        layout = reference.make_layout(ids[places], num_experts=EXPERTS_PER_RANK * len(places))
        tokens, recv_weights = reference.dispatch(x[places], layout, weights[places])
        out = reference.combine(tokens, layout, recv_weights)
        arrays = layout.recv_src, tokens, recv_weights, out
        of_place |= {p: [a[rank] for a in arrays] for rank, p in enumerate(places.tolist())}
    return [
        np.stack(arrays) for arrays in zip(*(of_place[p] for p in range(num_devices)), strict=True)
    ]


@pytest.mark.versions
def test_groups(device_backend: JaxBackend) -> None:
    """Layers over one axis, the other, and both swapped, in programs of three meshes by turns."""
    backend, num_devices = device_backend, device_backend.num_devices
    programs = []
    for order in orders(num_devices):
        devices = np.array([backend.devices()[i] for i in order])
        mesh = Mesh(devices.reshape(mesh_shape(num_devices)), ("x", "y"))
        run = jax.jit(jax.shard_map(layers, mesh=mesh, in_specs=SPEC, out_specs=SPEC))
        programs.append((order, NamedSharding(mesh, SPEC), run))
    rng = np.random.default_rng(5)
    for _ in range(ROUNDS):
        for order, sharding, run in programs:
            data = make_data(rng, num_devices)
            placed = jax.tree.map(
                lambda a, s=sharding: jax.make_array_from_callback(a.shape, s, a.__getitem__), data
            )
            results = backend.fetch(num_devices, jax.block_until_ready(run(placed)))
            if backend.name == "processes":  # which fetches by device
                results = jax.tree.map(lambda a, o=order: a[o], results)
            for layer, arrays in enumerate(results):
                for actual, wanted in zip(arrays, expected(layer, data, num_devices), strict=True):
                    assert_same_bits(actual, wanted)
