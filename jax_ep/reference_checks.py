"""The types that the specification in NumPy knows, and what it requires of its arguments."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
INT32 = np.dtype(np.int32)


def check_positive(name: str, value: int) -> None:
    """Raises ValueError unless ``value`` is at least 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``array`` has this shape."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def check_dtype(name: str, dtype: np.dtype[Any], *allowed: np.dtype[Any]) -> None:
    """Raises TypeError unless ``dtype`` is one of those allowed."""
    if dtype not in allowed:
        names = list(dict.fromkeys(str(dtype) for dtype in allowed))
        listed = " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
        raise TypeError(f"{name} must be {listed}, got {dtype}")
