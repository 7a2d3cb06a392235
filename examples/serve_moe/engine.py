"""Continuous batching: which sequence has which slot, and what runs next.

One thread starts the programs of steps.py, some of them ahead of the results that it fetches: a
step needs nothing of the host but the slots that end. A sequence's tokens depend on its own prompt,
sampling and seed alone: chunks of a prompt are cut and padded by its length, whatever else runs.
"""

import collections
import dataclasses
import threading
import time
import traceback
from collections.abc import Callable

import jax
import numpy as np
from serve_moe import steps
from serve_moe.metrics import Metrics
from serve_moe.processes import Leader

import jax_ep

_WATCH_SECONDS = 0.25


class QueueFullError(Exception):
    """More requests wait than may."""


class StoppedError(Exception):
    """The engine takes no requests: it has failed, or is told to end."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a sequence is continued; temperature 0 takes the likeliest token."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request in the engine.

    Attributes:
        prompt: its tokens.
        sampling: how it is continued.
        on_token: is given each new token, in the engine's thread.
        on_end: is given the reason, once: "stop" (an end token, which is not given to on_token),
            "length", "error", or what `Engine.cancel` was given.
    """

    prompt: list[int]
    sampling: Sampling
    on_token: Callable[[int], None]
    on_end: Callable[[str], None]
    submitted_at: float = dataclasses.field(default_factory=time.perf_counter)
    last_token_at: float | None = None
    slot: int | None = None
    prefilled: int = 0  # tokens of the prompt that have been sent
    started: int = 0  # tokens that steps have been started for
    received: int = 0
    is_cancelled: bool = False
    is_ended: bool = False


@dataclasses.dataclass
class _Running:
    """A program that was started.

    Attributes:
        out: its results.
        owners: whose token each entry of out["token"] is, if there is one.
    """

    out: dict[str, jax.Array]
    owners: dict[int, Sequence]


