"""What a process says of a network before others are asked: options, environment, what is there."""

import socket
import subprocess
import sys
from typing import Any

import pytest

import jax_ep
from jax_ep import environment, nvshmem


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_EP_NETWORK", raising=False)
    assert environment.network() is None
    for text, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("JAX_EP_NETWORK", text)
        assert environment.network() is expected
    monkeypatch.setenv("JAX_EP_NETWORK", "yes")
    with pytest.raises(ValueError, match="JAX_EP_NETWORK must be 0 or 1; got 'yes'"):
        environment.network()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"network": 1}, TypeError, "network must be a bool or None; got 1"),
        ({"heap_bytes": 0}, ValueError, "heap_bytes must be at least 1; got 0"),
        ({"heap_bytes": 1.5}, TypeError, "heap_bytes must be an integer; got 1.5"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jax_ep.initialize(**options)


def test_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVSHMEM would end the process where it finds none."""
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    assert all(map(nvshmem.has_interface, ("eth", "eth0", "=eth0", "ib,lo", "^eth", "^=lo")))
    assert not any(map(nvshmem.has_interface, ("ib", "=eth", "=ib,eth", "^lo,eth", "^=lo,eth0")))
    monkeypatch.setenv("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "=ib0")
    monkeypatch.setattr(nvshmem, "load", lambda: pytest.fail("it is not asked for"))
    offer = nvshmem.offer(True, False, [0], None)
    assert "!no network interface is as NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME=ib0 says" not in offer
    assert "!no network interface is as NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME==ib0 says" in offer


def test_what_calls_have_of_the_heap() -> None:
    """As NVSHMEM reads its variable."""
    for heap, num_bytes in (
        ("default", 3 << 28),
        ("4096", 3072),
        ("1g", 3 << 28),
        ("1.5K", 1152),
        (".5M", 3 << 17),
    ):
        assert nvshmem.region_bytes(heap) == num_bytes
    for heap in ("", "1X", "-1", "G", "1e9"):
        with pytest.raises(
            nvshmem.UnavailableError, match="NVSHMEM_SYMMETRIC_SIZE must be a number of bytes"
        ):
            nvshmem.region_bytes(heap)


class Native:
    """A module on a GPU with a gibibyte left."""

    def free_bytes(self, ordinal: int) -> int:
        assert ordinal == 3
        return 1 << 30

    def bus_id(self, ordinal: int) -> str:
        return f"bus{ordinal}"

    def loaded_version(self) -> str:
        return "3.4.5"


@pytest.mark.parametrize(
    ("heap", "told"),
    [
        (None, "default 1073741824 a-host/bus3 NVSHMEM 3.4.5"),
        ("1 G", "1G 1073741824 a-host/bus3 NVSHMEM 3.4.5"),
        ("much", "much 0  !NVSHMEM_SYMMETRIC_SIZE must be a number of bytes"),
    ],
)
def test_a_heap_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, heap: str | None, told: str
) -> None:
    """It is known before NVSHMEM starts, which could not be tried again."""
    monkeypatch.setattr(nvshmem, "load", Native)
    monkeypatch.setattr(socket, "gethostname", lambda: "a-host")
    monkeypatch.delenv("NVSHMEM_SYMMETRIC_SIZE", raising=False)
    if heap is not None:
        monkeypatch.setenv("NVSHMEM_SYMMETRIC_SIZE", heap)
    assert nvshmem.offer(None, True, [3], None).startswith(f"None {told}")


def test_heaps_that_do_not_fit() -> None:
    """Processes that share a GPU, in tests, all see the same memory left."""
    gibibyte, gpus = str(1 << 30), ["a/bus0", "a/bus1", "b/bus0"]
    assert nvshmem._without_room(3 * ["1G"], 3 * [gibibyte], gpus) == []
    assert nvshmem._without_room(["1G", "1025M"], 2 * [gibibyte], gpus[:2]) == [
        "process 1: its GPU has 1073741824 bytes left, but NVSHMEM's heap takes 1074790400: leave "
        "it memory by a smaller XLA_PYTHON_CLIENT_MEM_FRACTION, or pass heap_bytes"
    ]
    shared = nvshmem._without_room(3 * ["513M"], 3 * [gibibyte], ["a/bus0", "a/bus1", "a/bus0"])
    assert [text.split(":")[0] for text in shared] == ["process 0", "process 2"]


def test_a_build_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvshmem, "_MODULE", "jax_ep._not_built")
    with pytest.raises(nvshmem.UnavailableError, match="was built without NVSHMEM"):
        nvshmem.load()


USED_WRONGLY = """
from jax_ep import nvshmem
native = nvshmem.load()
identifier = native.unique_id()
def error_of(call):
    try:
        call()
    except RuntimeError as error:
        print(error)
def end(call):
    assert call.wait(30)
    return call.result()
error_of(lambda: end(native.start(identifier[1:], 0, 1, 0, 1 << 20, False)))
error_of(lambda: end(native.check_links(1.0)))
error_of(native.mapped_peers)
error_of(lambda: end(native.start(identifier, 0, 1, 1000, 1 << 20, False)))
end(native.finalize())
print("ALIVE")
"""


def test_native_module_raises() -> None:
    """Where NVSHMEM would call exit(); in a process of its own for that reason."""
    try:
        nvshmem.load()
    except nvshmem.UnavailableError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-c", USED_WRONGLY], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "jax_ep: NVSHMEM's unique id has 128 bytes; got 127"
    assert lines[1:3] == ["jax_ep: NVSHMEM is not running"] * 2
    assert lines[3].startswith("jax_ep: cudaSetDevice 1000: ")
    assert lines[4:] == ["ALIVE"]
