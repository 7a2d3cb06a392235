"""The extension modules. `cuda` and `probe` are None if this installation has no CUDA part."""

import importlib
import importlib.util
from typing import Any

from jax_ep import _cpu as cpu

__all__ = ["cpu", "cuda", "probe"]


def _load(name: str) -> Any:
    """A module of the CUDA part. One that is installed but does not load is an error."""
    if importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


cuda: Any = _load("jax_ep._cuda")
probe: Any = _load("jax_ep._probe")
