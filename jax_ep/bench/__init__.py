"""``python -m jax_ep.bench`` times the verbs beside their bound, measured in the same run."""
