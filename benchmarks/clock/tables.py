"""Rows of what the model says, and the tables that `report` makes of them."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from benchmarks.clock.capture import Capture, KernelLaunch, capture_layer
from benchmarks.clock.checks import checks
from benchmarks.clock.chip import LayerTime, Time, time_layer
from benchmarks.clock.machine import H200, SENSITIVITY, Machine
from benchmarks.clock.peers import capture_scattermoe
from benchmarks.codegen import NVIDIA_BIN, run_tool
from benchmarks.common import environment
from benchmarks.peers import SkippedError
from benchmarks.shapes import Workload, find_workloads

PROVIDERS = ("segmoe", "scattermoe")

# The committed table.
TARGETS = tuple(w.name for w in find_workloads("grid,qwen3-8k,qwen3-32k,mixtral-8k"))


def capture_provider(
    workload: Workload,
    provider: str,
    dtype: torch.dtype = torch.bfloat16,
    tiles: Mapping[str, Mapping[str, int]] | None = None,
) -> Capture:
    """Catch a workload's launches with one of `PROVIDERS`."""
    kind: dict[str, Any] = {"activation": workload.activation, "gated": workload.gated}
    if provider == "scattermoe":
        return capture_scattermoe(workload.shape, dtype=dtype, **kind)
    return capture_layer(workload.shape, dtype=dtype, tiles=tiles, **kind)


def layer_rows(
    workload: Workload,
    providers: Iterable[str],
    dtype: torch.dtype = torch.bfloat16,
    machine: Machine = H200,
    tiles: Mapping[str, Mapping[str, int]] | None = None,
) -> list[dict[str, Any]]:
    """Model a workload with each provider: a row for each pass.

    Args:
        workload: shape and kind of experts.
        providers: of `PROVIDERS`.
        dtype: of the layer.
        machine: where.
        tiles: as `capture_layer` takes them.
    """
    rows = []
    for provider in providers:
        about = {
            "kind": "layer",
            "configuration": workload.name,
            "provider": provider,
            "dtype": str(dtype).removeprefix("torch."),
        }
        try:
            capture = capture_provider(workload, provider, dtype, tiles)
        except SkippedError as error:
            rows.append({**about, "skipped": str(error)})
            continue
        times = time_layer(capture, machine)
        rows += [{**about, **_pass_row(capture, times, name)} for name in ("forward", "backward")]
    return rows


def _pass_row(capture: Capture, times: LayerTime, name: str) -> dict[str, Any]:
    chosen: list[Time] = getattr(times, name)
    kernels = sorted(
        call.kernel.digest for call in getattr(capture, name) if isinstance(call, KernelLaunch)
    )
    return {
        "pass": name,
        "launches": sum(time.launches for time in chosen),
        "modelled_us": round(times.us(name, 0.0), 2),
        "modelled_us_with_1us_launches": round(times.us(name, 1.0), 2),
        "modelled_us_with_2us_launches": round(times.us(name, 2.0), 2),
        "kernels": hashlib.sha256(" ".join(kernels).encode()).hexdigest()[:12],
        "calls": [kernel_row(time) for time in chosen],
    }


def kernel_row(time: Time) -> dict[str, Any]:
    """One launch: its time and what bounds it."""
    row: dict[str, Any] = {"name": time.name, "modelled_us": round(time.us, 2), "bound": time.bound}
    if time.kernel is not None:
        row |= {
            "programs": time.programs,
            "on_an_sm": time.resident,
            "warps": time.kernel.num_warps,
            "registers": time.kernel.registers,
            "spills": time.kernel.spills,
            "shared_bytes": time.kernel.shared_bytes,
        }
    return row | {name: round(value, 3) for name, value in time.parts.items()}


def check_rows(machine: Machine = H200) -> list[dict[str, Any]]:
    """The published figures beside the modelled ones."""
    return [
        {
            "kind": "check",
            "configuration": check.name,
            "unit": check.unit,
            "published": check.low if check.low == check.high else [check.low, check.high],
            "modelled": round(check.modelled, 1),
            "holds": check.holds,
        }
        for check in checks(machine)
    ]


def sensitivity_rows(
    workload: Workload, providers: Iterable[str], machines: Mapping[str, Machine] = SENSITIVITY
) -> list[dict[str, Any]]:
    """Totals with other values of what is from memory, launches at 1 us."""
    rows = []
    for name, machine in machines.items():
        for row in layer_rows(workload, providers, machine=machine):
            kept = {k: v for k, v in row.items() if k not in {"calls", "kernels", "launches"}}
            rows.append({**kept, "kind": "sensitivity", "machine": name})
    return rows


def clock_environment() -> dict[str, str]:
    """Versions that the model's answers depend on."""
    ptxas = run_tool(NVIDIA_BIN / "ptxas", "--version")
    release = re.search(r"release ([\d.]+)", ptxas)
    return {**environment(), "ptxas": release[1] if release else "", "modelled_gpu": H200.name}
