"""Random layers: shapes, options, dtypes, strides, masks and skews, both backends against float64.

    make fuzz                              5,000 of them; writes tests/reports/fuzz.json and .md
    python tests/fuzz.py --examples 200
    python tests/fuzz.py --page            writes the page alone, which says what has changed since

A float64 layer has to equal the reference; the others are held to the error of plain PyTorch.
`tests/test_fuzz.py` runs 100 in every `make test`.
"""

import argparse
import collections
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

# Before triton is imported for the first time, here and in the processes of `main`.
if __name__ in {"__main__", "__mp_main__"}:
    os.environ["TRITON_INTERPRET"] = "1"

import report_code
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from segmoe_kernels import SegMoE
from segmoe_kernels.testing import compare, oracle, route_ids, run_layer

REPORTS = Path(__file__).parent / "reports"
DTYPES = ("float64", "float32", "float16", "bfloat16")
LAYOUTS = ("contiguous", "every other", "transposed", "sliced", "expanded")
# Examples of one part: a failure ends its part.
PART = 100
ROUTINGS = ("spread", "one expert", "ties", "sharp")


@st.composite
def examples(draw):
    """One layer and its inputs, as plain numbers and names that say all of it."""
    scope = draw(st.sampled_from(("token", "token", "segment", "projected")))
    num_experts = draw(st.sampled_from((1, 2, 3, 4, 8, 17)))
    shared = draw(st.sampled_from(("segment", "token", None)))
    causal = draw(st.booleans()) and scope == "token" and shared != "segment"
    pooling = draw(st.sampled_from(("concat", "mean", "max", "first", "last")))
    dtype = draw(st.sampled_from(DTYPES))
    # Where few numbers make a tensor eager may have them right by chance; so it may the side of
    # relu's kink on which a number falls that rounding moves across.
    hidden = (1, 5, 16, 24, 40) if dtype == "float64" else (5, 16, 24, 40)
    width = (1, 3, 8, 16, 20, 33) if dtype == "float64" else (8, 16, 20, 33)
    smooth = ("gelu", "gelu_tanh", "silu")
    # A gate that large inputs close scales all gradients of its expert by one number, as well.
    scales = (1.0, 1.0, 1e-3) + ((30.0,) if dtype == "float64" or not shared else ())
    return {
        "batch": draw(st.integers(0, 3)),
        "steps": draw(st.sampled_from((0, 1, 2, 3, 7, 16, 33))),
        "d_model": draw(st.sampled_from(width)),
        "d_ff": draw(st.sampled_from(hidden)),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, min(num_experts, 4))),
        "segment_size": draw(st.integers(1, 9)),
        "pooling": "concat" if scope == "projected" else pooling,
        "expert_scope": scope,
        "shared_expert": shared,
        "shared_d_ff": draw(st.sampled_from((None, 7))) if shared else None,
        "activation": draw(st.sampled_from((*smooth, "relu") if dtype == "float64" else smooth)),
        "gated": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "causal": causal,
        "renormalize": draw(st.sampled_from((None, True, False))),
        "router_temperature": draw(st.sampled_from((1.0, 0.5, 3.0))),
        "dtype": dtype,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "routing": draw(st.sampled_from(ROUTINGS)),
        "masked": draw(st.sampled_from((None, 0.3, 1.0))),
        "scale": draw(st.sampled_from(scales)),
        "frozen": draw(st.sampled_from((None, "experts", "router", "x"))),
        "seed": draw(st.integers(0, 2**16)),
    }


NOT_OPTIONS = {
    "batch", "steps", "dtype", "layout", "routing", "masked", "scale", "frozen", "seed",
}  # fmt: skip


def lay_out(x, layout):
    """The same numbers in other strides (expanded: the first sequence for all)."""
    if layout == "every other":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "transposed":
        return x.transpose(0, 2).contiguous().transpose(0, 2)
    if layout == "sliced":
        long = torch.full((x.shape[0], x.shape[1] + 3, x.shape[2]), torch.nan, dtype=x.dtype)
        long[:, 1:-2] = x
        return long[:, 1:-2]
    if layout == "expanded" and x.shape[0]:
        return x[:1].expand_as(x)
    return x


