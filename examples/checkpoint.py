"""Qwen3-MoE and Mixtral checkpoints in the Hugging Face format: config.json and *.safetensors.

A safetensors file is a header in JSON, with each tensor's type, shape and place, and then their
bytes. It is mapped, not read: a device's part of a parameter is read when it is placed.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from model import SCALE_BLOCK, Config, init_params, is_expert_weight

_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": _FLOAT8,
}

_ROPE_THETA = {"qwen3_moe": 1e4, "mixtral": 1e6}  # where config.json does not say

# What would change the arithmetic and is not written here, with the value that means "not in use".
_UNSUPPORTED = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "mlp_only_layers": [],
    "rope_scaling": None,
    "use_sliding_window": False,
}


# ------------------------------------------------------------------------------------- config.json


def read_config(folder: pathlib.Path) -> Config:
    """Reads config.json.

    Raises:
        ValueError: it is another architecture, uses what this model does not have, or lacks a size.
    """
    entries = json.loads((folder / "config.json").read_text())
    entries = {name: value for name, value in entries.items() if value is not None}
    kind = entries.get("model_type")
    if kind not in _ROPE_THETA:
        raise ValueError(f"{folder}: model_type is {kind!r}, not 'qwen3_moe' or 'mixtral'")
    # transformers 5 has other names for these two, and leaves out a head_dim that follows.
    if "num_local_experts" in entries:
        entries.setdefault("num_experts", entries["num_local_experts"])
    rope = entries.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        entries["rope_scaling"] = rope
    entries.setdefault("rope_theta", rope.get("rope_theta", _ROPE_THETA[kind]))
    if kind == "mixtral":
        entries |= {"qk_norm": False, "norm_topk_prob": True}
        entries["use_sliding_window"] = "sliding_window" in entries
        entries.setdefault("rms_norm_eps", 1e-5)
        if "intermediate_size" in entries:
            entries["moe_intermediate_size"] = entries["intermediate_size"]
    if {"hidden_size", "num_attention_heads"} <= entries.keys():
        entries.setdefault("head_dim", entries["hidden_size"] // entries["num_attention_heads"])
    for name, unused in _UNSUPPORTED.items():
        if entries.get(name, unused) != unused:
            raise ValueError(f"{folder}: {name} = {entries[name]!r} is not supported")
    fields = dataclasses.fields(Config)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in entries]
    if missing:
        raise ValueError(f"{folder}: config.json has no {', '.join(missing)}")
    return Config(**{field.name: entries[field.name] for field in fields if field.name in entries})


def read_end_tokens(folder: pathlib.Path) -> tuple[int, ...]:
    """The tokens that end a sequence, by generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


def write_config(folder: pathlib.Path, config: Config) -> None:
    """Writes config.json, with every entry that says which model it is."""
    entries = dataclasses.asdict(config)
    if entries.pop("qk_norm"):
        entries |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
        entries |= _UNSUPPORTED
    else:
        assert entries.pop("norm_topk_prob"), "Mixtral has it"
        entries |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        entries |= {"num_local_experts": entries.pop("num_experts"), "sliding_window": None}
    entries |= {
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
        "intermediate_size": config.moe_intermediate_size,  # Qwen3-MoE's dense layers: none here
    }
    (folder / "config.json").write_text(json.dumps(entries, indent=1))


# ------------------------------------------------------------------------------------- safetensors


def open_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Maps the tensors of all *.safetensors of a folder, by the names that Qwen3-MoE has."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
        data = np.memmap(path, np.uint8, "r", offset=8 + header_size)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{path}: {name} is {entry['dtype']}, not one of {list(_DTYPES)}")
            begin, end = entry["data_offsets"]
            tensor = data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            tensors[_qwen3_name(name)] = tensor
    if not tensors:
        raise FileNotFoundError(f"{folder} has no *.safetensors")
    return tensors


def write_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as one file, which is there once it is whole: it may replace one in use."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header, end = {}, 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        entry = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": (begin, end)}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())
    unfinished.replace(path)


