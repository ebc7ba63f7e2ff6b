"""Draw the pictures of the pages; whatever has numbers is computed, or read from result files.

    python -m docs.pictures [FOLDER]

Writes into ``docs/pictures`` unless told otherwise.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from benchmarks.parallel_model import Setting, exchanged_bytes, parameters, travelling_slots
from docs import result_pictures
from docs.result_pictures import COLOURS, GREY
from segmoe_kernels import (
    SegMoE,
    collect_routing_stats,
    functional,
    load_balancing_loss,
)
from segmoe_kernels.reference import pool
from segmoe_kernels.routing import Routing
from segmoe_kernels.validation import POOLINGS

ROOT = Path(__file__).resolve().parents[1]


def series(steps: int) -> Tensor:
    """(steps,) a daily wave that turns into a square one and then into noise."""
    time = torch.arange(steps, dtype=torch.float64)
    wave = torch.sin(2 * math.pi * time / 20)
    third = steps // 3
    square = torch.where(wave > 0, 1.0, -1.0)
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return torch.cat([wave[:third], square[third : 2 * third], 0.6 * noise[2 * third :]])


def embed(values: Tensor, width: int) -> Tensor:
    """(1, T, width): each step with its lags, so that a router has something to see."""
    lags = [values.roll(lag) for lag in range(width)]
    return torch.stack(lags, dim=-1)[None].float()


def segments() -> Figure:
    """A series, its segments, and the experts that a layer sends them to after some training."""
    steps, size = 63, 5
    torch.manual_seed(1)
    layer = SegMoE(8, 16, 3, segment_size=size, shared_expert=None, aux_loss_weight=0.05)
    values = series(steps)
    x = embed(values, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(60):  # to forecast the step after each
        loss = (layer(x)[..., 0] - values.roll(-1).float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer.eval()
    ids = layer.forward_with_routing(x)[1].topk_ids[:, 0].tolist()
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axis = figure.subplots()
    for number, expert in enumerate(ids):
        start, stop = number * size, min((number + 1) * size, steps)
        axis.axvspan(start, stop, color=COLOURS[expert], alpha=0.3, linewidth=0)
        axis.axvline(start, color="white", linewidth=2)
        axis.text((start + stop) / 2, 1.75, f"{expert}", ha="center", fontsize=9)
    axis.plot(np.arange(steps) + 0.5, values.numpy(), color="black", linewidth=1.2, marker=".")
    axis.set(xlim=(0, steps), ylim=(-2.1, 2.1), xlabel="step", yticks=[])
    axis.set_title(
        f"T = {steps} steps, segments of P = {size}; the number is the expert, the last segment is "
        f"{steps % size} steps",
        fontsize=9,
    )
    return figure


def routing() -> Figure:
    """One segment of 4 steps, 3 wide, and what each pooling makes of it."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 1, 4, 3, generator=generator)  # (B, J, P, D)
    real = torch.ones(1, 1, 4, dtype=torch.bool)
    pooled = {name: pool(x, real, name)[0, 0] for name in POOLINGS}
    figure = Figure(figsize=(8, 1.8), layout="constrained")
    widths = [3, *(12 if name == "concat" else 3 for name in pooled)]
    axes = figure.subplots(1, 6, width_ratios=widths)
    pictures = {"the segment\n(P = 4, D = 3)": x[0, 0], **pooled}
    for axis, (name, value) in zip(axes, pictures.items(), strict=True):
        cells = value if value.ndim == 2 else value[None]
        axis.imshow(cells.numpy(), cmap="PuOr", vmin=-2, vmax=2, aspect="equal")
        axis.axis("off")
        axis.set_title(name if cells.shape[0] > 1 else f"{name}\nW = {cells.shape[1]}", fontsize=9)
    return figure


