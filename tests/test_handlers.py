"""The custom calls by themselves: what their handlers check of operands, results and attributes.

The verbs check most of it before, so here the targets are called as a program that is not ours
would. Both platforms share the checks of types and shapes (xla_ffi/calls.cc); CUDA's kernels have
demands of their own (xla_ffi/cuda/checks.cc).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import AXIS, JaxBackend
from usable import check_usable

pytestmark = pytest.mark.usefixtures("poison")

Buffer = jax.ShapeDtypeStruct | np.ndarray


def int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.int32)


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def fp8(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class Call:
    """What a target takes and gives, by name and in order.

    Attributes:
        operands: an array, instead of a type, is what every rank passes.
        results: types.
        attributes: but for the members, which follow from the backend's devices.
    """

    operands: dict[str, Buffer]
    results: dict[str, jax.ShapeDtypeStruct]
    attributes: dict[str, Any]

    def changed(self, changes: dict[str, dict[str, Any]]) -> "Call":
        """With other operands, results or attributes; None takes one away."""
        merged = {
            field: {k: v for k, v in (getattr(self, field) | some).items() if v is not None}
            for field, some in changes.items()
        }
        return dataclasses.replace(self, **merged)


# Two ranks, T = 4, K = 2, E = 6, C = 8, H = 8.
_SIZES = {"num_ranks": 2, "num_sms": 0, "num_tokens": 4, "top_k": 2, "num_experts": 6}
_SIZES |= {"capacity": 8}
_TABLES = {
    "send_row": int32(4, 2),
    "recv_src": int32(8),
    "recv_order": int32(8),
    "recv_offsets": int32(9),
    "group_sizes": int32(3),
}
_ON_LAYOUT = {"topk_idx": int32(4, 2), **_TABLES}
GOOD_CALLS: dict[str, Call] = {
    "jax_ep_layout": Call(
        {"topk_idx": int32(4, 2)},
        {**_TABLES, "expert_counts": int32(3), "expert_load": int32(6), "counters": int32(3)},
        _SIZES | {"expert_alignment": 2, "expert_capacity": 0},
    ),
    "jax_ep_dispatch": Call(
        {"x": f32(4, 8), **_ON_LAYOUT, "topk_weights": f32(4, 2)},
        {"tokens": f32(8, 8), "weights": f32(8)},
        _SIZES
        | {"has_weights": 1, "zero_tail": 1, "quantization": 0, "dequantize": 0, "expand": 1},
    ),
    "jax_ep_layout_and_dispatch": Call(
        {"x": f32(4, 8), "topk_idx": int32(4, 2), "topk_weights": f32(4, 2)},
        {
            **_TABLES,
            **{"expert_counts": int32(3), "expert_load": int32(6), "counters": int32(3)},
            **{"tokens": f32(8, 8), "weights": f32(8)},
        },
        _SIZES
        | {"expert_alignment": 2, "expert_capacity": 0}
        | {"has_weights": 1, "zero_tail": 1, "quantization": 0, "dequantize": 0, "expand": 1},
    ),
    "jax_ep_combine": Call(
        {"y": f32(8, 8), **_ON_LAYOUT, "weights": f32(8)},
        {"out": f32(4, 8)},
        _SIZES | {"ranks_per_node": 2, "has_weights": 1, "has_values": 0, "expand": 1},
    ),
    "jax_ep_combine_gradient": Call(
        {"g": f32(4, 8), **_ON_LAYOUT, "y": f32(8, 8), "weights": f32(8)},
        {"d_y": f32(8, 8), "d_weights": f32(8)},
        _SIZES | {"zero_tail": 1},
    ),
}
PLATFORMS = {"jax_ep_combine_gradient": ("cuda",)}  # of a target; others are on both


def good_call(target: str, platform: str) -> Call:
    """As the handlers of the platform want it."""
    call = GOOD_CALLS[target]
    if platform == "cpu":
        return dataclasses.replace(call, operands={"coordinates": COORDINATES, **call.operands})
    if target == "jax_ep_combine":
        return dataclasses.replace(call, results={**call.results, "partial": f32(2, 4, 8)})
    return call


COORDINATES = np.zeros(0, np.int32)  # stands for those of each rank


def run_target(backend: JaxBackend, target: str, changes: dict[str, dict[str, Any]]) -> list[Any]:
    """Runs a target on two ranks with zeros in its operands, -1 in integers."""
    if backend.platform not in PLATFORMS.get(target, ("cpu", "cuda")):
        pytest.skip(f"{target} has no handler for {backend.platform}")
    call = good_call(target, backend.platform).changed(changes)
    members = [d.process_index << 32 | d.id for d in backend.devices()[:2]]
    attributes = {"member_bases": members, "member_sizes": [], "member_strides": []}
    attributes |= call.attributes
    numbers = {name: np.array(value, np.int64) for name, value in attributes.items()}
    numbers = {name: n if n.ndim else np.int64(n) for name, n in numbers.items()}

    def run(*operands: Any) -> Any:
        rank = jax.lax.axis_index(AXIS).astype(jnp.int32)
        mine = [
            jnp.stack([jnp.zeros_like(rank), rank]) if operand is None else operand
            for operand in operands
        ]
        return jax.ffi.ffi_call(target, list(call.results.values()))(*mine, **numbers)

    def stacked(operand: Buffer) -> Any:
        if operand is COORDINATES:
            return None
        if isinstance(operand, np.ndarray):
            return np.stack([operand.astype(np.int32)] * 2)
        fill = -1 if operand.dtype == np.int32 else 0
        return np.full((2, *operand.shape), fill, operand.dtype)

    results: list[Any] = backend.run(2, run, *map(stacked, call.operands.values()))
    return results


@pytest.mark.versions
@pytest.mark.parametrize("target", GOOD_CALLS)
def test_target_by_itself(device_backend: JaxBackend, target: str) -> None:
    # The calls that the next tests change are good ones: nothing is routed, so all of a layout is
    # -1 or zero, and all else zero.
    results = run_target(device_backend, target, {})
    for name, result in zip(GOOD_CALLS[target].results, results, strict=False):  # not the scratch
        assert (result == (-1 if name in ("send_row", "recv_src", "recv_order") else 0)).all(), name


Case = tuple[str, dict[str, dict[str, Any]], str]


def wrong(kind: str, target: str, name: str, value: Any, message: str) -> Case:
    return f"jax_ep_{target}", {kind: {name: value}}, message


def operand(*case: Any) -> Case:
    return wrong("operands", *case)


def result(*case: Any) -> Case:
    return wrong("results", *case)


def attribute(*case: Any) -> Case:
    return wrong("attributes", *case)


def scaled(kind: str, name: str, value: Any, message: str) -> Case:
    """With one thing wrong about rows that come with scales."""
    changes: dict[str, dict[str, Any]] = {
        "operands": {"x": fp8(4, 16), "topk_weights": None, "x_scales": f32(4, 2)},
        "results": {"tokens": fp8(8, 16), "weights": None, "scales": f32(8, 2)},
        "attributes": {"has_weights": 0, "quantization": 3},
    }
    changes[kind][name] = value
    return "jax_ep_dispatch", changes, message


_NUMBER = "the number of operands or results disagrees with the attributes"

# For every operation on a layout.
ON_LAYOUT: list[Case] = [
    case
    for target in ("dispatch", "combine", "combine_gradient")
    for case in (
        operand(target, "topk_idx", int32(4, 3), "topk_idx has shape [4, 3], expected [4, 2]"),
        operand(target, "topk_idx", f32(4, 2), "topk_idx has element type"),
        operand(target, "send_row", int32(4, 3), "send_row has shape [4, 3], expected [4, 2]"),
        operand(target, "recv_src", int32(9), "recv_src has shape [9], expected [8]"),
        operand(target, "recv_order", int32(9), "recv_order has shape [9], expected [8]"),
        operand(target, "recv_offsets", int32(8), "recv_offsets has shape [8], expected [9]"),
        operand(target, "group_sizes", int32(4), "group_sizes has shape [4], expected [3]"),
        operand(target, "group_sizes", None, _NUMBER),
        attribute(target, "num_experts", 5, "num_experts must be a positive multiple"),
        attribute(target, "num_experts", 8, "group_sizes has shape [3], expected [4]"),
        attribute(target, "capacity", 0, "capacity must be positive"),
        attribute(target, "num_tokens", 2**31, "must be at most 2146435072"),
    )
]

ERRORS: list[Case] = [
    operand("layout", "topk_idx", int32(8), "topk_idx has shape [8], expected [4, 2]"),
    result("layout", "send_row", int32(4, 3), "send_row has shape [4, 3], expected [4, 2]"),
    result("layout", "recv_src", int32(9), "recv_src has shape [9], expected [8]"),
    result("layout", "recv_order", int32(7), "recv_order has shape [7], expected [8]"),
    result("layout", "recv_offsets", int32(8), "recv_offsets has shape [8], expected [9]"),
    result("layout", "group_sizes", int32(4), "group_sizes has shape [4], expected [3]"),
    result("layout", "expert_counts", int32(2), "expert_counts has shape [2], expected [3]"),
    result("layout", "expert_load", int32(3), "expert_load has shape [3], expected [6]"),
    result("layout", "counters", int32(2), "counters has shape [2], expected [3]"),
    result("layout", "counters", f32(3), "counters has element type"),
    result("layout", "counters", None, _NUMBER),
    attribute("layout", "num_experts", 5, "num_experts must be a positive multiple"),
    attribute("layout", "num_experts", 0, "num_experts must be a positive multiple"),
    attribute("layout", "capacity", 7, "capacity must be a positive multiple of expert_alignment"),
    attribute("layout", "capacity", -8, "capacity must be positive"),
    attribute("layout", "expert_alignment", 0, "multiple of expert_alignment"),
    attribute("layout", "num_tokens", 2**30, "must be at most 2146435072"),
    attribute("layout", "expert_alignment", 2**40, "multiple of expert_alignment"),
    (
        "jax_ep_layout",
        {"attributes": {"expert_alignment": 2**29, "capacity": 2**29}},
        "num_experts * expert_alignment must come to at most 2146435072",
    ),
    *(  # C = 8 and three experts a rank: no room of their own can fill it
        attribute("layout", "expert_capacity", rows, "with which the experts of a rank fill")
        for rows in (-2, 1, 2, 4, 2**62)
    ),
    (
        "jax_ep_layout",
        {"attributes": {"expert_alignment": 8, "expert_capacity": 4, "num_experts": 4}},
        "expert_capacity must be 0, or a multiple of expert_alignment",
    ),
    attribute("layout", "num_tokens", 0, "topk_idx must have ids"),
    attribute("layout", "member_bases", [0, 1, 2], "the attributes tell of 3 members"),
    attribute("layout", "member_bases", [], "the attributes tell of 0 members"),
    attribute("layout", "member_sizes", [2], "but member_strides has 0"),
    attribute("layout", "num_ranks", 0, "a positive multiple of num_ranks = 0"),
    *ON_LAYOUT,
    operand("dispatch", "x", f32(3, 8), "x has shape [3, 8], expected [4, any]"),
    operand("dispatch", "x", f32(32), "x has shape [32], expected [4, any]"),
    operand("dispatch", "topk_weights", f32(4, 3), "topk_weights has shape [4, 3]"),
    operand("dispatch", "topk_weights", int32(4, 2), "topk_weights has element type"),
    result("dispatch", "tokens", f32(8, 12), "tokens has shape [8, 12], expected [8, 8]"),
    result("dispatch", "tokens", int32(8, 8), "tokens has element type"),
    result("dispatch", "weights", f32(9), "weights has shape [9], expected [8]"),
    attribute("dispatch", "has_weights", 0, _NUMBER),
    attribute("dispatch", "num_tokens", 5, "x has shape [4, 8], expected [5, any]"),
    attribute("dispatch", "top_k", 3, "topk_idx has shape [4, 2], expected [4, 3]"),
    attribute("dispatch", "expand", 0, "tokens has shape [8, 8], expected [9, 8]"),
    attribute("dispatch", "quantization", 1, _NUMBER),
    attribute("dispatch", "quantization", 4, "quantization must be 0, 1, 2 or 3"),
    attribute("dispatch", "quantization", 3, _NUMBER),
    attribute("dispatch", "dequantize", 1, "there is nothing to dequantize"),
    (
        "jax_ep_dispatch",
        {"attributes": {"quantization": 1, "dequantize": 1}},
        "x must have a multiple of 16 channels to cross as float8",
    ),
    scaled("attributes", "dequantize", 1, "there is nothing to dequantize"),
    scaled("operands", "x", f32(4, 16), "x must be float8_e4m3fn or float8_e5m2 to come with"),
    scaled("operands", "x", fp8(4, 24), "x must have a multiple of 16 channels to cross as"),
    scaled("operands", "x_scales", f32(3, 2), "x_scales has shape [3, 2], expected [4, any]"),
    scaled("operands", "x_scales", int32(4, 2), "x_scales has element type"),
    scaled("operands", "x_scales", None, _NUMBER),
    scaled("results", "scales", f32(8, 3), "scales has shape [8, 3], expected [8, 2]"),
    scaled("results", "scales", None, _NUMBER),
    scaled("results", "tokens", f32(8, 16), "tokens has element type"),
    (
        "jax_ep_dispatch",
        {
            "operands": {"x": int32(4, 128)},
            "results": {"tokens": int32(8, 128)},
            "attributes": {"quantization": 1, "dequantize": 1},
        },
        "x must be bf16, f16 or f32 to be quantised",
    ),
    operand("layout_and_dispatch", "x", f32(3, 8), "x has shape [3, 8], expected [4, any]"),
    operand("layout_and_dispatch", "topk_idx", int32(4, 3), "topk_idx has shape [4, 3]"),
    operand("layout_and_dispatch", "topk_weights", None, _NUMBER),
    result("layout_and_dispatch", "recv_offsets", int32(8), "recv_offsets has shape [8]"),
    result("layout_and_dispatch", "counters", int32(2), "counters has shape [2], expected [3]"),
    result("layout_and_dispatch", "tokens", f32(8, 12), "tokens has shape [8, 12]"),
    result("layout_and_dispatch", "weights", None, _NUMBER),
    attribute("layout_and_dispatch", "expert_capacity", 2, "with which the experts of a rank fill"),
    attribute("layout_and_dispatch", "dequantize", 1, "there is nothing to dequantize"),
    operand("combine", "y", f32(7, 8), "y has shape [7, 8], expected [8, any]"),
    operand("combine", "y", int32(8, 8), "y must be bf16, f16 or f32"),
    operand("combine", "weights", f32(9), "weights has shape [9], expected [8]"),
    operand("combine", "weights", int32(8), "weights has element type"),
    result("combine", "out", f32(5, 8), "out has shape [5, 8], expected [4, 8]"),
    result("combine", "out", int32(4, 8), "out has element type"),
    attribute("combine", "has_values", 1, _NUMBER),
    attribute("combine", "expand", 0, "y has weights only where it is expanded"),
    (
        "jax_ep_combine",
        {"operands": {"weights": None}, "attributes": {"expand": 0, "has_weights": 0}},
        "y has shape [8, 8], expected [9, any]",
    ),
    operand("combine_gradient", "g", int32(4, 8), "g must be bf16, f16 or f32"),
    operand("combine_gradient", "y", f32(8, 4), "y has shape [8, 4], expected [8, 8]"),
    operand("combine_gradient", "weights", f32(7), "weights has shape [7], expected [8]"),
    result("combine_gradient", "d_y", f32(8, 4), "d_y has shape [8, 4], expected [8, 8]"),
    result("combine_gradient", "d_weights", f32(9), "d_weights has shape [9], expected [8]"),
]

CPU_ERRORS: list[Case] = [
    # On GPUs an operand of no bytes ended the process (jax 0.11.2); verbs refuse it when traced.
    scaled("operands", "x_scales", f32(4, 0), "x_scales must have one for each row at least"),
    operand("layout", "coordinates", np.full(3, -1), "coordinates name rank -1 of group -1"),
    operand("layout", "coordinates", np.array([1, 0]), "coordinates name rank 0 of group 1"),
    operand("layout", "coordinates", np.array([0, 2]), "coordinates name rank 2 of group 0"),
    operand("layout", "coordinates", np.array([0, -1]), "coordinates name rank -1 of group 0"),
]


def many_experts(top_k: int) -> dict[str, dict[str, Any]]:
    """Changes that give a token so many experts."""
    ids = {"topk_idx": int32(4, top_k), "send_row": int32(4, top_k)}
    return {
        "operands": {**ids, "topk_weights": f32(4, top_k)},
        "attributes": {"top_k": top_k},
    }


CUDA_ERRORS: list[Case] = [
    (
        "jax_ep_layout",
        {
            "results": {
                "group_sizes": int32(513),
                "expert_counts": int32(513),
                "expert_load": int32(1026),
            },
            "attributes": {"num_experts": 1026},
        },
        "num_experts must be at most 1024",
    ),
    ("jax_ep_dispatch", many_experts(33), "k must be at most 32"),
    (
        "jax_ep_dispatch",
        {"operands": {"x": f32(4, 6)}, "results": {"tokens": f32(8, 6)}},
        "a row of x must be a multiple of 16 bytes",
    ),
    (
        "jax_ep_dispatch",
        {
            "operands": {"x": f32(4, 2**15 + 128)},
            "results": {"tokens": f32(8, 2**15 + 128)},
            "attributes": {"quantization": 1, "dequantize": 1},
        },
        "x must have at most 32768 channels to be quantised",
    ),
    (
        "jax_ep_dispatch",
        {
            "operands": {"x": fp8(4, 2**15), "topk_weights": None, "x_scales": f32(4, 2**13)},
            "results": {"tokens": fp8(8, 2**15), "weights": None, "scales": f32(8, 2**13)},
            "attributes": {"has_weights": 0, "quantization": 3},
        },
        "a row of x with its scales must be at most 49152 bytes",
    ),
    (
        "jax_ep_combine",
        {
            "operands": {"y": f32(8, 6)},
            "results": {"out": f32(4, 6), "partial": f32(2, 4, 6)},
        },
        "a row of y must be a multiple of 16 bytes",
    ),
    result("combine", "partial", f32(2, 4, 4), "partial has shape [2, 4, 4], expected [2, 4, 8]"),
    (
        "jax_ep_combine_gradient",
        {
            "operands": {"g": f32(4, 10244), "y": f32(8, 10244)},
            "results": {"d_y": f32(8, 10244)},
        },
        "a row of g must be at most 40960 bytes",
    ),
    (
        "jax_ep_layout",
        {"attributes": {"num_ranks": 73, "member_bases": list(range(73))}},
        "num_ranks is 73, but must be at most 72",
    ),
]


def check_refused(
    backend: JaxBackend, target: str, changes: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        run_target(backend, target, changes)
    text = str(caught.value)
    assert "INVALID_ARGUMENT" in text
    assert f"{target}: " in text
    assert message in text


def cases(which: list[Case]) -> Callable[..., Any]:
    return pytest.mark.parametrize(
        ("target", "changes", "message"),
        which,
        ids=[f"{target}-{message[:48]}" for target, _, message in which],
    )


@cases(ERRORS)
def test_errors(
    device_backend: JaxBackend, target: str, changes: dict[str, dict[str, Any]], message: str
) -> None:
    check_refused(device_backend, target, changes, message)


@cases(CPU_ERRORS)
def test_errors_on_cpu(
    device_backend: JaxBackend, target: str, changes: dict[str, dict[str, Any]], message: str
) -> None:
    if device_backend.platform != "cpu":
        pytest.skip("a GPU's place in its group follows from its number")
    check_refused(device_backend, target, changes, message)


@cases(CUDA_ERRORS)
def test_errors_on_cuda(
    device_backend: JaxBackend, target: str, changes: dict[str, dict[str, Any]], message: str
) -> None:
    if device_backend.platform != "cuda":
        pytest.skip("what CUDA's kernels demand")
    check_refused(device_backend, target, changes, message)


@pytest.mark.versions
def test_usable_after_errors(device_backend: JaxBackend) -> None:
    changes = {"operands": {"recv_order": int32(9)}}
    check_refused(device_backend, "jax_ep_dispatch", changes, "recv_order has shape")
    check_usable(device_backend)
