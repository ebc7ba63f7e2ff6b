"""The work of each kernel of this package: programs, iterations of their loops, bytes.

A kernel's function gets one launch and the shape. Loops are named by their variable in the source;
a loop that the compiler kept and that isn't named here is refused, one that it unrolled may be.
Routing is taken to be even: an expert gets a binomial number of segments.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.clock.capture import KernelLaunch
from benchmarks.shapes import Shape

__all__ = ["WORK", "Programs", "Work", "expected_tiles", "work_of"]


def cdiv(a: float, b: float) -> int:
    """Divide and round up."""
    return math.ceil(a / b)


@dataclass(frozen=True)
class Programs:
    """Programs that do the same.

    Attributes:
        count: how many.
        trips: loop -> iterations each time it is reached, 0 for one of other programs.
    """

    count: int
    trips: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a launch does.

    Attributes:
        programs: in the order of the grid.
        hbm_bytes: from and to memory, if nothing of it is in L2 before.
        l2_bytes: that SMs ask of L2.
        rereads: loops that read what the same programs read shortly before, from L2.
        swizzled: neighbouring programs read the same tiles at the same time.
        in_l1: pointer arguments whose lines a program reads over and over.
    """

    programs: tuple[Programs, ...]
    hbm_bytes: float = 0.0
    l2_bytes: float = 0.0
    rereads: frozenset[str] = frozenset()
    swizzled: bool = False
    in_l1: frozenset[str] = frozenset()


WORK: dict[str, Callable[[KernelLaunch, Shape], Work]] = {}


def _kernel(
    function: Callable[[KernelLaunch, Shape], Work],
) -> Callable[[KernelLaunch, Shape], Work]:
    WORK[function.__name__.strip("_")] = function
    return function


def work_of(launch: KernelLaunch, shape: Shape) -> Work:
    """Look up what a launch does.

    Args:
        launch: of a kernel in `WORK`, by its name without ``_kernel``.
        shape: of the layer.

    Raises:
        KeyError: if nothing here says it.
    """
    name = launch.name.removesuffix("_kernel").strip("_")
    if name not in WORK:
        raise KeyError(f"benchmarks/clock/work.py doesn't say what {launch.name} does")
    return WORK[name](launch, shape)


def expected_tiles(segments: int, share: float, steps: int, block_m: int) -> float:
    """Mean number of tiles of an expert that gets Binomial(segments, share) segments.

    Args:
        segments: that are routed.
        share: of an expert.
        steps: rows of a segment.
        block_m: rows of a tile.
    """
    mean = segments * share
    deviation = math.sqrt(max(mean * (1 - share), 1e-9))
    low, high = max(0, int(mean - 6 * deviation)), min(segments, int(mean + 6 * deviation) + 1)
    weights = [math.exp(-0.5 * ((x - mean) / deviation) ** 2) for x in range(low, high + 1)]
    tiles = [cdiv(x * steps, block_m) for x in range(low, high + 1)]
    return sum(w * t for w, t in zip(weights, tiles, strict=True)) / sum(weights)


def _itemsize(launch: KernelLaunch) -> int:
    return {"fp32": 4, "fp64": 8}.get(launch.launch.dtype, 2)


def _row(launch: KernelLaunch, shape: Shape) -> int:
    """Bytes of all rows of x once."""
    return shape.steps * shape.d_model * _itemsize(launch)


def _expert(launch: KernelLaunch, shape: Shape) -> int:
    """Bytes of the matrices of one expert."""
    matrices = 3 if launch.given("experts.gate.ptr") else 2
    return matrices * shape.d_model * shape.d_ff * _itemsize(launch)


def _row_tiles(launch: KernelLaunch, shape: Shape) -> float:
    """Tiles of rows over all experts: a half-empty one each more than full ones."""
    block_m: int = launch["BLOCK_M"]
    return shape.steps * shape.top_k / block_m + shape.num_experts / 2


def _router_bytes(shape: Shape) -> int:
    """Logits, probabilities, weights and ids."""
    return shape.segments * 8 * (shape.num_experts + shape.top_k)


@_kernel
def route_fwd(launch: KernelLaunch, shape: Shape) -> Work:
    count = cdiv(shape.segments, launch["segments_per_block"])
    trips = {
        "start": launch["segments_per_block"] / launch["BLOCK_S"],
        "d0": cdiv(shape.d_model, launch["BLOCK_D"]),
        "p": shape.segment_size,
        "k": shape.top_k,
    }
    router = shape.num_experts * shape.segment_size * shape.d_model * _itemsize(launch)
    rows = _row(launch, shape)
    return Work((Programs(count, trips),), rows + _router_bytes(shape), rows + count * router)


