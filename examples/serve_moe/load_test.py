"""Loads the server with requests that arrive at random, and compares ways of dispatch in one run.

    python examples/serve_moe/load_test.py --checkpoint runs/lm

Starts the server once for each --dispatch, with the options behind --, and sends the same requests
at the same times to each, whether or not earlier ones are done (an open loop). Prints tokens per
second and percentiles of the time to the first piece of an answer and between pieces, which are a
token unless the server is behind; load_test.json and load_test.png are left in --out. Ends with 1
if a request failed, or if the server's memory grew: with --seconds 600 or more it is a soak test.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator

import numpy as np
from matplotlib.figure import Figure

_ANSWER_SECONDS = 600.0
_PERCENTILES = (50, 90, 99)
_SOAK_SECONDS = 300  # from here on memory is judged: what is kept for reuse is there by half time
_MOST_GROWTH = 0.02


@dataclasses.dataclass
class Done:
    """What became of a request; times are seconds since the load began.

    Attributes:
        arrived: when it was sent.
        times: when each piece of its answer came.
        num_tokens: of the answer, as the server counts them.
        error: why there is no whole answer; "" if there is one.
    """

    arrived: float
    times: list[float]
    num_tokens: int = 0
    error: str = ""


def draw_requests(args: argparse.Namespace) -> list[tuple[float, dict]]:
    """Draws arrivals (a Poisson process) and requests: a function of the seed alone."""
    random = np.random.default_rng(args.seed)
    requests, now = [], 0.0
    while (now := now + random.exponential(1 / args.rate)) < args.seconds:
        prompt = random.integers(0, args.vocab, random.integers(1, args.prompt_tokens + 1))
        body = {
            "prompt": prompt.tolist(),
            "max_tokens": int(random.integers(1, args.max_tokens + 1)),
            "temperature": args.temperature,
            "seed": len(requests),
        }
        requests.append((now, body))
    return requests


@contextlib.contextmanager
def serving(args: argparse.Namespace, dispatch: str) -> Iterator[tuple[int, int]]:
    """Runs a server; yields its port and process id."""
    program = pathlib.Path(__file__).resolve().parent
    command = [sys.executable, str(program), f"--checkpoint={args.checkpoint}", "--port=0"]
    command += [f"--dispatch={dispatch}", *args.server_options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(args.start_seconds, process.kill)
        killer.start()
        try:
            for line in process.stdout:
                print(f"  {line.rstrip()}")
                if found := re.search(r"listening on http://.*:(\d+)$", line.rstrip()):
                    break
            else:
                raise SystemExit("the server has not started")
            killer.cancel()
            yield int(found[1]), process.pid
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=args.start_seconds)
            if process.returncode != 0:
                raise SystemExit(f"the server has ended with exit code {process.returncode}")
        finally:
            killer.cancel()
            process.kill()


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in use; 0 of one that has ended."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


async def stream(port: int, body: dict) -> AsyncIterator[dict]:
    """Sends a completion request; yields the events of its answer.

    Not through a client for users: that takes longer for an event than the server does.

    Raises:
        OSError: there is no whole answer.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {port}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode())
        status = await reader.readline()
        if b" 200 " not in status:
            raise OSError((status + (await reader.read()).rpartition(b"\r\n\r\n")[2]).decode())
        async for line in reader:  # of which some are HTTP's chunks
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise OSError(event["error"]["message"])
                yield event
            elif line.startswith(b"data: [DONE]"):
                return
    raise OSError("the answer has no end")


async def send_all(
    port: int, pid: int, requests: list[tuple[float, dict]]
) -> tuple[list[Done], list[tuple[float, int]]]:
    """Sends each request at its time; returns what became of them, and memory over time."""
    memory = []

    def now() -> float:
        return time.perf_counter() - begin

    async def send(at: float, body: dict) -> Done:
        await asyncio.sleep(at - now())
        done = Done(arrived=now(), times=[])
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                async for event in stream(port, body):
                    if event.get("usage") is not None:
                        done.num_tokens = event["usage"]["completion_tokens"]
                    else:
                        done.times.append(now())
        except OSError as error:
            done.error = f"{type(error).__name__}: {error}"
        return done

    async def watch() -> None:
        while True:
            memory.append((now(), resident_bytes(pid)))
            await asyncio.sleep(1)

    begin = time.perf_counter()
    watching = asyncio.create_task(watch())
    all_done = await asyncio.gather(*(send(at, body) for at, body in requests))
    watching.cancel()
    memory.append((now(), resident_bytes(pid)))
    return list(all_done), memory


