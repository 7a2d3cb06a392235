"""Layers as programs: eager, in jit, ahead of time, several in one, with donated inputs, cached."""

import collections
import functools
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_layers import (
    AUTO,
    DP_EP,
    EP,
    EXPLICIT,
    PLACEMENTS,
    Stack,
    assert_equal,
    calls_in,
    check_values_and_gradients,
    checks_vma,
    compiled_calls,
    dense_layer,
    in_specs,
    make_problem,
    place,
    shard_layer,
    sharded_layer,
    sizes,
    stack_loss,
    value_and_gradients,
)

import jax_ep
from jax_ep import reference

axis_types = pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])


# jit and eager ------------------------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize(
    ("name", "axis_type", "check_vma"),
    [
        ("ep", AUTO, True),
        ("ep", EXPLICIT, False),
        ("dp_ep_tp", AUTO, False),
        ("dp_ep_tp", EXPLICIT, True),
    ],
)
def test_jit(name: str, axis_type: AxisType, check_vma: bool) -> None:
    placement = PLACEMENTS[name]
    mesh, case = placement.mesh(axis_type), sizes(placement)
    problem = make_problem(placement, case, seed=1)
    f = jax.jit(sharded_layer(placement, mesh, case, check_vma=check_vma))
    assert_equal(f(*place(mesh, in_specs(placement), problem.inputs)), problem.out())


@pytest.mark.parametrize(
    ("name", "axis_type", "check_vma"),
    [
        pytest.param("ep", EXPLICIT, True, marks=pytest.mark.versions),
        ("dp_ep_tp", AUTO, False),
    ],
    ids=["ep-explicit-vma", "dp_ep_tp-auto-no_vma"],
)
def test_eager(name: str, axis_type: AxisType, check_vma: bool) -> None:
    """An eager shard_map runs primitive by primitive, each compiled on its own."""
    placement = PLACEMENTS[name]
    mesh, case = placement.mesh(axis_type), sizes(placement)
    problem = make_problem(placement, case, seed=1)
    f = sharded_layer(placement, mesh, case, check_vma=check_vma)
    assert_equal(f(*place(mesh, in_specs(placement), problem.inputs)), problem.out())


def test_eager_value_and_grad() -> None:
    mesh, case = DP_EP.mesh(), sizes(DP_EP)
    problem = make_problem(DP_EP, case)
    check_values_and_gradients(problem, DP_EP, mesh, sharded_layer(DP_EP, mesh, case))


# Several calls in one program ---------------------------------------------------------------------


def test_layers_of_different_sizes_in_one_jit() -> None:
    """K, E, capacity and alignment differ; also two layers that differ in one of them only."""
    mesh = EP.mesh()
    cases = [
        sizes(EP),
        sizes(EP, expert_alignment=1),
        sizes(EP, capacity=12),
        sizes(EP, top_k=1, num_experts=8, capacity=None, expert_alignment=1),
        sizes(EP, top_k=4, num_experts=32, capacity=24, expert_alignment=8),
        sizes(EP, top_k=3, num_experts=24, capacity=15, expert_alignment=1),
    ]
    problems = [make_problem(EP, case, seed=i) for i, case in enumerate(cases)]
    rest = [p.inputs[1:] for p in problems]
    layers = [shard_layer(case, "ep", square=False) for case in cases]

    def mix(functions: Sequence[Callable], x: Any, rest: Any) -> Any:
        for f, parameters in zip(functions, rest, strict=True):
            x = jnp.clip(f(x, *parameters), -4, 4)
        return x

    run = jax.shard_map(
        lambda x, rest: mix([lambda *a, f=f: f(*a)[0] for f in layers], x, rest),
        mesh=mesh,
        in_specs=(P("ep"), P("ep")),
        out_specs=P("ep"),
    )

    def dense_loss(x: Any, weights: Any, scales: Any) -> Any:
        functions = [
            functools.partial(lambda kept, *a: dense_layer(False, *a, kept), p.kept)
            for p in problems
        ]
        parameters = [(r[0], w, s) for r, w, s in zip(rest, weights, scales, strict=True)]
        return jnp.sum(mix(functions, x, parameters) * problems[0].target)

    def loss(x: Any, weights: Any, scales: Any) -> Any:
        parameters = [(r[0], w, s) for r, w, s in zip(rest, weights, scales, strict=True)]
        return jnp.sum(run(x, parameters) * problems[0].target)

    args = problems[0].x, [r[1] for r in rest], [r[2] for r in rest]
    expected = jax.jit(jax.value_and_grad(dense_loss, argnums=(0, 1, 2)))(*args)
    assert_equal(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args), expected)


