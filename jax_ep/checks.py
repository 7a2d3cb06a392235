"""What the verbs check of their arguments: each message names the argument, what came, what to do.

``where`` is the verb, for the message.
"""

import numbers
import sys
import typing
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep import compat, ffi, group, limits
from jax_ep.layout import Layout, default_capacity

Array = jax.Array
ScaleFormat = Literal["float32", "power_of_two"]

ROW_GRANULE = 16  # bytes; rows move in units of it

FLOATS = ("bfloat16", "float16", "float32")
FLOAT8S = ("float8_e4m3fn", "float8_e5m2")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
PAYLOADS = (*FLOATS, *FLOAT8S, *INTEGERS)
_SCALE_FORMATS = typing.get_args(ScaleFormat)


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


def static_bool(where: str, name: str, value: Any) -> bool:
    """``value``, if it is a static bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{where}: {name} must be a static Python bool; got {_kind(value)}")
    return bool(value)


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
    if layout.overlap:
        limits.check_overlap(where, "layout.num_sms", layout.num_sms)
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


def routing(
    where: str,
    topk_idx: Any,
    *,
    num_experts: Any,
    axis_name: Any,
    capacity: Any,
    expert_alignment: Any,
    expert_capacity: Any,
    num_sms: Any,
    overlap: Any,
) -> tuple[Array, ffi.LayoutSizes]:
    """The ids and the static sizes of a layout, from what ``make_layout`` is given."""
    axes = group.axis_names(axis_name, where)
    num_ranks = group.group_size(axes, where)
    topk_idx = expert_ids(where, topk_idx)
    num_tokens, top_k = topk_idx.shape
    num_experts = positive_int(where, "num_experts", num_experts)
    expert_alignment = positive_int(where, "expert_alignment", expert_alignment)
    limits.check_experts(where, num_experts, num_ranks, f"the {num_ranks} ranks along {axes}")
    if top_k > num_experts:
        raise ValueError(
            f"{where}: topk_idx has k = {top_k} experts per token, but num_experts is {num_experts}"
        )
    limits.check_rows(
        where,
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        expert_alignment=expert_alignment,
    )
    if expert_capacity is not None:
        if capacity is not None:
            raise ValueError(
                f"{where}: give capacity or expert_capacity, not both; got {capacity} and "
                f"{expert_capacity}. expert_capacity alone makes it experts per rank * "
                "expert_capacity"
            )
        expert_capacity = aligned_rows(where, "expert_capacity", expert_capacity, expert_alignment)
        capacity = num_experts // num_ranks * expert_capacity
        limits.check_capacity(where, capacity, num_local_experts=num_experts // num_ranks)
    else:
        if capacity is None:
            capacity = default_capacity(num_tokens, top_k, num_ranks, num_experts, expert_alignment)
        capacity = aligned_rows(where, "capacity", capacity, expert_alignment)
        limits.check_capacity(where, capacity)
    return topk_idx, ffi.LayoutSizes(
        axis_name=axes,
        num_ranks=num_ranks,
        num_experts=num_experts,
        capacity=capacity,
        expert_alignment=expert_alignment,
        expert_capacity=expert_capacity or 0,
        num_sms=_sms(where, num_sms, overlap=static_bool(where, "overlap", overlap)),
        overlap=bool(overlap),
    )


def _sms(where: str, num_sms: Any, *, overlap: bool) -> int:
    """The SMs of a layout's calls; 0 for all."""
    if num_sms is None:
        return limits.OVERLAP_SMS if overlap else 0
    most = positive_int(where, "num_sms", num_sms)
    if overlap:
        limits.check_overlap(where, "num_sms", most)
    return most


def rows_to_send(
    where: str,
    x: Any,
    topk_weights: Any,
    *,
    ids_shape: tuple[int, ...],
    made_of: str,
    fp8: str | None,
    dequantize: bool,
    expand: bool,
    scales: Any,
) -> tuple[Array, Array | None, Array | None, ffi.RowForm]:
    """x, its scales, topk_weights and how rows cross, from what ``dispatch`` is given.

    ``made_of`` says, for the message, what has tokens of ``ids_shape`` [tokens, k].
    """
    x = as_array(where, "x", x)
    if x.dtype.name not in PAYLOADS:
        raise TypeError(
            f"{where}: x must be one of {', '.join(PAYLOADS)}; got {x.dtype}: "
            f"{_remedy_for_payload(x.dtype)}"
        )
    rows, _ = matrix_shape(where, "x", x, "[tokens, hidden]")
    if rows != ids_shape[0]:
        raise ValueError(f"{where}: x has {rows} tokens, but {made_of} for {ids_shape[0]}")
    check_row(where, "x", x)
    scales = _float8_scales(where, x, fp8, dequantize, scales)
    if topk_weights is not None:
        topk_weights = as_float32(
            where, "topk_weights", topk_weights, ids_shape, "one for each id of topk_idx"
        )
    quantization = ffi.QUANTIZATIONS[fp8] if scales is None else ffi.GIVEN_SCALES
    return (
        x,
        scales,
        topk_weights,
        ffi.RowForm(quantization, dequantize, static_bool(where, "expand", expand)),
    )


def _float8_scales(
    where: str, x: Array, fp8: str | None, dequantize: bool, scales: Array | None
) -> Array | None:
    """Checks how rows cross as float8; returns the scales that they come with."""
    if scales is not None:
        if fp8 is not None or dequantize:
            raise ValueError(
                f"{where}: rows that come with scales are passed on as they are; leave out fp8 and "
                "dequantize"
            )
        if x.dtype.name not in FLOAT8S:
            raise TypeError(
                f"{where}: scales need x in {' or '.join(FLOAT8S)}; got {x.dtype}. To quantise it "
                'on the way pass fp8="float32" or fp8="power_of_two" instead'
            )
        return scales_of_rows(where, scales, x)
    if fp8 is None:
        if dequantize:
            raise ValueError(f'{where}: dequantize=True needs fp8="float32" or fp8="power_of_two"')
        return None
    if fp8 not in _SCALE_FORMATS:
        raise ValueError(f"{where}: fp8 must be one of {list(_SCALE_FORMATS)}; got {fp8!r}")
    if x.dtype.name not in FLOATS:
        remedy = ": pass rows that are float8 with their scales" if x.dtype.name in FLOAT8S else ""
        raise TypeError(
            f"{where}: fp8 needs x in one of {', '.join(FLOATS)}; got {x.dtype}{remedy}"
        )
    num_channels = x.shape[1]
    if num_channels % ROW_GRANULE:  # a byte each
        raise ValueError(
            f"{where}: fp8 needs a hidden size that is a multiple of {ROW_GRANULE}; got "
            f"{num_channels}. Pad the last axis"
        )
    return None


def _remedy_for_payload(dtype: Any) -> str:
    """What to do with rows of a type that ``dispatch`` does not send."""
    if dtype.name.startswith(("int", "uint", "float", "bfloat")):
        # jnp.iinfo and finfo know the bits of those that NumPy holds in a byte each.
        bits = (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits
        if bits < 8 and 8 % bits == 0:
            return (
                f"pack {8 // bits} of them into a byte with jax.lax.bitcast_convert_type, as "
                'docs/guide.md shows under "Narrow rows"'
            )
        if bits == 8:
            return "send its bytes, jax.lax.bitcast_convert_type(x, jnp.uint8), and cast them back"
    return "cast it first"


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
