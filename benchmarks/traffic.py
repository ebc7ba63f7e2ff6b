"""Traffic, launches and arithmetic of the routed part, counted without a GPU.

    python -m benchmarks.traffic [--json FILE|-] [--kernels]

For each of `common.SHAPES`, float32, exact GELU, no bias, no shared expert: the forward alone (no
gradients) and forward + backward (x and every parameter require a gradient). Columns:

* launches: kernels, plus PyTorch operators that touch an element;
* requested, distinct: bytes that loads and stores ask for, and those bytes with each address once
  a launch; a cache puts DRAM traffic in between;
* floor: the least a layer can move. Forward: x, y and the weights once. Forward + backward: that,
  then x, dy, dx, the weights and their gradients once, so ``5 * |x| + 3 * |weights|``;
* of ScatterMoE: distinct bytes over those of ScatterMoE's kernels for the same layer;
* work: FLOPs of the products executed over those needed, which are
  ``B*T * (4 * top_k * D * F + 2 * D * E)`` forward and three times that with the backward. What
  exceeds 1 is tile padding and, in the backward, the hidden layer computed anew.
"""

import argparse
from typing import Any

# First: it chooses Triton's interpreter.
from benchmarks.traffic_meter import TrafficMeter

import torch  # isort: skip

from benchmarks.common import SHAPES, Shape, environment, write_json
from segmoe_kernels import SegMoE
from segmoe_kernels.testing import make_inputs

# Distinct MB of ScatterMoE's forward and backward, counted in the same way.
SCATTERMOE_MB = {
    SHAPES[0]: (14.5, 32.1),
    SHAPES[1]: (26.7, 62.4),
    SHAPES[2]: (93.6, 214.3),
}


def needed_flops(shape: Shape, *, backward: bool) -> int:
    """FLOPs of the products that the layer's definition needs; see the module's docstring."""
    steps = shape.batch * shape.length
    experts = 4 * shape.top_k * shape.d_model * shape.d_ff
    router = 2 * shape.d_model * shape.num_experts
    return steps * (experts + router) * (3 if backward else 1)


def floor_bytes(shape: Shape, *, backward: bool) -> int:
    """The least bytes in float32; see the module's docstring."""
    x = shape.batch * shape.length * shape.d_model
    experts = 2 * shape.num_experts * shape.d_model * shape.d_ff
    router = shape.num_experts * shape.segment_size * shape.d_model
    if backward:
        return 4 * (5 * x + 3 * (experts + router))
    return 4 * (2 * x + experts + router)


def scattermoe_bytes(shape: Shape, *, backward: bool) -> float:
    """Distinct bytes of ScatterMoE at one of `SHAPES`."""
    megabytes = SCATTERMOE_MB[shape]
    return 1e6 * (sum(megabytes) if backward else megabytes[0])


def measure(shape: Shape, *, backward: bool, distinct: bool = True) -> TrafficMeter:
    """Run the layer once on the Triton backend.

    Args:
        shape: of the layer and its input.
        backward: forward with gradients, and backward; else the forward alone.
        distinct: count distinct bytes too.

    Returns:
        The meter.
    """
    torch.manual_seed(0)
    layer = SegMoE(
        shape.d_model,
        shape.d_ff,
        shape.num_experts,
        top_k=shape.top_k,
        segment_size=shape.segment_size,
        shared_expert=None,
        backend="triton",
    )
    x, dy, _ = make_inputs(shape.batch, shape.length, shape.d_model)
    x.requires_grad_(backward)
    with torch.set_grad_enabled(backward), TrafficMeter(distinct=distinct) as meter:
        y = layer(x)
        if backward:
            y.backward(dy)
    return meter


def row(shape: Shape, meter: TrafficMeter, *, backward: bool) -> dict[str, Any]:
    """One line of the table, for people and for JSON."""
    total = meter.total()
    floor = floor_bytes(shape, backward=backward)
    peer = scattermoe_bytes(shape, backward=backward)
    return {
        "shape": str(shape),
        "pass": "forward+backward" if backward else "forward",
        "launches": total.launches,
        "triton_launches": sum(
            count.launches for name, count in meter.kernels.items() if not name.startswith("aten.")
        ),
        "requested_mb": total.requested_bytes / 1e6,
        "distinct_mb": total.distinct_bytes / 1e6,
        "floor_mb": floor / 1e6,
        "distinct_over_floor": total.distinct_bytes / floor,
        "scattermoe_mb": peer / 1e6,
        "distinct_over_scattermoe": total.distinct_bytes / peer,
        "dot_gflop": total.dot_flops / 1e9,
        "executed_over_needed_flops": total.dot_flops / needed_flops(shape, backward=backward),
    }


HEADER = (
    f"{'shape':<32}{'pass':<17}{'launches':>9}{'requested':>11}{'distinct':>10}{'floor':>8}"
    f"{'x floor':>8}{'ScatterMoE':>11}{'of it':>7}{'GFLOP':>8}{'work':>6}\n"
    f"{'':<32}{'':<17}{'':>9}{'MB':>11}{'MB':>10}{'MB':>8}{'':>8}{'MB':>11}"
)


def line(values: dict[str, Any]) -> str:
    """Format a `row` below `HEADER`."""
    return (
        f"{values['shape']:<32}{values['pass']:<17}{values['launches']:>9}"
        f"{values['requested_mb']:>11.2f}{values['distinct_mb']:>10.2f}{values['floor_mb']:>8.2f}"
        f"{values['distinct_over_floor']:>8.2f}{values['scattermoe_mb']:>11.1f}"
        f"{values['distinct_over_scattermoe']:>7.2f}{values['dot_gflop']:>8.3f}"
        f"{values['executed_over_needed_flops']:>6.2f}"
    )


def main() -> None:
    """Measure and print every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help='write the rows as JSON; "-" for stdout')
    parser.add_argument("--kernels", action="store_true", help="print a table for each kernel too")
    args = parser.parse_args()
    quiet = args.json == "-"
    # One program after another on small blocks: a second thread only costs.
    torch.set_num_threads(1)
    if not quiet:
        print("  ".join(f"{key} {value}" for key, value in environment().items()))
        print(HEADER, flush=True)
    rows = []
    for shape in SHAPES:
        for backward in (False, True):
            meter = measure(shape, backward=backward)
            rows.append(row(shape, meter, backward=backward))
            if quiet:
                continue
            print(line(rows[-1]), flush=True)
            if args.kernels:
                print(f"\n{meter.table()}\n", flush=True)
    if args.json:
        write_json(rows, args.json)


if __name__ == "__main__":
    main()
