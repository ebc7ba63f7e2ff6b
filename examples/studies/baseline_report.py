"""What the report of the baselines has beyond its table: other models, averages, costs, a verdict.

Rows of `closed_form` stand beside the models where their file is there. Published figures are
those of ``published.csv``, of the same look-back; they come from models many times as large,
trained on all windows, and from all test windows but those of an incomplete last batch.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.forecaster.model import Forecaster, ForecasterConfig
from examples.forecaster.report import read_csv
from examples.studies.cost import kept
from examples.studies.runs import HORIZONS

PUBLISHED = Path(__file__).resolve().parent / "published.csv"
Row = Mapping[str, Any]
# (data, horizon or "mean") to MSE, by model.
Others = dict[str, dict[tuple[str, int | str], float]]


def other_models(folder: Path, look_back: int, horizons: Sequence[int]) -> Others:
    """MSE of models that the study does not train.

    Args:
        folder: of the study's results; ``closed_form.csv`` lies beside it.
        look_back: that published figures must have.
        horizons: of the study; published means are of all four.
    """
    found: Others = {}
    path = folder.with_name(folder.name.replace("baselines", "closed_form") + ".csv")
    if path.is_file():
        for row in read_csv(path):
            found.setdefault(row["model"], {})[row["data"], row["horizon"]] = row["mse"]
    known = {*horizons, "mean"} if tuple(horizons) == HORIZONS else {*horizons}
    for row in read_csv(PUBLISHED):
        if row["look_back"] == look_back and row["horizon"] in known:
            name = f"{row['model']}, published"
            found.setdefault(name, {})[row["data"], row["horizon"]] = row["mse"]
    return found


def horizons_of(run: Row) -> list[int]:
    """Horizons that a run is scored at, by its columns."""
    return [int(key[4:]) for key in run if re.fullmatch(r"mse_\d+", key)]


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
        mse = statistics.mean(record[f"mse_{horizon}"] for horizon in horizons_of(record))
        groups.setdefault((record["data"], record["variant"]), []).append(mse)
    rows = []
    for (data, variant), values in groups.items():
        row: dict[str, Any] = {"data": data, "horizon": "mean", "variant": variant}
        row |= {"mse": statistics.mean(values), "seeds": len(values)}
        if len(values) > 1:
            row["mse_spread"] = statistics.stdev(values)
        rows.append(row)
    return rows


def compare(rows: Sequence[Row], one: str, other: str) -> dict[str, int]:
    """Count where one variant is better, worse, or neither by more than the seeds explain.

    Neither: the means are closer than two standard errors of their difference.
    """
    places: dict[tuple[str, Any], dict[str, Row]] = {}
    for row in rows:
        places.setdefault((row["data"], row["horizon"]), {})[row["variant"]] = row
    count = {"better": 0, "worse": 0, "neither": 0}
    for here in places.values():
        if one not in here or other not in here:
            continue
        a, b = here[one], here[other]
        if min(a["seeds"], b["seeds"]) < 2:
            continue
        error = math.hypot(*(r["mse_spread"] / math.sqrt(r["seeds"]) for r in (a, b)))
        difference = a["mse"] - b["mse"]
        if abs(difference) <= 2 * error:
            count["neither"] += 1
        else:
            count["better" if difference < 0 else "worse"] += 1
    return count


def verdict(rows: Sequence[Row], others: Others) -> list[str]:
    """Sentences: segment-wise against the two others, and all three against the linear map."""
    lines = []
    for other in ("dense", "token"):
        count = compare(rows, "segment", other)
        if total := sum(count.values()):
            lines.append(
                f"Segment-wise against {other}, {total} rows: better in {count['better']}, worse "
                f"in {count['worse']}, and closer than two standard errors of the difference in "
                f"{count['neither']}."
            )
    linear = others.get("linear", {})
    known = [row for row in rows if (row["data"], row["horizon"]) in linear]
    if known:
        beaten = sum(row["mse"] < linear[row["data"], row["horizon"]] for row in known)
        lines.append(
            "The linear map in closed form is worse than the mean of a trained model in "
            f"{beaten} of {len(known)} cells."
        )
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
