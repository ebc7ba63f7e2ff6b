"""Tables, result files and plots of the forecasting example."""

from __future__ import annotations

import ast
import base64
import csv
import html
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import segmoe_kernels
from examples.forecaster.data import Score, Windows
from examples.forecaster.model import Forecaster

_COLUMNS = (
    ("model", "model", ""),
    ("test_mse", "test MSE", ".4f"),
    ("test_mae", "test MAE", ".4f"),
    ("val_mse", "val MSE", ".4f"),
    ("parameters", "parameters", ",d"),
    ("active_flops_per_token", "FLOPs/token", ",.0f"),
    ("step_ms", "ms/step", ".1f"),
)


_VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
_STYLE = (
    "body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem } "
    "pre { overflow-x: auto; font-size: .85rem } img { max-width: 100%; display: block }"
)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay rows out under the columns of the results table; a missing value is a dash."""
    cells = [[title for _, title, _ in _COLUMNS]]
    for row in rows:
        cells.append([format(row[key], spec) if key in row else "-" for key, _, spec in _COLUMNS])
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    lines = []
    for line in cells:
        first = line[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def baseline_row(model: str, val: Score, test: Score) -> dict[str, Any]:
    """Row of the table for a forecast that needs no training loop."""
    return {"model": model, "val_mse": val.mse, "test_mse": test.mse, "test_mae": test.mae}


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
        "segmoe_kernels": segmoe_kernels.__version__,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(content, indent=1) + "\n")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under the union of their keys, in order of appearance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows that `write_csv` wrote: numbers and tuples as such, None for what a row lacks."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(stream)]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text or None


def write_page(
    path: Path, title: str, sections: Sequence[tuple[str, str, str, Sequence[Path]]]
) -> None:
    """Write one HTML file with headings, words, tables as text, and pictures inside it."""
    parts = [f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"]
    for heading, words, table, pictures in sections:
        said = html.escape(words).replace(" %", "&nbsp;%")
        parts.append(f"<h2>{html.escape(heading)}</h2><p>{said}</p>")
        parts.append(f"<pre>{html.escape(table)}</pre>")
        for picture in pictures:
            data = base64.b64encode(picture.read_bytes()).decode()
            parts.append(f'<img alt="{picture.stem}" src="data:image/png;base64,{data}">')
    path.parent.mkdir(parents=True, exist_ok=True)
    page = f'<!doctype html><meta charset="utf-8">{_VIEWPORT}' + "\n".join(parts) + "\n"
    path.write_text(page, encoding="utf-8")


def plot_forecast(model: Forecaster, windows: Windows, path: Path, shown: int = 192) -> None:
    """Draw the forecast against the truth for three test windows, last channel."""
    chosen = torch.linspace(0, len(windows) - 1, 3).long()
    past, truth = windows.batch(chosen)
    device = next(model.parameters()).device
    with torch.no_grad():
        forecast = model.eval()(past.to(device)).cpu()
    past, truth, forecast = map(windows.series.unscale_last, (past, truth, forecast))
    figure = Figure(figsize=(9, 7), layout="constrained")
    for i, axes in enumerate(np.ravel(figure.subplots(3, 1))):
        ahead = np.arange(truth.shape[-1])
        recent = past[i, -1, -shown:]
        axes.plot(np.arange(-len(recent), 0), recent, color="0.5", label="look-back")
        axes.plot(ahead, truth[i, -1], color="black", label="truth")
        axes.plot(ahead, forecast[i, -1], color="tab:red", label="forecast")
        axes.set_title(f"test window {int(chosen[i])}, last channel", fontsize=10)
        axes.set_ylabel(windows.series.last)
    axes.set_xlabel("steps from the end of the look-back")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    _save(figure, path)


def expert_loads(model: Forecaster, windows: Windows, num_windows: int = 128) -> np.ndarray:
    """Share of the segments that each expert receives, over windows spread evenly.

    Args:
        model: with routed FFNs.
        windows: to draw from.
        num_windows: at most.

    Returns:
        (layers, E) float64; each row sums to 1.
    """
    chosen = torch.linspace(0, len(windows) - 1, min(num_windows, len(windows))).long()
    past, _ = windows.batch(chosen)
    routings = model.eval().routing(past.to(next(model.parameters()).device))
    counts = np.stack([routing.expert_counts.cpu().double().numpy() for routing in routings])
    loads: np.ndarray = counts / counts.sum(axis=1, keepdims=True)
    return loads


def plot_expert_load(loads: np.ndarray, segment_sizes: Sequence[int], path: Path) -> None:
    """Draw the share of segments per expert, one group of bars per layer."""
    num_layers, num_experts = loads.shape
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for expert in range(num_experts):
        offset = (expert - (num_experts - 1) / 2) * 0.8 / num_experts
        positions = np.arange(num_layers) + offset
        axes.bar(positions, loads[:, expert], 0.8 / num_experts, label=f"expert {expert}")
    axes.axhline(1 / num_experts, color="0.4", linewidth=0.8, linestyle="--")
    labels = [f"layer {i}\nP = {size}" for i, size in enumerate(segment_sizes)]
    axes.set_xticks(range(num_layers), labels)
    axes.set_ylabel("share of segments")
    axes.legend(ncols=num_experts, loc="upper center", fontsize=8)
    axes.set_ylim(0, max(0.6, float(loads.max()) * 1.2))
    _save(figure, path)


def plot_timeline(model: Forecaster, windows: Windows, path: Path) -> None:
    """Draw which expert serves each step of one window, layer by layer, below the series."""
    config = model.config
    past, _ = windows.batch(slice(0, 1))
    past = past[:, -1:]
    routings = model.eval().routing(past.to(next(model.parameters()).device))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    top.plot(windows.series.unscale_last(past[0, 0]), color="black", linewidth=0.9)
    top.set_ylabel(windows.series.last)
    top.set_title("first test window, last channel: first-choice expert of each segment")
    strips = []
    for layer, routing in enumerate(routings):
        per_patch = routing.topk_ids[:, 0].cpu().repeat_interleave(config.layer_segment(layer))
        strips.append(per_patch[: config.num_patches].repeat_interleave(config.patch).numpy())
    _draw_strips(bottom, np.stack(strips), config.num_experts)
    sizes = [config.layer_segment(layer) for layer in range(config.num_layers)]
    labels = [f"layer {i}, P = {size}" for i, size in enumerate(sizes)]
    bottom.set_yticks(range(config.num_layers), labels)
    bottom.set_xlabel("step of the look-back")
    _save(figure, path)


def _draw_strips(axes: Axes, strips: np.ndarray, num_experts: int) -> None:
    colours = matplotlib.colormaps["tab10"].resampled(10)
    picture = colours(strips % 10)
    axes.imshow(picture, aspect="auto", interpolation="nearest", origin="lower")
    for expert in range(num_experts):
        axes.plot([], [], "s", color=colours(expert % 10), label=f"expert {expert}")
    axes.legend(ncols=num_experts, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
