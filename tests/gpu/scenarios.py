"""Scenarios of the tiers: a rank that dies or stalls, command buffers, vmap and partly manual maps.

Lines that begin with "NOTE: " end up in run_tiers.py's table.
"""

import os
import pathlib
import re
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode_loop import (
    assert_right,
    expected_steps,
    first_rows,
    loop_case,
    scan_of_steps,
    while_of_steps,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from job import (
    IS_LAST,
    LAST,
    NUM_PROCESSES,
    PLATFORM,
    connect,
    coordinator_leaves_last,
    mark,
    wait_for_marks,
)
from sharded_layers import Placement, in_specs, make_problem, shard_layer, sharded_layer, sizes
from thunks import recorded_thunks

import jax_ep
from jax_ep import reference

NUM_TOKENS, TOP_K, HIDDEN = 96, 4, 256


class Layer:
    """One MoE layer over all devices, with data of a seed, and the oracle's results.

    On GPUs that is three calls, or two with slots.
    """

    def __init__(self, num_layers: int = 1, ranks_per_node: int | None = None) -> None:
        devices = np.array(jax.devices(PLATFORM))
        self.num_ranks, self.num_layers = len(devices), num_layers
        self.ranks_per_node = ranks_per_node or self.num_ranks
        self.num_experts = 8 * self.num_ranks
        self.mesh = Mesh(devices, ("ep",))
        self.sharding = NamedSharding(self.mesh, P("ep"))

        def one(ids: Any, x: Any, weights: Any) -> Any:
            layout, recv = jax_ep.layout_and_dispatch(
                x, ids, weights, num_experts=self.num_experts, axis_name="ep"
            )
            out = jax_ep.combine(recv.tokens * 2 + 1, layout, recv.weights)
            return out, recv.tokens, layout.recv_src

        def recorded_calls(*layers: Any) -> Any:
            return tuple(one(*layer) for layer in layers)

        self.program = jax.jit(
            jax.shard_map(recorded_calls, mesh=self.mesh, in_specs=P("ep"), out_specs=P("ep"))
        )

    def data(self, seed: int) -> list[tuple[np.ndarray, ...]]:
        rng = np.random.default_rng(seed)
        total, found = self.num_ranks * NUM_TOKENS, []
        for _ in range(self.num_layers):
            ids = np.argsort(rng.random((total, self.num_experts)), axis=1)[:, :TOP_K]
            ids = ids.astype(np.int32)
            ids[rng.random(ids.shape) < 0.1] = -1
            # Small whole numbers: XLA may fuse 2 x + 1 as it likes.
            x = rng.integers(-64, 64, (total, HIDDEN)).astype(np.float32)
            found.append((ids, x, rng.random((total, TOP_K)).astype(np.float32)))
        return found

    def place(self, data: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(a.shape, self.sharding, lambda index: a[index]),
            data,
        )

    def wrong(self, results: Any, data: list[tuple[np.ndarray, ...]]) -> list[str]:
        """Which results of this process are not the oracle's, to the bit."""
        found = []
        for i, (result, (ids, x, weights)) in enumerate(zip(results, data, strict=True)):
            shape = (self.num_ranks, NUM_TOKENS)
            layout = reference.make_layout(
                ids.reshape(*shape, TOP_K),
                num_experts=self.num_experts,
                ranks_per_node=self.ranks_per_node,
            )
            tokens, recv_weights = reference.dispatch(
                x.reshape(*shape, HIDDEN), layout, weights.reshape(*shape, TOP_K)
            )
            out = reference.combine(tokens * 2 + 1, layout, recv_weights)
            names = ("out", "tokens", "recv_src")
            for name, array, expected in zip(
                names, result, (out, tokens, layout.recv_src), strict=True
            ):
                for shard in array.addressable_shards:
                    rank = (shard.index[0].start or 0) // (array.shape[0] // self.num_ranks)
                    if np.asarray(shard.data).tobytes() != expected[rank].tobytes():
                        found.append(f"{name} of layer {i} on rank {rank}")
        return found


def local(array: jax.Array) -> np.ndarray:
    return np.concatenate([np.asarray(shard.data) for shard in array.addressable_shards])


# A rank that dies or stalls ---------------------------------------------------------------------


def call(layer: Layer, placed: Any, data: Any) -> tuple[str, float, Any]:
    """("right" | "poisoned" | the error's text, seconds, results) of one call."""
    start = time.monotonic()
    try:
        results = jax.block_until_ready(layer.program(*placed))
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # the latter for several arrays
        return str(error), time.monotonic() - start, None
    wrong = layer.wrong(results, data)
    if not wrong:
        return "right", time.monotonic() - start, results
    return "poisoned", time.monotonic() - start, results


def what_is_told(layer: Layer, placed: Any, data: Any) -> tuple[str, float]:
    """The error of a call when the group is broken, and its seconds.

    A call that XLA has recorded in a command buffer runs no host code: it gives NaN once more, and
    jax_ep.check() raises.
    """
    outcome, seconds, _ = call(layer, placed, data)
    assert outcome != "right", "a call of a broken group was right"
    if outcome == "poisoned":
        try:
            jax_ep.check()
        except RuntimeError as error:
            return str(error), seconds
    return outcome, seconds


def hear_of_it(
    layer: Layer, placed: Any, data: Any, other: int | None, most_seconds: float | None = None
) -> None:
    """Calls until one is not right; checks what this process is told, and how soon.

    It is told of process `other`, if given, and by default with its timeout, and some seconds for
    leaving.
    """
    if most_seconds is None:
        most_seconds = jax_ep.get_timeout().arrival + 4
    deadline = time.monotonic() + 30
    while True:
        outcome, seconds, results = call(layer, placed, data)
        if outcome != "right":
            break
        assert time.monotonic() < deadline, "the other process is still there"
    assert seconds < most_seconds, f"{seconds:.1f} s in place of {most_seconds}"
    heard = "as an error of the call itself"
    if outcome == "poisoned":
        heard = "by NaN, then as an error"
        for out, tokens, recv_src in results:
            out, tokens, recv_src = local(out), local(tokens), local(recv_src)
            assert np.isnan(out).all(), "combine's output is not NaN"
            # What ended before the other one went is right, what came after is poisoned.
            poisoned = np.isnan(tokens).all()
            assert poisoned or not np.isnan(tokens).any(), "a part of dispatch's output is NaN"
            assert not (recv_src == -1).all() or poisoned
        outcome, again = what_is_told(layer, placed, data)
        assert again < 1, f"a call of a broken group took {again:.1f} s"
    print(f"NOTE: heard after {seconds:.1f} s, {heard}: {outcome.splitlines()[0][:160]}")
    # In slots the kernels have names of their own: those of the general path must not be in use.
    in_slots = layer.ranks_per_node == layer.num_ranks and jax_ep.runtime.has_slots()
    in_slots = in_slots and PLATFORM != "cpu"
    names = r"(layout_and_dispatch|combine): " if in_slots else "(layout|dispatch|combine)"
    assert re.search(f"jax_ep_{names}", outcome), outcome
    named = r"\d+" if other is None else str(other)
    assert re.search(rf"(rank|process) {named}\b", outcome), outcome
    if PLATFORM != "cpu":
        for _ in range(2):
            again, seconds = what_is_told(layer, placed, data)
            assert "jax_ep_" in again, again
            assert seconds < 1, f"a call of a broken group took {seconds:.1f} s"
    assert float(jax.jit(jnp.sum)(np.ones(4))) == 4, "the runtime does not compute any more"


def right_calls(ranks_per_node: int | None = None) -> tuple[Layer, Any, Any]:
    """A layer that has worked a few times, and its data.

    On CPU all processes must trace a program from the same line of code: so it is this one.
    """
    layer = Layer(ranks_per_node=ranks_per_node)
    data = layer.data(0)
    placed = layer.place(data)
    for _ in range(10):
        outcome, _, results = call(layer, placed, data)
        assert outcome == "right", outcome if results is None else layer.wrong(results, data)
    return layer, placed, data


def killed() -> None:
    """The last process is killed with a call in flight; all others survive and hear of it."""
    jax.config.update("jax_enable_recoverability", True)  # JAX lets the others outlive it
    connect(timeout=60)
    layer, placed, data = right_calls()
    if IS_LAST:
        layer.program(*placed)
        os.kill(os.getpid(), signal.SIGKILL)
    hear_of_it(layer, placed, data, other=LAST)
    jax_ep.finalize()
    coordinator_leaves_last()


def stalled() -> None:
    """The last process stops calling, until all others have heard of it; then it is told too."""
    connect(timeout=60)
    layer, placed, data = right_calls()
    if IS_LAST:
        wait_for_marks("heard", NUM_PROCESSES - 1)
        hear_of_it(layer, placed, data, other=None)
        mark("told")
    else:
        hear_of_it(layer, placed, data, other=LAST)
        mark("heard")
        wait_for_marks("told", 1)
    jax_ep.finalize()


# Command buffers --------------------------------------------------------------------------------


def command_buffers(expectation: str) -> None:
    """Two independent layers in one program, called often, its buffers at changing addresses.

    The expectation is where the calls are: "inside" of command buffers or "outside".
    """
    if NUM_PROCESSES > 1:
        connect(timeout=60)
    layer = Layer(num_layers=2)
    kept: list[Any] = []
    addresses = set()
    num_calls = 24
    for i in range(num_calls):
        data = layer.data(i)
        if i % 3 == 1:  # moves what is allocated next
            kept.append(layer.place(np.zeros((layer.num_ranks * (1 + i), 4096), np.float32)))
        placed = layer.place(data)
        for _ in range(2):  # the same addresses twice
            results = jax.block_until_ready(layer.program(*placed))
            wrong = layer.wrong(results, data)
            assert not wrong, f"call {i}: {wrong}"
        arrays = jax.tree.leaves((placed, results))
        addresses.add(tuple(a.addressable_shards[0].data.unsafe_buffer_pointer() for a in arrays))
        if i % 2:
            kept.append(results)
    assert len(addresses) >= 4, f"only {len(addresses)} sets of addresses in {num_calls} calls"
    inside, outside = recorded_thunks(pathlib.Path(os.environ["JAX_EP_TEST_DUMP"]))
    print(
        f"NOTE: {2 * num_calls} calls at {len(addresses)} sets of addresses; custom calls inside "
        f"command buffers: {inside}, outside: {outside}"
    )
    if expectation == "inside":
        assert inside > 0, "no call of ours is in a command buffer"
    else:
        assert inside == 0, f"{inside} calls are in command buffers"
        calls = layer.num_layers * (2 if jax_ep.runtime.has_slots() else 3)
        assert outside >= calls, f"the dump shows {outside} of our calls, which are {calls}"
    if NUM_PROCESSES > 1:
        jax_ep.finalize()


def decode_loops(num_steps: int = 1000) -> None:
    """lax.scan and lax.while_loop of many steps, each three times, on other data.

    XLA records the first run of a program in command buffers no sooner than the second. Whether it
    takes the whole loop or what lies in it depends on its flags, and is only told.
    """
    if NUM_PROCESSES > 1:
        connect(timeout=60)
    mesh = Mesh(np.array(jax.devices(PLATFORM)), ("ep",))
    sharding, case = NamedSharding(mesh, P("ep")), loop_case(mesh.size)
    steps = np.full(mesh.size, num_steps, np.int32)
    loops = {
        "scan": (scan_of_steps(case, num_steps), ()),
        "while": (while_of_steps(case, num_steps), (steps,)),
    }
    for name, (function, more) in loops.items():

        def shard(args: Any, function: Any = function) -> Any:
            return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], args)))

        run = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
        for seed in range(3):
            x = first_rows(case, seed)
            placed = jax.tree.map(
                lambda a: jax.make_array_from_callback(a.shape, sharding, a.__getitem__), (x, *more)
            )
            rows, told = jax.block_until_ready(run(placed))
            expected_rows, expected = expected_steps(case, x, num_steps)
            for shard_of_rows, shard_of_told in zip(
                rows.addressable_shards, told.addressable_shards, strict=True
            ):
                rank = shard_of_rows.index[0]
                assert_right(
                    (np.asarray(shard_of_rows.data), np.asarray(shard_of_told.data)),
                    (expected_rows[rank], expected[rank]),
                )
        print(f"NOTE: {name}: 3 x {num_steps} steps")
    dump = pathlib.Path(os.environ["JAX_EP_TEST_DUMP"])
    inside, outside = recorded_thunks(dump)
    loops_inside, loops_outside = recorded_thunks(dump, "kWhile")
    print(
        f"NOTE: inside command buffers: {inside} custom calls and {loops_inside} loops, outside: "
        f"{outside} and {loops_outside}"
    )
    assert inside >= 2 * len(loops), "calls of a loop are not in command buffers"
    if NUM_PROCESSES > 1:
        jax_ep.finalize()


