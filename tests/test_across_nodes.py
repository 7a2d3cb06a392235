"""Groups across nodes, as programs are lowered for CUDA: with which calls, and what is refused.

Needs no GPU and no network: a process only says that one runs.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from test_lowering import calls, lower

import jax_ep
from jax_ep import ffi, nvshmem, runtime


@pytest.fixture
def nodes_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With a network, and slots, which calls across nodes take where they are told to."""
    monkeypatch.setattr(nvshmem, "is_running", lambda: True)
    monkeypatch.setattr(runtime, "has_slots", lambda: True)
    jax_ep.initialize(ranks_per_node=2)
    yield
    jax_ep.finalize()


def lowered(
    *,
    num_ranks: int = 8,
    num_experts: int = 0,
    num_sms: int | None = None,
    in_one: bool = False,
    combined: bool = False,
    ranks_per_node: int | None = None,
    gradient: bool = False,
    **rows: Any,
) -> list[Any]:
    """The calls of a layout and its rows."""
    options = {"num_experts": num_experts or 2 * num_ranks, "axis_name": "ep", "num_sms": num_sms}

    def f(x: Any, ids: Any) -> Any:
        if in_one:
            return jax_ep.layout_and_dispatch(x, ids, **options, **rows)[1].tokens
        layout = jax_ep.make_layout(ids, **options)
        tokens = jax_ep.dispatch(x, layout, **rows).tokens
        if not combined:
            return tokens
        layout = dataclasses.replace(layout, ranks_per_node=ranks_per_node)
        return jax_ep.combine(tokens, layout, jnp.ones(layout.capacity) if rows == {} else None)

    mesh = AbstractMesh((num_ranks,), ("ep",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(f, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    num_tokens = num_ranks * 4
    args = (
        jax.ShapeDtypeStruct((num_tokens, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((num_tokens, 2), jnp.int32),
    )
    program: Any = run
    if gradient:
        program = jax.grad(lambda x, ids: jnp.sum(run(x, ids).astype(jnp.float32) ** 2))
    return calls(lower(program, args, "cuda"))


def ops(**options: Any) -> list[str]:
    return [call.op for call in lowered(**options)]


@pytest.mark.usefixtures("nodes_of_two")
def test_calls() -> None:
    """Layout and dispatch are as ever, and two where one node has one."""
    assert ops() == ops(expand=False) == ["layout", "dispatch"]
    assert ops(in_one=True) == ["layout", "dispatch"]
    assert ops(num_ranks=2, in_one=True) == ["layout_and_dispatch"]  # on a node
    assert ops(num_ranks=56, num_sms=1) == ["layout", "dispatch"]
    assert ops(num_ranks=2, num_sms=8, fp8="float32", expand=False) == ["layout", "dispatch"]


@pytest.mark.usefixtures("nodes_of_two")
def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """With slots between nodes small calls are as on one node, in every form."""
    monkeypatch.setattr(runtime, "_has_network_slots", True)
    monkeypatch.delenv("JAX_EP_NETWORK_SLOTS", raising=False)
    assert ops(in_one=True) == ["layout_and_dispatch"]
    # What quantises, and turns out not to fit, would have no other way.
    fp8 = {"in_one": True, "fp8": "float32", "num_sms": 4}
    assert ops(**fp8) == ["layout", "quantize", "dispatch"]
    monkeypatch.setenv("JAX_EP_NETWORK_SLOTS", "1")
    assert ops(**fp8) == ["layout_and_dispatch"]
    assert ops(num_ranks=34, combined=True)[-1] == "combine"  # on 17 nodes


@pytest.mark.usefixtures("nodes_of_two")
def test_sums() -> None:
    """Combine has other scratch across nodes; its gradient is a dispatch there, as on CPU."""
    *_, combine = lowered(combined=True)
    assert combine.attributes["ranks_per_node"] == 2
    # Of 8 ranks with 4 tokens of 256 bytes: a sum of each, and whether there is one.
    assert combine.results[-1] == "8224xui8"
    *_, on_a_node = lowered(num_ranks=2, combined=True)
    assert on_a_node.results[-1] == "2x4x128xbf16"
    assert ops(combined=True, gradient=True) == [
        *("layout", "dispatch", "combine"),
        *("dispatch", "combine"),
    ]
    assert ops(num_ranks=2, combined=True, gradient=True)[-2:] == ["combine_gradient", "combine"]
    *_, combine = lowered(expand=False, gradient=True)
    assert (combine.op, combine.attributes["expand"]) == ("combine", 0)


@pytest.mark.usefixtures("nodes_of_two")
@pytest.mark.parametrize("in_one", [False, True])
def test_fp8(in_one: bool) -> None:
    """Rows are quantised before they are sent, and cross with their scales."""
    layout, quantize, dispatch = lowered(fp8="power_of_two", in_one=in_one, num_sms=12)
    assert [layout.op, quantize.op, dispatch.op] == ["layout", "quantize", "dispatch"]
    assert quantize.attributes == {"num_sms": 12, "power_of_two_scales": 1}
    assert quantize.operands == ("4x128xbf16",)
    assert quantize.results == ("4x128xf8E4M3FN", "4x1xf32")
    assert dispatch.operands[0] == "4x128xf8E4M3FN"
    assert dispatch.operands[-1] == "4x1xf32"
    assert dispatch.attributes["quantization"] == ffi.GIVEN_SCALES
    assert dispatch.results == ("64x128xf8E4M3FN", "64x1xf32")
    _, quantize, dispatch = lowered(fp8="float32", dequantize=True, in_one=in_one, num_sms=12)
    assert quantize.attributes["power_of_two_scales"] == 0
    assert dispatch.results == ("64x128xf8E4M3FN", "64x1xf32")
    assert dispatch.attributes["dequantize"] == 0


WHERE = "for a group across nodes (8 ranks, 2 on each) "
REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ranks": (
        {"num_ranks": 58},
        ValueError,
        "jax_ep.make_layout: for a group across nodes (58 ranks, 2 on each) the ranks must be at "
        "most 56",
    ),
    "order": (
        {"combined": True, "ranks_per_node": 4},
        ValueError,
        f"jax_ep.combine: {WHERE}sums are in that order on CUDA; the layout has ranks_per_node=4",
    ),
    "nodes": (
        {"combined": True, "num_ranks": 34},
        ValueError,
        "jax_ep.combine: for a group across nodes (34 ranks, 2 on each) the nodes must be at most "
        "16; got 17",
    ),
}


@pytest.mark.usefixtures("nodes_of_two")
@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name: str) -> None:
    options, error, message = REFUSALS[name]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        lowered(**options)


def test_odd_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvshmem, "is_running", lambda: True)
    jax_ep.initialize(ranks_per_node=1)
    with pytest.raises(ValueError, match=r"across nodes \(3 ranks, 1 on each\) num_experts must"):
        lowered(num_ranks=3, num_experts=9)
    jax_ep.finalize()


def test_without_a_network() -> None:
    """Nodes are for the order of sums alone."""
    jax_ep.initialize(ranks_per_node=2)
    assert ops(fp8="float32") == ["layout", "dispatch"]
    with pytest.raises(NotImplementedError, match="8 ranks with 2 on each node is for CPU only"):
        lowered(combined=True)
    jax_ep.finalize()
