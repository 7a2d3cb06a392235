"""jax_ep.routing against loops in NumPy, and together with make_layout."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import routings
from backends import AXIS, JaxBackend
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import DTypeLike, NDArray
from routings import Case, assert_same_bits
from sharded_layers import AUTO, EXPLICIT, PLACEMENTS

import jax_ep

BF16, F32 = ml_dtypes.bfloat16, np.float32

# keep_heaviest ------------------------------------------------------------------------------------


def heaviest_by_loop(
    ids: NDArray[np.int32], weights: NDArray[Any], expert_capacity: int, num_experts: int
) -> NDArray[np.int32]:
    """By the book; ids and weights [R, T, K]."""
    kept = ids.copy().reshape(-1)
    flat = weights.astype(np.float32).reshape(-1)
    for expert in range(num_experts):
        sources = [int(s) for s in np.flatnonzero(ids.reshape(-1) == expert)]
        sources.sort(key=lambda s: (bool(np.isnan(flat[s])), -flat[s] if flat[s] else 0.0, s))
        kept[sources[expert_capacity:]] = -1
    return kept.reshape(ids.shape)


def few_weights(rng: np.random.Generator, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Weights of few values, so that many are equal; zeros of both signs and NaN among them."""
    smallest = ml_dtypes.finfo(np.dtype(dtype)).smallest_subnormal  # type: ignore[no-untyped-call]
    values = [0.5, 0.25, 0.0, -0.0, -0.25, np.nan, np.inf, smallest, 3 * smallest]
    return rng.choice(np.array(values, dtype), shape)


def keep(case: Case) -> Any:
    assert case.expert_capacity is not None

    def keep_heaviest(ids: Any, weights: Any) -> Any:
        return jax_ep.keep_heaviest(
            ids,
            weights,
            expert_capacity=case.expert_capacity,
            num_experts=case.num_experts,
            axis_name=AXIS,
        )

    return keep_heaviest


def skip_without_collectives(backend: JaxBackend) -> None:
    if reason := backend.no_collectives:
        pytest.skip(reason)


HEAVY = [
    Case(1, 9, 2, 4, hidden=8, expert_capacity=3),
    Case(4, 16, 4, 8, hidden=8, expert_capacity=16, expert_alignment=8),
    Case(8, 12, 8, 64, hidden=8, expert_capacity=7),
    Case(2, 6, 2, 4, hidden=8, expert_capacity=100),
]


@pytest.mark.parametrize("case", HEAVY, ids=str)
def test_keeps_the_heaviest(device_backend: JaxBackend, case: Case) -> None:
    """For every kind of routing, and then the layout drops nothing more."""
    skip_without_collectives(device_backend)
    shape = (case.num_ranks, case.num_tokens, case.top_k)
    dropped, function = 0, keep(case)
    for number, kind in enumerate(routings.ROUTING_KINDS):
        rng = np.random.default_rng(number)
        ids = routings.topk_ids(rng, case, kind)
        for weights in (rng.random(shape, np.float32), few_weights(rng, shape, BF16)):
            kept = device_backend.run(case.num_ranks, function, ids, weights)
            expected = heaviest_by_loop(ids, weights, case.expert_capacity or 0, case.num_experts)
            assert_same_bits(kept, expected)
            layout = device_backend.make_layout(case, kept)
            assert not layout.num_dropped.any()
            before = case.reference_layout(ids)
            assert_same_bits(layout.num_invalid, before.num_invalid)
            # As many stay as placement order would keep.
            assert layout.num_recv.sum() == before.num_recv.sum()
            dropped += int(before.num_dropped.sum())
    assert (dropped > 0) == (case.expert_capacity != 100)


@pytest.mark.parametrize("dtype", [BF16, np.float16, F32])
def test_ties_and_special_weights(device_backend: JaxBackend, dtype: DTypeLike) -> None:
    """Equal weights go by source rank, token, k; subnormals are no zeros; NaN is the lightest."""
    skip_without_collectives(device_backend)
    case = Case(4, 10, 2, 4, hidden=8, expert_capacity=5)
    rng, function = np.random.default_rng(5), keep(case)
    for _ in range(20):
        ids = rng.integers(0, 4, (4, 10, 2), dtype=np.int32)
        weights = few_weights(rng, ids.shape, dtype)
        kept = device_backend.run(4, function, ids, weights)
        assert_same_bits(kept, heaviest_by_loop(ids, weights, 5, 4))
    same = np.full(ids.shape, 0.5, dtype)
    kept = device_backend.run(4, function, ids, same)
    layout = case.reference_layout(ids)
    assert_same_bits(kept, np.where(layout.kept, ids, -1).astype(np.int32))


