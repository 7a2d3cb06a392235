"""``python -m jax_ep.bench``: times the operations beside bounds and JAX's collectives."""
