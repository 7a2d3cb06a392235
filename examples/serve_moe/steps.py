"""The two programs of the server: a chunk of prefill, and a step of decoding of all slots.

A slot holds one sequence: its keys and values and all that a step needs to go on without the host.
The slots of all devices lie in one array each, split over the mesh ("dp", "ep"); both programs are
given them, donated, and give them back.

Letters: D devices, S slots of a device, B sequences and Q tokens of each in a call of the model.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import model
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from serve_moe import moe, sampling

import jax_ep

Array = jax.Array
AXES = ("dp", "ep")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is fixed when the programs are compiled.

    Attributes:
        slots_per_device: S.
        max_length: tokens of a sequence, prompt and answer, at most.
        buckets: lengths that chunks of a prompt are padded to, ascending; the last is the longest
            chunk, and each divides it.
        end_tokens: tokens that end a sequence.
        dispatch: how tokens reach their experts, a key of moe.LAYERS.
        dtype: of activations and the cache.
    """

    slots_per_device: int
    max_length: int
    buckets: tuple[int, ...]
    end_tokens: tuple[int, ...]
    dispatch: str = "jax_ep"
    dtype: str = "float32"

    @property
    def cache_length(self) -> int:
        """Tokens that a slot has room for: chunks begin at multiples of the longest."""
        return -(-self.max_length // self.buckets[-1]) * self.buckets[-1]


def empty_slots(mesh: Mesh, config: model.Config, limits: Limits) -> dict:
    """Makes the slots, all free, where they live."""
    num_slots = mesh.size * limits.slots_per_device
    entry = (num_slots, config.num_key_value_heads, limits.cache_length, config.head_dim)

    def make() -> dict:
        return {
            "cache": [
                {name: jnp.zeros(entry, limits.dtype) for name in "kv"}
                for _ in range(config.num_hidden_layers)
            ],
            "token": jnp.zeros(num_slots, jnp.int32),  # the last one, which is not yet in the cache
            "length": jnp.zeros(num_slots, jnp.int32),  # tokens in the cache
            "left": jnp.zeros(num_slots, jnp.int32),  # tokens that the request may yet get
            "active": jnp.zeros(num_slots, bool),
            "temperature": jnp.zeros(num_slots, jnp.float32),
            "top_p": jnp.ones(num_slots, jnp.float32),
            "seed": jnp.zeros(num_slots, jnp.uint32),
        }

    return jax.jit(make, out_shardings=NamedSharding(mesh, P(AXES)))()


def attend_to_cache(
    q: Array, k: Array, v: Array, *, cache: dict, slots: Array | None, positions: Array
) -> tuple[Array, dict]:
    """Writes k and v [B, Q, G, D] to the cache, and attends to all up to each token's position.

    The cache lies as the products take it: not by position first, or each step would turn it.

    Args:
        q: [B, Q, N, D].
        k: the tokens' keys.
        v: their values.
        cache: "k" and "v" [S, G, cache_length, D].
        slots: int32 [B], where the sequences are; None: B is S, sequence i in slot i.
        positions: int32 [B, Q]; -1 is no token: it writes nothing, and its output is of no use.

    Returns:
        [B, Q, N, D], and the cache.
    """
    rows = jnp.arange(q.shape[0]) if slots is None else slots
    _, num_groups, length, head_dim = cache["k"].shape
    # Beyond the end: dropped.
    at = rows[:, None], slice(None), jnp.where(positions >= 0, positions, length)
    cache = {name: cache[name].at[at].set(new, mode="drop") for name, new in (("k", k), ("v", v))}
    k, v = (cache[name] if slots is None else cache[name][slots] for name in "kv")
    if slots is not None:
        # What an earlier sequence has left in the slot gets weight 0, but 0 * NaN is NaN: it goes.
        end = 1 + jnp.max(positions, axis=1)
        v = jnp.where((jnp.arange(length) < end[:, None])[:, None, :, None], v, 0)
        written = jnp.where(end > 0, slots, cache["v"].shape[0])
        cache["v"] = cache["v"].at[written].set(v, mode="drop")
    grouped = q.reshape(*q.shape[:2], num_groups, -1, head_dim)
    scores = jnp.einsum("bqgnd,bgld->bgnql", grouped, k, preferred_element_type=jnp.float32)
    mask = jnp.arange(length) <= positions[..., None]  # [B, Q, length]
    scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgnql,bgld->bqgnd", probs, v).reshape(q.shape), cache


def _forward(
    params: dict,
    tokens: Array,
    positions: Array,
    cache: list,
    slots: Array | None,
    config: model.Config,
    limits: Limits,
) -> tuple[Array, list, dict]:
    """Runs tokens int32 [B, Q] through the model; returns [B, Q, H], the cache and counts."""
    is_token = positions.reshape(-1) >= 0
    layer_fn = functools.partial(
        moe.LAYERS[limits.dispatch],
        is_token=is_token,
        config=config,
    )
    x = model.embed(params, tokens, limits.dtype)
    new_cache, counts = [], []
    for layer, layer_cache in zip(params["layers"], cache, strict=True):
        attend = functools.partial(
            attend_to_cache, cache=layer_cache, slots=slots, positions=positions
        )
        x, layer_cache, layer_counts = model.block(x, layer, positions, attend, layer_fn, config)
        new_cache.append(layer_cache)
        counts.append(layer_counts)
    return x, new_cache, jax.tree.map(lambda *c: sum(c), *counts)


def _is_end(token: Array, limits: Limits) -> Array:
    return jnp.isin(token, jnp.array(limits.end_tokens, jnp.int32))


def _decode(
    params: dict, slots: dict, keep: Array, config: model.Config, limits: Limits
) -> tuple[dict, dict]:
    """A token for each active slot of this device that keep bool [S] does not end."""
    active = slots["active"] & keep
    positions = jnp.where(active, slots["length"], -1)[:, None]
    x, cache, counts = _forward(
        params, slots["token"][:, None], positions, slots["cache"], None, config, limits
    )
    length = slots["length"] + active
    token = sampling.sample(
        model.logits(params, x[:, 0], config),
        slots["temperature"],
        slots["top_p"],
        slots["seed"],
        length,
    )
    left = slots["left"] - active
    slots = slots | {
        "cache": cache,
        "token": jnp.where(active, token, slots["token"]),
        "length": length,
        "left": left,
        "active": active & (left > 0) & ~_is_end(token, limits),
    }
    return slots, {"token": jnp.where(active, token, -1), **counts}


def _prefill(
    params: dict, slots: dict, chunk: dict, config: model.Config, limits: Limits
) -> tuple[dict, dict]:
    """A chunk of one slot's prompt, see `empty_chunk`; after the last one the first token."""
    at, count = chunk["slot"], chunk["count"]
    place = jnp.arange(chunk["tokens"].shape[1])
    positions = jnp.where(place < count[:, None], chunk["start"][:, None] + place, -1)
    x, cache, counts = _forward(
        params, chunk["tokens"], positions, slots["cache"], at, config, limits
    )
    last_x = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    length = chunk["start"] + count
    sampling_of = {name: chunk[name] for name in ("temperature", "top_p", "seed")}
    token = sampling.sample(model.logits(params, last_x, config), **sampling_of, position=length)
    begins = chunk["is_last"] & (count > 0)
    left = chunk["left"] - 1
    new = {
        "token": token,
        "length": length,
        "left": left,
        "active": (left > 0) & ~_is_end(token, limits),
        **sampling_of,
    }
    at = jnp.where(begins, at, limits.slots_per_device)  # beyond the end: dropped
    slots = {name: slots[name].at[at].set(new[name], mode="drop") for name in new}
    return slots | {"cache": cache}, {"token": jnp.where(begins, token, -1), **counts}


def gather(values: Array) -> Array:
    """int32 [n] of each device to [D, n] on all of them, through jax_ep.

    XLA's own gather would do, but that has no end if another process has died.
    """
    num_devices = jax.lax.axis_size(AXES)
    row = jnp.pad(values, (0, -values.size % 4))  # of a multiple of 16 bytes
    # A row for each device. The same ids on all are not the same tokens: jax_ep would warn.
    ids = jnp.arange(num_devices)[:, None] + 0 * jax.lax.axis_index(AXES)
    _, recv = jax_ep.layout_and_dispatch(
        jnp.tile(row, (num_devices, 1)),
        ids,
        num_experts=num_devices,
        axis_name=AXES,
        capacity=num_devices,
    )
    return recv.tokens[:, : values.size]


def _gather_all(out: dict[str, Array]) -> dict[str, Array]:
    """The same of several arrays at once; each becomes one array of all devices'."""
    ends = np.cumsum([array.size for array in out.values()])
    parts = jnp.split(gather(jnp.concatenate(list(out.values()))), ends[:-1], axis=1)
    return {name: part.reshape(-1) for name, part in zip(out, parts, strict=True)}


def empty_chunk(num_devices: int, bucket: int) -> dict[str, np.ndarray]:
    """What a call of prefill takes, for each device: here nothing, a count of 0."""
    ints = {name: np.zeros(num_devices, np.int32) for name in ("slot", "start", "count", "left")}
    return ints | {
        "tokens": np.zeros((num_devices, bucket), np.int32),
        "is_last": np.zeros(num_devices, bool),  # whether the prompt ends with this chunk
        "temperature": np.zeros(num_devices, np.float32),
        "top_p": np.ones(num_devices, np.float32),
        "seed": np.zeros(num_devices, np.uint32),
    }


class Steps:
    """Compiles the programs, and runs them on the slots that it holds."""

    def __init__(self, params: dict, mesh: Mesh, config: model.Config, limits: Limits):
        self.mesh, self.config, self.limits = mesh, config, limits
        self._params = params
        self._slots = empty_slots(mesh, config, limits)
        self._keep: np.ndarray | None = None  # of the last step: most take the same slots
        self._by_device = NamedSharding(mesh, P(AXES))
        # With several processes each device has all results, so that process 0 can fetch them.
        self._is_gathered = jax.process_count() > 1
        param_specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)

        def program(shard: Any) -> Any:
            def run(*args: Any) -> tuple[dict, dict]:
                slots, out = shard(*args, config=config, limits=limits)
                return slots, _gather_all(out) if self._is_gathered else out

            sharded = jax.shard_map(
                run,
                mesh=mesh,
                in_specs=(param_specs, P(AXES), P(AXES)),
                out_specs=(P(AXES), P(AXES)),
            )
            return jax.jit(sharded, donate_argnums=1, out_shardings=self._by_device)

        self._decode_program, self._prefill_program = program(_decode), program(_prefill)

    def compile(self) -> None:
        """Runs each program once on nothing, so that no request waits for a compilation."""
        for bucket in self.limits.buckets:
            self.prefill(empty_chunk(self.mesh.size, bucket))
        num_slots = self.mesh.size * self.limits.slots_per_device
        jax.block_until_ready(self.decode(np.zeros(num_slots, bool)))

    def begin_all(self, length: int, left: int) -> None:
        """Gives every slot a sequence of `length` tokens that gets `left` more: to measure steps.

        Which tokens they are is left open; keys and values are zeros.
        """

        def begin(slots: dict) -> dict:
            def full(name: str, value: Any) -> Array:
                return jnp.full_like(slots[name], value)

            return slots | {
                "token": jnp.arange(slots["token"].size, dtype=jnp.int32) % self.config.vocab_size,
                "length": full("length", length),
                "left": full("left", left),
                "active": full("active", True),
            }

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self._slots)
        self._slots = jax.jit(begin, donate_argnums=0, out_shardings=shardings)(self._slots)

    def _place(self, array: np.ndarray) -> Array:
        """What every process has in full; each places its own devices' part."""
        return jax.make_array_from_callback(array.shape, self._by_device, lambda at: array[at])

    def decode(self, keep: np.ndarray) -> dict[str, Array]:
        """Starts a step of decoding.

        Args:
            keep: bool [D * S]: slots that are not in it end here.

        Returns:
            "token" int32 [D * S], -1 where there is none; "expert_rows" int32 [D * L], rows of
            each expert of each device in all layers; "dropped" int32 [D].
        """
        if self._keep is None or not np.array_equal(keep, self._keep):
            self._keep, self._placed_keep = keep.copy(), self._place(keep)
        return self._run(self._decode_program, self._placed_keep)

    def prefill(self, chunk: dict[str, np.ndarray]) -> dict[str, Array]:
        """Starts a chunk of prefill on each device; returns what `decode` does, "token" [D]."""
        return self._run(self._prefill_program, jax.tree.map(self._place, chunk))

    def _run(self, program: Any, argument: Any) -> dict[str, Array]:
        self._slots, out = program(self._params, self._slots, argument)
        if self._is_gathered:
            return {name: array.addressable_data(0) for name, array in out.items()}
        return out
