"""The doctor: what it finds, which command it names, and its exit code, on machines made up here.

The GPUs are those that a program named nvidia-smi lists, so a script of that name makes a machine.
"""

import os
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jax_ep
from jax_ep import _native, doctor, nvshmem, reference

H200 = "NVIDIA H200, 9.0, 580.159.03"
NVLINK = """GPU 0: NVIDIA H200 (UUID: GPU-0)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
GPU 1: NVIDIA H200 (UUID: GPU-1)
\t Link 0: <inactive>
"""

Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes this process believe in these GPUs and programs, and that JAX has no GPU."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the doctor would set it
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    devices = doctor._jax_devices
    monkeypatch.setattr(
        doctor, "_jax_devices", lambda p: devices(p) if p == "cpu" else ([], "no such backend")
    )

    def program(name: str, text: str) -> None:
        (tmp_path / f"{name}.txt").write_text(text)
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\nwhile read -r l; do echo \"$l\"; done < '{path}.txt'\n")
        path.chmod(0o755)

    def make(
        *gpus: str,
        nvcc: int | None = None,
        plugin: bool = False,
        cuda: Any = None,
        probe: Any = None,
    ) -> None:
        if gpus:
            program("nvidia-smi", "".join(f"{gpu}\n" for gpu in gpus))
        if nvcc:
            program("nvcc", f"Cuda compilation tools, release {nvcc}.0, V{nvcc}.0.88\n")
        monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
        monkeypatch.setattr(_native, "cuda", cuda)
        monkeypatch.setattr(_native, "probe", probe)
        found = {"jax-cuda13-plugin": "0.11.2"} if plugin else {}
        monkeypatch.setattr(
            doctor,
            "_version",
            lambda *names: next((f"{n} {found[n]}" for n in names if n in found), None),
        )
        # A toolkit in its usual place is not this machine's.
        output = doctor._output
        monkeypatch.setattr(
            doctor,
            "_output",
            lambda *c: None if c[0].startswith("/usr/local/cuda") else output(*c),
        )

    return make


def _lines(state: str, text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(state)]


@pytest.mark.versions
def test_as_a_command(tmp_path: Path) -> None:
    """Without any GPU it says so, tests eight CPU devices and succeeds."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    environment |= {"PATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", "jax_ep.doctor"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "GPU: none" in run.stdout
    assert "self-test on 8 CPU devices: equal to the specification" in run.stdout
    assert not _lines("missing", run.stdout)
    assert not _lines("broken", run.stdout)


def test_machine_without_gpu_needs_nothing(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine()
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "GPU: none" in text
    assert "all that can work here works" in text


def test_each_piece_that_a_gpu_needs_has_its_command(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(H200, H200)
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "GPU 1: NVIDIA H200, compute capability 9.0" in text
    for piece, command in (
        ("JAX's CUDA plugin: not installed", "pip install "),
        ("CUDA part (_cuda, _probe): not built", "pip install -e . -C cmake.define.JAX_EP_CUDA=ON"),
        ("nvcc: not found", "apt-get install cuda-toolkit-13-0"),
    ):
        lines = text.splitlines()
        (at,) = (i for i, line in enumerate(lines) if piece in line)
        assert lines[at].startswith("missing"), lines[at]
        assert command in lines[at + 1], lines[at + 1]


@pytest.mark.versions
@pytest.mark.parametrize(
    ("python", "version", "command"),
    [
        ((3, 12), (0, 12, 0), f"{sys.executable} -m pip install 'jax[cuda13]=={jax.__version__}'"),
        ((3, 12), (0, 10, 2), f"{sys.executable} -m pip install --upgrade 'jax[cuda13]>=0.11.2'"),
        ((3, 11), (0, 10, 2), "python3.12 -m venv .venv && .venv/bin/pip install -e '.[cuda13]'"),
    ],
)
def test_plugin_is_one_that_this_python_can_have(
    python: tuple[int, int],
    version: tuple[int, int, int],
    command: str,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As README says: no jax for Python 3.11 is new enough for the extra cuda13."""
    machine(H200)
    monkeypatch.setattr(sys, "version_info", python)
    monkeypatch.setattr(jax, "__version_info__", version)
    findings = doctor.check_machine(doctor.driver_gpus())
    (plugin,) = (f for f in findings if "CUDA plugin" in f.text)
    assert plugin.command == command
    told = [f.text for f in findings if "on GPUs jax_ep has run with jax 0.11.2" in f.text]
    assert len(told) == (version < (0, 11, 2))
    assert told == [] or "need Python 3.12 or newer" in told[0]


@pytest.mark.versions
def test_least_jax_is_that_of_the_extra() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    (cuda,) = project["project"]["optional-dependencies"]["cuda13"]
    assert cuda == f"jax[cuda13]>={'.'.join(map(str, doctor._LEAST_CUDA_JAX))}"


