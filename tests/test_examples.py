"""The example runs as a user runs it: in processes of its own, which it sets up itself."""

import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_devices import FAST_COMPILATION, cpu_devices

# Looked for, not imported: that takes seconds, in each worker.
for _module in ("optax", "orbax", "matplotlib", "tqdm"):
    if importlib.util.find_spec(_module) is None:
        pytest.skip("the example needs jax-ep[examples]", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)  # the fixtures below do all the work: 40 s on two free cores

_EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
_NUM_STEPS = 8
_TINY = (
    f"--steps={_NUM_STEPS} --num-layers=1 --num-heads=2 --d-model=32 --d-expert=32 --seq-len=32 "
    "--learning-rate=1e-2 --eval-every=4 --sample-bytes=16"
).split()

# Neither evaluated nor sampled: each of these is a program to compile.
_LOSSES_ONLY = [
    f"--eval-every={2 * _NUM_STEPS}",
    f"--stop-after={_NUM_STEPS - 1}",
    "--sample-bytes=0",
]

# Calls main() once per list of flags, all in one process, and keeps the final parameters.
_DRIVER = """
import json, sys
examples, *runs = map(json.loads, sys.argv[1:])
sys.path.insert(0, examples)
import train_moe_lm
import jax
import numpy as np
for flags in runs:
    summary = train_moe_lm.main(flags)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(summary["params"])]
    np.savez(train_moe_lm.parse_args(flags).out / "params.npz", *leaves)
"""