@pytest.mark.parametrize(
    ("name", "axis_type", "check_vma"),
    [
        ("dp_ep_permuted", AUTO, True),
        ("ep_dp", EXPLICIT, False),
        ("tuple_reversed", AUTO, False),
        ("tuple_around_dp", EXPLICIT, True),
        ("dp_ep_tp", AUTO, False),
        ("dp_ep_tp", AUTO, True),
        ("one_rank", AUTO, True),
    ],
)
def test_on_meshes(name: str, axis_type: AxisType, check_vma: bool) -> None:
    """Each group by itself, over one axis of several and over a tuple; jit, scan and grad."""
    placement = PLACEMENTS[name]
    mesh, groups, ranks = placement.mesh(axis_type), placement.num_groups, placement.num_ranks
    num_experts, room = 4 * ranks, 3
    rng = np.random.default_rng(6)
    shape = (groups, ranks, 2, 5, 2)  # of each rank two batches
    ids = rng.integers(-1, num_experts, shape, dtype=np.int32)
    weights = (rng.integers(0, 6, shape) / 4).astype(np.float32)
    expected = np.stack(
        [
            [heaviest_by_loop(ids[g, :, b], weights[g, :, b], room, num_experts) for b in (0, 1)]
            for g in range(groups)
        ]
    )  # [group, batch, rank, ..]
    expected = expected.swapaxes(1, 2)
    assert (expected != ids).any()

    def f(ids: Any, weights: Any) -> Any:
        def loss(weights: Any) -> Any:
            def one(total: Any, batch: Any) -> Any:
                kept = jax_ep.keep_heaviest(
                    batch[0],
                    batch[1],
                    expert_capacity=room,
                    num_experts=num_experts,
                    axis_name=placement.ep,
                )
                return total + jnp.where(kept >= 0, batch[1], 0).sum(), kept

            start = 0 * weights.sum()
            return jax.lax.scan(one, start, (ids[0], weights[0]))

        (_, kept), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
        return kept[None], gradient

    spec = placement.tokens
    run = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma))
    flat = (groups * ranks, 2, 5, 2)
    arrays = [jax.device_put(a.reshape(flat), NamedSharding(mesh, spec)) for a in (ids, weights)]
    kept, gradient = run(*arrays)
    assert_same_bits(np.asarray(kept), expected.reshape(flat))
    # The choice has no gradient: what stays has its own, what goes has none.
    assert_same_bits(np.asarray(gradient), (expected.reshape(flat) >= 0).astype(np.float32))


def test_weights_that_are_the_same_on_all_ranks() -> None:
    """Ids that differ by rank, weights that do not, as vma sees them."""
    mesh = PLACEMENTS["dp_ep"].mesh()
    ids = np.random.default_rng(7).integers(0, 4, (8, 5, 2), dtype=np.int32)
    weights = np.linspace(0, 1, 10, dtype=np.float32).reshape(5, 2)

    def f(ids: Any, weights: Any) -> Any:
        return jax_ep.keep_heaviest(
            ids[0], weights, expert_capacity=4, num_experts=4, axis_name="ep"
        )[None]

    spec = P(("dp", "ep"))
    run = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(spec, P()), out_specs=spec))
    kept = run(ids, weights)
    every = np.broadcast_to(weights, (4, 5, 2))
    for dp in (0, 1):
        part = slice(4 * dp, 4 * dp + 4)
        assert_same_bits(np.asarray(kept)[part], heaviest_by_loop(ids[part], every, 4, 4))


