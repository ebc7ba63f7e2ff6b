"""What the report of the baselines has beyond its table: other models, averages, costs, a verdict.

Rows of `closed_form` stand beside the models where their file is there. Published figures are
those of ``published.csv``, of the same look-back; they come from models many times as large,
trained on all windows, and from all test windows but those of an incomplete last batch.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.forecaster.model import Forecaster, ForecasterConfig
from examples.forecaster.report import read_csv
from examples.studies.cost import kept
from examples.studies.paired import (
    LEVEL,
    comparisons,
    count_verdicts,
    detectable,
    difference,
    mean_mse,
)
from examples.studies.runs import HORIZONS

PUBLISHED = Path(__file__).resolve().parent / "published.csv"
Row = Mapping[str, Any]
PAIRS = (("segment", "dense"), ("segment", "token"), ("token", "dense"))
# (data, horizon or "mean") to MSE, by model.
Others = dict[str, dict[tuple[str, int | str], float]]


def other_models(folder: Path, records: Sequence[Row], horizons: Sequence[int]) -> Others:
    """MSE of models that the study does not train.

    Args:
        folder: of the study's results; ``closed_form.csv`` lies beside it.
        records: runs, whose windows the closed forms were scored on; published figures need their
            look-back.
        horizons: of the study; published means are of all four.
    """
    found: Others = {}
    suffix = "_full" if folder.name.endswith("_full") else ""
    path = folder.with_name(f"closed_form{suffix}.csv")
    scored = {(run["data"], run["look_back"], run["test_stride"]) for run in records}
    for row in read_csv(path) if path.is_file() else []:
        if (row["data"], row["look_back"], row["test_stride"]) in scored:
            found.setdefault(row["model"], {})[row["data"], row["horizon"]] = row["mse"]
    look_back = records[0]["look_back"]
    known = {*horizons, "mean"} if tuple(horizons) == HORIZONS else {*horizons}
    for row in read_csv(PUBLISHED):
        if row["look_back"] == look_back and row["horizon"] in known:
            name = f"{row['model']}, published"
            found.setdefault(name, {})[row["data"], row["horizon"]] = row["mse"]
    return found


def add_means(others: Others, horizons: Sequence[int]) -> None:
    """Add the mean over the horizons where a model has all of them and none was published."""
    for scores in others.values():
        for data in {data for data, _ in scores}:
            values = [scores.get((data, horizon)) for horizon in horizons]
            if (data, "mean") not in scores and None not in values:
                scores[data, "mean"] = statistics.mean(v for v in values if v is not None)


def mean_rows(records: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each data set and variant: mean over the horizons, and its spread over seeds."""
    groups: dict[tuple[str, str], list[float]] = {}
    for record in records:
        groups.setdefault((record["data"], record["variant"]), []).append(mean_mse(record, None))
    rows = []
    for (data, variant), values in groups.items():
        row: dict[str, Any] = {"data": data, "horizon": "mean", "variant": variant}
        row |= {"mse": statistics.mean(values), "seeds": len(values)}
        if len(values) > 1:
            row["mse_spread"] = statistics.stdev(values)
        rows.append(row)
    return rows


def verdict(records: Sequence[Row], rows: Sequence[Row], others: Others) -> list[str]:
    """Sentences: each kind against another, and all of them against the linear map."""
    lines = []
    for one, other in PAIRS:
        found = comparisons(records, one, other).values()
        if not found:
            continue
        count = count_verdicts(found)
        lines.append(
            f"{one.capitalize()}-wise against {other}, {len(found)} rows: better in "
            f"{count['better']}, worse in {count['worse']} by an interval of 95 % (paired seeds, "
            f"Student's t); chance alone would give {LEVEL * len(found):.1f}. Detectable were "
            f"{detectable(found)}."
        )
    for name in ("linear", "linear, rolled"):
        linear = others.get(name, {})
        known = [row for row in rows if (row["data"], row["horizon"]) in linear]
        if known:
            beaten = sum(row["mse"] < linear[row["data"], row["horizon"]] for row in known)
            lines.append(
                f"The map in closed form ({name}) is worse than the mean of a trained model in "
                f"{beaten} of {len(known)} cells."
            )
    return lines


def differences(records: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of a table: per cent of MSE by pair and data set, means over the horizons."""
    data_sets = list(dict.fromkeys(run["data"] for run in records))
    lines = [
        "| | " + " | ".join(data_sets) + " | detectable |",
        "|---|" + "---:|" * (len(data_sets) + 1),
    ]
    for one, other in pairs:
        found = [difference(records, data, one, other) for data in data_sets]
        if any(found):
            cells = ["-" if value is None else str(value) for value in found]
            seen = [value.detectable for value in found if value and value.seeds > 1]
            span = f"{min(seen):.1f} to {max(seen):.1f}" if seen else "-"
            lines.append(f"| {one} against {other} | " + " | ".join([*cells, span]) + " |")
    return lines


def costs(records: Sequence[Row], variants: Sequence[str]) -> list[str]:
    """Lines of a table: what each kind costs; memory is computed anew from the settings."""
    lines = [
        "| | parameters | active FLOPs a patch, forward | bytes kept for backward a patch |"
        " ms a step (median of runs) |",
        "|---|---:|---:|---:|---:|",
    ]
    for variant in variants:
        runs = [record for record in records if record["variant"] == variant]
        settings = (field.name for field in dataclasses.fields(ForecasterConfig))
        config = ForecasterConfig(**{name: runs[0][name] for name in settings})
        model = Forecaster(config)
        past = torch.randn(1, 7, config.look_back)
        size, _ = kept([model], lambda model=model, past=past: model(past))
        lines.append(
            f"| {variant} | {runs[0]['parameters']:,} | {runs[0]['active_flops_per_token']:,.0f} "
            f"| {size / (7 * config.num_patches):,.0f} "
            f"| {statistics.median(run['step_ms'] for run in runs):.0f} |"
        )
    return lines
