"""What the verbs lower to, for CPU and for CUDA: no device of either is needed.

The custom calls carry exactly the attributes that xla_ffi/attributes.h decodes, the same ones on
both platforms, and nothing else in a program moves data between devices. One of CUDA's calls, the
gradient of combine, is on CPU a dispatch and XLA's arithmetic; one of CPU's, layout_and_dispatch,
is on CUDA two, unless there are slots.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_layers import (
    ALL_OPS,
    CUDA_OPS,
    EP,
    OPS,
    PLACEMENTS,
    Placement,
    in_specs,
    make_problem,
    place,
    sharded_layer,
    sizes,
)

import jax_ep
from jax_ep import ffi, limits, runtime

ROOT = pathlib.Path(__file__).resolve().parent.parent
DISABLED_CHECKS = [jax.export.DisabledSafetyCheck.custom_call(f"jax_ep_{op}") for op in ALL_OPS]


@dataclasses.dataclass(frozen=True)
class Call:
    """A custom call in a lowered program.

    Attributes:
        op: one of ALL_OPS.
        attributes: by name; arrays as lists.
        operands: their types, such as "6x2xi32".
        results: their types.
    """

    op: str
    attributes: dict[str, int | list[int]]
    operands: tuple[str, ...]
    results: tuple[str, ...]


_CALL = re.compile(
    r"stablehlo\.custom_call @jax_ep_(\w+)\(.*?\) \{.*?mhlo\.backend_config = \{(.*?)\}.*\}"
    r" : \((.*?)\) -> (.*)"
)
_ATTRIBUTE = re.compile(
    r"(\w+) = (?:dense<(?:\[(.*?)\]|(-?\d+)|)> : tensor<(\d+)xi64>|(-?\d+) : i64)"
)


def calls(text: str) -> list[Call]:
    """Our calls in StableHLO's text, in its order."""
    found = []
    for op, attributes, operands, results in _CALL.findall(text):
        values: dict[str, int | list[int]] = {}
        for name, numbers, splat, size, scalar in _ATTRIBUTE.findall(attributes):
            if scalar:
                values[name] = int(scalar)
            else:
                values[name] = [
                    int(n) for n in (numbers.split(",") if numbers else [splat] * int(size))
                ]
        # Nothing in the dictionary but what was understood.
        assert len(values) == len(re.findall(r"\w+ = ", attributes)), attributes
        types = [tuple(re.findall(r"tensor<(.*?)>", t)) for t in (operands, results)]
        found.append(Call(op, values, *types))
    assert len(found) == text.count("@jax_ep_")
    return found


_COLLECTIVES = "all_gather|all_reduce|all_to_all|ragged_all_to_all|collective_\\w+|reduce_scatter"


def collectives(text: str) -> list[str]:
    """JAX's own collectives in StableHLO's text."""
    return re.findall(rf"stablehlo\.({_COLLECTIVES})\b", text)


def lower(f: Callable, args: Sequence[Any], *platforms: str) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=platforms).as_text()


def gradients(f: Callable) -> Callable:
    return jax.grad(lambda *args: jnp.sum(f(*args)), argnums=(0, 2, 3))


def members_of(call: Call) -> list[int]:
    """The devices of all groups, from the three attributes that tell them."""
    numbers = np.array(call.attributes["member_bases"])
    for size, stride in zip(
        call.attributes["member_sizes"], call.attributes["member_strides"], strict=True
    ):
        numbers = (numbers[:, None] + stride * np.arange(size)).reshape(-1)
    return numbers.tolist()


def expected_members(placement: Placement) -> list[int]:
    """Group by group, ranks ascending; groups are numbered in the mesh's order."""
    names, shape = zip(*placement.axes, strict=True)
    order = placement.order or range(int(np.prod(shape)))
    others = [n for n in names if n not in placement.ep_axes]
    axes = [names.index(n) for n in (*others, *placement.ep_axes)]
    return np.array(list(order)).reshape(shape).transpose(axes).reshape(-1).tolist()