def permutation() -> Figure:
    """Slots of a real routing before and after the sort."""
    ids = torch.tensor([[2], [0], [2], [1], [0], [-1], [1], [0]], dtype=torch.int32)
    order = functional.permute(ids, 3, backend="reference")
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axis = figure.subplots()

    def colour(expert: int) -> str:
        return COLOURS[expert] if expert >= 0 else GREY

    for slot, expert in enumerate(ids[:, 0].tolist()):
        place = int(order.slot_to_sorted[slot])
        for x, y in ((slot, 1), (place, 0)):
            axis.add_patch(Rectangle((x - 0.42, y - 0.14), 0.84, 0.28, color=colour(expert)))
            axis.text(x, y, f"{slot}", ha="center", va="center", color="white")
        axis.plot([slot, place], [0.86, 0.14], color=colour(expert), linewidth=1.5, alpha=0.7)
    for expert in range(3):
        start, stop = order.expert_offsets[expert : expert + 2].tolist()
        axis.text((start + stop - 1) / 2, -0.35, f"expert {expert}", ha="center", fontsize=9)
    axis.text(7, -0.35, "not routed", ha="center", fontsize=9)
    axis.text(-0.7, 1, "slots", ha="right", va="center")
    axis.text(-0.7, 0, "sorted", ha="right", va="center")
    axis.set(xlim=(-1.6, 7.6), ylim=(-0.55, 1.3))
    axis.axis("off")
    return figure


def _box(axis: Axes, x: float, y: float, width: float, text: str, colour: str) -> None:
    style = "round,pad=0.0,rounding_size=0.08"
    patch = FancyBboxPatch((x, y), width, 0.6, boxstyle=style, color=colour, alpha=0.85)
    axis.add_patch(patch)
    axis.text(x + width / 2, y + 0.3, text, ha="center", va="center", color="white", fontsize=8)


def _arrow(axis: Axes, x: float, start: float, stop: float) -> None:
    arrow = {"arrowstyle": "->", "color": GREY}
    axis.annotate("", xy=(x, stop), xytext=(x, start), arrowprops=arrow)


def experts() -> Figure:
    """The rows of an expert in each scope, for a segment of 3 steps."""
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    titles = ("token: 3 rows of D", "segment: 1 row of 3 D", "projected: 1 row of D")
    for axis, title in zip(figure.subplots(1, 3), titles, strict=True):
        scope = title.partition(":")[0]
        for step in range(3):
            for y in (0.0, 4.4 if scope == "projected" else 3.0):
                _box(axis, 1.2 * step, y, 1.0, f"step {step}", COLOURS[0])
        if scope == "token":
            for step in range(3):
                _box(axis, 1.2 * step, 1.5, 1.0, "FFN", COLOURS[2])
                _arrow(axis, 1.2 * step + 0.5, 0.65, 1.45)
                _arrow(axis, 1.2 * step + 0.5, 2.15, 2.95)
        elif scope == "segment":
            _box(axis, 0.0, 1.5, 3.4, "FFN, hidden layer 3 F", COLOURS[2])
            _arrow(axis, 1.7, 0.65, 1.45)
            _arrow(axis, 1.7, 2.15, 2.95)
        else:
            _box(axis, 0.0, 1.1, 3.4, "3 D to D", COLOURS[3])
            _box(axis, 1.2, 2.2, 1.0, "FFN", COLOURS[2])
            _box(axis, 0.0, 3.3, 3.4, "D to 3 D", COLOURS[3])
            for start in (0.65, 1.75, 2.85, 3.95):
                _arrow(axis, 1.7, start, start + 0.4)
        axis.set(xlim=(-0.1, 3.6), ylim=(-0.1, 5.2))
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    return figure


def shared() -> Figure:
    """Share of the shared expert in the products of a layer with one choice, by the formula."""
    sizes = np.arange(1, 9)
    figure = Figure(figsize=(6, 2.8), layout="constrained")
    axis = figure.subplots()
    for place, (scope, top_k) in enumerate([("segment", 1), ("segment", 2), ("token", 1)]):
        # A step: its routed products, and those of its part of the shared expert's row.
        wide = sizes if scope == "segment" else np.ones(8)
        share = 100 * wide / (wide + top_k)
        label = f'shared_expert="{scope}", top_k={top_k}'
        axis.plot(sizes, share, marker="o", markersize=4, color=COLOURS[place], label=label)
    axis.set(xlabel="segment_size P", ylabel="% of the FFNs' products", ylim=(0, 100))
    axis.legend(fontsize=8)
    return figure