def _busy(x: Any, steps: Any) -> Any:
    """x, after so many steps of work that XLA cannot remove."""
    return lax.fori_loop(0, steps, lambda _, x: jnp.where(jnp.sin(x) > 2, 0, x), x)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_one_jitted_layer_called_on_independent_data(where: str) -> None:
    """Calls with equal attributes whose data become ready in another order on every device."""
    mesh, case, num_calls = EP.mesh(), sizes(EP), 4
    problems = [make_problem(EP, case, seed=i) for i in range(num_calls)]
    arrays = [place(mesh, in_specs(EP), p.inputs) for p in problems]
    layer = shard_layer(case, "ep")

    def delayed(call: Any, x: Any, *rest: Any) -> Any:
        steps = (lax.axis_index("ep") + call) % num_calls * 300
        return layer(_busy(x, steps), *rest)[0]

    # `call` is data, so all calls are of one jitted function.
    specs = (P(), *in_specs(EP))
    if where == "inside":
        f = jax.jit(delayed)
        run = jax.jit(
            jax.shard_map(
                lambda all_args: [f(jnp.int32(i), *args) for i, args in enumerate(all_args)],
                mesh=mesh,
                in_specs=([list(in_specs(EP))] * num_calls,),
                out_specs=[EP.tokens] * num_calls,
            )
        )
    else:
        f = jax.jit(jax.shard_map(delayed, mesh=mesh, in_specs=specs, out_specs=EP.tokens))
        run = jax.jit(lambda all_args: [f(jnp.int32(i), *a) for i, a in enumerate(all_args)])
    run = run.lower(arrays).compile()
    expected = [p.out() for p in problems]
    for _ in range(5):
        assert_equal(run(arrays), expected)
    assert calls_in(run) == (num_calls,) * 3


@pytest.mark.versions
def test_unused_results_are_removed() -> None:
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    arrays = place(mesh, in_specs(EP), problem.inputs)
    layer = shard_layer(case, "ep", in_one=False)

    def keep(pick: Callable) -> Callable:
        def f(x: Any, ids: Any, weights: Any, scale: Any) -> Any:
            out, layout = layer(x, ids, weights, scale)
            dispatched = jax_ep.dispatch(x, layout)
            return pick(x, out, layout, dispatched)

        return jax.shard_map(f, mesh=mesh, in_specs=in_specs(EP), out_specs=P("ep"))

    nothing = keep(lambda x, out, layout, dispatched: x)
    assert compiled_calls(nothing, *arrays) == (0, 0, 0)
    stats = keep(lambda x, out, layout, dispatched: layout.stats())
    assert compiled_calls(stats, *arrays) == (1, 0, 0)
    for name, value in jax.jit(stats)(*arrays).items():
        assert_equal(value, getattr(problem.layouts[0], name))
    out_only = keep(lambda x, out, layout, dispatched: out)
    assert compiled_calls(out_only, *arrays) == (1, 1, 1)
    assert_equal(jax.jit(out_only)(*arrays), problem.out())
    dispatched_only = keep(lambda x, out, layout, dispatched: dispatched.tokens)
    assert compiled_calls(dispatched_only, *arrays) == (1, 1, 0)
    rows, _ = reference.dispatch(problem.x.reshape(8, 6, -1), problem.layouts[0])
    assert_equal(jax.jit(dispatched_only)(*arrays), rows.reshape(-1, case.hidden))


@pytest.mark.versions
def test_equal_calls_are_merged() -> None:
    """The same layer written twice is computed once."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    arrays = place(mesh, in_specs(EP), problem.inputs)
    layer = sharded_layer(EP, mesh, case)
    f = jax.jit(lambda *args: (layer(*args), 2 * layer(*args)))
    assert_equal(f(*arrays), (problem.out(), 2 * problem.out()))
    assert compiled_calls(f, *arrays) == (1, 1, 1)


# Donation, AOT, shapes ----------------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("donated", [(0,), (0, 1, 2, 3)], ids=["x", "all"])
def test_donated_inputs(donated: tuple[int, ...]) -> None:
    """A donated x is gone and its memory is reused; the result does not change."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)

    def f(x: Any, ids: Any, weights: Any, scale: Any) -> Any:
        out = sharded_layer(EP, mesh, case)(x, ids, weights, scale)
        return out, ids + 1, weights + 1, scale + 1

    run = jax.jit(f, donate_argnums=donated)
    for _ in range(2):
        arrays = place(mesh, in_specs(EP), problem.inputs)
        out, *_ = run(*arrays)
        assert_equal(out, problem.out())
        assert [a.is_deleted() for a in arrays] == [i in donated for i in range(4)]
    text = run.lower(*place(mesh, in_specs(EP), problem.inputs)).compile().as_text()
    assert "input_output_alias" in text