@pytest.fixture(autouse=True)
def without_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls for CUDA as they are without slots: one for each verb. A test may say otherwise."""
    monkeypatch.setattr(runtime, "has_slots", lambda: False)


# Attributes ---------------------------------------------------------------------------------------


MEMBERS = ("member_bases", "member_sizes", "member_strides")


def header_attributes() -> dict[str, dict[str, type]]:
    """What the handlers decode, {op: {attribute: type}}, read from the header."""
    header = (ROOT / "xla_ffi" / "attributes.h").read_text().replace("\\\n", " ")
    lists = dict(re.findall(r"#define (JAX_EP_\w+)\(NUMBER\)(.*)", header))
    defined = re.findall(r"DEFINE_ATTRIBUTES\(\w+, k([A-Z]\w+),\s*(\w+)\)", header)

    def numbers(text: str) -> list[str]:
        inner = [n for name in re.findall(r"(\w+)\(NUMBER\)", text) for n in numbers(lists[name])]
        return inner + re.findall(r"\bNUMBER\((\w+)\)", text)

    return {
        re.sub(r"\B([A-Z])", r"_\1", kind).lower(): dict.fromkeys(MEMBERS, list)
        | dict.fromkeys(numbers(lists[name]), int)
        for kind, name in defined
    }


@pytest.mark.versions
@pytest.mark.parametrize(
    ("platform", "ops"), [("cpu", (*OPS, "layout_and_dispatch")), ("cuda", CUDA_OPS)]
)
def test_attributes_are_those_of_the_header(platform: str, ops: Sequence[str]) -> None:
    header = header_attributes()
    assert set(header) == set(ALL_OPS)
    case = sizes(EP)
    inputs = make_problem(EP, case).inputs
    found = []
    for in_one in (True, False):
        f = sharded_layer(EP, EP.mesh(), case, in_one=in_one)
        found += calls(lower(f, inputs, platform)) + calls(lower(gradients(f), inputs, platform))
    assert {call.op for call in found} == set(ops)
    for call in found:
        assert {name: type(value) for name, value in call.attributes.items()} == header[call.op]


def as_on_cpu(call: Call) -> Call:
    """A call for CUDA as CPU has it.

    That is with the device's coordinates before the operands, combine without its scratch, and for
    the gradient of combine the dispatch of its cotangent.
    """
    flags = call.attributes
    if call.op == "combine_gradient":
        plain = {"has_weights": 0, "quantization": 0, "dequantize": 0, "expand": 1}
        dispatch = Call("dispatch", flags | plain, call.operands[:-2], call.results[:1])
        return as_on_cpu(dispatch)
    results = call.results
    if call.op == "combine":
        results = results[: 1 + flags["has_values"]]
    return dataclasses.replace(call, operands=("2xi32", *call.operands), results=results)


def in_two(call: Call) -> list[Call]:
    """A call for CPU; layout_and_dispatch as the two calls that it is in one."""
    if call.op != "layout_and_dispatch":
        return [call]
    flags = call.attributes
    of_rows = {"has_weights", "zero_tail", "quantization", "dequantize", "expand"}
    of_layout = {"expert_alignment", "expert_capacity"}
    coordinates, x, topk_idx, *rest = call.operands
    tables, rows = call.results[:8], call.results[8:]
    return [
        Call(
            "layout",
            {name: value for name, value in flags.items() if name not in of_rows},
            (coordinates, topk_idx),
            tables,
        ),
        Call(
            "dispatch",
            {name: value for name, value in flags.items() if name not in of_layout},
            (coordinates, x, topk_idx, *tables[:5], *rest),
            rows,
        ),
    ]


# Of every call of the layer on the mesh EP: R = 8, T = 6, K = 2, E = 16, C = 10; also H = 8, A = 2.
ON_EP: dict[str, int | list[int]] = {
    "member_bases": [0],
    "member_sizes": [8],
    "member_strides": [1],
    "num_ranks": 8,
    "num_sms": 0,
    "num_tokens": 6,
    "top_k": 2,
    "num_experts": 16,
    "capacity": 10,
}
# send_row, recv_src, recv_order, recv_offsets, group_sizes.
TABLES = ("6x2xi32", "10xi32", "10xi32", "49xi32", "2xi32")
ON_LAYOUT = ("6x2xi32", *TABLES)  # topk_idx and the tables


@pytest.mark.versions
def test_exact_calls_of_a_layer_for_cuda() -> None:
    """Forward: one call of each, with these attributes, operands and results."""
    case = sizes(EP)
    f = sharded_layer(EP, EP.mesh(), case)
    dispatch = {"has_weights": 1, "zero_tail": 1, "quantization": 0, "dequantize": 0, "expand": 1}
    combine = {"ranks_per_node": 8, "has_weights": 1, "has_values": 0, "expand": 1}
    assert calls(lower(f, make_problem(EP, case).inputs, "cuda")) == [
        Call(
            "layout",
            ON_EP | {"expert_alignment": 2, "expert_capacity": 0},
            ("6x2xi32",),
            (*TABLES, "2xi32", "16xi32", "3xi32"),
        ),
        Call(
            "dispatch", ON_EP | dispatch, ("6x8xf32", *ON_LAYOUT, "6x2xf32"), ("10x8xf32", "10xf32")
        ),
        Call(
            "combine",
            ON_EP | combine,
            ("10x8xf32", *ON_LAYOUT, "10xf32"),
            ("6x8xf32", "8x6x8xf32"),  # the result, and scratch: a row per (rank, token)
        ),
    ]


@pytest.mark.parametrize(
    ("num_tokens", "options", "ops"),
    [
        (256, {}, ["layout_and_dispatch"]),
        (257, {}, ["layout", "dispatch"]),  # more ids of the group than slots take
        (256, {"fp8": "float32"}, ["layout_and_dispatch"]),
        (256, {"expand": False}, ["layout_and_dispatch"]),
    ],
)
def test_one_call_for_cuda_where_slots_may_take_it(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, options: dict[str, Any], ops: list[str]
) -> None:
    x = jax.ShapeDtypeStruct((8 * num_tokens, 128), "bfloat16")
    ids = jax.ShapeDtypeStruct((8 * num_tokens, 8), "int32")

    def lowered(platform: str, has_slots: bool) -> list[Call]:
        def f(x: Any, ids: Any) -> Any:  # JAX keeps what it has lowered, by function
            _, recv = jax_ep.layout_and_dispatch(x, ids, num_experts=16, axis_name="ep", **options)
            return recv.tokens

        monkeypatch.setattr(runtime, "has_slots", lambda: has_slots)
        run = jax.shard_map(f, mesh=EP.mesh(), in_specs=P("ep"), out_specs=P("ep"))
        return calls(lower(run, (x, ids), platform))

    assert [call.op for call in lowered("cuda", False)] == ["layout", "dispatch"]
    found = lowered("cuda", True)
    assert [call.op for call in found] == ops
    if len(ops) == 1:
        assert [as_on_cpu(call) for call in found] == lowered("cpu", False)


@pytest.mark.versions
def test_exact_calls_of_the_backward_pass_for_cuda() -> None:
    """Dispatch's gradient is a combine with values, combine's is a call of its own."""
    case = sizes(EP)
    f = gradients(sharded_layer(EP, EP.mesh(), case))
    found = calls(lower(f, make_problem(EP, case).inputs, "cuda"))
    # Forward's combine is not needed for the gradients alone.
    assert [call.op for call in found] == ["layout", "dispatch", "combine_gradient", "combine"]
    assert found[2] == Call(
        "combine_gradient",
        ON_EP | {"zero_tail": 1},
        ("6x8xf32", *ON_LAYOUT, "10x8xf32", "10xf32"),
        ("10x8xf32", "10xf32"),
    )
    assert found[3] == Call(
        "combine",
        ON_EP | {"ranks_per_node": 8, "has_weights": 0, "has_values": 1, "expand": 1},
        ("10x8xf32", *ON_LAYOUT, "10xf32"),
        ("6x8xf32", "6x2xf32", "8x6x8xf32"),
    )


@pytest.mark.versions
@pytest.mark.parametrize("name", ["ep", "dp_ep_permuted", "tuple_reversed", "tp_ep_dp"])
def test_no_partition_id_for_cuda(name: str) -> None:
    """A GPU's place in its group follows from its number: a program need not compute it."""
    placement = PLACEMENTS[name]
    case = sizes(placement)
    inputs = make_problem(placement, case).inputs
    f = sharded_layer(placement, placement.mesh(), case)
    for g in (f, gradients(f)):
        assert "partition_id" not in lower(g, inputs, "cuda")
        assert "partition_id" in lower(g, inputs, "cpu")


