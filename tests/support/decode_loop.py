"""A decode loop whose every step needs each bit of the step before, and the oracle's.

A step is one MoE layer. Where its rows go, which experts a token chooses, its weights and the rows
of the next step are hashes of what `combine` gave: a bit that is wrong once is wrong in all that
comes after. What a step received and gave is told as hashes too, so that the first wrong step is
found. The number of tokens changes from step to step, by ids that are -1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from backends import AXIS
from jax import lax
from late import after, stall
from numpy.typing import NDArray
from routings import Case

import jax_ep
from jax_ep import reference

TOLD = ("received rows", "recv_src", "out")  # of each step, as hashes


def loop_case(num_ranks: int) -> Case:
    """Few tokens; their experts may be the same one twice."""
    return Case(num_ranks, 8, 2, 4 * num_ranks, hidden=32)


def first_rows(case: Case, seed: int) -> NDArray[np.float32]:
    """float32 [R, T, H]."""
    shape = case.num_ranks, case.num_tokens, case.hidden
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# The same for NumPy's arrays and JAX's -----------------------------------------------------------


def _mix(*values: Any) -> Any:
    h: Any = np.uint32(0x9E3779B9)
    for value in values:
        h = (h ^ value.astype(np.uint32)) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
        h = h ^ (h >> 16)
    return h


def _of_rows(bits: Any) -> Any:
    """uint32 [.., T]: a hash of each row of bits, uint32 [.., T, H]."""
    return _mix(bits, np.arange(bits.shape[-1])).sum(axis=-1, dtype=np.uint32)


def _of_array(bits: Any) -> Any:
    """uint32 [..]: a hash of rows [.., n, H] and their order."""
    return _mix(_of_rows(bits), np.arange(bits.shape[-2])).sum(axis=-1, dtype=np.uint32)


def in_use(case: Case, step: Any, rank: Any) -> Any:
    """Which tokens a rank [..] has in a step, bool [.., T]: the first ones, any number of them.

    In every seventh step no rank has any, and each rank in turn has none for eight steps.
    """
    num_tokens = (_mix(step, rank) % np.uint32(case.num_tokens + 1)).astype(np.int32)
    has_none = (step % 7 == 6) | (step // 8 % case.num_ranks == rank)
    return np.arange(case.num_tokens) < (num_tokens * ~has_none)[..., None]


def _route(case: Case, bits: Any) -> tuple[Any, Any]:
    """Experts int32 and weights float32 [.., T, K] of rows with these bits, as if all were used."""
    choice = _mix(_of_rows(bits)[..., None], np.arange(case.top_k))
    ids = (choice % np.uint32(case.num_experts)).astype(np.int32)
    return ids, ((choice >> 16) % np.uint32(8) + np.uint32(1)).astype(np.float32) / np.float32(8)


def _next_rows(case: Case, bits: Any, step: Any) -> Any:
    """float32 [.., T, H] of results with these bits."""
    channel = np.arange(case.hidden)
    numbers = _mix(_of_rows(bits)[..., None], channel, step) % np.uint32(256)
    return numbers.astype(np.float32) / np.float32(16) - np.float32(8)


# The oracle --------------------------------------------------------------------------------------


def expected_steps(
    case: Case, x: NDArray[np.float32], num_steps: int
) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    """Rows [R, T, H] after so many steps, and what each of them tells, uint32 [R, steps, 3]."""
    rank, told = np.arange(case.num_ranks), []
    for number in range(num_steps):
        step = np.array([number])
        with np.errstate(over="ignore"):
            used = in_use(case, step, rank)[..., None]
            ids, weights = _route(case, x.view(np.uint32))
            layout = case.reference_layout(np.where(used, ids, -1))
            tokens, recv_weights = reference.dispatch(x, layout, weights)
            out = reference.combine(tokens * np.float32(1.5), layout, recv_weights)
            arrays = tokens.view(np.uint32), layout.recv_src[..., None], out.view(np.uint32)
            told.append(np.stack([_of_array(array) for array in arrays], axis=-1))
            x = np.where(used, _next_rows(case, out.view(np.uint32), step), x)
    return x, np.stack(told, axis=1)


def assert_right(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Compares what loops give, of any ranks: the first wrong step is named."""
    wrong = np.argwhere(found[1] != expected[1])
    if wrong.size > 0:
        step = wrong[:, 1].min()
        of_step = [f"{TOLD[what]} of rank {rank}" for rank, s, what in wrong if s == step]
        raise AssertionError(f"step {step} is the first wrong one: {', '.join(of_step)}")
    np.testing.assert_array_equal(found[0], expected[0])


# On the devices ----------------------------------------------------------------------------------


def one_step(case: Case, x: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A rank's rows [T, H] after a step, and what it tells, uint32 [3]."""

    def bits(array: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(array, jnp.uint32)

    used = in_use(case, step, lax.axis_index(AXIS))[..., None]
    ids, weights = _route(case, bits(x))
    layout, recv = jax_ep.layout_and_dispatch(
        x, jnp.where(used, ids, -1), weights, num_experts=case.num_experts, axis_name=AXIS
    )
    out = jax_ep.combine(recv.tokens * np.float32(1.5), layout, recv.weights)
    arrays = bits(recv.tokens), layout.recv_src[:, None], bits(out)
    told = jnp.stack([_of_array(array) for array in arrays])
    return jnp.where(used, _next_rows(case, bits(out), step), x), told


def scan_of_steps(case: Case, num_steps: int) -> Callable[[Any], Any]:
    """Of one rank: x [T, H] -> x, told [steps, 3]; as fast as it goes."""
    return lambda x: lax.scan(lambda x, step: one_step(case, x, step), x, jnp.arange(num_steps))


def while_of_steps(case: Case, most_steps: int) -> Callable[[Any, Any], Any]:
    """Of one rank: (x [T, H], steps) -> x, told [most, 3]; ranks come to steps late, by turns."""

    def function(x: jax.Array, num_steps: jax.Array) -> Any:
        rank = lax.axis_index(AXIS)

        def body(carry: Any) -> Any:
            step, x, told, state = carry
            state = stall(jnp.where(step % (3 * case.num_ranks) == rank, 4, 0), state)
            x, of_step = one_step(case, after(state, x), step)
            return step + 1, x, told.at[step].set(of_step), state

        zero = rank * 0  # differs between ranks as far as JAX knows, as a loop's carry must at once
        told = jnp.zeros((most_steps, len(TOLD)), jnp.uint32) + zero.astype(jnp.uint32)
        carry = zero, x, told, zero
        _, x, told, _ = lax.while_loop(lambda carry: carry[0] < num_steps, body, carry)
        return x, told

    return function
