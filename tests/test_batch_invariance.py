"""out[t] and dx[t] depend on t's own rows and routing: not on other tokens, nor on T, C or A.

The experts work element by element, so that all the difference there could be is the verbs'. The
gradient of the weights is not promised: the order of its sum over H is the backend's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

import jax_ep

R, H, K, E = 4, 32, 3, 8

Expert = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Of all ranks, [R, T, ..]: what a token is, where it goes, and the cotangent of its result."""

    x: NDArray[Any]
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    cotangent: NDArray[Any]

    def at(self, index: NDArray[np.int64]) -> "Tokens":
        """Those tokens of every rank, in that order."""
        fields = dataclasses.asdict(self).items()
        return Tokens(**{name: array[:, index] for name, array in fields})


def _random(seed: int, num_tokens: int, dtype: Any) -> Tokens:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((R, num_tokens, E)), axis=-1)[..., :K].astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    return Tokens(
        rng.standard_normal((R, num_tokens, H)).astype(dtype),
        ids,
        rng.random((R, num_tokens, K), np.float32),
        rng.standard_normal((R, num_tokens, H)).astype(dtype),
    )


def _joined(first: Tokens, second: Tokens) -> Tokens:
    a, b = dataclasses.asdict(first), dataclasses.asdict(second)
    return Tokens(**{name: np.concatenate([a[name], b[name]], axis=1) for name in a})


def _square(rows: jax.Array) -> jax.Array:
    return rows * rows


def _run(tokens: Tokens, expert: Expert = _square, **options: Any) -> dict[str, NDArray[Any]]:
    """Result and gradient of x, [R, T, H]."""
    mesh = Mesh(np.array(jax.devices()[:R]), ("ep",))

    def shard(x: jax.Array, ids: jax.Array, weights: jax.Array, cotangent: jax.Array) -> Any:
        def layer(x: jax.Array) -> jax.Array:
            layout = jax_ep.make_layout(ids, num_experts=E, axis_name="ep", **options)
            received = jax_ep.dispatch(x, layout, weights)
            return jax_ep.combine(expert(received.tokens), layout, received.weights)

        out, vjp = jax.vjp(layer, x)
        return out, *vjp(cotangent)

    sharding = NamedSharding(mesh, P("ep"))
    operands = [
        jax.device_put(array.reshape(-1, array.shape[-1]), sharding)
        for array in (tokens.x, tokens.ids, tokens.weights, tokens.cotangent)
    ]
    sharded = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    results = [np.asarray(result) for result in sharded(*operands)]
    return {n: r.reshape(R, -1, H) for n, r in zip(("out", "dx"), results, strict=True)}


def _differing(some: dict[str, NDArray[Any]], others: dict[str, NDArray[Any]]) -> list[str]:
    return [name for name in some if some[name].tobytes() != others[name].tobytes()]


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def tokens(request: pytest.FixtureRequest) -> Tokens:
    if len(jax.devices()) < R:
        pytest.skip(f"{R} devices are needed, here are {len(jax.devices())}")
    return _random(0, 6, request.param)


def test_other_tokens_and_their_number(tokens: Tokens) -> None:
    """Among others, at another place: rows lie elsewhere, and sums have the same bits."""
    alone = _run(tokens)
    assert all(np.any(result) for result in alone.values())
    places = np.array([9, 3, 7, 0, 4, 8])
    for seed in (1, 2):
        crowd = _joined(tokens, _random(seed, 5, tokens.x.dtype))
        order = np.full(11, -1)
        order[places] = np.arange(6)
        order[order < 0] = np.arange(6, 11)
        among = {name: result[:, places] for name, result in _run(crowd.at(order)).items()}
        assert _differing(alone, among) == []


@pytest.mark.parametrize(
    "options", [{"capacity": 64}, {"expert_alignment": 8}, {"capacity": 200, "zero_tail": False}]
)
def test_capacity_and_alignment(tokens: Tokens, options: dict[str, Any]) -> None:
    assert _differing(_run(tokens), _run(tokens, **options)) == []


def test_an_expert_that_depends_on_its_neighbours_is_seen(tokens: Tokens) -> None:
    """The control: rows that are multiplied by their place."""

    def by_place(rows: jax.Array) -> jax.Array:
        return rows * jnp.arange(rows.shape[0], dtype=rows.dtype)[:, None]

    differing = _differing(_run(tokens, by_place), _run(tokens, by_place, expert_alignment=8))
    assert differing == ["out", "dx"]
