"""Pictures of what studies and the model of the clock have found, drawn from committed files."""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from examples.forecaster.report import read_csv  # noqa: E402  needs the path
from examples.forecaster.stress_series import STRESS  # noqa: E402
from examples.studies import report  # noqa: E402
from examples.studies.paired import difference, horizons_of  # noqa: E402
from examples.studies.specialisation import TITLES  # noqa: E402

RESULTS = ROOT / "examples" / "results"
COLOURS = ("#33658a", "#f6ae2d", "#c8553d", "#5b8e7d", "#8e6c8a", "#86bbd8", "#2f4858", "#bc9f6b")
GREY = "#8a8f98"
PASSES = ("forward", "backward")
KINDS = {"token": COLOURS[1], "segment": COLOURS[2]}


def table(name: str) -> list[dict[str, Any]]:
    """Rows of a csv file of results."""
    return read_csv(RESULTS / name)


def runs(*studies: str) -> list[report.Record]:
    """Runs of studies."""
    return [run for study in studies for run in report.read_runs(RESULTS / study)]


def relative(
    found: Sequence[report.Record], data: str, variant: str, against: str
) -> tuple[float, float]:
    """Per cent of MSE over another variant's, and its standard error; both have to be there."""
    value = difference(found, data, variant, against)
    if value is None:
        raise ValueError(
            f"runs must have {variant!r} and {against!r} on {data}, got neither or one"
        )
    return value.mean, value.error