# ------------------------------------------------------------------------------------- parameters

# Qwen3-MoE's names of each parameter. A checkpoint has matrices as [out, in], the model as
# [in, out]; where there are several names, the model has them side by side.
_MODEL = {
    "embeddings": ("model.embed_tokens",),
    "final_norm": ("model.norm",),
    "logits": ("lm_head",),
}
_LAYER = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "attention_out": ("self_attn.o_proj",),
    "moe_norm": ("post_attention_layernorm",),
    "router": ("mlp.gate",),
}
# Mixtral's are those with these parts replaced.
_MIXTRAL = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_EXPERT = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
_SCALE = "_scale"  # behind the name of an expert's weight: its scales, where it stays float8


def _names(path: tuple, expert: int) -> list[str]:
    """The checkpoint's names of the parameter at a path of the tree, `expert`'s if it has them."""
    keys = [getattr(entry, "key", getattr(entry, "idx", None)) for entry in path]
    match keys:
        case ["layers", layer, "experts", name]:
            parts = _EXPERT[name.removesuffix(_SCALE)]
            names = [f"model.layers.{layer}.mlp.experts.{expert}.{part}" for part in parts]
        case ["layers", layer, name]:
            names = [f"model.layers.{layer}.{part}" for part in _LAYER[name]]
        case [name]:
            names = list(_MODEL[name])
    return [f"{name}.weight" for name in names]


def _mixtral_name(name: str) -> str:
    return ".".join(_MIXTRAL.get(part, part) for part in name.split("."))


def _qwen3_name(name: str) -> str:
    """What Qwen3-MoE calls a tensor of Mixtral's; its own names stay."""
    names = {mixtral: qwen3 for qwen3, mixtral in _MIXTRAL.items()}
    return ".".join(names.get(part, part) for part in name.split("."))


def _is_transposed(path: tuple, array: np.ndarray) -> bool:
    return array.ndim > 1 and path[0].key != "embeddings"


