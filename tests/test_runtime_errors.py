"""What bad input gets at run time on the host, and what ranks get when one never comes."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routings
from backends import AXIS, BACKENDS, BackendLayout, JaxBackend
from numpy.typing import NDArray
from routings import Case, assert_same_bits

import jax_ep

pytestmark = pytest.mark.usefixtures("poison")

F32 = np.float32
ORACLE = BACKENDS["reference"]

CASE = Case(2, 4, 2, 6, hidden=8, capacity=8, expert_alignment=2)
IDS = routings.topk_ids(np.random.default_rng(40), CASE, "uniform")

Verb = Callable[..., Any]


# Buffers that disagree ----------------------------------------------------------------------------


def call_target(target: str, results: list[Any], attributes: dict[str, Any]) -> Verb:
    """The custom call as it is, without what the verbs check."""
    numbers = {name: np.int64(n) for name, n in attributes.items() if name != "members"}
    numbers["members"] = np.array(attributes["members"], np.int64)

    def call(*operands: Any) -> Any:
        rank = jax.lax.axis_index(AXIS).astype(jnp.int32)
        first, *rest = operands
        if first is None:  # the coordinates as the verbs make them
            first = jnp.stack([jnp.zeros_like(rank), rank])
        return jax.ffi.ffi_call(target, results)(first, *rest, **numbers)

    return call


def int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.int32)


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


# Two ranks, T = 4, K = 2, E = 6, C = 8, H = 8: what each target takes and gives; None is the
# coordinates. Each entry below changes one operand, result or attribute by its place or name.
GOOD_CALLS: dict[str, tuple[list[Any], list[Any], dict[str, Any]]] = {
    "jax_ep_layout": (
        [None, int32(4, 2)],
        [int32(4, 2), int32(8), int32(8), int32(9), int32(3), int32(3), int32(6), int32(3)],
        {
            "members": [0, 1],
            "num_ranks": 2,
            "num_sms": 0,
            "num_experts": 6,
            "capacity": 8,
            "expert_alignment": 2,
        },
    ),
    "jax_ep_dispatch": (
        [None, f32(4, 8), int32(8), int32(8), int32(9), int32(3), f32(4, 2)],
        [f32(8, 8), f32(8)],
        {
            "members": [0, 1],
            "num_ranks": 2,
            "num_sms": 0,
            "num_tokens": 4,
            "top_k": 2,
            "has_weights": 1,
        }
        | {"zero_tail": 1, "quantization": 0, "dequantize": 0},
    ),
    "jax_ep_combine": (
        [None, f32(8, 8), int32(4, 2), int32(4, 2), int32(8), int32(8), int32(9), f32(8)],
        [f32(4, 8)],
        {
            "members": [0, 1],
            "num_ranks": 2,
            "num_sms": 0,
            "num_experts": 6,
            "has_weights": 1,
            "has_values": 0,
        },
    ),
}

HOST_ERRORS: list[tuple[str, dict[str, dict[Any, Any]], str]] = [
    ("jax_ep_layout", {"results": {0: int32(4, 3)}}, "send_row has shape [4, 3], expected [4, 2]"),
    ("jax_ep_layout", {"results": {1: int32(9)}}, "recv_src has shape [9], expected [8]"),
    ("jax_ep_layout", {"results": {2: int32(7)}}, "recv_order has shape [7], expected [8]"),
    ("jax_ep_layout", {"results": {3: int32(8)}}, "recv_offsets has shape [8], expected [9]"),
    ("jax_ep_layout", {"results": {4: int32(4)}}, "group_sizes has shape [4], expected [3]"),
    ("jax_ep_layout", {"results": {5: int32(2)}}, "expert_counts has shape [2], expected [3]"),
    ("jax_ep_layout", {"results": {6: int32(3)}}, "expert_load has shape [3], expected [6]"),
    ("jax_ep_layout", {"results": {7: int32(2)}}, "counters has shape [2], expected [3]"),
    (
        "jax_ep_layout",
        {"attributes": {"num_experts": 5}},
        "num_experts must be a positive multiple",
    ),
    (
        "jax_ep_layout",
        {"attributes": {"num_experts": 0}},
        "num_experts must be a positive multiple",
    ),
    ("jax_ep_layout", {"attributes": {"capacity": 7}}, "capacity of expert_alignment"),
    ("jax_ep_layout", {"attributes": {"capacity": -8}}, "capacity of expert_alignment"),
    ("jax_ep_layout", {"attributes": {"expert_alignment": 0}}, "capacity of expert_alignment"),
    ("jax_ep_layout", {"attributes": {"members": [0, 1, 2]}}, "attribute members has 3 entries"),
    ("jax_ep_layout", {"attributes": {"members": []}}, "attribute members has 0 entries"),
    ("jax_ep_layout", {"attributes": {"num_ranks": 0}}, "a positive multiple of num_ranks = 0"),
    ("jax_ep_layout", {"operands": {0: int32(3)}}, "coordinates name rank -1 of group -1"),
    ("jax_ep_layout", {"operands": {0: np.array([1, 0])}}, "coordinates name rank 0 of group 1"),
    ("jax_ep_layout", {"operands": {0: np.array([0, 2])}}, "coordinates name rank 2 of group 0"),
    ("jax_ep_layout", {"operands": {0: np.array([0, -1])}}, "coordinates name rank -1 of group 0"),
    ("jax_ep_dispatch", {"operands": {1: f32(3, 8)}}, "x has shape [3, 8], expected [4, any]"),
    ("jax_ep_dispatch", {"operands": {3: int32(9)}}, "recv_order has shape [9], expected [8]"),
    ("jax_ep_dispatch", {"operands": {4: int32(8)}}, "recv_offsets has shape [8], expected [9]"),
    ("jax_ep_dispatch", {"operands": {6: f32(4, 3)}}, "topk_weights has shape [4, 3]"),
    ("jax_ep_dispatch", {"operands": {6: int32(4, 2)}}, "topk_weights has element type"),
    ("jax_ep_dispatch", {"results": {0: f32(8, 12)}}, "tokens has shape [8, 12], expected [8, 8]"),
    ("jax_ep_dispatch", {"results": {0: int32(8, 8)}}, "tokens has element type"),
    ("jax_ep_dispatch", {"results": {1: f32(9)}}, "weights has shape [9], expected [8]"),
    ("jax_ep_dispatch", {"attributes": {"has_weights": 0}}, "operands or results disagrees"),
    ("jax_ep_dispatch", {"attributes": {"num_tokens": 5}}, "x has shape [4, 8], expected [5, any]"),
    ("jax_ep_dispatch", {"attributes": {"top_k": 3}}, "topk_weights has shape [4, 2]"),
    (
        "jax_ep_dispatch",
        {"attributes": {"quantization": 1, "dequantize": 1}},
        "x must have a multiple of 128 channels",
    ),
    ("jax_ep_dispatch", {"attributes": {"quantization": 1}}, "operands or results disagrees"),
    ("jax_ep_combine", {"operands": {1: f32(7, 8)}}, "y has shape [7, 8], expected [8, any]"),
    ("jax_ep_combine", {"operands": {1: int32(8, 8)}}, "y must be bf16, f16 or f32"),
    ("jax_ep_combine", {"operands": {3: int32(4, 3)}}, "send_row has shape [4, 3]"),
    ("jax_ep_combine", {"operands": {5: int32(9)}}, "recv_order has shape [9], expected [8]"),
    ("jax_ep_combine", {"operands": {6: int32(8)}}, "recv_offsets has shape [8], expected [9]"),
    ("jax_ep_combine", {"operands": {7: f32(9)}}, "weights has shape [9], expected [8]"),
    ("jax_ep_combine", {"operands": {7: int32(8)}}, "weights has element type"),
    ("jax_ep_combine", {"results": {0: f32(5, 8)}}, "out has shape [5, 8], expected [4, 8]"),
    ("jax_ep_combine", {"results": {0: int32(4, 8)}}, "out has element type"),
    ("jax_ep_combine", {"attributes": {"has_values": 1}}, "operands or results disagrees"),
    ("jax_ep_combine", {"attributes": {"num_experts": 5}}, "num_experts must be a positive multip"),
]


def run_target(
    backend: JaxBackend, target: str, changes: dict[str, dict[Any, Any]], **filled: Any
) -> Any:
    """Runs a target on two ranks with zeros in its operands, -1 in integers."""
    operands, results, attributes = GOOD_CALLS[target]
    operands, results, attributes = list(operands), list(results), dict(attributes)
    for kind, changed in (("operands", operands), ("results", results), ("attributes", attributes)):
        for place, value in changes.get(kind, {}).items():
            changed[place] = value  # type: ignore[index]
    arrays: list[Any] = []
    for operand in operands:
        if isinstance(operand, jax.ShapeDtypeStruct):
            fill = 0 if operand.dtype == np.float32 else -1
            operand = np.full((2, *operand.shape), fill, operand.dtype)
        elif operand is not None:
            operand = np.stack([operand.astype(np.int32)] * 2)
        arrays.append(operand)
    return backend.run(2, call_target(target, results, attributes), *arrays)


@pytest.mark.parametrize("target", GOOD_CALLS)
def test_target_by_itself(device_backend: JaxBackend, target: str) -> None:
    # The calls that the next test changes are good ones: nothing is routed, all results are zero.
    results = run_target(device_backend, target, {})
    if target != "jax_ep_layout":
        assert not any(result.any() for result in results)


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    HOST_ERRORS,
    ids=[f"{target}-{message[:40]}" for target, _, message in HOST_ERRORS],
)
def test_host_errors(
    device_backend: JaxBackend, target: str, changes: dict[str, dict[Any, Any]], message: str
) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        run_target(device_backend, target, changes)
    text = str(caught.value)
    assert "INVALID_ARGUMENT" in text
    assert f"{target}: " in text
    assert message in text


def test_usable_after_host_errors(device_backend: JaxBackend) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="recv_order has shape"):
        run_target(device_backend, "jax_ep_dispatch", {"operands": {3: int32(9)}})
    check_usable(device_backend)


# A rank that never comes --------------------------------------------------------------------------


def check_usable(backend: JaxBackend) -> None:
    """All three verbs, bitwise."""
    rng = np.random.default_rng(41)
    oracle, layout = ORACLE.make_layout(CASE, IDS), backend.make_layout(CASE, IDS)
    assert_same_bits(layout.send_row, oracle.send_row)
    x = routings.random_rows(rng, (2, 4, 8), F32)
    weights = routings.random_weights(rng, CASE)
    tokens, received, _ = backend.dispatch(x, layout, weights)
    assert_same_bits(tokens, ORACLE.dispatch(x, oracle).tokens)
    out = backend.combine(tokens, layout, received)
    assert_same_bits(out, ORACLE.combine(tokens, oracle, received))


# Ends a test soon, and is long enough for ranks that do come.
SHORT = 1.0


@contextlib.contextmanager
def timeout(seconds: float) -> Iterator[None]:
    before = jax_ep.get_timeout()
    jax_ep.set_timeout(seconds)
    try:
        yield
    finally:
        jax_ep.set_timeout(**before._asdict())


def three_ranks(device_backend: JaxBackend) -> tuple[BackendLayout, NDArray[np.float32]]:
    case = Case(3, 4, 2, 6, hidden=8)
    ids = routings.topk_ids(np.random.default_rng(42), case, "uniform")
    x = routings.random_rows(np.random.default_rng(43), (3, 4, 8), F32)
    return device_backend.make_layout(case, ids), x


def unless_absent(layout: Any, x: Any, absent: Any, verb: str) -> Any:
    """The verb on every rank but those in `absent`, which is bool [R] on each rank."""

    def call(layout: Any, x: Any) -> Any:
        if verb == "layout":
            made = jax_ep.make_layout(layout.topk_idx, num_experts=6, axis_name=AXIS)
            return made.group_sizes[0].astype(F32)
        if verb == "dispatch":
            return jax_ep.dispatch(x, layout).tokens.sum()
        return jax_ep.combine(jnp.tile(x, (layout.capacity // 4, 1)), layout).sum()

    here = absent[jax.lax.axis_index(AXIS)]
    return jax.lax.cond(here, lambda _, x: x[0, 0], call, layout, x)


ABSENT_FUNCTIONS: dict[str, Verb] = {
    "layout": lambda layout, x, absent: unless_absent(layout, x, absent, "layout"),
    "dispatch": lambda layout, x, absent: unless_absent(layout, x, absent, "dispatch"),
    "combine": lambda layout, x, absent: unless_absent(layout, x, absent, "combine"),
}


@pytest.mark.parametrize("verb", ["layout", "dispatch", "combine"])
@pytest.mark.parametrize("absent", [(0,), (1,), (0, 2)])
def test_absent_rank(device_backend: JaxBackend, verb: str, absent: tuple[int, ...]) -> None:
    if device_backend.platform != "cpu":
        pytest.skip("ranks that meet on the device time out otherwise")
    layout, x = three_ranks(device_backend)
    function = ABSENT_FUNCTIONS[verb]
    nobody = np.zeros((3, 3), np.bool_)
    present = device_backend.run(3, function, layout.handle, x, nobody)
    some = nobody.copy()
    some[:, list(absent)] = True
    came = [rank for rank in range(3) if rank not in absent]
    message = (
        f"DEADLINE_EXCEEDED: jax_ep_{verb}: rank {', '.join(map(str, absent))} of group 0 did not "
        f"come within the timeout (came: {', '.join(map(str, came))}); every rank of a group must "
        "call the operation. jax_ep.set_timeout and JAX_EP_TIMEOUT set how long is waited"
    )
    start = time.monotonic()
    with timeout(SHORT), pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(message)):
        device_backend.run(3, function, layout.handle, x, some)
    elapsed = time.monotonic() - start
    # Not before the timeout, and with room for a slow machine not long after it.
    assert SHORT * 0.9 < elapsed < SHORT + 20
    # The same program, and others, work at once.
    again = device_backend.run(3, function, layout.handle, x, nobody)
    assert_same_bits(again, present)
    check_usable(device_backend)


def sum_after_a_wait(layout: Any, x: Any, num_steps: Any) -> Any:
    """Dispatches after num_steps of work, a number of each rank's own."""

    def step(_: Any, value: Any) -> Any:
        return jnp.sin(value) + 1

    value = jax.lax.fori_loop(0, num_steps, step, x)
    # The work's result enters the sum, or it would be removed; it is 0 * a finite number.
    return jax_ep.dispatch(x + 0 * value, layout).tokens.sum()


