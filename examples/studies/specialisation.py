"""Which expert takes what: hours of the day, levels, volatility, channels, regimes.

    python -m examples.studies.specialisation --data ETTh1

Trains one segment-wise model as the studies do, follows the load of its experts over training, then
routes test windows and asks what an expert tells about its segments: the share of the uncertainty
about the hour, the level, the volatility or the channel that knowing the expert takes away (mutual
information over the entropy of the quantity), beside the same for shuffled experts; for the
generated series also the regime that a segment's middle lies in. Writes numbers and plots into
``examples/results/specialisation``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from examples.forecaster.data import Series, Windows, load_series, multiscale_regimes
from examples.forecaster.model import Forecaster
from examples.forecaster.report import read_csv, versions, write_csv
from examples.forecaster.sources import DataUnavailableError
from examples.forecaster.training import DivergedError, Trainer
from examples.studies.runs import BUDGETS, base
from segmoe_kernels import collect_routing_stats
from segmoe_kernels.stats.collector import RoutingCollector
from segmoe_kernels.stats.plots import plot_expert_load

RESULTS = Path(__file__).resolve().parents[1] / "results" / "specialisation"
DAY = {"ETTh1": 24, "ETTh2": 24, "ETTm1": 96, "ETTm2": 96, "Weather": 144, "multiscale": 24}
BINS = 8
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
TITLES = {"hour": "eighth of a day", "level": "level, low to high"}
TITLES |= {"volatility": "volatility, low to high", "regime": "sine, square, sawtooth"}


class Segments(NamedTuple):
    """What is known of routed segments, one number each.

    Attributes:
        expert: that takes it.
        quantities: by name: "hour" of the segment's middle, a day cut into BINS parts; "level" and
            "volatility", quantiles of the mean and the standard deviation of its values; "channel";
            "regime" of its middle, where it is known.
        switches: share of neighbours with another expert.
    """

    expert: IntArray
    quantities: dict[str, IntArray]
    switches: float


def information(expert: IntArray, quantity: IntArray) -> float:
    """Share of the quantity's entropy that the expert takes away, 0 to 1."""
    table = np.zeros((expert.max() + 1, quantity.max() + 1))
    np.add.at(table, (expert, quantity), 1)
    joint = table / table.sum()
    one, other = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    present = joint > 0
    mutual = (joint[present] * np.log(joint[present] / (one * other)[present])).sum()
    entropy = -(other[other > 0] * np.log(other[other > 0])).sum()
    return float(mutual / entropy) if entropy > 0 else 0.0


def quantiles(values: npt.NDArray[np.float64]) -> IntArray:
    """Numbers of equally filled bins."""
    edges = np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.searchsorted(edges, values, side="right")


def describe(
    model: Forecaster,
    series: Series,
    layer: int,
    day: int,
    stride: int,
    batch: int = 32,
    regimes: IntArray | None = None,
) -> Segments:
    """Route test windows, and look at the values of each segment of a layer.

    Args:
        model: trained, in eval mode.
        series: that it was trained on.
        layer: whose segments.
        day: steps of a day.
        stride: rows between windows.
        batch: windows routed at once.
        regimes: (N,) number of each row's regime, if it is known.
    """
    windows = Windows(series, "test", model.config.look_back, 1, stride=stride)
    first = max(0, series.splits.test[0] - model.config.look_back)
    steps = model.config.layer_segment(layer) * model.config.patch
    experts: list[IntArray] = []
    switched: list[npt.NDArray[np.bool_]] = []
    found: dict[str, list[npt.NDArray[Any]]] = {}
    for start in range(0, len(windows), batch):
        ids = np.arange(start, min(start + batch, len(windows)))
        past, _ = windows.batch(slice(start, start + batch))  # (W, C, L)
        chosen = model.routing(past)[layer].topk_ids[:, 0].numpy()
        count, width, _ = past.shape
        chosen = chosen.reshape(count, width, -1).astype(np.int64)
        # Whole segments only: the last one may be short.
        whole = model.config.look_back // steps
        pieces = past[..., : whole * steps].unflatten(-1, (whole, steps)).numpy()
        middle = first + ids[:, None, None] * stride + np.arange(whole) * steps + steps // 2
        of_segments: dict[str, npt.NDArray[Any]] = {
            "hour": middle % day * BINS // day,
            "level": pieces.mean(-1),
            "volatility": pieces.std(-1),
            "channel": np.arange(width)[:, None],
        }
        if regimes is not None:
            of_segments["regime"] = regimes[middle]
        for name, values in of_segments.items():
            filled = np.broadcast_to(values, (count, width, whole)).reshape(-1)
            found.setdefault(name, []).append(filled)
        experts.append(chosen[..., :whole].reshape(-1))
        switched.append((chosen[..., 1:] != chosen[..., :-1]).reshape(-1))
    quantities = {name: np.concatenate(parts) for name, parts in found.items()}
    for name in ("level", "volatility"):
        quantities[name] = quantiles(quantities[name])
    return Segments(np.concatenate(experts), quantities, float(np.concatenate(switched).mean()))


