"""Was the probe of ``python -m segmoe_kernels advise`` right, where the answer is known?

    python -m examples.studies.advice

It is asked on planted series with blocks of 2 to 5 patches: with windows that begin where a block
does, where a size is a hit if it is the block's; some patches later; and anywhere. And on the data
of the studies of sizes, against the size that was best in hindsight. Answers that are in
``examples/results/advice/runs.csv`` are not asked again; writes ``advice.md`` beside the folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from tqdm import tqdm

from examples.forecaster.data import load_series
from examples.forecaster.model import ForecasterConfig
from examples.forecaster.planted_series import CODES, PATCH, planted
from examples.forecaster.report import read_csv, versions
from examples.forecaster.sources import DataUnavailableError
from examples.studies.__main__ import RESULTS, add_row
from segmoe_kernels.series.advise import advise

SEEDS = {"a block": range(3), "later": range(1), "anywhere": range(1)}


class Question(NamedTuple):
    """What the probe is asked: a series, and where windows begin.

    Attributes:
        data: name.
        windows: "a block", "later" or "anywhere".
        offset: patches that windows begin behind a block.
        seed: of the series.
    """

    data: str
    windows: str
    offset: int = 0
    seed: int = 0


def questions() -> Iterator[Question]:
    """Planted series where windows begin with a block, the data of sizes, every other phase."""
    for seed in SEEDS["a block"]:
        for block in CODES:
            yield Question(f"planted-{block}", "a block", 0, seed)
    for data in sizes_in_hindsight(RESULTS):
        yield Question(data, "anywhere")
    for seed in SEEDS["later"]:
        for block in CODES:
            for offset in range(1, block):
                yield Question(f"planted-{block}", "later", offset, seed)
    for seed in SEEDS["anywhere"]:
        for block in CODES:
            yield Question(f"planted-{block}", "anywhere", 0, seed)


def sizes_in_hindsight(folder: Path) -> dict[str, dict[int, float]]:
    """Mean MSE by size, of data sets that all sizes were trained on."""
    found: dict[str, dict[int, float]] = {}
    for name in ("ablations", "sizes"):
        for row in read_csv(folder / f"{name}.csv"):
            if row["variant"].startswith("P="):
                found.setdefault(row["data"], {})[int(row["variant"][2:])] = row["mse"]
    return {data: errors for data, errors in found.items() if set(errors) == set(range(1, 9))}


def ask(question: Question, data_dir: Path | None) -> dict[str, Any]:
    """A row: the question, the answer, and CPU seconds."""
    step = 1
    if question.data.startswith("planted"):
        block = int(question.data[-1])
        values = planted(block, seed=question.seed).values[question.offset * PATCH :]
        step = 1 if question.windows == "anywhere" else block * PATCH
    else:
        series = load_series(question.data, data_dir)
        values = series.values[slice(*series.splits.train)]
    begin = time.process_time()
    advice = advise(values, patch=ForecasterConfig.patch, step=step)
    gains = {f"gain_{size}": gain for size, gain in enumerate(advice.gains, 1)}
    errors = {f"error_{size}": error for size, error in enumerate(advice.errors, 1)}
    seconds = round(time.process_time() - begin, 1)
    answer = {"step": step, "size": advice.size, **gains, **errors, "cpu_s": seconds}
    return {**question._asdict(), **answer, **versions()}


def rate(hits: int, asked: int) -> str:
    """Hits with the exact interval of 95 %."""
    low, high = stats.binomtest(hits, asked).proportion_ci()
    return f"{hits} of {asked} ({low:.0%} to {high:.0%})"


def describe(rows: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Lines of the report."""
    lines = [
        "# Advice",
        "",
        "Written by `python -m examples.studies.advice` from `advice/runs.csv`, a row a question: "
        "size and gains of `python -m segmoe_kernels advise` on planted series and on the data of "
        f"the studies of sizes. {len(rows)} questions, {np.median([r['cpu_s'] for r in rows]):.0f} "
        "CPU seconds each (median). Rates with the exact interval of 95 %.",
        "",
        "| blocks | windows begin where a block does: the block's size | some patches later: "
        "segments of 2 and more | anywhere: segments of 2 and more |",
        "|---|---:|---:|---:|",
    ]
    of_planted = [row for row in rows if row["data"].startswith("planted")]
    for name in [*dict.fromkeys(row["data"] for row in of_planted), "all"]:
        here = [row for row in of_planted if name in {"all", row["data"]}]
        cells = []
        for windows in SEEDS:
            asked = [row for row in here if row["windows"] == windows]
            hits = [row["size"] > 1 for row in asked]
            if windows == "a block":
                hits = [row["size"] == int(row["data"][-1]) for row in asked]
            cells.append(rate(sum(hits), len(hits)) if hits else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, "", *describe_hindsight(rows, folder)]


def describe_hindsight(rows: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Lines of the table of data that all sizes were trained on."""
    lines = [
        "| data | advised | largest gain | trained MSE over the best size | of the largest gain's "
        "size | of 4 | of a size by chance |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    answers = {row["data"]: row for row in rows}
    for data, errors in sizes_in_hindsight(folder).items():
        if data in answers:
            row, best = answers[data], min(errors.values())
            most = max(errors, key=lambda size, row=row: row[f"gain_{size}"])
            over = [errors[size] for size in (row["size"], most, 4)] + [np.mean([*errors.values()])]
            gain = f"{row[f'gain_{most}']:+.1%} ± {row[f'error_{most}']:.1%} at {most}"
            cells = " | ".join(f"{error / best - 1:+.1%}" for error in over)
            lines.append(f"| {data} | {row['size']} | {gain} | {cells} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder with the csv files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for results")
    options = parser.parse_args(argv)
    path = options.results / "advice" / "runs.csv"
    known = read_csv(path) if path.is_file() else []
    asked = {tuple(row[name] for name in Question._fields) for row in known}
    try:
        for question in tqdm([q for q in questions() if tuple(q) not in asked]):
            add_row(path, ask(question, options.data_dir))
    except (DataUnavailableError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = "\n".join(describe(read_csv(path), options.results)) + "\n"
    path.parent.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
