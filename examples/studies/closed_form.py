"""Score what needs no training, beside the studies: the last value repeated, and a linear map.

    python -m examples.studies.closed_form

The linear map is NLinear fitted in closed form (`fit_linear`) on every train window, with the
look-back of the models: for each horizon, and for 32 steps that are rolled out as the models are.
Scores are of the test windows that the models of each study are scored on. Writes
``examples/results/closed_form.csv``, which the reports show.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.forecaster.data import (
    PLANTED,
    Score,
    Series,
    Windows,
    fit_linear,
    load_series,
    score_linear,
    score_repeat,
)
from examples.forecaster.report import versions, write_csv
from examples.forecaster.sources import DataUnavailableError
from examples.studies.runs import IF_PRESENT, PLANTED_SEEDS, STUDIES

RESULTS = Path(__file__).resolve().parents[1] / "results"


ROLLED = 32


def places_of(scale: str) -> dict[str, list[tuple[int, int, int]]]:
    """Look-back, horizon and test stride of all runs, by data set."""
    found: dict[str, set[tuple[int, int, int]]] = {}
    for runs in STUDIES.values():
        for run in runs(scale, "cpu"):
            if run.data not in IF_PRESENT:
                place = run.config.look_back, run.options.test_stride
                found.setdefault(run.data, set()).update(
                    (place[0], horizon, place[1]) for horizon in run.horizons
                )
    return {data: sorted(places) for data, places in found.items()}


def rows_of(series: Series, places: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Rows of a data set: repeat, linear, rolled beyond the steps that are rolled, or the law."""

    @functools.cache
    def fit(look_back: int, horizon: int) -> Tensor:
        return fit_linear(Windows(series, "train", look_back, horizon, torch.float64))

    rows = []
    for look_back, horizon, stride in places:
        test = Windows(series, "test", look_back, horizon, torch.float64, stride)
        scores = {
            "repeat": score_repeat(test),
            "linear": score_linear(fit(look_back, horizon), test),
        }
        if series.law is not None:
            law = dataclasses.replace(series, values=series.law)
            forecast = Windows(law, "test", look_back, horizon, torch.float64, stride)
            scores["law"] = Score()
            scores["law"].add(forecast.batch(slice(None))[1], test.batch(slice(None))[1])
        elif horizon > ROLLED:
            scores["linear, rolled"] = score_linear(fit(look_back, ROLLED), test)
        rows += [
            {
                "data": series.name,
                "horizon": horizon,
                "model": name,
                "mse": score.mse,
                "mae": score.mae,
                "windows": len(test),
                "look_back": look_back,
                "test_stride": stride,
            }
            for name, score in scores.items()
        ]
    return rows


def mean_rows(drawn: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of several series of one kind: means of their errors."""
    return [
        {**same[0], **{e: statistics.mean(row[e] for row in same) for e in ("mse", "mae")}}
        for same in zip(*drawn, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", nargs="+", help="default: all data sets of the studies")
    add("--scale", choices=("small", "full"), default="small", help="full scores every window")
    add("--data-dir", type=Path, help="folder with the csv files, plain or gzipped")
    add("--results", type=Path, default=RESULTS, help="folder for results")
    add("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(argv)
    places = places_of(options.scale)
    names = options.data or [*places]
    if unknown := {*names} - places.keys():
        parser.error(f"--data must be of {', '.join(places)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    rows = []
    try:
        for name in names:
            # As the runs have them: one of each seed, where the series is made.
            seeds = PLANTED_SEEDS if name in PLANTED else (0,)
            drawn = [load_series(name, options.data_dir, seed) for seed in seeds]
            found = mean_rows([rows_of(series, places[name]) for series in drawn])
            rows += found
            for row in found:
                where = f"{name} {row['horizon']}, look-back {row['look_back']}"
                print(f"{where}: {row['model']} {row['mse']:.4f} / {row['mae']:.4f}", flush=True)
    except (DataUnavailableError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = "closed_form.csv" if options.scale == "small" else "closed_form_full.csv"
    write_csv(options.results / name, [{**row, **versions()} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
