"""Score what needs no training, beside the studies: the last value repeated, and a linear map.

    python -m examples.studies.closed_form

The linear map is NLinear fitted in closed form (`fit_linear`), for each horizon on every train
window, with the look-back of the models; scores are of the test windows that the models are scored
on. Writes ``examples/results/closed_form.csv``, which the report of the baselines shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.forecaster.data import (
    Series,
    Windows,
    fit_linear,
    load_series,
    score_linear,
    score_repeat,
)
from examples.forecaster.report import versions, write_csv
from examples.forecaster.sources import DataUnavailableError
from examples.studies.runs import DATA, HORIZONS, base

RESULTS = Path(__file__).resolve().parents[1] / "results"


def rows_of(series: Series, look_back: int, horizon: int, stride: int) -> list[dict[str, Any]]:
    """Two rows: repeat and linear."""
    train = Windows(series, "train", look_back, horizon, torch.float64)
    test = Windows(series, "test", look_back, horizon, torch.float64, stride)
    scores = {"repeat": score_repeat(test), "linear": score_linear(fit_linear(train), test)}
    return [
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", nargs="+", choices=DATA, default=list(DATA))
    add("--scale", choices=("small", "full"), default="small", help="full scores every window")
    add("--data-dir", type=Path, help="folder with the csv files, plain or gzipped")
    add("--results", type=Path, default=RESULTS, help="folder for results")
    add("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    try:
        for name in options.data:
            series = load_series(name, options.data_dir)
            config, training = base(name, options.scale, 0, "cpu")
            for horizon in HORIZONS:
                found = rows_of(series, config.look_back, horizon, training.test_stride)
                rows += found
                cells = (f"{row['model']} {row['mse']:.4f} / {row['mae']:.4f}" for row in found)
                print(f"{name} {horizon}: MSE / MAE of {', '.join(cells)}", flush=True)
    except (DataUnavailableError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = "closed_form.csv" if options.scale == "small" else "closed_form_full.csv"
    write_csv(options.results / name, [{**row, **versions()} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
