"""The engine: tokens do not depend on what else runs, and requests end as they should."""

import json
import pathlib
import threading
from collections.abc import Iterator

import checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
from serve_moe import decode_bench, sampling, steps
from serve_moe.engine import Engine, QueueFullError, Sampling, Sequence, StoppedError
from serve_moe.metrics import Metrics

_SECONDS = 60


@pytest.fixture(scope="module")
def run(folders: dict[str, pathlib.Path]) -> steps.Steps:
    """The programs, compiled. One engine at a time may use them."""
    config = tiny_checkpoint.CONFIGS["normalised"]
    mesh = jax.make_mesh((2, 4), steps.AXES, devices=jax.devices()[:8])
    params = checkpoint.load_params(folders["normalised"], config, mesh, "float32")
    limits = steps.Limits(
        slots_per_device=2, max_length=60, buckets=(4, 8), end_tokens=(tiny_checkpoint.END,)
    )
    run = steps.Steps(params, mesh, config, limits)
    run.compile()
    compiled = _num_compiled(run)
    engine = Engine(run, Metrics(config.num_experts))
    engine.start()
    _Client([1] * 6, max_tokens=3).submit(engine).wait()
    engine.drain()
    assert engine.join(_SECONDS)
    assert _num_compiled(run) == compiled  # the first request waits for none
    return run


def _num_compiled(run: steps.Steps) -> list[int]:
    return [program._cache_size() for program in (run._decode_program, run._prefill_program)]


@pytest.fixture
def engine(run: steps.Steps) -> Iterator[Engine]:
    """An engine that runs until the end of the test."""
    engine = Engine(run, Metrics(run.config.num_experts), max_queue=40)
    engine.start()
    yield engine
    engine.drain()
    assert engine.join(_SECONDS)


class _Client:
    """A sequence, and what it gets."""

    def __init__(self, prompt: list[int], cancel_after: int | None = None, **how):
        self.tokens: list[int] = []
        self.reasons: list[str] = []
        self.engine: Engine | None = None
        self._cancel_after, self._ended = cancel_after, threading.Event()
        self.sequence = Sequence(prompt, Sampling(**how), self._on_token, self._on_end)

    def submit(self, engine: Engine) -> "_Client":
        self.engine = engine
        engine.submit(self.sequence)
        return self

    def wait(self) -> "_Client":
        assert self._ended.wait(_SECONDS)
        return self

    def _on_token(self, token: int) -> None:
        self.tokens.append(token)
        if len(self.tokens) == self._cancel_after:
            self.engine.cancel(self.sequence)

    def _on_end(self, reason: str) -> None:
        self.reasons.append(reason)
        self._ended.set()


def test_greedy_tokens_are_the_references(engine: Engine) -> None:
    """Through two chunks of prefill, the cache and decoding."""
    with np.load(tiny_checkpoint.REFERENCE) as arrays:
        expected = arrays["normalised.greedy"].tolist()
    client = _Client(tiny_checkpoint.PROMPT.tolist(), max_tokens=len(expected)).submit(engine)
    assert client.wait().tokens == expected
    assert client.reasons == ["length"]


def test_slots_keep_nothing_of_earlier_sequences(run: steps.Steps, engine: Engine) -> None:
    """Not even NaNs, which a weight of 0 does not hide."""
    run._slots["cache"] = jax.tree.map(lambda array: array * jnp.nan, run._slots["cache"])
    test_greedy_tokens_are_the_references(engine)


def test_sampling_goes_on_where_it_was_cut(engine: Engine) -> None:
    """Random numbers are of a token's place: the prompt with an answer's begin gives its rest."""
    prompt, how = [5, 6, 7], {"temperature": 5.0, "seed": 3}
    whole = _Client(prompt, max_tokens=12, **how).submit(engine).wait().tokens
    for cut in 1, 5:
        begin = prompt + whole[:cut]
        rest = _Client(begin, max_tokens=12 - cut, **how).submit(engine).wait()
        assert rest.tokens == whole[cut:]


def _requests() -> list[dict]:
    """Of all kinds, by what _Client takes: more than there are slots."""
    random = np.random.default_rng(0)
    requests = []
    for i in range(20):
        prompt = random.integers(0, 255, random.integers(1, 21)).tolist()
        request = {"prompt": prompt, "max_tokens": int(random.integers(1, 24))}
        if i % 3:
            request |= {"temperature": 1.5, "top_p": (1.0, 0.7)[i % 2], "seed": i}
        requests.append(request)
    return requests


