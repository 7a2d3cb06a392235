"""Independent layers of different sizes in one program, between XLA's own collectives.

On GPUs XLA runs its collectives on streams of their own beside our kernels (with the latency hiding
scheduler, far apart from where they are used): neither may keep the other from its SMs for good.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import routings
from backends import AXIS, JaxBackend
from jax import lax
from routings import Case, assert_same_bits

import jax_ep
from jax_ep import reference


def layer_cases(num_ranks: int) -> list[Case]:
    """Different in every size."""
    return [
        Case(num_ranks, 64, 4, 8 * num_ranks, hidden=256, expert_alignment=16),
        Case(num_ranks, 96, 2, 2 * num_ranks, hidden=128, capacity=96),
        Case(num_ranks, 32, 1, num_ranks, hidden=512),
        Case(num_ranks, 128, 8, 16 * num_ranks, hidden=64, capacity=640, expert_alignment=8),
    ]


@functools.cache
def program(cases: tuple[Case, ...]) -> Any:
    """A function of one rank: (layers' data, other data) -> results of layers, of collectives."""

    def layer(case: Case, ids: Any, x: Any, weights: Any) -> Any:
        layout = jax_ep.make_layout(
            ids,
            num_experts=case.num_experts,
            axis_name=AXIS,
            capacity=case.capacity,
            expert_alignment=case.expert_alignment,
        )
        recv = jax_ep.dispatch(x, layout, weights)
        return recv.tokens, recv.weights, jax_ep.combine(recv.tokens, layout, recv.weights)

    def function(data: Any, others: Any) -> Any:
        layers, exchanged = [], []
        for case, one, other in zip(cases, data, others, strict=True):
            exchanged.append(lax.psum(other, AXIS))
            layers.append(layer(case, *one))
            exchanged.append(lax.all_to_all(other, AXIS, 0, 0))
            exchanged.append(lax.all_gather(other[0], AXIS))
        return layers, jax.tree.map(lambda a: a + jnp.zeros_like(others[0][0, 0, 0]), exchanged)

    return function


@pytest.mark.versions
def test_layers_between_collectives(device_backend: JaxBackend) -> None:
    backend, num_ranks = device_backend, device_backend.num_devices
    if reason := backend.no_collectives:
        pytest.skip(reason)
    on_gpu = backend.platform != "cpu"
    # On GPUs large enough for a collective to last longer than a layer. What all ranks have, which
    # the host compares, grows with their number.
    rows, columns = (2048 // num_ranks, 512) if on_gpu else (8, 8)
    shape = (num_ranks, num_ranks, rows, columns)
    num_steps = 60 // num_ranks if on_gpu else 3
    cases = tuple(layer_cases(num_ranks))
    rng = np.random.default_rng(40)
    for step in range(num_steps):
        data, expected = [], []
        for case in cases:
            kind = routings.ROUTING_KINDS[step % len(routings.ROUTING_KINDS)]
            ids = routings.topk_ids(rng, case, kind)
            x = routings.random_rows(
                rng, (num_ranks, case.num_tokens, case.hidden), ml_dtypes.bfloat16
            )
            weights = routings.random_weights(rng, case)
            data.append((ids, x, weights))
            layout = case.reference_layout(ids)
            tokens, recv_weights = reference.dispatch(x, layout, weights)
            expected.append((tokens, recv_weights, reference.combine(tokens, layout, recv_weights)))
        # Small whole numbers: sums are exact.
        base = rng.integers(-8, 8, shape[:2]).astype(np.float32)
        other = np.broadcast_to(base[..., None, None], shape) + np.arange(
            shape[-1], dtype=np.float32
        )
        others = [other * (1 + i) for i in range(len(cases))]
        layers, exchanged = backend.run(num_ranks, program(cases), data, others)
        for i, (ours, theirs) in enumerate(zip(layers, expected, strict=True)):
            for name, a, b in zip(("tokens", "weights", "out"), ours, theirs, strict=True):
                try:
                    assert_same_bits(a, b)
                except AssertionError as error:
                    raise AssertionError(f"step {step}, layer {i}, {name}: {error}") from None
        for i, other in enumerate(others):
            psum, swapped, gathered = exchanged[3 * i : 3 * i + 3]
            np.testing.assert_array_equal(psum, np.broadcast_to(other.sum(axis=0), psum.shape))
            np.testing.assert_array_equal(swapped, other.swapaxes(0, 1))
            np.testing.assert_array_equal(
                gathered, np.broadcast_to(other[:, 0], (num_ranks, *other[:, 0].shape))
            )
