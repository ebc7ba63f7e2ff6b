"""A GPU of sm_90 that runs nothing: kernels are compiled and launched, CPU tensors lie "on" it.

For the whole process, and before anything imports triton: `install` first.
"""

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["BUILD", "install", "missing"]

BUILD = Path(__file__).resolve().parents[2] / "build" / "host"
_SOURCE = Path(__file__).with_name("libcuda.c")
_COMPILER = "cc"
# Of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def missing() -> str | None:
    """Why there can be no stub here, or None."""
    if sys.platform != "linux":
        return f"needs Linux, as Triton does, got {sys.platform}"
    if shutil.which(_COMPILER) is None:
        return f"needs a C compiler, {_COMPILER}"
    include = _include()
    if include is None or not (include / "cuda.h").is_file():
        return "needs triton with its NVIDIA backend"
    return None


def _include() -> Path | None:
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "backends" / "nvidia" / "include"


def _libcuda() -> Path:
    """Build the library where it is older than its source."""
    library = BUILD / "libcuda.so.1"
    if not library.exists() or library.stat().st_mtime < _SOURCE.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        # Another process may be loading it.
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder, library.name)
            flags = ["-O2", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}"]
            command = [_COMPILER, *flags, f"-I{_include()}", "-o", str(made), str(_SOURCE)]
            subprocess.run(command, check=True)
            made.replace(library)
    return library


def install() -> ctypes.CDLL:
    """Let Triton launch on the stub, PyTorch's Python answer as on device 0, and our backend run.

    Returns:
        The library; its ``stub_launches()`` counts.

    Raises:
        RuntimeError: if triton is imported already, or `missing` says why not.
    """
    reason = "has to come before triton's import" if "triton" in sys.modules else missing()
    if reason is not None:
        raise RuntimeError(f"benchmarks.host {reason}.")
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(BUILD / "triton"))
    os.environ["TRITON_LIBCUDA_PATH"] = str(BUILD)
    library = ctypes.CDLL(str(_libcuda()), mode=ctypes.RTLD_GLOBAL)
    library.stub_launches.restype = ctypes.c_int64
    # Freed memory stays with the process, as it does in PyTorch's caching allocator.
    libc = ctypes.CDLL(None)
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        libc.mallopt(option, 1 << 30)
    _answer_as_device()
    _use_driver()
    _admit_cpu_tensors()
    return library


def _answer_as_device() -> None:
    """PyTorch's wrappers of C functions, around C functions that cost as little."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # memory of `empty` holds anything
    torch._C._cuda_getDevice = int  # int() is 0
    torch.cuda._initialized = True
    torch.cuda._exchange_device = int.__abs__
    torch.cuda._maybe_exchange_device = int.__pos__


def _use_driver() -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import autotuner

    class Driver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.get_current_stream = (0).__mul__  # a C function of one argument
            self.get_current_device = torch.cuda.current_device
            self.get_device_capability = lambda *_: (9, 0)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    # Peers that search for tiles take the first.
    autotuner.Autotuner._bench = lambda *_, **__: [1.0, 1.0, 1.0]


def _admit_cpu_tensors() -> None:
    import torch

    from segmoe_kernels import functional
    from segmoe_kernels._triton import launch, tile_table

    class DeviceOf(torch.cuda.device):
        """``torch.cuda.device_of``, which does nothing for a CPU tensor."""

        def __init__(self, x: torch.Tensor) -> None:
            super().__init__(x.get_device() + 1)  # CPU tensors are on device -1

    why_not = functional._why_not_triton
    functional._why_not_triton = lambda _: why_not("cuda")
    launch.device_guard = DeviceOf
    tile_table._has_gpu = functools.cache(lambda: True)
    tile_table._architecture_of = functools.cache(lambda _: "sm_90")
