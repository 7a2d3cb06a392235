"""``overlap=True``: what programs are lowered to, and what is refused.

What XLA makes of them on a GPU is in test_overlap_schedule.py.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from sharded_layers import CUDA_OPS, DP_EP, EP, Placement

import jax_ep
from jax_ep import _native, compat, environment, runtime

NUM_EXPERTS, TOP_K = 16, 2
FLAG = environment.STREAMS_FLAG


@pytest.fixture(autouse=True)
def without_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_slots", lambda: False)


def layer(x: Any, ids: Any, weights: Any, **options: Any) -> Any:
    layout = jax_ep.make_layout(ids, num_experts=NUM_EXPERTS, axis_name="ep", **options)
    recv = jax_ep.dispatch(x, layout, weights)
    return jax_ep.combine(jnp.tanh(recv.tokens), layout, recv.weights)


def whole_layer(x: Any, ids: Any, weights: Any, **options: Any) -> Any:
    out, _ = jax_ep.moe(
        x,
        ids,
        weights,
        lambda tokens, _: jnp.tanh(tokens),
        num_experts=NUM_EXPERTS,
        axis_name="ep",
        **options,
    )
    return out


def sharded(f: Callable, placement: Placement = EP) -> tuple[Callable, tuple[Any, ...]]:
    """``f`` of x, ids and weights, per shard, as a function of whole arrays, and their types."""
    rows = 4 * placement.num_groups * placement.num_ranks
    shapes = ((rows, 8), jnp.float32), ((rows, TOP_K), jnp.int32), ((rows, TOP_K), jnp.float32)
    run = jax.shard_map(
        f, mesh=placement.mesh(), in_specs=placement.tokens, out_specs=placement.tokens
    )
    return run, tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)


def lower(
    f: Callable, platform: str, *, placement: Placement = EP, differentiated: bool = False
) -> str:
    run, args = sharded(f, placement)
    if differentiated:
        value, run = run, jax.grad(lambda *args: jnp.sum(value(*args)), argnums=(0, 2))
    return jax.jit(run).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def with_options(f: Callable, **options: Any) -> Callable:
    return lambda *args: f(*args, **options)


# What programs are lowered to ---------------------------------------------------------------------


def remat(x: Any, ids: Any, weights: Any, **options: Any) -> Any:
    policy = jax.checkpoint_policies.save_only_these_names("jax_ep_layout")
    return jax.checkpoint(with_options(layer, **options), policy=policy)(x, ids, weights)


def scanned(x: Any, ids: Any, weights: Any, **options: Any) -> Any:
    return jax.lax.scan(lambda x, _: (layer(x, ids, weights, **options), None), x, length=3)[0]


@pytest.mark.parametrize("f", [layer, whole_layer, remat], ids=lambda f: f.__name__)
def test_no_other_program_on_cpu(f: Callable) -> None:
    """So results have the same bits there."""
    texts = [
        lower(with_options(f, **options), "cpu", differentiated=True)
        for options in ({"num_sms": 24}, {"overlap": True})
    ]
    assert texts[0].count("custom_call @jax_ep_") > 2
    assert texts[0] == texts[1]


_FUNCTION = re.compile(r"func\.func private @(jax_ep_\w+)\(.*?\n  }\n", re.DOTALL)
_CALL = re.compile(
    r"call @(jax_ep_\w+)\(.*?\) \{mhlo\.frontend_attributes = "
    r'\{_xla_stream_annotation = "collective", inlineable = "false"\}\} : \(.*?\) -> (.*)'
)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("f", "differentiated", "placement", "ops"),
    [
        (layer, False, EP, ["layout", "dispatch", "combine"]),
        (layer, True, EP, ["layout", "dispatch", "combine_gradient", "combine"]),
        (layer, True, DP_EP, ["layout", "dispatch", "combine_gradient", "combine"]),
        (whole_layer, True, EP, ["layout", "dispatch", "combine_gradient", "combine"]),
        (remat, True, EP, ["layout", "dispatch", "combine_gradient", "combine"]),
        (scanned, False, EP, ["layout", "dispatch", "combine"]),
    ],
    ids=["forward", "gradient", "dp_ep", "moe", "remat", "scan"],
)
def test_calls_for_cuda(
    f: Callable, differentiated: bool, placement: Placement, ops: list[str]
) -> None:
    """Each in a function of its own, that is called with the annotation; on 24 SMs."""
    text = lower(
        with_options(f, overlap=True),
        "cuda",
        placement=placement,
        differentiated=differentiated,
    )
    functions = {match[1]: match[0] for match in _FUNCTION.finditer(text)}
    inside = {
        name: re.findall(r"custom_call @jax_ep_(\w+)_overlapped\(.* num_sms = (\d+) ", function)
        for name, function in functions.items()
    }
    assert all(len(calls) == 1 for calls in inside.values())
    called = _CALL.findall(text)
    assert sorted(inside[name][0][0] for name, _ in called) == sorted(ops)
    assert {calls[0][1] for calls in inside.values()} == {"24"}
    # No call elsewhere.
    assert text.count("custom_call @jax_ep_") == len(functions)
    assert len(re.findall(r"\bcall @jax_ep_", text)) == len(called)
    # What has several results has a barrier for them all.
    several = [re.sub(r"[()]", "", results) for _, results in called if results.startswith("(")]
    barriers = re.findall(r"optimization_barrier .*? : (.*)", text)
    assert set(several) <= set(barriers)
    assert len(several) > 1


def test_tables_that_may_be_unused_are_one_result() -> None:
    """The others are operands of every dispatch and combine."""
    text = lower(with_options(layer, overlap=True), "cuda")
    (results,) = (results for name, results in _CALL.findall(text) if "layout" in name)
    # T = 4, K = 2, R = 8, C = 64, L = 2, E = 16.
    joined = 2 + 2 + 16 + 3
    types = "4x2", "64", "64", "33", f"{joined}"
    assert results == f"({', '.join(f'tensor<{t}xi32>' for t in types)})"
    slices = re.findall(rf"slice .*? : \(tensor<{joined}xi32>\) -> tensor<(\d+)xi32>", text)
    assert slices == ["2", "2", "16", "3"]


def test_layout_and_dispatch_in_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_slots", lambda: True)
    text = lower(with_options(whole_layer, overlap=True), "cuda")
    found = sorted(name for name, _ in _CALL.findall(text))
    assert found == ["jax_ep_combine", "jax_ep_layout_and_dispatch"]
    assert "tensor<23xi32>, tensor<64x8xf32>, tensor<64xf32>)" in text


def test_without_it_nothing_is_annotated() -> None:
    text = lower(layer, "cuda", differentiated=True)
    assert "overlapped" not in text
    assert "_xla_stream_annotation" not in text


@pytest.mark.parametrize("ending", ["", "_overlapped"])
def test_export_names_targets_of_their_own(ending: str) -> None:
    run, args = sharded(with_options(layer, overlap=True))
    checks = [jax.export.DisabledSafetyCheck.custom_call(f"jax_ep_{op}{ending}") for op in CUDA_OPS]
    export = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=checks)
    if not ending:
        with pytest.raises(ValueError, match="jax_ep_layout_overlapped"):
            export(*args)
        return
    assert "_xla_stream_annotation" in export(*args).mlir_module()


# SMs, and what is refused -------------------------------------------------------------------------


def test_number_of_sms() -> None:
    def sms(**options: Any) -> set[str]:
        text = lower(with_options(layer, **options), "cuda", differentiated=True)
        return set(re.findall(r" num_sms = (\d+) ", text))

    assert sms(overlap=True, num_sms=16) == {"16"}
    assert sms(overlap=True, num_sms=64) == {"64"}
    assert sms(num_sms=65) == {"65"}
    message = "with overlap=True num_sms must be at least 1 and at most 64, .*; got 65"
    with pytest.raises(ValueError, match=f"jax_ep.make_layout: {message}"):
        sms(overlap=True, num_sms=65)


@pytest.mark.parametrize("verb", ["dispatch", "combine"])
def test_all_sms_by_replacing_them(verb: str) -> None:
    def f(x: Any, ids: Any, weights: Any) -> Any:
        layout = jax_ep.make_layout(
            ids, num_experts=NUM_EXPERTS, axis_name="ep", overlap=verb == "combine"
        )
        if verb == "dispatch":  # the number of such a layout is 0
            layout = dataclasses.replace(layout, overlap=True)
        recv = jax_ep.dispatch(x, layout)
        return jax_ep.combine(recv.tokens, dataclasses.replace(layout, num_sms=0))

    with pytest.raises(ValueError, match=rf"jax_ep\.{verb}: with overlap=True layout\.num_sms"):
        lower(f, "cpu")


@pytest.mark.versions
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("first", [False, True])
def test_all_layouts_of_a_program_agree(platform: str, first: bool) -> None:
    def f(x: Any, ids: Any, weights: Any) -> Any:
        x = layer(x, ids, weights, overlap=first)
        return layer(x, ids, weights, overlap=not first)

    message = (
        rf"jax_ep\.make_layout: this layout has overlap={not first}, but another one of the same "
        rf"program has overlap={first}: pass the same to all of them"
    )
    with pytest.raises(ValueError, match=message):
        lower(f, platform)
    for overlap in (first, not first):  # programs of their own
        lower(with_options(layer, overlap=overlap), platform)


def test_a_layout_that_is_replaced_does_not_agree() -> None:
    def f(x: Any, ids: Any, weights: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=NUM_EXPERTS, axis_name="ep", overlap=True)
        recv = jax_ep.dispatch(x, layout)
        return jax_ep.combine(recv.tokens, dataclasses.replace(layout, overlap=False))

    with pytest.raises(ValueError, match=r"jax_ep\.combine: this layout has overlap=False"):
        lower(f, "cuda")


@pytest.mark.parametrize(
    ("flags", "share"),
    [
        ("", True),
        ("--xla_gpu_autotune_level=0", True),
        (FLAG, False),
        (f"--xla_dump_to=x {FLAG}=true", False),
        (f"{FLAG}=1", False),
        (f"{FLAG}=false", True),
        (f"{FLAG}=0 --xla_dump_to=x", True),
        (f"{FLAG}=false\n{FLAG}", False),  # the last one counts
        (f"{FLAG}=true {FLAG}='False'", True),
        (f"{FLAG}_too=true", True),
    ],
)
def test_flags_with_which_collectives_share_a_stream(flags: str, share: bool) -> None:
    assert environment.collectives_share_a_stream(flags) == share


def test_two_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a program is lowered on a machine with GPUs; one without overlap is not."""
    monkeypatch.setattr(compat, "has_live_client", lambda platform: platform == "cuda")
    monkeypatch.setattr(_native, "cuda", object())
    monkeypatch.setattr(runtime, "_set_up_cuda", lambda: None)
    monkeypatch.setenv("XLA_FLAGS", f"{FLAG}=true")
    lower(with_options(layer, num_sms=3), "cuda")
    with pytest.raises(RuntimeError, match=f"jax_ep_layout: XLA_FLAGS has {FLAG}, .* at once"):
        lower(with_options(layer, overlap=True), "cuda")
    monkeypatch.setenv("XLA_FLAGS", f"{FLAG}=false")
    lower(with_options(layer, overlap=True, num_sms=3), "cuda")
