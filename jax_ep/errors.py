"""What CUDA kernels record: errors are raised by `check`, all is printed by a watcher."""

import contextlib
import sys
import threading
import time
from collections.abc import Sequence

from jax_ep import _native, nvshmem

_WATCH_INTERVAL = 0.25  # seconds
_ASK_INTERVAL = 2.0  # likewise, between questions to JAX's coordination service


def check() -> None:
    """Raises the error that a CUDA kernel of this process has recorded, if one has.

    A kernel that waits in vain for a rank cannot raise: after the timeout it fills its results with
    NaN (integers with 0, rows with -1) and records what it waited for. The group is broken then:
    later calls fail at once, in this process and in the others, also those of other groups that
    the device is in.
    ``jax.block_until_ready`` does not show it, so call ``check`` after it where NaN would go
    unnoticed, say before a checkpoint is written. The next call of an operation raises the error
    too, and it is printed to stderr within a second; neither happens by itself in a program
    that XLA replays from a command buffer, the printing does.

    After an error the results of the call that failed, and of what was computed from them, are NaN;
    all other arrays can be trusted, for the peers have left this process's memory before the call
    ended. Only if the text says that a device "may yet write to arrays" (it stood still when it was
    told) take nothing from the named device's memory for good.

    Once every rank can come again, ``finalize()`` and ``initialize()`` in all processes mend the
    group. On CPU the operations raise by themselves, and this does nothing.

    Raises:
        RuntimeError: the record in words: the operation, the device, the device it waited for, and
            why the wait ended; where it timed out also the epochs (calls of this pair of devices)
            that it expected and saw.
    """
    error = None if _native.cuda is None else _native.cuda.recorded_error()
    if error is not None:
        raise RuntimeError(error)


class Watcher:
    """Looks after kernels that wait, and prints what they record.

    When another process of the job has died it ends the waits for it. It prints that, the first
    error that a kernel records, and that a layout has had ids without an expert, once each; the
    error again when its text has changed, since more has been recorded. All this is in host memory
    that the kernels share: there is no call into CUDA. A long wait for a process of another host
    ends when that one has left, of which JAX's coordination service is asked.
    """

    def __init__(self) -> None:
        self._next_question = 0.0
        self._question: threading.Thread | None = None
        self._stopped = threading.Event()
        self._telling = threading.Lock()
        self._printed: str | None = None
        self._thread = threading.Thread(target=self._watch, name="jax_ep watcher", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(_WATCH_INTERVAL):
            self._look()

    def _look(self) -> None:
        for line in _native.cuda.watch():
            say(line)
        awaited = _native.cuda.awaited_elsewhere()
        is_asking = self._question is not None and self._question.is_alive()
        may_ask = not is_asking and not self._stopped.is_set()
        if awaited and may_ask and time.monotonic() >= self._next_question:
            self._next_question = time.monotonic() + _ASK_INTERVAL
            self._question = threading.Thread(
                target=self._ask, args=(awaited,), name="jax_ep question", daemon=True
            )
            self._question.start()
        error = _native.cuda.recorded_error()
        if error is not None and error != self._printed:
            self._printed = error
            say(error)

    def _ask(self, awaited: Sequence[int]) -> None:
        """In a thread of its own, for the service may take any time, or be gone."""
        left = nvshmem.have_left().intersection(awaited)
        with self._telling:
            if not self._stopped.is_set():
                for process in left:
                    _native.cuda.tell_left(process)

    def stop(self) -> None:
        """Ends the thread, after a last look. A question may be left behind, and tells nothing."""
        with self._telling:
            self._stopped.set()
        self._thread.join()
        self._look()


def say(line: str) -> None:
    """Prints what the user should hear of, to stderr."""
    with contextlib.suppress(OSError, ValueError):  # stderr is closed; all else goes on
        print(f"jax_ep: {line}", file=sys.stderr, flush=True)
