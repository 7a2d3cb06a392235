"""Checks of arguments that several modules take."""

import argparse
import numbers
import operator

_LONGEST = 1e8  # seconds; fits 64-bit nanoseconds with room to add to a clock


def checked_seconds(what: str, value: float) -> float:
    """`value` as a float, if it is a time that can be waited; errors name it `what`."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{what} must be a number; got {value!r}")
    if not 0 < value <= _LONGEST:
        raise ValueError(f"{what} must be above 0 and at most {_LONGEST:g}; got {value}")
    return float(value)


def checked_bytes(what: str, value: int) -> int:
    """`value` as an int, if it is a size; errors name it `what`."""
    return _checked_int(what, value, 0)


def checked_count(what: str, value: int) -> int:
    """`value` as an int, if it counts something that is there; errors name it `what`."""
    return _checked_int(what, value, 1)


def _checked_int(what: str, value: int, least: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an integer; got {value!r}") from None
    if value < least:
        raise ValueError(f"{what} must be at least {least}; got {value}")
    return value


def positive_argument(text: str) -> int:
    """A type of argparse: an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value
