"""What the measurements share: the environment, names of devices, JSON output."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import segmoe_kernels


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


def on_gpu(device: torch.device | str) -> bool:
    """Whether a device is a GPU; in a rehearsal, which has one on the CPU, all are."""
    return torch.device(device).type == "cuda" or bool(os.environ.get("GPU_REHEARSAL"))


def device_name(device: torch.device | str) -> str:
    """The folder that results of a device go to: "cpu", "nvidia-h200"."""
    if not on_gpu(device):
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
