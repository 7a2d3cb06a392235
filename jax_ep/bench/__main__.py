"""Times make_layout, dispatch and combine as a jitted program runs them, on all local devices.

The bound is a plain copy of the rows that the operation must write, by as many threads as the
machine has cores, between buffers that are warm; it is measured in the same run, between the
repetitions. A time is that of the whole call, until every rank's result is ready: slowest rank.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

# Before JAX is imported, and only for CPU: one virtual device a rank, and as many threads as
# jaxlib 0.10.2 needs for programs that are in flight together.
_parser = argparse.ArgumentParser(prog="python -m jax_ep.bench", description=__doc__)
_parser.add_argument("--ranks", type=int, default=8, help="devices in the EP group")
_parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024], help="per rank")
_parser.add_argument("--hidden", type=int, default=1024)
_parser.add_argument("--top-k", type=int, default=8)
_parser.add_argument("--experts", type=int, default=64)
_parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
_parser.add_argument("--alignment", type=int, default=1, help="expert alignment in rows")
_parser.add_argument(
    "--capacity-factor",
    type=float,
    default=None,
    help="of the mean load; default: exactly what the fullest rank receives",
)
_parser.add_argument("--repeats", type=int, default=20)
_parser.add_argument("--seed", type=int, default=0)
_parser.add_argument("--json", type=Path, help="write the results to this file")


def _environment(num_ranks: int) -> None:
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={num_ranks}".strip()
    os.environ.setdefault("NPROC", str(2 * num_ranks))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _copier(num_bytes: int) -> Callable[[], None]:
    """A copy of ``num_bytes`` by all cores."""
    import numpy as np

    num_threads = os.cpu_count() or 1
    source = np.ones(num_bytes, np.uint8)
    target = np.zeros_like(source)
    parts = list(
        zip(np.array_split(source, num_threads), np.array_split(target, num_threads), strict=True)
    )
    pool = ThreadPoolExecutor(num_threads)

    def copy() -> None:
        list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))

    return copy


def _measure(args: argparse.Namespace, num_tokens: int) -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import jax_ep

    mesh = jax.make_mesh((args.ranks,), ("ep",), devices=jax.devices()[: args.ranks])
    rng = np.random.default_rng(args.seed)
    rows = args.ranks * num_tokens
    topk_idx = np.argsort(rng.random((rows, args.experts)), axis=1)[:, : args.top_k]
    put = partial(jax.device_put, device=NamedSharding(mesh, P("ep")))
    x = put(jnp.asarray(rng.standard_normal((rows, args.hidden)), args.dtype))
    ids = put(topk_idx.astype(np.int32))
    weights = put(rng.random((rows, args.top_k), np.float32))

    if args.capacity_factor is None:
        load = np.bincount(topk_idx.ravel(), minlength=args.experts).reshape(args.ranks, -1)
        padded = -(-load // args.alignment) * args.alignment
        capacity = int(padded.sum(axis=1).max())
    else:
        capacity = jax_ep.capacity(
            num_tokens,
            args.top_k,
            args.ranks,
            args.capacity_factor,
            num_experts=args.experts,
            expert_alignment=args.alignment,
        )
    make_layout = partial(
        jax_ep.make_layout,
        num_experts=args.experts,
        axis_name="ep",
        capacity=capacity,
        expert_alignment=args.alignment,
    )

    def sharded(fn: Callable[..., Any]) -> Callable[[], Any]:
        jitted = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))

        def call() -> None:
            jax.block_until_ready(jitted(x, ids, weights))

        call()
        return call

    def layout_only(x: Any, ids: Any, weights: Any) -> Any:
        return make_layout(ids).stats()

    def layout_dispatch(x: Any, ids: Any, weights: Any) -> Any:
        return jax_ep.dispatch(x, make_layout(ids), weights)[:2]

    def layout_dispatch_combine(x: Any, ids: Any, weights: Any) -> Any:
        layout = make_layout(ids)
        received = jax_ep.dispatch(x, layout, weights)
        return jax_ep.combine(received.tokens, layout, received.weights)

    def forward_backward(x: Any, ids: Any, weights: Any) -> Any:
        def loss(x: Any, weights: Any) -> Any:
            return layout_dispatch_combine(x, ids, weights).astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1))(x, weights)

    row_bytes = args.hidden * np.dtype(jnp.dtype(args.dtype)).itemsize
    copy_bytes = args.ranks * capacity * row_bytes
    copy = _copier(copy_bytes)
    results = []
    for name, fn, passes in (
        ("make_layout", layout_only, 0),
        ("make_layout+dispatch", layout_dispatch, 1),
        ("make_layout+dispatch+combine", layout_dispatch_combine, 2),
        ("forward+backward", forward_backward, 4),
    ):
        call = sharded(fn)
        times, bounds = [], []
        for _ in range(args.repeats):
            times.append(_seconds(call))
            bounds.append(_seconds(copy))
        times.sort()
        median, bound = statistics.median(times), statistics.median(bounds) * passes
        results.append(
            {
                "operation": name,
                "tokens": num_tokens,
                "capacity": capacity,
                "median_s": median,
                "p10_s": times[len(times) // 10],
                "p90_s": times[len(times) * 9 // 10],
                "bound_s": bound,
                "bound_bytes": copy_bytes * passes,
                "ratio": median / bound if bound else None,
            }
        )
    return results


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the benchmark and prints a table; returns its rows."""
    args = _parser.parse_args(argv)
    _environment(args.ranks)
    import jax

    import jax_ep

    if jax.device_count() < args.ranks:
        _parser.error(f"--ranks {args.ranks}: this machine has {jax.device_count()} devices")
    print(
        f"jax_ep {jax_ep.__version__}, jax {jax.__version__}, {args.ranks} x "
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    )
    print("settings:", {k: v for k, v in vars(args).items() if k not in ("tokens", "json")})
    print(
        f"{'operation':30}{'tokens':>8}{'median ms':>11}{'p10':>9}{'p90':>9}{'copy ms':>10}"
        f"{'ratio':>8}"
    )
    rows = []
    for num_tokens in args.tokens:
        for row in _measure(args, num_tokens):
            rows.append(row)
            ratio = f"{row['ratio']:8.2f}" if row["ratio"] else "       -"
            print(
                f"{row['operation']:30}{row['tokens']:8d}{row['median_s'] * 1e3:11.3f}"
                f"{row['p10_s'] * 1e3:9.3f}{row['p90_s'] * 1e3:9.3f}{row['bound_s'] * 1e3:10.3f}"
                f"{ratio}"
            )
    if args.json:
        settings = {k: str(v) for k, v in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "results": rows}, indent=2))
    return rows


if __name__ == "__main__":
    main()