def test_donated_carry_of_a_training_loop() -> None:
    """Parameters donated to each step, which returns the updated ones."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    x, ids, weights, scale = place(mesh, in_specs(EP), problem.inputs)
    (target,) = place(mesh, [P("ep")], [problem.target])
    layer = sharded_layer(EP, mesh, case, square=False)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(scale: Any) -> Any:
        gradient = jax.grad(lambda s: jnp.sum(layer(x, ids, weights, s) * target))(scale)
        return scale + gradient

    # The loss is linear in scale, so the gradient is the same at every step.
    gradient = problem.gradients(square=False)[2]
    for i in range(1, 4):
        scale = step(scale)
        assert_equal(scale, problem.scale + i * gradient)


@pytest.mark.versions
@axis_types
def test_ahead_of_time(axis_type: AxisType) -> None:
    """Lowered and compiled from shapes alone, then called; compiled twice from one lowering."""
    mesh, case = DP_EP.mesh(axis_type), sizes(DP_EP)
    problem = make_problem(DP_EP, case)
    specs = (*in_specs(DP_EP), DP_EP.tokens)
    values = (*problem.inputs, problem.target)
    structs = [
        jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, s))
        for v, s in zip(values, specs, strict=True)
    ]
    f = jax.jit(value_and_gradients(sharded_layer(DP_EP, mesh, case), DP_EP, mesh))
    lowered = f.trace(*structs).lower()
    arrays = place(mesh, specs, values)
    for compiled in (lowered.compile(), lowered.compile()):
        (loss, out), grads = compiled(*arrays)
        assert float(loss) == problem.loss
        assert_equal(out, problem.out())
        assert_equal(grads, problem.gradients())


@pytest.mark.versions
@checks_vma
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("fp8", "dequantize"),
    [(None, False), ("float32", False), ("power_of_two", False), ("power_of_two", True)],
)
def test_shapes(fp8: Any, dequantize: bool, dtype: str, check_vma: bool) -> None:
    """jax.eval_shape: every output's shape and type, and what varies over which axes."""
    mesh = DP_EP.mesh()
    num_tokens, top_k, num_experts, capacity, hidden = 6, 2, 16, 12, 272

    def f(x: Any, ids: Any, weights: Any) -> Any:
        layout = jax_ep.make_layout(
            ids, num_experts=num_experts, axis_name="ep", capacity=capacity, expert_alignment=2
        )
        recv = jax_ep.dispatch(x, layout, weights, fp8=fp8, dequantize=dequantize)
        assert jax_ep.dispatch(x, layout).weights is None
        y = recv.tokens[:, :128].astype(dtype)
        out = jax_ep.combine(y, layout, recv.weights)
        results = {"layout": layout, "recv": recv, "out": out}
        results |= {"kept": layout.kept, "row_valid": layout.row_valid}
        if check_vma:
            for leaf in jax.tree.leaves(results):
                assert jax.typeof(leaf).manual_axis_type.varying == {"dp", "ep"}
        return jax.tree.map(lambda a: a[None], results)

    spec = DP_EP.tokens
    run = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    tokens = 8 * num_tokens
    shapes = jax.eval_shape(
        run,
        jax.ShapeDtypeStruct((tokens, hidden), dtype),
        jax.ShapeDtypeStruct((tokens, top_k), "int32"),
        jax.ShapeDtypeStruct((tokens, top_k), "bfloat16"),
    )
    local_experts = num_experts // 4
    keeps_fp8 = fp8 is not None and not dequantize
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "layout.topk_idx": ((num_tokens, top_k), "int32"),
        "layout.send_row": ((num_tokens, top_k), "int32"),
        "layout.recv_src": ((capacity,), "int32"),
        "layout.recv_order": ((capacity,), "int32"),
        "layout.recv_offsets": ((4 * num_tokens + 1,), "int32"),
        "layout.group_sizes": ((local_experts,), "int32"),
        "layout.expert_counts": ((local_experts,), "int32"),
        "layout.expert_load": ((num_experts,), "int32"),
        "layout.num_recv": ((), "int32"),
        "layout.num_dropped": ((), "int32"),
        "layout.num_invalid": ((), "int32"),
        "recv.tokens": ((capacity, hidden), "float8_e4m3fn" if keeps_fp8 else dtype),
        "recv.weights": ((capacity,), "float32"),
        "recv.group_sizes": ((local_experts,), "int32"),
        "kept": ((num_tokens, top_k), "bool"),
        "row_valid": ((capacity,), "bool"),
        "out": ((num_tokens, 128), dtype),
    }
    if keeps_fp8:
        expected["recv.scales"] = ((capacity, 3), "float32")  # of 128, 128 and 16 channels
    flat = {
        ".".join(re.findall(r"\w+", jax.tree_util.keystr(path))): (leaf.shape[1:], leaf.dtype.name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert flat == expected
    layout = shapes["layout"]
    assert (layout.num_ranks, layout.num_experts, layout.capacity) == (4, num_experts, capacity)
    assert (layout.axis_name, layout.expert_alignment, layout.zero_tail) == (("ep",), 2, True)


# Names in programs --------------------------------------------------------------------------------


@pytest.mark.versions
def test_named_scopes() -> None:
    """Profiles and dumps name the verbs, forward and backward."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    layer = sharded_layer(EP, mesh, case)
    arrays = place(mesh, in_specs(EP), problem.inputs)
    lowered = jax.jit(jax.grad(lambda *a: jnp.sum(layer(*a)), argnums=(0, 2))).lower(*arrays)
    text = lowered.as_text(debug_info=True)
    for scope in ("jax_ep.layout_and_dispatch", "jax_ep.experts", "jax_ep.combine"):
        assert scope in text
    calls = re.findall(
        r'custom_call_target="jax_ep_(\w+)".*op_name="([^"]*)"', lowered.compile().as_text()
    )
    scopes = collections.defaultdict(set)
    for op, op_name in calls:
        scopes[op] |= set(re.findall(r"jax_ep\.\w+", op_name))
    assert scopes == {
        "layout_and_dispatch": {"jax_ep.layout_and_dispatch"},
        "dispatch": {"jax_ep.combine"},
        "combine": {"jax_ep.layout_and_dispatch"},
    }
    backward = [op_name for op, op_name in calls if "transpose" in op_name]
    assert any("jax_ep.layout_and_dispatch" in name for name in backward)
    assert any("jax_ep.combine" in name for name in backward)


# The persistent compilation cache -----------------------------------------------------------------

_CACHE_CHILD = """
import json, sys
import test_compilation
print("RESULT" + json.dumps(test_compilation.run_with_cache(sys.argv[1])))
"""


def run_with_cache(cache_dir: str) -> dict[str, Any]:
    """Runs in a process of its own: a program whose executable comes from the cache, or goes in."""
    jax.config.update("jax_compilation_cache_dir", cache_dir)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    events: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))

    mesh, stack = EP.mesh(), Stack.make(EP, 2)
    f, arrays = stack_loss(stack, EP, mesh, policy="layout", scan=True)
    compiled = jax.jit(f).lower(*arrays).compile()
    hits = events["/jax/compilation_cache/cache_hits"]
    misses = events["/jax/compilation_cache/cache_misses"]
    results = jax.tree.leaves(compiled(*arrays))
    assert_equal(results, jax.tree.leaves(stack.expected()))
    digest = hashlib.sha256(b"".join(np.asarray(r).tobytes() for r in results)).hexdigest()
    # Two independent calls of one jitted layer, from the cache as well.
    problems = [make_problem(EP, stack.case, seed=i) for i in (3, 4)]
    layer = jax.jit(sharded_layer(EP, mesh, stack.case))
    both = jax.jit(lambda a, b: (layer(*a), layer(*b)))
    outs = both(*(place(mesh, in_specs(EP), p.inputs) for p in problems))
    assert_equal(outs, tuple(p.out() for p in problems))
    return {"hits": hits, "misses": misses, "digest": digest}


def test_persistent_compilation_cache(tmp_path: pathlib.Path) -> None:
    """A second process takes the executable from disk and gets the same bits."""
    tests = pathlib.Path(__file__).resolve().parent
    package = pathlib.Path(jax_ep.__file__).resolve().parent.parent  # the one under test
    paths = [*map(str, (tests, tests / "support", package)), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    results = []
    for _ in range(2):
        process = subprocess.run(
            [sys.executable, "-c", _CACHE_CHILD, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        (line,) = [x for x in process.stdout.splitlines() if x.startswith("RESULT")]
        results.append(
            json.loads(line.removeprefix("RESULT")) | {"files": len(os.listdir(tmp_path))}
        )
    first, second = results
    assert (first["hits"], second["hits"]) == (0, 1)
    assert (first["misses"], second["misses"]) == (1, 0)
    assert first["digest"] == second["digest"]
