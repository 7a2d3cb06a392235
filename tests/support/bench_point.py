"""What the tests of the benchmark measure: little, on some CPU devices, or a machine in numbers."""

from typing import Any

from jax_ep.bench.traffic import Point

RANKS = 4
POINT = Point(
    tokens=6,
    hidden=64,
    top_k=3,
    routing="zipf",
    capacity="tight",
    dtype="bfloat16",
    fp8="none",
    num_sms=None,
)


class FakeProbe:
    """A machine: W = 100 B/s on all 10 SMs, B = 1000 B/s, and rates per SM for rows."""

    def device(self, ordinal: int) -> dict[str, Any]:
        return {"num_sms": 10}

    def link_copy(
        self, first: int, second: int, rows: int, row_bytes: int, rounds: int, sms: int, n: int
    ) -> list[float]:
        rate = (100 if (first, second) == (0, 1) else 150) * min(1.0, sms / 4)
        return [rows * row_bytes / rate] * n

    def flag_hop(self, first: int, second: int, trips: int, n: int) -> list[float]:
        return [first + second + 0.5] * n

    def memory_copy(self, ordinal: int, num_bytes: int, n: int) -> list[float]:
        return [2 * num_bytes / (1000 + ordinal)] * n

    def row_copy(
        self, ordinal: int, rows: int, row_bytes: int, copies: int, rounds: int, sms: int, n: int
    ) -> list[float]:
        assert row_bytes % 16 == 0
        assert row_bytes <= 16384
        if copies == 0:
            return [rows * row_bytes / (sms * 30)] * n
        return [rows * row_bytes * copies / (sms * (20 + copies))] * n