class Engine:
    """Runs sequences in the slots of `Steps`, in a thread of its own; another one watches it.

    The first one waits for devices, which may be for good: a collective of XLA's has no end if a
    peer has gone. The other finds that out, and answers those who wait for tokens.
    """

    def __init__(
        self,
        run: steps.Steps | Leader,
        metrics: Metrics,
        *,
        max_queue: int = 256,
        steps_ahead: int = 2,
        check: Callable[[], None] = jax_ep.check,
        step_seconds: float = 60.0,
    ):
        """Prepares the engine.

        Args:
            run: the compiled programs.
            metrics: what it counts in.
            max_queue: sequences that may wait for a slot.
            steps_ahead: programs that may run before the results of one are fetched.
            check: raises if a device or process has failed; called when results are there, and
                several times a second by another thread.
            step_seconds: that devices may take for a step.
        """
        self.limits = run.limits
        self.failure: str | None = None
        self.metrics = metrics
        self._run, self._check = run, check
        self._max_queue, self._steps_ahead = max_queue, steps_ahead
        self._step_seconds = step_seconds
        self._is_over = threading.Event()
        self._changed = threading.Condition()  # guards all that follows, and how sequences end
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._cancelled: list[tuple[Sequence, str]] = []  # and why they end
        self._is_draining = False
        self._turn_began: float | None = None  # what the thread does now; None: it waits for work
        num_slots = run.mesh.size * run.limits.slots_per_device
        # From here on the thread's own.
        self._in_slot: list[Sequence | None] = [None] * num_slots
        self._running: collections.deque[_Running] = collections.deque()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="engine watcher", daemon=True)

    def start(self) -> None:
        """Starts the threads."""
        self._thread.start()
        self._watcher.start()

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
            ValueError: it does not fit in a slot, or there is nothing to do.
            QueueFullError: too many wait.
            StoppedError: the engine has failed or is ending.
        """
        prompt, most = sequence.prompt, self.limits.max_length
        if not prompt or sequence.sampling.max_tokens < 1:
            raise ValueError("a prompt and max_tokens are at least one token")
        if len(prompt) + sequence.sampling.max_tokens > most:
            raise ValueError(
                f"the prompt's {len(prompt)} tokens and max_tokens = "
                f"{sequence.sampling.max_tokens} are more than {most} together"
            )
        with self._changed:
            if self.ailment is not None:
                raise StoppedError(self.ailment)
            if len(self._waiting) >= self._max_queue:
                raise QueueFullError(f"{self._max_queue} requests are waiting already")
            self._waiting.append(sequence)
            self._changed.notify()

    def cancel(self, sequence: Sequence, reason: str = "cancelled") -> None:
        """Ends a sequence, which gets no token from here on; harmless if it has ended."""
        sequence.is_cancelled = True
        with self._changed:
            self._cancelled.append((sequence, reason))
            self._changed.notify()

    def drain(self) -> None:
        """Takes no more requests; those that are there are finished."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()

    def join(self, timeout: float) -> bool:
        """Waits until all is done, after `drain`, or has failed; returns whether it is so."""
        return self._is_over.wait(timeout)

    @property
    def ailment(self) -> str | None:
        """Why there are no new requests to send here; None: there is no reason."""
        if self.failure is not None:
            return self.failure
        return "the server is shutting down" if self._is_draining else None

    # What follows runs in the threads.

    def _work(self) -> None:
        try:
            while self._take_orders():
                is_busy = self._start_prefill()
                is_busy |= self._start_decode()
                if self._running and not is_busy:
                    self._finish(self._running.popleft())
                while len(self._running) > self._steps_ahead:
                    self._finish(self._running.popleft())
            self._is_over.set()
        except Exception as error:  # of a device, or of ours: nothing after it can be trusted
            self._fail(error)

    def _watch(self) -> None:
        while not self._is_over.wait(_WATCH_SECONDS):
            try:
                self._check()
                began = self._turn_began
                if began is not None and time.perf_counter() - began > self._step_seconds:
                    raise TimeoutError(f"a step has not ended in {self._step_seconds} s")
            except Exception as error:  # whatever a check raises, as in _work
                self._fail(error)

    def _take_orders(self) -> bool:
        """Does what other threads ask for, waiting if there is nothing else; False: to end."""
        with self._changed:
            self._turn_began = None
            while self.failure is None:
                cancelled, self._cancelled = self._cancelled, []
                for sequence, reason in cancelled:
                    if sequence in self._waiting:
                        self._waiting.remove(sequence)
                    self._end(sequence, reason)
                self._admit()
                occupied = sum(sequence is not None for sequence in self._in_slot)
                self.metrics.set_load(occupied=occupied, waiting=len(self._waiting))
                if occupied or self._running:
                    self._turn_began = time.perf_counter()
                    return True
                if self._is_draining:
                    return False
                self._changed.wait()
            return False

    def _admit(self) -> None:
        """Gives free slots to those who wait, on the devices that have the fewest sequences."""
        size = self.limits.slots_per_device
        while self._waiting:
            free = [slot for slot, owner in enumerate(self._in_slot) if owner is None]
            if not free:
                return
            free_of = collections.Counter(slot // size for slot in free)
            slot = max(free, key=lambda slot: free_of[slot // size])
            sequence = self._waiting.popleft()
            sequence.slot, self._in_slot[slot] = slot, sequence

    def _start_prefill(self) -> bool:
        """Starts a chunk for one sequence of each device, those whose chunks are equally long."""
        buckets, size = self.limits.buckets, self.limits.slots_per_device
        chosen: dict[int, Sequence] = {}
        bucket = None
        todo = (s for s in self._in_slot if s is not None and s.prefilled < len(s.prompt))
        for sequence in sorted(todo, key=lambda sequence: sequence.submitted_at):
            count = min(len(sequence.prompt) - sequence.prefilled, buckets[-1])
            fitting = next(bucket for bucket in buckets if bucket >= count)
            bucket = bucket or fitting  # the oldest one's
            if bucket == fitting:
                chosen.setdefault(sequence.slot // size, sequence)
        if not chosen:
            return False

        chunk, owners = steps.empty_chunk(self._run.mesh.size, bucket), {}
        for device, sequence in chosen.items():
            part = sequence.prompt[sequence.prefilled :][:bucket]
            is_last = sequence.prefilled + len(part) == len(sequence.prompt)
            chunk["tokens"][device, : len(part)] = part
            values = {
                "slot": sequence.slot % size,
                "start": sequence.prefilled,
                "count": len(part),
                "is_last": is_last,
                "left": sequence.sampling.max_tokens,
                "temperature": sequence.sampling.temperature,
                "top_p": sequence.sampling.top_p,
                "seed": sequence.sampling.seed,
            }
            for name, value in values.items():
                chunk[name][device] = value
            sequence.prefilled += len(part)
            if is_last:
                owners[device] = sequence
                sequence.started = 1
        self._start(self._run.prefill(chunk), owners)
        return True

    def _start_decode(self) -> bool:
        """Starts a step, if a sequence may get a token that no step has been started for."""
        owners = {
            slot: sequence
            for slot, sequence in enumerate(self._in_slot)
            if sequence is not None and 0 < sequence.started < sequence.sampling.max_tokens
        }
        if not owners:
            return False
        for sequence in owners.values():
            sequence.started += 1
        keep = np.array([slot in owners for slot in range(len(self._in_slot))])
        self._start(self._run.decode(keep), owners)
        return True

    def _start(self, out: dict[str, jax.Array], owners: dict[int, Sequence]) -> None:
        for array in out.values():
            array.copy_to_host_async()
        self._running.append(_Running(out, owners))

    def _finish(self, running: _Running) -> None:
        """Fetches a program's results and passes them on."""
        out = jax.device_get(running.out)
        self._check()
        with self._changed:
            if self.failure is None:
                self._pass_on(out, running.owners)

    def _pass_on(self, out: dict[str, np.ndarray], owners: dict[int, Sequence]) -> None:
        now, first, between = time.perf_counter(), [], []
        tokens = out["token"].tolist()
        for index, sequence in owners.items():
            token = tokens[index]
            if token < 0 or sequence.is_ended or sequence.is_cancelled:
                continue
            if sequence.last_token_at is None:
                first.append(now - sequence.submitted_at)
            else:
                between.append(now - sequence.last_token_at)
            sequence.last_token_at = now
            self._receive(sequence, token)
        self.metrics.count_step(out["expert_rows"], out["dropped"], first, between)

    def _receive(self, sequence: Sequence, token: int) -> None:
        sequence.received += 1
        if token in self.limits.end_tokens:
            self._end(sequence, "stop")
            return
        sequence.on_token(token)
        if sequence.received == sequence.sampling.max_tokens:
            self._end(sequence, "length")

    def _end(self, sequence: Sequence, reason: str) -> None:
        if sequence.is_ended:
            return
        sequence.is_ended = True
        if sequence.slot is not None:
            self._in_slot[sequence.slot] = None
        self.metrics.count_end(reason)
        sequence.on_end(reason)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            if self.failure is not None:  # the other thread has seen it too
                return
            self.failure = f"{type(error).__name__}: {error}"
            sequences = [*self._waiting, *(s for s in self._in_slot if s is not None)]
            self._waiting.clear()
            for sequence in sequences:
                self._end(sequence, "error")
            self._changed.notify_all()
        traceback.print_exception(error)
        self._is_over.set()
