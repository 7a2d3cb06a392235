"""Whole layers: moe() is the three verbs, and a layer is what the dense layer in float64 is."""

import functools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import routings
from backends import AXIS, Backend, JaxBackend
from hypothesis import given
from numpy.typing import DTypeLike, NDArray
from routings import Case, RoutedCase, assert_same_bits, expert_rows, routed_cases

import jax_ep
from jax_ep import reference

pytestmark = pytest.mark.usefixtures("poison")

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32


@routings.examples(14)
@given(
    routed=routed_cases(capacity_kinds=("exact", "default")),
    dtype=st.sampled_from([BF16, F16, F32]),
)
def test_equals_dense_moe(backend: Backend, routed: RoutedCase, dtype: DTypeLike) -> None:
    # Experts on the host, so that only dispatch and combine are looked at. Exact capacities, and
    # default ones where nothing is dropped.
    case, rng = routed.case, routed.rng
    layout = backend.make_layout(case, routed.topk_idx)
    topk_idx = np.where(layout.kept, routed.topk_idx, -1)  # the default may drop duplicates
    x = routings.random_rows(rng, (case.num_ranks, case.num_tokens, case.hidden), dtype)
    topk_weights = routings.random_weights(rng, case)
    shift = rng.standard_normal((case.num_experts, case.hidden))

    def expert_fn(expert: int, rows: NDArray[np.float64]) -> NDArray[Any]:
        # Rounded to 20 bits, then to y's dtype, here and in the dense layer: a last-bit difference
        # of tanh between batch shapes cannot become a difference in dtype.
        result = np.round((np.tanh(rows) + shift[expert]) * 2.0**20) * 2.0**-20
        return np.asarray(result.astype(dtype).astype(np.float64))

    received = backend.dispatch(x, layout, topk_weights)
    oracle = case.reference_layout(routed.topk_idx)
    y = expert_rows(oracle, received.tokens, expert_fn, case.hidden, dtype)
    out = backend.combine(y, layout, received.weights).astype(np.float64)
    dense = reference.moe_dense(x, topk_idx, topk_weights, expert_fn, case.num_experts)
    magnitude = reference.moe_dense(
        x, topk_idx, topk_weights, lambda e, rows: np.abs(expert_fn(e, rows)), case.num_experts
    )
    # With unit roundoffs u of y's dtype and v of float32, a row's term passes one product, at most
    # K sums on its rank, a rounding to u, at most R sums, and a rounding to u. A rounding that ends
    # in a subnormal is off by at most half of the smallest one, once for each rank and at the end.
    # The dense sum itself has K products and K sums in float64.
    info = ml_dtypes.finfo(dtype)
    u, v = float(info.eps) / 2, 2.0**-24
    operations = 1 + case.top_k + case.num_ranks
    relative = (1 + v) ** operations * (1 + u) ** 2 - 1 + 2 * case.top_k * 2.0**-53
    absolute = (case.num_ranks + 1) * float(info.smallest_subnormal) / 2
    error = np.abs(out - dense)
    bound = relative * magnitude + absolute
    assert (error <= bound).all(), f"error / bound is up to {np.max(error / bound)}"


# Experts with weights -----------------------------------------------------------------------------

Experts = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""From tokens [C, H], group_sizes [L], w_in [L, H, F] and w_out [L, F, H'] to [C, H']."""


def einsum_experts(tokens: Any, group_sizes: Any, w_in: Any, w_out: Any) -> jax.Array:
    """Every expert on every row, then the row's own picked by a mask: no row is left out."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(tokens.shape[0])[:, None]
    mask = ((row >= ends - group_sizes) & (row < ends)).astype(tokens.dtype)
    inner = jnp.tanh(jnp.einsum("ch,lhf->clf", tokens, w_in))
    return jnp.einsum("clf,lfo,cl->co", inner, w_out, mask)


def ragged_experts(tokens: Any, group_sizes: Any, w_in: Any, w_out: Any) -> jax.Array:
    """What users do: grouped matrix products."""
    inner = jnp.tanh(jax.lax.ragged_dot(tokens, w_in, group_sizes))
    return jax.lax.ragged_dot(inner, w_out, group_sizes)


