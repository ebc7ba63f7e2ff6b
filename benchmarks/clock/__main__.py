r"""The modelled clock of sm_90, without a GPU: nothing that it prints is measured.

    python -m benchmarks.clock table [--shapes 64-4-1-5-1e6,weather-small-p5] [--json FILE]
    python -m benchmarks.clock layer --shape 64-4-1-5-1e6 [--provider scattermoe]
    python -m benchmarks.clock kernel expert_ffn_dw --shape 128-8-1-5-1e6 \
        --set BLOCK_M=32,64 --set num_warps=4,8 --set num_splits=33,66
    python -m benchmarks.clock checks
    python -m benchmarks.clock measured [--shapes 64-4-1-5-1e6] [--out FOLDER]

``table``: forward and backward of this package and of ScatterMoE. ``layer``: each launch of one of
them. ``kernel``: one launch with every combination of other constants, numbers and options, the
fastest first. ``checks``: published times beside modelled ones, and what moves with what is from
memory. ``measured``: on a GPU of sm_90, modelled beside measured, kernel by kernel, and the
machine's constants that would have fitted.

A shape is D-E-k-P-rows (F = 2 D, sequences of 60 steps) or a name of `benchmarks.shapes`.
``--tile expert_ffn_dw_tile.block_m=64`` changes a tile where the launchers ask for it.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import measured
from benchmarks.clock.capture import OperatorCall
from benchmarks.clock.chip import time_launch
from benchmarks.clock.machine import H200
from benchmarks.clock.refit import refit
from benchmarks.clock.tables import (
    PROVIDERS,
    TARGETS,
    capture_provider,
    check_rows,
    clock_environment,
    kernel_row,
    layer_rows,
    sensitivity_rows,
)
from benchmarks.common import device_name
from benchmarks.shapes import find_workloads
from benchmarks.store import Store, code_version, results_folder

OUT = Path(__file__).resolve().parents[1] / "results" / "clock" / "sm_90.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The order in which they are measured: the ends of the widths and rows first.
BESIDE = tuple(f"{d}-4-1-5-{n}" for n in ("1e6", "1e4", "1e5") for d in (64, 256, 128))
SENSITIVE = ("64-4-1-5-1e6", "128-8-1-5-1e5")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="this package and ScatterMoE")
    table.add_argument("--shapes", default=",".join(TARGETS))
    table.add_argument("--providers", default=",".join(PROVIDERS))
    table.add_argument("--json", type=Path, help=f"write rows there, such as {OUT.name}")
    layer = commands.add_parser("layer", help="each launch of a layer")
    kernel = commands.add_parser("kernel", help="one launch with other tiles")
    kernel.add_argument("name")
    kernel.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE,VALUE", dest="values"
    )
    checks = commands.add_parser("checks", help="against published times; sensitivity")
    checks.add_argument("--json", type=Path)
    beside = commands.add_parser("measured", help="modelled beside measured, on a GPU")
    beside.add_argument("--shapes", default=",".join(BESIDE))
    beside.add_argument("--out", help="folder of the results")
    for command in (layer, kernel):
        command.add_argument("--shape", required=True)
        command.add_argument("--provider", default="segmoe", choices=PROVIDERS)
    for command in (table, layer, kernel):
        command.add_argument("--dtype", choices=DTYPES, default="bf16")
        command.add_argument("--tile", action="append", default=[], metavar="FUNCTION.FIELD=VALUE")
    return parser


def _tiles(words: list[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for word in words:
        place, _, value = word.partition("=")
        function, _, field = place.partition(".")
        found.setdefault(function, {})[field] = int(value)
    return found


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows in, in place of those of the same kinds of the same configurations."""
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    added = {(row["kind"], row["configuration"]) for row in rows}
    rows = [row for row in old if (row["kind"], row["configuration"]) not in added] + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": clock_environment(), "rows": rows}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def _table(args: argparse.Namespace) -> None:
    providers = args.providers.split(",")
    print("modelled us, forward/backward, launches at 1 us | at 2 us")
    print(f"{'shape':<18}" + "".join(f"{name:>30}" for name in providers))
    for name in args.shapes.split(","):
        workload = find_workloads(name)[0]
        tiles = _tiles(args.tile)
        rows = layer_rows(workload, providers, DTYPES[args.dtype], tiles=tiles)
        cells = []
        for provider in providers:
            mine = [row for row in rows if row["provider"] == provider]
            if "skipped" in mine[0]:
                cells.append("skipped")
                print(f"skipped {provider}: {mine[0]['skipped']}", file=sys.stderr)
                continue
            pairs = (
                "/".join(f"{row[f'modelled_us_with_{us}us_launches']:.0f}" for row in mine)
                for us in (1, 2)
            )
            cells.append(" | ".join(pairs))
        print(f"{name:<18}" + "".join(f"{cell:>30}" for cell in cells), flush=True)
        if args.json:
            _write(args.json, rows)


