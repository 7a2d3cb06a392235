"""The architecture of Qwen3-MoE and Mixtral in plain JAX: functions over dictionaries of arrays.

train_moe_lm.py trains it and serve_moe serves it. Both run these functions on one device's tokens,
inside jax.shard_map, and bring two things of their own: what attends to what (a whole sequence, or
a cache), and how tokens reach their experts.

Letters: B sequences, Q tokens of each, T = B * Q, H hidden size, N heads, G key-value heads, D head
dimension, E experts, K experts of a token, L experts on this device, F hidden size of an expert.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
SCALE_BLOCK = 128  # rows and columns of a float8 weight that share a scale


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes, by their names in a checkpoint's config.json, and transformers' defaults."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    qk_norm: bool = True  # whether queries and keys are normalised: Mixtral's are not


def init_params(key: Array, config: Config) -> dict:
    """Initialises the parameters in float32. What lies under "experts" is sharded over "ep"."""
    h, e, f = config.hidden_size, config.num_experts, config.moe_intermediate_size
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    keys = iter(jax.random.split(key, 2 + 5 * config.num_hidden_layers))
    depth = 2 * config.num_hidden_layers  # branches that add up in the residual stream

    def normal(*shape: int, fan_in: int) -> Array:
        return jax.random.normal(next(keys), shape) * fan_in**-0.5

    layers = [
        {
            "attention_norm": jnp.ones(h),
            "qkv": normal(h, (heads + 2 * groups) * d, fan_in=h),
            **({"q_norm": jnp.ones(d), "k_norm": jnp.ones(d)} if config.qk_norm else {}),
            "attention_out": normal(heads * d, h, fan_in=depth * heads * d),
            "moe_norm": jnp.ones(h),
            "router": normal(h, e, fan_in=h),
            "experts": {
                "gate_up": normal(e, h, 2 * f, fan_in=h),
                "down": normal(e, f, h, fan_in=depth * f),
            },
        }
        for _ in range(config.num_hidden_layers)
    ]
    params = {
        "embeddings": normal(config.vocab_size, h, fan_in=h),
        "layers": layers,
        "final_norm": jnp.ones(h),
    }
    if not config.tie_word_embeddings:
        params["logits"] = normal(h, config.vocab_size, fan_in=h)
    return params


def rms_norm(x: Array, scale: Array, config: Config) -> Array:
    """Scales the last axis to unit root mean square, computed in float32."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + config.rms_norm_eps) * scale).astype(x.dtype)


def rotate(x: Array, positions: Array, config: Config) -> Array:
    """Rotary position embedding of x [B, Q, heads, D]: channel i is paired with i + D / 2."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@jax.named_scope("attention")
def attention(
    x: Array,
    layer: dict,
    positions: Array,
    attend: Callable[..., tuple[Array, Any]],
    config: Config,
) -> tuple[Array, Any]:
    """Grouped-query attention over x [B, Q, H].

    Args:
        x: the tokens.
        layer: the layer's parameters.
        positions: int32 [B, Q], each token's place in its sequence.
        attend: takes q [B, Q, N, D] and k, v [B, Q, G, D], returns [B, Q, N, D] and anything.
        config: the sizes.

    Returns:
        The output [B, Q, H], and what `attend` returned beside its own.
    """
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv = (x @ layer["qkv"].astype(x.dtype)).reshape(*x.shape[:2], heads + 2 * groups, d)
    q, k, v = jnp.split(qkv, (heads, heads + groups), axis=2)
    if config.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], config), rms_norm(k, layer["k_norm"], config)
    q, k = rotate(q, positions, config), rotate(k, positions, config)
    out, aside = attend(q, k, v)
    return out.reshape(*x.shape[:2], heads * d) @ layer["attention_out"].astype(x.dtype), aside


def attend_causally(q: Array, k: Array, v: Array) -> tuple[Array, None]:
    """Attention within whole sequences, for `attention`."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), None


