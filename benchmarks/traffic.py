"""Traffic, launches and arithmetic of the routed part, counted without a GPU.

    python -m benchmarks.traffic [--peer] [--json FILE|-] [--kernels]

For each of `shapes.TRAFFIC_SHAPES`, float32, exact GELU, no bias, no shared expert: the forward
alone (no gradients) and forward + backward (x and every parameter require a gradient). Columns:

* launches: kernels, plus PyTorch operators that touch an element;
* requested, distinct: bytes that loads and stores ask for, and those bytes with each address once
  a launch; a cache puts DRAM traffic in between;
* floor: the least a layer can move (`work.floor_bytes`). Forward: x, y and the weights once.
  Forward + backward: that, then x, dy, dx, the weights and their gradients once;
* of ScatterMoE: bytes over those of ScatterMoE's kernels for the same layer, in float32 products;
* work: FLOPs of the products executed over those needed (`work.needed_flops`). What exceeds 1 is
  tile padding and, in the backward, the hidden layer computed anew.

``--peer`` counts ScatterMoE instead, from its source in ``peers/scattermoe`` (see `peers`), with a
PyTorch router before it: this is where the constants below come from.
"""

import argparse
import sys
from typing import Any

# First: it chooses Triton's interpreter.
from benchmarks.traffic_meter import TrafficMeter

import torch  # isort: skip
from torch import Tensor  # isort: skip

from benchmarks.common import environment, write_json
from benchmarks.shapes import TRAFFIC_SHAPES, Shape
from benchmarks.work import floor_bytes, needed_flops
from segmoe_kernels import SegMoE
from segmoe_kernels.testing import make_inputs

# ScatterMoE's MB, counted by `python -m benchmarks.traffic --peer` (shawntan/scattermoe at 47b5e15,
# torch 2.13.0, triton 3.7.1): distinct of forward and of backward, then requested of both.
SCATTERMOE_MB: dict[Shape, tuple[float, float, float, float]] = {
    TRAFFIC_SHAPES[0]: (14.518, 32.053, 16.655, 34.151),
    TRAFFIC_SHAPES[1]: (26.669, 62.371, 37.520, 78.430),
    TRAFFIC_SHAPES[2]: (93.586, 214.332, 177.863, 363.441),
    TRAFFIC_SHAPES[3]: (36.862, 82.988, 45.249, 93.347),
    TRAFFIC_SHAPES[4]: (19.038, 43.423, 22.875, 47.990),
    TRAFFIC_SHAPES[5]: (15.040, 34.506, 18.881, 40.298),
    TRAFFIC_SHAPES[6]: (25.080, 58.751, 32.500, 69.287),
    TRAFFIC_SHAPES[7]: (32.362, 75.781, 59.505, 124.825),
    TRAFFIC_SHAPES[8]: (87.122, 209.556, 172.450, 362.013),
}


def scattermoe_bytes(shape: Shape, *, backward: bool, requested: bool = False) -> float:
    """ScatterMoE's bytes at one of `TRAFFIC_SHAPES`.

    Args:
        shape: of the layer and its input.
        backward: forward and backward; else the forward alone.
        requested: before any cache; else each address once a launch.
    """
    megabytes = SCATTERMOE_MB[shape][2 if requested else 0 :][:2]
    return 1e6 * (sum(megabytes) if backward else megabytes[0])


def _make(shape: Shape) -> tuple[SegMoE, Tensor, Tensor]:
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
    return layer, x, dy


def measure(shape: Shape, *, backward: bool, distinct: bool = True) -> TrafficMeter:
    """Run the layer once on the Triton backend.

    Args:
        shape: of the layer and its input.
        backward: forward with gradients, and backward; else the forward alone.
        distinct: count distinct bytes too.

    Returns:
        The meter.
    """
    layer, x, dy = _make(shape)
    return _count(layer, x, dy, backward=backward, distinct=distinct)


