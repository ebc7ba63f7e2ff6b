"""What expert parallelism costs: bytes and time of a training step, computed from given rates.

    python -m benchmarks.parallel_model --bandwidth 50 --latency 20 --flops 400 [--json FILE|-]
    python -m benchmarks.parallel_model --rates rates.json --worlds 1,8,64,512,4096
    python -m benchmarks.parallel_model --formula

Nothing here is measured: bandwidth (GB/s that a rank sends to other ranks in an all-to-all or an
all-reduce), latency (us of one collective, for each doubling of the ranks) and flops (TFLOP/s of
the layer's products) come from the command line or from a JSON file with these three numbers, for
example from `benchmarks.layer` and a run of the library's own collective benchmark. The counts are
exact, and tests hold them to what `segmoe_kernels.parallel` sends.

For a rank with S routed segments (S * top_k slots), W ranks, b bytes a number and e of the E
experts on the rank, segments spread evenly over the experts:

    away     = S * top_k * (1 - e / E)             slots whose expert is on another rank
    served   = S * top_k * (W - 1) * e / E         slots of other ranks whose expert is here
    exchange = (away + served) * (2 * P * D * b + 4) + 8 * (E - e)   bytes sent, both directions
    reduce   = 2 * (W - 1) / W * bytes of the gradients that the ranks share (ring all-reduce)
    FLOPs    = 3 * (routed rows * W * e / E + the shared expert's + the router's)
    time     = FLOPs / flops + (exchange + reduce) / bandwidth + collectives * latency * log2(W)

In forward a rank sends segments and weights of its slots away and outputs of those it serves;
backward sends their gradients the other way. The time is that of the rank with the most experts.

Data parallel: every rank has all experts, reduce covers all parameters, nothing is exchanged.
Expert parallel: a rank has E / W experts, reduce covers the rest, every layer exchanges.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import write_json
from segmoe_kernels.parallel import expert_blocks

WEIGHT_BYTES = 4  # routing weights travel in float32
COUNT_BYTES = 8


class Setting(NamedTuple):
    """One layer and one rank's batch."""

    segments: int  # of one rank, S
    segment_size: int
    d_model: int
    d_ff: int
    num_experts: int
    top_k: int = 1
    shared_steps: int = 0  # steps that a row of the shared expert sees: P, 1, or 0 for none
    gated: bool = False
    bytes_each: int = 2  # of activations and weights
    gradient_bytes: int = 4
    layers: int = 1


class Rates(NamedTuple):
    """What a machine does; given by the reader."""

    bandwidth: float  # GB/s
    latency: float  # us, for each doubling of the ranks
    flops: float  # TFLOP/s


def travelling_slots(setting: Setting, world: int, rank: int = 0) -> tuple[float, float]:
    """Slots of a rank whose expert is elsewhere, and of others whose expert is here.

    Every expert gets the same number.
    """
    share = expert_blocks(setting.num_experts, world)[rank] / setting.num_experts
    slots = setting.segments * setting.top_k
    return slots * (1 - share), slots * (world - 1) * share


def exchanged_bytes(
    setting: Setting, away: float, served: float, world: int, rank: int = 0
) -> list[float]:
    """Bytes that a rank sends to others in one layer, in the order of the collectives.

    Args:
        setting: of the layer.
        away: slots of the rank whose expert is elsewhere.
        served: slots of others whose expert is here.
        world: ranks.
        rank: which one.

    Returns:
        Forward: counts, segments, weights, outputs; backward: the outputs' gradients, the
        segments', the weights'.
    """
    row = setting.segment_size * setting.d_model * setting.bytes_each
    counts = setting.num_experts - expert_blocks(setting.num_experts, world)[rank]
    forward = [counts * COUNT_BYTES, away * row, away * WEIGHT_BYTES, served * row]
    return [*forward, away * row, served * row, served * WEIGHT_BYTES]


def parameters(setting: Setting) -> dict[str, int]:
    """Numbers of one layer by who has them."""
    matrices = 3 if setting.gated else 2
    wide = setting.segment_size * setting.d_model
    shared = matrices * setting.shared_steps**2 * setting.d_model * setting.d_ff
    gate = setting.shared_steps * setting.d_model
    return {
        "experts": setting.num_experts * matrices * setting.d_model * setting.d_ff,
        "others": setting.num_experts * wide + shared + gate,
    }


def step_flops(setting: Setting) -> float:
    """FLOPs of a rank's forward and backward in one layer: backward is twice the forward."""
    matrices = 3 if setting.gated else 2
    each = 2 * matrices * setting.d_model * setting.d_ff
    routed = setting.segments * setting.top_k * setting.segment_size * each
    steps = setting.segments * setting.segment_size
    shared = steps * setting.shared_steps * each
    router = 2 * steps * setting.d_model * setting.num_experts
    return 3.0 * (routed + shared + router)


