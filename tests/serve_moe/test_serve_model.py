"""The model is transformers' one: logits and greedy tokens of tiny random checkpoints."""

import functools

import checkpoint
import jax
import jax.numpy as jnp
import model
import numpy as np
import pytest
import tiny_checkpoint
from jax.sharding import PartitionSpec as P
from serve_moe import moe, steps

# Float32 on both sides: sums of up to 64 products in another order, through two layers. Logits are
# up to 15, so this is some 20 units in the last place; a wrong epsilon or theta moves them by 1e-2.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(tiny_checkpoint.REFERENCE) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    ("name", "dp", "ep", "dispatch"),
    [
        ("tied", 2, 1, "jax_ep"),
        ("normalised", 1, 2, "jax_ep"),
        ("tied", 2, 4, "jax_ep"),
        ("normalised", 1, 8, "jax_ep"),
        ("normalised", 1, 2, "all_to_all"),
    ],
)
def test_logits_and_greedy_tokens_are_the_references(
    name: str, dp: int, ep: int, dispatch: str, folders: dict, reference: dict
) -> None:
    """Through both forms of the MoE layer, whatever the size of the group.

    The reference's continuation is given; if each of its tokens is then the likeliest one, greedy
    decoding gives just these.
    """
    config = checkpoint.read_config(folders[name])
    assert config == tiny_checkpoint.CONFIGS[name]
    mesh = jax.make_mesh((dp, ep), steps.AXES, devices=jax.devices()[: dp * ep])
    params = checkpoint.load_params(folders[name], config, mesh, "float32")
    tokens = np.concatenate([tiny_checkpoint.PROMPT, reference[f"{name}.greedy"]])

    def shard(params: dict) -> jax.Array:
        # Each device has the sequence, so that all of them are compared.
        positions = jnp.arange(len(tokens))[None] + 0 * jax.lax.axis_index(steps.AXES)
        results = []
        for few_tokens in (False, True):
            layer_fn = functools.partial(
                moe.LAYERS[dispatch],
                is_token=positions[0] >= 0,
                config=config,
                few_tokens=few_tokens,
            )
            x = model.embed(params, jnp.asarray(tokens)[None], "float32")
            for layer in params["layers"]:
                x, *_ = model.block(x, layer, positions, model.attend_causally, layer_fn, config)
            results.append(model.logits(params, x, config))
        return jnp.concatenate(results)

    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    run = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=(specs,), out_specs=P(steps.AXES)))
    length = len(tiny_checkpoint.PROMPT)
    for logits in np.asarray(run(params)):
        np.testing.assert_allclose(logits[:length], reference[f"{name}.logits"], **TOLERANCE)
        likeliest = np.argmax(logits[length - 1 : -1], axis=-1)
        np.testing.assert_array_equal(likeliest, reference[f"{name}.greedy"])
