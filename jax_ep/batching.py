"""vmap of the custom calls: one call for each element of the batch, one after the other.

Every rank maps the same number of elements in the same order, so ranks meet as they do in
``lax.scan``. Under ``jax.vmap(..., spmd_axis_name=)`` around ``shard_map`` JAX splits the batch
over the devices of that mesh axis, which is manual then: one element for each is one call.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_ep import compat

Array = jax.Array
Dims = Sequence[int | None]


def map_calls(
    primitive: Primitive, operands: Sequence[Array], dims: Dims, **params: object
) -> tuple[Sequence[Array], list[int]]:
    """The batching rule of a primitive with several results."""
    operands = _vary_alike(operands)
    mapped = [dim is not None for dim in dims]

    def call(elements: Sequence[Array]) -> Sequence[Array]:
        rest = iter(elements)
        whole = [next(rest) if m else x for x, m in zip(operands, mapped, strict=True)]
        results: Sequence[Array] = primitive.bind(*whole, **params)
        return results

    batches = [jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True) if d is not None]
    if batches[0].shape[0] == 1:
        results: Sequence[Array] = [
            result[None] for result in call([batch[0] for batch in batches])
        ]
    else:
        results = lax.map(call, batches)
    return results, [0] * len(results)


def map_together(values: Sequence[Array], others: Sequence[Array]) -> Sequence[Array]:
    """``values``; where a vmap over a mesh axis maps any operand, it maps each of them.

    Outside the gradient rules, so that JAX itself sums the cotangents of what is not mapped: within
    them the sum over the elements of one device would be taken for the sum over the mesh axis.
    """
    results: Sequence[Array] = _together_p.bind(*values, *others, num_values=len(values))
    return results


def _vary_alike(operands: Sequence[Array]) -> list[Array]:
    """The operands, varying over all axes that any of them varies over."""
    axes = sorted(frozenset[str]().union(*map(compat.varying_axes, operands)))
    return [compat.vary_over(x, axes) for x in operands]


def _map_together(
    operands: Sequence[Array], dims: Dims, *, num_values: int
) -> tuple[Sequence[Array], Dims]:
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    varying = _vary_alike(operands)
    values, value_dims = list(operands[:num_values]), list(dims[:num_values])
    for i, (value, dim) in enumerate(zip(values, value_dims, strict=True)):
        # Its elements differ in what is computed with them on other devices: it has a batch now.
        if dim is None and varying[i] is not value:
            values[i] = jnp.broadcast_to(varying[i], (size, *value.shape))
            value_dims[i] = 0
    return map_together(values, operands[num_values:]), value_dims


def _jvp(
    primals: Sequence[Array], tangents: Sequence[Array], *, num_values: int
) -> tuple[Sequence[Array], Sequence[Array]]:
    values = map_together(primals[:num_values], primals[num_values:])
    return values, tangents[:num_values]


_together_p = Primitive("jax_ep_map_together")
_together_p.multiple_results = True
_together_p.def_abstract_eval(lambda *operands, num_values: operands[:num_values])
_together_p.def_impl(lambda *operands, num_values: list(operands[:num_values]))
mlir.register_lowering(_together_p, lambda ctx, *operands, num_values: operands[:num_values])
batching.primitive_batchers[_together_p] = _map_together
ad.primitive_jvps[_together_p] = _jvp
