"""The extension modules. `cuda` is None if this installation has no CUDA part."""

import importlib
import importlib.util
from typing import Any

from jax_ep import _cpu as cpu

__all__ = ["cpu", "cuda"]

# One that is installed but does not load is an error.
cuda: Any = None
if importlib.util.find_spec("jax_ep._cuda") is not None:
    cuda = importlib.import_module("jax_ep._cuda")
