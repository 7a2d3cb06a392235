"""The model is transformers' one: logits and greedy tokens of tiny random checkpoints."""

import dataclasses
import functools
import json
import pathlib

import checkpoint
import jax
import jax.numpy as jnp
import ml_dtypes
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
    ("name", "dp", "ep", "dispatch", "few_tokens"),
    [
        ("tied", 2, 1, "jax_ep", False),
        ("normalised", 1, 2, "jax_ep", True),
        ("tied", 2, 4, "jax_ep", True),
        ("normalised", 1, 8, "jax_ep", False),
        ("normalised", 1, 2, "all_to_all", True),
        ("tied", 2, 2, "all_to_all", False),
    ],
)
def test_logits_and_greedy_tokens_are_the_references(
    name: str, dp: int, ep: int, dispatch: str, few_tokens: bool, folders: dict, reference: dict
) -> None:
    """Whatever the size of the group, and the form of the MoE layer.

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
        layer_fn = functools.partial(
            moe.LAYERS[dispatch],
            is_token=positions[0] >= 0,
            config=config,
            few_tokens=few_tokens,
        )
        x = model.embed(params, jnp.asarray(tokens)[None], "float32")
        for layer in params["layers"]:
            x, *_ = model.block(x, layer, positions, model.attend_causally, layer_fn, config)
        return model.logits(params, x, config)

    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    run = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=(specs,), out_specs=P(steps.AXES)))
    length = len(tiny_checkpoint.PROMPT)
    for logits in np.asarray(run(params)):
        np.testing.assert_allclose(logits[:length], reference[f"{name}.logits"], **TOLERANCE)
        likeliest = np.argmax(logits[length - 1 : -1], axis=-1)
        np.testing.assert_array_equal(likeliest, reference[f"{name}.greedy"])


def test_float8_weights_are_scaled_by_blocks(tmp_path: pathlib.Path) -> None:
    """A block is 128 x 128, the last ones may be smaller; the scale may lie in another file."""
    random = np.random.default_rng(0)
    config = dataclasses.replace(
        tiny_checkpoint.CONFIGS["normalised"], hidden_size=160, moe_intermediate_size=144
    )
    tiny_checkpoint.write(tmp_path, config)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"  # [144, 160], [2, 2] blocks
    tensors = dict(checkpoint.open_tensors(tmp_path))
    weight = random.standard_normal((144, 160)).astype(ml_dtypes.float8_e4m3fn)
    scales = np.array([[1.0, 2.0], [0.5, 4.0]], np.float32)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    checkpoint.write_tensors(first, tensors | {name: weight})
    checkpoint.write_tensors(second, {f"{name}_scale_inv": scales})
    mesh = jax.make_mesh((1, 4), steps.AXES, devices=jax.devices()[:4])
    params = checkpoint.load_params(tmp_path, config, mesh, "float32")
    loaded = np.asarray(params["layers"][1]["experts"]["gate_up"])[5, :, 144:].T
    expected = weight.astype(np.float32)
    expected[:128, 128:] *= 2
    expected[128:, :128] *= 0.5
    expected[128:, 128:] *= 4
    np.testing.assert_array_equal(loaded, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama', not 'qwen3_moe'"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"moe_intermediate_size": 8}, "down_proj"),
    ],
    ids=str,
)
def test_checkpoints_of_another_kind_are_refused(
    change: dict, message: str, tmp_path: pathlib.Path
) -> None:
    tiny_checkpoint.write(tmp_path, tiny_checkpoint.CONFIGS["normalised"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    mesh = jax.make_mesh((1, 2), steps.AXES, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=message):
        checkpoint.load_params(tmp_path, checkpoint.read_config(tmp_path), mesh, "float32")