def batched_experts(tokens: Any, group_sizes: Any, w_in: Any, w_out: Any) -> jax.Array:
    """With room of their own for the experts: batched matrix products."""
    rows = tokens.reshape(group_sizes.shape[0], -1, tokens.shape[1])
    inner = jnp.tanh(jnp.einsum("lmh,lhf->lmf", rows, w_in))
    return jnp.einsum("lmf,lfo->lmo", inner, w_out).reshape(tokens.shape[0], -1)


EXPERTS: dict[str, Experts] = {
    "einsum": einsum_experts,
    "ragged_dot": ragged_experts,
    "batched": batched_experts,
}

LAYER = Case(4, 12, 3, 8, hidden=16, expert_alignment=8)
OWN_ROOM = LAYER.with_expert_capacity(24)
LAYERS = [  # and whether they drop rows
    ("einsum", LAYER, False),
    ("einsum", LAYER.with_capacity(24), True),
    ("ragged_dot", LAYER, False),
    ("ragged_dot", LAYER.with_capacity(24), True),
    ("ragged_dot", OWN_ROOM, False),
    ("batched", OWN_ROOM, False),
    ("batched", LAYER.with_expert_capacity(8), True),
]


def layer_data(case: Case) -> tuple[NDArray[np.int32], NDArray[Any], list[NDArray[Any]]]:
    """Ids, the cotangent of the output, and the parameters x, topk_weights, w_in and w_out."""
    rng = np.random.default_rng(30)
    num_inner, num_out = 24, 8
    ids = routings.topk_ids(rng, case, "nowhere")
    experts = (case.num_ranks, case.num_local_experts)
    shapes = [
        (case.num_ranks, case.num_tokens, num_out),
        (case.num_ranks, case.num_tokens, case.hidden),
        (*experts, case.hidden, num_inner),
        (*experts, num_inner, num_out),
    ]
    g, x, w_in, w_out = (rng.standard_normal(shape).astype(F32) for shape in shapes)
    return ids, g, [x, routings.random_weights(rng, case), w_in / 4, w_out / 4]


def dense_loss(kept: Any, ids: Any, g: Any, activation: Any, params: Any) -> Any:
    """sum(g * layer), every expert on every token, with the routing as a mask."""
    x, topk_weights, w_in, w_out = params
    w_in, w_out = w_in.reshape(-1, *w_in.shape[2:]), w_out.reshape(-1, *w_out.shape[2:])
    one_hot = jax.nn.one_hot(ids, w_in.shape[0], dtype=x.dtype) * kept[..., None]
    gate = jnp.einsum("rtke,rtk->rte", one_hot, topk_weights)
    inner = activation(jnp.einsum("rth,ehf->rtef", x, w_in))
    return jnp.einsum("rto,rtef,efo,rte->", g, inner, w_out, gate)


