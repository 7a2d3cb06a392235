"""The exchange between processes, here threads."""

import pathlib
import threading

from exchange import OutOfStepError, SocketExchange


def _exchange(socket: pathlib.Path, values: list[list[int]]) -> list[object]:
    """What two processes, here threads, get for the values that each of them sends in turn."""
    results: list[object] = [None, None]

    def work(process: int) -> None:
        try:
            exchange = SocketExchange(socket, process, 2, timeout=2)
            results[process] = [exchange.all_gather(value) for value in values[process]]
        except OutOfStepError as error:
            results[process] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_exchange(tmp_path: pathlib.Path) -> None:
    results = _exchange(tmp_path / "socket", [[1, 2], [10, 20]])
    assert results == [[[1, 10], [2, 20]]] * 2


def test_a_process_that_does_less_is_found_out(tmp_path: pathlib.Path) -> None:
    results = _exchange(tmp_path / "socket", [[1, 2], [10]])
    assert isinstance(results[0], OutOfStepError)
    assert "process 1" in str(results[0])