def route(x: Array, router: Array, config: Config) -> tuple[Array, Array, Array]:
    """Returns probs [T, E] of x [T, H] and their top-k, weights [T, K] and ids int32 [T, K]."""
    probs = jax.nn.softmax(x.astype(jnp.float32) @ router.astype(jnp.float32), axis=-1)
    return probs, *jax.lax.top_k(probs, config.num_experts_per_tok)


def normalised(weights: Array, config: Config) -> Array:
    """Scales each token's weights [T, K] to the sum 1, if the checkpoint does; zeros stay zeros."""
    if not config.norm_topk_prob:
        return weights
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-9)


def swiglu(gate_up: Array) -> Array:
    """silu(gate) * up of their concatenation along the last axis."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def expert_weight(experts: dict, name: str, dtype: Any) -> Array:
    """The weight [L, in, out] in a dtype; of float8 with scales what it stands for.

    Scales are float32 [L, in / SCALE_BLOCK, out], as checkpoint.load_params gives them.
    """
    weight = experts[name]
    if f"{name}_scale" in experts:
        scale = jnp.repeat(experts[f"{name}_scale"], SCALE_BLOCK, axis=1)[:, : weight.shape[1]]
        weight = weight.astype(jnp.float32) * scale
    return weight.astype(dtype)


def grouped_experts(rows: Array, experts: dict, group_sizes: Array) -> Array:
    """Rows [C, H] in expert order, group_sizes int32 [L] of each expert, to [C, H]."""
    gate_up, down = (expert_weight(experts, name, rows.dtype) for name in ("gate_up", "down"))
    hidden = swiglu(jax.lax.ragged_dot(rows, gate_up, group_sizes))
    return jax.lax.ragged_dot(hidden, down, group_sizes)


def batched_experts(rows: Array, experts: dict) -> Array:
    """The same of rows [L, M, H], M for each expert."""
    gate_up, down = (expert_weight(experts, name, rows.dtype) for name in ("gate_up", "down"))
    hidden = swiglu(jnp.einsum("lmh,lhf->lmf", rows, gate_up))
    return jnp.einsum("lmf,lfh->lmh", hidden, down)


def block(
    x: Array,
    layer: dict,
    positions: Array,
    attend: Callable[..., tuple[Array, Any]],
    moe: Callable[[Array, dict], tuple[Array, Any]],
    config: Config,
) -> tuple[Array, Any, Any]:
    """One transformer block over x [B, Q, H].

    Args:
        x: the residual stream.
        layer: the layer's parameters.
        positions: as in `attention`.
        attend: as in `attention`.
        moe: takes x [T, H] and the layer's parameters, returns [T, H] and anything.
        config: the sizes.

    Returns:
        The residual stream, and what `attend` and `moe` returned beside their outputs.
    """
    normed = rms_norm(x, layer["attention_norm"], config)
    out, of_attend = attention(normed, layer, positions, attend, config)
    x = x + out
    out, of_moe = moe(rms_norm(x, layer["moe_norm"], config).reshape(-1, x.shape[-1]), layer)
    return x + out.reshape(x.shape), of_attend, of_moe


def embed(params: dict, tokens: Array, dtype: Any) -> Array:
    """Tokens int32 [B, Q] to [B, Q, H]."""
    return params["embeddings"][tokens].astype(dtype)


def logits(params: dict, x: Array, config: Config) -> Array:
    """The residual stream [.., H] after all blocks to float32 [.., vocab_size]."""
    x = rms_norm(x, params["final_norm"], config)
    if config.tie_word_embeddings:
        out = x @ params["embeddings"].astype(x.dtype).T
    else:
        out = x @ params["logits"].astype(x.dtype)
    return out.astype(jnp.float32)


def is_expert_weight(path: tuple) -> bool:
    """Whether the leaf at a path of the parameters (jax.tree.map_with_path) is an expert's."""
    return any(getattr(entry, "key", None) == "experts" for entry in path)