def test_tables_are_those_of_the_header() -> None:
    """C++ and Python spell the tables once each, in one order."""
    header = (ROOT / "cuda" / "core" / "tables.h").read_text()
    passed_on = re.findall(r'^ +f\("(\w+)", tables\.(\w+), Shape', header, re.MULTILINE)
    assert [name for name, field in passed_on] == [field for _, field in passed_on]
    assert tuple(name for name, _ in passed_on) == ffi.OPERAND_TABLES
    results = re.findall(
        r'"(\w+)"',
        "".join(
            re.findall(
                r"^void ReadResults.*?^}",
                (ROOT / "xla_ffi" / "calls.cc").read_text(),
                re.M | re.S,
            )
        ).partition("ForEach")[2],
    )
    assert (*ffi.OPERAND_TABLES, *results) == ffi.LayoutTables._fields


@pytest.mark.versions
def test_second_derivatives_for_cuda() -> None:
    """The gradient's gradient is made of dispatch and combine: it has one on CUDA too."""
    case = sizes(EP)
    first = gradients(sharded_layer(EP, EP.mesh(), case))

    def norm(*args: Any) -> Any:
        return sum(jnp.sum(g * g) for g in first(*args))

    second = jax.grad(norm, argnums=(0, 2, 3))
    inputs = make_problem(EP, case).inputs
    assert {call.op for call in calls(lower(second, inputs, "cuda"))} == set(CUDA_OPS)


