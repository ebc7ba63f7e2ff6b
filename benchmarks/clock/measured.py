"""Modelled beside measured, kernel by kernel, on a GPU of the architecture that is modelled."""

from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.cases import make_case
from benchmarks.clock.chip import LayerTime, time_layer
from benchmarks.clock.tables import capture_provider
from benchmarks.profiles import kernel_rows
from benchmarks.shapes import find_workloads
from benchmarks.store import code_version


def why_not() -> str | None:
    """Why nothing can be measured here, or None."""
    if not torch.cuda.is_available():
        return "no GPU"
    found = torch.cuda.get_device_capability()
    return None if found == (9, 0) else f"a GPU of sm_{found[0]}{found[1]}; sm_90 is modelled"


def compare(times: LayerTime, profiled: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put a profile beside the model: a row for each kernel, the longest first.

    Args:
        times: of the layer, both passes.
        profiled: rows of `profiles.kernel_rows`.

    Returns:
        ``kernel, launches, modelled_us, measured_us``; 0 where one of the two has none. PyTorch's
        operators are one row, ``aten``.
    """
    rows: dict[str, dict[str, Any]] = {}

    def row(name: str) -> dict[str, Any]:
        empty = {"kernel": name, "launches": 0, "modelled_us": 0.0, "measured_us": 0.0}
        return rows.setdefault(name, empty)

    for time in (*times.forward, *times.backward):
        name = "aten" if time.kernel is None else time.name
        row(name)["modelled_us"] += time.us
        row(name)["launches"] += time.launches
    for kernel in profiled:
        name = kernel["kernel"] if kernel["kernel"] in rows else "aten"
        row(name)["measured_us"] += kernel["time_us"]
    return sorted(rows.values(), key=lambda r: -max(r["measured_us"], r["modelled_us"]))


def measure(name: str) -> dict[str, Any]:
    """Model and measure forward + backward of a routed layer in bfloat16.

    Args:
        name: of a shape of `shapes`, or D-E-k-P-rows.

    Returns:
        A row for clock.json, its ``kernels`` from `compare`.
    """
    workload, device = find_workloads(name)[0], torch.device("cuda")
    dtype = torch.bfloat16
    times = time_layer(capture_provider(workload, "segmoe"))
    layer, inputs = make_case(
        workload, part="routed", routing="uniform", dtype=dtype, device=device
    )
    x = inputs.x.requires_grad_()
    wanted = (x, *layer.parameters())
    profiled = kernel_rows(lambda: torch.autograd.grad(layer(x), wanted, inputs.dy), device)
    return {
        "configuration": f"clock/{name}",
        "provider": "segmoe",
        "pass": "forward+backward",
        "mode": "eager",
        "code": code_version(),
        "kernels": compare(times, profiled),
    }
