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
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from jax_ep import ffi, limits
from jax_ep.layout import Layout

Array = jax.Array
Pair = tuple[Array, Array | None]


def dispatch(
    layout: Layout,
    x: Array,
    weights: Array | None,
    quantization: int,
    *,
    dequantize: bool,
    expand: bool,
) -> tuple[Array, Array | None, Array | None]:
    """Rows, scales and weights. float8 rows, which have scales, have no gradient.

    To differentiate through those is an error, which ``ffi`` raises.
    """
    if quantization != ffi.NO_QUANTIZATION and not dequantize:
        return ffi.bind_dispatch(x, layout, weights, quantization=quantization, expand=expand)
    tokens, recv_weights = spread(quantization, expand, layout, x, weights)
    return tokens, None, recv_weights


def combine(layout: Layout, y: Array, weights: Array | None) -> Array:
    """Sums of each token's rows. Without weights y is not kept for the backward pass."""
    if weights is None:
        return collect(True, layout, y, None)[0]
    out: Array = combine_weighted(layout, y, weights)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def spread(
    quantization: int, expand: bool, layout: Layout, x: Array, weights: Array | None
) -> Pair:
    """Rows and weights to their experts; ``quantization`` says how rows travel."""
    tokens, _, recv_weights = ffi.bind_dispatch(
        x,
        layout,
        weights,
        quantization=quantization,
        dequantize=quantization != ffi.NO_QUANTIZATION,
        expand=expand,
    )
    return tokens, recv_weights


def _spread_fwd(
    quantization: int, expand: bool, layout: Layout, x: Array, weights: Array | None
) -> tuple[Pair, Layout]:
    return spread(quantization, expand, layout, x, weights), layout


def _spread_bwd(
    quantization: int, expand: bool, layout: Layout, cotangents: Pair
) -> tuple[None, Array | np.ndarray, Array | None]:
    d_tokens, d_weights = cotangents
    if d_tokens.dtype != dtypes.float0:
        return None, *collect(expand, layout, d_tokens, d_weights)
    # Integer rows have no gradient; their weights still may.
    d_x = np.zeros((layout.topk_idx.shape[0], d_tokens.shape[1]), dtypes.float0)
    if d_weights is None:
        return None, d_x, None
    no_rows = jnp.broadcast_to(jnp.zeros_like(d_weights)[:, None], (layout.capacity, 4))
    return None, d_x, collect(True, layout, no_rows, d_weights)[1]


spread.defvjp(_spread_fwd, _spread_bwd)


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
    return None, *spread(ffi.NO_QUANTIZATION, expand, layout, *cotangents)


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
    rows, _ = spread(ffi.NO_QUANTIZATION, True, layout, g, None)
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
