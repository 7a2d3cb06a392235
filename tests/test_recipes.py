"""docs/recipes.md runs as it stands, and each recipe gives what a dense layer gives."""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text()
PREAMBLE, *PARTS = re.split(r"^## (.*)\n", TEXT, flags=re.MULTILINE)
RECIPES = dict(zip(PARTS[::2], PARTS[1::2], strict=True))

Names = dict[str, Any]


def program(part: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    return str(block)


@functools.cache
def run(recipe: str) -> Names:
    """The names of a recipe's program, arrays as NumPy's."""
    if len(jax.devices()) < 8:
        pytest.skip(f"8 devices are needed, here are {len(jax.devices())}")
    names: Names = {}
    with mock.patch.dict(os.environ):  # which the program sets, for a process of its own
        exec(program(PREAMBLE) + program(RECIPES[recipe]), names)
    return {
        name: jax.tree.map(np.asarray, jax.device_get(value))
        for name, value in names.items()
        if isinstance(value, jax.Array | np.ndarray | int | list | tuple)
    }


def silu(a: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(a / (1 + np.exp(-a)))


def softmax(a: NDArray[np.float64]) -> NDArray[np.float64]:
    exponential = np.exp(a - a.max(axis=-1, keepdims=True))
    return np.asarray(exponential / exponential.sum(axis=-1, keepdims=True))


def top(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def gates(ids: NDArray[Any], weights: NDArray[np.float64], num_experts: int) -> NDArray[np.float64]:
    """[tokens, E]: the weight of each expert; ids of -1 have none."""
    result = np.zeros((ids.shape[0], num_experts))
    for k in range(ids.shape[1]):
        routed = ids[:, k] >= 0
        result[routed, ids[routed, k]] += weights[routed, k]
    return result


def dense(n: Names, gate: NDArray[np.float64], w_in: Any = None, w_out: Any = None) -> Any:
    """Every expert on every token, in float64."""
    x = n["x"].astype(np.float64)
    w_in, w_out = n["w_in"] if w_in is None else w_in, n["w_out"] if w_out is None else w_out
    inner = silu(np.einsum("th,ehf->tef", x, w_in.astype(np.float64)))
    return np.einsum("te,tef,efh->th", gate, inner, w_out.astype(np.float64))


def scores(n: Names, router: str = "router") -> NDArray[np.float64]:
    return np.asarray(n["x"].astype(np.float64) @ n[router].astype(np.float64))


def by_softmax(n: Names, router: str = "router") -> tuple[NDArray[Any], NDArray[np.float64]]:
    probabilities = softmax(scores(n, router))
    ids = top(probabilities, int(n["K"]))
    return ids, np.take_along_axis(probabilities, ids, axis=1)


def assert_close(actual: Any, expected: Any) -> None:
    """Float32 sums of at most 100 terms of a magnitude near the largest result."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(expected).max() > 1


def group_limited(n: Names) -> None:
    # The third step's bias made the last `out`: two steps of 1e-3 can change no choice here but
    # one of scores as near; so the choice is redone with that bias.
    assert np.abs(n["bias"]).max() > 0
    load = n["loads"][0].astype(np.float64)
    assert (n["loads"] == n["loads"][0]).all()
    assert load.sum() == n["R"] * n["T"] * n["K"]
    last = n["bias"] - np.float32(1e-3) * np.sign(load.mean() - load)  # of the last call
    sigmoid = 1 / (1 + np.exp(-scores(n)))
    ranked = sigmoid + last
    worth = ranked.reshape(-1, 8, 2).sum(axis=-1)
    allowed = np.zeros_like(worth, bool)
    np.put_along_axis(allowed, top(worth, 4), True, axis=1)
    ids = top(np.where(allowed.repeat(2, axis=1), ranked, -np.inf), 4)
    weights = np.take_along_axis(sigmoid, ids, axis=1)
    weights = 2.5 * weights / weights.sum(axis=1, keepdims=True)
    assert np.bincount(ids.reshape(-1), minlength=16).tolist() == load.tolist()
    assert_close(n["out"], dense(n, gates(ids, weights, 16)))


def balance(n: Names) -> None:
    ids, _ = by_softmax(n)
    with jax.enable_x64(True):
        double = {k: jnp.asarray(n[k], jnp.float64) for k in ("x", "router", "w_in", "w_out")}

        def loss(router: Any) -> Any:
            gates = jax.nn.softmax(double["x"] @ router)
            chosen = (ids[:, :, None] == np.arange(16)).any(axis=1)
            inner = jax.nn.silu(jnp.einsum("th,ehf->tef", double["x"], double["w_in"]))
            out = jnp.einsum("te,tef,efh->th", gates * chosen, inner, double["w_out"])
            # By data-parallel group, of 4 ranks each.
            shares = chosen.reshape(2, -1, 16).mean(axis=1) / n["K"]
            balance = (16 * shares * gates.reshape(2, -1, 16).mean(axis=1)).sum(axis=1).mean()
            return (out**2).mean() + 0.01 * balance, balance

        (expected, expected_balance), gradient = jax.device_get(
            jax.value_and_grad(loss, has_aux=True)(double["router"])
        )
    assert 1.01 < expected_balance < 16
    np.testing.assert_allclose(n["balance"], expected_balance, rtol=1e-5)
    np.testing.assert_allclose(n["loss"], expected, rtol=1e-5)
    assert_close(n["gradient"], gradient)


def fixed_room(n: Names) -> None:
    ids, weights = by_softmax(n)
    kept = n["ids"] >= 0
    assert n["num_dropped"].tolist() == [0] * 8
    assert 0 < (~kept).sum() < kept.sum() / 2  # some were too many
    assert (np.where(kept, ids, -1) == n["ids"]).all()
    for expert in range(16):
        here = ids == expert
        assert (here & kept).sum() == min(here.sum(), n["M"])
        if (here & ~kept).any():
            assert weights[here & kept].min() >= weights[here & ~kept].max() * (1 - 1e-6)
    weights = np.where(kept, weights, 0)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    assert_close(n["out"], dense(n, gates(n["ids"], weights, 16)))


def replicas(n: Names) -> None:
    expected = dense(n, gates(*by_softmax(n), 16))
    assert len(n["results"]) == 2
    for out, loads in n["results"]:
        assert_close(out, expected)
        assert (loads == loads[0]).all()
    load, logical_of = n["results"][-1][1][0], n["logical_of"]
    logical = np.bincount(by_softmax(n)[0].reshape(-1), minlength=16)
    assert np.bincount(logical_of, load, minlength=16).tolist() == logical.tolist()
    nine = load[logical_of == 9]  # has three copies
    assert nine.size == 3
    assert nine.min() > 0


def shared(n: Names) -> None:
    x, first, second = (n[k].astype(np.float64) for k in ("x", "shared_in", "shared_out"))
    assert_close(n["out"], silu(x @ first) @ second + dense(n, gates(*by_softmax(n), 16)))


def padding(n: Names) -> None:
    ids, weights = by_softmax(n)
    ids = np.where(n["is_padding"][:, None], -1, ids)
    assert not n["out"][n["is_padding"]].any()
    assert_close(n["out"], dense(n, gates(ids, weights, 16)))


def padded_experts(n: Names) -> None:
    ids, weights = by_softmax(n, "narrow")
    assert ids.max() == 12
    assert_close(n["out"], dense(n, gates(ids, weights, 16), *n["padded"]))


CHECKS: dict[str, Callable[[Names], None]] = {
    "Group-limited routing": group_limited,
    "A balancing loss": balance,
    "A fixed room for every expert, and who is dropped": fixed_room,
    "Expert replicas": replicas,
    "Shared experts": shared,
    "Padding tokens": padding,
    "A number of experts that the ranks do not divide": padded_experts,
}


def test_every_recipe_has_a_check() -> None:
    assert set(RECIPES) == set(CHECKS)


@pytest.mark.parametrize("recipe", CHECKS)
def test_recipe(recipe: str) -> None:
    CHECKS[recipe](run(recipe))
