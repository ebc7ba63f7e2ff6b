"""The shapes that are measured, each with where it comes from.

Groups, by the name that ``--shapes`` takes:

* ``traffic``: small enough for Triton's interpreter; bytes are counted there, not time;
* ``paper``: one layer of the runs of Seg-MoE, from its code's configurations and scripts;
* ``grid``: widths, segment sizes, experts, top-k and rows around them, modelled by `clock`;
* ``headline``: the few of them that say most, for a first run;
* ``llm``: token-wise gated layers of language models;
* ``official``: the three official configurations, with batches for a CPU;
* ``tiny``: a second on a CPU, to exercise the measurements themselves.

D-E-k-P-rows, such as ``64-4-1-5-1e6``, is a shape with F = 2 D and sequences of 60 steps.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One call of a layer with token-wise experts and "concat" pooling.

    Attributes:
        batch: B, sequences.
        length: T, time steps.
        d_model: D.
        d_ff: F.
        num_experts: E.
        top_k: experts of a segment.
        segment_size: P.
    """

    batch: int
    length: int
    d_model: int
    d_ff: int
    num_experts: int
    top_k: int
    segment_size: int

    def __str__(self) -> str:
        return (
            f"B{self.batch}-T{self.length}-D{self.d_model}-F{self.d_ff}-E{self.num_experts}"
            f"-k{self.top_k}-P{self.segment_size}"
        )

    @property
    def steps(self) -> int:
        """Rows of x: ``B * T``."""
        return self.batch * self.length

    @property
    def segments(self) -> int:
        """Segments that are routed: ``B * ceil(T / P)``."""
        return self.batch * -(-self.length // self.segment_size)


@dataclass(frozen=True)
class Workload:
    """A shape, the kind of expert, and the source of both.

    Attributes:
        name: unique.
        shape: sizes.
        source: where the sizes come from.
        activation: of the experts.
        gated: experts are ``act(gate(x)) * up(x)``.
    """

    name: str
    shape: Shape
    source: str
    activation: str = "gelu"
    gated: bool = False

    @property
    def language_model(self) -> bool:
        """Whether the layer is as wide as those of language models."""
        return self.shape.d_model >= 512


TRAFFIC_SHAPES = (
    Shape(64, 65, 64, 128, 4, 1, 5),
    Shape(32, 64, 128, 256, 8, 2, 4),
    Shape(96, 66, 256, 512, 8, 1, 3),
    # Of the same kind: other widths, expert counts, top-k and segment sizes.
    Shape(64, 64, 64, 128, 16, 3, 8),
    Shape(48, 63, 64, 128, 8, 2, 3),
    Shape(40, 64, 96, 192, 12, 1, 2),
    Shape(32, 96, 128, 256, 16, 1, 6),
    Shape(24, 70, 192, 384, 4, 2, 7),
    Shape(16, 128, 256, 512, 16, 3, 1),
)

_CODE = "evortigosa/segmoe_forecast"
_WEATHER_SMALL = f"{_CODE}: Small, Weather, batch 256 x 21 channels, 512 / 8 = 64 patches"
_WEATHER_BASE = f"{_CODE}: Base, Weather, batch 192 x 21 channels, 64 patches"
_ECL_BASE = f"{_CODE}: Base, ECL script, batch 14 x 321 channels, 64 patches"
_ETT_SMALL = f"{_CODE}: Small, command-line defaults, batch 128 x 7 channels, 64 patches"
_ETT_TINY = f"{_CODE}: Tiny; batch 128 x 7 channels is assumed"
_TRAFFIC_BASE = f"{_CODE}: Base; batch 8 x 862 channels is assumed"


def _paper() -> tuple[Workload, ...]:
    small, base = (128, 256, 4, 1), (256, 512, 8, 1)
    found = [
        Workload(f"weather-small-p{p}", Shape(5376, 64, *small, p), _WEATHER_SMALL) for p in (3, 5)
    ]
    found += [
        Workload(f"weather-base-p{p}", Shape(4032, 64, *base, p), _WEATHER_BASE) for p in (3, 4, 5)
    ]
    found += [Workload(f"ecl-base-p{p}", Shape(4494, 64, *base, p), _ECL_BASE) for p in (3, 4, 5)]
    found += [Workload(f"ett-small-p{p}", Shape(896, 64, *small, p), _ETT_SMALL) for p in (3, 5)]
    found += [
        Workload("ett-tiny-p5", Shape(896, 64, 64, 128, 4, 1, 5), _ETT_TINY),
        Workload("traffic-base-p5", Shape(6896, 64, *base, 5), _TRAFFIC_BASE),
        Workload("serve-weather-p5", Shape(21, 64, *base, 5), "one window of weather-base-p5"),
        Workload("serve-ett-p5", Shape(7, 64, *small, 5), "one window of ett-small-p5"),
        Workload("serve-traffic-p5", Shape(862, 64, *base, 5), "one window of traffic-base-p5"),
        Workload(
            "stress-k2-p5", Shape(4032, 64, 256, 512, 8, 2, 5), "weather-base-p5 with top_k = 2"
        ),
    ]
    return tuple(found)


_SIZES = re.compile(r"(\d+)-(\d+)-(\d+)-(\d+)-([\d.e]+)")


def _from_sizes(name: str) -> Workload:
    """Read D-E-k-P-rows."""
    sizes = _SIZES.fullmatch(name)
    d, e, k, p = map(int, sizes.groups()[:4])
    shape = Shape(max(1, round(float(sizes[5]) / 60)), 60, d, 2 * d, e, k, p)
    return Workload(name, shape, "no run of its own: D-E-k-P-rows, F = 2 D")


_GRID = tuple(
    _from_sizes(name)
    for name in (
        *(
            f"{d}-{e}-{k}-5-{rows}"
            for d in (64, 128, 256)
            for e, k in ((4, 1), (8, 1), (8, 2))
            for rows in ("1e4", "1e5", "1e6")
        ),
        *(f"{d}-{e}-2-{p}-1e5" for d in (64, 128, 256) for e, p in ((4, 3), (8, 4))),
    )
)

_GATED = {"activation": "silu", "gated": True}
_QWEN3 = "Qwen3-30B-A3B: hidden 2048, experts 128 x 768, top 8"
_LLM = (
    Workload("qwen3-8k", Shape(1, 8192, 2048, 768, 128, 8, 1), f"{_QWEN3}; 8,192 tokens", **_GATED),
    Workload(
        "qwen3-32k", Shape(4, 8192, 2048, 768, 128, 8, 1), f"{_QWEN3}; 32,768 tokens", **_GATED
    ),
    Workload(
        "olmoe-16k",
        Shape(4, 4096, 2048, 1024, 64, 8, 1),
        "OLMoE-1B-7B, arXiv 2409.02060: hidden 2048, experts 64 x 1024, top 8; 16,384 tokens",
        **_GATED,
    ),
    Workload(
        "mixtral-8k",
        Shape(2, 4096, 4096, 14336, 8, 2, 1),
        "Mixtral 8x7B, arXiv 2401.04088: hidden 4096, experts 8 x 14336, top 2; 8,192 tokens",
        **_GATED,
    ),
    Workload(
        "d1024-16k",
        Shape(4, 4096, 1024, 1024, 32, 4, 1),
        "no model: a width between the paper's and those of language models; 16,384 tokens",
        **_GATED,
    ),
)

# Widths, experts and segment sizes of the layers as in examples/studies/cost.py.
_OFFICIAL = tuple(
    Workload(f"official-{name}-p{p}", Shape(batch, 64, d, 2 * d, e, 1, p), f"{_CODE}: {name}")
    for name, batch, d, e, segment_sizes in (
        ("tiny", 64, 64, 4, (3, 5)),
        ("small", 64, 128, 4, (3, 5)),
        ("base", 32, 256, 8, (3, 4, 5)),
    )
    for p in segment_sizes
)

_TINY = (
    Workload("tiny", Shape(3, 17, 16, 32, 4, 1, 5), "none: exercises the measurements"),
    Workload("tiny-k2", Shape(2, 16, 16, 32, 4, 2, 3), "none: exercises the measurements"),
    Workload(
        "tiny-gated", Shape(2, 16, 16, 32, 4, 2, 1), "none: exercises the measurements", **_GATED
    ),
)

_TRAFFIC = tuple(
    Workload(f"traffic-{shape}", shape, "small enough for Triton's interpreter")
    for shape in TRAFFIC_SHAPES
)

_HEADLINE_NAMES = (
    "64-4-1-5-1e4",
    "64-4-1-5-1e6",
    "128-4-1-5-1e5",
    "weather-small-p5",
    "128-8-2-5-1e6",
    "256-4-1-5-1e5",
    "weather-base-p4",
)

GROUPS: dict[str, tuple[Workload, ...]] = {
    "traffic": _TRAFFIC,
    "paper": _paper(),
    "grid": _GRID,
    "llm": _LLM,
    "official": _OFFICIAL,
    "tiny": _TINY,
}
_BY_NAME = {workload.name: workload for group in GROUPS.values() for workload in group}
GROUPS["headline"] = tuple(_BY_NAME[name] for name in _HEADLINE_NAMES)


def find_workloads(names: str) -> list[Workload]:
    """Look up groups and single workloads.

    Args:
        names: of groups or workloads, or D-E-k-P-rows, separated by commas.

    Returns:
        Each once, in the order asked for.

    Raises:
        ValueError: for an unknown name.
    """
    found: dict[str, Workload] = {}
    for name in names.split(","):
        if _SIZES.fullmatch(name):
            found[name] = _from_sizes(name)
            continue
        if name not in GROUPS and name not in _BY_NAME:
            raise ValueError(
                f"--shapes must name groups ({', '.join(GROUPS)}) or shapes of them, got {name!r}"
            )
        members = GROUPS[name] if name in GROUPS else (_BY_NAME[name],)
        found.update({workload.name: workload for workload in members})
    return list(found.values())