def step(
    setting: Setting, rates: Rates, world: int, *, experts_are_sharded: bool
) -> dict[str, Any]:
    """Bytes sent and seconds taken by the busiest rank in a training step."""
    size = parameters(setting)
    doublings = math.log2(world) if world > 1 else 0.0
    shared_size = size["others"] + (0 if experts_are_sharded else size["experts"])
    reduce = 2 * (world - 1) / world * shared_size * setting.gradient_bytes
    exchange, collectives, busiest = 0.0, 1 if world > 1 else 0, 1.0
    if experts_are_sharded and world > 1:
        sizes = expert_blocks(setting.num_experts, world)
        rank = sizes.index(max(sizes))
        busiest = max(sizes) * world / setting.num_experts
        sent = exchanged_bytes(setting, *travelling_slots(setting, world, rank), world, rank)
        exchange = sum(sent)
        collectives += len(sent)
    held = 1.0
    if experts_are_sharded:
        held = max(expert_blocks(setting.num_experts, world)) / setting.num_experts
    routed = 3.0 * setting.segments * setting.top_k * setting.segment_size
    routed *= 2 * (3 if setting.gated else 2) * setting.d_model * setting.d_ff
    flops = step_flops(setting) + (busiest - 1) * routed
    seconds = {
        "compute": flops / (rates.flops * 1e12),
        "exchange": exchange / (rates.bandwidth * 1e9),
        "reduce": reduce / (rates.bandwidth * 1e9),
        "latency": collectives * doublings * rates.latency * 1e-6,
    }
    return {
        "world": world,
        "experts": "sharded" if experts_are_sharded else "replicated",
        "exchange_bytes": exchange * setting.layers,
        "reduce_bytes": reduce * setting.layers,
        "collectives": collectives * setting.layers,
        "expert_bytes_held": size["experts"] * held * setting.layers * setting.bytes_each,
        "busiest_rank_rows": busiest,
        **{f"{name}_s": value * setting.layers for name, value in seconds.items()},
        "step_s": sum(seconds.values()) * setting.layers,
    }


def read_rates(options: argparse.Namespace) -> Rates:
    """Rates from the file or the command line; all three are needed."""
    given = json.loads(Path(options.rates).read_text(encoding="utf-8")) if options.rates else {}
    found = {name: getattr(options, name) or given.get(name) for name in Rates._fields}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        sys.exit(f"needs {', '.join('--' + name for name in missing)}: nothing is assumed")
    if min(found.values()) <= 0:
        sys.exit(f"rates have to be positive, got {found}")
    return Rates(**{name: float(value) for name, value in found.items()})


def main() -> None:
    """Print the table, or write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formula", action="store_true", help="print the formulas and end")
    parser.add_argument("--bandwidth", type=float, help="GB/s")
    parser.add_argument("--latency", type=float, help="us")
    parser.add_argument("--flops", type=float, help="TFLOP/s")
    parser.add_argument("--rates", metavar="FILE", help="JSON with these three names")
    parser.add_argument("--worlds", default="1,2,4,8,16,64,256,1024,4096")
    parser.add_argument("--json", metavar="FILE", help="rows to a file, or - for standard output")
    numbers = Setting(13978, 5, 128, 256, 4, layers=4, shared_steps=5)
    for name, value in numbers._asdict().items():
        if isinstance(value, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options = parser.parse_args()
    if options.formula:
        print(__doc__)
        return
    rates = read_rates(options)
    setting = Setting(**{name: getattr(options, name) for name in Setting._fields})
    rows = [
        step(setting, rates, world, experts_are_sharded=sharded)
        for world in (int(part) for part in options.worlds.split(","))
        for sharded in (False, True)
    ]
    if options.json:
        given = {**setting._asdict(), **rates._asdict()}
        write_json([{**given, **row} for row in rows], options.json)
        if options.json == "-":
            return
    print("computed from the rates given, not measured; the busiest rank")
    print(
        f"{'ranks':>6} {'experts':>10} {'exchange MB':>12} {'reduce MB':>10} "
        f"{'compute ms':>11} {'send ms':>8} {'step ms':>8}"
    )
    for row in rows:
        send = row["exchange_s"] + row["reduce_s"] + row["latency_s"]
        print(
            f"{row['world']:6} {row['experts']:>10} {row['exchange_bytes'] / 1e6:12.2f} "
            f"{row['reduce_bytes'] / 1e6:10.2f} {row['compute_s'] * 1e3:11.3f} "
            f"{send * 1e3:8.3f} {row['step_s'] * 1e3:8.3f}"
        )


if __name__ == "__main__":
    main()
