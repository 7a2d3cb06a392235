"""Many calls whose devices get ready in different orders, every result compared with the oracle.

    python tests/protocol/stress.py --devices 8 --calls 10000

A call is one MoE layer: make_layout, dispatch, experts, combine. The scenarios keep many calls in
one program or many programs in flight, so that calls could be paired wrongly. Layers of a scenario
share every static size; their data differ, and what a rank receives and the position where it
receives it enter the result: a rank that met another call's ranks cannot give the right bits.

Devices get ready in different orders, because each branch begins with an exchange, which ends on a
thread of its own, and then waits for a time that differs per device and step. XLA would undo this
by reusing buffers between branches, so programs return all they compute. The first scenarios check
that the orders did differ. `--control` breaks the pairing or the expectation on purpose; the
program must then fail with "wrong result".

Exit codes: 0, or 1 with a message. On a hang it prints the Python stacks and exits.
"""

import argparse
import faulthandler
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from cpu_devices import cpu_devices
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import reference


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--calls", type=int, default=1000, help="calls of each scenario")
    parser.add_argument(
        "--scenario", action="append", help=f"one of {', '.join(SCENARIOS)}; default: all"
    )
    parser.add_argument("--control", choices=("none", "cross", "swap"), default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each scenario")
    return parser.parse_args()


NUM_TOKENS, TOP_K, HIDDEN = 16, 2, 16  # large enough for XLA not to run the program in order
NUM_VARIANTS = 12  # of the data; which one a call uses changes from step to step
MAX_DELAY = 5  # of one branch, in units of
DELAY_SECONDS = 2e-4
IN_FLIGHT = 16  # programs; jaxlib 0.10 can deadlock with 32
CONTROL = "none"

READY: list[tuple[int, int]] = []  # (rank, branch), as they got ready


class Layers:
    """Data, oracle and device function of one static configuration on one mesh."""

    def __init__(self, devices, seed: int, num_variants: int = NUM_VARIANTS) -> None:
        self.num_ranks = len(devices)
        self.num_experts = self.num_ranks * (2 if self.num_ranks <= 8 else 1)
        auto = (jax.sharding.AxisType.Auto,)
        self.mesh = jax.make_mesh((self.num_ranks,), ("ep",), auto, devices=devices)
        self.rng = np.random.default_rng(seed)
        shape = (num_variants, self.num_ranks, NUM_TOKENS)
        self.ids = np.argsort(self.rng.random((*shape, self.num_experts)), -1)[..., :TOP_K]
        self.ids = self.ids.astype(np.int32)
        self.x = self.rng.standard_normal((*shape, HIDDEN)).astype(np.float32)
        self.weights = self.rng.random((*shape, TOP_K)).astype(np.float32)
        self.expected = [
            self._oracle(*data) for data in zip(self.ids, self.x, self.weights, strict=True)
        ]
        sharded = NamedSharding(self.mesh, P(None, "ep"))
        self.pool = jax.device_put((self.ids, self.x, self.weights), sharded)

    def _oracle(self, ids, x, weights):
        layout = reference.make_layout(ids, num_experts=self.num_experts)
        tokens, recv_weights = reference.dispatch(x, layout, weights)
        y = tokens + np.arange(layout.capacity, dtype=np.float32)[:, None]
        out = reference.combine(y, layout, recv_weights)
        return {"out": out, "tokens": tokens, "recv_src": layout.recv_src}

    def draw(self, num_layers: int):
        """Variants [n], all different, and delays [R, n], for one step."""
        picks = self.rng.permutation(len(self.ids))[:num_layers].astype(np.int32)
        delays = self.rng.integers(0, MAX_DELAY + 1, (self.num_ranks, num_layers))
        return picks, delays.astype(np.int32)

    def delayed(self, branch: int, delay, ids, x, weights):
        """The same arrays when `delay` has passed, and what must be returned by the program."""
        first = jax_ep.make_layout(ids, num_experts=self.num_experts, axis_name="ep")

        def wait(ids, units, rank):
            time.sleep(int(units) * DELAY_SECONDS)
            READY.append((int(rank), branch))
            return np.asarray(ids)

        ids = jax.pure_callback(
            wait,
            jax.ShapeDtypeStruct(ids.shape, ids.dtype),
            ids,
            delay + first.num_invalid,  # which is 0
            jax.lax.axis_index("ep"),
        )
        return (ids, x, weights), jax.tree.leaves(first)

    def layer(self, ids, x, weights):
        layout = jax_ep.make_layout(ids, num_experts=self.num_experts, axis_name="ep")
        recv = jax_ep.dispatch(x, layout, weights)
        rows = jnp.arange(layout.capacity, dtype=jnp.float32)
        out = jax_ep.combine(recv.tokens + rows[:, None], layout, recv.weights)
        return {
            "out": out,
            "tokens": recv.tokens,
            "recv_src": layout.recv_src,
            "rest": [recv.weights, *jax.tree.leaves(layout)],
        }

    def shard_map(self, f, in_specs, out_specs):
        return jax.jit(
            jax.shard_map(
                f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
        )

    def program(self, layer, num_layers: int, between=lambda x: ()):
        """Jits `num_layers` independent layers; `between(x)` adds work that depends on none.

        Takes (pool, picks, delays), returns ([{name: [R, ...]}] per layer, what `between` returns
        per layer, and more).
        """

        def body(pool, picks, delays):
            results, extra, more = [], [], []
            for i in range(num_layers):
                data, rest = self.delayed(i, delays[0, i], *(a[picks[i], 0] for a in pool))
                more.append((data, rest))
                extra.append(between(data[1]))
                results.append(layer(*data))
            if CONTROL == "cross":  # on rank 0, what a wrong pairing of two calls would give
                first = jax.lax.axis_index("ep") == 0
                results[:2] = (
                    jax.tree.map(lambda a, b: jnp.where(first, a, b), results[1 - i], results[i])
                    for i in range(2)
                )
            return jax.tree.map(lambda a: a[None], (results, extra, more))

        return self.shard_map(body, (P(None, "ep"), P(), P("ep")), P("ep"))

    def check(self, results, picks, at=()) -> None:
        """Compares what this process has of one step's results, or of their part `at`."""
        if CONTROL == "swap":
            picks = np.roll(picks, 1)
        for i, (result, pick) in enumerate(zip(results, picks, strict=True)):
            for name, expected in self.expected[pick].items():
                wrong = []
                for shard in result[name].addressable_shards:
                    rank = shard.index[0].start or 0
                    actual = np.asarray(shard.data)[0][at]
                    if not np.array_equal(actual.view(np.int32), expected[rank].view(np.int32)):
                        wrong.append(rank)
                if wrong:
                    raise SystemExit(f"wrong result: {name} of layer {i} on ranks {sorted(wrong)}")


class Pipeline:
    """Runs steps without waiting for them, up to a limit, and checks each when it leaves."""

    def __init__(self, limit: int) -> None:
        self.limit, self.steps = limit, []

    def push(self, check, *args) -> None:
        self.steps.append((check, args))
        while len(self.steps) > self.limit:
            self._pop()

    def drain(self) -> None:
        while self.steps:
            self._pop()

    def _pop(self) -> None:
        check, args = self.steps.pop(0)
        check(*args)


def eight_layers(devices, calls: int, seed: int) -> int:
    """Eight independent layers in one program, ready in different orders."""
    return _run_layers(devices, calls, seed, num_layers=8, limit=0, orders_differ=True)


def one_layer_twice(devices, calls: int, seed: int) -> int:
    """One jitted layer called twice on independent data: one custom call, inlined twice."""
    layers = Layers(devices, seed)
    program = layers.program(jax.jit(layers.layer), 2)
    return _run(layers, calls, program, 2, limit=0, orders_differ=True)


def back_to_back(devices, calls: int, seed: int) -> int:
    """Programs dispatched without waiting."""
    return _run_layers(devices, calls, seed, num_layers=3, limit=IN_FLIGHT)


def _run_layers(devices, calls: int, seed: int, num_layers: int, limit: int, **options) -> int:
    layers = Layers(devices, seed)
    program = layers.program(layers.layer, num_layers)
    return _run(layers, calls, program, num_layers, limit, **options)


def _run(layers: Layers, calls: int, program, num_layers: int, limit: int, orders_differ=False):
    pipeline, num_steps, num_different = Pipeline(limit), -(-calls // num_layers), 0
    for _ in range(num_steps):
        READY.clear()
        picks, delays = layers.draw(num_layers)
        pipeline.push(layers.check, program(layers.pool, picks, delays)[0], picks)
        ranks = range(layers.num_ranks)
        orders = {tuple(i for r, i in READY if r == rank) for rank in ranks}
        num_different += len(orders) > 1
    pipeline.drain()
    if orders_differ:
        print(f"devices got ready in different orders in {num_different} of {num_steps} steps")
        if num_different < num_steps / 2:
            raise SystemExit("too few to show anything")
    return num_steps * num_layers


def xla_collectives(devices, calls: int, seed: int) -> int:
    """Layers between XLA's own psum and all_to_all, which block their threads."""
    layers = Layers(devices, seed)

    def between(x):
        rows = jnp.resize(x, (layers.num_ranks, HIDDEN))
        return jax.lax.psum(x, "ep"), jax.lax.all_to_all(rows, "ep", 0, 0)

    def check(results, picks):
        step, extra, _ = results
        layers.check(step, picks)
        for (total, swapped), pick in zip(extra, picks, strict=True):
            x = layers.x[pick]
            total, swapped = np.asarray(total), np.asarray(swapped)
            rows = np.stack([np.resize(part, swapped.shape[1:]) for part in x])
            if not np.array_equal(swapped, rows.swapaxes(0, 1)):
                raise SystemExit("wrong result: all_to_all")
            if not np.allclose(total, x.sum(axis=0), atol=1e-4):
                raise SystemExit("wrong result: psum")

    program = layers.program(layers.layer, 4, between)
    pipeline = Pipeline(IN_FLIGHT // 2)
    for _ in range(-(-calls // 4)):
        picks, delays = layers.draw(4)
        pipeline.push(check, program(layers.pool, picks, delays), picks)
    pipeline.drain()
    return -(-calls // 4) * 4


def disjoint_meshes(devices, calls: int, seed: int) -> int:
    """Two halves of the devices and all of them, in turn, in flight together."""
    half = len(devices) // 2
    parts = [devices[:half], devices[half:], devices[::-1]]
    layers = [Layers(part, seed + i) for i, part in enumerate(parts)]
    programs = [part.program(part.layer, 2) for part in layers]
    pipeline = Pipeline(IN_FLIGHT)
    rounds = -(-calls // 6)
    for _ in range(rounds):
        for part, program in zip(layers, programs, strict=True):
            picks, delays = part.draw(2)
            pipeline.push(part.check, program(part.pool, picks, delays)[0], picks)
    pipeline.drain()
    return rounds * 6


def two_threads(devices, calls: int, seed: int) -> int:
    """Two Python threads, each on its half of the devices."""
    half = len(devices) // 2
    failures: list[BaseException] = []

    def work(part, part_seed) -> None:
        try:
            _run_layers(part, calls // 2, part_seed, num_layers=2, limit=4)
        except BaseException as error:  # re-raised by the main thread
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(part, seed + i), daemon=True)
        for i, part in enumerate((devices[:half], devices[half:]))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return calls // 2 * 2


def scan(devices, calls: int, seed: int) -> int:
    """Two independent call sites, each repeated by a scan."""
    layers, length = Layers(devices, seed), 10

    def body(pool, picks, delays):
        def step(carry, xs):
            step_picks, step_delays = xs
            data = [
                layers.delayed(i, step_delays[i], *(a[step_picks[i], 0] for a in pool))[0]
                for i in range(2)
            ]
            return carry, [layers.layer(*one) for one in data]

        _, results = jax.lax.scan(step, 0, (picks, delays[0]))
        return jax.tree.map(lambda a: a[None], results)

    program = layers.shard_map(body, (P(None, "ep"), P(), P("ep")), P("ep"))
    rounds = -(-calls // (2 * length))
    for _ in range(rounds):
        draws = [layers.draw(2) for _ in range(length)]
        picks = np.stack([d[0] for d in draws])
        results = program(layers.pool, picks, np.stack([d[1] for d in draws], axis=1))
        for s in range(length):
            layers.check(results, picks[s], at=s)
    return rounds * 2 * length


def cond(devices, calls: int, seed: int) -> int:
    """lax.cond by which all ranks skip a layer, another takes its place, or both run."""
    layers = Layers(devices, seed)

    def body(pool, picks, delays, take):
        data = [
            layers.delayed(i, delays[0, i], *(a[picks[i], 0] for a in pool))[0] for i in range(2)
        ]
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(layers.layer, *data[0]))
        results = [
            jax.lax.cond(take[i], layers.layer, lambda *_: zeros, *data[i]) for i in range(2)
        ]
        return jax.tree.map(lambda a: a[None], results)

    program = layers.shard_map(body, (P(None, "ep"), P(), P("ep"), P()), P("ep"))

    def check(results, picks, take):
        for i in np.flatnonzero(~take):
            if any(np.asarray(value).any() for value in jax.tree.leaves(results[i])):
                raise SystemExit("wrong result: a skipped layer gave something")
        layers.check([r for r, t in zip(results, take, strict=True) if t], picks[take])

    pipeline, done = Pipeline(IN_FLIGHT), 0
    while done < calls:
        picks, delays = layers.draw(2)
        take = layers.rng.random(2) < 0.6
        done += int(take.sum())
        pipeline.push(check, program(layers.pool, picks, delays, take), picks, take)
    pipeline.drain()
    return done


def two_programs(devices, calls: int, seed: int) -> int:
    """Two executables with the same call sites, alternating without waiting."""
    layers = Layers(devices, seed)
    programs = [layers.program(layers.layer, n) for n in (2, 3)]
    pipeline = Pipeline(IN_FLIGHT)
    rounds = -(-calls // 5)
    for _ in range(rounds):
        for num_layers, program in zip((2, 3), programs, strict=True):
            picks, delays = layers.draw(num_layers)
            pipeline.push(layers.check, program(layers.pool, picks, delays)[0], picks)
    pipeline.drain()
    return rounds * 5


SCENARIOS = {
    f.__name__: f
    for f in (
        eight_layers,
        one_layer_twice,
        back_to_back,
        xla_collectives,
        disjoint_meshes,
        two_threads,
        scan,
        cond,
        two_programs,
    )
}


def main() -> None:
    global CONTROL
    args = parse_args()
    CONTROL = args.control
    os.environ.update(cpu_devices(args.devices))
    jax.config.update("jax_platforms", "cpu")
    jax_ep.set_timeout(120)
    for name in args.scenario or SCENARIOS:
        faulthandler.dump_traceback_later(args.timeout, exit=True)
        start = time.perf_counter()
        try:
            num_calls = SCENARIOS[name](jax.devices()[: args.devices], args.calls, args.seed)
        except SystemExit as error:  # without waiting for the programs that still run
            print(f"{name}: {error}", flush=True)
            os._exit(1)
        seconds = time.perf_counter() - start
        print(f"{name}: {num_calls} calls on {args.devices} devices in {seconds:.1f} s", flush=True)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
