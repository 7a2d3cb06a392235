"""From a mesh to expert-parallel groups: which device is which rank of which group.

The EP group of a device is made of the devices that agree with it in every mesh axis but the EP
axes. A rank is the index along the EP axes, row-major over their tuple; a group is the index over
the other axes, in the mesh's order.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from jax_ep import compat

AxisName = str | Sequence[str]


def axis_names(axis_name: AxisName, where: str) -> tuple[str, ...]:
    """``axis_name`` as a tuple of names; ``where`` is for the message."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{where}: axis_name must be the name of a mesh axis or a tuple of names; got "
            f"{axis_name!r}. It is the axis that the experts are split over; on one device, an "
            "axis of size 1 of the enclosing jax.shard_map's mesh"
        )
    return tuple(names)


def group_size(axis_name: tuple[str, ...], where: str) -> int:
    """R, the number of ranks along ``axis_name``.

    Raises:
        ValueError: if the axes are not bound by an enclosing ``shard_map``, or not all distinct.
        NotImplementedError: if another axis of the mesh is Explicit and not manual here.
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
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = [n for n in automatic_axes() if types[n] == AxisType.Explicit]
    if explicit:
        raise NotImplementedError(
            f"{where}: mesh axis {explicit[0]!r} is Explicit, and the enclosing jax.shard_map is "
            f"manual over {sorted(manual)} alone: where jax.vmap maps over the axis "
            "(spmd_axis_name), make the mesh with AxisType.Auto for it and leave axis_names out; "
            "else add it to shard_map's axis_names (or leave them out), or make it Auto"
        )
    return math.prod(mesh.shape[name] for name in axis_name)


def automatic_axes() -> tuple[str, ...]:
    """The axes that the enclosing ``shard_map`` leaves to the compiler."""
    mesh = compat.manual_mesh()
    return tuple(n for n in mesh.axis_names if n not in mesh.manual_axes and mesh.shape[n] > 1)


def other_axes(axis_name: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of ``shard_map`` that number the groups, in the mesh's order."""
    mesh = compat.manual_mesh()
    return tuple(n for n in mesh.axis_names if n not in axis_name and n in mesh.manual_axes)


def coordinates(ctx: Any, axis_name: tuple[str, ...]) -> Any:
    """int32 [2] in the program that ``ctx`` lowers: this device's group, and its rank in it."""
    names, _, shape = compat.mesh_devices(compat.lowering_mesh(ctx))
    sizes = dict(zip(names, shape, strict=True))

    def index(axes: Sequence[str]) -> jax.Array:
        result = jnp.zeros((), jnp.int32)
        for axis in axes:
            if sizes[axis] > 1:
                result = result * sizes[axis] + lax.axis_index(axis)
        return result

    others = [name for name in names if name not in axis_name]
    (pair,) = compat.lower_on_axes(
        ctx, sizes, lambda: [jnp.stack([index(others), index(axis_name)])]
    )
    return pair


@dataclasses.dataclass(frozen=True)
class Members:
    """The devices of all groups of a mesh: group by group, ranks ascending.

    A device is one number, ``process << 32 | id``. The i-th one is written as a number of mixed
    radix: its digits are d with ``i = (.. (b * sizes[0] + d[0]) * sizes[1] + ..) + d[-1]``, and it
    is ``bases[b] + sum(d * strides)``. So the size follows the mesh's shape: a mesh whose devices
    are in order, or transposed, split or reversed along axes, has one base, whatever their number.
    Devices in no order have a base each.

    Attributes:
        bases: int64.
        sizes: of the digits, all above 1.
        strides: of the digits.
        across_processes: whether a group has ranks in more than one process.
    """

    bases: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    across_processes: bool

    @property
    def attributes(self) -> dict[str, np.ndarray]:
        """As the custom calls carry it (xla_ffi/groups.h)."""
        lists = {"bases": self.bases, "sizes": self.sizes, "strides": self.strides}
        return {f"member_{name}": np.array(values, np.int64) for name, values in lists.items()}


def members(ctx: Any, axis_name: tuple[str, ...]) -> Members:
    """The groups' devices in the mesh that ``ctx`` lowers for.

    Over an abstract mesh the devices are assumed to be those with ids 0, 1, 2, .. of one process,
    in the mesh's order.
    """
    return _members_of_mesh(compat.lowering_mesh(ctx), axis_name)


@functools.lru_cache(maxsize=256)  # not once a call: it looks at every device
def _members_of_mesh(mesh: Any, axis_name: tuple[str, ...]) -> Members:
    numbers = numbers_by_group(mesh, axis_name)
    processes = numbers >> 32
    return Members(
        *mixed_radix(numbers.reshape(-1)),
        across_processes=bool((processes != processes[:, :1]).any()),
    )


def numbers_by_group(mesh: Any, axis_name: tuple[str, ...]) -> np.ndarray:
    """The devices' numbers (see ``Members``), int64 [groups, R]."""
    names, devices, shape = compat.mesh_devices(mesh)
    if devices is None:
        numbers = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    else:
        flat = [device.process_index << 32 | device.id for device in devices.flat]
        numbers = np.array(flat, dtype=np.int64).reshape(shape)
    order = [names.index(n) for n in names if n not in axis_name]
    order += [names.index(n) for n in axis_name]
    num_ranks = math.prod(shape[names.index(n)] for n in axis_name)
    return numbers.transpose(order).reshape(-1, num_ranks)


def mixed_radix(numbers: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Bases, sizes and strides of ``numbers`` (see ``Members``), as few as there are."""
    sizes: list[int] = []
    strides: list[int] = []
    while len(numbers) > 1:
        stride = numbers[1] - numbers[0]
        # Blocks whose elements follow one another by this stride: all breaks lie between blocks. If
        # two sizes of blocks will do, then so does their least common multiple: take the largest.
        breaks = np.flatnonzero(np.diff(numbers) != stride) + 1
        size = math.gcd(len(numbers), *breaks.tolist())
        if size == 1:
            break
        sizes.insert(0, size)
        strides.insert(0, int(stride))
        numbers = numbers[::size]
    return tuple(numbers.tolist()), tuple(sizes), tuple(strides)