def test_late_rank(device_backend: JaxBackend) -> None:
    if device_backend.platform != "cpu":
        pytest.skip("ranks that meet on the device time out otherwise")
    layout, x = three_ranks(device_backend)

    def run(num_steps: int) -> Any:
        steps = np.array([0, num_steps, 0], np.int32)
        return device_backend.run(3, sum_after_a_wait, layout.handle, x, steps)

    # So many steps that rank 1 comes about three short timeouts after the others.
    expected = run(0)
    num_steps, seconds = 2**14, 0.0
    while seconds < 0.25 and num_steps < 2**29:
        num_steps *= 2
        start = time.monotonic()
        run(num_steps)
        seconds = time.monotonic() - start
    num_steps = min(int(num_steps * 3 * SHORT / seconds), 2**31 - 1)

    message = r"DEADLINE_EXCEEDED: jax_ep_dispatch: rank 1 of group 0 did not come .*\(came: 0, 2\)"
    with timeout(SHORT), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        run(num_steps)
    # Its late arrival does not meet the ranks of the next run.
    assert_same_bits(run(0), expected)
    check_usable(device_backend)
    # With the usual timeout the same is just slow.
    assert_same_bits(run(num_steps), expected)


# The timeout itself -------------------------------------------------------------------------------


def test_set_timeout() -> None:
    for seconds in (0.25, 7, 3600.0):
        with timeout(seconds):
            assert jax_ep.get_timeout() == (seconds, seconds)
            for bad in (0, -1, 1e10, float("inf"), float("nan")):
                message = f"set_timeout: seconds must be above 0 and at most 1e+08; got {bad}"
                with pytest.raises(ValueError, match=re.escape(message)):
                    jax_ep.set_timeout(bad)
            with pytest.raises(TypeError, match="seconds must be a number; got '3'"):
                jax_ep.set_timeout("3")  # type: ignore[arg-type]
            assert jax_ep.get_timeout() == (seconds, seconds)  # a refused one changes nothing


