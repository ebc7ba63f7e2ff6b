"""Every kernel on a GPU, in bfloat16 and float32, against float64, and bits that repeat.

    python -m benchmarks.smoke [--out FOLDER]

The layers are those of `tests/sanitize.py`, which launch every kernel and each branch of it, on
more steps. A row says how far the worst result is from its limit (`gate`), and whether a second run
has the same bits. Exit status 1 if one fails.
"""

import argparse
import sys
from typing import Any

import torch

from benchmarks.cases import DTYPES
from benchmarks.common import device_name
from benchmarks.gate import judge
from benchmarks.layer import describe
from benchmarks.store import Store, code_version, results_folder
from segmoe_kernels import SegMoE
from segmoe_kernels.testing import make_inputs, oracle, route_ids, run_layer
from tests import sanitize

FILE = "smoke.json"
SHAPE = (16, 203)


def check(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Judge one layer, forward and backward.

    Args:
        options: of `SegMoE`.
        dtype: of parameters and inputs.

    Returns:
        ``error_over_limit, worst, repeats``, or ``failed``.
    """
    settings = {**sanitize.DEFAULTS, **options}
    torch.manual_seed(0)
    try:
        layer = SegMoE(**settings, backend="triton", dtype=dtype, device="cuda")
        inputs = make_inputs(*SHAPE, layer.d_model, dtype=dtype, device="cuda", masked=0.2)
        found, again = (run_layer(layer, *inputs) for _ in range(2))
        ids = route_ids(layer, *inputs)
        eager = run_layer(layer, *inputs, topk_ids=ids, backend="reference")
        verdict = judge(found, eager, oracle(layer, *inputs, topk_ids=ids))
    except Exception as error:  # the next layer may work
        return {"failed": describe(error)}
    repeats = all(torch.equal(value, again[name]) for name, value in found.items())
    row = {"error_over_limit": verdict.error_over_limit, "worst": verdict.worst, "repeats": repeats}
    good = repeats and verdict.error_over_limit <= 1
    return row if good else {**row, "refused": "wrong" if repeats else "bits change"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FOLDER", help="of the result file")
    args = parser.parse_args(arguments)
    store, bad = Store(results_folder("cuda", args.out) / FILE), 0
    for options in sanitize.LAYERS:
        for dtype in ("bfloat16", "float32"):
            words = " ".join(f"{key}={value}" for key, value in options.items())
            row = {
                "configuration": f"{words or 'defaults'}/{dtype}",
                "provider": "segmoe",
                "pass": "forward+backward",
                "mode": "eager",
                "device": device_name("cuda"),
                "code": code_version(),
                **check(options, DTYPES[dtype]),
            }
            store.add([row])
            bad += "failed" in row or "refused" in row
            said = {
                k: row[k] for k in ("failed", "refused", "error_over_limit", "worst") if k in row
            }
            print(f"{row['configuration']}: {said}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