@pytest.mark.parametrize(("experts", "case", "drops"), LAYERS, ids=str)
def test_layer_gradients(device_backend: JaxBackend, experts: str, case: Case, drops: bool) -> None:
    ids, g, params = layer_data(case)
    layout = device_backend.make_layout(case, ids)
    assert layout.num_dropped.any() == drops

    def gradients(ids: Any, g: Any, *params: Any) -> Any:
        def loss(x: Any, topk_weights: Any, w_in: Any, w_out: Any) -> Any:
            out, _ = jax_ep.moe(
                x,
                ids,
                topk_weights,
                lambda tokens, sizes: EXPERTS[experts](tokens, sizes, w_in, w_out),
                num_experts=case.num_experts,
                axis_name=AXIS,
                capacity=case.capacity,
                expert_alignment=case.expert_alignment,
                expert_capacity=case.expert_capacity,
            )
            return (out * g).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*params)

    loss, actual = device_backend.run(case.num_ranks, gradients, ids, g, *params)
    with jax.enable_x64(True):
        double = [jnp.asarray(a, jnp.float64) for a in params]
        dense = functools.partial(dense_loss, layout.kept, ids, g)
        expected_loss, expected = jax.device_get(
            jax.value_and_grad(lambda p: dense(jnp.tanh, p))(double)
        )
        # Sums of magnitudes: the same layer on absolute values, without tanh (|tanh(a)| <= |a| and
        # |tanh'| <= 1).
        loss_magnitude, magnitude = jax.device_get(
            jax.value_and_grad(lambda p: dense_loss(layout.kept, ids, np.abs(g), lambda a: a, p))(
                [jnp.abs(a) for a in double]
            )
        )
        largest_inner = float(jnp.einsum("rth,qlhf->rtqlf", abs(double[0]), abs(double[2])).max())
    # A float32 sum of n terms, in any order, is off by at most n * 2**-24 times the sum of their
    # magnitudes (to first order), and so is a chain of sums with n terms in all. Forward: H and F
    # terms, K * R in combine. Backward: H' and F, K * R, and the rows of an expert for its weights;
    # 16 more for products, tanh and its derivative. An error of a in tanh(a) changes tanh'(a) by
    # less than itself (|tanh''| < 0.78), a relative error of the magnitude times |a|.
    num_inner, num_out = params[3].shape[2:]
    num_terms = case.hidden + 2 * num_inner + num_out + 2 * case.top_k * case.num_ranks + 16
    num_terms += int(layout.expert_counts.max())
    relative = num_terms * 2.0**-24 * (1 + largest_inner)
    for name, ours, theirs, scale in zip(
        ("x", "topk_weights", "w_in", "w_out"), actual, expected, magnitude, strict=True
    ):
        assert ours.dtype == F32
        assert ours.shape == theirs.shape
        error = np.abs(ours - theirs)
        worst = np.max(error / np.maximum(relative * scale, 1e-300))
        assert (error <= relative * scale).all(), f"d {name}: error / bound is up to {worst}"
        # The bound means something: it is small against the gradient itself.
        assert (relative * scale).max() < 0.02 * np.abs(theirs).max()
    # The loss of a rank sums T * H' numbers more.
    loss_bound = (num_terms + g[0].size) * 2.0**-24 * loss_magnitude
    assert abs(loss.sum(dtype=np.float64) - expected_loss) <= loss_bound
    # The gate of a choice that was dropped or routed nowhere gets exactly nothing.
    assert_same_bits(actual[1][~layout.kept], np.zeros(np.sum(~layout.kept), F32))


@pytest.mark.versions
def test_moe_is_the_three_verbs(device_backend: JaxBackend) -> None:
    # Bitwise, with options that all matter: drops, alignment, an unspecified tail, y of another
    # width and dtype than x.
    case = Case(3, 7, 3, 6, hidden=24, capacity=16, expert_alignment=4, zero_tail=False)
    rng = np.random.default_rng(31)
    ids = routings.topk_ids(rng, case, "invalid")
    x = routings.random_rows(rng, (3, 7, 24), BF16)
    topk_weights = routings.random_weights(rng, case).astype(BF16)
    options: dict[str, Any] = {
        "num_experts": case.num_experts,
        "axis_name": AXIS,
        "capacity": case.capacity,
        "expert_alignment": case.expert_alignment,
        "zero_tail": case.zero_tail,
    }

    def expert_fn(tokens: jax.Array, group_sizes: jax.Array) -> jax.Array:
        inside = jnp.arange(tokens.shape[0]) < group_sizes.sum()
        return jnp.where(inside[:, None], tokens[:, :16].astype(jnp.float32) * 3 + 1, 0)

    def in_one(x: Any, ids: Any, topk_weights: Any) -> Any:
        return jax_ep.moe(x, ids, topk_weights, expert_fn, **options)

    def by_verbs(x: Any, ids: Any, topk_weights: Any) -> Any:
        layout = jax_ep.make_layout(ids, **options)
        received = jax_ep.dispatch(x, layout, topk_weights)
        y = expert_fn(received.tokens, received.group_sizes)
        return jax_ep.combine(y, layout, received.weights), layout

    results = [device_backend.run(3, f, x, ids, topk_weights) for f in (in_one, by_verbs)]
    leaves, structures = zip(*(jax.tree.flatten(result) for result in results), strict=True)
    assert structures[0] == structures[1]  # the layout's static fields are part of it
    for ours, theirs in zip(*leaves, strict=True):
        assert_same_bits(ours, theirs)
    out, layout = results[0]
    assert out.dtype == F32
    assert out.shape == (3, 7, 16)
    assert layout.num_dropped.any()
    assert layout.num_invalid.any()
    oracle = case.reference_layout(ids)
    tokens, weights = reference.dispatch(x, oracle, topk_weights)
    y = tokens[..., :16].astype(F32) * F32(3) + F32(1)  # times 3 is exact: fused or not
    assert_same_bits(out, reference.combine(y, oracle, weights))


