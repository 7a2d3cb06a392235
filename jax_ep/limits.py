"""What one call may be: sizes beyond which its counters, or the CUDA kernels, cannot go.

The numbers are those of cuda/core/limits.h, cuda/memory/slots.h and cuda/network/region.h.
"""

from jax_ep import _cpu

_LIMITS = _cpu.limits()
MAX_ROWS = _LIMITS["max_rows"]  # of a group with padding, and of a capacity
SCALE_BLOCK = _LIMITS["scale_block"]  # channels that share a scale, where dispatch quantises
MAX_WEIGHTED_ROW_BYTES = _LIMITS["cuda_weighted_row_bytes"]  # that one call forms gradients of

DEFAULT_SLOT_BYTES = _LIMITS["cuda_default_slot_bytes"]  # of each device, where slots are on
SLOT_BYTES_PER_DEVICE = _LIMITS["cuda_slot_bytes_per_device"]  # of the job; with less no call fits

MAX_NETWORK_RANKS = _LIMITS["network_ranks"]  # of a group across nodes
MAX_COMBINE_NODES = _LIMITS["network_combine_nodes"]

# SMs of a call that runs beside others. By default as many as keep a wire full that eight fill; at
# most so many that on the smallest Hopper GPU (78) a kernel of XLA's that waits for its peers, as a
# call does, still finds room: if each had some of its blocks on an SM, neither would end.
OVERLAP_SMS = 24
MAX_OVERLAP_SMS = 64


def may_fit_slots(*, num_ranks: int, num_tokens: int, top_k: int) -> bool:
    """Whether slots, if they are large enough, take a call for CUDA."""
    num_ids = num_tokens * top_k
    return (
        num_tokens <= _LIMITS["cuda_slot_tokens"]
        and num_ids <= _LIMITS["cuda_slot_ids"]
        and num_ranks * num_ids <= _LIMITS["cuda_slot_group_ids"]
    )


def num_block_scales(num_channels: int) -> int:
    """S of rows with this many channels that dispatch quantises; the last block may be shorter."""
    return -(-num_channels // SCALE_BLOCK)


def check_experts(where: str, num_experts: int, num_ranks: int, ranks: str) -> None:
    """Every rank has as many experts; ``ranks`` names them, for the message.

    Raises:
        ValueError: some would have more.
    """
    missing = -num_experts % num_ranks
    if num_experts < num_ranks:
        raise ValueError(
            f"{where}: num_experts must be a multiple of {ranks}; got {num_experts}. It is the "
            "width of the router, the experts of the whole group, not those of one rank"
        )
    if missing:
        raise ValueError(
            f"{where}: num_experts must be a multiple of {ranks}; got {num_experts}. Pad the "
            f"experts: pass num_experts={num_experts + missing} and append {missing} to their "
            f"weights, as jnp.pad(w, ((0, {missing}), (0, 0), (0, 0))) does. The router and its "
            "ids stay as they are: no token chooses the added ones"
        )


def check_rows(
    where: str,
    *,
    num_ranks: int,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    expert_alignment: int,
) -> None:
    """The rows of a whole group, with all padding that its experts could get, fit in int32.

    Raises:
        ValueError: they do not.
    """
    num_rows = num_ranks * num_tokens * top_k + num_experts * expert_alignment
    if num_rows > MAX_ROWS:
        raise ValueError(
            f"{where}: rows are counted in int32: ranks * tokens * k + num_experts * "
            f"expert_alignment must be at most {MAX_ROWS}; got {num_ranks} * {num_tokens} * "
            f"{top_k} + {num_experts} * {expert_alignment} = {num_rows}. Split the tokens of "
            "topk_idx into several calls, or lower expert_alignment"
        )


def check_capacity(where: str, capacity: int, num_local_experts: int | None = None) -> None:
    """Rows are numbered in int32.

    Args:
        where: the verb, for the message.
        capacity: C.
        num_local_experts: L, if C is as many times an expert's room.

    Raises:
        ValueError: some could not be.
    """
    if capacity <= MAX_ROWS:
        return
    if num_local_experts is None:
        name, rows, got = "capacity", "capacity", f"{capacity}"
    else:
        name, rows = "expert_capacity", "experts per rank * expert_capacity"
        got = f"{num_local_experts} * {capacity // num_local_experts} = {capacity}"
    raise ValueError(
        f"{where}: rows are counted in int32: {rows} must be at most {MAX_ROWS}; got {got}. "
        f"jax_ep.{name} computes one from the number of tokens"
    )


def check_overlap(where: str, name: str, num_sms: int) -> None:
    """Calls with ``overlap`` leave SMs to others.

    Raises:
        ValueError: ``num_sms``, of this name, is 0, which is all, or too many.
    """
    if not 1 <= num_sms <= MAX_OVERLAP_SMS:
        raise ValueError(
            f"{where}: with overlap=True {name} must be at least 1 and at most {MAX_OVERLAP_SMS}, "
            f"so that what runs beside has SMs too; got {num_sms}"
        )


def check_cuda(
    where: str,
    *,
    num_ranks: int,
    num_tokens: int,
    top_k: int,
    num_sms: int,
    num_experts: int | None = None,
    num_fp8_channels: int | None = None,
    scaled_row_bytes: int | None = None,
) -> None:
    """What the CUDA kernels take, whatever the machine: also where there is none.

    Args:
        where: the verb, for the message.
        num_ranks: R.
        num_tokens: T.
        top_k: K.
        num_sms: of a call that moves rows; 0 is all of them, a number that is not known here.
        num_experts: E, of a layout.
        num_fp8_channels: H, of rows that dispatch quantises.
        scaled_row_bytes: of a row of x with the scales that it comes with.

    Raises:
        ValueError: a size is beyond a limit.
    """
    most_tokens = _LIMITS["cuda_tokens_per_sm"] * num_sms
    for what, value, most, remedy in (
        (
            "the group's ranks",
            num_ranks,
            _LIMITS["cuda_ranks"],
            "Make the mesh axes of axis_name smaller",
        ),
        (
            "k, the second axis of topk_idx,",
            top_k,
            _LIMITS["cuda_top_k"],
            "Make a layout for each part of topk_idx's columns, and add what combine returns",
        ),
        (
            "num_experts",
            num_experts,
            _LIMITS["cuda_experts"],
            "Make a layout for each part of the experts, with -1 for the others' ids, and add what "
            "combine returns",
        ),
        (
            "H of fp8 rows",
            num_fp8_channels,
            _LIMITS["cuda_fp8_channels"],
            "Dispatch x without fp8, or in parts of its channels",
        ),
        (
            "the bytes of a row of x with its scales",
            scaled_row_bytes,
            _LIMITS["cuda_scaled_row_bytes"],
            "Dispatch the scales on their own, as rows, or x in parts of its channels",
        ),
        (
            f"the tokens of a call with num_sms = {num_sms}",
            num_tokens if num_sms else None,
            most_tokens,
            "Split them into several calls, or raise num_sms",
        ),
    ):
        if value is not None and value > most:
            raise ValueError(
                f"{where}: for CUDA {what} must be at most {most}; got {value}. {remedy}"
            )
