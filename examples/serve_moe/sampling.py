"""Chooses the next token of every slot, on the device."""

import jax
import jax.numpy as jnp

Array = jax.Array


def _nucleus(probs: Array, top_p: Array) -> Array:
    """Which of probs [S, V] are in the fewest, likeliest tokens whose sum reaches top_p [S].

    The bound is found by bisection over the bits of a float in [0, 1], which are ordered as the
    numbers are: no sort of the vocabulary, and no branch that the host would wait for.
    """

    def narrow(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # the bound is at least low, and below high
        middle = (low + high) // 2
        bound = jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        enough = jnp.sum(jnp.where(probs >= bound, probs, 0.0), axis=-1) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    zeros = jnp.zeros_like(top_p, jnp.int32)
    one = 0x3F800000  # the bits of 1.0
    low, _ = jax.lax.fori_loop(0, 30, narrow, (zeros, zeros + one + 1))
    return probs >= jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]


def sample(logits: Array, temperature: Array, top_p: Array, seed: Array, position: Array) -> Array:
    """Draws a token for each slot, from its own logits and random numbers alone.

    Args:
        logits: float32 [S, V].
        temperature: float32 [S]; 0 takes the likeliest.
        top_p: float32 [S], up to 1: draws from the likeliest tokens with this probability; 0, which
            a tiny one is in float32, takes the likeliest.
        seed: uint32 [S], the request's.
        position: int32 [S], the token's place in its sequence.

    Returns:
        int32 [S].
    """
    scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
    allowed = _nucleus(jax.nn.softmax(scaled, axis=-1), jnp.maximum(top_p, 1e-6))

    def draw(logits: Array, seed: Array, position: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), logits)

    drawn = jax.vmap(draw)(jnp.where(allowed, scaled, -jnp.inf), seed, position)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