@_kernel
def permute_count(launch: KernelLaunch, shape: Shape) -> Work:
    slots = launch["slots_per_block"]
    size = 4 * shape.segments * shape.top_k
    count = cdiv(shape.segments * shape.top_k, slots)
    return Work((Programs(count, {"start": cdiv(slots, launch["CHUNK"])}),), size, size)


@_kernel
def permute_place(launch: KernelLaunch, shape: Shape) -> Work:
    slots, blocks = shape.segments * shape.top_k, launch["num_blocks"]
    trips = {
        "start": cdiv(blocks, launch["BLOCKS"]),
        "start#2": cdiv(launch["slots_per_block"], launch["CHUNK"]),
    }
    sums = blocks**2 * 4 * (shape.num_experts + 1)
    return Work((Programs(blocks, trips),), 12 * slots, 12 * slots + sums)


@_kernel
def expert_ffn_fwd(launch: KernelLaunch, shape: Shape) -> Work:
    tiles = _row_tiles(launch, shape)
    rows, k = _row(launch, shape), shape.top_k
    l2 = 2 * k * rows + tiles * _expert(launch, shape)
    trips = {"f0": cdiv(shape.d_ff, launch["BLOCK_F"])}
    return Work((Programs(round(tiles), trips),), 2 * k * rows, l2)


@_kernel
def expert_ffn_dx(launch: KernelLaunch, shape: Shape) -> Work:
    tiles = _row_tiles(launch, shape)
    rows, k = _row(launch, shape), shape.top_k
    moved = (3 if launch.given("dx_ptr") else 2) * k * rows
    kept = sum(launch.given(f"kept.{name}_ptr") for name in ("hidden", "dpre", "dgate"))
    moved += kept * k * shape.steps * shape.d_ff * _itemsize(launch)
    trips = {"f0": cdiv(shape.d_ff, launch["BLOCK_F"])}
    l2 = moved + tiles * _expert(launch, shape)
    return Work((Programs(round(tiles), trips),), moved, l2)


@_kernel
def expert_ffn_dw(launch: KernelLaunch, shape: Shape) -> Work:
    splits, experts = launch["num_splits"], shape.num_experts
    columns = cdiv(shape.d_ff, launch["BLOCK_F"])
    spanned = (experts + splits - 1) / splits
    tiles = math.ceil(_row_tiles(launch, shape) / splits)
    rows = _row(launch, shape)
    gated = 3 if launch.given("experts.gate.ptr") else 2
    sums = (splits + experts) * gated * shape.d_model * shape.d_ff * 4
    moved = 2 * shape.top_k * rows
    trips = {"expert": spanned, "tile": tiles / spanned}
    return Work((Programs(splits * columns, trips),), moved + sums, columns * moved + sums)


@_kernel
def reduce_partials(launch: KernelLaunch, shape: Shape) -> Work:
    size, splits, experts = launch["partial_size"], launch["num_splits"], shape.num_experts
    count = cdiv(size, launch["BLOCK"]) * experts
    read = (splits + experts) * size * 4
    return Work(
        (Programs(count, {"first_split": cdiv(splits / experts + 3, launch["SPLITS"])}),),
        read,
        read,
    )


@_kernel
def sum_splits(launch: KernelLaunch, shape: Shape) -> Work:  # noqa: ARG001  as all
    read = launch["num_splits"] * launch["size"] * 4
    count = cdiv(launch["size"], launch["BLOCK"])
    return Work(
        (Programs(count, {"start": cdiv(launch["num_splits"], launch["SPLITS"])}),), read, read
    )


@_kernel
def dlogits(launch: KernelLaunch, shape: Shape) -> Work:
    count = cdiv(shape.segments, launch["BLOCK_S"])
    k, steps = shape.top_k, launch["SEGMENT_SIZE"]
    size = shape.segments * 4 * (2 * shape.num_experts + k * (2 + steps))
    return Work((Programs(count, {"k": k, "p": steps}),), size, size)


@_kernel
def route_bwd(launch: KernelLaunch, shape: Shape) -> Work:
    blocks, steps = launch["blocks_per_split"], shape.segment_size
    splits = cdiv(cdiv(shape.segments, launch["BLOCK_S"]), blocks)
    columns = cdiv(shape.d_model, launch["BLOCK_D"])
    choices = launch["num_choices"]
    rows, experts = _row(launch, shape), shape.num_experts
    moved = rows * (1 + (choices + 1 if launch.given("dx_ptr") else 0))
    logits = 4 * shape.segments * experts
    sums = 4 * splits * experts * steps * shape.d_model
    count = splits * steps * columns
    trips = {"block": blocks, "_": choices, "p": steps}
    l2 = moved + steps * columns * logits + sums
    return Work((Programs(count, trips),), moved + logits + sums, l2)


