"""Where the time of one call goes: each kernel's share, by PyTorch's profiler; a column of `layer`.

Hardware counters: ``ncu python -m benchmarks.layer --in-process --providers segmoe --shapes ...``.
"""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import on_gpu

CALLS = 5


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
    gpu = on_gpu(device)
    if gpu:
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiler:
        for _ in range(count):
            function()
        if gpu:
            torch.cuda.synchronize(device)
    rows = []
    for event in profiler.key_averages():
        if gpu and "CUDA" not in str(event.device_type):
            continue
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        if spent:
            launches = event.count / count
            rows.append({"kernel": event.key, "launches": launches, "time_us": spent / count})
    total = sum(row["time_us"] for row in rows)
    for row in rows:
        row["time_share"] = row["time_us"] / total
    return sorted(rows, key=lambda row: -row["time_us"])