def test_set_one_timeout() -> None:
    with timeout(7):
        jax_ep.set_timeout(arrival=100)
        assert jax_ep.get_timeout() == jax_ep.Timeout(arrival=100, progress=7)
        jax_ep.set_timeout(progress=2)
        assert jax_ep.get_timeout() == (100, 2)
        jax_ep.set_timeout(5, arrival=6)
        assert jax_ep.get_timeout() == (6, 5)
        with pytest.raises(ValueError, match="set_timeout: progress must be above 0"):
            jax_ep.set_timeout(9, progress=0)
        with pytest.raises(TypeError, match="pass seconds, arrival or progress"):
            jax_ep.set_timeout()
        assert jax_ep.get_timeout() == (6, 5)


def import_with_timeouts(**values: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_TIMEOUT")}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    environment.update({f"JAX_EP_{name}": value for name, value in values.items()})
    return subprocess.run(
        [sys.executable, "-c", "import jax_ep; print(*jax_ep.get_timeout())"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "600.0 30.0"),
        ({"TIMEOUT": "2.5"}, "2.5 2.5"),
        ({"ARRIVAL_TIMEOUT": "1e2"}, "100.0 30.0"),
        ({"PROGRESS_TIMEOUT": "5", "TIMEOUT": "8"}, "8.0 5.0"),
    ],
)
def test_timeouts_from_the_environment(values: dict[str, str], expected: str) -> None:
    result = import_with_timeouts(**values)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == expected


@pytest.mark.parametrize("name", ["TIMEOUT", "ARRIVAL_TIMEOUT", "PROGRESS_TIMEOUT"])
@pytest.mark.parametrize("value", ["soon", "-3", "nan"])
def test_bad_timeout_in_the_environment(name: str, value: str) -> None:
    result = import_with_timeouts(**{name: value})
    assert result.returncode != 0
    expected = (
        f"ValueError: environment variable JAX_EP_{name} must be a number of seconds above 0; got "
        f"{value!r}"
    )
    assert expected in result.stderr
