"""MoE expert parallelism for JAX: dispatch and combine between the devices of a mesh axis.

Inside ``jax.shard_map``::

    layout = jax_ep.make_layout(topk_idx, num_experts=E, axis_name="ep", capacity=C)
    recv = jax_ep.dispatch(x, layout, topk_weights)
    y = experts(recv.tokens, recv.group_sizes)
    out = jax_ep.combine(y, layout, recv.weights)
"""

try:
    from jax_ep import _cpu as _cpu
except ImportError as error:
    raise ImportError(
        "jax_ep's compiled part is missing or does not load. In a source tree install with "
        "`pip install -e .` (a plain install is hidden by the tree while that is the current "
        f"directory): {error}"
    ) from error

from jax_ep import routing as routing
from jax_ep.api import Dispatched, combine, dispatch, layout_and_dispatch, make_layout, moe
from jax_ep.errors import check
from jax_ep.layout import Layout, capacity, expert_capacity
from jax_ep.routing import keep_heaviest
from jax_ep.runtime import finalize, initialize
from jax_ep.timeouts import Timeout, get_timeout, set_timeout

__version__ = "0.1.0"

__all__ = [
    "Dispatched",
    "Layout",
    "Timeout",
    "capacity",
    "check",
    "combine",
    "dispatch",
    "expert_capacity",
    "finalize",
    "get_timeout",
    "initialize",
    "keep_heaviest",
    "layout_and_dispatch",
    "make_layout",
    "moe",
    "routing",
    "set_timeout",
]
