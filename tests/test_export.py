"""jax.export: a program is written to a file, and runs where only `jax_ep` is imported.

JAX asks for a promise that custom calls stay compatible: `DISABLED_CHECKS` gives it for ours.

Which device is which rank: the mesh at export says which position is which rank of which group,
and the mesh that calls says which device is at which position. The device ids of the mesh at export
(of an abstract mesh: 0, 1, ...) go into the attributes `member_*`; on CPU the results do not depend
on them, which is tested here by calling every program on three orders of the devices.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from routings import assert_same_bits, random_rows, random_weights
from sharded_layers import (
    ALL_OPS,
    DP_EP,
    EP,
    OPS,
    PLACEMENTS,
    Placement,
    Stack,
    in_specs,
    make_problem,
    place,
    sharded_layer,
    sizes,
    stack_loss,
    value_and_gradients,
)

import jax_ep
from jax_ep import reference

DISABLED_CHECKS = [jax.export.DisabledSafetyCheck.custom_call(f"jax_ep_{op}") for op in ALL_OPS]
ORDERS = {"ascending": range(8), "reversed": range(7, -1, -1), "mixed": (3, 6, 0, 7, 1, 5, 2, 4)}

# Runs all programs of a directory: nothing of what made them is imported.
_CHILD = """
import json, pathlib, sys
import jax
import jax.numpy as jnp
import numpy as np
import jax_ep

directory, orders = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
for path in sorted(directory.glob("*.exported")):
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    with np.load(path.with_suffix(".npz")) as file:
        args = [file[name] for name in file.files]
    # JAX wants a mesh with the axes of the one at export; which devices, is the caller's choice.
    axes = json.loads(path.with_suffix(".json").read_text())
    types = (getattr(jax.sharding.AxisType, axes["type"]),) * len(axes["names"])
    for order, ids in orders.items():
        devices = np.array([jax.devices("cpu")[i] for i in ids]).reshape(axes["shape"])
        mesh = jax.sharding.Mesh(devices, axes["names"], axis_types=types)
        shardings = exported.in_shardings_jax(mesh)
        placed = [jax.device_put(a, s) for a, s in zip(args, shardings, strict=True)]
        outs = [jax.jit(exported.call)(*placed)]
        if exported.has_vjp():
            argnums = [i for i, a in enumerate(args) if a.dtype.kind == "f"]
            loss = lambda *a: jnp.sum(exported.call(*a))
            outs.append(jax.jit(jax.grad(loss, argnums))(*placed))
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(outs)]
        np.savez(path.with_name(f"{path.stem}.{order}.out.npz"), *leaves)