@pytest.mark.parametrize(
    ("built", "state", "told"),
    [
        (("cuda", "probe"), "ok", "link probe (_probe), which the benchmark measures its bounds"),
        (("cuda",), "missing", "not there, though _cuda is"),
        ((), "info", "CUDA part (_cuda, _probe): not built"),
    ],
)
def test_extension_modules_are_named(
    built: tuple[str, ...],
    state: str,
    told: str,
    machine: Machine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Cuda:
        @staticmethod
        def build() -> dict[str, str]:
            return {"toolkit": "13.0", "architectures": "90a"}

        @staticmethod
        def set_timeout(arrival: float, progress: float) -> None:
            """Of the self-test."""

    machine(**{name: Cuda for name in built})
    assert doctor.main([]) == (state == "missing")
    text = capsys.readouterr().out
    assert "CPU part (_cpu): built" in _lines("ok", text)[1]
    assert ("CUDA part (_cuda): built with CUDA 13.0 for sm_90a" in text) == ("cuda" in built)
    assert sum(told in line for line in _lines(state, text)) == 1


def test_old_compiler_and_old_driver_are_named(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine("NVIDIA H100 80GB HBM3, 9.0, 570.86.15", nvcc=12, plugin=True)
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "is of CUDA 12; building the CUDA part needs 13.0" in text
    assert _lines("broken", text)[0].endswith("driver 570.86.15: CUDA 13 needs 580 or newer")


def test_gpus_hidden_from_jax(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(H200, nvcc=13, plugin=True)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert doctor.main([]) == 1
    assert "JAX_PLATFORMS=cpu" in capsys.readouterr().out
    monkeypatch.delenv("JAX_PLATFORMS")
    assert doctor.main([]) == 1
    assert "JAX does not use the GPUs: no such backend" in capsys.readouterr().out


def test_other_gpus_are_no_fault(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot work is told, and does not count."""
    machine("NVIDIA A100-SXM4-80GB, 8.0, 550.54")
    assert doctor.main([]) == 0
    assert "the CUDA kernels need 9.0 (Hopper)" in capsys.readouterr().out


def test_nvlinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_output", lambda *command: NVLINK)
    assert doctor._nvlinks() == "GPU 0: 2 x 26.562 GB/s; GPU 1: none active"
    monkeypatch.setattr(doctor, "_output", lambda *command: None)
    assert doctor._nvlinks().startswith("not known")


@pytest.mark.parametrize(
    ("operation", "told"),
    [("dispatch", "dispatch's rows differ"), ("combine", "combine's sums differ")],
)
def test_self_test_sees_one_wrong_bit(
    operation: str,
    told: str,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine()
    right = getattr(reference, operation)

    def wrong(*args: Any) -> Any:
        result = right(*args)
        rows = result[0] if isinstance(result, tuple) else result
        rows.reshape(-1).view(np.uint16)[-1] ^= 1
        return result

    monkeypatch.setattr(reference, operation, wrong)
    assert doctor.main([]) == 1
    assert told in _lines("broken", capsys.readouterr().out)[0]


def test_self_test_compares_the_call_in_one(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine()
    right = jax_ep.layout_and_dispatch

    def wrong(*args: Any, **options: Any) -> Any:
        layout, received = right(*args, **options)
        return layout, received._replace(tokens=-received.tokens)

    monkeypatch.setattr(jax_ep, "layout_and_dispatch", wrong)
    assert doctor.main([]) == 1
    told = "layout_and_dispatch's rows differ"
    assert told in _lines("broken", capsys.readouterr().out)[0]


def test_self_test_reports_an_error(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine()
    timeout = jax_ep.get_timeout()

    def fail(*args: Any) -> Any:
        raise RuntimeError("no rank came\nand more")

    monkeypatch.setattr(jax_ep, "dispatch", fail)
    assert doctor.main([]) == 1
    assert _lines("broken", capsys.readouterr().out)[0].endswith("RuntimeError: no rank came")
    assert jax_ep.get_timeout() == timeout


def test_gpus_without_peer_access(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe:
        @staticmethod
        def peer_access(first: int, second: int) -> bool:
            return (first, second) != (1, 0)

    monkeypatch.setattr(_native, "probe", Probe)
    (finding,) = doctor.check_peer_access([0, 1])
    assert (finding.state, "1->0" in finding.text) == ("info", True)
    assert doctor.check_peer_access([0, 2])[0].state == "ok"
    assert doctor.check_peer_access([0]) == []


def test_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What there is for it is told, and what is not is nothing to mend."""

    def load() -> Any:
        raise nvshmem.UnavailableError("built without it")

    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(doctor, "_RDMA_DEVICES", str(tmp_path))
    monkeypatch.setattr(nvshmem, "load", load)
    monkeypatch.setattr(doctor, "_version", lambda *names: None)
    for name in [name for name in os.environ if name.startswith("NVSHMEM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NVSHMEM_IB_SL", "3")
    monkeypatch.setenv(nvshmem.INTERFACE_VARIABLE, "=nosuch0")
    findings = doctor.check_network()
    assert {finding.state for finding in findings} == {"info"}
    texts = [finding.text for finding in findings]
    assert "network part (_nvshmem): built without it" in texts
    assert (
        "NVSHMEM's environment: NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME==nosuch0 NVSHMEM_IB_SL=3" in texts
    )
    assert any("is none of this machine's network interfaces" in text for text in texts)
    assert "RDMA devices: mlx5_0" in texts

    native = types.SimpleNamespace(built_version=lambda: "3.4.5", loaded_version=lambda: "3.8.0")
    monkeypatch.setattr(nvshmem, "load", lambda: native)
    texts = [finding.text for finding in doctor.check_network()]
    assert "network part (_nvshmem): built with NVSHMEM 3.4.5, loads with 3.8.0" in texts