def gradient_of_combine(dtype: str, hidden: int, *, zero_tail: bool = True) -> list[str]:
    """What the gradient of the weighted combine is made of, for CUDA."""

    def f(y: Any, ids: Any, weights: Any, g: Any) -> Any:
        layout = jax_ep.make_layout(
            ids, num_experts=16, axis_name="ep", capacity=10, zero_tail=zero_tail
        )
        return jax.vjp(lambda y, weights: jax_ep.combine(y, layout, weights), y, weights)[1](g)

    run = jax.shard_map(f, mesh=EP.mesh(), in_specs=P("ep"), out_specs=P("ep"))
    args = (
        jax.ShapeDtypeStruct((80, hidden), dtype),
        jax.ShapeDtypeStruct((48, 2), "int32"),
        jax.ShapeDtypeStruct((80,), "float32"),
        jax.ShapeDtypeStruct((48, hidden), dtype),
    )
    found = [c for c in calls(lower(run, args, "cuda")) if c.op not in ("layout", "combine")]
    for call in found:
        assert call.attributes["zero_tail"] == zero_tail
        assert call.results[0] == f"10x{hidden}x{dict(bfloat16='bf16', float32='f32')[dtype]}"
    return [call.op for call in found]


@pytest.mark.versions
@pytest.mark.parametrize("zero_tail", [True, False], ids=["zero_tail", "any_tail"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_that_the_gradient_of_combine_takes(dtype: str, zero_tail: bool) -> None:
    """Up to the kernel's longest; longer ones are dispatched, and XLA computes with them."""
    width = jnp.dtype(dtype).itemsize
    most = limits.MAX_WEIGHTED_ROW_BYTES // width
    ops = gradient_of_combine(dtype, most, zero_tail=zero_tail)
    assert ops == ["combine_gradient"]
    ops = gradient_of_combine(dtype, most + 16 // width, zero_tail=zero_tail)
    assert ops == ["dispatch"]


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_members(name: str, platform: str) -> None:
    """The devices of all groups, in ranks' order, whatever the mesh."""
    placement = PLACEMENTS[name]
    case = sizes(placement)
    f = sharded_layer(placement, placement.mesh(), case)
    for call in calls(lower(f, make_problem(placement, case).inputs, platform)):
        assert members_of(call) == expected_members(placement)
        assert call.attributes["num_ranks"] == placement.num_ranks


@pytest.mark.versions
@pytest.mark.parametrize("in_one", [True, False], ids=["in_one", "by_verbs"])
@pytest.mark.parametrize("name", ["ep", "dp_ep_permuted", "tuple_reversed", "tp_ep_dp"])
def test_cpu_and_cuda_lower_alike(name: str, in_one: bool) -> None:
    placement = PLACEMENTS[name]
    case = sizes(placement)
    inputs = make_problem(placement, case).inputs
    f = sharded_layer(placement, placement.mesh(), case, in_one=in_one)
    for g in (f, gradients(f)):
        on_cpu = [part for call in calls(lower(g, inputs, "cpu")) for part in in_two(call)]
        assert on_cpu == [as_on_cpu(call) for call in calls(lower(g, inputs, "cuda"))]


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("zero_tail", [True, False], ids=["zero_tail", "any_tail"])
@pytest.mark.parametrize("expand", [True, False], ids=["expand", "once"])
@pytest.mark.parametrize(
    ("fp8", "dequantize", "quantization"),
    [
        (None, False, 0),
        ("float32", False, 1),
        ("power_of_two", False, 2),
        ("float32", True, 1),
        ("power_of_two", True, 2),
    ],
)
def test_options_of_dispatch(
    fp8: Any, dequantize: bool, quantization: int, expand: bool, zero_tail: bool, weights: bool
) -> None:
    def f(x: Any, ids: Any, topk_weights: Any) -> Any:
        layout = jax_ep.make_layout(
            ids, num_experts=16, axis_name="ep", capacity=10, zero_tail=zero_tail
        )
        topk_weights = topk_weights if weights else None
        recv = jax_ep.dispatch(
            x, layout, topk_weights, fp8=fp8, dequantize=dequantize, expand=expand
        )
        return tuple(a for a in recv if a is not None)

    run = jax.shard_map(f, mesh=EP.mesh(), in_specs=P("ep"), out_specs=P("ep"))
    args = (
        jax.ShapeDtypeStruct((48, 256), "bfloat16"),
        jax.ShapeDtypeStruct((48, 2), "int32"),
        jax.ShapeDtypeStruct((48, 2), "float32"),
    )
    (on_cuda,) = [c for c in calls(lower(run, args, "cuda")) if c.op == "dispatch"]
    (call,) = [c for c in calls(lower(run, args, "cpu")) if c.op == "dispatch"]
    assert as_on_cpu(on_cuda) == call
    assert call.attributes == ON_EP | {
        "has_weights": int(weights),
        "zero_tail": int(zero_tail),
        "quantization": quantization,
        "dequantize": int(dequantize),
        "expand": int(expand),
    }
    num_rows = 10 if expand else 8 * 6 + 1
    results = [f"{num_rows}x256xbf16"]
    if fp8 and not dequantize:
        results = [f"{num_rows}x256xf8E4M3FN", f"{num_rows}x2xf32"]
    assert call.results == (*results, *(["10xf32"] if weights else []))


@pytest.mark.versions
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no_weights"])
def test_scales_that_rows_come_with(dtype: str, weights: bool) -> None:
    def f(x: Any, ids: Any, scales: Any, topk_weights: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=16, axis_name="ep", capacity=10)
        recv = jax_ep.dispatch(x, layout, topk_weights if weights else None, scales=scales)
        assert (recv.weights is not None) == weights
        return recv.tokens, recv.scales

    run = jax.shard_map(f, mesh=EP.mesh(), in_specs=P("ep"), out_specs=P("ep"))
    args = (
        jax.ShapeDtypeStruct((48, 2880), dtype),
        jax.ShapeDtypeStruct((48, 2), "int32"),
        jax.ShapeDtypeStruct((48, 23), "float32"),
        jax.ShapeDtypeStruct((48, 2), "float32"),
    )
    (on_cuda,) = [c for c in calls(lower(run, args, "cuda")) if c.op == "dispatch"]
    (call,) = [c for c in calls(lower(run, args, "cpu")) if c.op == "dispatch"]
    assert as_on_cpu(on_cuda) == call
    assert (call.attributes["quantization"], call.attributes["dequantize"]) == (3, 0)
    assert call.attributes["has_weights"] == weights
    rows = "f8E4M3FN" if dtype == "float8_e4m3fn" else "f8E5M2"
    assert call.results == (f"10x2880x{rows}", "10x23xf32", *(["10xf32"] if weights else []))


@pytest.mark.versions
def test_num_sms_reaches_every_call_of_a_layout() -> None:
    """Backward passes too; dataclasses.replace changes it for what follows."""

    def f(x: Any, ids: Any, topk_weights: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=16, axis_name="ep", num_sms=24)

        def loss(x: Any, topk_weights: Any) -> Any:
            recv = jax_ep.dispatch(x, layout, topk_weights)
            fewer = dataclasses.replace(layout, num_sms=16)
            return jax_ep.combine(recv.tokens, fewer, recv.weights).sum()

        return jax.grad(loss, (0, 1))(x, topk_weights)

    run = jax.shard_map(f, mesh=EP.mesh(), in_specs=P("ep"), out_specs=P("ep"))
    args = (
        jax.ShapeDtypeStruct((48, 256), "bfloat16"),
        jax.ShapeDtypeStruct((48, 2), "int32"),
        jax.ShapeDtypeStruct((48, 2), "float32"),
    )
    found = [(c.op, c.attributes["num_sms"]) for c in calls(lower(run, args, "cuda"))]
    assert sorted(found) == [
        ("combine", 24),
        ("combine_gradient", 16),
        ("dispatch", 24),
        ("layout", 24),
    ]


@pytest.mark.versions
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bfloat16", "bf16"),
        ("float16", "f16"),
        ("float32", "f32"),
        ("int8", "i8"),
        ("uint32", "ui32"),
    ],
)
def test_payload_types(dtype: str, name: str) -> None:
    def f(x: Any, ids: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=16, axis_name="ep", capacity=10)
        tokens = jax_ep.dispatch(x, layout).tokens
        return jax_ep.combine(tokens.astype("bfloat16"), layout), tokens

    run = jax.shard_map(f, mesh=EP.mesh(), in_specs=P("ep"), out_specs=P("ep"))
    args = jax.ShapeDtypeStruct((48, 16), dtype), jax.ShapeDtypeStruct((48, 2), "int32")
    _, dispatch, combine = calls(lower(run, args, "cuda"))
    assert (dispatch.operands[0], dispatch.results) == (f"6x16x{name}", (f"10x16x{name}",))
    assert combine.results == ("6x16xbf16", "8x6x16xbf16")


# No other communication ---------------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_no_collective_but_ours(platform: str, check_vma: bool) -> None:
    """None forward; backward only JAX's sum over the axes that an input is replicated over."""
    for name, backward in (("ep", []), ("dp_ep", ["all_reduce"]), ("tuple", [])):
        placement = PLACEMENTS[name]
        case = sizes(placement)
        inputs = make_problem(placement, case).inputs
        f = sharded_layer(placement, placement.mesh(), case, check_vma=check_vma)
        assert collectives(lower(f, inputs, platform)) == []
        assert collectives(lower(gradients(f), inputs, platform)) == backward


@pytest.mark.versions
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_no_collective_in_the_compiled_program(axis_type: AxisType) -> None:
    """Neither does XLA's partitioner add one."""
    mesh, case = EP.mesh(axis_type), sizes(EP)
    arrays = place(mesh, in_specs(EP), make_problem(EP, case).inputs)
    f = sharded_layer(EP, mesh, case)
    text = jax.jit(gradients(f)).lower(*arrays).compile().as_text()
    assert "jax_ep_combine" in text
    assert re.findall(rf"\b({_COLLECTIVES.replace('_', '-')})\(", text) == []


@pytest.mark.versions
def test_collectives_are_found_where_there_are_some() -> None:
    """The control of the two tests above."""
    mesh = EP.mesh()
    run = jax.shard_map(
        lambda x: (
            jax.lax.all_to_all(jax.lax.all_gather(x, "ep"), "ep", 0, 0)
            + jax.lax.ppermute(x, "ep", [(0, 1)])
        ),
        mesh=mesh,
        in_specs=P("ep"),
        out_specs=P("ep"),
    )
    args = [jax.ShapeDtypeStruct((8, 4), "float32")]
    found = collectives(lower(run, args, "cuda"))
    assert sorted(found) == ["all_gather", "all_to_all", "collective_permute"]
    text = jax.jit(run).lower(*args).compile().as_text()
    assert re.findall(rf"\b({_COLLECTIVES.replace('_', '-')})\(", text)


# Without devices ----------------------------------------------------------------------------------

BIG: dict[str, Placement] = {
    "ep16": Placement((("ep", 16),)),
    "dp2_ep8": Placement((("dp", 2), ("ep", 8))),
    "ep8_dp2": Placement((("ep", 8), ("dp", 2))),
    "nodes_of_8": Placement((("dp", 2), ("node", 4), ("gpu", 8)), ep=("node", "gpu")),
}


def _abstract(placement: Placement, axis_type: AxisType) -> tuple[Callable, list[Any]]:
    """The layer on a mesh that has no devices, and its arguments' types."""
    names, shape = zip(*placement.axes, strict=True)
    mesh = AbstractMesh(shape, names, axis_types=(axis_type,) * len(names))
    case = sizes(placement, num_experts=2 * placement.num_ranks)
    args = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip(make_problem(placement, case).inputs, in_specs(placement), strict=True)
    ]
    return sharded_layer(placement, mesh, case), args


