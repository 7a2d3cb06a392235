"""From a mesh to expert-parallel groups: which device is which rank of which group.

The EP group of a device is made of the devices that agree with it in every mesh axis but the EP
axes. A rank is the index along the EP axes, row-major over their tuple; a group is the index over
the other axes, in the mesh's order.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ep import compat

AxisName = str | Sequence[str]


def axis_names(axis_name: AxisName, where: str) -> tuple[str, ...]:
    """``axis_name`` as a tuple of names; ``where`` is for the message."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{where}: axis_name must be the name of a mesh axis or a tuple of names; got "
            f"{axis_name!r}"
        )
    return tuple(names)


def group_size(axis_name: tuple[str, ...], where: str) -> int:
    """R, the number of ranks along ``axis_name``.

    Raises:
        ValueError: if the axes are not bound by an enclosing ``shard_map``, or not all distinct.
        NotImplementedError: if another axis of the mesh is left to the compiler.
    """
    if not axis_name or len(set(axis_name)) != len(axis_name):
        raise ValueError(f"{where}: axis_name must name one or more distinct axes; got {axis_name}")
    mesh = compat.manual_mesh()
    manual = set(mesh.manual_axes)
    unknown = [name for name in axis_name if name not in manual]
    if unknown:
        raise ValueError(
            f"{where}: axis_name {unknown[0]!r} is not an axis of an enclosing jax.shard_map; "
            f"bound axes: {sorted(manual) or 'none'}. Call the operation inside jax.shard_map over "
            "a mesh that has this axis (and list it in axis_names, if that is given)"
        )
    automatic = [n for n in mesh.axis_names if n not in manual and mesh.shape[n] > 1]
    if automatic:
        raise NotImplementedError(
            f"{where}: mesh axis {automatic[0]!r} is left to the compiler (partially manual "
            "shard_map), so its shards cannot be told apart; add it to shard_map's axis_names"
        )
    return math.prod(mesh.shape[name] for name in axis_name)


def other_axes(axis_name: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of ``shard_map`` that number the groups, in the mesh's order."""
    mesh = compat.manual_mesh()
    return tuple(n for n in mesh.axis_names if n not in axis_name and n in mesh.manual_axes)


def coordinates(axis_name: tuple[str, ...]) -> jax.Array:
    """int32 [2]: the index of this device's group, and its rank in the group."""
    others = other_axes(axis_name)
    # Without other axes the group is a constant, but it must vary like the rank does.
    rank = lax.axis_index(axis_name)
    group = lax.axis_index(others) if others else jnp.zeros_like(rank)
    axes = (*axis_name, *others)
    return jnp.stack([compat.vary_over(group, axes), compat.vary_over(rank, axes)])


def members(ctx: Any, axis_name: tuple[str, ...]) -> np.ndarray:
    """int64 [num_groups * R], the devices of all groups in the mesh that ``ctx`` lowers for.

    An entry is ``process << 32 | device id``. Over an abstract mesh the devices are assumed to be
    those with ids 0, 1, 2, .. of one process, in the mesh's order.
    """
    names, devices, shape = compat.lowering_devices(ctx)
    if devices is None:
        codes = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    else:
        flat = [device.process_index << 32 | device.id for device in devices.flat]
        codes = np.array(flat, dtype=np.int64).reshape(shape)
    order = [names.index(n) for n in names if n not in axis_name]
    order += [names.index(n) for n in axis_name]
    return np.ascontiguousarray(codes.transpose(order)).reshape(-1)
