"""What the verbs check of their arguments: each message names the argument, what came, what to do.

``where`` is the verb, for the message.
"""

import numbers
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep import compat, group, limits
from jax_ep.layout import Layout

Array = jax.Array

ROW_GRANULE = 16  # bytes; rows move in units of it


def as_array(where: str, name: str, value: Any) -> Array:
    """``value``, if it is an array that JAX takes without loss."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        remedy = ". Its tokens are what experts take" if hasattr(value, "tokens") else ""
        raise TypeError(f"{where}: {name} must be an array; got {type(value).__name__}{remedy}")
    if isinstance(value, jax.Array):
        return value
    array = jnp.asarray(value)
    if array.dtype != value.dtype:  # without jax_enable_x64, 64-bit values would lose bits here
        raise TypeError(
            f"{where}: {name} is {value.dtype}, which JAX would narrow to {array.dtype}: cast it "
            f"with {name}.astype({array.dtype.name!r})"
        )
    return array


def positive_int(where: str, name: str, value: Any, remedy: str = "") -> int:
    """``value``, if it is a static int of at least 1; ``remedy`` is told with anything else."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        what = f"{value!r}, a {type(value).__name__}" if isinstance(value, float) else _kind(value)
        raise TypeError(f"{where}: {name} must be a static Python int; got {what}{remedy}")
    if value < 1:
        raise ValueError(f"{where}: {name} must be at least 1; got {value}")
    return int(value)


def aligned_rows(where: str, name: str, value: Any, expert_alignment: int) -> int:
    """``value``, if it is a positive multiple of the alignment; jax_ep has a function ``name``."""
    remedy = f". It counts rows; jax_ep.{name} computes them from a factor over the mean load"
    rows = positive_int(where, name, value, remedy)
    if rows % expert_alignment:
        raise ValueError(
            f"{where}: {name} must be a multiple of expert_alignment = {expert_alignment}; got "
            f"{rows}. jax_ep.{name}(..., expert_alignment={expert_alignment}) computes one"
        )
    return rows


def matrix_shape(where: str, name: str, array: Array, meaning: str) -> tuple[int, int]:
    """The shape of an array with two static axes, neither of them empty."""
    if array.ndim != 2:
        raise ValueError(
            f"{where}: {name} must have shape {meaning}; got {array.shape}. Fold leading axes into "
            "the first with reshape"
        )
    if not all(isinstance(size, int) for size in array.shape):
        raise ValueError(f"{where}: {name} must have a static shape; got {array.shape}")
    if 0 in array.shape:
        raise ValueError(f"{where}: {name} must not be empty; got shape {array.shape}")
    return array.shape[0], array.shape[1]


def expert_ids(where: str, value: Any) -> Array:
    """``value``, if it is topk_idx, int32 [T, K]."""
    topk_idx = as_array(where, "topk_idx", value)
    if topk_idx.dtype != jnp.int32:
        remedy = "cast it with topk_idx.astype(jnp.int32)"
        if not jnp.issubdtype(topk_idx.dtype, jnp.integer):
            remedy = "it takes the ids of experts, jax.lax.top_k's second result"
        raise TypeError(f"{where}: topk_idx must be int32; got {topk_idx.dtype}: {remedy}")
    matrix_shape(where, "topk_idx", topk_idx, "[tokens, k]")
    return topk_idx


def check_row(where: str, name: str, array: Array) -> None:
    """Rows are whole granules."""
    row_bytes = array.shape[1] * array.dtype.itemsize
    if row_bytes % ROW_GRANULE:
        raise ValueError(
            f"{where}: a row of {name} must be a multiple of {ROW_GRANULE} bytes; got "
            f"{array.shape[1]} x {array.dtype} = {row_bytes} bytes. Pad the last axis"
        )


def scales_of_rows(where: str, value: Any, x: Array) -> Array:
    """``value``, if it holds the scales of x's rows."""
    scales = as_array(where, "scales", value)
    if scales.dtype != jnp.float32:
        raise TypeError(
            f"{where}: scales must be float32; got {scales.dtype}: cast them with "
            "scales.astype(jnp.float32)"
        )
    num_tokens, num_channels = x.shape
    blocks = limits.num_block_scales(num_channels)
    num_scales = scales.shape[1] if scales.ndim == 2 else 0
    fits = num_scales > 0 and (num_channels % num_scales == 0 or num_scales == blocks)
    if not fits or scales.shape[0] != num_tokens:
        raise ValueError(
            f"{where}: scales must have shape ({num_tokens}, S), where S divides x's "
            f"{num_channels} channels or is {blocks}, one for each {limits.SCALE_BLOCK} of them; "
            f"got {scales.shape}"
        )
    return scales