def build(example, device="cpu"):
    """``(layer, x, dy, mask)`` of an example."""
    generator = torch.Generator().manual_seed(example["seed"])
    dtype = getattr(torch, example["dtype"])
    options = {name: value for name, value in example.items() if name not in NOT_OPTIONS}
    torch.manual_seed(example["seed"])
    layer = SegMoE(**options, backend="triton", dtype=dtype, device=device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name or "start" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        weight = layer.router.weight
        if example["routing"] == "one expert":
            # A logit of large products may be a small difference of them, which eager may have
            # right by chance; float64 has a tolerance for it.
            weight[0] *= 20 if dtype == torch.float64 else 4
        elif example["routing"] == "ties":
            weight.zero_()  # equal rows would give equal logits only up to their rounding
        elif example["routing"] == "sharp":
            weight *= 10
        if example["frozen"] in {"experts", "router"}:
            getattr(layer, example["frozen"]).requires_grad_(False)
    shape = (example["batch"], example["steps"], example["d_model"])
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = lay_out((x * example["scale"]).to(dtype), example["layout"]).to(device)
    dy = lay_out(dy.to(dtype), example["layout"]).to(device)
    mask = None
    if example["masked"] is not None:
        mask = (torch.rand(shape[:2], generator=generator) >= example["masked"]).to(device)
    return layer, x, dy, mask


def check(example, device="cpu"):
    """Require both backends to agree with float64, forward and backward."""
    layer, x, dy, mask = build(example, device)
    before = x.clone()
    actual = run_layer(layer, x, dy, mask)
    if example["dtype"] == "float64":
        expected = run_layer(layer, x, dy, mask, backend="reference")
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            size = max(1.0, value.abs().max().item()) if value.numel() else 1.0
            error = (actual[name] - value).abs().max().item() if value.numel() else 0.0
            assert error <= 1e-11 * size, f"{name}: {error:.2e} of {size:.2e}"
    else:
        ids = route_ids(layer, x, dy, mask)
        eager = run_layer(layer, x, dy, mask, backend="reference", topk_ids=ids)
        exact = oracle(layer, x, dy, mask, topk_ids=ids)
        _check_accuracy(actual, eager, exact, x, dy, example["segment_size"])
    assert torch.equal(x, before), "x was changed"
    if mask is not None:
        assert not actual["y"][~mask].any()
        assert not actual["dx"][~mask].any()


def _check_accuracy(actual, eager, exact, x, dy, segment_size):
    """Hold errors to a few times eager's: the budget proper, of many numbers, is `accuracy`'s.

    Where few numbers make a tensor eager may be right by chance, so some roundings are free: of the
    tensor's own size, and for the router and the shared gate, whose gradients may be differences of
    large sums, of the size of these.
    """
    assert actual.keys() == eager.keys() == exact.keys()
    eps = torch.finfo(x.dtype).eps
    summed = (
        (rms(x) + 1e-30) * rms(dy) * (1 + rms(exact["y"])) * math.sqrt(x.numel() * segment_size)
    )
    faults = []
    for name, value in exact.items():
        assert actual[name].dtype == eager[name].dtype
        found = compare(actual[name], eager[name], value)
        routed = summed if "router" in name or "gate.weight" in name else 0.0
        free = 4 * eps * max(rms(value), routed)
        free_max = 4 * eps * max(value.abs().max().item() if value.numel() else 0.0, routed)
        if not (
            found.rms <= 4 * found.eager_rms + free and found.max <= 8 * found.eager_max + free_max
        ):
            faults.append(f"{name}: {found}")
    assert not faults, faults


def rms(x):
    """Root mean square of a tensor's elements, 0 of none."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def run(count, seen, part=0):
    """Check ``count`` examples; what is drawn is added to the Counter ``seen``.

    The same ``part`` always draws the same examples, another one others.
    """

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        # A failing example says all of itself; to shrink one takes the interpreter many minutes.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @seed(part)
    @given(examples())
    def checked(example):
        for name in ("dtype", "expert_scope", "routing", "layout", "pooling"):
            seen[f"{name}: {example[name]}"] += 1
        seen["examples"] += 1
        check(example)

    checked()


def _run_part(part):
    """One part in a process of its own: ``(what was drawn, failure or None)``."""
    import interp_bf16
    import interp_releases

    interp_releases.install()
    interp_bf16.install()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN, too
    seen = collections.Counter()
    try:
        run(PART, seen, part)
    except AssertionError as error:
        return seen, f"part {part}: {error} {' '.join(getattr(error, '__notes__', []))}"
    return seen, None


def render(report):
    """The report as text."""
    seen = report["seen"]
    lines = [
        "# Fuzz",
        "",
        f"Written by `make fuzz` with {report['versions']}, the kernels in Triton's interpreter.",
        f"{seen['examples']} random layers, forward and backward on both backends against float64;",
        f"{len(report['failures'])} failed.",
        "",
        report_code.describe(report),
        "",
        *(f"* {failure}" for failure in report["failures"]),
        "",
        "| drawn | examples |",
        "|---|---:|",
        *(f"| {name} | {seen[name]} |" for name in sorted(seen) if name != "examples"),
    ]
    return "\n".join(lines) + "\n"


def write(report):
    """Write the report's two files."""
    report_code.save(REPORTS / "fuzz.json", report)
    (REPORTS / "fuzz.md").write_text(render(report), encoding="utf-8")


def main():
    """Run many examples and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    if arguments.page:
        write(json.loads((REPORTS / "fuzz.json").read_text(encoding="utf-8")))
        return 0
    import triton

    versions = f"torch {torch.__version__.partition('+')[0]} and triton {triton.__version__}"
    seen, failures, start = collections.Counter(), [], time.monotonic()
    code = report_code.digests()
    # Beyond those that the tests run.
    parts = range(1000, 1000 + -(-arguments.examples // PART))
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for drawn, failure in pool.imap(_run_part, parts):
            seen += drawn
            failures += [failure] if failure else []
            print(f"{seen['examples']} examples, {len(failures)} failures", flush=True)  # noqa: T201
            if failure:
                print(failure, flush=True)  # noqa: T201
    print(f"{time.monotonic() - start:.0f} s")  # noqa: T201
    write({"versions": versions, "code": code, "failures": failures, "seen": dict(seen)})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
