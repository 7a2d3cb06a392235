"""``python -m jax_ep.doctor``: what this installation has, what the machine has, and a self-test.

Prints one line a finding, and for each missing piece the command that supplies it. The exit code is
0 if everything that can work on this machine works, and 1 otherwise. What the hardware cannot do,
and what only other machines need, is told but does not count.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _native, nvshmem, reference

_COMPUTE_CAPABILITY = "9.0"  # what the CUDA kernels are compiled for: Hopper
_LEAST_NVCC = 13
_LEAST_DRIVER = 580  # of CUDA 13
_CPU_DEVICES = 8
_TIMEOUT = 10.0  # seconds that the self-test waits for a rank
_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
_RDMA_DEVICES = "/sys/class/infiniband"
_NVSHMEM = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")

_PIP = f"{shlex.quote(sys.executable)} -m pip install"
_BUILD_COMMAND = f"{_PIP} -e . -C cmake.define.JAX_EP_CUDA=ON"
# As in the extra cuda13: no older jax has run on GPUs. This one needs Python 3.12.
_LEAST_CUDA_JAX = (0, 11, 2)
_LEAST_CUDA_PYTHON = (3, 12)
_NVCC_COMMAND = "sudo apt-get install cuda-toolkit-13-0"
_DRIVER_COMMAND = f"sudo apt-get install nvidia-driver-{_LEAST_DRIVER}-server"

State = Literal["ok", "info", "missing", "broken"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: "ok"; "info" where nothing is wrong; "missing" or "broken" where something could
            work here and does not.
        text: what was found.
        command: what supplies the piece, if one is missing.
    """

    state: State
    text: str
    command: str | None = None


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as the driver or JAX names it; ``driver`` is None if only JAX was asked."""

    name: str
    compute_capability: str
    driver: str | None


def _output(*command: str) -> str | None:
    """What the program prints, or None if it is not there or fails."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout if finished.returncode == 0 else None


