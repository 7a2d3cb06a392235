"""What the scenarios call: the verbs on a mesh over all processes, their data, the oracle."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import reference

NUM_TOKENS, TOP_K, HIDDEN = 24, 3, 128


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...], order: Any = None) -> Mesh:
    devices = np.array(jax.devices())
    if order is not None:
        devices = devices[np.asarray(order)]
    return Mesh(devices.reshape(shape), names)


def put(mesh: Mesh, array: np.ndarray, spec: P) -> jax.Array:
    """The array, made global: every process has all of it and gives its shards."""
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )


def per_shard(mesh: Mesh, f: Callable[..., Any]) -> Callable[..., Any]:
    """Jits `f` of shards without the leading axis, which is over all axes of the mesh."""

    def body(*arrays: Any) -> Any:
        return jax.tree.map(lambda a: a[None], f(*(a[0] for a in arrays)))

    spec = P(mesh.axis_names)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def local_parts(tree: Any) -> Iterator[tuple[str, int, np.ndarray]]:
    """(name, index along the leading axis, data) of what this process has of each global array."""
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        for shard in array.addressable_shards:
            data = np.asarray(shard.data)
            if data.dtype.itemsize != 4:  # bfloat16 and float8 cannot be saved as they are
                data = data.view(f"u{data.dtype.itemsize}")
            yield jax.tree_util.keystr(path), shard.index[0].start or 0, data[0]


def example(
    mesh: Mesh, num_ranks: int, seed: int = 0, num_tokens: int = NUM_TOKENS
) -> tuple[np.ndarray, ...]:
    """ids, x bf16, weights, and a cotangent, for every device of the mesh."""
    rng = np.random.default_rng(seed)
    shape = (mesh.size, num_tokens)
    ids = np.argsort(rng.random((*shape, 2 * num_ranks)), -1)[..., :TOP_K].astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    ids[0, 0, 0] = 10**6  # invalid
    x = rng.standard_normal((*shape, HIDDEN)).astype(ml_dtypes.bfloat16)
    weights = rng.random((*shape, TOP_K)).astype(np.float32)
    g = rng.standard_normal((*shape, HIDDEN)).astype(ml_dtypes.bfloat16)
    return ids, x, weights, g


def layer_and_data(
    num_tokens: int = NUM_TOKENS,
) -> tuple[Callable[..., Any], list[jax.Array], np.ndarray]:
    """Two jitted layers in one program, their data, and one result to know it by."""
    mesh = make_mesh((len(jax.devices()),), ("ep",))
    data = example(mesh, mesh.size, num_tokens=num_tokens)

    @jax.jit
    def layer(ids: Any, x: Any, weights: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=2 * mesh.size, axis_name="ep")
        recv = jax_ep.dispatch(x, layout, weights)
        return jax_ep.combine(recv.tokens, layout, recv.weights), recv.tokens, layout.recv_src

    def both(ids: Any, x: Any, weights: Any) -> Any:
        return layer(ids, x, weights), layer(ids[::-1], x * 3, weights)

    arrays = [put(mesh, array, P("ep")) for array in data[:3]]
    return per_shard(mesh, both), arrays, data[0]


def check_pair(got: Any, ids: np.ndarray) -> None:
    ids = np.where(ids >= 2 * len(ids), -1, ids)
    for (_, _, recv_src), expected in zip(got, (ids, ids[:, ::-1]), strict=True):
        layout = reference.make_layout(expected, num_experts=2 * len(ids))
        for shard in recv_src.addressable_shards:
            rank = shard.index[0].start or 0
            np.testing.assert_array_equal(np.asarray(shard.data)[0], layout.recv_src[rank])
