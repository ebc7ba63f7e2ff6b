"""Where the time of one call goes: each kernel's share, and hardware counters where there are any.

    python -m benchmarks.profiles [--shapes headline] [--parts routed]
    python -m benchmarks.profiles --counters [--shapes 128-4-1-5-1e5]

Without ``--counters``, PyTorch's profiler adds up each kernel (on a CPU, each operator) over some
calls of ``segmoe``. With it, Nsight Compute (``ncu``) reads counters of every kernel of one call:
duration, bytes from and to memory, busy cycles of the matrix and memory pipes, occupancy, limits.
The clocks are left alone.
"""

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import make_case
from benchmarks.common import device_name
from benchmarks.layer import admit, calls
from benchmarks.runner import PASSES, Configuration, Emit, Options, Suite, run_suite
from benchmarks.shapes import find_workloads
from benchmarks.store import ROOT, Store, code_version, results_folder

COUNTED_SHAPE = "128-4-1-5-1e5"

__all__ = ["SUITE", "kernel_rows", "parse_counters"]

CALLS = 5
COUNTERS = {
    "gpu__time_duration.sum": "time_ns",
    "dram__bytes_read.sum": "dram_read_bytes",
    "dram__bytes_write.sum": "dram_write_bytes",
    "lts__t_bytes.sum": "l2_bytes",
    "sm__inst_executed.sum": "instructions",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor_pipe_percent",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "programs",
    "launch__shared_mem_per_block": "shared_bytes",
}


def kernel_rows(function: Any, device: torch.device, count: int = CALLS) -> list[dict[str, Any]]:
    """Profile calls and add up each kernel.

    Args:
        function: what to call.
        device: kernels on a GPU, operators on a CPU.
        count: calls.

    Returns:
        One row for each kernel, the longest first: name, launches a call, time a call in us, share.
    """
    function()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiler:
        for _ in range(count):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    rows = []
    for event in profiler.key_averages():
        if device.type == "cuda" and "CUDA" not in str(event.device_type):
            continue
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if spent:
            launches = event.count / count
            rows.append({"kernel": event.key, "launches": launches, "time_us": spent / count})
    total = sum(row["time_us"] for row in rows)
    for row in rows:
        row["time_share"] = row["time_us"] / total
    return sorted(rows, key=lambda row: -row["time_us"])


def measure(configuration: Configuration, options: Options, emit: Emit) -> None:
    """Profile one configuration: one row, with a list of kernels."""
    admitted, inputs, _ = admit(configuration, options, emit)
    for provider, _ in admitted:
        for passed in options.passes:
            function = calls(provider, inputs, passed)
            kernels = kernel_rows(function, inputs.x.device)
            emit(
                {
                    "provider": provider.name,
                    "pass": passed,
                    "mode": "eager",
                    "kernels": kernels,
                    "kernels_time_us": sum(row["time_us"] for row in kernels),
                }
            )


def line(row: dict[str, Any]) -> str:
    """The longest kernels."""
    parts = [
        f"    {k['time_us']:>10.1f} us {100 * k['time_share']:>5.1f} % x{k['launches']:<4.3g} "
        f"{k['kernel'][:80]}"
        for k in row["kernels"][:12]
    ]
    return "\n".join([f"{row['kernels_time_us']:>10.1f} us in kernels", *parts])


SUITE = Suite(
    name="profiles",
    parts=("routed",),
    providers=("segmoe", "grouped_mm", "scattermoe", "compile"),
    passes=PASSES,
    modes=("eager",),
    measure=measure,
    line=line,
)


def parse_counters(text: str) -> list[dict[str, Any]]:
    """Rows from what ``ncu --csv`` prints: one for each launch.

    Args:
        text: standard output; lines before the table are ignored.
    """
    start = text.find('"ID"')
    if start < 0:
        return []
    launches: dict[str, dict[str, Any]] = {}
    for cell in csv.DictReader(io.StringIO(text[start:])):
        name = COUNTERS.get(cell["Metric Name"])
        if name is None:
            continue
        launch = launches.setdefault(cell["ID"], {"kernel": cell["Kernel Name"]})
        launch[name] = float(cell["Metric Value"].replace(",", ""))
    return list(launches.values())


def run_counters(arguments: list[str]) -> int:
    """Run this module below Nsight Compute, in base units, and store what it counted."""
    tool = shutil.which("ncu")
    if tool is None or not torch.cuda.is_available():
        print("skipped counters: " + ("no GPU" if tool else "no ncu on the PATH"))
        return 0
    rows, why = _count(tool, list(COUNTERS), arguments)
    if not rows:  # names of counters differ between chips: at least those that all have
        rows, why = _count(tool, list(COUNTERS)[:3], arguments)
    if not rows:
        print(f"counters failed: {why}")
        return 0
    file = "profiles.json"
    store = Store(results_folder("cuda") / file, seed=ROOT / device_name("cuda") / file)
    key = f"counters/{arguments[0] if arguments else COUNTED_SHAPE}"
    identity = {"configuration": key, "provider": "segmoe", "pass": "forward+backward"}
    store.add([{**identity, "mode": "eager", "code": code_version(), "kernels": rows}])
    for row in rows:
        print("  ".join(f"{k} {v:.6g}" if k != "kernel" else str(v)[:60] for k, v in row.items()))
    print(f"wrote {store.path}")
    return 0


def _count(tool: str, counters: list[str], arguments: list[str]) -> tuple[list[Any], str]:
    command = [tool, "--csv", "--page", "details", "--print-units", "base"]
    command += ["--clock-control", "none", "--profile-from-start", "off"]
    command += ["--target-processes", "all", "--metrics", ",".join(counters)]
    command += [sys.executable, "-m", "benchmarks.profiles", "--one-call", *arguments]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    return parse_counters(done.stdout), text.strip()[-500:]


def run_one_call(name: str) -> int:
    """One profiled call of forward and backward, for Nsight Compute."""
    layer, inputs = make_case(
        find_workloads(name)[0],
        part="routed",
        routing="uniform",
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    x = inputs.x.requires_grad_()
    wanted = (x, *layer.parameters())
    for profiled in (False, False, True):
        torch.cuda.synchronize()
        if profiled:
            torch.cuda.profiler.start()
        torch.autograd.grad(layer(x), wanted, inputs.dy)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--one-call"]:
        return run_one_call(words[1] if len(words) > 1 else COUNTED_SHAPE)
    if words[:1] == ["--counters"]:
        names = words[2:] if words[1:2] == ["--shapes"] else words[1:]
        return run_counters(names)
    return run_suite(SUITE, __doc__.splitlines()[0], words)


if __name__ == "__main__":
    sys.exit(main())