def share_table(expert: IntArray, quantity: IntArray, num_experts: int) -> FloatArray:
    """(E, bins): of the segments in a bin, the share that each expert takes."""
    table = np.zeros((num_experts, int(quantity.max(initial=0)) + 1))
    np.add.at(table, (expert, quantity), 1)
    shares: FloatArray = table / np.maximum(table.sum(0, keepdims=True), 1)
    return shares


def summarise(segments: Segments, layer: int, size: int, num_experts: int) -> dict[str, Any]:
    """The numbers of one layer."""
    load = np.bincount(segments.expert, minlength=num_experts) / len(segments.expert)
    shuffled = np.random.default_rng(0).permutation(segments.expert)
    row: dict[str, Any] = {
        "layer": layer,
        "segment_size": size,
        "segments": len(segments.expert),
        "load": load.tolist(),
        "switch_rate": segments.switches,
        # What two segments drawn at random would give.
        "switch_rate_of_chance": float(1 - (load**2).sum()),
    }
    row["told"], row["shuffled"], row["shares"] = {}, {}, {}
    for name, quantity in segments.quantities.items():
        row["told"][name] = information(segments.expert, quantity)
        row["shuffled"][name] = information(shuffled, quantity)
        row["shares"][name] = share_table(segments.expert, quantity, num_experts).tolist()
    return row


def number(name: str, values: Iterable[float]) -> dict[str, float]:
    """Columns of a list."""
    return {f"{name}_{place}": value for place, value in enumerate(values)}


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a layer's row, but for the shares, which are a table of their own."""
    columns = {key: value for key, value in row.items() if not isinstance(value, (list, dict))}
    columns |= number("load", row["load"])
    for key in ("told", "shuffled"):
        columns |= {f"{key}_{name}": value for name, value in row[key].items()}
    return columns