def _read_scales(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The scales of a float8 tensor [out, in]: float32 [out, in / SCALE_BLOCK]."""
    scales = tensors.get(f"{name}_scale_inv", np.empty(0))
    blocks = tuple(-(-size // SCALE_BLOCK) for size in tensors[name].shape)
    if scales.shape != blocks:
        raise ValueError(
            f"{name} is float8, so {name}_scale_inv must be {blocks}, a scale for each block of "
            f"{SCALE_BLOCK} x {SCALE_BLOCK}; it is {scales.shape}"
        )
    return np.repeat(scales.astype(np.float32), SCALE_BLOCK, 0)[: tensors[name].shape[0]]


def _read_tensor(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A tensor; of float8 with a scale for each block (`weight_scale_inv`) what it stands for."""
    tensor = tensors[name]
    if tensor.dtype != _FLOAT8:
        return tensor
    scales = np.repeat(_read_scales(tensors, name), SCALE_BLOCK, 1)[:, : tensor.shape[1]]
    return tensor.astype(np.float32) * scales


def _add_scales(shapes: dict, tensors: Mapping[str, np.ndarray]) -> dict:
    """Adds the scales of weights that are float8 for all experts to the parameters' shapes."""
    layers = []
    for i, layer in enumerate(shapes["layers"]):
        experts = dict(layer["experts"])
        for name, leaf in layer["experts"].items():
            num_experts, rows, columns = leaf.shape
            path = tuple(map(jax.tree_util.DictKey, ("layers", i, "experts", name)))
            parts = [part for expert in range(num_experts) for part in _names(path, expert)]
            if all(tensors[part].dtype == _FLOAT8 for part in parts):
                blocks = num_experts, -(-rows // SCALE_BLOCK), columns
                experts[name] = jax.ShapeDtypeStruct(leaf.shape, _FLOAT8)
                experts[name + _SCALE] = jax.ShapeDtypeStruct(blocks, jnp.float32)
        layers.append(layer | {"experts": experts})
    return shapes | {"layers": layers}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _finish(part: jax.Array, is_transposed: bool, dtype: Any) -> jax.Array:
    """A device's part of a parameter as the model has it, of what the checkpoint has."""
    return (jnp.swapaxes(part, -1, -2) if is_transposed else part).astype(dtype)


def load_params(
    folder: pathlib.Path, config: Config, mesh: Mesh, dtype: str, *, keep_float8: bool = False
) -> dict:
    """Loads a checkpoint onto a mesh: experts split over its axis "ep", all else on every device.

    A device's part is read from the files, placed and forgotten before the next one is read. It
    goes as it lies there, and is turned and cast by the device: on the host that would take longer
    than to read it.

    Args:
        folder: holds config.json and *.safetensors.
        config: what read_config says.
        mesh: of the devices; its axis "ep" divides the number of experts.
        dtype: of all parameters.
        keep_float8: experts that are float8 stay so, with their scales beside them; see
            model.expert_weight. Others are cast, as all are without it.

    Returns:
        The parameters, as init_params gives them.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has another shape than config.json says, or float8 has no scales.
    """
    tensors = open_tensors(folder)

    def read(path: tuple, leaf: jax.ShapeDtypeStruct, expert: int) -> np.ndarray:
        if path[-1].key.endswith(_SCALE):
            parts = [_read_scales(tensors, name) for name in _names(path, expert)]
        elif leaf.dtype == _FLOAT8:
            parts = [tensors[name] for name in _names(path, expert)]
        else:
            parts = [_read_tensor(tensors, name) for name in _names(path, expert)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        is_expert = is_expert_weight(path)
        sharding = NamedSharding(mesh, P("ep") if is_expert else P())
        shards = []
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
            if is_expert:
                experts = range(*index[0].indices(leaf.shape[0]))
                part = np.stack([read(path, leaf, expert) for expert in experts])
            else:
                part = read(path, leaf, 0)
            shard = _finish(jax.device_put(part, device), _is_transposed(path, part), leaf.dtype)
            if shard.shape != sharding.shard_shape(leaf.shape):
                raise ValueError(
                    f"{folder}: {', '.join(_names(path, 0))}: together {shard.shape} on a device, "
                    f"but config.json makes it {sharding.shard_shape(leaf.shape)}"
                )
            shards.append(shard)
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    if keep_float8:
        shapes = _add_scales(shapes, tensors)
    return jax.tree.map_with_path(place, shapes)


def save(folder: pathlib.Path, config: Config, params: dict) -> None:
    """Writes a checkpoint of one file, for this loader and others of the format.

    Args:
        folder: made if it is not there.
        config: the sizes.
        params: as init_params gives them, in NumPy.
    """
    tensors = {}
    for path, array in jax.tree.leaves_with_path(params):
        experts = array if is_expert_weight(path) else array[None]
        for expert, value in enumerate(experts):
            names = _names(path, expert)
            for name, part in zip(names, _split(path, value, config), strict=True):
                name = name if config.qk_norm else _mixtral_name(name)
                tensors[name] = part.T if _is_transposed(path, part) else part
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors)
    write_config(folder, config)


def _split(path: tuple, array: np.ndarray, config: Config) -> list[np.ndarray]:
    """The parts of a parameter that the model has side by side."""
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    match path[-1].key:
        case "qkv":
            return np.split(array, (heads * d, (heads + groups) * d), axis=-1)
        case "gate_up":
            return np.split(array, 2, axis=-1)
    return [array]


# -------------------------------------------------------------------------------------- tokenizer


def byte_tokenizer() -> dict:
    """The tokenizer.json of a model whose token i is byte i, for the library `tokenizers`.

    The format names bytes by characters that can be seen: a byte that is one in Latin-1 by itself,
    the others, in their order, by those from 256 on.
    """
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = (byte for byte in range(256) if byte not in seen)
    names = {byte: chr(256 + i) for i, byte in enumerate(others)} | {b: chr(b) for b in seen}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    byte_level["use_regex"] = False
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {names[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }
