"""Tables and plots of a study, from the file of its runs alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.forecaster.data import PLANTED
from examples.forecaster.report import read_csv, write_csv
from examples.forecaster.stress_series import STRESS
from examples.studies.baseline_report import (
    PAIRS,
    Others,
    add_means,
    costs,
    differences,
    mean_rows,
    other_models,
    verdict,
)
from examples.studies.paired import difference, horizons_of
from examples.studies.runs import PLANTED_TEXT, REDUCED, REDUCED_FURTHER

Record = Mapping[str, Any]
DIFFERENCES = (
    "Per cent of MSE, seed by seed: mean and, in brackets, the interval of 95 % by Student's t; "
    "`detectable` is the least difference that as many seeds show in 80 % of studies."
)
# Series that no linear map can be the best model of.
GENERATED = ("multiscale", *STRESS, *PLANTED)
# What a variant is compared with, where it isn't the first one.
REFERENCES = dict.fromkeys(("P=5 of 59", "P=8 of 59"), "dense of 59")


def read_runs(folder: Path) -> list[Record]:
    """Every run of a study, in the order of data, variant and seed."""
    path = folder / "runs.csv"
    rows = read_csv(path) if path.is_file() else []
    return sorted(rows, key=lambda row: (row["data"], row["variant"], row["seed"]))


def summarise(records: Iterable[Record]) -> list[dict[str, Any]]:
    """A row for each data set, horizon and variant: mean and spread over the seeds.

    The spread is the sample standard deviation; absent for a single seed.
    """
    groups: dict[tuple[str, int, str], list[Record]] = {}
    for record in records:
        for horizon in horizons_of(record):
            key = (record["data"], horizon, record["variant"])
            groups.setdefault(key, []).append(record)
    rows = []
    for (data, horizon, variant), runs in sorted(groups.items()):
        row: dict[str, Any] = {"data": data, "horizon": horizon, "variant": variant}
        for error in ("mse", "mae"):
            values = [run[f"{error}_{horizon}"] for run in runs]
            row[error] = statistics.mean(values)
            if len(values) > 1:
                row[f"{error}_spread"] = statistics.stdev(values)
        row |= {
            "seeds": len(runs),
            "windows": runs[0][f"windows_{horizon}"],
            "parameters": runs[0]["parameters"],
            "active_flops_per_token": runs[0]["active_flops_per_token"],
        }
        rows.append(row)
    return rows


def cell(row: Mapping[str, Any], error: str = "mse") -> str:
    """Mean and spread as text."""
    spread = row.get(f"{error}_spread")
    return f"{row[error]:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")


def ordered(names: Iterable[str], first: Sequence[str]) -> list[str]:
    """Names in the order of ``first``, then the others as they come."""
    names = list(dict.fromkeys(names))
    return [n for n in first if n in names] + [n for n in names if n not in first]


def markdown(
    rows: Sequence[Mapping[str, Any]], variants: Sequence[str], others: Others
) -> list[str]:
    """Lines of a table: data sets and horizons down, variants and then other models across."""
    columns = [*variants, "best", *others]
    lines = [
        "| data | horizon | " + " | ".join(columns) + " |",
        "|---|---:|" + "---:|" * len(variants) + "---|" + "---:|" * len(others),
    ]
    places = list(dict.fromkeys((row["data"], row["horizon"]) for row in rows))
    for data, horizon in places:
        here = {
            row["variant"]: row for row in rows if (row["data"], row["horizon"]) == (data, horizon)
        }
        # Among some of them there is no best one yet.
        whole = len(here) == len(variants)
        best = min(here.values(), key=lambda row: row["mse"])["variant"] if whole else "-"
        cells = [cell(here[name]) if name in here else "-" for name in variants]
        beside = [scores.get((data, horizon)) for scores in others.values()]
        cells += [best, *("-" if mse is None else f"{mse:.4g}" for mse in beside)]
        lines.append(f"| {data} | {horizon} | " + " | ".join(cells) + " |")
    return lines


def plot_relative(
    records: Sequence[Record], variants: Sequence[str], against: str, path: Path
) -> None:
    """Draw the error of each variant over that of one of them, a panel for each data set.

    Points are means over horizons and seeds of the ratio; whiskers its standard error.
    """
    data_sets = list(dict.fromkeys(run["data"] for run in records))
    figure = Figure(
        figsize=(2.2 + 2.1 * len(data_sets), 1.2 + 0.26 * len(variants)), layout="constrained"
    )
    axes = figure.subplots(1, len(data_sets), sharey=True, squeeze=False)[0]
    places = np.arange(len(variants))
    for axis, data in zip(axes, data_sets, strict=True):
        for place, name in zip(places, variants, strict=True):
            found = difference(records, data, name, against)
            if found is not None:
                axis.errorbar(
                    found.mean, place, xerr=found.error, fmt="o", markersize=4, color="#33658a"
                )
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.set_title(data, fontsize=9)
        axis.set_xlabel("% of MSE", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(places, variants)
    axes[0].invert_yaxis()
    figure.suptitle(f"test MSE against {against}", fontsize=10)
    figure.savefig(path, dpi=150)


def write_report(study: str, folder: Path, scale: str = "small") -> None:
    """Write ``<study>.md``, ``.csv`` and ``.png`` beside the folder of results.

    Raises:
        ValueError: if the folder has no result.
    """
    records = read_runs(folder)
    if not records:
        raise ValueError(f"{folder} has no result yet: run the study first")
    rows = summarise(records)
    first = ["default", "P=4"] if study in {"ablations", "sizes"} else ["dense", "token", "segment"]
    variants = ordered((row["variant"] for row in rows), first)
    against = variants[0]
    seeds = sorted({record["seed"] for record in records})
    reduced = {"baselines": REDUCED, "planted": PLANTED_TEXT}.get(study, REDUCED_FURTHER)
    flags = "--report"
    if scale == "full":
        reduced, flags = "", "--scale full --report"
    lines = [
        f"# {study.capitalize()}",
        "",
        f"{len(records)} runs, seeds {', '.join(map(str, seeds))}; mean ± standard deviation over "
        "seeds of the test MSE on scaled values. Written by",
        f"`python -m examples.studies {study} {flags}` from `{folder.name}/runs.csv`, a row a run: "
        "settings, seed, versions, scores.",
        "",
    ]
    lines += [reduced, ""] if reduced else []
    if study == "baselines":
        lines += describe_baselines(records, rows, variants, folder)
    else:
        lines += describe_changes(records, rows, variants, folder)
    default = [record for record in records if record["variant"] == "default"]
    if default:
        sizes = ", ".join(map(str, default[0]["segment_sizes"]))
        lines += ["", f"`default`: segments of {sizes} patches, from the first layer to the last."]
    write_csv(folder.with_suffix(".csv"), rows)
    text = "\n".join(lines) + "\n"
    folder.with_suffix(".md").write_text(text, encoding="utf-8")
    plot_relative(records, variants, against, folder.with_suffix(".png"))
    print(text)


def describe_baselines(
    records: Sequence[Record], rows: Sequence[Mapping[str, Any]], variants: list[str], folder: Path
) -> list[str]:
    """Lines of the tables by horizon, of the means over horizons, of costs, and the verdict."""
    horizons = sorted({h for record in records for h in horizons_of(record)})
    others = other_models(folder, records, horizons)
    single = {k: v for k, v in others.items() if any(horizon != "mean" for _, horizon in v)}
    lines = [*markdown(rows, variants, single), "", *verdict(records, rows, others)]
    add_means(others, horizons)
    lines += ["", f"Mean over the horizons {', '.join(map(str, horizons))}:", ""]
    lines += markdown(mean_rows(records), variants, others)
    lines += ["", f"{DIFFERENCES} Means over the horizons:", "", *differences(records, PAIRS)]
    return [*lines, "", "What it costs:", "", *costs(records, variants)]


def describe_changes(
    records: Sequence[Record], rows: Sequence[Mapping[str, Any]], variants: list[str], folder: Path
) -> list[str]:
    """Lines of the tables of a study of many variants: errors, differences, under-training."""
    usual = [run for run in records if run["variant"] == variants[0]]
    others = other_models(folder, usual, ())
    lines = transposed(rows, variants, others)
    pairs = [(name, REFERENCES.get(name, variants[0])) for name in variants]
    lines += ["", DIFFERENCES, "", *differences(records, [p for p in pairs if p[0] != p[1]])]
    if all(run["seed"] == 0 for run in records):
        lines += ["", "One seed: what chance does is unknown, so no difference is told from it."]
    beaten = [
        f"{data} ({linear:.4f} against {best:.4f})"
        for (data, _), linear in others.get("linear", {}).items()
        if data in GENERATED
        and (best := min(row["mse"] for row in rows if row["data"] == data)) > linear
    ]
    if beaten:
        lines += ["", f"Under-trained, as a linear map is below every model: {', '.join(beaten)}."]
    return lines


def transposed(
    rows: Sequence[Mapping[str, Any]], variants: Sequence[str], others: Others
) -> list[str]:
    """Lines of a table: variants and then other models down, data sets across."""
    places = list(dict.fromkeys((row["data"], row["horizon"]) for row in rows))
    lines = [
        "| variant | " + " | ".join(f"{data}, H {horizon}" for data, horizon in places) + " |",
        "|---|" + "---:|" * len(places),
    ]
    found = {(row["variant"], row["data"], row["horizon"]): cell(row) for row in rows}
    for name, scores in others.items():
        found |= {(name, *place): f"{mse:.4f}" for place, mse in scores.items()}
    for name in (*variants, *others):
        cells = [found.get((name, *place), "-") for place in places]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines
