"""What the calls require of a ``shard_map`` that leaves axes of the mesh to the compiler.

Every device of an automatic axis makes the same calls on the same data, so the compiler must not
have split that over the axis: it would gather it before each call, unasked, and every device would
do the work of all. How it splits an array is known only when it partitions the program. So each
operand passes an identity that it partitions by the function below, which refuses.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir

from jax_ep import compat


def require(
    ctx: Any, where: str, automatic: tuple[str, ...], operands: Sequence[Any]
) -> Sequence[Any]:
    """The operands of the call that ``ctx`` lowers; none may be split over ``automatic`` axes.

    The error comes when the program is compiled.
    """
    if compat.mesh_devices(compat.lowering_mesh(ctx))[1] is None:
        raise NotImplementedError(
            f"{where}: over an abstract mesh jax.shard_map must be manual over all axes; "
            f"{automatic[0]!r} is left to the compiler. Leave shard_map's axis_names out, or lower "
            "over a mesh of devices"
        )

    def checked(*arrays: jax.Array) -> list[jax.Array]:
        # Of a scalar there is nothing to split.
        return [_unsplit(where, automatic, a) if a.ndim else a for a in arrays]

    lowered: Sequence[Any] = mlir.lower_fun(checked, multiple_results=True)(
        ctx.replace(avals_out=ctx.avals_in), *operands
    )
    return lowered


def _identity(where: str, automatic: tuple[str, ...], array: jax.Array) -> jax.Array:
    return array


def _partition(
    where: str, automatic: tuple[str, ...], mesh: Any, arguments: Sequence[Any], result: Any
) -> Any:
    (argument,) = arguments
    if not argument.sharding.is_fully_replicated:
        names = ", ".join(repr(name) for name in automatic)
        raise ValueError(
            f"{where}: an array {argument.dtype}{list(argument.shape)} that it takes is split over "
            f"axes of the mesh that jax.shard_map leaves to the compiler ({names}). Add them to "
            "shard_map's axis_names (or leave axis_names out) and split the tokens over them in "
            "in_specs, or have the array whole on each of their devices: "
            "jax.lax.with_sharding_constraint(array, jax.sharding.PartitionSpec()) before the call "
            "(for a gradient, after it)"
        )
    return mesh, lambda array: array, result.sharding, (argument.sharding,)


_unsplit = custom_partitioning(_identity, static_argnums=(0, 1))
_unsplit.def_partition(
    partition=_partition,
    infer_sharding_from_operands=lambda where, automatic, mesh, arguments, result: (
        arguments[0].sharding
    ),
    sharding_rule="... -> ...",
    decode_shardings=False,
)