@pytest.mark.versions
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", BIG)
def test_abstract_mesh(name: str, axis_type: AxisType) -> None:
    """More devices than there are here: lowered and exported for CUDA, forward and backward."""
    placement = BIG[name]
    f, args = _abstract(placement, axis_type)
    for g, ops in (
        (f, OPS),
        (gradients(f), CUDA_OPS),
    ):
        exported = jax.export.export(
            jax.jit(g), platforms=["cuda"], disabled_checks=DISABLED_CHECKS
        )(*args)
        assert exported.nr_devices == placement.num_groups * placement.num_ranks
        assert exported.platforms == ("cuda",)
        for text in (lower(g, args, "cuda"), exported.mlir_module()):
            found = calls(text)
            assert sorted(c.op for c in found) == sorted(ops)
            for call in found:
                assert members_of(call) == expected_members(placement)
                assert call.attributes["num_ranks"] == placement.num_ranks


@pytest.mark.parametrize("shape", ["dp_ep", "ep_dp", "node_dp_gpu"])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_text_does_not_grow_with_the_pod(platform: str, shape: str) -> None:
    """Up to 16384 devices in groups of 64 a program differs by numbers alone."""
    texts = set()
    for dp in (4, 32, 256):
        placement = {
            "dp_ep": Placement((("dp", dp), ("ep", 64))),
            "ep_dp": Placement((("ep", 64), ("dp", dp))),
            "node_dp_gpu": Placement((("node", 8), ("dp", dp), ("gpu", 8)), ep=("node", "gpu")),
        }[shape]
        names, sizes_of_axes = zip(*placement.axes, strict=True)
        mesh = AbstractMesh(sizes_of_axes, names)
        case = sizes(placement, num_experts=128)
        rows = 6 * 64 * dp  # T = 6
        args = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, dtype, spec in zip(
                ((rows, 8), (rows, 2), (rows, 2), (128, 8)),
                ("float32", "int32", "float32", "float32"),
                in_specs(placement),
                strict=True,
            )
        ]
        text = lower(gradients(sharded_layer(placement, mesh, case)), args, platform)
        assert len(calls(text)) == (4 if platform == "cuda" else 3)
        # The all-reduce that JAX itself adds lists its groups, before 0.12.
        text = re.sub(r"replica_groups = dense<[^>]*>", "", text)
        texts.add(re.sub(r"\d+", "0", text))
    assert len(texts) == 1


