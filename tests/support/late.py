"""Ranks that come late to a call, without a callback: a program with one runs host code."""

import jax
from jax import lax


def stall(units: jax.Array, state: jax.Array) -> jax.Array:
    """A new state, int32 in [0, 2**20), after so many turns of a loop on the device."""

    def turn(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, state = carry
        return left - 1, (state * 5 + 3) & 0xFFFFF

    return lax.while_loop(lambda carry: carry[0] > 0, turn, (units, state))[1]


def after(state: jax.Array, array: jax.Array) -> jax.Array:
    """The array, which is not there before the state is. Only we know that this adds 0."""
    return array + (state >> 20).astype(array.dtype)
