"""Run a study, one model after the other, and write its table and plots.

    python -m examples.studies baselines
    python -m examples.studies baselines --only ETTh1_segment
    python -m examples.studies ablations --report

Runs that have a row in ``examples/results/<study>/runs.csv`` are left out, and one that was
interrupted goes on from its last epoch: the same command finishes what it began. Sizes are for two
CPU cores; ``--scale full --device cuda`` has the official ones.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.forecaster.data import load_series
from examples.forecaster.report import versions
from examples.forecaster.sources import DataUnavailableError, find_or_download
from examples.forecaster.training import DivergedError, train_one
from examples.studies.report import read_runs, write_report
from examples.studies.runs import IF_PRESENT, STUDIES, Run

RESULTS = Path(__file__).resolve().parents[1] / "results"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("study", choices=sorted(STUDIES))
    add("--only", default="", help="runs whose name this regular expression is found in")
    add("--scale", choices=("small", "full"), default="small", help="sizes; full needs a GPU")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--data-dir", type=Path, help="folder with the csv files, plain or gzipped")
    add("--results", type=Path, help="folder for results; default examples/results")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--report", action="store_true", help="only write table and plots of what is there")
    add("--quiet", action="store_true", help="a line for each run only")
    options = parser.parse_args(argv)
    try:
        re.compile(options.only)
    except re.error as error:
        parser.error(f"--only must be a regular expression ({error}), got {options.only!r}")
    return options


def run_one(run: Run, horizons: Sequence[int], path: Path, options: argparse.Namespace) -> None:
    """Train and score one model; its row is added to the file when all is done.

    The file has columns for the horizons of all runs.
    """
    series = load_series(run.data, options.data_dir, run.options.seed)
    checkpoints = Path("runs") / options.study / options.scale / run.name
    _, record = train_one(
        series,
        run.config,
        run.options,
        checkpoints,
        horizons=run.horizons,
        resume=True,
        quiet=options.quiet,
    )
    row = {**row_of(run, record, horizons), "threads": options.threads, **versions()}
    add_row(path, row)
    (checkpoints / "checkpoint.pt").unlink(missing_ok=True)


def row_of(run: Run, record: Mapping[str, Any], horizons: Sequence[int]) -> dict[str, Any]:
    """Scores by horizon, costs and settings of a run, on one level; absent ones are None."""
    scores = {"val": record["validation"], **{str(h): {} for h in horizons}, **record["horizons"]}
    costs = ("parameters", "active_flops_per_token", "step_ms", "seconds", "best_epoch")
    return {
        "data": run.data,
        "variant": run.variant,
        "seed": run.options.seed,
        **{
            f"{error}_{horizon}": score.get(error)
            for horizon, score in scores.items()
            for error in ("mse", "mae", "windows")
        },
        **{name: record[name] for name in costs},
        **record["config"],
        **record["options"],
    }


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row under a file's columns; both come about where the file is not there yet.

    Raises:
        ValueError: if the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", newline="") as stream:
        stream.seek(0)
        columns = next(csv.reader(stream), None)
        writer = csv.DictWriter(stream, [*row])
        if columns is None:
            writer.writeheader()
        elif columns != [*row]:
            differ = ", ".join(sorted({*columns} ^ {*row})) or "another order"
            raise ValueError(f"{path} must have the columns of this version, got {differ}")
        writer.writerow(row)


def absent(runs: Sequence[Run], data_dir: Path | None) -> set[str]:
    """Data sets that are left out because their files are not there; says how to get them.

    Raises:
        DataUnavailableError: if nothing is left to run.
    """
    missing = set()
    for name in dict.fromkeys(run.data for run in runs if run.data in IF_PRESENT):
        try:
            find_or_download(name, data_dir)
        except DataUnavailableError as error:
            if all(run.data == name for run in runs):
                raise
            reason, _, _ = str(error).partition("\n")
            print(f"left out: {reason}")
            missing.add(name)
    return missing


def run_all(options: argparse.Namespace, folder: Path) -> None:
    """Every run of the study that has no result yet."""
    runs = list(STUDIES[options.study](options.scale, options.device))
    wanted = [run for run in runs if re.search(options.only, run.name)]
    if not wanted:
        names = ", ".join(run.name for run in runs[:4])
        raise ValueError(f"--only matches none of {len(runs)} runs such as {names}")
    missing = absent(wanted, options.data_dir)
    wanted = [run for run in wanted if run.data not in missing]
    horizons = sorted({horizon for run in runs for horizon in run.horizons})
    for number, run in enumerate(wanted, 1):
        finished = {(row["data"], row["variant"], row["seed"]) for row in read_runs(folder)}
        if (run.data, run.variant, run.options.seed) in finished:
            continue
        start = time.monotonic()
        print(f"[{number}/{len(wanted)}] {run.name}", end="", flush=True)
        print("" if not options.quiet else " ...", end="" if options.quiet else "\n", flush=True)
        run_one(run, horizons, folder / "runs.csv", options)
        print(f" {time.monotonic() - start:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    name = options.study if options.scale == "small" else f"{options.study}_full"
    folder = (options.results or RESULTS) / name
    try:
        if not options.report:
            run_all(options, folder)
        write_report(options.study, folder, options.scale)
    except (DataUnavailableError, DivergedError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
