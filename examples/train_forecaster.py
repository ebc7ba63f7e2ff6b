"""Train and score a segment-wise mixture-of-experts forecaster, or its dense or token-wise twin.

    python examples/train_forecaster.py --demo
    python examples/train_forecaster.py --data ETTh1 --ffn segment --segment-sizes 5,5,4,4

A run writes its checkpoint, ``result.json``, ``history.csv`` and plots under ``--out``; the same
command with ``--resume`` goes on where an interrupted run stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it has no parent folder
from examples.forecaster.data import (
    Series,
    Windows,
    fit_linear,
    load_series,
    score_linear,
    score_repeat,
)
from examples.forecaster.model import Forecaster, ForecasterConfig
from examples.forecaster.report import (
    baseline_row,
    expert_loads,
    format_table,
    plot_expert_load,
    plot_forecast,
    plot_timeline,
    versions,
    write_csv,
    write_json,
    write_page,
)
from examples.forecaster.sources import DataUnavailableError
from examples.forecaster.training import (
    LOSSES,
    DivergedError,
    TrainOptions,
    make_windows,
    planted_settings,
    train_one,
)
from segmoe_kernels import segment_schedule

KINDS = ("dense", "token", "segment")
# Sizes were chosen on the validation split of ETTh1, for all three kinds at once. One thread, since
# two are little faster in models so small, and many times slower where the other core is busy.
DEMO = {"segment_sizes": "5,4", "epochs": 3, "val_stride": 4, "threads": 1}
DEMO_TEXT = """\
Trains six small forecasters, about 4 minutes on one CPU core: the FFN of each block is dense,
token-wise experts, or segment-wise experts. First on planted-4, a series made so that segments have
to win, then on ETTh1, transformer temperatures, where such a small model needs no experts.
"""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def build_parser() -> argparse.ArgumentParser:
    """Command line: one option for each field of the two settings, and what surrounds them."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
        formatter_class=_HelpFormatter,
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="compare the three kinds on ETTh1 within minutes")
    add("--data", default="ETTh1", help="data set, csv file or 'multiscale'")
    add("--data-dir", type=Path, help="folder with the csv files, plain or gzipped")
    add("--out", type=Path, help="folder for results; default runs/<data>_<ffn>_h<H>_s<seed>")
    add("--roll-out", type=int, nargs="+", default=(), help="score these horizons as well")
    add("--resume", action="store_true", help="go on from the checkpoint in the folder")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--no-plots", action="store_true", help="write no pictures")
    add("--quiet", action="store_true", help="no progress bars and epoch lines")
    choices = {
        "ffn": KINDS,
        "positions": ("rope", "learned"),
        "instance_norm": ("mean", "last"),
        "shared_expert": ("token", "segment", "none"),
        "expert_scope": ("token", "segment", "projected"),
        "pooling": ("concat", "mean", "max", "first", "last"),
        "renormalize": ("auto", "on", "off"),
        "loss": tuple(LOSSES),
        "device": ("cpu", "cuda"),
    }
    for settings in (ForecasterConfig, TrainOptions):
        group = parser.add_argument_group(settings.__name__)
        for field in dataclasses.fields(settings):
            flag, text = "--" + field.name.replace("_", "-"), describe(settings, field.name)
            if field.name == "segment_sizes":
                group.add_argument(flag, default="5,5,4,4", help=f"{text}; one number serves all")
            elif field.name == "num_layers":
                group.add_argument(flag, type=int, help=f"{text}; default: one per segment size")
            elif isinstance(field.default, bool):
                group.add_argument(flag, action="store_true", help=text)
            else:
                kind, options = type(field.default), choices.get(field.name)
                group.add_argument(
                    flag, type=kind, default=field.default, choices=options, help=text
                )
    return parser


def describe(settings: type, name: str) -> str:
    """What the docstring of a settings class says of one of its attributes, on one line."""
    found = re.search(rf"^ {{8}}{name}: (.+?)\.$", settings.__doc__ or "", re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()).replace("%", "%%") if found else ""


def settings_from(args: argparse.Namespace) -> tuple[ForecasterConfig, TrainOptions]:
    """Split the parsed command line into the model's and the trainer's settings."""
    values = dict(vars(args))
    values["num_layers"] = args.num_layers or args.segment_sizes.count(",") + 1
    values["segment_sizes"] = tuple(segment_schedule(args.segment_sizes, values["num_layers"]))
    values["shared_expert"] = None if args.shared_expert == "none" else args.shared_expert

    def pick(settings: type) -> dict[str, Any]:
        return {field.name: values[field.name] for field in dataclasses.fields(settings)}

    return ForecasterConfig(**pick(ForecasterConfig)), TrainOptions(**pick(TrainOptions))


def baseline_rows(series: Series, config: ForecasterConfig) -> list[dict[str, Any]]:
    """Score "repeat the last value" and the closed-form linear map on every window."""
    windows = make_windows(series, config, torch.float64)
    weight = fit_linear(windows["train"])
    repeat = [score_repeat(windows[split]) for split in ("val", "test")]
    linear = [score_linear(weight, windows[split]) for split in ("val", "test")]
    rows = [
        baseline_row("repeat last value", *repeat),
        baseline_row("linear, closed form", *linear),
    ]
    rows[1]["parameters"] = weight.numel()
    return rows


