"""Tiny random checkpoints of Qwen3-MoE and Mixtral, and what transformers makes of them.

    python tests/serve_moe/tiny_checkpoint.py

writes reference.npz beside this file: float32 logits of a prompt, and what follows it greedily. It
needs torch and transformers, which the tests do not: they make the same checkpoints (RandomState's
streams are frozen), and compare. With the versions that wrote it, see the entry "versions".
"""

import dataclasses
import json
import pathlib
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

import checkpoint
import model

REFERENCE = pathlib.Path(__file__).with_name("reference.npz")
NUM_NEW = 16
END = 255  # the token that ends a sequence; the references do not have it
_SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # heads * head_dim is not hidden_size
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "normalised": model.Config(**_SIZES, norm_topk_prob=True, rope_theta=1e6),
    "tied": model.Config(
        **_SIZES, norm_topk_prob=False, tie_word_embeddings=True, rope_theta=1e4, rms_norm_eps=1e-5
    ),
}
CONFIGS["mixtral"] = dataclasses.replace(CONFIGS["normalised"], qk_norm=False, rms_norm_eps=1e-5)
PROMPT = np.random.RandomState(1).randint(0, 256, 12)


def write(folder: pathlib.Path, config: model.Config) -> None:
    """Writes a checkpoint in two files, as large ones are."""
    random = np.random.RandomState(0)
    h, d = config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    shapes = {"model.embed_tokens": (config.vocab_size, h), "model.norm": (h,)}
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, h)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.input_layernorm": (h,), f"{layer}.post_attention_layernorm": (h,)}
        if config.qk_norm:
            shapes |= {f"{layer}.self_attn.{name}_norm": (d,) for name in "qk"}
        shapes |= {f"{layer}.self_attn.{name}_proj": (groups * d, h) for name in "kv"}
        shapes[f"{layer}.self_attn.q_proj"] = (heads * d, h)
        shapes[f"{layer}.self_attn.o_proj"] = (h, heads * d)
        moe = f"{layer}.mlp" if config.qk_norm else f"{layer}.block_sparse_moe"
        names = ("gate_proj", "up_proj", "down_proj") if config.qk_norm else ("w1", "w3", "w2")
        shapes[f"{moe}.gate"] = (config.num_experts, h)
        for e in range(config.num_experts):
            for name in names[:2]:
                shapes[f"{moe}.experts.{e}.{name}"] = (config.moe_intermediate_size, h)
            shapes[f"{moe}.experts.{e}.{names[2]}"] = (h, config.moe_intermediate_size)
    tensors = {}
    for name, shape in shapes.items():
        normal = random.standard_normal(shape)
        array = 1 + 0.2 * normal if len(shape) == 1 else normal * (2 / shape[1] ** 0.5)
        tensors[f"{name}.weight"] = array.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    file_of = {}
    for i in range(2):
        path = folder / f"model-{i + 1:05}-of-00002.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::2]}
        checkpoint.write_tensors(path, part)
        file_of |= dict.fromkeys(part, path.name)
    index = json.dumps({"metadata": {}, "weight_map": file_of})
    (folder / "model.safetensors.index.json").write_text(index)
    checkpoint.write_config(folder, config)


def main() -> None:
    """Writes reference.npz."""
    import torch
    import transformers

    arrays = {"versions": f"transformers {transformers.__version__}, torch {torch.__version__}"}
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            write(pathlib.Path(folder), config)
            reference, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        assert not any(report.values()), report  # every weight found its place
        prompt = torch.from_numpy(PROMPT)[None]
        with torch.no_grad():
            arrays[f"{name}.logits"] = reference(prompt).logits[0].numpy()
            new = reference.generate(prompt, max_new_tokens=NUM_NEW, do_sample=False)
        arrays[f"{name}.greedy"] = new[0, len(PROMPT) :].numpy().astype(np.int32)
        print(name, arrays[f"{name}.greedy"])
    np.savez_compressed(REFERENCE, **arrays)
    print(arrays["versions"], REFERENCE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
