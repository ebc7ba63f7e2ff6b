"""CPU time of the reference backend against the official layer's loop over experts.

    python -m benchmarks.reference_cpu [--json FILE|-] [--rounds N] [--threads N]

float32, training mode without dropout, 64 sequences of 64 steps, D 128, F 256, P 5, E 4 and 8, with
the official shared expert and without. "forward" runs under no_grad; "forward+backward" asks for
the gradients of x and of every parameter. Both must agree before either is timed. They take
turns of five calls, of which the first does not count; times are medians with quartiles, and the
ratio is that of the quartiles of each round's ratio.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import environment, interleaved, write_json
from benchmarks.official_loop import OfficialLoop
from segmoe_kernels import SegMoE
from segmoe_kernels.testing import make_inputs

BATCH, LENGTH, D_MODEL, D_FF, SEGMENT_SIZE = 64, 64, 128, 256, 5
CASES = tuple((e, shared) for shared in (None, "segment") for e in (4, 8))


def make_layers(num_experts: int, shared_expert: str | None) -> dict[str, nn.Module]:
    """Both implementations, on the same parameters."""
    torch.manual_seed(0)
    layer = SegMoE(
        D_MODEL,
        D_FF,
        num_experts,
        segment_size=SEGMENT_SIZE,
        shared_expert=shared_expert,
        backend="reference",
    )
    return {"reference": layer.train(), "loop": OfficialLoop(layer).train()}


def forward(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The forward alone."""

    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = layer(x)
        return out

    return run


def forward_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    inputs = (x, *layer.parameters())

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), inputs, dy, allow_unused=True)

    return run


def check_equal(layers: dict[str, nn.Module], x: Tensor, dy: Tensor) -> None:
    """Refuse to time what does not agree.

    Raises:
        AssertionError: where outputs or gradients of x differ.
    """
    reference, loop = (forward(layer, x)() for layer in layers.values())
    torch.testing.assert_close(reference, loop, rtol=1e-5, atol=1e-5)
    dx, dx_loop = (forward_backward(layer, x, dy)()[0] for layer in layers.values())
    torch.testing.assert_close(dx, dx_loop, rtol=1e-5, atol=1e-5)


def measure(num_experts: int, shared_expert: str | None, rounds: int) -> list[dict[str, Any]]:
    """Time one case.

    Args:
        num_experts: E.
        shared_expert: "segment" or None.
        rounds: timed calls of each implementation.

    Returns:
        One row for the forward, one for forward + backward.
    """
    layers = make_layers(num_experts, shared_expert)
    x, dy, _ = make_inputs(BATCH, LENGTH, D_MODEL)
    check_equal(layers, x, dy)
    passes: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {name: forward(layer, x) for name, layer in layers.items()},
        "forward+backward": {
            name: forward_backward(layer, x, dy) for name, layer in layers.items()
        },
    }
    rows = []
    for name, functions in passes.items():
        timings = interleaved(functions, rounds=rounds, calls=5)
        rows.append(
            {
                "num_experts": num_experts,
                "shared_expert": shared_expert,
                "pass": name,
                "rounds": rounds,
                "reference_ms": timings["reference"].quartiles(),
                "loop_ms": timings["loop"].quartiles(),
                "reference_over_loop": timings["reference"].ratio(timings["loop"]),
            }
        )
    return rows


HEADER = (
    f"{'E':>2} {'shared':<8}{'pass':<17}{'reference ms (quartiles)':>26}{'loop ms (quartiles)':>26}"
    f"{'reference / loop':>22}"
)


def line(row: dict[str, Any]) -> str:
    """Format a row below `HEADER`."""

    def quartiles(key: str, digits: int) -> str:
        low, median, high = row[key]
        return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    return (
        f"{row['num_experts']:>2} {row['shared_expert'] or 'none':<8}{row['pass']:<17}"
        f"{quartiles('reference_ms', 2):>26}{quartiles('loop_ms', 2):>26}"
        f"{quartiles('reference_over_loop', 2):>22}"
    )


def main() -> None:
    """Measure and print every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help='write the rows as JSON; "-" for stdout')
    parser.add_argument("--rounds", type=int, default=60, help="timed calls of each (default: 60)")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    quiet = args.json == "-"
    if not quiet:
        print("  ".join(f"{key} {value}" for key, value in environment().items()))
        print(HEADER, flush=True)
    rows = []
    for num_experts, shared_expert in CASES:
        measured = measure(num_experts, shared_expert, args.rounds)
        rows += measured
        if not quiet:
            print("\n".join(map(line, measured)), flush=True)
    if args.json:
        write_json(rows, args.json)


if __name__ == "__main__":
    main()
