"""How the processes of a job meet: rounds over JAX's coordination service."""

import contextlib
import secrets
import time
from typing import Any

from jax_ep import compat


class Attempt:
    """One attempt of all processes to join: a few rounds over the coordination service.

    Processes may have tried before, and not all of them as often. So an attempt of a process has a
    random name. Process 0 takes what each process offers at present, and tells each one, under the
    name of its attempt, whom it has met. From there on all keys carry the name of process 0's
    attempt, so nothing that an earlier one has left is ever read.

    ``caller`` is what messages say that a process has not called, or where it has failed; callers
    do not meet each other.
    """

    def __init__(self, client: Any, timeout: float, caller: str = "jax_ep.initialize") -> None:
        self._client = client
        self._timeout = timeout
        self._caller = caller
        self._name = secrets.token_hex(8)
        self._num_processes = compat.process_count()
        self._process = compat.process_index()
        self._keys = ""  # prefix of the rounds after join
        self._round = 0

    def join(self, value: str) -> list[str]:
        """Every process's ``value``, by process."""
        offer = f"{self._caller}/join/{self._process}"
        self._client.key_value_set(offer, f"{self._name} {value}", allow_overwrite=True)
        try:
            roster = self._gather() if self._process == 0 else self._await_roster()
        finally:
            with contextlib.suppress(Exception):  # the service may be gone
                self._client.key_value_delete(offer)
        lines = roster.split("\n")
        self._keys = f"{self._caller}/{lines[0].split(' ')[0]}"
        return [line.split(" ", 1)[1] for line in lines]

    def _gather(self) -> str:
        deadline = time.monotonic() + self._timeout
        offers: list[str] = []
        for process in range(self._num_processes):
            try:
                offers.append(self._get(f"{self._caller}/join/{process}", deadline))
            except TimeoutError as error:
                missing = self._missing([process], error)
                self._dismiss(f"!{missing}")
                raise missing from error
        for offer in offers:
            self._send_roster(offer, "\n".join(offers))
        return "\n".join(offers)

    def _dismiss(self, roster: str) -> None:
        """Tells those who have come why nobody is met; what they offer then is a new attempt."""
        offers = self._offers()
        with contextlib.suppress(Exception):
            for process in offers:
                self._client.key_value_delete(f"{self._caller}/join/{process}")
            for offer in offers.values():
                self._send_roster(offer, roster)

    def _send_roster(self, offer: str, roster: str) -> None:
        self._client.key_value_set(f"{self._caller}/roster/{offer.split(' ')[0]}", roster)

    def _await_roster(self) -> str:
        key = f"{self._caller}/roster/{self._name}"
        try:
            roster = self._get(key, time.monotonic() + self._timeout)
        except TimeoutError as error:
            absent = set(range(self._num_processes)) - {self._process} - self._offers().keys()
            try:  # if process 0 gives up just now, it removes the offers and then says why
                roster = self._get(key, time.monotonic() + 1)
            except TimeoutError:
                raise self._missing(sorted(absent) or [0], error) from error
        if roster.startswith("!"):
            raise RuntimeError(roster[1:])
        return roster

    def _offers(self) -> dict[int, str]:
        with contextlib.suppress(Exception):
            offers = self._client.key_value_dir_get(f"{self._caller}/join/")
            return {int(key.rsplit("/", 1)[1]): offer for key, offer in offers}
        return {}

    def _missing(self, processes: list[int], error: Exception) -> RuntimeError:
        which = "processes" if len(processes) > 1 else "process"
        return RuntimeError(
            f"{self._caller}: {which} {', '.join(map(str, processes))} of {self._num_processes} "
            f"did not call {self._caller}() within {self._timeout} s: {error}"
        )

    def exchange(self, value: str) -> list[str]:
        """Every process's ``value`` in this round, by process."""
        keys = self._publish("=" + value)
        deadline = time.monotonic() + self._timeout
        values = []
        for process in range(self._num_processes):
            try:
                got = self._get(f"{keys}/{process}", deadline)
            except TimeoutError as error:
                raise RuntimeError(
                    f"{self._caller}: process {process} of {self._num_processes} did not get as "
                    f"far within {self._timeout} s: {error}"
                ) from error
            if got.startswith("!"):
                raise self._failure(process, got)
            values.append(got[1:])
        return values

    def raise_failure(self) -> None:
        """Looks whether another process has failed before it came to the next round.

        Raises:
            RuntimeError: the same as ``exchange`` would, at once.
        """
        told: list[tuple[str, str]] = []
        with contextlib.suppress(Exception):  # nobody has told anything
            told = self._client.key_value_dir_get(f"{self._keys}/{self._round}/")
        for key, value in told:
            if value.startswith("!"):
                raise self._failure(int(key.rsplit("/", 1)[1]), value)

    def _failure(self, process: int, value: str) -> RuntimeError:
        return RuntimeError(f"{self._caller}: process {process} failed: {value[1:]}")

    def meet(self, name: str, timeout: float) -> list[int]:
        """The processes that do not come to this place, once in an attempt, within ``timeout``.

        If there are any, those who come later do not meet this one, but for who comes in the very
        moment.
        """
        keys, deadline = f"{self._keys}/{name}", time.monotonic() + timeout
        missing = []
        with contextlib.suppress(Exception):  # the service may be gone
            self._client.key_value_set(f"{keys}/{self._process}", "here")
        for process in range(self._num_processes):
            try:
                self._get(f"{keys}/{process}", deadline)
            except TimeoutError:
                missing.append(process)
        if missing:
            with contextlib.suppress(Exception):
                self._client.key_value_delete(f"{keys}/{self._process}")
        return missing

    def tell_left(self) -> None:
        """Says that this process takes part no more, for `have_left`."""
        with contextlib.suppress(Exception):  # the service may be gone
            self._client.key_value_set(f"{self._keys}/left/{self._process}", "left")

    def have_left(self) -> set[int]:
        """The processes that have said so."""
        with contextlib.suppress(Exception):  # likewise, or nobody has
            told = self._client.key_value_dir_get(f"{self._keys}/left/")
            return {int(key.rsplit("/", 1)[1]) for key, _ in told}
        return set()

    def tell_failure(self, error: BaseException) -> None:
        """Ends the others' wait in the next round."""
        if self._keys:
            with contextlib.suppress(Exception):
                self._publish(f"!{error or type(error).__name__}")

    def _publish(self, value: str) -> str:
        keys = f"{self._keys}/{self._round}"
        self._round += 1
        self._client.key_value_set(f"{keys}/{self._process}", value)
        return keys

    def _get(self, key: str, deadline: float) -> str:
        milliseconds = max(1, int((deadline - time.monotonic()) * 1000))
        try:
            return str(self._client.blocking_key_value_get(key, milliseconds))
        except Exception as error:  # the client's errors have no common type across versions
            raise TimeoutError(str(error)) from error
