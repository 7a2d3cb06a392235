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
from jax.sharding import NamedSharding
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
    ("name", "dp", "ep"),
    [("tied", 2, 1), ("mixtral", 1, 2), ("normalised", 1, 8)],
)
def test_logits_and_greedy_tokens_are_the_references(
    name: str, dp: int, ep: int, folders: dict, reference: dict
) -> None:
    """Whatever the size of the group (four ranks: see test_serve_engine.py).

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
            moe.moe_jax_ep,
            is_token=positions[0] >= 0,
            config=config,
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


def test_all_forms_of_the_moe_layer_are_one() -> None:
    """Beside NumPy; what is no token makes no row and gives zero."""
    config = tiny_checkpoint.CONFIGS["normalised"]
    mesh = jax.make_mesh((2, 4), steps.AXES, devices=jax.devices()[:8])
    random = np.random.default_rng(0)
    h, f, e = config.hidden_size, config.moe_intermediate_size, config.num_experts
    shapes = {"x": (8 * 6, h), "router": (h, e), "gate_up": (e, h, 2 * f), "down": (e, f, h)}
    arrays = {k: random.standard_normal(shape, np.float32) for k, shape in shapes.items()}
    is_token = random.random(8 * 6) < 0.7

    def shard(x: jax.Array, is_token: jax.Array, router: jax.Array, experts: dict) -> list:
        layer = {"router": router, "experts": experts}
        return [form(x, layer, is_token, config) for form in moe.LAYERS.values()]

    specs = P(steps.AXES), P(steps.AXES), P(), P("ep")
    args = arrays["x"], is_token, arrays["router"], {k: arrays[k] for k in ("gate_up", "down")}
    args = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
    run = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P(steps.AXES))
    results = jax.jit(run)(*args)

    logits = arrays["x"] @ arrays["router"]
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    chosen = np.argsort(-probs, axis=1)[:, : config.num_experts_per_tok]
    weights = np.zeros_like(probs)
    np.put_along_axis(weights, chosen, np.take_along_axis(probs, chosen, axis=1), axis=1)
    weights *= is_token[:, None] / weights.sum(axis=1, keepdims=True)
    gate, up = np.split(np.einsum("th,ehf->etf", arrays["x"], arrays["gate_up"]), 2, axis=-1)
    y = np.einsum("etf,efh->eth", gate / (1 + np.exp(-gate)) * up, arrays["down"])
    expected = np.einsum("te,eth->th", weights, y)
    rows = np.sum((weights > 0).reshape(2, -1, e), axis=1).reshape(-1)  # of each EP group
    assert len(results) == 2
    for out, counts in results:
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-2)  # values are up to 1e3
        assert np.all(np.asarray(out)[~is_token] == 0)
        np.testing.assert_array_equal(counts["expert_rows"], rows)
        assert not np.any(counts["dropped"])


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

    for wrong in ({}, {f"{name}_scale_inv": np.ones((3, 3), np.float32)}):  # of 64 x 64
        checkpoint.write_tensors(second, {"other": scales} | wrong)
        with pytest.raises(ValueError, match=r"up_proj.weight_scale_inv must be \(2, 2\)"):
            checkpoint.load_params(tmp_path, config, mesh, "float32")


def test_float8_experts_can_stay_so_on_devices(tmp_path: pathlib.Path) -> None:
    """With their scales beside them, and stand for just what they are cast to without."""
    random = np.random.default_rng(0)
    config = dataclasses.replace(
        tiny_checkpoint.CONFIGS["normalised"], hidden_size=160, moe_intermediate_size=144
    )
    tiny_checkpoint.write(tmp_path, config)
    tensors = dict(checkpoint.open_tensors(tmp_path))
    for name in [name for name in tensors if "layers.1.mlp.experts" in name]:
        tensors[name] = random.standard_normal(tensors[name].shape).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = random.random((2, 2), np.float32)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    checkpoint.write_tensors(first, tensors)
    second.unlink()
    mesh = jax.make_mesh((1, 4), steps.AXES, devices=jax.devices()[:4])
    cast = checkpoint.load_params(tmp_path, config, mesh, "float32")["layers"]
    kept = checkpoint.load_params(tmp_path, config, mesh, "float32", keep_float8=True)["layers"]
    assert set(kept[0]["experts"]) == {"gate_up", "down"}  # which are not float8
    experts = kept[1]["experts"]
    for name in ("gate_up", "down"):
        assert experts[name].dtype == ml_dtypes.float8_e4m3fn
        assert experts[name].sharding.spec == experts[f"{name}_scale"].sharding.spec == P("ep")
        np.testing.assert_array_equal(
            model.expert_weight(experts, name, jnp.float32), cast[1]["experts"][name]
        )
    rows = random.standard_normal((config.num_experts, 3, config.hidden_size), np.float32)
    both = (jax.device_get(layers[1]["experts"]) for layers in (kept, cast))
    np.testing.assert_array_equal(*(model.batched_experts(rows, experts) for experts in both))

    odd = "model.layers.1.mlp.experts.5.up_proj.weight"
    checkpoint.write_tensors(first, tensors | {odd: np.ones((144, 160), np.float32)})
    mixed = checkpoint.load_params(tmp_path, config, mesh, "float32", keep_float8=True)["layers"]
    assert set(mixed[1]["experts"]) == {"gate_up", "down", "down_scale"}


@pytest.mark.parametrize("name", ["normalised", "mixtral"])
def test_what_is_saved_has_the_names_that_others_know(
    name: str, folders: dict, tmp_path: pathlib.Path
) -> None:
    def header(folder: pathlib.Path) -> dict[str, list[int]]:
        entries = {}
        for path in folder.glob("*.safetensors"):
            data = path.read_bytes()
            entries |= json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {name: entry["shape"] for name, entry in entries.items()}

    config = tiny_checkpoint.CONFIGS[name]
    shapes = jax.eval_shape(lambda: model.init_params(jax.random.key(0), config))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    checkpoint.save(tmp_path, config, params)
    assert header(tmp_path) == header(folders[name])
    assert checkpoint.read_config(tmp_path) == config


def test_names_of_transformers_5_are_understood(tmp_path: pathlib.Path) -> None:
    """As its save_pretrained writes them, without what follows from the rest."""
    config = dataclasses.replace(
        tiny_checkpoint.CONFIGS["normalised"], head_dim=8
    )  # hidden / heads
    checkpoint.write_config(tmp_path, config)
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text())
    del entries["head_dim"]
    entries["num_local_experts"] = entries.pop("num_experts")
    entries["rope_parameters"] = {"rope_theta": entries.pop("rope_theta"), "rope_type": "default"}
    path.write_text(json.dumps(entries))
    assert checkpoint.read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama', not 'qwen3_moe' or 'mixtral'"),
        ({"model_type": "mixtral", "sliding_window": 4096}, "use_sliding_window"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"num_experts": None}, "num_experts"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_scaling"),
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