@pytest.mark.versions
def test_what_experts_raise_tells_what_they_were_given(device_backend: JaxBackend) -> None:
    """The usual mistake: weights of all experts on every rank."""
    whole = np.zeros((6, 8, 8), F32)
    ids, weights = np.zeros((2, 5, 1), np.int32), np.ones((2, 5, 1), F32)

    def layer(ids: Any, weights: Any) -> Any:
        def expert_fn(tokens: jax.Array, group_sizes: jax.Array) -> jax.Array:
            return jax.lax.ragged_dot(tokens, whole, group_sizes)

        x, options = jnp.zeros((5, 8)), {"num_experts": 6, "axis_name": AXIS, "expert_capacity": 4}
        return jax_ep.moe(x, ids, weights, expert_fn, **options)[0]

    with pytest.raises(Exception, match=r"ragged_dot|group_sizes") as caught:
        device_backend.run(2, layer, ids, weights)
    assert caught.value.__notes__[0] == (
        "jax_ep.moe: expert_fn was given tokens float32[12, 8] and group_sizes int32[3], of a "
        "layout with 6 experts with 4 rows each, 2 ranks along ('ep',). Are the experts' weights "
        "split over ep, so that a rank has those of 3 experts?"
    )

    def broken(ids: Any, weights: Any) -> Any:
        def expert_fn(tokens: jax.Array, group_sizes: jax.Array) -> jax.Array:
            raise RuntimeError("no such expert")

        x, options = jnp.zeros((5, 8)), {"num_experts": 6, "axis_name": AXIS, "expert_capacity": 4}
        return jax_ep.moe(x, ids, weights, expert_fn, **options)[0]

    with pytest.raises(RuntimeError, match="no such expert") as caught:  # it asks nothing then
        device_backend.run(2, broken, ids, weights)
    assert caught.value.__notes__[0].endswith("with 4 rows each, 2 ranks along ('ep',)")


@pytest.mark.versions
def test_moe_passes_its_options_on(device_backend: JaxBackend) -> None:
    """num_sms reaches the layout, fp8 the dispatch: what is sent comes out dequantised."""
    case, rng = Case(2, 7, 3, 6, hidden=128), np.random.default_rng(11)
    ids = routings.topk_ids(rng, case, "uniform")
    x = routings.random_rows(rng, (2, 7, 128), F32, specials=False)
    topk_weights = routings.random_weights(rng, case)

    def layer(x: Any, ids: Any, topk_weights: Any) -> Any:
        return jax_ep.moe(
            x,
            ids,
            topk_weights,
            lambda tokens, group_sizes: tokens,
            num_experts=case.num_experts,
            axis_name=AXIS,
            num_sms=3,
            fp8="power_of_two",
        )

    out, layout = device_backend.run(2, layer, x, ids, topk_weights)
    assert layout.num_sms == 3
    sent = reference.dequantize(*reference.quantize(x, scale_format="power_of_two"))
    oracle = case.reference_layout(ids)
    tokens, weights = reference.dispatch(sent, oracle, topk_weights)
    assert_same_bits(out, reference.combine(tokens, oracle, weights))
