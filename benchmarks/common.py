"""What the measurements share: the environment, interleaved timing, JSON output."""

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import segmoe_kernels

__all__ = ["Timing", "device_name", "environment", "interleaved", "write_json"]

Name = TypeVar("Name")


@dataclass(frozen=True)
class Timing:
    """Times of one function, over all rounds.

    Attributes:
        times_ms: one for each round, in order.
    """

    times_ms: tuple[float, ...]

    def quartiles(self) -> tuple[float, float, float]:
        """Return the lower quartile, the median and the upper quartile, in ms."""
        return _quartiles(self.times_ms)

    def ratio(self, other: "Timing") -> tuple[float, float, float]:
        """Quartiles of ``self / other``, round by round: drift of the machine cancels."""
        return _quartiles([a / b for a, b in zip(self.times_ms, other.times_ms, strict=True)])


def _quartiles(values: Any) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def interleaved(
    functions: Mapping[Name, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 3,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, Timing]:
    """Time functions in turns on the CPU, every other round in reverse order.

    Args:
        functions: what to time, by name.
        rounds: timed calls of each; at least 2.
        warmup: rounds before the first that counts.
        calls: of one function in a row; with more than one, the first of them does not count, which
            finds the caches and the allocator as the other function left them.
        clock: seconds.

    Returns:
        A Timing for each name, of the mean call of each round.
    """
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for index in range(warmup + rounds):
        for name in list(functions)[:: 1 if index % 2 else -1]:
            if calls > 1:
                functions[name]()
            counted = max(1, calls - 1)
            start = clock()
            for _ in range(counted):
                functions[name]()
            elapsed = clock() - start
            if index >= warmup:
                times[name].append(1e3 * elapsed / counted)
    return {name: Timing(tuple(values)) for name, values in times.items()}


def environment() -> dict[str, str]:
    """Versions, commit, processor and threads: what a measurement depends on."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    return {
        "segmoe_kernels": segmoe_kernels.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch_threads": str(torch.get_num_threads()),
        **_gpu(),
    }


def _gpu() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "gpu_memory_mib": str(gpu.total_memory // 2**20),
        "gpu_l2_mib": str(gpu.L2_cache_size // 2**20),
        "gpu_processors": str(gpu.multi_processor_count),
        "cuda": str(torch.version.cuda or torch.version.hip),
    }


def device_name(device: torch.device | str) -> str:
    """The folder that results of a device go to: "cpu", "nvidia-h200"."""
    if torch.device(device).type != "cuda":
        return torch.device(device).type
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name().lower())
    return "-".join(words)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def write_json(rows: list[dict[str, Any]], path: str) -> None:
    """Write ``{"environment": ..., "rows": rows}``.

    Args:
        rows: one for each measurement; numbers carry their unit in the key.
        path: of the file, or "-" for standard output.
    """
    text = json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")