@contextlib.contextmanager
def saved_bytes(layer: SegMoE) -> Iterator[dict[int, int]]:
    """Collect what autograd keeps, parameters apart: bytes of each storage."""
    own = {p.untyped_storage()._cdata for p in layer.parameters()}
    kept: dict[int, int] = {}
    alive = []  # else another tensor could get the name of one that is gone

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, alive.append):
        yield kept


def looped_bytes(d_model: int, d_ff: int, num_experts: int, steps: int, size: int) -> int:
    """Bytes for backward of a loop over the experts in plain PyTorch, one choice."""
    layer = SegMoE(d_model, d_ff, num_experts, segment_size=size, shared_expert=None)
    x = torch.randn(1, steps, d_model, requires_grad=True)
    with saved_bytes(layer) as kept:
        routed = functional.route(
            x, layer.router.weight, segment_size=size, top_k=1, backend="reference"
        )
        expert = routed.topk_ids[:, 0].long()
        rows = x.reshape(-1, size, d_model)
        parts = []
        for e in range(num_experts):
            mine = rows[expert == e]
            hidden = nn.functional.gelu(mine @ layer.experts.up_proj[e].T)
            out = hidden @ layer.experts.down_proj[e].T
            parts.append(out * routed.topk_weights[expert == e, None])
        y = torch.cat(parts)
    del y
    return sum(kept.values())


def kernel_bytes(d_model: int, d_ff: int, num_experts: int, steps: int, size: int) -> int:
    """Bytes that our operators keep of the same; they say so without being run."""
    interpret, os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET"), "1"
    with FakeTensorMode():
        layer = SegMoE(
            *(d_model, d_ff, num_experts),
            segment_size=size,
            shared_expert=None,
            backend="triton",
        )
        with saved_bytes(layer) as kept:
            layer(torch.randn(1, steps, d_model, requires_grad=True))
    if interpret is None:
        del os.environ["TRITON_INTERPRET"]
    return sum(kept.values())


