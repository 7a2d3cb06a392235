"""Gradients of the verbs, built from the verbs.

Moving rows is linear, and the transpose of spreading rows is collecting them:

    spread :  x [T, H], w [T, K]  ->  rows [C, H], row_w [C]      (dispatch)
    collect:  y [C, H], v [C]     ->  out [T, H], v at (t, k)     (combine without weights)

Each is the other's backward rule, so gradients of any order exist and no backward pass exchanges
metadata. ``expand`` says which rows: those of experts, one per (token, k), or one per (token, rank)
and one of zeros, [R * T + 1, H]; row_w and v are by expert row in either case.

The weighted combine has a rule of its own: its cotangent's rows, spread, times weights and times y.
On CUDA that is one call, which does it while rows arrive; the backward rule of that call is the one
of the same in two steps, spread and arithmetic. Forward mode raises JAX's own error.

Integer rows, float8 rows and their scales have no gradient; the weights beside them still have one.
JAX has no tangents of integers. It has some of float8, in float8: too coarse for a sum of them to
mean anything, so to differentiate through such rows is a TypeError.
"""

import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from jax_ep import ffi, limits
from jax_ep.layout import Layout

Array = jax.Array
Pair = tuple[Array, Array | None]


def dispatch(
    layout: Layout, x: Array, scales: Array | None, weights: Array | None, form: ffi.RowForm
) -> ffi.Rows:
    """Rows, scales and weights."""
    if form.has_scales or _is_float8(x):
        x, scales = without_gradient("jax_ep.dispatch", (x, scales))
    return spread(form, layout, x, scales, weights)


def layout_and_dispatch(
    topk_idx: Array,
    x: Array,
    scales: Array | None,
    weights: Array | None,
    sizes: ffi.LayoutSizes,
    form: ffi.RowForm,
    *,
    zero_tail: bool,
) -> tuple[ffi.LayoutTables, ffi.Rows]:
    """A layout's tables, and the rows: constants to autodiff until ``received`` takes them."""
    x, scales, weights = jax.tree.map(lax.stop_gradient, (x, scales, weights))
    return ffi.bind_layout_and_dispatch(
        x, topk_idx, scales, weights, sizes, form, zero_tail=zero_tail
    )


def received(
    layout: Layout,
    x: Array,
    scales: Array | None,
    weights: Array | None,
    rows: ffi.Rows,
    form: ffi.RowForm,
) -> ffi.Rows:
    """``rows``, those of the other arguments' dispatch, as ``dispatch`` gives them."""
    if form.has_scales or _is_float8(x):
        x, scales = without_gradient("jax_ep.layout_and_dispatch", (x, scales))
    fixed_x, fixed_scales, fixed_weights = jax.tree.map(lax.stop_gradient, (x, scales, weights))
    rows = ffi.bind_received(fixed_x, layout, fixed_scales, fixed_weights, form, rows)
    return spread_before(form, layout, x, scales, weights, rows)


