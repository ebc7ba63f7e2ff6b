"""The README's table of what is known, from committed files; ``python -m docs.known`` writes it."""

import csv
import json
import re
from pathlib import Path

from examples.forecaster.report import read_csv
from examples.studies.paired import difference
from examples.studies.report import read_runs

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- known -->\n).*?(<!-- /known -->)", re.DOTALL)
CASES = {"64-8-2-5-1e6": "width 64", "128-8-1-5-1e5": "width 128", "256-8-1-5-1e5": "width 256"}


def rows_of(name: str) -> list[dict]:
    """Rows of a JSON file of the benchmarks."""
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))["rows"]


def correctness() -> str:
    """What the emulator ran, and the checks against float64."""
    text = (ROOT / "tests" / "reports" / "ptx.md").read_text(encoding="utf-8")
    found = re.search(r"\*\*(\d+)\*\* runs with (\d+) launches of (\d+) kernels; (\d+) with", text)
    runs, _, kernels, faults = found.groups()
    return (
        f"Correct: {kernels} kernels, executed as compiled for sm_80 and sm_90, {runs} layers, "
        f"{faults} faults; errors against float64 within rounding of plain PyTorch's | "
        "[emulator](tests/reports/ptx.md), [accuracy](tests/reports/accuracy.md)"
    )


def speed() -> str:
    """Modelled times beside ScatterMoE's."""
    us = {
        (row["configuration"], row["provider"], row["pass"]): row["modelled_us_with_1us_launches"]
        for row in rows_of("clock/sm_90.json")
        if row["kind"] == "layer"
    }
    parts = []
    for case, width in CASES.items():
        forward, both = (
            [sum(us[case, who, p] for p in passes) for who in ("scattermoe", "segmoe")]
            for passes in (("forward",), ("forward", "backward"))
        )
        experts, choices, rows = case.split("-")[1], case.split("-")[2], case.split("-")[4]
        parts.append(
            f"{width}, {experts} experts, top {choices}, {rows} rows: "
            f"{forward[0] / forward[1]:.1f} and {both[0] / both[1]:.1f}"
        )
    return (
        "Speed, **modelled** for an H200 in bfloat16, never measured: times as fast as ScatterMoE "
        f"in the same model, forward and forward + backward. {'; '.join(parts)} | "
        "[clock](benchmarks/results/clock/report.md)"
    )


def host() -> str:
    """Time of the host in a call, where kernels are not waited for."""
    found = {
        (row["case"], row["pass"], row["provider"]): row["us"][1]
        for row in rows_of("host/sm_90.json")
        if row["case"] == "no shared expert"
    }
    times = [
        " / ".join(
            f"{found['no shared expert', p, who]:.0f}" for p in ("infer", "forward + backward")
        )
        for who in ("segmoe", "official", "grouped_mm", "scattermoe")
    ]
    return (
        "Time of the host (CPU) in a call, us, inference / training: ours {}, official loop {}, "
        "`grouped_mm` pipeline {}, ScatterMoE {} | [host](benchmarks/results/host/sm_90.json)"
    ).format(*times)


def memory() -> str:
    """Bytes kept for backward."""
    with (ROOT / "examples" / "results" / "cost_triton.csv").open(newline="") as stream:
        rows = {row["kind"]: row for row in csv.DictReader(stream) if row["config"] == "small"}
    kinds = ("dense", "segment-wise, shared token-wide", "official loop")
    kept = [f"{float(rows[kind]['ffn_bytes_per_patch_and_layer']):,.0f}" for kind in kinds]
    return (
        "Bytes kept for backward, a patch and FFN layer of width 128: dense FFN {}, ours {}, "
        "official loop {} | [cost](docs/choosing.md#what-it-costs)"
    ).format(*kept)


def gain() -> str:
    """Where segments win and where they don't."""
    parts = []
    for study, data in (("planted", "planted-4"), ("baselines", "ETTh1")):
        runs = read_runs(ROOT / "examples" / "results" / study)
        name = "P=4" if study == "planted" else "segment"
        found = [difference(runs, data, name, other) for other in ("token", "dense")]
        texts = [f"{d.mean:+.0f} % ({d.low:+.0f} to {d.high:+.0f})" for d in found]
        parts.append(f"{texts[0]} to token-wise experts and {texts[1]} to a dense FFN")
    linear = {
        row["horizon"]: row["mse"]
        for row in read_csv(ROOT / "examples" / "results" / "closed_form.csv")
        if (row["data"], row["model"], row["test_stride"]) == ("ETTh1", "linear", 1)
    }
    below = sum(
        linear[h] < row["mse"]
        for row in read_csv(ROOT / "examples" / "results" / "baselines.csv")
        if row["data"] == "ETTh1"
        for h in [row["horizon"]]
    )
    return (
        f"Test error of segment-wise experts, width 16: {parts[0]} on a series made for them; "
        f"{parts[1]} on ETTh1, where a linear map is below all three kinds in {below} of 12 cells "
        "(intervals of 95 %) | [planted](examples/results/planted.md), [choosing](docs/choosing.md)"
    )


def block() -> str:
    """The table."""
    rows = [correctness(), speed(), host(), memory(), gain()]
    return "\n".join(["| what | from |", "|---|---|", *(f"| {row} |" for row in rows)]) + "\n"


def main() -> None:
    """Put the table into the README."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(BLOCK.sub(lambda m: m[1] + block() + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
