"""The processes that run the benchmark together: what each of them measures, all take alike.

They must compile the same programs and go the same way, so what a process decides by what it has
seen (how many calls fit into its memory, which operation failed) they decide together.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jax_ep import compat
from jax_ep.join import Attempt

_CALLER = "jax_ep.bench.cli.main"
Result = TypeVar("Result")

_TIMEOUT = 300.0  # seconds: a process may still compile what another has in its cache


class OtherFailedError(RuntimeError):
    """Another process could not do what this one did, or has not come."""


class Processes:
    """This process, and those that measure beside it. Collective, as its methods are.

    With ``jax.distributed`` each process of the job makes one; without there is this process alone.

    Attributes:
        number: of this process.
        count: of the job.
    """

    def __init__(self) -> None:
        self.number, self.count = compat.process_index(), compat.process_count()
        self._attempt: Attempt | None = None
        if self.count > 1:
            self._attempt = Attempt(compat.coordination_client(), _TIMEOUT, _CALLER)
            self._attempt.join("")

    def exchange(self, value: Any) -> list[Any]:
        """What each process gives, by process: anything that JSON can say.

        Raises:
            OtherFailedError: a process has told of a failure instead, or does not come.
        """
        if self._attempt is None:
            return [value]
        try:
            told = self._attempt.exchange(json.dumps(value))
        except RuntimeError as error:
            raise OtherFailedError(str(error)) from error
        return [json.loads(text) for text in told]

    def least(self, value: int) -> int:
        """The least of what the processes give."""
        return int(min(self.exchange(value)))

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """Of each repeat the seconds of the process that took longest."""
        return [max(repeat) for repeat in zip(*self.exchange(list(seconds)), strict=True)]

    def together(self, work: Callable[[], Result], errors: tuple[type[Exception], ...]) -> Result:
        """What ``work`` gives; if one of ``errors`` ends it in one process, it fails in all.

        None leaves before all have come to an end of it, which may be a wait for one that failed.
        """
        try:
            result = work()
            self.exchange("done")
        except errors as error:
            if self._attempt is not None and not isinstance(error, OtherFailedError):
                self._attempt.tell_failure(error)  # at the others' next exchange
            self.exchange("failed")
            raise
        return result
