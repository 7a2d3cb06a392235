"""Measures links and memory (xla_ffi/probe/link_probe.cc); absent without a CUDA build."""

from typing import Any

def device(ordinal: int) -> dict[str, Any]: ...
def peer_access(first: int, second: int) -> bool: ...
def memory_copy(ordinal: int, num_bytes: int, num_repeats: int) -> list[float]: ...
def row_copy(
    ordinal: int,
    num_rows: int,
    row_bytes: int,
    num_copies: int,
    num_rounds: int,
    num_sms: int,
    num_repeats: int,
) -> list[float]: ...
def link_copy(
    first: int,
    second: int,
    num_rows: int,
    row_bytes: int,
    num_rounds: int,
    num_sms: int,
    num_repeats: int,
) -> list[float]: ...
def flag_hop(first: int, second: int, num_round_trips: int, num_repeats: int) -> list[float]: ...
