"""Ids that make no sense: with ``check_ids=True`` they end the program, and it says why.

Without it a line tells of them; a warning tells of ids that are the same on all ranks.
"""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routings
from backends import AXIS, JaxBackend
from cpu_devices import cpu_devices
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from routings import Case, assert_same_bits

import jax_ep

pytestmark = pytest.mark.usefixtures("poison")

CASE = Case(4, 6, 2, 8, hidden=8)
IDS = routings.topk_ids(np.random.default_rng(70), CASE, "uniform")
X = np.random.default_rng(71).standard_normal((4, 6, 8), np.float32)
JaxRuntimeError = jax.errors.JaxRuntimeError


def layer(ids: Any, x: Any, *, check_ids: bool = True, **options: Any) -> Any:
    layout = jax_ep.make_layout(
        ids, **({"num_experts": 8, "axis_name": AXIS, "check_ids": check_ids} | options)
    )
    tokens = jax_ep.dispatch(x, layout).tokens
    return jax_ep.combine(tokens * 2, layout), layout.num_invalid[None]


def text_of(error: pytest.ExceptionInfo[Any]) -> str:
    found = re.search(r"ValueError: (jax_ep\..*)", str(error.value))
    assert found is not None, str(error.value)
    return found[1]


def changed(*changes: tuple[int, int, int, int]) -> np.ndarray:
    """IDS with (rank, token, k) set to an id."""
    ids = np.clip(IDS, 1, 6)
    for rank, token, k, expert in changes:
        ids[rank, token, k] = expert
    return ids


def test_good_ids_change_nothing(device_backend: JaxBackend) -> None:
    ids = changed((0, 0, 0, -1), (3, 5, 1, 0), (2, 1, 1, 7))
    out, num_invalid = device_backend.run(4, layer, ids, X)
    plain, _ = device_backend.run(4, lambda *args: layer(*args, check_ids=False), ids, X)
    assert_same_bits(out, plain)
    assert not np.any(num_invalid)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ([(1, 0, 0, 8)], "rank 1 has 1 of 12, its ids lie in [1, 8]"),  # counted from 1
        ([(3, 0, 0, -2), (3, 0, 1, -1)], "rank 3 has 1 of 12, its ids lie in [-2, 6]"),
        (
            [(0, 0, 0, 15), (2, 0, 0, 8), (2, 5, 1, 2**31 - 1)],
            "rank 0 has 1 of 12, its ids lie in [1, 15]; "
            "rank 2 has 2 of 12, its ids lie in [1, 2147483647]",
        ),
    ],
    ids=["off_by_one", "negative", "two_ranks"],
)
def test_bad_ids_are_named(
    device_backend: JaxBackend, changes: list[tuple[int, int, int, int]], named: str
) -> None:
    ids = changed(*changes)
    with pytest.raises(JaxRuntimeError) as error:
        device_backend.run(4, layer, ids, X)
    assert text_of(error) == (
        "jax_ep.make_layout: ids that are neither -1 nor in [0, num_experts = 8): "
        f"{named}. Ids count from 0, and num_experts is the width of the router"
    )
    # Without the option they are counted; and nothing is left behind by what failed.
    _, num_invalid = device_backend.run(4, lambda *args: layer(*args, check_ids=False), ids, X)
    assert int(np.sum(num_invalid)) == sum(not -1 <= change[3] < 8 for change in changes)
    device_backend.run(4, layer, changed(), X)


def test_many_ranks_are_counted(device_backend: JaxBackend) -> None:
    ids = np.full((8, 1, 1), 8, np.int32)  # num_experts below the router's width
    with pytest.raises(JaxRuntimeError) as error:
        device_backend.run(8, layer, ids, np.ones((8, 1, 8), np.float32))
    text = text_of(error)
    assert "rank 3 has 1 of 1, its ids lie in [8, 8]; and 4 ranks more. Ids count" in text
    assert "rank 4" not in text


def test_two_ranks(device_backend: JaxBackend) -> None:
    """As above, for machines with two GPUs."""
    x = X[:2]
    ids = changed()[:2] // 2  # all of them have an expert
    plain, _ = device_backend.run(2, lambda *args: layer(*args, check_ids=False), ids, x)
    out, num_invalid = device_backend.run(2, layer, ids, x)
    assert_same_bits(out, plain)
    assert not np.any(num_invalid)
    ids[1, 2, 0] = 8
    with pytest.raises(JaxRuntimeError) as error:
        device_backend.run(2, layer, ids, x)
    assert "rank 1 has 1 of 12, its ids lie in [" in text_of(error)
    assert "rank 0" not in text_of(error)


@pytest.mark.versions
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
def test_groups_fail_together(device_backend: JaxBackend, check_vma: bool) -> None:
    """Also the groups whose ids are good, so that no later collective waits for the others."""
    mesh = Mesh(np.array(device_backend.mesh(4).devices).reshape(2, 2), ("dp", AXIS))
    spec = P(("dp", AXIS))

    def f(ids: Any, x: Any) -> Any:
        return jax.lax.psum(layer(ids, x)[0].sum(), ("dp", AXIS))

    run = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=P(), check_vma=check_vma)
    x = jax.device_put(X.reshape(24, 8), NamedSharding(mesh, spec))
    good, bad = (
        jax.device_put(ids.reshape(24, 2), NamedSharding(mesh, spec))
        for ids in (changed(), changed((3, 2, 0, 9)))
    )
    f = jax.jit(run)
    wanted = float(f(good, x))
    with pytest.raises(JaxRuntimeError) as error:
        jax.block_until_ready(f(bad, x))
    assert "rank 1 of group 1 has 1 of 12, its ids lie in [1, 9]. Ids" in text_of(error)
    assert float(f(good, x)) == wanted