def _line(row: dict[str, Any], label: str = "") -> str:
    numbers = {k: v for k, v in row.items() if k not in {"name", "modelled_us", "bound"}}
    shown = " ".join(f"{name} {value:g}" for name, value in numbers.items() if value)
    return f"{label or row['name']:<34}{row['modelled_us']:>10.1f} us  {row['bound']:<8} {shown}"


def _layer(args: argparse.Namespace) -> None:
    workload = find_workloads(args.shape)[0]
    tiles = _tiles(args.tile)
    for row in layer_rows(workload, [args.provider], DTYPES[args.dtype], tiles=tiles):
        if "skipped" in row:
            print(f"skipped {args.provider}: {row['skipped']}")
            continue
        print(f"{row['pass']}: modelled {row['modelled_us']:.0f} us and {row['launches']} launches")
        for call in row["calls"]:
            print("  " + _line(call))


def _kernel(args: argparse.Namespace) -> int:
    workload = find_workloads(args.shape)[0]
    tiles = _tiles(args.tile)
    capture = capture_provider(workload, args.provider, DTYPES[args.dtype], tiles=tiles)
    found = capture.kernels(args.name)
    if not found:
        calls = [*capture.forward, *capture.backward]
        known = dict.fromkeys(c.name for c in calls if not isinstance(c, OperatorCall))
        print(f"no {args.name}; this layer launches {', '.join(known)}", file=sys.stderr)
        return 1
    names = [word.partition("=")[0] for word in args.values]
    choices = [[int(v) for v in word.partition("=")[2].split(",")] for word in args.values]
    for number, launch in enumerate(found):
        lines = [
            (time_launch(launch, workload.shape).us, _line(_row(launch, workload), "as it is"))
        ]
        for values in itertools.product(*choices) if names else ():
            chosen = dict(zip(names, values, strict=True))
            label = " ".join(f"{name}={value}" for name, value in chosen.items())
            try:
                row = _row(launch.changed(**chosen), workload)
            except Exception as error:
                print(f"{label}: {str(error).splitlines()[-1][:100]}", file=sys.stderr)
                continue
            lines.append((row["modelled_us"], _line(row, label)))
        print(f"{launch.name}, launch {number + 1} of {len(found)}, grid {launch.grid}: modelled")
        for _, line in sorted(lines):
            print("  " + line)
    return 0


def _row(launch: Any, workload: Any) -> dict[str, Any]:
    return kernel_row(time_launch(launch, workload.shape))


def _checks(args: argparse.Namespace) -> int:
    rows = check_rows()
    for row in rows:
        print(
            f"{row['configuration']:<34} published {row['published']} {row['unit']}, "
            f"modelled {row['modelled']}{'' if row['holds'] else '  TOO FAR'}",
            flush=True,
        )
    for name in SENSITIVE:
        found = sensitivity_rows(find_workloads(name)[0], PROVIDERS)
        for row in found:
            if "skipped" not in row:
                print(
                    f"{name:<16}{row['provider']:<12}{row['pass']:<10}{row['machine']:<36}"
                    f"{row['modelled_us_with_1us_launches']:>8.0f} us modelled",
                    flush=True,
                )
        rows += found
    if args.json:
        _write(args.json, rows)
    return 0 if all(row["holds"] for row in rows if row["kind"] == "check") else 1


def _measured(args: argparse.Namespace) -> int:
    if why := measured.why_not():
        print(f"nothing to measure: {why}")
        return 0
    store, code = Store(results_folder("cuda", args.out) / "clock.json"), code_version()
    found = []
    for name in args.shapes.split(","):
        row = measured.measure(name)
        store.add([{**row, "device": device_name("cuda")}])
        found += row["kernels"]
        print(f"{name}, us:{'modelled':>34}{'measured':>10}{'ratio':>8}")
        for kernel in row["kernels"]:
            print(
                f"  {kernel['kernel']:<34}{kernel['modelled_us']:>12.1f}"
                f"{kernel['measured_us']:>10.1f}{kernel.get('measured_over_modelled', 0):>8.2f}",
                flush=True,
            )
    machine, errors = refit(found)
    fitted = {n: v for n, v in vars(machine).items() if v != getattr(H200, n)}
    identity = {"configuration": "refit", "provider": "segmoe", "pass": "both", "mode": "eager"}
    store.add([{**identity, "device": device_name("cuda"), "code": code, **fitted, **errors}])
    print("refit: " + "  ".join(f"{k} {v:.4g}" for k, v in {**fitted, **errors}.items()))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    commands = {
        "table": _table,
        "layer": _layer,
        "kernel": _kernel,
        "checks": _checks,
        "measured": _measured,
    }
    return commands[args.command](args) or 0


if __name__ == "__main__":
    sys.exit(main())
