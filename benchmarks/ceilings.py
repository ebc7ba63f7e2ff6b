"""What the device itself reaches: the copy rate of its memory and the rate of its library's GEMM.

    python -m benchmarks.ceilings [--device cuda] [--out FOLDER]

Time bounds in the report come from these, not from a data sheet. The copy reads and writes a buffer
far larger than the L2 cache, both counted; products are square, of random numbers, in each dtype.
"""

import argparse
import sys
from typing import Any

import torch

from benchmarks.cases import DTYPES
from benchmarks.common import device_name, environment
from benchmarks.store import Store, code_version, results_folder
from benchmarks.timing import Clock, summary, time_interleaved


def measure(device: torch.device, *, copy_bytes: int, size: int, budget_s: float) -> list[Any]:
    """Measure the ceilings.

    Args:
        device: where.
        copy_bytes: size of the buffer that is copied.
        size: rows and columns of the factors.
        budget_s: seconds of timed calls for each.

    Returns:
        Rows for a `Store`.
    """
    clock = Clock(device)
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    functions = {"copy": (lambda: target.copy_(source), 2 * copy_bytes, 0)}
    for name, dtype in DTYPES.items():
        if device.type == "cpu" and dtype == torch.float16:
            continue  # no library product worth the name
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        functions[f"gemm-{name}"] = (
            lambda a=a, b=b: torch.mm(a, b),
            3 * size * size * a.element_size(),
            2 * size**3,
        )
    rows = []
    for name, (function, size_bytes, flops) in functions.items():
        timing = time_interleaved({name: function}, clock, budget_s=budget_s)[name]
        numbers = summary(timing)
        seconds = numbers["time_median_ms"] / 1e3
        row = {
            "configuration": name,
            "provider": "library",
            "pass": "forward",
            "mode": "eager",
            "device": device_name(device),
            "code": code_version(),
            **numbers,
            "rate_gb_per_s": size_bytes / 1e9 / seconds,
        }
        if flops:
            row["rate_tflop_per_s"] = flops / 1e12 / seconds
        rows.append(row)
        print("  ".join(f"{k} {row[k]:.4g}" for k in row if k.startswith(("rate", "time_m"))), name)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cuda", "cpu"))
    parser.add_argument("--out", metavar="FOLDER", help="of the result file")
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the factors")
    parser.add_argument("--copy-mib", type=int, default=4096, help="size of the copied buffer")
    parser.add_argument("--budget", type=float, default=2.0, metavar="SECONDS")
    args = parser.parse_args(arguments)
    print("  ".join(f"{key} {value}" for key, value in environment().items()))
    rows = measure(
        torch.device(args.device),
        copy_bytes=args.copy_mib * 2**20,
        size=args.size,
        budget_s=args.budget,
    )
    store = Store(results_folder(args.device, args.out) / "clock.json")
    store.add(rows)
    print(f"wrote {store.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
