"""Times steps of decoding without HTTP, for each way of dispatch and number of slots.

    python examples/serve_moe/decode_bench.py                      # all GPUs, or 8 virtual devices
    python examples/serve_moe/decode_bench.py --slots 32 128 --layers 48

The model has the shape of Qwen3-30B-A3B, with fewer layers unless told otherwise, and random
weights that are made on the devices; every slot holds a sequence, so every step gives a token for
each. Steps are started ahead of the tokens that are fetched, as the engine does. Prints, for each,
the median and the 10th and 90th percentile of a step's time over the repeats, tokens per second,
and how long the host takes to start a step: where that is what a step takes, the host decides.
With --trace DIR, for GPUs, also what they did in 20 more steps: how long they waited between steps,
and how long they were in kernels that exchange rows.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time

# Read when JAX starts, without effect on GPUs: as in __main__.py.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.getenv('XLA_FLAGS', '')}"
os.environ["NPROC"] = os.getenv("NPROC", str(max(16, os.cpu_count() or 1)))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import model
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from serve_moe import device_trace, moe, steps

# The published config.json of Qwen3-30B-A3B, but for the number of layers (48).
QWEN3_30B_A3B = model.Config(
    vocab_size=151936,
    hidden_size=2048,
    num_hidden_layers=4,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    rope_theta=1e6,
    max_position_embeddings=40960,
)
TINY = model.Config(256, 64, 2, 4, 2, 16, 32, 16, 2)
TRACED_STEPS = 20
SHAPES = {"qwen3-30b-a3b": QWEN3_30B_A3B, "tiny": TINY}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="qwen3-30b-a3b", help="of the model")
    add("--layers", type=int, help="of the model; if not given: 4, or 2 of the tiny one")
    add("--dispatch", nargs="+", default=["jax_ep", "all_to_all"], choices=sorted(moe.LAYERS))
    add("--slots", type=int, nargs="+", default=[32, 128], help="of a device")
    add("--length", type=int, default=512, help="tokens that each sequence has at first")
    add("--steps", type=int, default=40, help="between two looks at the clock")
    add("--repeats", type=int, default=9)
    add("--steps-ahead", type=int, default=2, help="steps that run before one's result is fetched")
    add("--dtype", default="bfloat16")
    add("--trace", type=pathlib.Path, help="where traces of the profiler go; none if not given")
    add("--json", type=pathlib.Path, help="write all figures to this file")
    return parser.parse_args(argv)


def random_params(mesh: Mesh, config: model.Config, dtype: str) -> dict:
    """Makes the parameters where they live, one at a time."""
    shapes = jax.eval_shape(lambda: model.init_params(jax.random.key(0), config))

    def make(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        spec = P("ep") if model.is_expert_weight(path) else P()

        @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, spec))
        def normal() -> jax.Array:
            if len(leaf.shape) == 1:
                return jnp.ones(leaf.shape, dtype)
            key = jax.random.key(leaf.shape[-1])
            return (jax.random.normal(key, leaf.shape) * leaf.shape[-2] ** -0.5).astype(dtype)

        return normal()

    return jax.tree.map_with_path(make, shapes)


def run_steps(run: steps.Steps, num_steps: int, steps_ahead: int) -> float:
    """Runs steps of full slots as the engine does; returns the seconds spent on starting them."""
    keep = np.ones(run.mesh.size * run.limits.slots_per_device, bool)
    starting, ahead = 0.0, []
    for left in reversed(range(num_steps)):
        before = time.perf_counter()
        ahead.append(run.decode(keep)["token"])
        starting += time.perf_counter() - before
        while len(ahead) > min(steps_ahead, left):
            assert (np.asarray(ahead.pop(0)) >= 0).all(), "a slot has ended"
    return starting


def time_steps(run: steps.Steps, args: argparse.Namespace) -> tuple[list[float], float]:
    """Returns the seconds of a step, for each repeat, and the host's to start one."""
    run_steps(run, args.steps, args.steps_ahead)  # warms up
    seconds, starting = [], 0.0
    for _ in range(args.repeats):
        began = time.perf_counter()
        starting += run_steps(run, args.steps, args.steps_ahead)
        seconds.append((time.perf_counter() - began) / args.steps)
    return seconds, starting / args.repeats / args.steps