def backward() -> Figure:
    """Bytes kept for each step over d_ff, width 64."""
    sizes, steps = (64, 128, 256, 512), 4000
    values = np.array(
        [[count(64, d_ff, 4, steps, 5) for count in (looped_bytes, kernel_bytes)] for d_ff in sizes]
    )
    values = values / steps
    figure = Figure(figsize=(6, 2.8), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(sizes))
    axis.bar(places - 0.2, values[:, 0], 0.38, color=COLOURS[1], label="loop over experts, PyTorch")
    axis.bar(places + 0.2, values[:, 1], 0.38, color=COLOURS[0], label="this package's kernels")
    for place, row in zip(places, values, strict=True):
        for shift, value in zip((-0.2, 0.2), row, strict=True):
            axis.text(place + shift, value, f"{value:.0f}", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(places, [f"d_ff = {size}" for size in sizes])
    axis.set_ylabel("bytes kept for a step")
    axis.set_ylim(0, 1.15 * values.max())
    axis.set_title("routed part, float32, D = 64, E = 4, P = 5, one choice", fontsize=9)
    axis.legend(fontsize=8, loc="upper left")
    return figure


def skewed(share: float, num_experts: int = 4, segments_: int = 400) -> Routing:
    """A routing where the first expert gets ``share`` of the segments, with certainty."""
    first = round(share * segments_)
    ids = torch.arange(segments_) % (num_experts - 1) + 1
    ids[:first] = 0
    probs = torch.nn.functional.one_hot(ids, num_experts).float()
    counts = probs.sum(0).int()
    return Routing(probs, probs, probs[:, :1], ids[:, None].int(), counts)


def largest_load(weight: float) -> list[float]:
    """The most used expert's share over 120 steps of training on a toy task."""
    torch.manual_seed(0)
    layer = SegMoE(8, 16, 4, segment_size=4, shared_expert=None, aux_loss_weight=weight)
    with torch.no_grad():
        layer.router.weight[0] += 0.3  # a head start, as chance gives it in large models
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    with collect_routing_stats(layer) as stats:
        for _ in range(120):
            x = torch.randn(32, 16, 8, generator=generator) + 0.5
            loss = (layer(x) - x.roll(1, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            stats.end_step()
    return [entry["global"]["hard_fraction"].max().item() for entry in stats.step_history]


def losses() -> Figure:
    """The loss over the skew, and what its gradient does in training."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    shares = np.linspace(0.25, 1.0, 31)
    values = [load_balancing_loss(skewed(share)).item() for share in shares]
    left.plot(100 * shares, values, color=COLOURS[0])
    left.set(xlabel="% of segments at one of 4 experts", ylabel="load-balancing loss")
    for weight, colour in ((0.0, COLOURS[1]), (0.05, COLOURS[0])):
        label = f"aux_loss_weight={weight}"
        right.plot(100 * np.array(largest_load(weight)), color=colour, label=label)
    right.axhline(25, color=GREY, linewidth=0.8, linestyle="--")
    right.set(xlabel="step of training", ylabel="% at the most used expert", ylim=(0, 100))
    right.legend(fontsize=8)
    return figure


def precision() -> Figure:
    """Errors of the accuracy report, over those of eager PyTorch."""
    path = ROOT / "tests" / "reports" / "accuracy.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(case["dtype"] for case in cases))
    generator = np.random.default_rng(0)
    for place, name in enumerate(names):
        ratios = [
            error["rms"] / error["eager_rms"]
            for case in cases
            if case["dtype"] == name
            for error in case["errors"].values()
            if error["eager_rms"] > 0
        ]
        height = place + generator.uniform(-0.25, 0.25, len(ratios))
        axis.plot(ratios, height, ".", markersize=3, color=COLOURS[place], alpha=0.6)
        axis.plot([float(np.median(ratios))] * 2, [place - 0.35, place + 0.35], color="black")
    axis.axvline(1, color=GREY, linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(names)), names)
    axis.set_xscale("log")
    ticks = (0.4, 0.6, 0.8, 1.0, 1.5)
    axis.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("RMS error of the kernels over that of eager PyTorch (line: median)")
    return figure


def parallel() -> Figure:
    """Bytes that a rank sends in a step of one layer: gradients, or rows and fewer gradients."""
    worlds = (2, 4, 8)
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axis = figure.subplots()
    batches = np.array([100, 300, 1_000, 3_000, 10_000, 30_000])
    for place, world in enumerate(worlds):
        sent, gradients = [], 0.0
        for count in batches:
            setting = Setting(int(count), 5, 128, 256, 8)
            size = parameters(setting)
            factor = 2 * (world - 1) / world * setting.gradient_bytes
            gradients = factor * sum(size.values())
            rows = exchanged_bytes(setting, *travelling_slots(setting, world), world)
            sent.append(sum(rows) + factor * size["others"])
        colour = COLOURS[place]
        axis.plot(batches, np.array(sent) / 1e6, color=colour, marker="o", label=f"{world} ranks")
        axis.axhline(gradients / 1e6, color=colour, linestyle="--", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="segments of a rank in a step", ylabel="MB sent")
    axis.set_title(
        "lines: experts sharded; dashed: all on every rank (D = 128, F = 256, E = 8, P = 5)",
        fontsize=9,
    )
    axis.legend(fontsize=8)
    return figure


def swapping() -> Figure:
    """An encoder layer with its FFN, and with experts."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for axis, swapped in zip(figure.subplots(1, 2), (False, True), strict=True):
        _box(axis, 0.6, 0.0, 2.4, "attention + norm", COLOURS[0])
        _arrow(axis, 1.8, 0.65, 1.35 if swapped else 1.95)
        if swapped:
            _box(axis, 0.0, 1.4, 3.6, "router: segments of P steps", COLOURS[3])
            for expert in range(4):
                _box(axis, 0.95 * expert, 2.5, 0.8, f"FFN {expert}", COLOURS[2])
            _arrow(axis, 1.35, 2.05, 2.45)
            _arrow(axis, 1.8, 3.15, 3.65)
        else:
            _box(axis, 0.6, 2.0, 2.4, "FFN", COLOURS[2])
            _arrow(axis, 1.8, 2.65, 3.65)
        _box(axis, 0.6, 3.7, 2.4, "norm", COLOURS[0])
        axis.set(xlim=(-0.1, 3.8), ylim=(-0.1, 4.5))
        axis.set_title("SegMoEEncoderLayer" if swapped else "TransformerEncoderLayer", fontsize=9)
        axis.axis("off")
    return figure


def deploying() -> Figure:
    """A layer, its program, and what runs it."""
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axis = figure.subplots()
    _box(axis, 3.0, 2.6, 3.0, "SegMoE, reference backend", COLOURS[3])
    _box(axis, 3.0, 1.3, 3.0, "program: PyTorch's operators", COLOURS[2])
    axis.text(4.6, 2.25, "torch.export", fontsize=8, va="center")
    _arrow(axis, 4.5, 2.55, 1.95)
    for x, text in ((0.0, "torch.export.load"), (3.25, "ONNX: onnxruntime"), (6.5, "AOTInductor")):
        _box(axis, x, 0.0, 2.5, text, COLOURS[0])
        arrow = {"arrowstyle": "->", "color": GREY}
        axis.annotate("", xy=(x + 1.25, 0.65), xytext=(4.5, 1.25), arrowprops=arrow)
    axis.set(xlim=(-0.1, 9.1), ylim=(-0.1, 3.3))
    axis.axis("off")
    return figure


def trust() -> Figure:
    """Which check sees which fault of a kernel: fully, in part, not at all."""
    checks = ["interpreter", "ttsem", "compiled ahead", "emulator", "GPU run"]
    faults = {
        "wrong formula": (2, 2, 0, 2, 2),
        "programs of a grid depend on each other": (2, 2, 0, 2, 1),
        "access beyond a tensor, wrong mask": (2, 1, 0, 2, 1),
        "read of what nobody wrote": (2, 1, 0, 2, 1),
        "race of warps, barrier too few": (0, 0, 0, 2, 1),
        "copy or product not waited for": (0, 0, 0, 2, 1),
        "false claim of alignment": (0, 0, 0, 2, 2),
        "what Triton and LLVM make of the source": (0, 1, 1, 2, 2),
        "registers spill, shared memory too large": (0, 0, 2, 0, 2),
        "what ptxas makes of PTX": (0, 0, 1, 0, 2),
        "approximate instructions' true error": (0, 0, 0, 0, 2),
        "time": (0, 0, 0, 0, 2),
    }
    figure = Figure(figsize=(7.8, 3.9), layout="constrained")
    axis = figure.subplots()
    for row, marks in enumerate(faults.values()):
        for column, mark in enumerate(marks):
            face = (GREY, "white", COLOURS[0])[mark] if mark else "none"
            edge = COLOURS[0] if mark else GREY
            axis.scatter(column, -row, s=(8, 90, 90)[mark], facecolor=face, edgecolor=edge)
    axis.set_xticks(range(len(checks)), checks)
    axis.set_yticks([-row for row in range(len(faults))], list(faults))
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set(xlim=(-0.6, len(checks) - 0.4), ylim=(-len(faults) + 0.4, 0.6))
    axis.spines[:].set_visible(False)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    function.__name__: function
    for function in (
        *(segments, routing, permutation, experts, shared, result_pictures.plans),
        *(backward, losses, precision),
        *(parallel, swapping, deploying, trust),
        *(result_pictures.baselines, result_pictures.planted, result_pictures.sizes),
        result_pictures.cost,
        *(result_pictures.ablations, result_pictures.specialisation, result_pictures.failures),
    )
}


def main() -> None:
    """Draw every picture."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    # Names of clips and markers would be random, and a date would change every file.
    matplotlib.rcParams.update({"svg.hashsalt": "segmoe", "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "font.size": 9})
    for name, draw in PICTURES.items():
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
