"""Environment variables for tests on CPU devices. Imports nothing of JAX: it comes before it."""

from gpus import count_gpus

# Most of the suite's time XLA compiles programs of a few small operations. LLVM's optimiser is a
# fifth of that, and has no part in what is tested: which calls a program has, in which order and on
# what data, is settled before. (XLA would take these flags for GPUs' programs too.)
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def cpu_devices(num_devices: int) -> dict[str, str]:
    """What gives a process so many CPU devices, and programs that are compiled in a short time.

    JAX 0.10's CPU client needs two threads a device, or ranks that wait for each other can starve
    one another on a machine with few cores.
    """
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    if count_gpus() == 0:
        flags = f"{FAST_COMPILATION} {flags}"
    return {"XLA_FLAGS": flags, "NPROC": str(2 * num_devices)}
