"""What the handlers do before they touch a device, in C++ and against Python."""

import itertools
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from jax_ep import group

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SOURCES = ("calls.cc", "cuda/checks.cc", "groups.cc")

Members = NDArray[np.int64]


def devices(num_processes: int, num_devices: int, ids_per_process: int) -> Members:
    """Members (``process << 32 | id``) as JAX numbers the devices of a job."""
    process = np.repeat(np.arange(num_processes, dtype=np.int64), num_devices)
    local = np.tile(np.arange(num_devices, dtype=np.int64), num_processes)
    return process << 32 | (process * ids_per_process + local)


def regular_groupings() -> list[tuple[Members, int]]:
    """(members, number of ranks) on meshes as they are made: processes end where an axis may."""
    found = []
    for job in (devices(1, 32, 32), devices(4, 8, 8), devices(32, 1, 1), devices(8, 4, 131072)):
        for shape in ((32,), (2, 16), (8, 4), (2, 4, 4), (4, 4, 2)):
            # Any axes as ranks, in any order, some of them backwards.
            for order in itertools.permutations(range(len(shape))):
                mesh = job.reshape(shape).transpose(order)
                for backwards in (False, True):
                    mesh = np.flip(mesh, -1) if backwards else mesh
                    for num_axes in range(1, len(shape) + 1):
                        num_ranks = int(np.prod(mesh.shape[-num_axes:]))
                        found.append((mesh.reshape(-1), num_ranks))
    return found


def irregular_groupings() -> list[tuple[Members, int]]:
    rng = np.random.default_rng(50)
    found = [(rng.permutation(devices(3, 8, 8)), 8), (devices(1, 8, 8)[[6, 1, 4]], 3)]
    # Hosts in any order, devices of each in order; and the other way round.
    hosts = devices(16, 8, 8).reshape(16, 8)
    found.append((hosts[rng.permutation(16)].reshape(-1), 8))
    found.append((hosts[:, rng.permutation(8)].reshape(-1), 8))
    # Processes of six devices along axes of four and three.
    found.append((devices(4, 6, 6).reshape(2, 3, 4).transpose(1, 0, 2).reshape(-1), 8))
    found.append((np.array([7], np.int64), 1))
    found.append((np.array([5, 3], np.int64), 2))
    return found


def check_radix(members: Members) -> tuple[int, ...]:
    bases, sizes, strides = group.mixed_radix(members)
    numbers = np.array(bases)
    for size, stride in zip(sizes, strides, strict=True):
        numbers = (numbers[:, None] + stride * np.arange(size)).reshape(-1)
    np.testing.assert_array_equal(numbers, members)
    return len(bases), len(sizes)


def test_regular_meshes_have_one_base() -> None:
    for members, _ in regular_groupings():
        num_bases, num_sizes = check_radix(members)
        assert num_bases == 1
        assert num_sizes <= 4  # three axes, one of them split where processes meet
    for members, _ in irregular_groupings():
        check_radix(members)
    hosts_in_any_order = irregular_groupings()[2][0]
    assert check_radix(hosts_in_any_order) == (16, 1)


def test_size_does_not_grow_with_the_mesh() -> None:
    for num_hosts in (2, 32, 2048):
        mesh = devices(num_hosts, 8, 8).reshape(num_hosts // 2, 16)
        assert check_radix(mesh.reshape(-1)) == (1, 2)
        assert check_radix(mesh.transpose().reshape(-1)) == ((1, 3) if num_hosts > 2 else (1, 2))


@pytest.mark.timeout(300)
def test_in_cpp(tmp_path: pathlib.Path) -> None:
    """Groups, hashes and the kernels' demands: calls_test.cc."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = tmp_path / "calls_test"
    command = [compiler, "-std=c++17", "-O0", "-g1", "-Wall", "-Wextra", f"-I{_ROOT}"]
    command += ["-isystem", jax.ffi.include_dir(), "-o", str(program)]
    command += [str(pathlib.Path(__file__).with_name("calls_test.cc"))]
    command += [str(_ROOT / "xla_ffi" / name) for name in _SOURCES]
    subprocess.run(command, check=True, timeout=200)
    lines = []
    large = devices(2048, 8, 8).reshape(2048, 2, 4).transpose(1, 0, 2).reshape(-1)
    for members, num_ranks in [*regular_groupings(), *irregular_groupings(), (large, 64)]:
        lists = [*group.mixed_radix(members), members.tolist()]
        numbers = [num_ranks, *itertools.chain(*([len(x), *x] for x in lists))]
        lines.append(" ".join(map(str, numbers)) + "\n")
    done = subprocess.run(
        [program], input="".join(lines), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(lines)} groupings: right\n"
