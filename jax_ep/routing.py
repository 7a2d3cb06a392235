"""Which experts a token takes: what comes before ``make_layout``, in plain JAX.

``keep_heaviest`` says who is dropped where experts have a fixed room, ``group_limited`` is the
router of DeepSeek-V3, ``choose_replicas`` spreads the tokens of an expert over its copies. All are
per-shard functions of one shard's tokens. Letters: T tokens on this rank, K experts per token, E
experts, R ranks of the EP group.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jax_ep import checks, compat, group
from jax_ep.group import AxisName

Array = jax.Array


def keep_heaviest(
    topk_idx: Array,
    topk_weights: Array,
    *,
    expert_capacity: int,
    num_experts: int,
    axis_name: AxisName,
) -> Array:
    """Drops all but the M heaviest choices of each expert, over the whole group.

    ``make_layout`` drops by place: what the highest source ranks send to a full expert, step after
    step. After this, which drops by weight, ``make_layout(..., expert_capacity=M)`` drops nothing,
    and every rank's tokens are treated alike.

    Deterministic, on any backend: equal weights are ordered by source rank, token, k, and NaN is
    lighter than all else. The choice has no gradient; the weights that stay have theirs. Works
    under jit, vmap, grad, scan and checkpoint. Every rank receives all ranks' ids and weights
    (8 * R * T * K bytes) and sorts them: beside a layer of many tokens that is little, beside one
    of few it is a collective more.

    Args:
        topk_idx: int32 [T, K], expert ids. Those outside [0, E) stay as they are.
        topk_weights: [T, K] of a floating type, what is compared, as float32.
        expert_capacity: M, rows.
        num_experts: E.
        axis_name: the mesh axis of the EP group, or a tuple of axes, as in ``make_layout``.

    Returns:
        int32 [T, K]: ``topk_idx`` with -1 in place of what is dropped. ``dispatch`` takes
        topk_weights as they are; to renormalise those that stay, mask them with ``ids >= 0``.

    Raises:
        ValueError: a size, a shape or the axis does not fit.
        TypeError: a dtype or a size has the wrong type.
    """
    where = "jax_ep.keep_heaviest"
    axes = group.axis_names(axis_name, where)
    group.group_size(axes, where)
    topk_idx = checks.expert_ids(where, topk_idx)
    weights = checks.as_float32(
        where, "topk_weights", topk_weights, topk_idx.shape, "one for each id of topk_idx"
    )
    expert_capacity = checks.positive_int(where, "expert_capacity", expert_capacity)
    num_experts = checks.positive_int(where, "num_experts", num_experts)
    with jax.named_scope(where):
        varying = sorted({*axes, *compat.varying_axes(topk_idx), *compat.varying_axes(weights)})
        topk_idx, weights = (compat.vary_over(a, varying) for a in (topk_idx, weights))
        routed = (topk_idx >= 0) & (topk_idx < num_experts)
        ids = jnp.where(routed, topk_idx, num_experts)  # all others have one expert more
        keys = _heaviest_first(lax.stop_gradient(weights))
        all_ids = lax.all_gather(ids.reshape(-1), axes, tiled=True)  # by source rank, token, k
        all_keys = lax.all_gather(keys.reshape(-1), axes, tiled=True)

        # Number of each choice of the group in the order (expert, weight, source).
        by_weight = jnp.argsort(all_keys, stable=True)
        order = by_weight[jnp.argsort(all_ids[by_weight], stable=True)]
        counts = jnp.bincount(all_ids, length=num_experts + 1)
        # The last that each expert keeps; all stay where it has fewer.
        last = jnp.cumsum(counts) - counts + jnp.minimum(counts, expert_capacity) - 1
        last = order[jnp.maximum(last, 0)]
        last_key, last_source = all_keys[last][ids], last[ids]
        source = lax.axis_index(axes) * ids.size + jnp.arange(ids.size).reshape(ids.shape)
        stays = (keys < last_key) | ((keys == last_key) & (source <= last_source))
        return jnp.where(stays | ~routed, topk_idx, -1)


def _heaviest_first(weights: Array) -> Array:
    """int32 keys that ascend as float32 weights descend: by bits, so that subnormals count.

    Both zeros are equal; NaN comes last.
    """
    bits = lax.bitcast_convert_type(weights, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    keys = jnp.where(bits < 0, magnitude, -magnitude)
    is_nan = magnitude > 0x7F800000
    return jnp.where(is_nan, jnp.int32(0x7FFFFFFF), keys)


def group_limited(
    logits: Array,
    bias: Array | None = None,
    *,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """The router of DeepSeek-V3: sigmoid scores, a few groups of experts, the best within them.

    A group is worth the sum of its two best scores with bias; the experts with the best scores with
    bias within the ``top_groups`` best groups are chosen, and weighted by their scores without it.
    With experts spread so that a node holds whole groups, a token goes to ``top_groups`` nodes at
    most. In all comparisons the lower index wins a tie.

    Works under jit, vmap and grad: weights have their gradient in the logits; the choice and the
    bias have none. The bias is learnt by rule instead, from the loads:
    ``bias + rate * jnp.sign(load.mean() - load)`` with
    ``load = layout.expert_load.astype(jnp.float32)`` (summed over data-parallel groups).

    Args:
        logits: [T, E] of a floating type; the scores are float32.
        bias: [E], added to the scores for the choice alone. None: 0. It should be finite: -inf does
            not forbid an expert, which ties with those of the groups left out and may be chosen
            where too few others are.
        top_k: K.
        num_groups: groups of E / num_groups consecutive experts.
        top_groups: how many of them a token may choose from.
        normalize: divide a token's weights by their sum.
        scale: multiplies the weights, at last.

    Returns:
        ids int32 [T, K], the best first, and weights float32 [T, K].

    Raises:
        ValueError: E is no multiple of num_groups, or a token may choose from fewer than K experts.
        TypeError: logits are not floating point, or a size is no int.
    """
    where = "jax_ep.routing.group_limited"
    logits = checks.as_array(where, "logits", logits)
    num_tokens, num_experts = checks.matrix_shape(where, "logits", logits, "[tokens, experts]")
    logits = checks.as_float32(where, "logits", logits, logits.shape, "")
    top_k = checks.positive_int(where, "top_k", top_k)
    num_groups = checks.positive_int(where, "num_groups", num_groups)
    top_groups = checks.positive_int(where, "top_groups", top_groups)
    if num_experts % num_groups:
        raise ValueError(
            f"{where}: logits must have a multiple of num_groups = {num_groups} experts; got "
            f"{num_experts}"
        )
    if top_groups > num_groups:
        raise ValueError(
            f"{where}: top_groups must be at most num_groups = {num_groups}; got {top_groups}"
        )
    group_size = num_experts // num_groups
    if top_k > top_groups * group_size:
        raise ValueError(
            f"{where}: top_k must be at most the {top_groups} * {group_size} experts of a token's "
            f"groups; got {top_k}"
        )
    with jax.named_scope(where):
        scores = jax.nn.sigmoid(logits)
        ranked = lax.stop_gradient(scores)
        if bias is not None:
            bias = checks.as_float32(where, "bias", bias, (num_experts,), "one for each expert")
            ranked = ranked + lax.stop_gradient(bias)
        grouped = ranked.reshape(num_tokens, num_groups, group_size)
        worth = lax.top_k(grouped, min(2, group_size))[0].sum(axis=-1)
        best = lax.top_k(worth, top_groups)[1]
        allowed = (best[:, :, None] == jnp.arange(num_groups)).any(axis=1)
        ranked = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(logits.shape)
        ids = lax.top_k(ranked, top_k)[1].astype(jnp.int32)
        weights = jnp.take_along_axis(scores, ids, axis=1)
        if normalize:
            weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
        return ids, weights * scale


def choose_replicas(
    topk_idx: Array, replicas: Array, num_replicas: Array, *, axis_name: AxisName
) -> Array:
    """Logical experts to the physical ones that hold a copy of them.

    The tables are arrays: another placement of the copies, for other loads, is another value and
    no compilation. A token's copy follows from its rank and its place there, t, alone. At the same
    place ranks take the copies almost in turn, so that few tokens a rank spread too; over places
    the choice is as good as random: of m tokens each of n copies gets m / n, give or take a few
    times its square root, whatever the order of tokens.

    Works under jit and vmap; ids are integers, so there is no gradient.

    Args:
        topk_idx: int32 [T, K], logical expert ids. Those outside [0, E) stay as they are.
        replicas: int32 [E, N], the physical experts of each logical one; what is beyond its number
            is not looked at.
        num_replicas: int32 [E], from 1 to N, at most 2**16.
        axis_name: the mesh axis of the EP group, or a tuple of axes, as in ``make_layout``.

    Returns:
        int32 [T, K], physical ids, for ``make_layout`` with the number of physical experts.

    Raises:
        ValueError: a shape or the axis does not fit.
        TypeError: a dtype is not int32.
    """
    where = "jax_ep.routing.choose_replicas"
    axes = group.axis_names(axis_name, where)
    group.group_size(axes, where)
    topk_idx = checks.expert_ids(where, topk_idx)
    replicas = checks.as_array(where, "replicas", replicas)
    num_replicas = checks.as_array(where, "num_replicas", num_replicas)
    for name, table in (("replicas", replicas), ("num_replicas", num_replicas)):
        if table.dtype != jnp.int32:
            raise TypeError(f"{where}: {name} must be int32; got {table.dtype}")
    num_experts, most = checks.matrix_shape(where, "replicas", replicas, "[experts, copies]")
    if num_replicas.shape != (num_experts,):
        raise ValueError(
            f"{where}: num_replicas must have shape {(num_experts,)}, one for each row of "
            f"replicas; got {num_replicas.shape}"
        )
    with jax.named_scope(where):
        routed = (topk_idx >= 0) & (topk_idx < num_experts)
        logical = jnp.where(routed, topk_idx, 0)
        number = _copy_numbers(lax.axis_index(axes), topk_idx.shape[0])[:, None]
        copies = jnp.clip(num_replicas[logical], 1, most)
        copy = (number * copies.astype(jnp.uint32) >> 16).astype(jnp.int32)
        return jnp.where(routed, replicas[logical, copy], topk_idx)


def _copy_numbers(rank: Array, num_tokens: int) -> Array:
    """uint32 [T] below 2**16; of n copies a token takes ``number * n >> 16``.

    Ranks are golden-ratio steps apart, which fill an interval evenly in any number, also every
    second or fourth of them; places in a rank are mixed by a hash (lowbias32).
    """
    place = jnp.arange(num_tokens, dtype=jnp.uint32)
    place = (place ^ (place >> 16)) * jnp.uint32(0x7FEB352D)
    place = (place ^ (place >> 15)) * jnp.uint32(0x846CA68B)
    place = place ^ (place >> 16)
    return (rank.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + place) >> 16