print("modules", *sorted(m for m in sys.modules if m.startswith("test")))
"""


def _dispatch_and_combine(mesh: Any) -> tuple[Any, list[Any], list[Any]]:
    """Random float16 rows through the verbs, with a tight capacity; the oracle's bits."""
    rng, case = np.random.default_rng(5), sizes(EP)
    ids = make_problem(EP, case).topk_idx.reshape(8, 6, 2)
    x = random_rows(rng, (8, 6, 8), np.float16, specials=True)
    weights = random_weights(rng, case)

    def f(x: Any, ids: Any, weights: Any) -> Any:
        layout = jax_ep.make_layout(
            ids, num_experts=16, axis_name="ep", capacity=10, expert_alignment=2
        )
        recv = jax_ep.dispatch(x, layout, weights)
        return recv.tokens, recv.weights, jax_ep.combine(recv.tokens, layout, recv.weights)

    run = jax.shard_map(f, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    layout = case.reference_layout(ids)
    rows, row_weights = reference.dispatch(x, layout, weights)
    out = reference.combine(rows, layout, row_weights)
    flat = [a.reshape(-1, a.shape[-1]) for a in (x, ids, weights)]
    return run, flat, [rows.reshape(-1, 8), row_weights.reshape(-1), out.reshape(-1, 8)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exports all programs, runs them in a fresh process; expected and actual results by name."""
    pytest.importorskip("flatbuffers", reason="jax.export needs it to serialise")
    directory = tmp_path_factory.mktemp("exported")
    expected: dict[str, list[Any]] = {}

    def save(
        name: str, f: Any, mesh: Any, args: Any, arrays: Any = None, vjp_order: int = 0
    ) -> None:
        exported = jax.export.export(jax.jit(f), disabled_checks=DISABLED_CHECKS)(*args)
        (directory / f"{name}.exported").write_bytes(exported.serialize(vjp_order=vjp_order))
        np.savez(directory / f"{name}.npz", *(np.asarray(a) for a in arrays or args))
        axes = {"names": mesh.axis_names, "shape": mesh.axis_sizes, "type": mesh.axis_types[0].name}
        (directory / f"{name}.json").write_text(json.dumps(axes))

    # Exact bits of random rows, from a concrete mesh, from one in another order, from no devices.
    reordered = Placement((("ep", 8),), order=PLACEMENTS["permuted"].order)
    abstract = AbstractMesh((8,), ("ep",), axis_types=(AxisType.Auto,))
    meshes = {"concrete": EP.mesh(), "permuted": reordered.mesh(), "abstract": abstract}
    for name, mesh in meshes.items():
        run, flat, wanted = _dispatch_and_combine(mesh)
        sharding = NamedSharding(mesh, P("ep"))
        args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in flat]
        save(name, run, mesh, args, arrays=flat)
        expected[name] = wanted

    # Loss and gradients of a layer on dp x ep, with Auto and Explicit axes.
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh, case = DP_EP.mesh(axis_type), sizes(DP_EP)
        problem = make_problem(DP_EP, case)
        f = value_and_gradients(sharded_layer(DP_EP, mesh, case), DP_EP, mesh)
        specs = (*in_specs(DP_EP), DP_EP.tokens)
        args = place(mesh, specs, (*problem.inputs, problem.target))
        save(f"gradients_{axis_type.name}", f, mesh, args)
        wanted = [np.float32(problem.loss), problem.out(), *problem.gradients()]
        expected[f"gradients_{axis_type.name}"] = wanted

    # A scan over checkpointed layers and its gradients.
    mesh, stack = EP.mesh(), Stack.make(EP, 2)
    f, args = stack_loss(stack, EP, mesh, policy="layout", scan=True)
    save("stack", f, mesh, args)
    expected["stack"] = jax.tree.leaves(stack.expected())

    # A forward pass that was exported with its gradient, which the loader asks for.
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    args = place(mesh, in_specs(EP), problem.inputs)
    save("with_vjp", sharded_layer(EP, mesh, case), mesh, args, vjp_order=1)
    sum_of_outputs = dataclasses.replace(problem, target=np.ones_like(problem.x))
    expected["with_vjp"] = [problem.out(), *sum_of_outputs.gradients()]

    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = str(pathlib.Path(jax_ep.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [root, os.environ.get("PYTHONPATH", "")])
    )
    orders = json.dumps({name: list(ids) for name, ids in ORDERS.items()})
    process = subprocess.run(
        [sys.executable, "-c", _CHILD, str(directory), orders],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.split() == ["modules"]
    actual = {}
    for name in expected:
        for order in ORDERS:
            with np.load(directory / f"{name}.{order}.out.npz") as file:
                actual[name, order] = [file[n] for n in file.files]
    return expected, actual


PROGRAMS = (
    "concrete",
    "permuted",
    "abstract",
    "gradients_Auto",
    "gradients_Explicit",
    "stack",
    "with_vjp",
)


@pytest.mark.versions
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_loaded_in_a_fresh_process(results: Any, name: str, order: str) -> None:
    expected, actual = results
    assert set(expected) == set(PROGRAMS)
    for a, e in zip(actual[name, order], expected[name], strict=True):
        e = np.asarray(e)
        if name in ("concrete", "permuted", "abstract"):
            assert_same_bits(a, e)
        else:  # exact numbers; a zero's sign depends on the order of the dense sum
            assert a.dtype == e.dtype
            np.testing.assert_array_equal(a, e)


@pytest.mark.versions
def test_only_our_checks_need_to_be_disabled() -> None:
    """Each is needed and together they are enough: on CPU three, its gradients have no other."""
    mesh, case = EP.mesh(), sizes(EP)
    f = jax.jit(sharded_layer(EP, mesh, case, in_one=False))
    args = make_problem(EP, case).inputs
    checks = DISABLED_CHECKS[: len(OPS)]
    for i, op in enumerate(OPS):
        with pytest.raises(ValueError, match=rf"(?s)compatibility guarantees.*jax_ep_{op}"):
            jax.export.export(f, disabled_checks=checks[:i] + checks[i + 1 :])(*args)
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(f(*a)), argnums=(0, 2, 3)))
    jax.export.export(gradient, disabled_checks=checks)(*args)
    exported = jax.export.export(f, disabled_checks=checks)(*args)
    assert exported.nr_devices == 8


@pytest.mark.versions
def test_gradients_for_both_platforms() -> None:
    """One program for CPU and CUDA runs on CPU, where the gradient of combine is another."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    args = place(mesh, (*in_specs(EP), EP.tokens), (*problem.inputs, problem.target))
    exported = jax.export.export(
        jax.jit(value_and_gradients(sharded_layer(EP, mesh, case), EP, mesh)),
        platforms=["cpu", "cuda"],
        disabled_checks=DISABLED_CHECKS,
    )(*args)
    (_, out), grads = jax.jit(exported.call)(*args)
    np.testing.assert_array_equal(out, problem.out())
    for actual, expected in zip(grads, problem.gradients(), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.versions
def test_called_inside_a_larger_program() -> None:
    """In this process: an exported layer between other operations, and twice in one program."""
    mesh, case = EP.mesh(), sizes(EP)
    problems = [make_problem(EP, case, seed=i) for i in (0, 1)]
    arrays = [place(mesh, in_specs(EP), p.inputs) for p in problems]
    exported = jax.export.export(
        jax.jit(sharded_layer(EP, mesh, case)), disabled_checks=DISABLED_CHECKS
    )(*arrays[0])

    @jax.jit
    def f(a: Any, b: Any) -> Any:
        return exported.call(*a) + jnp.float32(1), exported.call(*b) * 2

    first, second = f(*arrays)
    np.testing.assert_array_equal(first, problems[0].out() + 1)
    np.testing.assert_array_equal(second, problems[1].out() * 2)


@pytest.mark.versions
def test_wrong_number_of_devices_is_refused() -> None:
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    args = place(mesh, in_specs(EP), problem.inputs)
    exported = jax.export.export(
        jax.jit(sharded_layer(EP, mesh, case)), disabled_checks=DISABLED_CHECKS
    )(*args)
    half = Placement((("ep", 4),)).mesh()
    arrays = [jax.device_put(a, NamedSharding(half, P("ep"))) for a in problem.inputs]
    with pytest.raises(ValueError, match="8 devices"):
        jax.jit(exported.call)(*arrays)
