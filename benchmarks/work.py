"""The least that a layer and its stages have to compute and to move, and what the clock says."""

import functools
import json
from pathlib import Path
from typing import Any

from benchmarks.shapes import Shape, Workload

MODELLED = Path(__file__).resolve().parent / "results" / "clock" / "sm_90.json"
# Prefixes of the kernels of a stage where the modelled table has them.
KERNELS = {
    "route": ("route_", "dlogits", "sum_splits"),
    "permute": ("_permute",),
    "expert_ffn": ("expert_ffn", "grouped_gemm", "reduce_partials"),
}


def needed_flops(shape: Shape, *, backward: bool, gated: bool = False, shared: bool = False) -> int:
    """FLOPs of the products in the layer's definition.

    Forward: ``B*T * (4 * top_k * D * F + 2 * D * E)``, gated experts 6 instead of 4; a segment-wide
    shared expert adds the same of one FFN of width ``P * D`` and its gate for each segment. The
    gradients of both operands cost twice that again.

    Args:
        shape: sizes.
        backward: forward and backward; else the forward alone.
        gated: experts with a third matrix.
        shared: with the segment-wide shared expert.

    Returns:
        A multiply-add counts two.
    """
    products = 6 if gated else 4
    experts = products * shape.top_k * shape.d_model * shape.d_ff
    flops = shape.steps * (experts + 2 * shape.d_model * shape.num_experts)
    if shared:
        wide = shape.segment_size * shape.d_model
        flops += shape.segments * (products * wide * shape.segment_size * shape.d_ff + 2 * wide)
    return flops * (3 if backward else 1)


def floor_bytes(
    shape: Shape, *, backward: bool, itemsize: int = 4, gated: bool = False, shared: bool = False
) -> int:
    """The least bytes that go through memory.

    Forward: x, y and the weights once. Forward + backward: that, then x, dy, dx, the weights and
    their gradients once, so ``5 * |x| + 3 * |weights|``.

    Args:
        shape: sizes.
        backward: forward and backward; else the forward alone.
        itemsize: bytes of an element.
        gated: experts with a third matrix.
        shared: with the segment-wide shared expert.

    Returns:
        Bytes.
    """
    x = shape.steps * shape.d_model
    matrices = 3 if gated else 2
    weights = matrices * shape.num_experts * shape.d_model * shape.d_ff
    weights += shape.num_experts * shape.segment_size * shape.d_model
    if shared:
        wide = shape.segment_size * shape.d_model
        weights += matrices * wide * shape.segment_size * shape.d_ff + wide
    return itemsize * (5 * x + 3 * weights if backward else 2 * x + weights)


def layer_work(workload: Workload, part: str, *, backward: bool, itemsize: int) -> dict[str, float]:
    """``needed_gflop`` and ``floor_mb`` of the layer.

    Args:
        workload: sizes and kind of expert.
        part: "routed" or "whole", with the segment-wide shared expert.
        backward: forward and backward; else the forward alone.
        itemsize: bytes of an element.
    """
    kind: dict[str, Any] = {"gated": workload.gated, "shared": part == "whole"}
    flops = needed_flops(workload.shape, backward=backward, **kind)
    size = floor_bytes(workload.shape, backward=backward, itemsize=itemsize, **kind)
    return {"needed_gflop": flops / 1e9, "floor_mb": size / 1e6}


def stage_work(
    workload: Workload, stage: str, *, backward: bool, itemsize: int
) -> dict[str, float]:
    """The same of one stage: what it reads and writes once; backward reads inputs and dy again.

    Args:
        workload: sizes and kind of expert.
        stage: a key of `stages.STAGES`.
        backward: forward and backward; else the forward alone.
        itemsize: bytes of an element; choices and their weights have 4.
    """
    shape, matrices = workload.shape, 3 if workload.gated else 2
    rows, slots = shape.steps * shape.top_k, shape.segments * shape.top_k
    x, matrix = itemsize * shape.steps * shape.d_model, shape.d_model * shape.d_ff
    weights = itemsize * shape.num_experts * matrix
    router = itemsize * shape.num_experts * shape.segment_size * shape.d_model
    flops, read, written = {
        "route": (2 * shape.steps * shape.d_model * shape.num_experts, x + router, 4 * slots),
        "permute": (0, 4 * slots, 4 * slots),
        "expert_ffn": (2 * matrices * rows * matrix, x + matrices * weights + 4 * slots, x),
        "grouped_gemm": (
            2 * rows * matrix,
            shape.top_k * x + weights,
            itemsize * rows * shape.d_ff,
        ),
        "combine": (0, (shape.top_k + 1) * x + itemsize * shape.segments, x),
    }[stage]
    size = 3 * read + 2 * written if backward else read + written
    return {"needed_gflop": flops * (3 if backward else 1) / 1e9, "floor_mb": size / 1e6}


@functools.cache
def _modelled() -> dict[tuple[str, ...], dict[str, Any]]:
    rows = json.loads(MODELLED.read_text(encoding="utf-8"))["rows"]
    keys = ("configuration", "provider", "dtype", "pass")
    return {tuple(r[k] for k in keys): r for r in rows if r["kind"] == "layer" and "calls" in r}


def modelled_us(
    shape: str, provider: str, dtype: str, *, backward: bool, mode: str, stage: str | None = None
) -> dict[str, float]:
    """``modelled_us`` on sm_90 of the routed part or a stage, launches as the mode has them.

    Args:
        shape: its name in the table of `benchmarks.clock`.
        provider: "segmoe", or for the layer "scattermoe".
        dtype: name.
        backward: forward and backward; else the forward alone.
        mode: "graph" launches in 1 us, "eager" in 2 us.
        stage: a key of `stages.STAGES`, or None for all.

    Returns:
        Nothing where the table doesn't have it.
    """
    passes = ("forward", "backward") if backward else ("forward",)
    found = [_modelled().get((shape, provider, dtype, passed)) for passed in passes]
    if None in found or (stage is not None and (stage not in KERNELS or provider != "segmoe")):
        return {}
    launch_us = 1 if mode == "graph" else 2
    if stage is None:
        total = sum(row[f"modelled_us_with_{launch_us}us_launches"] for row in found if row)
    else:
        calls = [call for row in found if row for call in row["calls"]]
        total = sum(
            call["modelled_us"] + launch_us
            for call in calls
            if call["name"].startswith(KERNELS[stage])
        )
    return {"modelled_us": round(total, 2)}