def _version(*distributions: str) -> str | None:
    """Name and version of the first of these packages that is installed."""
    for name in distributions:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _nvcc() -> tuple[str, int] | None:
    """Path and major version of the CUDA compiler that a build would find."""
    candidates = (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
    for path in filter(None, candidates):
        found = re.search(r"release (\d+)\.", _output(path, "--version") or "")
        if found:
            return path, int(found[1])
    return None


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _plugin_command() -> str:
    """What installs JAX's CUDA plugin, which must match jaxlib."""
    if sys.version_info < _LEAST_CUDA_PYTHON:
        python = f"python{_dotted(_LEAST_CUDA_PYTHON)}"
        return f"{python} -m venv .venv && .venv/bin/pip install -e '.[cuda13]'"
    if jax.__version_info__ < _LEAST_CUDA_JAX:
        return f"{_PIP} --upgrade 'jax[cuda13]>={_dotted(_LEAST_CUDA_JAX)}'"
    return f"{_PIP} 'jax[cuda13]=={jax.__version__}'"


def driver_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists."""
    fields = "name,compute_cap,driver_version"
    listed = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader") or ""
    gpus = []
    for line in listed.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3:
            gpus.append(Gpu(*parts))
    return gpus


def _jax_devices(platform: str) -> tuple[list[Any], str]:
    """JAX's devices of a platform in this process; if there are none, JAX's reason."""
    try:
        return list(jax.local_devices(backend=platform)), ""
    except RuntimeError as error:
        return [], _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _nvlinks() -> str:
    """Active NVLinks of each GPU, as nvidia-smi tells them."""
    status = _output("nvidia-smi", "nvlink", "--status")
    if status is None:
        return "not known (nvidia-smi nvlink --status gave nothing)"
    counts = []
    for gpu in re.split(r"(?m)^GPU ", status)[1:]:
        speeds = re.findall(r"Link \d+: ([\d.]+) GB/s", gpu)
        counts.append(f"{len(speeds)} x {speeds[0]} GB/s" if speeds else "none active")
    return "; ".join(f"GPU {i}: {count}" for i, count in enumerate(counts)) or "none"


def check_software() -> list[Finding]:
    """Versions of what jax_ep is built from and runs on."""
    import jaxlib.version

    findings = [
        Finding(
            "ok",
            f"jax_ep {jax_ep.__version__}, jax {jax.__version__}, jaxlib "
            f"{jaxlib.version.__version__}, Python {sys.version.split()[0]}",
        ),
        Finding("ok", "CPU part (_cpu): built"),
    ]
    if _native.cuda is not None:
        build = _native.cuda.build()
        architectures = build["architectures"].replace(";", ", sm_")
        text = f"CUDA part (_cuda): built with CUDA {build['toolkit']} for sm_{architectures}"
        findings.append(Finding("ok", text))
        text = "link probe (_probe), which the benchmark measures its bounds with"
        findings.append(
            Finding("ok", f"{text}: built")
            if _native.probe is not None
            else Finding("missing", f"{text}: not there, though _cuda is", _BUILD_COMMAND)
        )
    return findings


def check_machine(gpus: Sequence[Gpu]) -> list[Finding]:
    """What the machine has, and what is missing for its GPUs."""
    usable = [gpu for gpu in gpus if gpu.compute_capability == _COMPUTE_CAPABILITY]
    # Without a GPU that the kernels run on, nothing below is needed here.
    gap: State = "missing" if usable else "info"
    findings = []
    if not gpus:
        findings.append(Finding("info", "GPU: none; the CPU backend is what can work here"))
    for index, gpu in enumerate(gpus):
        text = f"GPU {index}: {gpu.name}, compute capability {gpu.compute_capability}"
        if gpu in usable:
            findings.append(Finding("ok", text))
        else:
            findings.append(
                Finding("info", f"{text}: the CUDA kernels need {_COMPUTE_CAPABILITY} (Hopper)")
            )
    driver = gpus[0].driver if gpus else None
    if driver is not None:
        new_enough = int(re.match(r"\d*", driver)[0] or 0) >= _LEAST_DRIVER  # type: ignore[index]
        findings.append(
            Finding("ok", f"driver {driver}")
            if new_enough
            else Finding(
                "broken" if usable else "info",
                f"driver {driver}: CUDA 13 needs {_LEAST_DRIVER} or newer",
                _DRIVER_COMMAND,
            )
        )
    if gpus:
        findings.append(Finding("info", f"NVLink: {_nvlinks()}"))

    plugin = _version(*_PLUGINS)
    findings.append(
        Finding("ok", f"JAX's CUDA plugin: {plugin}")
        if plugin
        else Finding(gap, "JAX's CUDA plugin: not installed", _plugin_command())
    )
    if gpus and jax.__version_info__ < _LEAST_CUDA_JAX:
        text = (
            f"jax {jax.__version__} on Python {_dotted(sys.version_info[:2])}: on GPUs jax_ep has "
            f"run with jax {_dotted(_LEAST_CUDA_JAX)} and newer, which need Python "
            f"{_dotted(_LEAST_CUDA_PYTHON)} or newer"
        )
        findings.append(Finding("info", text))
    nvcc = _nvcc()
    if _native.cuda is None:
        findings.append(
            Finding(
                gap,
                "CUDA part (_cuda, _probe): not built; in jax_ep's source directory run",
                _BUILD_COMMAND,
            )
        )
    if nvcc is not None and nvcc[1] >= _LEAST_NVCC:
        findings.append(Finding("ok", f"nvcc {nvcc[1]}: {nvcc[0]}"))
    else:
        what = "not found" if nvcc is None else f"{nvcc[0]} is of CUDA {nvcc[1]}"
        findings.append(
            Finding(
                gap if _native.cuda is None else "info",
                f"nvcc: {what}; building the CUDA part needs {_LEAST_NVCC}.0 or newer (from "
                "NVIDIA's package repository, https://developer.nvidia.com/cuda-downloads)",
                _NVCC_COMMAND,
            )
        )
    return findings


def check_network() -> list[Finding]:
    """What there is for a network between nodes, which nobody needs whose groups lie on one."""
    package = _version(*_NVSHMEM)
    findings = [
        Finding("ok", f"NVSHMEM: {package}")
        if package
        else Finding(
            "info",
            "NVSHMEM: not installed; only groups across nodes need it",
            f"{_PIP} {_NVSHMEM[0]}",
        )
    ]
    try:
        native = nvshmem.load()
    except nvshmem.UnavailableError as error:
        findings.append(Finding("info", f"network part (_nvshmem): {error}"))
    else:
        built, loaded = native.built_version(), native.loaded_version()
        text = f"network part (_nvshmem): built with NVSHMEM {built}, loads with {loaded}"
        findings.append(Finding("ok", text))
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("NVSHMEM_")]
    findings.append(Finding("info", f"NVSHMEM's environment: {' '.join(variables) or 'none'}"))
    wish = os.environ.get(nvshmem.INTERFACE_VARIABLE, "")
    if wish and not nvshmem.has_interface(wish):
        text = f"{nvshmem.INTERFACE_VARIABLE}={wish} is none of this machine's network interfaces"
        findings.append(Finding("info", text))
    nics = sorted(os.listdir(_RDMA_DEVICES)) if os.path.isdir(_RDMA_DEVICES) else []
    findings.append(Finding("info", f"RDMA devices: {', '.join(nics) or 'none'}"))
    return findings


def check_peer_access(ordinals: Sequence[int]) -> list[Finding]:
    """Whether the GPUs of this process reach each other's memory."""
    if len(ordinals) < 2:
        return []
    apart = [
        f"{a}->{b}"
        for a, b in itertools.permutations(ordinals, 2)
        if not _native.probe.peer_access(a, b)
    ]
    if apart:
        text = f"peer access: none for {', '.join(apart)}; these GPUs cannot be in one EP group"
        return [Finding("info", text)]
    return [Finding("ok", f"peer access: between all {len(ordinals)} GPUs")]


def self_test(devices: Sequence[Any]) -> str | None:
    """Runs the verbs across ``devices`` against the specification.

    Args:
        devices: of one platform, each a rank.

    Returns:
        What differs, or None if rows, weights and sums are bitwise those of ``jax_ep.reference``.

    Raises:
        Exception: whatever JAX or jax_ep raises; a rank that does not come is an error after
            10 s.
    """
    num_ranks, num_tokens, hidden, top_k, num_local = len(devices), 16, 128, 3, 4
    num_experts = num_ranks * num_local
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((num_ranks, num_tokens, num_experts)), axis=2)
    ids = order[:, :, :top_k].astype(np.int32)
    ids[0, 0, 0] = -1
    x = rng.standard_normal((num_ranks, num_tokens, hidden)).astype(jax.numpy.bfloat16)
    weights = rng.random((num_ranks, num_tokens, top_k), np.float32)

    def layer(x: jax.Array, ids: jax.Array, weights: jax.Array) -> tuple[jax.Array | None, ...]:
        options: dict[str, Any] = {
            "num_experts": num_experts,
            "axis_name": "ep",
            "expert_alignment": 8,
        }
        layout = jax_ep.make_layout(ids, **options)
        received = jax_ep.dispatch(x, layout, weights)
        _, in_one = jax_ep.layout_and_dispatch(x, ids, weights, **options)
        return (
            *received[:2],
            *in_one[:2],
            jax_ep.combine(received.tokens, layout, received.weights),
        )

    mesh = jax.make_mesh((num_ranks,), ("ep",), devices=devices)
    sharding = NamedSharding(mesh, P("ep"))
    operands = [jax.device_put(a.reshape(-1, a.shape[-1]), sharding) for a in (x, ids, weights)]
    before = jax_ep.get_timeout()
    jax_ep.set_timeout(_TIMEOUT)
    try:
        mapped = jax.shard_map(layer, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        results = [np.asarray(a) for a in jax.jit(mapped)(*operands)]
    finally:
        jax_ep.set_timeout(**before._asdict())

    layout = reference.make_layout(ids, num_experts=num_experts, expert_alignment=8)
    tokens, row_weights = reference.dispatch(x, layout, weights)
    combined = reference.combine(tokens, layout, row_weights)
    expected = {
        "dispatch's rows": tokens,
        "dispatch's weights": row_weights,
        "layout_and_dispatch's rows": tokens,
        "layout_and_dispatch's weights": row_weights,
        "combine's sums": combined,
    }
    for result, (name, right) in zip(results, expected.items(), strict=True):
        assert right is not None
        if result.tobytes() != right.reshape(result.shape).tobytes():
            return f"{name} differ from the specification"
    return None


def check_self_test(platform: str, devices: Sequence[Any]) -> Finding:
    """The self-test as a finding."""
    what = f"self-test on {len(devices)} {platform} device{'s' * (len(devices) > 1)}"
    start = time.perf_counter()
    try:
        difference = self_test(devices)
    except Exception as error:  # whatever it is, it belongs into the report
        return Finding("broken", f"{what}: {type(error).__name__}: {_first_line(error)}")
    if difference is not None:
        return Finding("broken", f"{what}: {difference}")
    seconds = time.perf_counter() - start
    return Finding("ok", f"{what}: equal to the specification, bit for bit ({seconds:.1f} s)")


def _check_jax_sees_gpus(reason: str) -> Finding:
    """Why JAX has no CUDA device although the machine has one that would do."""
    platforms = os.environ.get("JAX_PLATFORMS")
    text = "JAX does not use the GPUs"
    if platforms and "cuda" not in platforms:
        return Finding("missing", f"{text}: JAX_PLATFORMS={platforms}", "unset JAX_PLATFORMS")
    if _version(*_PLUGINS) is None:
        return Finding("missing", f"{text}: it has no CUDA plugin", _plugin_command())
    return Finding("broken", f"{text}: {reason}")


def examine() -> list[Finding]:
    """All findings. Creates JAX's clients."""
    findings = check_software()
    gpus = driver_gpus()
    jax_gpus, reason = _jax_devices("cuda") if gpus or _version(*_PLUGINS) else ([], "")
    if not gpus:  # no nvidia-smi, as in some containers
        gpus = [Gpu(d.device_kind, str(d.compute_capability), None) for d in jax_gpus]
    findings += check_machine(gpus)
    findings += check_network()
    cpus, no_cpu = _jax_devices("cpu")
    findings.append(
        check_self_test("CPU", cpus)
        if cpus
        else Finding("info", f"CPU backend: not tested, JAX hides it: {no_cpu}")
    )
    usable = [d for d in jax_gpus if str(d.compute_capability) == _COMPUTE_CAPABILITY]
    if usable and _native.cuda is not None:
        if _native.probe is not None:
            findings += check_peer_access([d.local_hardware_id for d in usable])
        findings.append(check_self_test("CUDA", usable))
    elif not jax_gpus and any(g.compute_capability == _COMPUTE_CAPABILITY for g in gpus):
        findings.append(_check_jax_sees_gpus(reason))
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the findings.

    Args:
        argv: the command line; None for this process's.

    Returns:
        0 if everything that can work here works, else 1.
    """
    argparse.ArgumentParser(
        prog="python -m jax_ep.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    # Before JAX creates its clients: virtual devices with threads for them, and no more of the
    # GPUs' memory than the self-test needs, since others may be at work there.
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}={_CPU_DEVICES}"
        os.environ["XLA_FLAGS"] = flags.strip()
    os.environ.setdefault("NPROC", str(2 * _CPU_DEVICES))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    findings = examine()
    for finding in findings:
        print(f"{finding.state:8}{finding.text}")
        if finding.command:
            print(f"{'':8}  $ {finding.command}")
    wrong = [f for f in findings if f.state in ("missing", "broken")]
    print(f"\n{len(wrong)} thing(s) to mend" if wrong else "\nall that can work here works")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
