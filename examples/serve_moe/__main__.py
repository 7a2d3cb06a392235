"""Serves a Qwen3-MoE or Mixtral checkpoint over HTTP, its experts spread over an "ep" axis.

    python examples/train_moe_lm.py --export runs/lm   # or one from elsewhere
    python examples/serve_moe --checkpoint runs/lm     # 8 virtual devices, or all GPUs

With several processes, start each of them like this (where JAX finds the cluster's settings by
itself, --distributed alone is enough):

    python examples/serve_moe --checkpoint DIR --distributed --coordinator HOST:PORT \
        --num-processes N --process-id I

On GPUs with JAX_LOCAL_DEVICE_IDS=I in its environment: each process takes those that are its own.
README.md beside this file says how it works. The parts to copy are moe.py and steps.py.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable

# Read when JAX starts, without effect on GPUs: as in train_moe_lm.py.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.getenv('XLA_FLAGS', '')}"
os.environ["NPROC"] = os.getenv("NPROC", str(max(16, os.cpu_count() or 1)))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import checkpoint
import jax
import model
from serve_moe import moe, processes, steps
from serve_moe.engine import Engine
from serve_moe.http_api import Api, HttpLimits
from serve_moe.metrics import Metrics
from serve_moe.server import Server
from serve_moe.text import Tokenizer

import jax_ep


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="serve_moe",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=pathlib.Path, required=True, help="folder with config.json")
    add("--model-name", help="as clients call it; if not given: the folder's name")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is the whole network's")
    add("--port", type=int, default=8000, help="0: any free one")
    add("--dp", type=int, help="data-parallel ranks; if not given: all devices // ep")
    add("--ep", type=int, help="expert-parallel ranks; if not given: as many as divide the experts")
    add("--dispatch", default="jax_ep", choices=sorted(moe.LAYERS), help="how rows get to experts")
    add("--dtype", help="of weights, cache and activations; if not given: float32 on CPU, bfloat16")
    add("--keep-float8", action="store_true", help="experts that are float8 stay so on devices")
    add("--slots", type=int, default=4, help="sequences of a device that run at once")
    add(
        "--max-length",
        type=int,
        help="tokens of a sequence; if not given: the model's, 4096 at most",
    )
    add("--chunk", type=int, default=256, help="tokens of a prompt that one step takes, at most")
    add("--steps-ahead", type=int, default=2, help="steps that run before one's result is fetched")
    add("--max-queue", type=int, default=256, help="requests that wait, beyond which: status 429")
    add("--max-body-bytes", type=int, default=1 << 20, help="of a request")
    add("--request-seconds", type=float, default=600.0, help="that a request may take")
    add("--drain-seconds", type=float, default=60.0, help="for clients to read, once all is done")
    add("--rank-seconds", type=float, default=30.0, help="for a rank to come to a step, see jax_ep")
    add("--distributed", action="store_true", help="this is one of several processes of one host")
    add("--coordinator", help="HOST:PORT of process 0; like the next two, if JAX cannot find it")
    add("--num-processes", type=int, help="number of processes")
    add("--process-id", type=int, help="index of this process; 0 serves, the others follow it")
    return parser.parse_args(argv)


def choose_mesh(args: argparse.Namespace, num_experts: int) -> jax.sharding.Mesh:
    """Spreads the devices over "dp" and "ep"."""
    count = jax.device_count()
    ep = args.ep or max(n for n in range(1, count + 1) if count % n == 0 and num_experts % n == 0)
    dp = args.dp or count // ep
    if dp < 1 or dp * ep > count or num_experts % ep:
        raise SystemExit(
            f"dp {dp} x ep {ep} must fit {count} devices; ep must divide {num_experts} experts"
        )
    devices = jax.devices()[: dp * ep]
    idle = set(range(jax.process_count())) - {device.process_index for device in devices}
    if idle:
        raise SystemExit(f"dp {dp} x ep {ep} leaves no device to process {min(idle)}")
    return jax.make_mesh((dp, ep), steps.AXES, devices=devices)


def choose_buckets(longest: int) -> tuple[int, ...]:
    """Lengths that chunks are padded to: a quarter of each other, down to 16."""
    buckets = [longest]
    while buckets[0] % 4 == 0 and buckets[0] // 4 >= 16:
        buckets.insert(0, buckets[0] // 4)
    return tuple(buckets)


def main(argv: list[str] | None = None) -> None:
    """Serves until SIGTERM."""
    args = parse_args(argv)
    if args.distributed:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
        jax_ep.initialize()
    failure = serve(args)
    if failure is not None:  # JAX's own end would wait for what does not come any more
        print(failure, file=sys.stderr, flush=True)
        os._exit(1)
    if args.distributed:
        jax_ep.finalize()


def serve(args: argparse.Namespace) -> str | None:
    """Does what `main` says, in a process that is set up. Every process loads and compiles.

    Returns:
        Why the engine has failed; None if it has not.
    """
    config = checkpoint.read_config(args.checkpoint)
    mesh = choose_mesh(args, config.num_experts)
    device = mesh.devices.flat[0]
    max_length = args.max_length or min(config.max_position_embeddings, 4096)
    if not 1 <= max_length <= config.max_position_embeddings or args.chunk < 1 or args.slots < 1:
        raise SystemExit(
            f"--max-length must be in [1, {config.max_position_embeddings}], the checkpoint's; "
            "--chunk and --slots at least 1"
        )
    limits = steps.Limits(
        slots_per_device=args.slots,
        max_length=max_length,
        buckets=choose_buckets(min(args.chunk, max_length)),
        end_tokens=checkpoint.read_end_tokens(args.checkpoint),
        dispatch=args.dispatch,
        dtype=args.dtype or ("float32" if device.platform == "cpu" else "bfloat16"),
    )
    print(
        f"dp {mesh.shape['dp']} x ep {mesh.shape['ep']} on {device.device_kind}, "
        f"{jax.process_count()} process(es); {limits}\ncompiling ..",
        flush=True,
    )
    params = checkpoint.load_params(
        args.checkpoint, config, mesh, limits.dtype, keep_float8=args.keep_float8
    )
    run = steps.Steps(params, mesh, config, limits)
    run.compile()
    jax_ep.set_timeout(arrival=args.rank_seconds)  # from here on nothing is compiled
    if jax.process_index() > 0:
        processes.follow(run, args.rank_seconds)
        return None
    if jax.process_count() == 1:
        return serve_http(args, config, run, jax_ep.check)
    with processes.leading(run, args.rank_seconds) as leader:
        return serve_http(args, config, leader, leader.check)


def serve_http(
    args: argparse.Namespace,
    config: model.Config,
    run: steps.Steps | processes.Leader,
    check: Callable[[], None],
) -> str | None:
    """Serves the compiled programs over HTTP; returns why the engine has failed, if it has."""
    # The engine's thread comes back from devices to a busy event loop several times in a step, and
    # would wait for it up to 5 ms each time.
    sys.setswitchinterval(1e-4)
    engine = Engine(
        run,
        Metrics(config.num_experts),
        max_queue=args.max_queue,
        steps_ahead=args.steps_ahead,
        check=check,
        step_seconds=2 * args.rank_seconds,  # longer than jax_ep waits, which can say for whom
    )
    engine.start()
    api = Api(
        engine,
        Tokenizer(args.checkpoint),
        model=args.model_name or args.checkpoint.resolve().name,
        vocab_size=config.vocab_size,
        limits=HttpLimits(args.max_body_bytes, args.request_seconds),
    )
    Server(api, engine, host=args.host, port=args.port, drain_seconds=args.drain_seconds).run()
    return engine.failure


if __name__ == "__main__":
    main()