def _is_float8(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 1


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def without_gradient(where: str, arrays: Pair) -> Pair:
    """The arrays; to differentiate through them is an error."""
    return arrays


@without_gradient.defjvp
def _refuse_jvp(where: str, *_: object) -> NoReturn:
    raise TypeError(
        f"{where} was differentiated where it has no gradient: float8 rows and their scales "
        'are for inference. For training pass x in bfloat16, float16 or float32 with fp8="float32" '
        'or fp8="power_of_two" and dequantize=True: its rows cross as float8, and the gradient is '
        "that of the exact dispatch. Where no gradient is wanted, pass jax.lax.stop_gradient(x)"
    )


def combine(layout: Layout, y: Array, weights: Array | None) -> Array:
    """Sums of each token's rows. Without weights y is not kept for the backward pass."""
    if weights is None:
        return collect(True, layout, y, None)[0]
    out: Array = combine_weighted(layout, y, weights)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread(
    form: ffi.RowForm, layout: Layout, x: Array, scales: Array | None, weights: Array | None
) -> ffi.Rows:
    """Rows, scales and weights to their experts."""
    return ffi.bind_dispatch(x, layout, scales, weights, form)


def _spread_fwd(
    form: ffi.RowForm, layout: Layout, x: Array, scales: Array | None, weights: Array | None
) -> tuple[ffi.Rows, Layout]:
    return spread(form, layout, x, scales, weights), layout


def _spread_bwd(
    form: ffi.RowForm, layout: Layout, cotangents: ffi.Rows
) -> tuple[None, Array | None, None, Array | None]:
    d_tokens, _, d_weights = cotangents
    if d_tokens.dtype.itemsize > 1:
        d_x, d_topk_weights = collect(form.expand, layout, d_tokens, d_weights)
        return None, d_x, None, d_topk_weights
    # float0 of integer rows, or float8.
    if d_weights is None:
        return None, None, None, None
    no_rows = jnp.broadcast_to(jnp.zeros_like(d_weights)[:, None], (layout.capacity, 4))
    return None, None, None, collect(True, layout, no_rows, d_weights)[1]


spread.defvjp(_spread_fwd, _spread_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread_before(
    form: ffi.RowForm,
    layout: Layout,
    x: Array,
    scales: Array | None,
    weights: Array | None,
    rows: ffi.Rows,
) -> ffi.Rows:
    """``spread`` of x, scales and weights where ``rows`` are what it gives, from a call before."""
    return rows


def _spread_before_fwd(
    form: ffi.RowForm, layout: Layout, *operands: Any
) -> tuple[ffi.Rows, Layout]:
    return spread_before(form, layout, *operands), layout


def _spread_before_bwd(form: ffi.RowForm, layout: Layout, cotangents: ffi.Rows) -> tuple[Any, ...]:
    return *_spread_bwd(form, layout, cotangents), None


spread_before.defvjp(_spread_before_fwd, _spread_before_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def collect(expand: bool, layout: Layout, y: Array, values: Array | None) -> Pair:
    """Sums of each token's rows, and each (token, k)'s value."""
    return ffi.bind_combine(y, layout, None, values, expand=expand)


def _collect_fwd(
    expand: bool, layout: Layout, y: Array, values: Array | None
) -> tuple[Pair, Layout]:
    return collect(expand, layout, y, values), layout


def _collect_bwd(
    expand: bool, layout: Layout, cotangents: Pair
) -> tuple[None, Array, Array | None]:
    d_out, d_values = cotangents
    rows, _, values = spread(ffi.RowForm(expand=expand), layout, d_out, None, d_values)
    return None, rows, values


collect.defvjp(_collect_fwd, _collect_bwd)


@jax.custom_vjp
def combine_weighted(layout: Layout, y: Array, weights: Array) -> Array:
    """Weighted sums of each token's rows."""
    out, _ = ffi.bind_combine(y, layout, weights, None)
    return out


def _combine_weighted_fwd(
    layout: Layout, y: Array, weights: Array
) -> tuple[Array, tuple[Layout, Array, Array]]:
    return combine_weighted(layout, y, weights), (layout, y, weights)


def _combine_weighted_bwd(
    residuals: tuple[Layout, Array, Array], g: Array
) -> tuple[None, Array, Array]:
    layout, y, weights = residuals
    row_bytes = y.shape[1] * y.dtype.itemsize
    fits = row_bytes <= limits.MAX_WEIGHTED_ROW_BYTES
    rule = combine_gradient if fits else _combine_gradient_in_steps
    return None, *rule(layout, y, weights, g)


combine_weighted.defvjp(_combine_weighted_fwd, _combine_weighted_bwd)


@jax.custom_vjp
def combine_gradient(layout: Layout, y: Array, weights: Array, g: Array) -> tuple[Array, Array]:
    """Cotangents of y and weights in ``combine_weighted``, from its result's."""
    return ffi.bind_combine_gradient(g, layout, y, weights)


def _combine_gradient_in_steps(
    layout: Layout, y: Array, weights: Array, g: Array
) -> tuple[Array, Array]:
    rows, _, _ = spread(ffi.RowForm(), layout, g, None, None)
    return ffi.weigh_rows(rows, layout.recv_src, y, weights)


def _combine_gradient_fwd(
    layout: Layout, y: Array, weights: Array, g: Array
) -> tuple[tuple[Array, Array], tuple[Layout, Array, Array, Array]]:
    return combine_gradient(layout, y, weights, g), (layout, y, weights, g)


def _combine_gradient_bwd(
    residuals: tuple[Layout, Array, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[None, Array, Array, Array]:
    layout, *operands = residuals
    _, pull = jax.vjp(functools.partial(_combine_gradient_in_steps, layout), *operands)
    return None, *pull(cotangents)


combine_gradient.defvjp(_combine_gradient_fwd, _combine_gradient_bwd)