def trace_steps(run: steps.Steps, args: argparse.Namespace, folder: pathlib.Path) -> list[dict]:
    """Traces some steps; returns a summary for each GPU, and prints it."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0  # they would slow the host down
    with jax.profiler.trace(str(folder), profiler_options=options):
        run_steps(run, TRACED_STEPS, args.steps_ahead)
    summaries = []
    for name, kernels in device_trace.read_kernels(folder):
        try:
            summary = device_trace.summarise(kernels, TRACED_STEPS)
        except ValueError as error:  # the profiler may lose some
            print(f"      {name}: {error}", flush=True)
            continue
        summaries.append({"device": name, **dataclasses.asdict(summary)})
        print(
            f"      {name}, traced: {summary.step_us:.0f} us a step, its kernels span "
            f"{summary.span_us:.0f}, then {summary.gap_us:.1f} (at most "
            f"{summary.longest_gap_us:.1f}) to the next; {summary.idle_us:.1f} idle within; "
            f"{summary.communication_us:.1f} in {summary.num_communication} of "
            f"{summary.kernels} kernels, which exchange rows",
            flush=True,
        )
    if not summaries:
        print("      no GPU's steps in the trace", flush=True)
    return summaries


def main(argv: list[str] | None = None) -> list[dict]:
    """Prints a row for each point; returns them."""
    args = parse_args(argv)
    if min(args.steps, args.repeats, args.length, *args.slots) < 1:
        raise SystemExit("--steps, --repeats, --length and --slots must be at least 1")
    config = SHAPES[args.shape]
    if args.layers:
        config = dataclasses.replace(config, num_hidden_layers=args.layers)
    devices = jax.devices()
    mesh = jax.make_mesh((1, len(devices)), steps.AXES, devices=devices)
    num_steps = args.steps * (args.repeats + 1) + TRACED_STEPS
    print(
        f"ep {mesh.size} on {devices[0].device_kind}, jax {jax.__version__}, {args.dtype}; "
        f"{args.shape}, {config.num_hidden_layers} layers; sequences of {args.length} tokens on; "
        f"{args.repeats} repeats of {args.steps} steps, {args.steps_ahead} ahead"
    )
    params = random_params(mesh, config, args.dtype)
    rows = []
    for num_slots in args.slots:
        for dispatch in args.dispatch:
            limits = steps.Limits(
                slots_per_device=num_slots,
                max_length=args.length + num_steps + 1,
                buckets=(16,),
                end_tokens=(),
                dispatch=dispatch,
                dtype=args.dtype,
            )
            run = steps.Steps(params, mesh, config, limits)
            run.begin_all(args.length, num_steps + 1)
            seconds, starting = time_steps(run, args)
            low, median, high = np.percentile(seconds, (10, 50, 90)) * 1e3
            num_tokens = num_slots * mesh.size
            rows.append(
                {
                    "dispatch": dispatch,
                    "slots": num_tokens,
                    "step_ms": median,
                    "p10_ms": low,
                    "p90_ms": high,
                    "tokens_per_s": num_tokens / median * 1e3,
                    "starting_ms": starting * 1e3,
                }
            )
            print(
                f"{num_tokens:5} slots, {dispatch:>10}: {median:.3f} ms a step [{low:.3f} - "
                f"{high:.3f}], {num_tokens / median * 1e3:.0f} tokens/s; "
                f"starting one takes the host {starting * 1e3:.3f} ms",
                flush=True,
            )
            if args.trace:
                folder = args.trace / f"{dispatch}-{num_tokens}"
                rows[-1]["trace"] = trace_steps(run, args, folder)
            del run
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
