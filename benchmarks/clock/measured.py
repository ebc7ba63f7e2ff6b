"""Modelled beside measured, kernel by kernel, on a GPU of the architecture that is modelled.

What is modelled comes from ``results/clock/sm_90.json``, so that the GPU waits for no simulation.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import make_case, release_memory
from benchmarks.profiles import kernel_rows
from benchmarks.shapes import find_workloads
from benchmarks.store import code_version

MODELLED = Path(__file__).resolve().parents[1] / "results" / "clock" / "sm_90.json"
# What bounds a launch, by the model.
PARTS = ("sm", "hbm", "l2")


def why_not() -> str | None:
    """Why nothing can be measured here, or None."""
    if not torch.cuda.is_available():
        return "no GPU"
    found = torch.cuda.get_device_capability()
    return None if found == (9, 0) else f"a GPU of sm_{found[0]}{found[1]}; sm_90 is modelled"


def modelled_calls(name: str) -> list[dict[str, Any]]:
    """The modelled launches of a shape, forward and backward.

    Raises:
        ValueError: for a shape that is not in the file.
    """
    rows = json.loads(MODELLED.read_text(encoding="utf-8"))["rows"]
    mine = [r for r in rows if (r["kind"], r["configuration"]) == ("layer", name)]
    calls = [call for r in mine if r["provider"] == "segmoe" for call in r["calls"]]
    if not calls:
        raise ValueError(f"{name} must be a shape of {MODELLED.name}")
    return calls


def compare(
    calls: Iterable[dict[str, Any]], profiled: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Put a profile beside the model: a row for each kernel, the longest first.

    Args:
        calls: modelled launches, as `modelled_calls` gives them.
        profiled: rows of `profiles.kernel_rows`.

    Returns:
        ``kernel, modelled_us, measured_us`` (0 where one of the two has none), ``parts`` (modelled
        us of each launch by `PARTS`) and, where both have it, ``measured_over_modelled``. PyTorch's
        operators are one row, ``aten``.
    """
    rows: dict[str, dict[str, Any]] = {}

    def row(name: str) -> dict[str, Any]:
        empty = {"kernel": name, "modelled_us": 0.0, "measured_us": 0.0, "parts": []}
        return rows.setdefault(name, empty)

    for call in calls:
        one = row("aten" if call["name"].startswith("aten.") else call["name"])
        one["modelled_us"] += call["modelled_us"]
        one["parts"].append([call.get(part, 0.0) for part in PARTS])
    for kernel in profiled:
        one = row(kernel["kernel"] if kernel["kernel"] in rows else "aten")
        one["measured_us"] += kernel["time_us"]
    for one in rows.values():
        if one["modelled_us"] and one["measured_us"]:
            one["measured_over_modelled"] = one["measured_us"] / one["modelled_us"]
    return sorted(rows.values(), key=lambda r: -max(r["measured_us"], r["modelled_us"]))


def measure(name: str) -> dict[str, Any]:
    """Measure forward + backward of a routed layer in bfloat16 beside its model.

    Args:
        name: of a shape that is in the file of modelled ones.

    Returns:
        A row for clock.json, its ``kernels`` from `compare`.
    """
    workload, device = find_workloads(name)[0], torch.device("cuda")
    layer, inputs = make_case(
        workload, part="routed", routing="uniform", dtype=torch.bfloat16, device=device
    )
    x = inputs.x.requires_grad_()
    wanted = (x, *layer.parameters())
    profiled = kernel_rows(lambda: torch.autograd.grad(layer(x), wanted, inputs.dy), device)
    release_memory(device)
    return {
        "configuration": f"clock/{name}",
        "provider": "segmoe",
        "pass": "forward+backward",
        "mode": "eager",
        "code": code_version(),
        "kernels": compare(modelled_calls(name), profiled),
    }
