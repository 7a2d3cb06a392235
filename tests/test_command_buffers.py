"""XLA may record calls in command buffers only in a mode that keeps their order."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
from sharded_layers import ALL_OPS

from jax_ep import _native, compat, environment, runtime

FLAG = "--xla_gpu_command_buffer_scheduling_mode"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", True),
        ("--xla_gpu_graph_min_graph_size=1", True),
        (f"{FLAG}=LHS", True),
        (f"--xla_dump_to=x {FLAG}=SERIALIZE --xla_dump_hlo_as_text", True),
        (f"{FLAG}=CONCURRENT", False),
        (f"--xla_dump_to=x\n\t{FLAG}=CONCURRENT_REGIONS --xla_dump_hlo_as_text", False),
        (f"{FLAG}='CONCURRENT'", False),
        (f'{FLAG}="LHS"', True),
        (f"{FLAG}=LHS {FLAG}=CONCURRENT", False),  # the last one counts
        (f"{FLAG}=CONCURRENT {FLAG}=LHS", True),
        (f"{FLAG}=", False),  # and what is not known to keep the order does not
        (f"{FLAG}=SOME_NEW_MODE", False),
        (f"--not{FLAG}=CONCURRENT", True),
    ],
)
def test_modes_that_keep_the_order(flags: str, expected: bool) -> None:
    assert environment.command_buffers_keep_order(flags) == expected


# What is registered for CUDA, by target, and whether XLA takes it as recordable. The CPU client's
# registry, which is there without a GPU, is asked: a second registration must have the same traits.
_REGISTERED = """
import json
import jax, jaxlib.xla_client
register, found = jax.ffi.register_ffi_target, {}

def spy(name, fn, platform="cpu", **options):
    if platform == "CUDA":
        found[name] = fn, options
    register(name, fn, platform=platform, **options)

jax.ffi.register_ffi_target = spy
import jax_ep
from jax_ep import _cuda

jax.devices("cpu")
jaxlib.xla_client.register_custom_type("jax_ep_cuda_site", _cuda.state_type(), platform="cpu")
recordable = {}
for name, (fn, options) in found.items():
    register(f"{name}_cuda", fn, platform="cpu", **options)
    try:
        traits = jaxlib.xla_client.CustomCallTargetTraits.COMMAND_BUFFER_COMPATIBLE
        register(f"{name}_cuda", fn, platform="cpu", traits=traits)
        recordable[name] = True
    except jax.errors.JaxRuntimeError as error:
        assert "Duplicate FFI handler registration" in str(error), error
        recordable[name] = False
print(json.dumps(recordable))
"""


@pytest.mark.versions
@pytest.mark.skipif(
    importlib.util.find_spec("jax_ep._cuda") is None, reason="jax_ep is built without CUDA"
)
@pytest.mark.parametrize(
    ("flags", "expected"),
    [("", True), (f"{FLAG}=CONCURRENT", False), ("a file", False)],
    ids=["default", "concurrent", "in a file"],
)
def test_what_is_registered(flags: str, expected: bool, tmp_path: pathlib.Path) -> None:
    if flags == "a file":
        flags = str(tmp_path / "flags")
        pathlib.Path(flags).write_text(f"{FLAG}=CONCURRENT_REGIONS\n")
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", _REGISTERED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    targets = [f"jax_ep_{op}" for op in (*ALL_OPS, "quantize")]
    assert json.loads(done.stdout) == dict.fromkeys(targets, expected) | {
        f"{target}_overlapped": False for target in targets
    }


@pytest.mark.versions
def test_flags_that_come_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered cannot be changed, so the call says what to do."""
    monkeypatch.setattr(compat, "has_live_client", lambda _: True)
    monkeypatch.setattr(_native, "cuda", object())
    monkeypatch.setattr(runtime, "_set_up_cuda", lambda: None)
    monkeypatch.setattr(runtime, "_recordable", True)
    runtime.require_cuda("jax_ep_layout")
    monkeypatch.setenv("XLA_FLAGS", f"{FLAG}=CONCURRENT")
    with pytest.raises(RuntimeError, match="Set XLA_FLAGS before the import"):
        runtime.require_cuda("jax_ep_layout")
    monkeypatch.setattr(runtime, "_recordable", False)
    runtime.require_cuda("jax_ep_layout")
