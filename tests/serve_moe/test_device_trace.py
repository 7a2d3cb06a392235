"""What is read out of a trace of equal steps."""

import pytest
from serve_moe.device_trace import Kernel, summarise


def _steps(gaps: list[float]) -> list[Kernel]:
    """Steps of three kernels, 2 us of idling in each, and so many us before the next one."""
    kernels, now = [], 5e3
    for gap in [*gaps, 0]:
        for name, before, us in (
            ("void jax_ep::gpu::slots::dispatch", 0, 10),
            ("gemm", 2, 30),
            ("ncclDevKernel_SendRecv", -5, 8),  # on another stream: begins before the end
        ):
            begin = now + 1e3 * before
            now = max(now, begin + 1e3 * us)
            kernels.append(Kernel(name, begin, begin + 1e3 * us))
        now += 1e3 * gap
    return kernels


def test_gaps_and_communication_of_steps() -> None:
    summary = summarise(_steps([1, 3, 90, 2]), 5)
    assert (summary.kernels, summary.num_communication) == (3, 2)
    assert summary.step_us == pytest.approx((47 + 48) / 2)  # 45 us and a gap
    assert summary.span_us == pytest.approx(45)
    assert summary.gap_us == pytest.approx(2.5)
    assert summary.longest_gap_us == pytest.approx(90)
    assert summary.idle_us == pytest.approx(2)
    assert summary.communication_us == pytest.approx(18)


def test_what_is_not_equal_steps_is_no_summary() -> None:
    kernels = _steps([1, 3])
    for wrong, num_steps in ((kernels[1:], 3), (kernels, 2), (kernels[:3], 1), ([], 2)):
        with pytest.raises(ValueError, match="equal steps"):
            summarise(wrong, num_steps)
