"""Reads what XLA has scheduled: which of the experts' GEMMs lie beside which call?

Of programs from compile_for_cuda.py, whose operations' names say to which micro-batch they belong.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence

BATCHES = ("first", "second")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^  (?:ROOT )?%([\w.\-]+) = .*? ([\w\-]+)\(")


@dataclasses.dataclass
class Call:
    """A call of ours.

    Attributes:
        op: "layout", "dispatch" and so on.
        batch: the micro-batch, one of BATCHES.
        is_async: whether it has a start and a done of its own.
        beside: micro-batches of the experts' GEMMs from start to done, in their order.
    """

    op: str
    batch: str
    is_async: bool
    beside: list[str] = dataclasses.field(default_factory=list)


def _computations(text: str) -> dict[str, list[str]]:
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            lines = computations.setdefault(found[1], [])
        elif _OPERATION.match(line):
            lines.append(line)
    return computations


def _batch(line: str) -> str:
    """Of the operation; "" if none or both are in its name."""
    found = re.search(r'op_name="(.*?)"', line)
    names = set(re.findall(r"\b(?:first|second)\b", found[1] if found else ""))
    return names.pop() if len(names) == 1 else ""


def read_calls(text: str, expert_sizes: Sequence[int]) -> list[list[Call]]:
    """Of each computation that makes any, the calls in the order of their starts.

    A GEMM is the experts' if its result has one of the sizes.
    """
    computations = _computations(text)

    def called(line: str) -> Iterator[str]:
        """Its line, and those of the computation that it calls."""
        yield line
        for name in re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", line):
            yield from computations.get(name, [])

    def target(line: str) -> str:
        found = re.search(r'custom_call_target="jax_ep_(\w+)"', "\n".join(called(line)))
        return found[1].removesuffix("_overlapped") if found else ""

    def experts_gemm(line: str) -> str:
        """Its micro-batch; "" for anything else."""
        for inner in called(line):
            if '"__cublas' in inner:
                sizes = re.findall(r"\d+", re.findall(r"\[(.*?)\]", inner)[0])
                return _batch(inner) if {*map(int, sizes)} & {*expert_sizes} else ""
        return ""

    inside_calls = set(re.findall(r" call-start\(.*? to_apply=%([\w.\-]+)", text))
    found = []
    for computation, lines in computations.items():
        if computation in inside_calls:
            continue
        calls: list[Call] = []
        in_flight: dict[str, Call] = {}
        for line in lines:
            name, operation = _OPERATION.match(line).groups()  # type: ignore[union-attr]
            if operation == "call-start":
                calls.append(Call(target(line), _batch(line), True))
                in_flight[name] = calls[-1]
            elif operation == "call-done":
                del in_flight[re.search(r"call-done\(%([\w.\-]+)", line)[1]]  # type: ignore[index]
            elif operation == "custom-call" and target(line):
                calls.append(Call(target(line), _batch(line), False))
            elif batch := experts_gemm(line):
                for call in in_flight.values():
                    call.beside.append(batch)
        if calls:
            found.append(calls)
    return found


def streams_of_calls(dump: pathlib.Path) -> list[str]:
    """The streams of a program's asynchronous custom calls, from XLA's dump of its thunks."""
    (path,) = dump.glob("*.thunk_sequence.txt")
    starts = r"kAsyncStart .*?stream=(\w+\[\d+\]).*\n\s*\d+: +kCustomCall"
    return re.findall(starts, path.read_text())
