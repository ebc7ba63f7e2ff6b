"""Tables and plots from the result files of a device; no number comes from anywhere else.

    python -m benchmarks.report [--results benchmarks/results/<device>] [--readme README.md]

Writes report.md, time-against-rows.png and speed-up.png into the folder, each as far as there are
rows for it. ``--readme`` also puts the short tables between the lines
``<!-- benchmarks -->`` and ``<!-- /benchmarks -->`` of that file.

Speed-up is the median time of the best peer over that of ``segmoe``; above 1, ``segmoe`` is
faster. The bound is the larger of needed FLOPs over the measured GEMM rate and floor bytes over the
measured copy rate (clock.json); "of bound" is the bound over the measured time.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import render
from benchmarks.common import device_name
from benchmarks.store import ROOT

Row = dict[str, Any]
MARKS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
OURS = "segmoe"
SHORT = {"eager": "eager", "graph": "CUDA graph"}


class Results:
    """The rows of a folder's files.

    Args:
        folder: of one device.

    Attributes:
        rows: by file name without its ending; a file that isn't there has none.
        environments: likewise, versions and machine.
    """

    def __init__(self, folder: Path) -> None:
        self.rows: dict[str, list[Row]] = {}
        self.environments: dict[str, dict[str, str]] = {}
        for path in sorted(folder.glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "benchmarks" in content:
                self.rows[path.stem] = [_benchmark_row(row) for row in content["benchmarks"]]
                self.environments[path.stem] = content["machine_info"]["environment"]
            if isinstance(content, dict) and isinstance(content.get("rows"), list):
                self.rows[path.stem] = content["rows"]
            if isinstance(content, dict) and "environment" in content:
                self.environments[path.stem] = content["environment"]

    def timed(self, name: str) -> list[Row]:
        """Rows of a file that hold a time."""
        return [row for row in self.rows.get(name, []) if "time_median_ms" in row]

    def bound_ms(self, row: Row) -> float | None:
        """The least time that the ceilings allow for a row of layer.json, or None."""
        rates = {r["configuration"]: r for r in self.rows.get("clock", [])}
        gemm, copy = rates.get(f"gemm-{row.get('dtype')}"), rates.get("copy")
        if gemm is None or copy is None:
            return None
        compute = row["needed_gflop"] / gemm["rate_tflop_per_s"]
        return max(compute, row["floor_mb"] / copy["rate_gb_per_s"])


def _benchmark_row(saved: dict[str, Any]) -> Row:
    """A row from what pytest-benchmark saved of one of `test_stages`."""
    params, stats = saved["params"], saved["stats"]
    times = {f"time_{key}_ms": 1e3 * stats[key] for key in ("median", "q1", "q3")}
    configuration = f"{params['shape']}/{params['stage']}"
    return {**params, "configuration": configuration, "pass": params["passed"], **times}


def _groups(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _by_provider(rows: list[Row]) -> dict[str, Row]:
    return {row["provider"]: row for row in rows}


def _best_peer(found: dict[str, Row]) -> Row | None:
    peers = [row for name, row in found.items() if name != OURS]
    return min(peers, key=lambda row: row["time_median_ms"]) if peers else None


def speed_ups(rows: list[Row]) -> list[Row]:
    """Best peer over ours for each configuration, pass and mode that has both."""
    found = []
    for members in _groups(rows, "configuration", "pass", "mode").values():
        by_provider = _by_provider(members)
        ours, best = by_provider.get(OURS), _best_peer(by_provider)
        if ours is not None and best is not None:
            ratio = best["time_median_ms"] / ours["time_median_ms"]
            found.append({**ours, "best_peer": best["provider"], "speed_up": ratio})
    return found


def _ms(row: Row | None) -> str:
    if row is None:
        return ""
    low, high = row["time_q1_ms"], row["time_q3_ms"]
    return f"{row['time_median_ms']:.4g} ({low:.4g} to {high:.4g})"


def time_table(results: Results, rows: list[Row], what: str) -> str:
    """One line for each configuration, a column for each provider: median (quartiles) in ms."""
    names = list(dict.fromkeys([OURS, *(row["provider"] for row in rows)]))
    lines = []
    for (configuration,), members in _groups(rows, "configuration").items():
        found = _by_provider(members)
        ours, best = found.get(OURS), _best_peer(found)
        ratio = bound = ""
        if ours is not None and best is not None:
            times = best["time_median_ms"] / ours["time_median_ms"]
            ratio = f"{times:.2f} ({best['provider']})"
        if ours is not None and (least := results.bound_ms(ours)) is not None:
            bound = f"{100 * least / ours['time_median_ms']:.0f} %"
        label = configuration.replace("/", " ")
        lines.append([label, *(_ms(found.get(name)) for name in names), ratio, bound])
    return render.table([f"{what} (ms)", *names, "best peer / segmoe", "of bound"], lines)


def memory_table(rows: list[Row]) -> str:
    """One line for each configuration and provider, in MiB."""
    head = ["memory (MiB)", "provider", "saved for backward", "bytes a step", "peak", "of segmoe"]
    lines = []
    for (configuration,), members in _groups(rows, "configuration").items():
        ours = _by_provider(members).get(OURS)
        label = configuration.replace("/", " ")
        for row in members:
            share = ""
            if ours is not None and ours["saved_mib"]:
                share = f"{row['saved_mib'] / ours['saved_mib']:.2f}"
            peak = f"{row['peak_mib']:.1f}" if "peak_mib" in row else ""
            saved = f"{row['saved_mib']:.2f}"
            step = f"{row['saved_bytes_per_step']:.0f}"
            lines.append([label, row["provider"], saved, step, peak, share])
    return render.table(head, lines)


def _absent(rows: list[Row]) -> list[str]:
    """What was not measured, and why, each reason once."""
    found: dict[str, None] = {}
    for row in rows:
        for key in ("skipped", "refused", "failed"):
            if key in row:
                found[f"* {row['provider']} {key} ({row['mode']}): {row[key]}"] = None
    return list(found)


def _sections(results: Results) -> list[str]:
    """The tables, in order."""
    parts = []
    ceilings = [row for row in results.rows.get("clock", []) if "rate_gb_per_s" in row]
    if ceilings:
        lines = [
            [
                row["configuration"],
                f"{row['rate_gb_per_s']:.4g}",
                f"{row['rate_tflop_per_s']:.4g}" if "rate_tflop_per_s" in row else "",
            ]
            for row in ceilings
        ]
        table = render.table(["measured ceiling", "GB/s", "TFLOP/s"], lines)
        parts.append(f"## Ceilings of the device\n\n{table}")
    keys = ("part", "pass", "mode")
    for (part, passed, mode), rows in _groups(results.timed("layer"), *keys).items():
        title = f"## Layer, {part}, {passed}, {SHORT[mode]}"
        parts.append(f"{title}\n\n{time_table(results, rows, 'shape')}")
    for (passed, mode), rows in _groups(results.timed("stages"), "pass", "mode").items():
        parts.append(f"## Stages, {passed}, {SHORT[mode]}\n\n{time_table(results, rows, 'stage')}")
    if memory := [row for row in results.timed("layer") if "saved_mib" in row]:
        parts.append(f"## Memory\n\n{memory_table(memory)}")
    for rows in results.rows.values():
        if render.is_modelled(rows):
            parts += render.sections(rows)
    if reasons := _absent(results.rows.get("layer", [])):
        parts.append("## Not measured\n\n" + "\n".join(reasons))
    return parts


def _machine(results: Results) -> str:
    """Machine, versions, and how many states of the code the rows come from."""
    kinds = {json.dumps(e, sort_keys=True): e for e in results.environments.values()}
    lines = ["  \n".join(f"{key}: {value}" for key, value in e.items()) for e in kinds.values()]
    codes = {row["code"] for rows in results.rows.values() for row in rows if "code" in row}
    if len(codes) > 1:
        lines.append(f"Rows come from {len(codes)} states of the sources; each says which.")
    return "\n\n".join(lines)


def readme_block(results: Results) -> str:
    """The short table: CUDA graph where there is one, uniform routing."""
    rows = [row for row in speed_ups(results.timed("layer")) if row["routing"] == "uniform"]
    modes = {row["mode"] for row in rows}
    mode = "graph" if "graph" in modes else "eager"
    lines = [
        [
            f"{row['workload']} ({row['part']}, {row['pass']})",
            f"{row['steps']}",
            f"{row['time_median_ms']:.4g}",
            f"{row['speed_up']:.2f}",
            row["best_peer"],
        ]
        for row in rows
        if row["mode"] == mode
    ]
    head = ["shape", "rows", "segmoe ms", "best peer / segmoe", "best peer"]
    environment = results.environments.get("layer", {})
    machine = environment.get("gpu", environment.get("processor", ""))
    versions = f"torch {environment.get('torch')}, triton {environment.get('triton')}"
    return f"{machine}, {versions}, {SHORT[mode]} times, median:\n\n{render.table(head, lines)}"


def write_report(folder: Path) -> list[Path]:
    """Write the report of a folder into it.

    Args:
        folder: of one device, with result files.

    Returns:
        The files that were written.
    """
    results = Results(folder)
    modelled = any(render.is_modelled(rows) for rows in results.rows.values())
    title = "# Modelled, not measured" if modelled else "# Measurements"
    text = "\n\n".join([title, _machine(results), *_sections(results)])
    report = folder / "report.md"
    report.write_text(text + "\n", encoding="utf-8")
    return [report, *_plots(results, folder)]


def _plots(results: Results, folder: Path) -> list[Path]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    drawings = {"time-against-rows.png": _draw_rows, "speed-up.png": _draw_speed_ups}
    written = []
    for name, draw in drawings.items():
        figure = draw(results, plt)
        if figure is not None:
            path = folder / name
            figure.savefig(path, dpi=120, bbox_inches="tight")
            plt.close(figure)
            written.append(path)
    return written


def _draw_rows(results: Results, plt: Any) -> Any:
    """Time against rows for layers that were measured at two sizes at least."""
    rows = [r for r in results.timed("layer") if r["routing"] == "uniform"]
    family = ("d_model", "d_ff", "num_experts", "top_k", "segment_size", "dtype", "part", "mode")
    panels = {
        key: members
        for key, members in _groups(rows, *family, "pass").items()
        if len({row["steps"] for row in members}) > 1
    }
    if not panels:
        return None
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(5 * columns, 4 * height), squeeze=False, sharex=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (key, members) in zip(axes.flat, panels.items(), strict=False):
        for (name,), points in sorted(_groups(members, "provider").items()):
            points.sort(key=lambda row: row["steps"])
            axis.loglog(
                [row["steps"] for row in points],
                [row["time_median_ms"] for row in points],
                marker="o",
                linewidth=2.5 if name == OURS else 1,
                label=name,
            )
        d_model, _, experts, top_k, segment, dtype, part, mode, passed = key
        axis.set_title(
            f"D {d_model}, E {experts}, top {top_k}, P {segment}, {dtype}\n"
            f"{part}, {passed}, {SHORT[mode]}",
            fontsize=9,
        )
        axis.set_xlabel("rows (B * T)")
        axis.set_ylabel("time (ms)")
        axis.legend(fontsize=7)
    figure.tight_layout()
    return figure


def _draw_speed_ups(results: Results, plt: Any) -> Any:
    rows = speed_ups(results.timed("layer"))
    if not rows:
        return None
    labels = [
        f"{r['workload']} {r['part']} {r['routing']} {r['pass']} {SHORT[r['mode']]}" for r in rows
    ]
    figure, axis = plt.subplots(figsize=(9, 0.28 * len(rows) + 1.5))
    colours = ["tab:green" if row["speed_up"] >= 1 else "tab:red" for row in rows]
    axis.barh(range(len(rows)), [row["speed_up"] for row in rows], color=colours)
    for at, row in enumerate(rows):
        axis.text(
            row["speed_up"],
            at,
            f" {row['speed_up']:.2f} {row['best_peer']}",
            va="center",
            fontsize=7,
        )
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel("time of the best peer / time of segmoe")
    return figure


def update_readme(path: Path, block: str) -> None:
    """Replace what stands between the two marks.

    Args:
        path: of the file.
        block: Markdown.

    Raises:
        ValueError: if the marks are not there.
    """
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"{path} must hold the lines {MARKS[0]} and {MARKS[1]}")
    path.write_text(f"{before}{start}\n{block}\n{end}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=ROOT / device, metavar="FOLDER")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the short tables there")
    args = parser.parse_args(arguments)
    if not list(args.results.glob("*.json")):
        print(f"no result files in {args.results}: run python -m benchmarks.layer first")
        return 1
    for path in write_report(args.results):
        print(f"wrote {path}")
    if args.readme:
        update_readme(args.readme, readme_block(Results(args.results)))
        print(f"wrote {args.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