def measure_scattermoe(shape: Shape, *, backward: bool, distinct: bool = True) -> TrafficMeter:
    """As `measure`, with ScatterMoE's experts behind a PyTorch router.

    Raises:
        SkippedError: if its source is not there.
    """
    from benchmarks.peer_modules import ScatterMoE
    from benchmarks.peers import load_scattermoe

    layer, x, dy = _make(shape)
    peer = ScatterMoE(layer, load_scattermoe(plain=True))
    return _count(peer, x, dy, backward=backward, distinct=distinct)


def _count(
    module: torch.nn.Module, x: Tensor, dy: Tensor, *, backward: bool, distinct: bool
) -> TrafficMeter:
    x.requires_grad_(backward)
    with torch.set_grad_enabled(backward), TrafficMeter(distinct=distinct) as meter:
        y = module(x)
        if backward:
            y.backward(dy)
    return meter


def row(shape: Shape, meter: TrafficMeter, *, backward: bool) -> dict[str, Any]:
    """One line of the table, for people and for JSON."""
    total = meter.total()
    floor = floor_bytes(shape, backward=backward)
    found = {
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
        "dot_gflop": total.dot_flops / 1e9,
        "executed_over_needed_flops": total.dot_flops / needed_flops(shape, backward=backward),
    }
    if shape in SCATTERMOE_MB:
        distinct, requested = (
            scattermoe_bytes(shape, backward=backward, requested=asked) for asked in (False, True)
        )
        found |= {
            "scattermoe_mb": distinct / 1e6,
            "distinct_over_scattermoe": total.distinct_bytes / distinct,
            "scattermoe_requested_mb": requested / 1e6,
            "requested_over_scattermoe": total.requested_bytes / requested,
        }
    return found


HEADER = (
    f"{'shape':<32}{'pass':<17}{'launches':>9}{'requested':>11}{'of':>11}{'distinct':>10}{'of':>11}"
    f"{'floor':>8}{'x floor':>8}{'GFLOP':>8}{'work':>6}\n"
    f"{'':<32}{'':<17}{'':>9}{'MB':>11}{'ScatterMoE':>11}{'MB':>10}{'ScatterMoE':>11}{'MB':>8}"
)


def line(values: dict[str, Any]) -> str:
    """Format a `row` below `HEADER`."""
    requested, distinct = (
        f"{values[key]:>11.2f}" if key in values else f"{'':>11}"
        for key in ("requested_over_scattermoe", "distinct_over_scattermoe")
    )
    return (
        f"{values['shape']:<32}{values['pass']:<17}{values['launches']:>9}"
        f"{values['requested_mb']:>11.2f}{requested}{values['distinct_mb']:>10.2f}{distinct}"
        f"{values['floor_mb']:>8.2f}{values['distinct_over_floor']:>8.2f}"
        f"{values['dot_gflop']:>8.3f}{values['executed_over_needed_flops']:>6.2f}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure and print every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help='write the rows as JSON; "-" for stdout')
    parser.add_argument("--kernels", action="store_true", help="print a table for each kernel too")
    parser.add_argument("--peer", action="store_true", help="count ScatterMoE instead")
    args = parser.parse_args(arguments)
    quiet = args.json == "-"
    # One program after another on small blocks: a second thread only costs.
    torch.set_num_threads(1)
    if args.peer:
        from benchmarks.peers import SkippedError, load_scattermoe

        try:
            load_scattermoe(plain=True)
        except SkippedError as error:
            print(f"skipped scattermoe: {error}", file=sys.stderr)
            return 1
    count = measure_scattermoe if args.peer else measure
    if not quiet:
        print("  ".join(f"{key} {value}" for key, value in environment().items()))
        print(HEADER, flush=True)
    rows = []
    for shape in TRAFFIC_SHAPES:
        for backward in (False, True):
            meter = count(shape, backward=backward)
            rows.append(row(shape, meter, backward=backward))
            if quiet:
                continue
            print(line(rows[-1]), flush=True)
            if args.kernels:
                print(f"\n{meter.table()}\n", flush=True)
    if args.json:
        write_json(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