def _kind(value: Any) -> str:
    """What ``value`` is, for a message: an array by its type and shape."""
    if isinstance(value, jax.Array):
        return f"an array {value.dtype}{list(value.shape)}"
    return type(value).__name__


def describe(layout: Layout) -> str:
    """A layout, for a message."""
    room = "" if layout.expert_capacity is None else f" with {layout.expert_capacity} rows each"
    return f"{layout.num_experts} experts{room}, {layout.num_ranks} ranks along {layout.axis_name}"


def check_layout(where: str, layout: Layout) -> tuple[int, int]:
    """T and K of a layout whose static data, and whose arrays' shapes, fit in here."""
    if not isinstance(layout, Layout):
        raise TypeError(f"{where}: layout must come from jax_ep.make_layout; got {_kind(layout)}")
    bound = compat.manual_mesh().manual_axes
    unknown = [name for name in layout.axis_name if name not in bound]
    if unknown and bound:
        raise ValueError(
            f"{where}: the layout ({describe(layout)}) was made along an axis {unknown[0]!r} that "
            f"the enclosing jax.shard_map does not have; bound axes: {sorted(bound)}. Make the "
            "layout inside the same shard_map"
        )
    num_ranks = group.group_size(layout.axis_name, where)
    if num_ranks != layout.num_ranks:
        raise ValueError(
            f"{where}: the layout was made for a group of {layout.num_ranks} ranks along "
            f"{layout.axis_name}, but here these axes have {num_ranks}; make the layout inside the "
            "same shard_map"
        )
    ranks_per_node = layout.ranks_per_node
    if ranks_per_node is not None:
        ranks_per_node = positive_int(where, "layout.ranks_per_node", ranks_per_node)
        if num_ranks % ranks_per_node:
            raise ValueError(
                f"{where}: layout.ranks_per_node must divide the group's {num_ranks} ranks; got "
                f"{ranks_per_node}"
            )
    ids_shape = layout.topk_idx.shape
    if len(ids_shape) != 2 or layout.recv_src.shape != (layout.capacity,):
        raise ValueError(
            f"{where}: the layout's arrays must have the shapes of one shard, topk_idx [tokens, k] "
            f"and recv_src [{layout.capacity}]; got {list(ids_shape)} and "
            f"{list(layout.recv_src.shape)}. If it came into shard_map with a leading axis, remove "
            "that: jax.tree.map(lambda a: a[0], layout)"
        )
    num_tokens, top_k = ids_shape
    return num_tokens, top_k


def warn_if_replicated(where: str, topk_idx: Array, axes: tuple[str, ...]) -> None:
    """Warns if JAX knows that the ids are the same on several ranks."""
    mesh = compat.manual_mesh()
    varying = compat.varying_axes(topk_idx)
    shared = tuple(name for name in axes if mesh.shape[name] > 1 and name not in varying)
    if shared and compat.tracks_varying(shared[0]):
        warnings.warn(
            f"{where}: topk_idx is the same on all ranks along {shared}: tokens that are "
            "replicated over axes of the EP group are sent and computed once for each of its "
            "ranks. Shard them over these axes (in_specs), or leave the axes out of axis_name",
            stacklevel=_level_of_user(),
        )


def _level_of_user() -> int:
    """The ``stacklevel``, in a warning of the caller, of the code that called this package."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_globals.get("__package__") == __package__ and frame.f_back is not None:
        frame = frame.f_back
        level += 1
    return level


def as_float32(where: str, name: str, value: Any, shape: tuple[int, ...], meaning: str) -> Array:
    """``value`` as float32, if it has this shape; ``meaning`` is told with another one."""
    value = as_array(where, name, value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{where}: {name} must be floating point; got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{where}: {name} must have shape {shape}; got {value.shape}: {meaning}")
    array: Array = value.astype(jnp.float32)
    return array
