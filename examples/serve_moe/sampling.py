"""Chooses the next token of every slot, on the device."""

import jax
import jax.numpy as jnp

Array = jax.Array


def _nucleus(probs: Array, top_p: Array) -> Array:
    """Which of probs [S, V] are in the fewest, likeliest tokens whose sum reaches top_p [S].

    The bound is found over the bits of a float in [0, 1], which are ordered as the numbers are,
    three of its 30 in each pass: no sort of the vocabulary, no branch that the host would wait for,
    and probs are read ten times.
    """

    def at_least(bits: Array) -> Array:
        return probs >= jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    def narrow(i: Array, bits: Array) -> Array:
        shift = 27 - 3 * i
        enough = [
            jnp.sum(jnp.where(at_least(bits + (n << shift)), probs, 0.0), axis=-1) >= top_p
            for n in range(1, 8)
        ]
        most = jnp.max(jnp.stack([jnp.where(e, n, 0) for n, e in enumerate(enough, 1)]), axis=0)
        return bits + (most << shift)

    return at_least(jax.lax.fori_loop(0, 10, narrow, jnp.zeros_like(top_p, jnp.int32)))


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