def _run(cwd: pathlib.Path, *runs: list[str]) -> None:
    """Runs the example in a fresh process, once per list of flags.

    It sets up its own devices, but flags of XLA that are there. What it compiles, later processes
    in the same folder find there: a run and its resumption are the same programs.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    environment = kept | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FAST_COMPILATION,
        "JAX_COMPILATION_CACHE_DIR": str(cwd / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arguments = [json.dumps(str(_EXAMPLES)), *(json.dumps([*_TINY, *flags]) for flags in runs)]
    process = subprocess.run(
        [sys.executable, "-c", _DRIVER, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stdout + process.stderr


def _run_together(cwd: pathlib.Path, *flags: str) -> None:
    """Runs the example in two processes of four devices each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{s.getsockname()[1]}"
    command = [sys.executable, str(_EXAMPLES / "train_moe_lm.py"), *_TINY, *flags]
    command += ["--distributed", f"--coordinator={coordinator}", "--num-processes=2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **cpu_devices(4)}
    with contextlib.ExitStack() as stack:
        logs = [cwd / f"process_{i}.log" for i in range(2)]
        processes = []
        for i, log in enumerate(logs):
            process = subprocess.Popen(
                [*command, f"--process-id={i}"],
                cwd=cwd,
                env=environment,
                stdout=stack.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        with contextlib.suppress(subprocess.TimeoutExpired):  # seen below
            for process in processes:
                process.wait(timeout=120)
    texts = "\n----\n".join(log.read_text() for log in logs)
    assert [process.returncode for process in processes] == [0, 0], texts


def _summary(out: pathlib.Path) -> dict:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A process that does one run, "whole", and another, "resumed", in which it is interrupted."""
    root = tmp_path_factory.mktemp("runs")
    _run(
        root,
        ["--out=whole", "--export=exported"],
        ["--out=resumed", f"--stop-after={_NUM_STEPS // 2}", "--sample-bytes=0"],
    )
    assert len(_summary(root / "resumed")["losses"]) == _NUM_STEPS // 2
    return root


@pytest.fixture(scope="module")
def runs(whole_run: pathlib.Path) -> pathlib.Path:
    """Beside them: a process that resumes the one that was interrupted, and does two more."""
    _run(
        whole_run,
        ["--out=resumed", "--resume"],
        [
            *("--out=no_drops", "--capacity-factor=0", "--remat"),
            *("--micro-batches=2", "--overlap", *_LOSSES_ONLY),
        ],
        ["--out=dense", "--dispatch=dense", *_LOSSES_ONLY],
        [
            *("--out=imported", "--init=exported", *_LOSSES_ONLY, "--stop-after=1"),
            *("--d-model=99", "--router=group-limited", "--bias-rate=0.5"),
        ],
    )
    return whole_run


def test_learns_and_leaves_its_results(whole_run: pathlib.Path) -> None:
    """The loss falls, and summary, sample and plot are there."""
    summary = _summary(whole_run / "whole")
    assert list(summary)[:2] == ["versions", "config"]
    assert summary["config"]["d_model"] == 32
    losses = summary["losses"]
    assert len(losses) == _NUM_STEPS
    assert np.all(np.isfinite(losses))
    assert np.mean(losses[-2:]) < losses[0] - 0.5
    assert summary["heldout_loss"] < losses[0] - 0.5
    assert 2.5 < summary["unigram_entropy"] < 4.0
    assert summary["tokens_per_second"] > 0
    assert len(summary["sample"]) > len("import os\n\n\ndef ")
    assert (whole_run / "whole/training.png").read_bytes().startswith(b"\x89PNG")


def test_resumed_run_is_bitwise_the_uninterrupted_one(runs: pathlib.Path) -> None:
    """Losses, evaluation, sample and parameters are equal to the bit."""
    whole, resumed = _summary(runs / "whole"), _summary(runs / "resumed")
    for name in ("losses", "heldout_loss", "dropped", "sample"):
        assert whole[name] == resumed[name], name
    whole, resumed = (np.load(runs / out / "params.npz") for out in ("whole", "resumed"))
    assert whole.files == resumed.files
    for name in whole.files:
        np.testing.assert_array_equal(whole[name].view(np.uint32), resumed[name].view(np.uint32))


def test_loss_curve_equals_the_dense_one_without_drops(runs: pathlib.Path) -> None:
    """jax_ep, rematerialised, in two parts, trains as the plain reference; drops would be seen."""
    no_drops, dense = _summary(runs / "no_drops"), _summary(runs / "dense")
    assert no_drops["dropped"] == 0
    # The first loss has seen no update: both compute the same float32 sums in another order, which
    # moves a logit by a few units of 2**-24 and the mean over 512 tokens by less. Afterwards Adam
    # divides by the gradient's own size, so a gradient that is all rounding becomes a full step of
    # the learning rate (along which the loss is flat), and a near tie may pick another expert.
    np.testing.assert_allclose(no_drops["losses"][0], dense["losses"][0], rtol=1e-6)
    np.testing.assert_allclose(no_drops["losses"], dense["losses"], rtol=1e-4)
    # The bounds are tight enough to see the dropped rows of the run with a capacity.
    whole = _summary(runs / "whole")
    assert whole["dropped"] > 0
    assert np.max(np.abs(np.divide(whole["losses"][:-1], dense["losses"]) - 1)) > 1e-3


def test_exported_checkpoint_is_what_was_trained_and_can_be_trained_on(
    runs: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; sizes of a checkpoint win over flags; training goes on, by another router too."""
    monkeypatch.syspath_prepend(str(_EXAMPLES))
    checkpoint = importlib.import_module("checkpoint")
    config = checkpoint.read_config(runs / "exported")
    assert config.hidden_size == 32
    mesh = jax.make_mesh((1, 2), ("dp", "ep"), devices=jax.devices()[:2])
    loaded = checkpoint.load_params(runs / "exported", config, mesh, "float32")
    trained = np.load(runs / "whole/params.npz")
    for leaf, name in zip(jax.tree.leaves(loaded), trained.files, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), trained[name], strict=True)
    whole, imported = _summary(runs / "whole"), _summary(runs / "imported")
    assert imported["losses"][0] < whole["losses"][0] - 0.5
    # Its router's bias has moved towards an even load, which it was not, and by nothing else.
    arrays = np.load(runs / "imported/params.npz")
    (bias,) = (arrays[name] for name in arrays.files if arrays[name].shape == (8,))
    assert set(np.abs(bias)) <= {0.0, 0.5}
    assert {-0.5, 0.5} <= set(bias)


def test_several_processes_train_as_one_does(runs: pathlib.Path) -> None:
    """Also that they read the same sources, which each of them checks at the start."""
    _run_together(runs, "--out=together", "--sample-bytes=0")
    together, whole = _summary(runs / "together"), _summary(runs / "whole")
    # XLA adds up over processes in another order; see above for what that may come to.
    np.testing.assert_allclose(together["losses"][0], whole["losses"][0], rtol=1e-6)
    np.testing.assert_allclose(together["losses"], whole["losses"], rtol=1e-4)


@pytest.mark.versions
def test_processes_can_compare_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do so in JAX, which has no integers above 2**31 - 1 by default."""
    example = _imported(monkeypatch)
    text = np.frombuffer(b"a", np.uint8)
    checksum = np.array([zlib.crc32(text)])
    assert checksum[0] >= 2**31
    assert np.asarray(jnp.asarray(checksum))[0] != checksum[0]  # so a checksum would not do
    digest = example.digest(text)
    np.testing.assert_array_equal(np.asarray(jnp.asarray(digest)), digest, strict=True)
    assert np.any(digest != example.digest(np.frombuffer(b"b", np.uint8)))


def test_each_layer_has_a_bias_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes the buffers that it is given, each once."""
    example = _imported(monkeypatch)
    config = example.Config(router="group-limited")
    first, second = example.begin_biases({"layers": [{}, {}]}, config)["layers"]
    assert first["bias"].unsafe_buffer_pointer() != second["bias"].unsafe_buffer_pointer()


def _imported(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    for name in ("XLA_FLAGS", "NPROC"):  # the example sets them; then they are put back
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.syspath_prepend(str(_EXAMPLES))
    return importlib.import_module("train_moe_lm")
