"""The accuracy budget: what the kernels' results may differ from float64, and the table of it.

    make accuracy                      measures all cases, writes tests/reports/accuracy.json, .md
    python tests/accuracy.py --page    writes the page alone, which says what has changed since

The measure of a tensor is its error against float64 of the same routing, relative: of the root mean
square, ``||actual - exact|| / ||exact||``, and of the largest element,
``max|actual - exact| / max|exact|``; and both divided by what plain PyTorch has in the same dtype.
Inputs have unit variance, upstream gradients are random.
"""

import json
import math
import os
import sys
from pathlib import Path

import report_code

REPORTS = Path(__file__).parent / "reports"
# (batch, steps, d_model, d_ff); beyond two tiles of rows and of columns at the most.
SIZES = {
    "one step": (1, 1, 16, 16),
    "one tile": (2, 13, 24, 40),
    "beyond two tiles": (3, 100, 40, 136),
}
# Runs with other numbers, whose errors are taken together: few elements say little.
RUNS = {"one step": 24, "one tile": 6, "beyond two tiles": 2, "two products": 2}
# Rows wider than the fused kernels take.
WIDE = {"two products": (3, 60, 264, 72)}
OPTIONS = {
    "plain": {},
    "top_k=2 gated": {"top_k": 2, "gated": True, "activation": "silu"},
    "top_k=2 bias": {"top_k": 2, "bias": True, "pooling": "mean"},
    "segment": {"expert_scope": "segment", "shared_expert": None},
}
DTYPES = ("float32", "float16", "bfloat16")
# Largest relative RMS error, except where sums cancel and eager's is larger still.
BUDGET = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}
# Errors over eager's, of the root mean square and of the largest. The first is a promise about
# every run, which the few numbers of a gate's gradient may use up; the second about many of them.
OVER_EAGER = {"one run": (1.5, 3.0), "all runs": (1.25, 2.0)}


def limit_of(size):
    """One step has one number for each gate: still too few in all runs."""
    return "one run" if size == "one step" else "all runs"


def cases():
    """``(dtype, options, size)`` of everything that is measured."""
    for dtype in DTYPES:
        for options in OPTIONS:
            for size in SIZES:
                yield dtype, options, size
        yield dtype, "top_k=2 bias", "two products"


def measure(dtype, options, size, *, runs=1, device="cpu"):
    """Errors of one case over its runs: ``{tensor: {"rms", "eager_rms", "size_rms", ...}}``."""
    runs = [_measure_once(dtype, options, size, device, seed) for seed in range(runs)]
    errors = {}
    for name in runs[0]:
        parts = [run[name] for run in runs]
        errors[name] = {"elements": parts[0]["elements"]}
        for key in parts[0].keys() - {"elements"}:
            values = [part[key] for part in parts]
            if key.endswith("rms"):
                errors[name][key] = math.sqrt(sum(v * v for v in values) / len(values))
            else:
                # NaN, which max() may pass over, shows in the root mean square.
                errors[name][key] = max(values)
    return errors


def _measure_once(dtype, options, size, device, seed):
    import torch

    from segmoe_kernels import SegMoE
    from segmoe_kernels.testing import compare, make_inputs, oracle, route_ids, run_layer

    batch, steps, d_model, d_ff = {**SIZES, **WIDE}[size]
    precision = getattr(torch, dtype)
    torch.manual_seed(seed)
    layer = SegMoE(
        d_model, d_ff, 3, segment_size=4, backend="triton", dtype=precision, device=device,
        **OPTIONS[options],
    )  # fmt: skip
    inputs = make_inputs(batch, steps, d_model, dtype=precision, device=device, seed=seed)
    ids = route_ids(layer, *inputs)
    actual = run_layer(layer, *inputs)
    eager = run_layer(layer, *inputs, backend="reference", topk_ids=ids)
    exact = oracle(layer, *inputs, topk_ids=ids)
    errors = {}
    for name, value in exact.items():
        found = compare(actual[name], eager[name], value)
        errors[name] = {
            "rms": found.rms,
            "max": found.max,
            "eager_rms": found.eager_rms,
            "eager_max": found.eager_max,
            "size_rms": value.square().mean().sqrt().item(),
            "size_max": value.abs().max().item(),
            "elements": value.numel(),
        }
    return errors