@_kernel
def grouped_gemm(launch: KernelLaunch, shape: Shape) -> Work:
    n, k = launch["N"], launch["K"]
    products = 1 + launch.given("second.ptr")
    outputs = 1 + launch.given("first.pre_ptr") + launch.given("second.pre_ptr")
    inputs = 1 + launch.given("a2_rows.ptr")
    return _product(launch, shape, n, k, inputs, products, outputs)


@_kernel
def grouped_gemm_dhidden(launch: KernelLaunch, shape: Shape) -> Work:
    # pre is read, hidden and dpre are written; the gate doubles two of them.
    extra = 5 if launch.given("gate_pre_ptr") else 3
    return _product(launch, shape, launch["N"], launch["K"], 1, 1, extra)


def _product(
    launch: KernelLaunch, shape: Shape, n: int, k: int, inputs: int, products: int, outputs: int
) -> Work:
    tiles, columns = _row_tiles(launch, shape), cdiv(n, launch["BLOCK_N"])
    count, size = round(tiles * columns), _itemsize(launch)
    turns = cdiv(k, launch["BLOCK_K"])
    rows = shape.steps * shape.top_k * size
    weights = shape.num_experts * n * k * size * products
    l2 = rows * (inputs * k * columns + outputs * n)
    l2 += count * products * launch["BLOCK_N"] * k * size
    trips = {"k0": turns, "k0#2": turns}
    hbm = rows * (inputs * k + outputs * n) + weights
    return Work((Programs(count, trips),), hbm, l2, swizzled=True)


@_kernel
def grouped_gemm_dw(launch: KernelLaunch, shape: Shape) -> Work:
    n, k, splits, experts = launch["N"], launch["K"], launch["num_splits"], shape.num_experts
    row_tiles, column_tiles = cdiv(n, launch["BLOCK_N"]), cdiv(k, launch["BLOCK_K"])
    whole = launch["WHOLE"]
    spanned = 1 if whole else (experts + splits - 1) / splits
    tiles = math.ceil(_row_tiles(launch, shape) / splits)
    rows, size = shape.steps * shape.top_k, _itemsize(launch)
    sums = experts * n * k * size if whole else (splits + experts) * n * k * 4
    count = splits * row_tiles * column_tiles
    trips = {"expert": spanned, "tile": tiles / spanned}
    l2 = rows * size * (n * column_tiles + k * row_tiles) + sums
    return Work((Programs(count, trips),), rows * size * (n + k) + sums, l2, swizzled=True)


@_kernel
def combine_fwd(launch: KernelLaunch, shape: Shape) -> Work:
    choices = launch["num_choices"]
    moved = (choices + 1 + launch.given("shared.out_ptr")) * _row(launch, shape)
    columns = cdiv(shape.d_model, launch["BLOCK_D"])
    count = cdiv(shape.steps, launch["BLOCK_M"]) * columns
    return Work((Programs(count, {"_": choices}),), moved, moved)


@_kernel
def combine_bwd(launch: KernelLaunch, shape: Shape) -> Work:
    steps = launch["STEPS_PER_GATE"]
    moved = 3 * _row(launch, shape)
    trips = {"p": steps, "d0": cdiv(shape.d_model, launch["BLOCK_D"])}
    count = cdiv(shape.steps / steps, launch["BLOCK_M"])
    return Work((Programs(count, trips),), moved, moved)


def _shared_pass(
    launch: KernelLaunch, shape: Shape, width: int, matrices: int, tiles: int = 1
) -> Work:
    """A pass over the shared expert's rows, ``width`` wide, by programs of so many column tiles."""
    moved = matrices * shape.segments * width * _itemsize(launch)
    by_steps = "BLOCK_N" not in launch.launch.constants
    count = cdiv(shape.steps if by_steps else shape.segments, launch["BLOCK_M"]) * tiles
    columns = width if by_steps else launch["BLOCK_N"]
    return Work((Programs(count, {"n0": cdiv(width, columns)}),), moved, moved)


@_kernel
def shared_rows(launch: KernelLaunch, shape: Shape) -> Work:
    return _shared_pass(launch, shape, launch["W"], 1 + launch.given("rows_ptr"))


@_kernel
def shared_activate(launch: KernelLaunch, shape: Shape) -> Work:
    tiles = cdiv(launch["H"], launch["BLOCK_N"])
    return _shared_pass(launch, shape, launch["H"], 2 + launch.given("pre.gate_ptr"), tiles)


@_kernel
def shared_activate_bwd(launch: KernelLaunch, shape: Shape) -> Work:
    return _shared_pass(launch, shape, launch["H"], 4 + 2 * launch.given("pre.gate_ptr"))


@_kernel
def shared_dx(launch: KernelLaunch, shape: Shape) -> Work:
    tiles = cdiv(shape.d_model, launch["BLOCK_D"])
    return _shared_pass(launch, shape, shape.segment_size * shape.d_model, 2, tiles)