def write_plots(model: Forecaster, series: Series, out: Path) -> None:
    """Forecast against truth; for routed models also expert load and the timeline of segments."""
    config = model.config
    test = Windows(series, "test", config.look_back, config.horizon)
    plot_forecast(model, test, out / "forecast.png")
    if config.ffn != "dense":
        sizes = [config.layer_segment(layer) for layer in range(config.num_layers)]
        plot_expert_load(expert_loads(model, test), sizes, out / "expert_load.png")
        plot_timeline(model, test, out / "timeline.png")


def train_kinds(
    args: argparse.Namespace,
    series: Series,
    kinds: Sequence[str],
    settings: tuple[ForecasterConfig, TrainOptions],
    out: Path,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train and score models that differ in their FFN; returns rows of the table and records."""
    config, options = settings
    rows, records = baseline_rows(series, config), []
    for kind in kinds:
        config = dataclasses.replace(config, ffn=kind)
        folder = out / kind if len(kinds) > 1 else out
        if not args.quiet:
            print(f"{series.name}, horizon {config.horizon}: training the {kind} model", flush=True)
        model, record = train_one(
            series,
            config,
            options,
            folder,
            horizons=args.roll_out,
            resume=args.resume,
            quiet=args.quiet,
        )
        records.append(record)
        write_csv(folder / "history.csv", record["history"])
        if not args.no_plots:
            write_plots(model, series, folder)
    shown = ("model", "parameters", "active_flops_per_token", "step_ms", "val_mse", "test_mse")
    rows += [{key: record[key] for key in (*shown, "test_mae")} for record in records]
    print(f"\n{series.name}, look-back {config.look_back}, horizon {config.horizon}")
    print(format_table(rows), flush=True)
    return rows, records


def write_results(
    args: argparse.Namespace,
    command: str,
    name: str,
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    out: Path,
) -> None:
    """Write what a comparison found, beside the command and versions that it depends on."""
    rows, records = found
    made = {"command": command, "versions": versions(), "threads": args.threads, "data": name}
    write_json(out / "result.json", {**made, "rows": rows, "runs": records})
    write_csv(out / "result.csv", rows)


def run(args: argparse.Namespace, command: str) -> None:
    """Train and score one model, as the command line says."""
    config, options = settings = settings_from(args)
    series = load_series(args.data, args.data_dir)
    name = f"{series.name}_{config.ffn}_h{config.horizon}_s{options.seed}"
    out = args.out or Path("runs") / name
    found = train_kinds(args, series, (config.ffn,), settings, out)
    write_results(args, command, series.name, found, out)
    print(f"\nresults and plots: {out}")


def run_demo(args: argparse.Namespace, command: str) -> None:
    """Compare the three kinds on a series that was made for segments, and on a real one."""
    out = args.out or Path("runs") / "demo"
    print(DEMO_TEXT, flush=True)
    try:
        real = load_series(args.data, args.data_dir)
    except DataUnavailableError as error:
        print(f"{error}\nThe demo goes on with the built-in series 'multiscale' instead.\n")
        real = load_series("multiscale")
    config, options = settings_from(args)
    made = load_series("planted-4", seed=options.seed)
    planted = planted_settings(4, options.seed, options.device)
    cases = [(made, planted), (real, (config, options))]
    sections = []
    for series, settings in cases:
        folder = out / series.name
        rows, records = train_kinds(args, series, KINDS, settings, folder)
        write_results(args, command, series.name, (rows, records), folder)
        said = closing(series.name, rows)
        print(f"\n{said}\n", flush=True)
        pictures = sorted(folder.glob("segment/*.png"))
        sections.append((series.name, said, format_table(rows), pictures))
    write_page(out / "index.html", "Dense, token-wise and segment-wise experts", sections)
    print(f"one page with tables and plots: {out / 'index.html'}")


def closing(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What was seen on a series, in words."""
    mse = {row["model"]: row["test_mse"] for row in rows}
    linear, segment = mse["linear, closed form"], mse["segment"]

    def over(other: float) -> str:
        per_cent = 100 * (segment / other - 1)
        if abs(per_cent) < 0.5:
            return "within 0.5 % of"
        return f"{abs(per_cent):.0f} % {'below' if per_cent < 0 else 'above'}"

    best = min((kind for kind in KINDS), key=lambda kind: mse[kind])
    seen = (
        f"On {name} the error of segment-wise experts is {over(mse['token'])} that of token-wise "
        f"ones and {over(mse['dense'])} that of a dense FFN (one seed)."
    )
    if linear < mse[best]:
        return f"{seen} A linear map is below all three: this series does not ask for experts yet."
    if best == "segment" and segment < 0.9 * mse["token"]:
        return f"{seen} Here it pays to route segments: they tell what a single patch does not."
    return f"{seen} Differences of a few per cent are within what other seeds give."


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        (run_demo if args.demo else run)(
            args, shlex.join(["python", "examples/train_forecaster.py", *argv])
        )
    except (DataUnavailableError, DivergedError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