def faults(dtype, errors, limit):
    """What of a case is beyond the budget, as text; NaN always is.

    Besides the multiples of eager's error, one rounding of a number like the others is free.
    """
    import torch

    eps = torch.finfo(getattr(torch, dtype)).eps
    rms_factor, max_factor = OVER_EAGER[limit]
    found = []
    for name, error in errors.items():
        relative = rms_factor * error["eager_rms"] + eps * error["size_rms"]
        absolute = max(BUDGET[dtype] * error["size_rms"], rms_factor * error["eager_rms"])
        if not error["rms"] <= min(absolute, relative):
            found.append(
                f"{name}: RMS error {error['rms']:.3e} of {error['size_rms']:.3e}, eager "
                f"{error['eager_rms']:.3e}"
            )
        if not error["max"] <= max_factor * error["eager_max"] + eps * error["size_max"]:
            found.append(f"{name}: max error {error['max']:.3e}, eager {error['eager_max']:.3e}")
    return found


def render(results):
    """The table of the report: worst case of each tensor, for each dtype and set of options."""
    budget = ", ".join(f"{BUDGET[d]:.0e} in {d}" for d in DTYPES)
    rms_factor, max_factor = OVER_EAGER["all runs"]
    rms_once, max_once = OVER_EAGER["one run"]
    lines = [
        "# Accuracy",
        "",
        f"Written by `make accuracy` with {results['versions']}, the kernels in Triton's",
        "interpreter. Relative errors against float64 of the same routing, for each set of options",
        "the worst of its sizes; `/ eager` is the ratio to plain PyTorch's in the same dtype.",
        "",
        f"Every case here is held to: root mean square at most {rms_factor} x eager's, largest",
        f"error at most {max_factor} x eager's ({rms_once} and {max_once} for one step), each plus",
        f"one rounding; root mean square at most {budget}, or",
        "that same multiple of eager's where sums cancel.",
        "",
        report_code.describe(results),
        "",
        "| size | batch, steps, d_model, d_ff | runs |",
        "|---|---|---:|",
        *(f"| {n} | {', '.join(map(str, s))} | {RUNS[n]} |" for n, s in (SIZES | WIDE).items()),
        "",
        "| dtype | options | tensor | RMS | max | RMS / eager | max / eager |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for dtype in DTYPES:
        for options in OPTIONS:
            worst = {}
            for case in results["cases"]:
                if (case["dtype"], case["options"]) != (dtype, options):
                    continue
                for name, error in case["errors"].items():
                    row = worst.setdefault(name, [0.0, 0.0, 0.0, 0.0])
                    if error["size_rms"]:
                        row[0] = max(row[0], error["rms"] / error["size_rms"])
                        row[1] = max(row[1], error["max"] / error["size_max"])
                    if error["eager_rms"]:
                        row[2] = max(row[2], error["rms"] / error["eager_rms"])
                        row[3] = max(row[3], error["max"] / error["eager_max"])
            for name, row in worst.items():
                ratios = " | ".join(f"{x:.2f}" if x else "" for x in row[2:])
                lines.append(
                    f"| {dtype} | {options} | {name} | {row[0]:.1e} | {row[1]:.1e} | {ratios} |"
                )
    return "\n".join(lines) + "\n"


def write(results):
    """Write the report's two files."""
    report_code.save(REPORTS / "accuracy.json", results)
    (REPORTS / "accuracy.md").write_text(render(results), encoding="utf-8")


def main():
    """Measure everything and write the report."""
    if sys.argv[1:] == ["--page"]:
        write(json.loads((REPORTS / "accuracy.json").read_text(encoding="utf-8")))
        return 0
    os.environ["TRITON_INTERPRET"] = "1"
    import interp_bf16
    import interp_releases
    import torch
    import triton

    interp_releases.install()
    interp_bf16.install()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__.partition('+')[0]} and triton {triton.__version__}"
    results = {"versions": versions, "code": report_code.digests(), "cases": []}
    beyond = 0
    for dtype, options, size in cases():
        errors = measure(dtype, options, size, runs=RUNS[size])
        case = {"dtype": dtype, "options": options, "size": size, "errors": errors}
        results["cases"].append(case)
        for fault in faults(dtype, errors, limit_of(size)):
            beyond += 1
            print(f"{dtype}, {options}, {size}: {fault}")  # noqa: T201  a command prints
    write(results)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