def test_tokens_do_not_depend_on_what_else_runs(engine: Engine) -> None:
    """Alone, one after the other; then all at once in another order, while others are cancelled."""
    requests = _requests()
    alone = [_Client(**request).submit(engine).wait() for request in requests]
    assert len({tuple(client.tokens) for client in alone}) > 14  # there is something to mix up
    assert {len(client.tokens) for client in alone} > {1, 2}

    noise = [_Client([7] * n, max_tokens=30, cancel_after=1 + n % 5) for n in range(1, 6)]
    together = [_Client(**request) for request in requests]
    for i, client in enumerate(reversed(together)):
        client.submit(engine)
        if i % 4 == 0:
            noise[i // 4].submit(engine)
    for client, lonely in zip(together, alone, strict=True):
        client.wait()
        assert (client.tokens, client.reasons) == (lonely.tokens, lonely.reasons)
    for client in noise:
        assert client.wait().reasons == ["cancelled"]
        # Some steps may have been ahead; what they gave is not passed on.
        assert len(client.tokens) == client._cancel_after


def test_programs_are_compiled_once_and_slots_are_donated(run: steps.Steps, engine: Engine) -> None:
    """Whatever slots are in use, and whoever was served before."""
    compiled, before = _num_compiled(run), jax.tree.leaves(run._slots)
    for request in _requests()[:4]:
        _Client(**request).submit(engine).wait()
    assert all(array.is_deleted() for array in before)
    assert _num_compiled(run) == compiled


def test_end_token_ends_a_sequence_and_is_not_passed_on(engine: Engine) -> None:
    ends = []
    for seed in range(60):
        client = _Client([1, 2], max_tokens=40, temperature=2.0, seed=seed).submit(engine).wait()
        assert tiny_checkpoint.END not in client.tokens
        ends += client.reasons
        if "stop" in ends:
            assert len(client.tokens) < 40
            return
    pytest.fail("no sequence has met the end token")


def test_what_does_not_fit_is_refused(engine: Engine) -> None:
    most = engine.limits.max_length
    with pytest.raises(ValueError, match=f"more than {most} together"):
        _Client([0] * (most - 1), max_tokens=2).submit(engine)
    with pytest.raises(ValueError, match="at least one token"):
        _Client([], max_tokens=2).submit(engine)
    whole = _Client([0] * (most - 1), max_tokens=1).submit(engine).wait()
    assert whole.reasons == ["length"]


def test_queue_is_bounded_and_draining_finishes_what_is_there(run: steps.Steps) -> None:
    """Those that wait too; later ones are refused."""
    engine = Engine(run, Metrics(run.config.num_experts), max_queue=3)
    waiting = [_Client([i], max_tokens=3).submit(engine) for i in range(3)]  # it has not started
    with pytest.raises(QueueFullError, match="3 requests"):
        _Client([0], max_tokens=1).submit(engine)
    engine.cancel(waiting[1].sequence)
    engine.drain()
    with pytest.raises(StoppedError, match="shutting down"):
        _Client([0], max_tokens=1).submit(engine)
    engine.start()
    assert engine.join(_SECONDS)
    assert [client.reasons for client in waiting] == [["length"], ["cancelled"], ["length"]]
    assert [len(client.tokens) for client in waiting] == [3, 0, 3]


def test_failure_of_a_device_ends_all_requests_with_an_error(run: steps.Steps) -> None:
    """Those that run and those that wait; and says so from then on."""
    failing = threading.Event()

    def check() -> None:
        if failing.is_set():
            raise RuntimeError("device 3 waited for device 5")

    engine = Engine(run, Metrics(run.config.num_experts), check=check)
    engine.start()
    _Client([1], max_tokens=2).submit(engine).wait()
    assert engine.ailment is None
    clients = [_Client([i], max_tokens=40).submit(engine) for i in range(20)]  # more than slots
    failing.set()
    assert engine.join(_SECONDS)
    engine._thread.join(_SECONDS)  # it may have been in a step
    assert {tuple(client.wait().reasons) for client in clients} == {("error",)}
    with pytest.raises(StoppedError, match="device 3 waited for device 5"):
        _Client([1], max_tokens=2).submit(engine)
    assert "device 3" in engine.ailment


def test_sampling_draws_from_the_nucleus() -> None:
    """As often as it should: the draws of 4000 seeds, against probabilities by NumPy."""
    logits = np.array([-30.0, -1.0, 0.0, 0.5, 1.0, 2.0], np.float32)
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    draws = 4000
    sample = jax.jit(sampling.sample)
    for top_p, kept in ((1.0, 6), (0.75, 2), (0.99, 5), (1e-6, 1), (1e-46, 1)):
        tokens = sample(
            np.tile(logits, (draws, 1)),
            np.ones(draws, np.float32),
            np.full(draws, top_p, np.float32),
            np.arange(draws, dtype=np.uint32),
            np.full(draws, 7, np.int32),
        )
        expected = np.where(np.arange(6) >= 6 - kept, probs, 0)
        expected /= expected.sum()
        frequency = np.bincount(np.asarray(tokens), minlength=6) / draws
        np.testing.assert_allclose(frequency, expected, atol=0.03)  # four standard deviations
        assert np.all(frequency[: 6 - kept] == 0)


def test_decode_bench_times_full_steps(tmp_path: pathlib.Path) -> None:
    """Each of its steps gives every slot a token, by either way of dispatch."""
    flags = "--shape=tiny --slots 2 --steps=2 --repeats=2 --length=5 --dtype=float32"
    rows = decode_bench.main([*flags.split(), f"--json={tmp_path / 'rows.json'}"])
    num_slots = 2 * len(jax.devices())
    assert [(row["dispatch"], row["slots"]) for row in rows] == [
        ("jax_ep", num_slots),
        ("all_to_all", num_slots),
    ]
    for row in rows:
        assert row["p10_ms"] <= row["step_ms"] <= row["p90_ms"]
        assert row["tokens_per_s"] * row["step_ms"] == pytest.approx(1000 * num_slots)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
