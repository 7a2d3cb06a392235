"""Trains a byte-level mixture-of-experts language model on the Python standard library.

The experts are spread over the "ep" axis of a dp x ep mesh; `jax_ep` moves every token to the ranks
of its experts and back, inside one jitted training step. The text is the source code that comes
with the interpreter running this file, so there is nothing to download:

    python examples/train_moe_lm.py                      # 8 virtual devices on CPU, or all GPUs
    python examples/train_moe_lm.py --resume             # goes on from the last checkpoint
    python examples/train_moe_lm.py --dispatch dense     # the same model without jax_ep
    python examples/train_moe_lm.py --micro-batches 2 --overlap     # docs/overlap.md
    python examples/train_moe_lm.py --router group-limited          # DeepSeek-V3's, docs/recipes.md
    python examples/train_moe_lm.py --export DIR         # writes a checkpoint for serve_moe too
    python examples/train_moe_lm.py --init DIR           # begins with such a checkpoint

With several processes, start each of them like this (where JAX finds the cluster's settings by
itself, --distributed alone is enough):

    python examples/train_moe_lm.py --distributed --coordinator HOST:PORT --num-processes N \
        --process-id I

On GPUs with JAX_LOCAL_DEVICE_IDS=I in its environment: each process takes those that are its own.

The model, plain JAX, is in model.py. The part to copy is `moe_jax_ep`.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform
import sysconfig
import time

# Read when JAX starts, without effect on GPUs. A CPU stands for 8 devices (a count that is already
# in XLA_FLAGS wins); jaxlib 0.10 needs two threads for each to keep several steps in flight.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.getenv('XLA_FLAGS', '')}"
os.environ["NPROC"] = os.getenv("NPROC", str(max(16, os.cpu_count() or 1)))

import checkpoint
import jax
import jax.numpy as jnp
import model
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

import jax_ep

AXES = ("dp", "ep")
VOCAB = 256  # a token is a byte


def option(default: int | float | str | bool, text: str, **argument):
    """A field of Config, with the help text of its flag and other arguments of add_argument."""
    return dataclasses.field(default=default, metadata={"help": text, **argument})


@dataclasses.dataclass(frozen=True)
class Config:
    """The model, and how it is trained. Each field is also a flag: --num-layers and so on."""

    num_layers: int = option(2, "transformer blocks")
    num_heads: int = option(4, "attention heads")
    num_kv_heads: int = option(2, "heads of keys and values, a divisor of the attention heads")
    d_model: int = option(128, "width of the model")
    d_expert: int = option(192, "hidden size of an expert")
    num_experts: int = option(8, "experts of a layer")
    top_k: int = option(2, "experts per token")
    seq_len: int = option(128, "bytes per sequence")
    capacity_factor: float = option(1.25, "room for rows, over their mean number; 0: no drops")
    expert_alignment: int = option(8, "each expert's rows start at a multiple of this")
    balance_weight: float = option(0.01, "weight of the load-balancing loss")
    router: str = option(
        "softmax",
        "group-limited: DeepSeek-V3's, 4 of 8 groups",
        choices=("softmax", "group-limited"),
    )
    bias_rate: float = option(1e-3, "a step's change of the group-limited router's bias")
    dispatch: str = option("jax_ep", "dense: every rank computes all", choices=("jax_ep", "dense"))
    micro_batches: int = option(1, "parts of a step's sequences, each on its own")
    overlap: bool = option(False, "let one part's rows travel while another computes, on GPUs")
    remat: bool = option(False, "recompute each block in the backward pass")
    dtype: str = option("", "of activations; if not given: float32 on CPU, else bfloat16")
    imported: model.Config | None = None  # of the checkpoint in --init

    @property
    def sizes(self) -> model.Config:
        """The sizes by their names in a checkpoint."""
        return self.imported or model.Config(
            vocab_size=VOCAB,
            hidden_size=self.d_model,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.d_model // self.num_heads,
            moe_intermediate_size=self.d_expert,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            rope_theta=1e4,
            max_position_embeddings=self.seq_len,
        )

    def with_sizes_of(self, imported: model.Config) -> "Config":
        """The same with a checkpoint's sizes in place of the flags'."""
        return dataclasses.replace(
            self,
            imported=imported,
            num_layers=imported.num_hidden_layers,
            num_heads=imported.num_attention_heads,
            num_kv_heads=imported.num_key_value_heads,
            d_model=imported.hidden_size,
            d_expert=imported.moe_intermediate_size,
            num_experts=imported.num_experts,
            top_k=imported.num_experts_per_tok,
        )


FLAGS = [field for field in dataclasses.fields(Config) if field.metadata]


# ---------------------------------------------------------------------------------------- data


def load_corpus() -> tuple[np.ndarray, np.ndarray]:
    """Reads the standard library: training and held-out bytes, split by whole files."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    skipped |= {"encodings", "pydoc_data", "lib2to3"}  # mostly generated tables
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [n for n in names if skipped.isdisjoint(n.parts) and "_sysconfigdata" not in n.name]
    texts = [(root / name).read_bytes() for name in sorted(names, key=pathlib.Path.as_posix)]
    if len(texts) < 40:
        raise SystemExit(f"found only {len(texts)} source files of the standard library in {root}")
    train = b"\n".join(text for i, text in enumerate(texts) if i % 20 != 10)
    return np.frombuffer(train, np.uint8), np.frombuffer(b"\n".join(texts[10::20]), np.uint8)