@pytest.mark.versions
def test_under_transformations(device_backend: JaxBackend) -> None:
    """Gradients, checkpoints and scans: the same numbers, and the same error."""

    def gradient(ids: Any, x: Any, *, check_ids: bool) -> Any:
        policy = jax.checkpoint_policies.save_only_these_names("jax_ep_layout")

        @jax.checkpoint
        def nothing_saved(x: Any) -> Any:
            return layer(ids, x, check_ids=check_ids)[0]

        def loss(x: Any) -> Any:
            saved = jax.checkpoint(lambda x: layer(ids, x, check_ids=check_ids)[0], policy=policy)
            x = nothing_saved(saved(x))
            x, _ = jax.lax.scan(lambda x, _: (nothing_saved(x), None), x, None, length=2)
            return (x**2).sum()

        return jax.grad(loss)(x)

    found, wanted = (
        device_backend.run(4, lambda *a, c=c: gradient(*a, check_ids=c), changed(), X)
        for c in (True, False)
    )
    assert_same_bits(found, wanted)
    assert np.any(found)
    with pytest.raises(JaxRuntimeError, match="rank 2 has 1 of 12, its ids lie in "):
        device_backend.run(4, lambda *a: gradient(*a, check_ids=True), changed((2, 0, 0, 8)), X)


def test_moe_and_eager(device_backend: JaxBackend) -> None:
    mesh = device_backend.mesh(4)
    run = jax.shard_map(
        lambda x, ids: jax_ep.moe(
            x,
            ids,
            jnp.ones((6, 2)),
            lambda rows, _: rows,
            num_experts=8,
            axis_name=AXIS,
            check_ids=True,
        )[0],
        mesh=mesh,
        in_specs=P(AXIS),
        out_specs=P(AXIS),
    )
    place = lambda a: jax.device_put(a, NamedSharding(mesh, P(AXIS)))  # noqa: E731
    x, bad = place(X.reshape(24, 8)), place(changed((0, 0, 1, 8)).reshape(24, 2))
    for f in (run, jax.jit(run)):
        with pytest.raises(JaxRuntimeError, match="rank 0 has 1 of 12, its ids lie in "):
            jax.block_until_ready(f(x, bad))


_UNCHECKED = """
import jax, jax_ep, numpy as np
from jax.sharding import PartitionSpec as P

def layout(ids):
    x = jax.numpy.zeros((ids.shape[0], 4))
    return jax_ep.layout_and_dispatch(x, ids, num_experts=4, axis_name="ep")[0].num_invalid[None]

mesh = jax.make_mesh((2,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
call = jax.jit(jax.shard_map(layout, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
print(call(np.array([[-1], [3], [0], [1]], np.int32)))
for _ in range(2):
    print(call(np.array([[1], [2], [4], [-2]], np.int32)))
"""


def test_without_the_check_one_line_tells(device_backend: JaxBackend) -> None:
    """Whatever the verb, and never of ids that are -1."""
    device_backend.mesh(2)  # are there as many?
    environment = {
        "JAX_PLATFORMS": device_backend.platform,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process may have most of a GPU's memory
        **cpu_devices(2),
    }
    done = subprocess.run(
        [sys.executable, "-c", _UNCHECKED],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == ["[0 0]", "[0 2]", "[0 2]"], done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("jax_ep")]
    assert told == [
        "jax_ep: topk_idx of rank 1 has 2 ids that are neither -1 nor in [0, num_experts = 4): "
        "they are not routed. layout.num_invalid counts them, check_ids=True makes them an error. "
        "This is said once."
    ]


@pytest.mark.versions
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
def test_replicated_tokens_are_told_of(device_backend: JaxBackend, check_vma: bool) -> None:
    """Where JAX follows what varies; not for axes of one device, nor for tokens of each rank."""
    devices = np.array(device_backend.mesh(2).devices)

    def make_sizes(ids: Any, axis_name: Any) -> Any:
        return jax_ep.make_layout(ids, num_experts=6, axis_name=axis_name).group_sizes

    def moe_sizes(ids: Any, axis_name: Any) -> Any:
        options = {"num_experts": 6, "axis_name": axis_name}
        x, weights = jnp.zeros((ids.shape[0], 8)), jnp.ones(ids.shape)
        return jax_ep.moe(x, ids, weights, lambda rows, sizes: rows, **options)[1].group_sizes

    def warned(
        in_specs: Any,
        shape: tuple[int, ...],
        axis_name: Any,
        sizes: Callable[..., Any] = make_sizes,
    ) -> list[str]:
        mesh = Mesh(devices.reshape(shape), ("dp", AXIS))
        run = jax.shard_map(
            lambda ids: sizes(ids, axis_name),
            mesh=mesh,
            in_specs=in_specs,
            out_specs=P(("dp", AXIS)),
            check_vma=check_vma,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            jax.eval_shape(run, jax.ShapeDtypeStruct((8, 2), np.int32))
        found = [w for w in caught if w.category is UserWarning]
        assert all(w.filename == __file__ for w in found)  # whoever called the package
        return [str(w.message) for w in found]

    both = ("dp", AXIS)
    assert warned(P(both), (1, 2), AXIS) == []
    assert warned(P(AXIS), (1, 2), both) == []
    found = warned(P(), (1, 2), AXIS) + warned(P("dp"), (1, 2), both)
    message = ": topk_idx is the same on all ranks along ('ep',): tokens that are"
    assert len(found) == (2 if check_vma else 0)
    assert all(text.startswith(f"jax_ep.make_layout{message}") for text in found)
    found = warned(P(), (1, 2), AXIS, moe_sizes)
    assert len(found) == check_vma
    assert all(text.startswith(f"jax_ep.layout_and_dispatch{message}") for text in found)
