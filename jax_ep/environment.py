"""The one reader of environment variables and of XLA's flags."""

import os
import pathlib
import re

from jax_ep._checks import checked_seconds

SCHEDULING_FLAG = "--xla_gpu_command_buffer_scheduling_mode"
STREAMS_FLAG = "--xla_gpu_experimental_enable_collective_multi_streaming"

_TIMEOUT = "JAX_EP_TIMEOUT"
_ARRIVAL_TIMEOUT = "JAX_EP_ARRIVAL_TIMEOUT"
_PROGRESS_TIMEOUT = "JAX_EP_PROGRESS_TIMEOUT"
_PATH = "JAX_EP_PATH"
_PATHS = ("direct", "staged")
_SLOTS = "JAX_EP_SLOTS"
_RANKS_PER_NODE = "JAX_EP_RANKS_PER_NODE"
_NETWORK = "JAX_EP_NETWORK"
_NETWORK_SLOTS = "JAX_EP_NETWORK_SLOTS"
_ORDERED_MODES = ("LHS", "SERIALIZE")  # the first is XLA's default


def timeouts() -> tuple[float | None, float | None]:
    """Seconds to wait for a rank's arrival and for its progress; None where nothing is said."""
    both = _seconds(_TIMEOUT)
    arrival, progress = _seconds(_ARRIVAL_TIMEOUT), _seconds(_PROGRESS_TIMEOUT)
    return both if arrival is None else arrival, both if progress is None else progress


def _seconds(variable: str) -> float | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        return checked_seconds(variable, float(text))
    except ValueError as error:
        raise ValueError(
            f"environment variable {variable} must be a number of seconds above 0; got {text!r}"
        ) from error


def path() -> str:
    """How rows reach peers: "direct" where they can map XLA's memory, or "staged"."""
    name = os.environ.get(_PATH, _PATHS[0])
    if name not in _PATHS:
        raise ValueError(
            f"environment variable {_PATH} must be one of {', '.join(_PATHS)}; got {name!r}"
        )
    return name


def has_slots() -> bool:
    """Whether GPUs have slots for small calls, where ``initialize`` does not say."""
    return _switch(_SLOTS, "1") == "1"


def network() -> bool | None:
    """Whether there is to be a network, where ``initialize`` does not say; None: as needed."""
    text = _switch(_NETWORK, None)
    return None if text is None else text == "1"


def network_slots() -> bool | None:
    """Whether small calls of groups across nodes go through slots; None: where they can."""
    text = _switch(_NETWORK_SLOTS, None)
    return None if text is None else text == "1"


def _switch(variable: str, default: str | None) -> str | None:
    text = os.environ.get(variable, default)
    if text not in ("0", "1", default):
        raise ValueError(f"environment variable {variable} must be 0 or 1; got {text!r}")
    return text


def ranks_per_node() -> int | None:
    """How many ranks of a group count as one node; None where their hosts say so."""
    text = os.environ.get(_RANKS_PER_NODE)
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"environment variable {_RANKS_PER_NODE} must be an integer above 0; got {text!r}"
        )
    return int(text)


def xla_flags() -> str:
    """What XLA takes as its flags: the variable's text, or that of the file which it names."""
    text = os.environ.get("XLA_FLAGS", "")
    if not text.strip() or text.lstrip().startswith("-"):
        return text
    try:
        return pathlib.Path(text).read_text()
    except OSError:
        return ""  # XLA ends the process over it


def command_buffers_keep_order(flags: str) -> bool:
    """Whether command buffers made under XLA's `flags` run a device's calls one after the other.

    The kernels need that, in the same order on all ranks: they wait for their peers, and share the
    device's control memory. Outside command buffers a device's stream sees to it. A mode that is
    not known to keep the order counts as one that does not.
    """
    mode = _last_value(SCHEDULING_FLAG, flags)
    return mode is None or mode in _ORDERED_MODES


def collectives_share_a_stream(flags: str) -> bool:
    """Whether XLA, under its `flags`, runs a device's collectives on one stream, in their order.

    Calls that overlap are among them, and need that as others need the device's one stream.
    """
    value = _last_value(STREAMS_FLAG, flags)
    return value is None or value.lower() in ("false", "0")


def _last_value(flag: str, flags: str) -> str | None:
    """What the last `flag` says, without quotes: "" without a value; None if it is not there."""
    values = re.findall(rf"""(?:^|\s){flag}(?:=("[^"]*"|'[^']*'|\S*)|(?=\s|$))""", flags)
    return values[-1].strip("\"'") if values else None