def digest(text: np.ndarray) -> np.ndarray:
    """SHA-256 of the text, as bytes: JAX would make a larger integer an int32."""
    return np.frombuffer(hashlib.sha256(text).digest(), np.uint8)


def training_batch(text: np.ndarray, seed: int, step: int, batch: int, length: int) -> np.ndarray:
    """Draws one step's batch: a pure function of seed and step, so a resumed run repeats it."""
    starts = np.random.default_rng((seed, step)).integers(0, len(text) - length, batch)
    return text[starts[:, None] + np.arange(length)].astype(np.int32)


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Places an array that every process has in full; each process keeps its own devices' part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


# --------------------------------------------------------------------------------------- model


def balance_loss(probs: jax.Array, load: jax.Array) -> jax.Array:
    """The load-balancing loss of Switch and GShard, 1 when the load is even.

    `probs` [E] are the router's, a mean over this rank's tokens; `load` [E] holds each expert's
    share of the rows of the whole EP group. The loss is linear in `probs`, so the mean over ranks
    is the loss of the group.
    """
    return probs.size * jnp.sum(load * probs)


def route(x: jax.Array, layer: dict, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns probs [T, E] of x [T, d_model], and their top-k, weights [T, K] and ids [T, K]."""
    if config.router == "softmax":
        return model.route(x, layer["router"], config.sizes)
    logits = x.astype(jnp.float32) @ layer["router"].astype(jnp.float32)
    topk_idx, topk_scores = jax_ep.routing.group_limited(
        logits, layer["bias"], top_k=config.top_k, num_groups=8, top_groups=4, normalize=False
    )
    scores = jax.nn.sigmoid(logits)
    return scores / jnp.sum(scores, axis=-1, keepdims=True), topk_scores, topk_idx


def begin_biases(params: dict, config: Config) -> dict:
    """Adds what the router has beside its matrix."""
    if config.router == "softmax":
        return params
    layers = [layer | {"bias": jnp.zeros(config.num_experts)} for layer in params["layers"]]
    return params | {"layers": layers}


def move_biases(params: dict, before: dict, load: jax.Array, config: Config) -> dict:
    """Moves the routers' biases from what they were towards an even load [layers, E]."""
    if config.router == "softmax":
        return params
    change = config.bias_rate * jnp.sign(jnp.mean(load, axis=1, keepdims=True) - load)
    layers = zip(params["layers"], before["layers"], change, strict=True)
    return params | {"layers": [new | {"bias": old["bias"] + by} for new, old, by in layers]}


@jax.named_scope("moe")
def moe_jax_ep(x: jax.Array, layer: dict, config: Config) -> tuple[jax.Array, jax.Array, dict]:
    """The MoE layer of one shard: x [T, d_model] are this rank's tokens.

    Returns:
        The output [T, d_model], the router's mean probabilities [E] and metrics, all of this rank.
    """
    probs, topk_probs, topk_idx = route(x, layer, config)
    layout = jax_ep.make_layout(
        topk_idx,
        num_experts=config.num_experts,
        axis_name="ep",
        capacity=jax_ep.capacity(
            *topk_idx.shape,
            jax.lax.axis_size("ep"),
            config.capacity_factor or None,
            num_experts=config.num_experts,
            expert_alignment=config.expert_alignment,
        ),
        expert_alignment=config.expert_alignment,
        overlap=config.overlap,
    )
    # What found no room is dropped; the token's other experts then share the whole weight.
    topk_weights = model.normalised(jnp.where(layout.kept, topk_probs, 0.0), config.sizes)

    recv = jax_ep.dispatch(x, layout, topk_weights)
    y = model.grouped_experts(recv.tokens, layer["experts"], recv.group_sizes)
    out = jax_ep.combine(y, layout, recv.weights)

    load = layout.expert_load / jnp.sum(layout.expert_load)
    metrics = {"expert_load": load, "dropped": layout.num_dropped / topk_idx.size}
    return out, jnp.mean(probs, axis=0), metrics


@jax.named_scope("moe_dense")
def moe_dense(x: jax.Array, layer: dict, config: Config) -> tuple[jax.Array, jax.Array, dict]:
    """The same layer without jax_ep: every rank fetches all experts and runs all its tokens."""
    probs, topk_probs, topk_idx = route(x, layer, config)
    one_hot = jax.nn.one_hot(topk_idx, config.num_experts)  # [T, K, E]
    weights = jnp.einsum("tk,tke->te", model.normalised(topk_probs, config.sizes), one_hot)

    experts = jax.tree.map(lambda w: jax.lax.all_gather(w, "ep", tiled=True), layer["experts"])
    y = model.batched_experts(jnp.broadcast_to(x, (config.num_experts, *x.shape)), experts)
    out = jnp.einsum("etd,te->td", y, weights.astype(x.dtype))

    load = jnp.mean(jax.lax.all_gather(one_hot, "ep"), axis=(0, 1, 2))
    metrics = {"expert_load": load, "dropped": 0 * load[0]}
    return out, jnp.mean(probs, axis=0), metrics


def forward(params: dict, tokens: jax.Array, config: Config) -> tuple[jax.Array, jax.Array, dict]:
    """Per-shard forward pass: tokens int32 [batch, seq] to logits [batch, seq, VOCAB]."""
    layer_of = {"jax_ep": moe_jax_ep, "dense": moe_dense}[config.dispatch]
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch // config.micro_batches, length))

    def moe(x: jax.Array, layer: dict) -> tuple[jax.Array, tuple]:
        out, *aside = layer_of(x, layer, config)
        return out, aside

    def run_block(layer: dict, x: jax.Array) -> tuple[jax.Array, tuple]:
        x, _, aside = model.block(x, layer, positions, model.attend_causally, moe, config.sizes)
        return x, aside

    if config.remat:
        # With the layouts saved, the recomputation moves data only: nothing is routed twice.
        policy = jax.checkpoint_policies.save_only_these_names("jax_ep_layout")
        run_block = jax.checkpoint(run_block, policy=policy)

    # Micro-batches do not depend on each other, so with `overlap` the rows of one may travel while
    # another computes. Nothing else is to be done for it: XLA finds what can be beside what.
    parts = jnp.split(model.embed(params, tokens, config.dtype), config.micro_batches)
    balance, metrics = 0.0, []
    for layer in params["layers"]:
        parts, asides = zip(*(run_block(layer, part) for part in parts), strict=True)
        probs, layer_metrics = jax.tree.map(lambda *values: sum(values) / len(values), *asides)
        balance += balance_loss(probs, layer_metrics["expert_load"]) / config.num_layers
        metrics.append(layer_metrics)
    logits = model.logits(params, jnp.concatenate(parts), config.sizes)
    return logits, balance, jax.tree.map(lambda *m: jnp.stack(m), *metrics)


def shard_loss(params: dict, batch: jax.Array, config: Config) -> tuple[jax.Array, dict]:
    """Loss and metrics of batch int32 [batch, seq + 1], averaged over the whole mesh."""
    logits, balance, metrics = forward(params, batch[:, :-1], config)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    metrics["loss"] = jnp.mean(losses)
    return jax.lax.pmean((metrics["loss"] + config.balance_weight * balance, metrics), AXES)


def shard_sample(
    params: dict, window: jax.Array, key: jax.Array, temperature: jax.Array, length: int, config
) -> jax.Array:
    """Continues window int32 [batch, seq]; returns the new bytes [batch, length].

    The window slides and is recomputed for each byte: simple, and shapes stay fixed. Nothing is
    dropped here, so no sequence depends on another one.
    """
    config = dataclasses.replace(config, capacity_factor=0.0, micro_batches=1, overlap=False)
    key = jax.random.fold_in(key, jax.lax.axis_index(AXES))

    def next_byte(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = forward(params, window, config)[0][:, -1]
        new = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        return jnp.concatenate([window[:, 1:], new[:, None].astype(jnp.int32)], axis=1), new

    return jax.lax.scan(next_byte, window, jax.random.split(key, length))[1].T


# ------------------------------------------------------------------------------------ training


def state_shardings(state: dict, mesh: jax.sharding.Mesh) -> dict:
    """Returns a sharding per leaf: experts over "ep", everything else replicated.

    The optimiser's moments repeat the parameters' dictionaries, so the same rule finds them.
    """

    def sharding(path: tuple, _) -> NamedSharding:
        return NamedSharding(mesh, P("ep") if model.is_expert_weight(path) else P())

    return jax.tree.map_with_path(sharding, state)


def build_steps(config: Config, mesh: jax.sharding.Mesh, optimizer, shardings: dict) -> tuple:
    """Returns the jitted train_step, eval_loss and sample, each over the whole mesh."""
    param_specs = jax.tree.map(lambda sharding: sharding.spec, shardings["params"])
    loss_fn = jax.shard_map(
        functools.partial(shard_loss, config=config),
        mesh=mesh,
        in_specs=(param_specs, P(AXES)),
        out_specs=P(),
    )

    # The gradient is taken around shard_map, not inside it: out here parameters and gradients are
    # whole arrays, so the optimiser needs no thought about the mesh (the global norm spans all
    # experts). JAX transposes the shard_map and, as check_vma is on by default, inserts the sums:
    # over "dp" and "ep" for replicated parameters, over "dp" alone for the experts.
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state: dict, batch: jax.Array) -> tuple[dict, dict]:
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"], batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            params = move_biases(params, state["params"], metrics["expert_load"], config)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    @jax.jit
    def eval_loss(params: dict, batch: jax.Array) -> jax.Array:
        return loss_fn(params, batch)[1]["loss"]

    @functools.partial(jax.jit, static_argnames="length")
    def sample(params, window, key, temperature, length: int) -> jax.Array:
        return jax.shard_map(
            functools.partial(shard_sample, length=length, config=config),
            mesh=mesh,
            in_specs=(param_specs, P(AXES), P(), P()),
            out_specs=P(AXES),
        )(params, window, key, temperature)

    return train_step, eval_loss, sample


def plot(history: dict, unigram: float, path: pathlib.Path) -> None:
    """Draws the losses, the dropped rows and every layer's expert load."""
    loads = np.array(history["expert_load"])  # [step, layer, expert]
    steps = 1 + np.arange(len(loads))
    figure = Figure(figsize=(5 * (2 + loads.shape[1]), 4), layout="constrained")
    loss_axes, drop_axes, *load_axes = figure.subplots(1, 2 + loads.shape[1])
    loss_axes.plot(steps, history["loss"], lw=0.8, label="training")
    loss_axes.plot(*np.array(history["heldout"]).reshape(-1, 2).T, "o-", ms=3, label="held out")
    loss_axes.axhline(unigram, color="gray", ls=":", label="unigram entropy")
    loss_axes.set(xlabel="step", ylabel="nats per byte", title="loss")
    loss_axes.legend()
    for layer, dropped in enumerate(100 * np.array(history["dropped"]).T):
        drop_axes.plot(steps, dropped, lw=0.8, label=f"layer {layer}")
    drop_axes.set(xlabel="step", ylabel="% of rows", title="dropped", ylim=(0, None))
    drop_axes.legend()
    for layer, axes in enumerate(load_axes):
        names = [f"expert {e}" for e in range(loads.shape[2])]
        axes.stackplot(steps, loads[:, layer].T, lw=0, labels=names)
        axes.set(xlabel="step", ylim=(0, 1), title=f"layer {layer}: share of rows per expert")
        axes.legend(loc="upper left", fontsize="x-small", ncols=2, reverse=True)
    figure.savefig(path, dpi=120)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=600, help="training steps in all")
    add("--batch", type=int, default=16, help="sequences per step, over all devices")
    add("--learning-rate", type=float, default=3e-3, help="peak, after warmup; then cosine")
    add("--seed", type=int, default=0, help="of parameters, data order and sampling")
    add("--dp", type=int, help="data-parallel ranks; if not given: all devices // ep")
    add("--ep", type=int, help="expert-parallel ranks; if not given: 4, or all devices if fewer")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/moe_lm"), help="output folder")
    add("--init", type=pathlib.Path, help="begin with this checkpoint; its sizes win over flags")
    add("--export", type=pathlib.Path, help="write the trained model there, for serve_moe")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--overwrite", action="store_true", help="delete the checkpoints in --out and start again")
    add("--stop-after", type=int, help="checkpoint and stop after this step, as if interrupted")
    add("--checkpoint-every", type=int, default=200, help="steps between checkpoints")
    add("--eval-every", type=int, default=100, help="steps between held-out evaluations")
    add("--prompt", default="import os\n\n\ndef ", help="what the sample continues")
    add("--sample-bytes", type=int, default=300, help="length of the sample; 0: none")
    add("--temperature", type=float, default=0.7, help="of sampling; 0: always the likeliest byte")
    add("--distributed", action="store_true", help="this is one of several processes")
    add("--coordinator", help="HOST:PORT of process 0; like the next two, if JAX cannot find it")
    add("--num-processes", type=int, help="number of processes")
    add("--process-id", type=int, help="index of this process")
    for field in FLAGS:
        kind = {"action": "store_true"} if field.type is bool else {"type": field.type}
        name = "--" + field.name.replace("_", "-")
        add(name, default=field.default, **kind, **field.metadata)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Trains, evaluates, samples and plots.

    Args:
        argv: Command line, without the program's name; sys.argv if None.

    Returns:
        A summary: "versions", "config" and "mesh" of the run, "losses" of all steps,
        "heldout_loss" and "unigram_entropy" (nats per byte), "tokens_per_second", "dropped"
        (fraction of rows), "sample" and the final "params".
    """
    args = parse_args(argv)
    if not args.distributed:
        return train(args)
    jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    jax_ep.initialize()
    summary = train(args)
    jax_ep.finalize()
    return summary


def train(args: argparse.Namespace) -> dict:
    """Does what `main` says, in a process that is set up. Every process runs all of it."""
    is_main = jax.process_index() == 0
    say = tqdm.tqdm.write if is_main else lambda text: None
    ep = args.ep or min(4, jax.device_count())
    dp = args.dp or jax.device_count() // ep
    config = Config(**{field.name: getattr(args, field.name) for field in FLAGS})
    if args.init:
        config = config.with_sizes_of(checkpoint.read_config(args.init))
    parts = dp * ep * max(1, config.micro_batches)
    if (
        config.micro_batches < 1
        or dp * ep > jax.device_count()
        or args.batch % parts
        or config.num_experts % ep
    ):
        raise SystemExit(
            f"dp {dp} x ep {ep} must fit {jax.device_count()} devices, and times --micro-batches "
            f"{config.micro_batches} divide --batch {args.batch}; ep must divide --num-experts "
            f"{config.num_experts}"
        )
    if args.export and config.router != "softmax":
        raise SystemExit("--export: checkpoints of that format have --router softmax")
    if config.sizes.vocab_size < VOCAB:
        raise SystemExit(f"{args.init} has {config.sizes.vocab_size} tokens, fewer than bytes")
    mesh = jax.make_mesh((dp, ep), AXES, devices=jax.devices()[: dp * ep])
    device = mesh.devices.flat[0]
    if not config.dtype:
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
        config = dataclasses.replace(config, dtype=dtype)

    # Data. The held-out batches are fixed windows, evenly spaced.
    corpus, heldout = load_corpus()
    if args.distributed:
        multihost_utils.assert_equal(digest(corpus), "the processes read different sources")
    frequency = np.bincount(corpus) / len(corpus)
    unigram = float(-np.sum(frequency * np.log(np.maximum(frequency, 1e-30))))
    length = args.seq_len + 1
    by_batch = NamedSharding(mesh, P(AXES))
    starts = np.linspace(0, len(heldout) - length, 8 * args.batch, dtype=int)
    windows = heldout[starts[:, None] + np.arange(length)].astype(np.int32)
    eval_batches = [place(part, by_batch) for part in np.split(windows, 8)]

    # State: parameters, the optimiser's moments and the step, initialised right where they live.
    peak, warmup = args.learning_rate, 1 + args.steps // 20
    schedule = optax.warmup_cosine_decay_schedule(
        peak / warmup, peak, warmup, args.steps, end_value=peak / 20
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))

    def init_state(key: jax.Array) -> dict:
        params = begin_biases(model.init_params(key, config.sizes), config)
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

    key = jax.random.key(args.seed)
    shardings = state_shardings(jax.eval_shape(init_state, key), mesh)
    state = jax.jit(init_state, out_shardings=shardings)(key)
    if args.init:
        loaded = checkpoint.load_params(args.init, config.sizes, mesh, "float32")
        state["params"] = begin_biases(loaded, config)
    history = {"loss": [], "dropped": [], "expert_load": [], "heldout": []}
    checkpoints = ocp.CheckpointManager(
        (args.out / "checkpoints").absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
    )
    found = checkpoints.latest_step()
    if found is not None and args.resume:
        items = {"state": ocp.args.StandardRestore(state), "history": ocp.args.JsonRestore()}
        restored = checkpoints.restore(found, args=ocp.args.Composite(**items))
        state, history = restored["state"], restored["history"]
    elif found is not None and args.overwrite:
        for step in checkpoints.all_steps():
            checkpoints.delete(step)
    elif found is not None:
        raise SystemExit(f"{args.out} holds a run: pass --resume, --overwrite or another --out")

    num_params = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    versions = {"jax_ep": jax_ep.__version__, "jax": jax.__version__, "optax": optax.__version__}
    versions["python"] = platform.python_version()
    settings = {field.name: getattr(config, field.name) for field in FLAGS} | {
        name: getattr(args, name) for name in ("steps", "batch", "learning_rate", "seed")
    }
    say(", ".join(f"{name} {version}" for name, version in versions.items()))
    say(f"dp {dp} x ep {ep} on {device.device_kind}, {jax.process_count()} process(es)")
    for name, value in settings.items():
        say(f"  {name:<17} {value}")
    say(f"{num_params:,} parameters; {len(corpus):,} bytes to train on, {len(heldout):,} held out")
    say(f"unigram entropy: {unigram / np.log(2):.3f} bits = {unigram:.3f} nats per byte")

    def batch_of(step: int) -> jax.Array:
        return place(training_batch(corpus, args.seed, step, args.batch, length), by_batch)

    train_step, eval_loss, sample = build_steps(config, mesh, optimizer, shardings)
    start, stop = int(state["step"]), min(args.stop_after or args.steps, args.steps)
    say("compiling the training step ..")
    clock = time.perf_counter()
    train_step = train_step.lower(state, batch_of(start)).compile()  # before the clock starts
    say(f"compiled in {time.perf_counter() - clock:.1f} s")
    pending, seconds, rate, clock = [], 0.0, 0.0, time.perf_counter()
    progress = tqdm.tqdm(total=args.steps, initial=start, disable=not is_main, unit="step")
    for step in range(start + 1, stop + 1):
        state, metrics = train_step(state, batch_of(step - 1))
        pending.append(metrics)
        progress.update()
        eval_due = step % args.eval_every == 0 or step == args.steps
        save_due = step % args.checkpoint_every == 0 or step == stop
        # Fetching metrics only now and then keeps the devices from waiting for Python. On CPU it
        # is also a bound on the steps in flight, where jaxlib 0.10 cannot take more than some 30.
        if len(pending) < 8 and not eval_due and not save_due:
            continue
        for fetched in jax.device_get(pending):
            for name, value in fetched.items():
                history[name].append(value.tolist())
        pending.clear()
        seconds += time.perf_counter() - clock
        rate = (step - start) * args.batch * args.seq_len / seconds
        progress.set_postfix_str(f"loss {history['loss'][-1]:.3f}, {rate:,.0f} tokens/s")
        if eval_due:
            losses = [eval_loss(state["params"], batch) for batch in eval_batches]
            history["heldout"].append([step, float(np.mean(jax.device_get(losses)))])
            say(f"step {step}: held-out loss {history['heldout'][-1][1]:.3f}")
        if save_due:
            items = {"state": ocp.args.StandardSave(state), "history": ocp.args.JsonSave(history)}
            checkpoints.save(step, args=ocp.args.Composite(**items))
        clock = time.perf_counter()
    progress.close()
    checkpoints.close()

    if args.export:
        # Every process takes part in fetching what lies on several.
        fetch = functools.partial(multihost_utils.process_allgather, tiled=True)
        host_params = jax.tree.map(fetch, state["params"])
        if is_main:
            checkpoint.save(args.export, config.sizes, host_params)
            tokenizer = json.dumps(checkpoint.byte_tokenizer(), indent=1)
            (args.export / "tokenizer.json").write_text(tokenizer)
        say(f"the checkpoint is in {args.export}")

    # One sequence per device continues the prompt; process 0 shows its first.
    sampled = b""
    if args.sample_bytes:
        say(f"sampling {args.sample_bytes} bytes (compiles once more) ..")
        prompt = (b"\n" * args.seq_len + args.prompt.encode())[-args.seq_len :]
        window = np.tile(np.frombuffer(prompt, np.uint8), (dp * ep, 1)).astype(np.int32)
        window = place(window, by_batch)
        sampled = sample(state["params"], window, key, args.temperature, length=args.sample_bytes)
        sampled = np.asarray(sampled.addressable_shards[0].data[0], np.uint8).tobytes()
    summary = {
        "versions": versions,
        "config": settings,
        "mesh": {
            "dp": dp,
            "ep": ep,
            "device": device.device_kind,
            "processes": jax.process_count(),
        },
        "losses": history["loss"],
        "train_loss": float(np.mean(history["loss"][-50:])),
        "heldout_loss": history["heldout"][-1][1] if history["heldout"] else float("nan"),
        "unigram_entropy": unigram,
        "tokens_per_second": rate,
        "dropped": float(np.mean(history["dropped"])),
        "sample": args.prompt + sampled.decode(errors="replace"),
    }
    if is_main:
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
        plot(history, unigram, args.out / "training.png")
    say(f"--- a sample:\n{summary['sample']}\n---")
    say(f"{rate:,.0f} tokens/s; {100 * summary['dropped']:.2f} % of the rows were dropped")
    say(
        f"nats per byte: unigram entropy {unigram:.3f}, training {summary['train_loss']:.3f} "
        f"(last 50 steps), held out {summary['heldout_loss']:.3f}"
    )
    say(f"plot, summary and checkpoints are in {args.out}")
    return summary | {"params": state["params"]}


if __name__ == "__main__":
    main()
