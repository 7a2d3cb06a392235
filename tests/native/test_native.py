"""Builds parts of both backends with sanitizers, without JAX, and runs the tests in C++ on them."""

import functools
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence

import jax
import pytest

_TEST = pathlib.Path(__file__).with_name("rendezvous_test.cc")
_ROOT = _TEST.parents[2]
_CPU = _ROOT / "xla_ffi" / "cpu"
_SOURCES = [_TEST, *sorted(_CPU.glob("meet/*.cc")), *sorted(_CPU.glob("ops/*.cc"))]
# The programs run for seconds, so what counts is how long they compile: UBSan's checks, which -O0
# leaves as they are, take the optimiser four times as long as all else. Lines are enough for a
# report; all that a debugger wants takes twice as long. Each use of a pointer has the checks that
# are left out here, a third of all that is compiled: AddressSanitizer sees what null, vptr and
# object-size find, and run_sanitized.sh has them all, alignment too.
_FLAGS = ["-std=c++17", "-O0", "-g1", "-Wall", "-Wextra", "-ffp-contract=off", "-pthread"]
_UBSAN_FLAGS = ["-fno-sanitize=null,alignment,object-size,vptr"]

pytestmark = [pytest.mark.timeout(600)]

# Which sanitizer, and what rendezvous_test does for it to see: it must end the program.
_CASES = [
    ("thread", "race", "WARNING: ThreadSanitizer: data race"),
    ("address,undefined", "overflow", "ERROR: AddressSanitizer: heap-buffer-overflow"),
]


@functools.cache
def _compiler(sanitizer: str) -> list[str]:
    """g++, by ccache if that is here, if it can build and run programs with that sanitizer."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    with tempfile.TemporaryDirectory() as folder:
        source, program = pathlib.Path(folder, "empty.cc"), pathlib.Path(folder, "empty")
        source.write_text("int main() { return 0; }\n")
        build = [compiler, f"-fsanitize={sanitizer}", str(source), "-o", str(program)]
        for command in (build, [str(program)]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode != 0:
                reason = (done.stderr or done.stdout).strip().splitlines()[:1]
                pytest.skip(f"-fsanitize={sanitizer} does not work here: {reason}")
    ccache = shutil.which("ccache")
    return [compiler] if ccache is None else [ccache, compiler]


def _build(
    folder: pathlib.Path,
    sanitizer: str,
    sources: Sequence[pathlib.Path],
    system_headers: Sequence[pathlib.Path | str] = (),
) -> pathlib.Path:
    """Compiles the sources to a program, which is named as the first of them."""
    whole = _compile(folder, sanitizer, sources, system_headers)
    return _link(folder / sources[0].stem, sanitizer, [whole])


def _compile(
    folder: pathlib.Path,
    sanitizer: str,
    sources: Sequence[pathlib.Path],
    system_headers: Sequence[pathlib.Path | str] = (),
) -> pathlib.Path:
    """Compiles the sources as one, which takes half as long as each for itself."""
    flags = [*_FLAGS, f"-fsanitize={sanitizer}", f"-I{_ROOT}"]
    if "undefined" in sanitizer:
        flags += _UBSAN_FLAGS
    flags += [word for headers in system_headers for word in ("-isystem", str(headers))]
    whole = folder / f"all_of_{sources[0].name}"
    whole.write_text("".join(f'#include "{source}"\n' for source in sources))
    result = whole.with_suffix(".o")
    command = [*_compiler(sanitizer), *flags, "-c", whole, "-o", result]
    subprocess.run(command, check=True, timeout=300)
    return result


def _link(program: pathlib.Path, sanitizer: str, objects: Sequence[pathlib.Path]) -> pathlib.Path:
    compiler = _compiler(sanitizer)[-1]
    command = [compiler, f"-fsanitize={sanitizer}", "-pthread", *objects, "-o", program]
    subprocess.run(command, check=True, timeout=120)
    return program


@pytest.mark.parametrize(("sanitizer", "control", "finding"), _CASES, ids=["thread", "address"])
def test_rendezvous(tmp_path: pathlib.Path, sanitizer: str, control: str, finding: str) -> None:
    program = _build(tmp_path, sanitizer, _SOURCES)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        options = {
            "TSAN_OPTIONS": "halt_on_error=1",
            "ASAN_OPTIONS": "abort_on_error=0",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        }
        return subprocess.run(
            [program, *arguments],
            env={**os.environ, **options},
            capture_output=True,
            text=True,
            timeout=200,
        )

    done = run()
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = run(control)
    assert seen.returncode != 0, "the sanitizer did not see what was wrong on purpose"
    assert finding in seen.stderr


def test_plans(tmp_path: pathlib.Path) -> None:
    """How the kernels cut rows and share their memory: host code, without CUDA or a GPU."""
    program = _build(tmp_path, "address,undefined", [_TEST.with_name("plan_test.cc")])
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_exit_guard(tmp_path: pathlib.Path) -> None:
    """A process that has started NVSHMEM twice, and has not ended it, ends with its own status."""
    sources = [_TEST.with_name("exit_guard_test.cc"), _ROOT / "xla_ffi/network/exit_guard.cc"]
    program = _build(tmp_path, "address,undefined", sources)

    def end(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [program, *arguments], stdout=subprocess.PIPE, text=True, timeout=60, check=False
        )
        return done.returncode, done.stdout

    for num_starts in ("1", "2", "3"):
        assert end(num_starts, "ended", "guarded") == (7, "begun\n")
        assert end(num_starts, "open", "guarded") == (7, "begun\nended\n")
    assert end("1", "open", "not") == (7, "begun\nended\n")
    assert end("2", "open", "not")[0] == -signal.SIGABRT


def _cuda_headers() -> pathlib.Path:
    nvcc = shutil.which("nvcc")
    roots = [pathlib.Path("/usr/local/cuda")]
    if nvcc is not None:
        roots.insert(0, pathlib.Path(nvcc).resolve().parents[1])
    for root in roots:
        if (root / "include" / "cuda.h").exists():
            return root / "include"
    pytest.skip("CUDA's headers are not installed")


def test_host_of_cuda(tmp_path: pathlib.Path) -> None:
    """The CUDA backend's host side, against stand-ins for CUDA and XLA: needs headers, no GPU."""
    handlers = _ROOT / "xla_ffi" / "cuda"
    headers = [jax.ffi.include_dir(), _cuda_headers()]
    compiled = functools.partial(_compile, tmp_path, "address,undefined", system_headers=headers)
    common = compiled(
        sources=[
            _TEST.with_name("fake_cuda.cc"),
            *sorted((_ROOT / "xla_ffi" / "memory").glob("*.cc")),
            handlers / "call_site.cc",
            handlers / "network.cc",
            _ROOT / "xla_ffi" / "groups.cc",
        ]
    )
    programs = {
        "symmetric_memory_test": [
            "symmetric_memory_test.cc",
            "symmetric_processes_test.cc",
            "network_groups_test.cc",
        ],
        "handlers_test": ["handlers_test.cc"],
    }
    for name, tests in programs.items():
        sources = [_TEST.with_name(test) for test in tests]
        if name == "handlers_test":
            sources += [_ROOT / "xla_ffi" / "calls.cc", handlers / "checks.cc"]
            sources += sorted(handlers.glob("*_handler.cc"))
        program = _link(tmp_path / name, "address,undefined", [common, compiled(sources=sources)])
        # What is kept for the life of a process would count as a leak.
        options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
        done = subprocess.run(
            [program], env={**os.environ, **options}, capture_output=True, text=True, timeout=200
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