def over_layers(layers: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """Columns of what the collector holds of a stretch of training."""
    columns: dict[str, float] = {}
    for layer, of_layer in enumerate(layers.values()):
        columns[f"switch_rate_{layer}"] = of_layer["switch_rate"]
        columns |= number(f"load_{layer}", of_layer["hard_fraction"].tolist())
    return columns


def replace_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put rows in the place of those of the same data and seed."""
    new = {(row["data"], row["seed"]) for row in rows}
    held = read_csv(path) if path.is_file() else []
    kept = [row for row in held if (row["data"], row["seed"]) not in new]
    write_csv(path, sorted([*kept, *rows], key=lambda row: (row["data"], row["seed"])))


def plot_shares(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw for each layer how each hour, level, volatility and regime is shared out."""
    names = [name for name in rows[0]["shares"] if name in TITLES]
    figure = Figure(figsize=(3 * len(names), 1 + 1.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(names), sharey=True, squeeze=False)
    mesh = None
    for place, (line, row) in enumerate(zip(axes, rows, strict=True)):
        for axis, name in zip(line, names, strict=True):
            shares = np.array(row["shares"][name])
            mesh = axis.imshow(shares, vmin=0, vmax=1, aspect="auto", cmap="viridis")
            axis.set_yticks(range(len(shares)))
            if place == 0:
                axis.set_title(TITLES[name])
        line[0].set_ylabel(f"layer {row['layer']}\nexpert")
    figure.colorbar(mesh, ax=list(axes.flat), label="share of the segments")
    figure.savefig(path, dpi=130)


def follow(stats: RoutingCollector, steps_per_epoch: int) -> Callable[[], None]:
    """What to do after each step, for eight entries an epoch."""
    done, every = itertools.count(1), max(1, steps_per_epoch // 8)

    def after_step() -> None:
        step = next(done)
        if step % steps_per_epoch == 1:
            stats.reset()  # what validation added
        elif step % every == 0:
            stats.end_step()

    return after_step


def run(options: argparse.Namespace) -> None:
    """Train, look, write."""
    torch.set_num_threads(options.threads)
    series = load_series(options.data, options.data_dir)
    config, training = base(options.data, "small", options.seed, "cpu")
    windows = {
        split: Windows(series, split, config.look_back, config.horizon, stride=stride)
        for split, stride in (("train", 1), ("val", training.val_stride))
    }
    torch.manual_seed(training.seed)
    model = Forecaster(config)
    trainer = Trainer(model, windows["train"], windows["val"], training)
    with collect_routing_stats(model) as stats:
        trainer.after_step = follow(stats, trainer.steps_per_epoch)
        trainer.fit(progress=not options.quiet)
    model.eval()
    day = options.day or DAY.get(options.data, 24)
    known = multiscale_regimes() if options.data == "multiscale" else None
    found = [
        describe(model, series, layer, day, options.stride, regimes=known)
        for layer in range(config.num_layers)
    ]
    rows = [
        summarise(segments, layer, config.layer_segment(layer), config.num_experts)
        for layer, segments in enumerate(found)
    ]
    out = options.results or RESULTS
    about = {"data": series.name, "seed": options.seed}
    settings = {"day": day, "stride": options.stride, "threads": options.threads} | versions()
    replace_rows(out / "layers.csv", [about | flat(row) | settings for row in rows])
    shares = [
        about | {"layer": row["layer"], "quantity": name, "expert": expert} | number("bin", line)
        for row in rows
        for name, table in row["shares"].items()
        for expert, line in enumerate(table)
    ]
    replace_rows(out / "shares.csv", shares)
    replace_rows(
        out / "training.csv",
        [
            about | {"entry": entry} | over_layers(layers["layers"])
            for entry, layers in enumerate(stats.step_history)
        ],
    )
    name = f"{series.name}_s{options.seed}"
    plot_shares(rows, out / f"{name}_shares.png")
    plot_expert_load(stats.step_history).savefig(out / f"{name}_load.png", dpi=130)
    print(f"{series.name}: share of the entropy that the expert takes away (shuffled experts)")
    for row in rows:
        cells = [
            f"{name} {told:.3f} ({row['shuffled'][name]:.3f})" for name, told in row["told"].items()
        ]
        rate = f"switches {row['switch_rate']:.2f} (chance {row['switch_rate_of_chance']:.2f})"
        print(f"layer {row['layer']}, P={row['segment_size']}: {', '.join(cells)}, {rate}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", default="ETTh1", choices=sorted(BUDGETS))
    add("--data-dir", type=Path, help="folder with the csv files, plain or gzipped")
    add("--results", type=Path, help="folder for results; default examples/results/specialisation")
    add("--day", type=int, help="steps of a day; default: the data set's")
    add("--stride", type=int, default=64, help="rows between the windows that are looked at")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2, help="CPU threads")
    add("--quiet", action="store_true", help="no progress bars and epoch lines")
    try:
        run(parser.parse_args(argv))
    except (DataUnavailableError, DivergedError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
