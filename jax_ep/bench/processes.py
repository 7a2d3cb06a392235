"""The processes that run the benchmark together: what each of them measures, all take alike.

They must compile the same programs and go the same way, so what a process decides by what it has
seen (how many calls fit into its memory, which operation failed) they decide together.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax_ep
from jax_ep import compat
from jax_ep.join import Attempt

_CALLER = "jax_ep.bench.cli.main"
Result = TypeVar("Result")

# Seconds longer than a call waits for its peers: who fails in one must still find the others here.
# They may also compile what this process has in its cache.
_LONGER = 60.0


class OtherFailedError(RuntimeError):
    """Another process could not do what this one did."""


class OthersGoneError(Exception):
    """Another process does not come any more, so nothing more can be measured."""


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
            timeout = jax_ep.get_timeout().arrival + _LONGER
            self._attempt = Attempt(compat.coordination_client(), timeout, _CALLER)
            self._attempt.join("")

    def exchange(self, value: Any) -> list[Any]:
        """What each process gives, by process: anything that JSON can say.

        Raises:
            OtherFailedError: a process has told of a failure instead.
            OthersGoneError: a process does not come.
        """
        if self._attempt is None:
            return [value]
        try:
            told = self._attempt.exchange(json.dumps(value))
        except RuntimeError as error:
            is_late = isinstance(error.__cause__, TimeoutError)
            raise (OthersGoneError if is_late else OtherFailedError)(str(error)) from error
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
        Anything else that ends it in one process ends all of them.

        Raises:
            OthersGoneError: another process has ended so, or does not come.
        """
        try:
            result = work()
            self.exchange("done")
        except errors as error:
            if not isinstance(error, OtherFailedError):
                self._tell(error)  # at the others' next exchange
            try:
                self.exchange("failed")
            except OtherFailedError as gone:
                raise OthersGoneError(str(gone)) from error
            raise
        except BaseException as error:
            for _ in range(2):  # whatever the others exchange next, and that they have failed
                self._tell(error)
            raise
        return result

    def _tell(self, error: BaseException) -> None:
        if self._attempt is not None:
            self._attempt.tell_failure(error)

    def require_alike(self, settings: dict[str, Any]) -> None:
        """Checks that all processes have been told the same.

        Raises:
            ValueError: they have not; names what differs first, and what it is here and there.
        """
        for number, others in enumerate(self.exchange(settings)):
            for name, value in settings.items():
                if others[name] != value:
                    raise ValueError(
                        f"--{name.replace('_', '-')}: {value} in process {self.number}, but "
                        f"{others[name]} in process {number}: all must measure the same"
                    )