def _names(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def baselines() -> Figure:
    """Token-wise, segment-wise and a linear map against dense, on every data set."""
    rows, found = table("baselines.csv"), runs("baselines")
    scored = {(r["data"], h, r["test_stride"]) for r in found for h in horizons_of(r)}
    linear = {
        (row["data"], row["horizon"]): row["mse"]
        for row in table("closed_form.csv")
        if row["model"] == "linear" and (row["data"], row["horizon"], row["test_stride"]) in scored
    }
    data_sets = _names(rows, "data")
    # Exchange rates are next to a random walk: their spread would hide all else.
    wild = [data for data in data_sets if data == "exchange_rate"]
    calm = [data for data in data_sets if data not in wild]
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots(1, 2, gridspec_kw={"width_ratios": (len(calm), 1.2)})
    for axis, names in zip(axes, (calm, wild), strict=True):
        for place, data in enumerate(names):
            dense = {r["horizon"]: r for r in rows if (r["data"], r["variant"]) == (data, "dense")}
            for step, (kind, colour) in enumerate(KINDS.items()):
                value, spread = relative(found, data, kind, "dense")
                where = place - 0.2 + 0.2 * step
                label = f"{kind}-wise" if place == 0 else None
                axis.errorbar(where, value, spread, fmt="o", ms=5, color=colour, label=label)
            ratio = np.mean([linear[data, h] / row["mse"] for h, row in dense.items()])
            label = "linear map" if place == 0 else None
            axis.plot(place + 0.2, 100 * (ratio - 1), "_", ms=12, color=COLOURS[0], label=label)
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set_xticks(range(len(names)), names)
        axis.set_xlim(-0.6, len(names) - 0.4)
    axes[0].set_ylabel("% of MSE against dense")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def planted() -> Figure:
    """Error over the segment size on series planted for blocks of 2 to 5 patches."""
    rows = table("planted.csv")
    linear = {r["data"]: r for r in table("closed_form.csv") if r["model"] == "linear"}
    law = {r["data"]: r for r in table("closed_form.csv") if r["model"] == "law"}
    data_sets = _names(rows, "data")
    figure = Figure(figsize=(8.5, 2.6), layout="constrained")
    axes = figure.subplots(1, len(data_sets), sharey=True, squeeze=False)[0]
    for axis, data in zip(axes, data_sets, strict=True):
        here = {row["variant"]: row for row in rows if row["data"] == data}
        found = [here["token"], *(here[f"P={size}"] for size in range(2, 9))]
        spreads = [row.get("mse_spread") or 0.0 for row in found]
        values = [row["mse"] for row in found]
        axis.errorbar(range(1, 9), values, spreads, fmt="o-", markersize=3, color=COLOURS[2])
        lines = {"dense": here["dense"], "linear map": linear[data], "the law itself": law[data]}
        for (label, row), colour in zip(lines.items(), (GREY, *COLOURS), strict=False):
            axis.axhline(row["mse"], color=colour, linewidth=0.9, label=label)
        axis.set_title(f"blocks of {data[-1]} patches", fontsize=9)
        axis.set(xticks=range(1, 9), ylim=(0, 0.75))
    axes[0].set_ylabel("test MSE")
    figure.supxlabel("segment size P, the same in both layers", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def sizes() -> Figure:
    """Error over the segment size, and what the probe said."""
    rows = [*table("ablations.csv"), *table("sizes.csv")]
    advised = {
        row["data"]: int(row["size"])
        for row in table("advice/runs.csv")
        if not row["data"].startswith("planted")
    }
    figure = Figure(figsize=(8.5, 2.6), layout="constrained")
    axes = figure.subplots(1, len(advised), sharey=True, squeeze=False)[0]
    for axis, data in zip(axes, advised, strict=True):
        here = {row["variant"]: row for row in rows if row["data"] == data}
        found = [here[f"P={size}"] for size in range(1, 9)]
        best = min(row["mse"] for row in found)
        values = np.array([100 * (row["mse"] / best - 1) for row in found])
        spreads = [100 * (row.get("mse_spread") or 0.0) / best for row in found]
        axis.axhspan(0, 1, color="0.93")
        axis.errorbar(range(1, 9), values, spreads, fmt="o-", markersize=3, color=COLOURS[0])
        size = advised[data]
        axis.plot(size, values[size - 1], "o", markersize=9, fillstyle="none", color=COLOURS[2])
        axis.set_title(data, fontsize=8)
        axis.set_xticks([1, 4, 8])
    axes[0].set_ylabel("% of MSE over the best")
    figure.supxlabel("segment size P, the same in all layers", fontsize=9)
    return figure


def cost() -> Figure:
    """FLOPs with the shared expert's part, and bytes for backward, by configuration and kind."""
    rows = table("cost_triton.csv")
    configs, kinds = _names(rows, "config"), _names(rows, "kind")
    figure = Figure(figsize=(8.5, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, kind in enumerate(kinds):
        for number, config in enumerate(configs):
            row = next(r for r in rows if (r["kind"], r["config"]) == (kind, config))
            dense = next(r for r in rows if (r["kind"], r["config"]) == ("dense", config))
            y = place + 0.27 * (number - 1)
            flops = row["mflop_per_patch"] / dense["mflop_per_patch"]
            part = flops * row["shared_share"]
            left.barh(y, flops - part, 0.25, color=COLOURS[number])
            left.barh(y, part, 0.25, left=flops - part, color=COLOURS[number], alpha=0.4)
            kept = row["ffn_bytes_per_patch_and_layer"] / dense["ffn_bytes_per_patch_and_layer"]
            label = config if place == 0 else None
            right.barh(y, kept, 0.25, color=COLOURS[number], label=label)
    left.set_yticks(range(len(kinds)), kinds)
    left.invert_yaxis()
    left.set_xlabel("FLOPs against dense (pale: shared)")
    right.set_xlabel("bytes for backward against dense")
    right.legend(fontsize=8, frameon=False)
    return figure


def ablations() -> Figure:
    """One change at a time against the default."""
    rows, found = table("ablations.csv"), runs("ablations")
    data_sets = _names(rows, "data")
    names = [n for n in _names(rows, "variant") if n != "default" and not n.startswith("P=")]
    figure = Figure(figsize=(8, 0.9 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(data_sets), sharey=True, squeeze=False)[0]
    for axis, data in zip(axes, data_sets, strict=True):
        for place, name in enumerate(names):
            value, _ = relative(found, data, name, "default")
            axis.plot(value, place, "o", markersize=4, color=COLOURS[0])
        axis.axvline(0, color=GREY, linewidth=0.8)
        axis.set_title(data, fontsize=9)
        axis.set_xlabel("% of MSE against the default")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure


def failures() -> Figure:
    """Series that are hard for segments, and what each kind makes of them."""
    rows, found = table("failures.csv"), runs("failures")
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.subplots(6, 2, gridspec_kw={"width_ratios": (3, 2)})
    for (left, right), (name, make) in zip(axes, STRESS.items(), strict=True):
        _snippet(left, make()[:240, 0], name)
        variants = [n for n in _names(rows, "variant") if n != "dense" and "59" not in n]
        for place, variant in enumerate(variants):
            value, spread = relative(found, name, variant, "dense")
            colour = COLOURS[1] if variant == "token" else COLOURS[2]
            right.errorbar(place, value, spread, fmt="o", markersize=4, color=colour)
        right.axhline(0, color=GREY, linewidth=0.8)
        last = name == [*STRESS][-1]
        right.set_xticks(range(len(variants)), variants if last else [""] * len(variants))
        low, high = right.get_ylim()
        right.set_ylim(min(low, -2), max(high, 2))
    axes[0, 1].set_title("% of MSE against dense", fontsize=9)
    return figure


def _snippet(axis: Axes, values: Any, name: str) -> None:
    """A stretch of a series, with the borders of segments of 5 patches of 8."""
    axis.plot(values, color=COLOURS[0], linewidth=0.8)
    for border in range(0, len(values) + 1, 40):
        axis.axvline(border, color=COLOURS[2], linewidth=0.4)
    axis.set_title(name, fontsize=9, loc="left")
    axis.set(xlim=(0, len(values)), xticks=[], yticks=[])


def _columns(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Columns ``<prefix>_<name>`` that the row has a value in, by name."""
    return {
        key.removeprefix(f"{prefix}_"): value
        for key, value in row.items()
        if key.startswith(f"{prefix}_") and value is not None
    }


def specialisation() -> Figure:
    """What an expert tells about its segments, and its load over training."""
    layers, shares, training = (
        [row for row in table(f"specialisation/{name}.csv") if row["seed"] == 0]
        for name in ("layers", "shares", "training")
    )
    data_sets = _names(layers, "data")
    figure = Figure(figsize=(10, 2.1 * len(data_sets)), layout="constrained")
    axes = figure.subplots(len(data_sets), 3, squeeze=False)
    for (left, middle, right), data in zip(axes, data_sets, strict=True):
        rows = [row for row in layers if row["data"] == data]
        told = [_columns(row, "told") for row in rows]
        for layer, row in enumerate(told):
            places = np.arange(len(row)) + 0.2 * (layer - 1.5)
            left.bar(places, [*row.values()], 0.18, color=COLOURS[layer])
        left.set_xticks(range(len(told[-1])), [*told[-1]], fontsize=7)
        left.set_ylabel(data)
        # What the last layer's expert tells most about, of what has an order to show it in.
        ordered = {name: value for name, value in told[-1].items() if name != "channel"}
        most = max(ordered, key=lambda name: ordered[name])
        place = (data, rows[-1]["layer"], most)
        taken = [r for r in shares if (r["data"], r["layer"], r["quantity"]) == place]
        picture = [[*_columns(row, "bin").values()] for row in taken]
        middle.imshow(picture, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        middle.set(yticks=[], xticks=[], ylabel="expert", xlabel=TITLES.get(most, most))
        entries = [row for row in training if row["data"] == data][:40]
        last = [[*_columns(row, f"load_{rows[-1]['layer']}").values()] for row in entries]
        for load, colour in zip(zip(*last, strict=True), COLOURS, strict=False):
            right.plot(load, color=colour, linewidth=1)
        right.set(ylim=(0, 1), yticks=(0, 0.25, 0.5, 1), xticks=(0, 16, 32))
    axes[0, 0].set_title("share of entropy told, by layer", fontsize=9)
    axes[0, 1].set_title("who takes which, last layer (bright: most)", fontsize=9)
    axes[0, 2].set_title("loads by eighths of the first 5 epochs", fontsize=9)
    return figure


def plans() -> Figure:
    """Modelled time of stages at each width beside ScatterMoE's, from the result file."""
    path = ROOT / "benchmarks" / "results" / "clock" / "sm_90.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    stages = {
        "route": ("route", "dlogits", "sum_splits"),
        "permute": ("permute",),
        "experts": ("expert_ffn", "grouped_gemm", "reduce_partials"),
        "combine": ("_combine",),
    }
    colours = dict(zip([*stages, "ScatterMoE"], [*COLOURS[:4], GREY], strict=True))
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, width in zip(axes, (64, 128, 256), strict=True):
        chosen = [row for row in rows if row["configuration"] == f"{width}-8-2-5-1e6"]
        found = {(row["provider"], row["pass"]): row for row in chosen if row["kind"] == "layer"}
        for place, key in enumerate(itertools.product(("segmoe", "scattermoe"), PASSES)):
            left, parts = 0.0, {"ScatterMoE": ("",)} if key[0] == "scattermoe" else stages
            for stage, names in parts.items():
                of_stage = [c for c in found[key]["calls"] if c["name"].startswith(names)]
                us = sum(call["modelled_us"] for call in of_stage)
                axis.barh(place, us, left=left, color=colours[stage], label=stage)
                left += us
        axis.set_yticks(range(4), 2 * PASSES, fontsize=7)
        axis.set_title(f"D = {width}", fontsize=9)
        axis.set_xlabel("modelled us")
        axis.invert_yaxis()
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5)
    return figure
