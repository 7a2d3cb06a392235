"""Environment variables for tests on CPU devices. Imports nothing of JAX: it comes before it."""

import atexit
import os
import pathlib
import shutil
import tempfile

from gpus import count_gpus

# Most of the suite's time XLA compiles programs of a few small operations. LLVM's optimiser is a
# fifth of that, and has no part in what is tested: which calls a program has, in which order and on
# what data, is settled before. Nor has the way in which XLA emits loops: its older one, which
# jaxlib 0.10 still has, takes half the time. (XLA would take these flags for GPUs' programs too.)
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"
)

_COMPILED = "jax_ep_compiled_"


def cpu_devices(num_devices: int) -> dict[str, str]:
    """What gives a process so many CPU devices, and programs that are compiled in a short time.

    JAX 0.10's CPU client needs two threads a device, or ranks that wait for each other can starve
    one another on a machine with few cores.
    """
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    if count_gpus() == 0:
        flags = f"{FAST_COMPILATION} {flags}"
    return {"XLA_FLAGS": flags, "NPROC": str(2 * num_devices)}


def shared_compilations() -> dict[str, str]:
    """What lets a program that one test has compiled be found by later ones.

    By those of this process, of pytest-xdist's workers and of the processes that tests start. The
    folder lives as long as this process, so a run of the tests begins with none. JAX neither locks
    nor renames what it writes there: who reads a half-written program gets a warning and compiles,
    unless jax_raise_persistent_cache_errors is on. On GPUs nothing is shared: tests there are about
    programs as XLA makes them.
    """
    given = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
    if count_gpus() > 0 or given.name.startswith(_COMPILED):  # the latter in a worker
        return {}
    folder = tempfile.mkdtemp(prefix=_COMPILED)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