def test_drops_by_weight_not_by_rank(device_backend: JaxBackend) -> None:
    """All tokens choose one expert: the room goes to the heavy ones of all ranks."""
    skip_without_collectives(device_backend)
    case = Case(4, 32, 1, 4, hidden=8, expert_capacity=32)
    ids = np.full((4, 32, 1), 1, np.int32)
    weights = np.random.default_rng(8).random(ids.shape, np.float32)
    by_place = case.reference_layout(ids)
    assert by_place.kept.sum(axis=(1, 2)).tolist() == [32, 0, 0, 0]
    kept = device_backend.run(4, keep(case), ids, weights) >= 0
    assert kept.sum() == 32
    assert kept.sum(axis=(1, 2)).min() >= 4
    assert weights[kept].min() > weights[~kept].max()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": np.zeros((3, 3), F32)}, ValueError, "topk_weights must have shape (3, 2)"),
        ({"weights": np.zeros((3, 2), np.int32)}, TypeError, "topk_weights must be floating point"),
        ({"ids": np.zeros((3, 2), F32)}, TypeError, "topk_idx must be int32; got float32"),
        ({"ids": np.zeros(6, np.int32)}, ValueError, "topk_idx must have shape [tokens, k]"),
        ({"expert_capacity": 0}, ValueError, "expert_capacity must be at least 1; got 0"),
        ({"num_experts": 4.0}, TypeError, "num_experts must be a static Python int; got 4.0"),
        ({"axis_name": "dp"}, ValueError, "axis_name 'dp' is not an axis of an enclosing"),
    ],
)
def test_keep_heaviest_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "ids": np.zeros((3, 2), np.int32),
        "weights": np.zeros((3, 2), F32),
        "expert_capacity": 2,
        "num_experts": 4,
        "axis_name": "ep",
    } | change

    def f(ids: Any, weights: Any) -> Any:
        options = {k: v for k, v in arguments.items() if k not in ("ids", "weights")}
        return jax_ep.keep_heaviest(ids, weights, **options)

    mesh = jax.sharding.AbstractMesh((2,), ("ep",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P("ep"))
    with pytest.raises(error) as caught:
        jax.eval_shape(run, arguments["ids"], arguments["weights"])
    assert str(caught.value).startswith(f"jax_ep.keep_heaviest: {message}")


# group_limited ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Router:
    """E, K, groups, groups of a token, and how weights are made."""

    num_experts: int
    top_k: int
    num_groups: int
    top_groups: int
    normalize: bool = True
    scale: float = 1.0

    def options(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "num_experts"}


def group_limited_by_loop(
    logits: NDArray[np.float64], bias: NDArray[np.float64], router: Router
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    size = router.num_experts // router.num_groups
    all_ids, all_weights = [], []
    for row in scores:
        ranked = row + bias
        worth = [
            sum(sorted(ranked[g * size : (g + 1) * size])[-2:]) for g in range(router.num_groups)
        ]
        groups = sorted(range(router.num_groups), key=lambda g, w=worth: (-w[g], g))
        allowed = [g * size + i for g in groups[: router.top_groups] for i in range(size)]
        ids = sorted(allowed, key=lambda e, r=ranked: (-r[e], e))[: router.top_k]
        weights = row[ids]
        if router.normalize:
            weights = weights / weights.sum()
        all_ids.append(ids)
        all_weights.append(weights * router.scale)
    return np.array(all_ids, np.int32), np.array(all_weights)


ROUTERS = [
    Router(256, 8, 8, 4, scale=2.5),  # DeepSeek-V3's
    Router(16, 4, 4, 2, normalize=False),
    Router(12, 3, 12, 5),  # groups of one expert
    Router(8, 2, 1, 1),  # no groups
]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: f"E{r.num_experts}-G{r.num_groups}")
def test_group_limited(router: Router) -> None:
    rng = np.random.default_rng(9)
    # Scores that are far enough apart that float32 orders them as float64 does.
    steps = rng.permuted(np.tile(np.arange(router.num_experts), (64, 1)), axis=1)
    logits = (steps * (6 / router.num_experts) - 3).astype(np.float32)
    bias = rng.integers(-3, 4, router.num_experts) / 8 + np.arange(router.num_experts) / 2**14
    ids, weights = jax_ep.routing.group_limited(logits, bias.astype(np.float32), **router.options())
    expected_ids, expected_weights = group_limited_by_loop(
        logits, bias.astype(np.float32).astype(np.float64), router
    )
    assert ids.dtype == jnp.int32
    assert weights.dtype == jnp.float32
    assert_same_bits(np.asarray(ids), expected_ids)
    # A sigmoid, a sum of K and a quotient: a few roundings each.
    np.testing.assert_allclose(weights, expected_weights, rtol=(router.top_k + 16) * 2.0**-24)
    without_bias, _ = jax_ep.routing.group_limited(logits, None, **router.options())
    unbiased, _ = group_limited_by_loop(logits, np.zeros(router.num_experts), router)
    assert_same_bits(np.asarray(without_bias), unbiased)
    size = router.num_experts // router.num_groups
    if size > 1 and router.num_groups > router.top_groups:
        best = np.argsort(-logits, axis=1)[:, : router.top_k]
        assert (np.sort(best) != np.sort(unbiased)).any()  # the groups do limit
        assert max(len(set((row // size).tolist())) for row in unbiased) <= router.top_groups


def test_group_limited_ties() -> None:
    """The lower index wins, of groups and of experts."""
    router = Router(12, 2, 3, 2)
    ids, weights = jax_ep.routing.group_limited(np.zeros((2, 12), F32), None, **router.options())
    assert ids.tolist() == [[0, 1], [0, 1]]
    assert weights.tolist() == [[0.5, 0.5]] * 2
    # With a bias that leaves the first group out.
    bias = np.array([-1] * 4 + [0] * 8, np.float32)
    ids, weights = jax_ep.routing.group_limited(np.zeros((1, 12), F32), bias, **router.options())
    assert ids.tolist() == [[4, 5]]
    assert weights.tolist() == [[0.5, 0.5]]  # of scores without bias


def test_group_limited_gradient() -> None:
    """That of the weights with the choice as it is; none for the bias."""
    router, rng = ROUTERS[1], np.random.default_rng(10)
    logits, bias = rng.standard_normal((8, 16)).astype(F32), rng.standard_normal(16).astype(F32)
    g = rng.standard_normal((8, 4)).astype(F32)
    for normalize in (False, True):
        options = router.options() | {"normalize": normalize, "scale": 2.5}

        def loss(logits: Any, bias: Any, options: Any = options) -> Any:
            return (jax_ep.routing.group_limited(logits, bias, **options)[1] * g).sum()

        d_logits, d_bias = jax.jit(jax.grad(loss, argnums=(0, 1)))(logits, bias)
        ids, _ = jax_ep.routing.group_limited(logits, bias, **options)

        def fixed(logits: Any, ids: Any = ids, normalize: bool = normalize) -> Any:
            weights = jnp.take_along_axis(jax.nn.sigmoid(logits), ids, axis=1)
            if normalize:
                weights = weights / weights.sum(axis=1, keepdims=True)
            return (2.5 * weights * g).sum()

        np.testing.assert_allclose(d_logits, jax.grad(fixed)(logits), rtol=1e-5, atol=1e-7)
        assert np.count_nonzero(d_logits) == 8 * 4
        assert not np.any(d_bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 5}, "logits must have a multiple of num_groups = 5 experts; got 16"),
        ({"top_groups": 5}, "top_groups must be at most num_groups = 4; got 5"),
        ({"top_k": 9}, "top_k must be at most the 2 * 4 experts of a token's groups; got 9"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"bias": np.zeros(4, F32)}, "bias must have shape (16,); got (4,): one for each expert"),
    ],
)
def test_group_limited_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        jax_ep.routing.group_limited(np.zeros((3, 16), F32), **(ROUTERS[1].options() | change))
    assert str(caught.value) == f"jax_ep.routing.group_limited: {message}"


# choose_replicas ----------------------------------------------------------------------------------


def copy_number(rank: int, place: int) -> int:
    """Of n copies a token takes number * n >> 16."""
    place = ((place ^ (place >> 16)) * 0x7FEB352D) % 2**32
    place = ((place ^ (place >> 15)) * 0x846CA68B) % 2**32
    return (rank * 0x9E3779B9 + (place ^ (place >> 16))) % 2**32 >> 16


def test_choose_replicas(device_backend: JaxBackend) -> None:
    """Copies by rank and place; another table, the same program."""
    traces = 0

    def choose(ids: Any, replicas: Any, num_replicas: Any) -> Any:
        nonlocal traces
        traces += 1
        return jax_ep.routing.choose_replicas(ids, replicas, num_replicas, axis_name=AXIS)

    rng = np.random.default_rng(11)
    ids = rng.integers(-2, 5, (3, 5, 2), dtype=np.int32)  # logical experts 0 to 3
    tables = [
        ([[0, 4, 5], [1, 9, 9], [2, -7, 9], [3, 6, 99]], [3, 1, 1, 2]),
        ([[0, 0, 0], [1, 5, 0], [2, 6, 4], [3, 3, 3]], [1, 2, 3, 1]),
    ]
    for replicas, num_replicas in tables:
        everywhere = [
            np.broadcast_to(np.array(table, np.int32), (3, *np.shape(table)))
            for table in (replicas, num_replicas)
        ]
        found = device_backend.run(3, choose, ids, *everywhere)
        expected = ids.copy()
        for rank, token, k in np.ndindex(*ids.shape):
            expert = ids[rank, token, k]
            if 0 <= expert < 4:
                copy = copy_number(rank, token) * num_replicas[expert] >> 16
                expected[rank, token, k] = replicas[expert][copy]
        assert_same_bits(found, expected)
    assert traces == 1


@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(8, 4), (8, 8), (8, 16), (4, 34), (2, 100)])
def test_replicas_share_the_tokens(
    device_backend: JaxBackend, num_ranks: int, num_tokens: int
) -> None:
    """Whichever tokens choose an expert: all, some in a regular pattern, one at each rank."""
    numbers = np.arange(2, 9)  # expert i has so many copies, and all tokens choose it
    replicas = np.tile(np.arange(8, dtype=np.int32), (len(numbers), 1))
    shape = (num_ranks, num_tokens, len(numbers))
    copies = device_backend.run(
        num_ranks,
        lambda *args: jax_ep.routing.choose_replicas(*args, axis_name=AXIS),
        np.broadcast_to(np.arange(len(numbers), dtype=np.int32), shape),
        np.broadcast_to(replicas, (num_ranks, *replicas.shape)),
        np.broadcast_to(numbers.astype(np.int32), (num_ranks, len(numbers))),
    )
    flat = copies.reshape(-1, len(numbers))
    chosen = {"all": flat, "even": flat[::2], "odd": flat[1::2], "third": flat[::3]}
    chosen |= {"even ranks": copies[::2].reshape(-1, len(numbers))}
    for (name, some), (expert, n) in itertools.product(chosen.items(), enumerate(numbers)):
        counts, share = np.bincount(some[:, expert], minlength=n), len(some) / n
        assert len(counts) == n
        # Chance: a share's deviation is about its square root.
        assert abs(counts - share).max() <= 4 * max(share, 1) ** 0.5, (name, n, counts)
    for ranks in (copies[:, 0], copies[::2, 0]):  # a server with one slot in use: ranks take turns
        for expert, n in enumerate(numbers):
            assert np.bincount(ranks[:, expert]).max() <= len(ranks) / n + 2
    if num_ranks == 8:
        one_slot = np.bincount(copies[:, 0, 0], minlength=2)
        assert one_slot.min() > 0
        assert one_slot.max() <= 6


@pytest.mark.parametrize(
    ("replicas", "num_replicas", "error", "message"),
    [
        (np.zeros((4, 2), F32), np.ones(4, np.int32), TypeError, "replicas must be int32"),
        (np.zeros((4, 2), np.int32), np.ones(4, F32), TypeError, "num_replicas must be int32"),
        (np.zeros(4, np.int32), np.ones(4, np.int32), ValueError, "replicas must have shape"),
        (np.zeros((4, 2), np.int32), np.ones(3, np.int32), ValueError, "num_replicas must have"),
    ],
)
def test_choose_replicas_errors(
    replicas: Any, num_replicas: Any, error: type[Exception], message: str
) -> None:
    def f(ids: Any) -> Any:
        return jax_ep.routing.choose_replicas(ids, replicas, num_replicas, axis_name="ep")

    mesh = jax.sharding.AbstractMesh((2,), ("ep",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(f, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    with pytest.raises(error, match=f"jax_ep.routing.choose_replicas: {message}"):
        jax.eval_shape(run, np.zeros((2, 1), np.int32))