@pytest.mark.versions
@pytest.mark.parametrize("transform", [lambda f: f, gradients], ids=["forward", "backward"])
def test_one_program_for_both_platforms(transform: Callable) -> None:
    """Lowered and exported for CPU and CUDA at once: each has its own copy of every call."""
    case = sizes(EP)
    f = transform(sharded_layer(EP, EP.mesh(), case, in_one=False))
    inputs = make_problem(EP, case).inputs
    exported = jax.export.export(
        jax.jit(f), platforms=["cpu", "cuda"], disabled_checks=DISABLED_CHECKS
    )(*inputs)
    assert exported.platforms == ("cpu", "cuda")
    alone = calls(lower(f, inputs, "cpu"))
    for text in (lower(f, inputs, "cpu", "cuda"), exported.mlir_module()):
        found = calls(text)
        assert len(found) == 2 * len(alone)
        assert found[::2] == alone
        assert [as_on_cpu(call) for call in found[1::2]] == alone


@pytest.mark.versions
def test_export_for_cuda_equals_lowering() -> None:
    placement = PLACEMENTS["dp_ep_permuted"]
    case = sizes(placement)
    inputs = make_problem(placement, case).inputs
    f = gradients(sharded_layer(placement, placement.mesh(), case))
    exported = jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=DISABLED_CHECKS)
    # The lowered text may keep a call that nobody uses until XLA removes it: compare as sets.
    lowered = {repr(call) for call in calls(lower(f, inputs, "cuda"))}
    assert {repr(call) for call in calls(exported(*inputs).mlir_module())} == lowered