def summarise(all_done: list[Done], memory: list[tuple[float, int]]) -> dict:
    """The numbers of one server."""
    whole = [done for done in all_done if not done.error]
    first = [1000 * (done.times[0] - done.arrived) for done in whole]
    between = [1000 * gap for done in whole for gap in np.diff(done.times)]
    num_tokens = sum(done.num_tokens for done in whole)
    seconds, end = memory[-1]
    half = memory[len(memory) // 2][1]

    def percentiles(values: list[float]) -> dict[str, float]:
        return {f"p{p}": round(float(np.percentile(values, p)), 2) for p in _PERCENTILES if values}

    return {
        "requests": len(all_done),
        "errors": sorted({done.error for done in all_done if done.error}),
        "failed": len(all_done) - len(whole),
        "tokens": num_tokens,
        "tokens_per_second": round(num_tokens / seconds, 1),
        "time_to_first_token_ms": percentiles(first),
        "inter_token_ms": percentiles(between),
        "memory_mib": {"half time": half >> 20, "end": end >> 20},
        "has_grown": seconds > _SOAK_SECONDS and end > half * (1 + _MOST_GROWTH),
    }


def plot(results: dict[str, list[Done]], memory: dict[str, list], path: pathlib.Path) -> None:
    """Draws both latencies' distributions, and memory."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    first_axes, between_axes, memory_axes = figure.subplots(1, 3)
    for name, all_done in results.items():
        whole = [done for done in all_done if not done.error]
        first = [1000 * (done.times[0] - done.arrived) for done in whole]
        between = [1000 * gap for done in whole for gap in np.diff(done.times)]
        for axes, values in ((first_axes, first), (between_axes, between)):
            axes.plot(np.sort(values), np.linspace(0, 100, len(values)), label=name)
        times, used = np.array(memory[name]).T
        memory_axes.plot(times, used / 2**20, label=name)
    for axes, title in ((first_axes, "time to first token"), (between_axes, "between tokens")):
        axes.set(xlabel="ms", ylabel="% of them at most", title=title, xscale="log")
        axes.legend()
    memory_axes.set(xlabel="s", ylabel="MiB", title="memory of the server", ylim=(0, None))
    memory_axes.legend()
    figure.savefig(path, dpi=120)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=pathlib.Path, required=True, help="what is served")
    add("--dispatch", nargs="+", default=["jax_ep", "all_to_all"], help="a server for each")
    add("--rate", type=float, default=4.0, help="requests per second, on average")
    add("--seconds", type=float, default=30.0, help="in which requests arrive")
    add("--prompt-tokens", type=int, default=64, help="at most")
    add("--max-tokens", type=int, default=64, help="of an answer, at most")
    add("--vocab", type=int, default=256, help="prompts are of tokens below this")
    add("--temperature", type=float, default=1.0, help="of sampling")
    add("--seed", type=int, default=0, help="of arrivals and prompts")
    add("--start-seconds", type=float, default=600.0, help="for a server to start, and to end")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs"), help="output folder")
    add("server_options", nargs="*", help="of the server, behind --")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Runs the load on each server; returns the summaries by dispatch."""
    args = parse_args(argv)
    requests = draw_requests(args)
    summaries, results, memory = {}, {}, {}
    for dispatch in args.dispatch:
        print(f"{dispatch}: {len(requests)} requests")
        with serving(args, dispatch) as (port, pid):
            results[dispatch], memory[dispatch] = asyncio.run(send_all(port, pid, requests))
        summaries[dispatch] = summarise(results[dispatch], memory[dispatch])
        for name, value in summaries[dispatch].items():
            print(f"  {name:<23} {value}")
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("rate", "seconds", "seed", "server_options")}
    report = {"settings": settings, "dispatch": summaries}
    (args.out / "load_test.json").write_text(json.dumps(report, indent=1))
    plot(results, memory, args.out / "load_test.png")
    print(f"plot and numbers are in {args.out}")
    return summaries


if __name__ == "__main__":
    sys.exit(any(summary["failed"] or summary["has_grown"] for summary in main().values()))
