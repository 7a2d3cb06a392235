"""``overlap=True``: what XLA:GPU schedules beside the calls of two micro-batches.

XLA compiles for a GPU that is not there; where its plugin is not installed there is nothing to ask.
"""

import collections
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import schedules
import thunks
from schedules import BATCHES, Call

from jax_ep import _native, compat

SCRIPT = pathlib.Path(__file__).parent / "support" / "compile_for_cuda.py"
EXPERT_SIZES = (20480, 512)  # CAPACITY and FFN there
JAXLIB = tuple(map(int, compat.jaxlib_version().split(".")[:2]))

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="XLA's plugin for CUDA is not installed (jax-cuda13-plugin, jax-cuda13-pjrt)",
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder for each program."""
    folder = tmp_path_factory.mktemp("compiled")
    done = subprocess.run(
        [sys.executable, SCRIPT, folder],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def calls_of(program: pathlib.Path) -> list[list[Call]]:
    return schedules.read_calls((program / "scheduled.hlo").read_text(), EXPERT_SIZES)


def ops(calls: list[Call]) -> dict[str, int]:
    return dict(collections.Counter(call.op for call in calls))


def beside_the_other(calls: list[Call], op: str) -> list[int]:
    """Of the calls ``op``, how many GEMMs of the other micro-batch's experts are beside each.

    A backward pass may have some of its own there too: the weights' gradients.
    """
    assert {call.batch for call in calls} == set(BATCHES)
    return [sum(batch != call.batch for batch in call.beside) for call in calls if call.op == op]


FORWARD = {"layout": 2, "dispatch": 2, "combine": 2}
GRADIENT = {"layout": 2, "dispatch": 2, "combine": 4, "combine_gradient": 2}
BACKWARD = {"dispatch": 2, "combine": 2, "combine_gradient": 2}  # of a layer that is recomputed


@needs_plugin
def test_forward(programs: pathlib.Path) -> None:
    """One's dispatch beside the other's experts, then the other way about for combine."""
    (calls,) = calls_of(programs / "forward")
    assert ops(calls) == FORWARD
    assert all(call.is_async for call in calls)
    assert beside_the_other(calls, "dispatch") == [0, 2]
    assert beside_the_other(calls, "combine") == [2, 0]


@needs_plugin
def test_gradient(programs: pathlib.Path) -> None:
    (calls,) = calls_of(programs / "gradient")
    assert ops(calls) == GRADIENT
    assert all(call.is_async for call in calls)
    assert beside_the_other(calls, "dispatch") == [0, 2]
    forward, backward = calls[:6], calls[6:]
    assert beside_the_other(forward, "combine")[0] == 2
    assert beside_the_other(backward, "combine_gradient") == [0, 2]
    assert beside_the_other(backward, "combine")[0] == 2


@needs_plugin
def test_without_it_nothing_is_beside(programs: pathlib.Path) -> None:
    (calls,) = calls_of(programs / "without")
    assert ops(calls) == GRADIENT
    assert not any(call.is_async or call.beside for call in calls)


@needs_plugin
def test_loop_without_a_collective(programs: pathlib.Path) -> None:
    """There XLA's scheduler hides nothing before 0.12."""
    (calls,) = calls_of(programs / "scan")
    assert ops(calls) == FORWARD
    assert all(call.is_async for call in calls)
    assert beside_the_other(calls, "dispatch") == ([0, 2] if JAXLIB >= (0, 12) else [0, 0])
    assert beside_the_other(calls, "combine") == ([2, 0] if JAXLIB >= (0, 12) else [0, 0])


@needs_plugin
def test_gradient_of_a_loop_that_recomputes(programs: pathlib.Path) -> None:
    """That loop has asynchronous operations that XLA's scheduler knows, since 0.11."""
    forward, backward = calls_of(programs / "remat")
    assert ops(forward) == FORWARD
    assert ops(backward) == BACKWARD
    for op in BACKWARD:
        assert (max(beside_the_other(backward, op)) >= 2) == (JAXLIB >= (0, 11)), op


@needs_plugin
@pytest.mark.parametrize("name", ["forward", "gradient", "scan", "remat", "in_flight"])
def test_calls_share_a_stream(programs: pathlib.Path, name: str) -> None:
    """So those that are in flight together run in order."""
    streams = schedules.streams_of_calls(programs / name)
    assert len(streams) == sum(len(calls) for calls in calls_of(programs / name))
    assert set(streams) == {"communication_stream[0]"}


@needs_plugin
def test_the_flag_that_is_refused_has_two_streams(programs: pathlib.Path) -> None:
    assert set(schedules.streams_of_calls(programs / "streams")) == {
        "communication_stream[0]",
        "communication_stream[1]",
    }


@needs_plugin
@pytest.mark.skipif(_native.cuda is None, reason="jax_ep is built without CUDA")
def test_calls_are_not_recorded(programs: pathlib.Path) -> None:
    """Those without ``overlap`` are."""
    inside, outside = thunks.recorded_thunks(programs / "gradient")
    assert (inside, outside) == (0, sum(GRADIENT.values()))
    inside, outside = thunks.recorded_thunks(programs / "without")
    assert (inside, outside) == (sum(GRADIENT.values()), 0)


_SECOND = 'metadata={op_name="jit(f)/second/operation"}'
_GEMM = f'custom-call(%x), custom_call_target="__cublas$gemm", {_SECOND}'
_HLO = f"""
%body.1 (p: bf16[20480,512]) -> bf16[8,8] {{
  %p = bf16[20480,512]{{1,0}} parameter(0)
  ROOT %c = bf16[8,8]{{1,0}} custom-call(%p), custom_call_target="jax_ep_combine_overlapped"
}}

%gemm.1 (x: bf16[8,8]) -> bf16[20480,512] {{
  ROOT %g = (bf16[20480,512]{{1,0}}, s8[32]{{0}}) {_GEMM}
}}

ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {{
  %start = (bf16[8,8]) call-start(%x), to_apply=%body.1, metadata={{op_name="jit(f)/jvp(first)/c"}}
  %router = (bf16[8,16]{{1,0}}, s8[32]{{0}}) {_GEMM}
  %fusion = (bf16[20480,512]{{1,0}}, s8[32]{{0}}) fusion(%x), kind=kCustom, calls=%gemm.1
  %done = bf16[8,8]{{1,0}} call-done(%start), metadata={{op_name="jit(f)/first/combine"}}
  %late = (bf16[512,8]{{1,0}}, s8[32]{{0}}) {_GEMM}
  ROOT %s = s8[8] custom-call(%x), custom_call_target="jax_ep_dispatch", {_SECOND}
}}
"""


def test_reading_a_schedule() -> None:
    expected = [Call("combine", "first", True, ["second"]), Call("dispatch", "second", False)]
    assert schedules.read_calls(_HLO, EXPERT_SIZES) == [expected]
