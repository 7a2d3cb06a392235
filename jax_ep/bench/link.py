"""The machine's limits, measured in the same run: link, device memory, and the time of a flag."""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from jax_ep.bench.traffic import Movement

_REPEATS = 9
_LINK_ROW_BYTES = 14336
_LINK_ROWS = 9362  # 128 MiB
_COPY_BYTES = 1 << 29
_MOVED_PER_LAUNCH = 1 << 31  # bytes in one timed launch, so that launching does not count
_ROUND_TRIPS = 1000


def _rate(num_bytes: float, seconds: Sequence[float]) -> float:
    return num_bytes / statistics.median(seconds)


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """What the GPUs of one process can do at most.

    Attributes:
        probe: the module ``jax_ep._probe``.
        ordinals: CUDA device of each rank.
        num_sms: SMs of a device.
        wire_bytes_per_s: W, per direction while both directions are busy, rows pushed by bulk
            copies from all SMs: the slowest pair's. None with one device.
        pairs: W of each pair, by its two ordinals.
        flag_hop_s: seconds until a spinning thread sees a flag that a peer wrote, the slowest
            pair's. None with one device.
        memory_bytes_per_s: B, bytes read plus bytes written by a copy inside a device, the slowest
            device's.
    """

    probe: Any
    ordinals: tuple[int, ...]
    num_sms: int
    wire_bytes_per_s: float | None
    pairs: dict[tuple[int, int], float]
    flag_hop_s: float | None
    memory_bytes_per_s: float

    @functools.cache  # noqa: B019 - one Link lives as long as the process
    def wire_on(self, num_sms: int) -> float | None:
        """W with ``num_sms`` SMs on each side."""
        rates = [_link_rate(self.probe, pair, num_sms) for pair in self.pairs]
        return min(rates, default=None)

    def stored_on(self, num_sms: int, copies: int, row_bytes: int) -> float:
        """Bytes stored per second by ``num_sms`` SMs in their own device's memory.

        Each row is loaded once and stored ``copies`` times.
        """
        return copies * self._rows_on(num_sms, copies, row_bytes)

    def read_on(self, num_sms: int, row_bytes: int) -> float:
        """Bytes read per second by ``num_sms`` SMs from their own device's memory.

        Rows go to shared memory by bulk copies, and nowhere else.
        """
        return self._rows_on(num_sms, 0, row_bytes)

    @functools.cache  # noqa: B019
    def _rows_on(self, num_sms: int, copies: int, row_bytes: int) -> float:
        """Bytes loaded per second by ``num_sms`` SMs that store each row ``copies`` times."""
        piece = _piece(row_bytes)
        passes = max(1, copies)  # over the memory, of what is loaded or stored
        num_rows = max(1, _COPY_BYTES // passes // piece)
        moved = num_rows * piece * passes
        seconds = self.probe.row_copy(
            self.ordinals[0],
            num_rows,
            piece,
            copies,
            max(1, _MOVED_PER_LAUNCH // moved),
            num_sms,
            _REPEATS,
        )
        return _rate(num_rows * piece, seconds)

    def bound(self, movements: Sequence[Movement], num_sms: int | None, row_bytes: int) -> float:
        """Seconds that the movements take at least, one after the other.

        Each: the largest of its wire bytes over W and its memory bytes over B; with ``num_sms``
        also of the bytes that so many SMs have to read over the rate at which they only read, and
        of those that they have to store over the rate at which they store what they have read.
        The two are not added: an SM reads 109 GB/s and stores 60 GB/s (measured on H200, by
        ``probe.row_copy`` with 0 and with 8 copies a row), and copies 50 GB/s each way at once,
        more than if its reads had to wait for its stores.
        """
        return sum(self._bound(m, num_sms, row_bytes) for m in movements)

    def _bound(self, movement: Movement, num_sms: int | None, row_bytes: int) -> float:
        times = [movement.memory_bytes / self.memory_bytes_per_s]
        if self.wire_bytes_per_s is not None:
            times.append(movement.wire_bytes / self.wire_bytes_per_s)
        if num_sms is not None and movement.read_bytes:
            times.append(movement.read_bytes / self.read_on(num_sms, row_bytes))
        if num_sms is not None and movement.stored_bytes:
            rate = self.stored_on(num_sms, movement.copies, row_bytes)
            times.append(movement.stored_bytes / rate)
        return max(times)

    def as_json(self, num_sms: Sequence[int]) -> dict[str, Any]:
        """The figures, in bytes, seconds and bytes per second; also for these SM counts."""
        return {
            "wire_bytes_per_s": self.wire_bytes_per_s,
            "pairs": {f"{a}-{b}": rate for (a, b), rate in self.pairs.items()},
            "flag_hop_s": self.flag_hop_s,
            "memory_bytes_per_s": self.memory_bytes_per_s,
            "num_sms": self.num_sms,
            "on_sms": {
                count: {
                    "wire_bytes_per_s": self.wire_on(count),
                    "stored_bytes_per_s": self.stored_on(count, 1, _LINK_ROW_BYTES),
                    "read_bytes_per_s": self.read_on(count, _LINK_ROW_BYTES),
                }
                for count in num_sms
            },
        }

    def lines(self, num_sms: Sequence[int]) -> list[str]:
        """The figures as text; W, copies and reads for these SM counts too."""
        lines = []
        if self.wire_bytes_per_s is None:
            lines.append("W: n/a, there is one GPU in a process; bounds are those of its memory")
        else:
            lines.append(
                f"W = {self.wire_bytes_per_s / 1e9:.1f} GB/s per direction, both at once, "
                f"{self.num_sms} SMs push" + (" (slowest pair)" if len(self.pairs) > 1 else "")
            )
            lines.append(f"flag hop = {(self.flag_hop_s or 0) * 1e6:.2f} us")
        lines.append(f"B = {self.memory_bytes_per_s / 1e12:.2f} TB/s, device copy, read + write")
        for count in num_sms:
            wire = self.wire_on(count)
            text = "n/a" if wire is None else f"{wire / 1e9:.1f} GB/s"
            lines.append(
                f"{count} SMs: W = {text}, row copy "
                f"{self.stored_on(count, 1, _LINK_ROW_BYTES) / 1e12:.2f} TB/s stored, "
                f"{self.read_on(count, _LINK_ROW_BYTES) / 1e12:.2f} TB/s only read"
            )
        return lines


def _piece(row_bytes: int) -> int:
    """A row, or the largest part of it that the copy kernel takes: at most 16 KB in equal parts."""
    parts = -(-row_bytes // 16384)
    return -(-row_bytes // parts // 16) * 16


def _link_rate(probe: Any, pair: tuple[int, int], num_sms: int) -> float:
    seconds = probe.link_copy(
        *pair, _LINK_ROWS, _LINK_ROW_BYTES, 16 if num_sms >= 4 else 4, num_sms, _REPEATS
    )
    return _rate(_LINK_ROWS * _LINK_ROW_BYTES, seconds)


def measure_link(probe: Any, ordinals: Sequence[int]) -> Link:
    """Measures W between each pair, the flag hop, and B.

    Args:
        probe: the module ``jax_ep._probe``.
        ordinals: CUDA devices of this process, by rank.

    Raises:
        RuntimeError: a copy or a flag failed or timed out; the message names device and call.
    """
    num_sms = min(int(probe.device(ordinal)["num_sms"]) for ordinal in ordinals)
    all_pairs = list(itertools.combinations(ordinals, 2))
    pairs = {pair: _link_rate(probe, pair, num_sms) for pair in all_pairs}
    hops = [statistics.median(probe.flag_hop(*pair, _ROUND_TRIPS, _REPEATS)) for pair in all_pairs]
    copies = [
        _rate(2 * _COPY_BYTES, probe.memory_copy(ordinal, _COPY_BYTES, _REPEATS))
        for ordinal in ordinals
    ]
    return Link(
        probe=probe,
        ordinals=tuple(ordinals),
        num_sms=num_sms,
        wire_bytes_per_s=min(pairs.values(), default=None),
        pairs=pairs,
        flag_hop_s=max(hops, default=None),
        memory_bytes_per_s=min(copies),
    )