# Transformations --------------------------------------------------------------------------------


def transformations() -> None:
    """Transforms: vmap over a mesh axis and over none, a shard_map that is manual over "ep" alone.

    Two groups of half the devices. Results and gradients are exact, and no collective of XLA is in
    the programs: ranks may share a GPU. test_vmap.py and test_partly_manual.py have the rest.
    """
    if NUM_PROCESSES > 1:
        connect(timeout=60)
    devices = jax.devices(PLATFORM)
    num_ranks = max(1, len(devices) // 2)
    axes = (("stage", len(devices) // num_ranks), ("ep", num_ranks))
    placement = Placement(axes, replicated=("stage",))
    mesh = Mesh(np.array(devices).reshape([size for _, size in axes]), [name for name, _ in axes])
    case = sizes(placement, capacity=None)

    def check(name: str, layer: Any, problems: list[Any], specs: list[P]) -> None:
        """Of arguments that are the problems', stacked where there are several."""
        several = len(problems) > 1

        def stacked(parts: list[Any]) -> Any:
            return np.stack(parts) if several else parts[0]

        def place(array: Any, spec: P) -> jax.Array:
            sharding = NamedSharding(mesh, spec)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        x, ids, weights, scale = (
            stacked(list(a)) for a in zip(*(p.inputs for p in problems), strict=True)
        )
        target = stacked([p.target for p in problems])
        placed = [place(a, s) for a, s in zip((x, ids, weights, scale), specs, strict=True)]

        def out_and_gradients(x: Any, ids: Any, weights: Any, scale: Any, target: Any) -> Any:
            out, pull = jax.vjp(lambda x, w, s: layer(x, ids, w, s), x, weights, scale)
            return out, *pull(target)

        compiled = jax.jit(out_and_gradients).lower(*placed, place(target, specs[0])).compile()
        assert "all-reduce" not in compiled.as_text(), name
        found = jax.block_until_ready(compiled(*placed, place(target, specs[0])))
        expected = [stacked([p.out() for p in problems])]
        expected += [stacked(list(g)) for g in zip(*(p.gradients() for p in problems), strict=True)]
        names = ("out", "d x", "d weights", "d scale")
        for what, array, right in zip(names, found, expected, strict=True):
            assert np.any(right)
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(
                    np.asarray(shard.data), right[shard.index], f"{name}: {what}"
                )
        print(f"NOTE: {name}, {axes[0][1]} groups of {num_ranks} ranks: right, with gradients")

    two = [make_problem(placement, case, seed=i) for i in range(axes[0][1])]
    layer = sharded_layer(placement, mesh, case)
    over_stages = [P("stage", *spec) for spec in in_specs(placement)]
    check("vmap over a mesh axis", jax.vmap(layer, spmd_axis_name="stage"), two, over_stages)
    over_none = [P(None, *spec) for spec in in_specs(placement)]
    check("vmap, one call after the other", jax.vmap(layer), two, over_none)
    partly = jax.shard_map(
        lambda *args: shard_layer(case, "ep")(*args)[0],
        mesh=mesh,
        in_specs=in_specs(placement),
        out_specs=placement.tokens,
        axis_names={"ep"},
    )
    check("partly manual", partly, two[:1], list(in_specs(placement)))
    if NUM_PROCESSES > 1:
        jax_ep.finalize()
