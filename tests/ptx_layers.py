"""Layers of every kind under the emulator of `ptx`: values, choices, races, stray accesses.

    make ptx                                     all, on both architectures; writes the report
    python tests/ptx_layers.py --only TEXT       those whose name has the text
    python tests/ptx_layers.py --core sm_90      the few of a test; prints JSON

A row whose kernels have not changed since keeps its result, so a run can be stopped and goes on.
Exit status 1 if a layer has a finding, or is less accurate than `segmoe_kernels.testing` allows.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import report_code

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
REPORT = HERE / "reports" / "ptx.json"
ARCHS = ("sm_80", "sm_90")
ALONE = {"shared_expert": None}
# For speed; where a gradient is of too few numbers to compare errors, more steps are needed.
SHORT = {"shared_expert": None, "shape": (1, 23)}
MANY = {"gated": True, "bias": True, "activation": "silu", "top_k": 2, "masked": 0.3}
# Name -> options of the layer, and: dtype, shape (batch, steps), masked, tf32,
# layout, order (a seed: run again in another order of warps and blocks).
LAYERS = {
    "fp32": {"dtype": "float32", **ALONE},
    "fp32 many options": {"dtype": "float32", **MANY, **ALONE},
    "fp32 top_k=2": {"dtype": "float32", "top_k": 2, **ALONE},
    "fp32 TF32": {"dtype": "float32", "tf32": True, **ALONE},
    "fp32 TF32 many options": {"dtype": "float32", "tf32": True, **MANY, **ALONE},
    "fp32 P=1 D=16 relu": {
        "dtype": "float32", "segment_size": 1, "d_model": 16, "activation": "relu", **SHORT,
    },
    "fp32 P=3 D=33 F=65 gated": {
        "dtype": "float32", "segment_size": 3, "d_model": 33, "d_ff": 65, "gated": True,
        "activation": "gelu_tanh", **SHORT,
    },
    "fp32 P=3 D=20 max causal masked": {
        "dtype": "float32", "segment_size": 3, "d_model": 20, "pooling": "max", "causal": True,
        "masked": 0.3, **ALONE, "shape": (8, 11),
    },
    "fp32 P=1 top_k=E D=40": {
        "dtype": "float32", "segment_size": 1, "d_model": 40, "num_experts": 3, "top_k": 3,
        **SHORT,
    },
    "fp32 D=260 F=40 many options": {
        "dtype": "float32", "d_model": 260, "d_ff": 40, "pooling": "mean", **MANY, **ALONE,
        "top_k": 1, "shape": (1, 37), "order": 6,
    },
    "fp32 TF32 D=512 many options": {
        "dtype": "float32", "tf32": True, "d_model": 512, "d_ff": 40, "pooling": "first", **MANY,
        **ALONE, "num_experts": 2, "shape": (1, 17),
    },
    "fp32 TF32 P=1 top_k=E": {
        "dtype": "float32", "tf32": True, "segment_size": 1, "num_experts": 2, "top_k": 2, **SHORT,
    },
    "fp32 dropout": {
        "dtype": "float32", "dropout": 0.2, "router_dropout": 0.1, **MANY, **SHORT,
    },
    "fp16 top_k=2": {"dtype": "float16", "top_k": 2, **ALONE},
    "fp16 many options": {"dtype": "float16", **MANY, **SHORT},
    "fp16 D=33 F=65 P=3 top_k=E": {
        "dtype": "float16", "d_model": 33, "d_ff": 65, "segment_size": 3, "top_k": 4, "bias": True,
        **SHORT,
    },
    "fp16 P=1 first": {
        "dtype": "float16", "segment_size": 1, "pooling": "first", **SHORT,
    },
    "fp16 D=272": {
        "dtype": "float16", "d_model": 272, "pooling": "last", "num_experts": 1, **ALONE,
        "d_ff": 64, "shape": (1, 70), "order": 7,
    },
    "fp16 whole segments dropout": {
        "dtype": "float16", "dropout": 0.2, "expert_scope": "segment", "segment_size": 3,
        "d_model": 32, **MANY, **SHORT,
    },
    "fp16 shared dropout": {
        "dtype": "float16", "segment_size": 3, "dropout": 0.2, **MANY,
        "shape": (1, 23),
    },
    "fp16 sliced": {"dtype": "float16", "layout": "sliced", "masked": 0.3, **SHORT},
    "fp64": {"dtype": "float64", "d_model": 16, "shape": (1, 23), **ALONE},
    "fp64 many options": {
        "dtype": "float64", "d_model": 16, "segment_size": 3, **MANY, **SHORT, "order": 8,
    },
    "fp64 P=1 top_k=E ties": {
        "dtype": "float64", "d_model": 16, "segment_size": 1, "top_k": 4, "ties": True,
        **SHORT,
    },
    "fp64 D=17 max causal masked": {
        "dtype": "float64", "d_model": 17, "d_ff": 19, "pooling": "max", "causal": True,
        "masked": 0.3, **SHORT,
    },
    "fp64 D=257 F=20 dropout": {
        "dtype": "float64", "d_model": 257, "d_ff": 20, "pooling": "mean", "dropout": 0.2, **MANY,
        **ALONE, "num_experts": 2, "shape": (1, 8),
    },
    "fp64 whole segments": {
        "dtype": "float64", "expert_scope": "segment", "segment_size": 3, "d_model": 8, **SHORT,
    },
    "fp64 shared dropout": {
        "dtype": "float64", "segment_size": 3, "d_model": 16, "dropout": 0.2,
        **MANY, "shape": (1, 23),
    },
    "fp64 unaligned": {"dtype": "float64", "d_model": 16, "layout": "unaligned", **SHORT},
    "bf16": ALONE,
    "bf16 top_k=E": {"top_k": 4, **ALONE},
    "bf16 many options": {**MANY, **ALONE},
    "bf16 P=1": {"segment_size": 1, **ALONE},
    "bf16 P=3": {"segment_size": 3, **ALONE},
    "bf16 D=16": {"d_model": 16, **ALONE},
    "bf16 D=33 F=65": {"d_model": 33, "d_ff": 65, **ALONE},
    "bf16 gated": {"gated": True, **SHORT},
    "bf16 biased": {"bias": True, **SHORT},
    "bf16 D=128": {"d_model": 128, "num_experts": 2, "shape": (1, 150), **ALONE},
    "bf16 D=256": {"d_model": 256, **ALONE},
    # Weight gradients from copies of x and dy in sorted order.
    "bf16 D=272 P=1": {"d_model": 272, "d_ff": 64, "segment_size": 1, "order": 8, **SHORT},
    "bf16 D=512 many options": {"d_model": 512, "d_ff": 128, **MANY, **ALONE},
    "bf16 D=512 gated": {
        "d_model": 512, "d_ff": 64, "gated": True, "pooling": "mean", "num_experts": 1, **ALONE,
        "shape": (1, 70), "order": 9,
    },
    # Tiles that registers and wgmma read, in loops of several steps: see `ptx_faults.pipelined`.
    "bf16 wide rows biased": {
        "expert_scope": "segment", "segment_size": 3, "d_ff": 32, "bias": True, "num_experts": 1,
        **ALONE, "shape": (1, 197),
    },
    "bf16 causal": {"causal": True, "masked": 0.3, **SHORT},
    "bf16 mean causal": {"pooling": "mean", "causal": True, **ALONE},
    "bf16 max masked": {"pooling": "max", "masked": 0.3, **ALONE},
    "bf16 first": {"pooling": "first", **ALONE},
    "bf16 last causal": {"pooling": "last", "causal": True, **ALONE},
    "bf16 mean masked": {"pooling": "mean", "masked": 0.3, **SHORT},
    "bf16 dropout": {"dropout": 0.2, "router_dropout": 0.1, **ALONE},
    "bf16 dropout D=33 F=65": {
        "d_model": 33, "d_ff": 65, "dropout": 0.2, "router_dropout": 0.4, **MANY, **SHORT,
    },
    "bf16 dropout D=272": {
        "d_model": 272, "d_ff": 64, "dropout": 0.2, "pooling": "mean", **MANY, **SHORT,
    },
    "bf16 losses, temperature": {
        "aux_loss_weight": 0.1, "z_loss_weight": 0.1, "router_temperature": 0.5,
        "renormalize": True, **SHORT,
    },
    "fp32 losses, temperature": {
        "dtype": "float32", "aux_loss_weight": 0.1, "z_loss_weight": 0.1,
        "router_temperature": 0.5, "renormalize": False, "top_k": 2, **SHORT,
    },
    "bf16 shared many options": {"segment_size": 3, **MANY},
    "bf16 shared token": {"shared_expert": "token", "segment_size": 3},
    "bf16 whole segments": {"expert_scope": "segment", "segment_size": 3, "d_model": 32, **ALONE},
    "bf16 projected": {"expert_scope": "projected", "segment_size": 3, "masked": 0.3, **SHORT},
    "bf16 unaligned": {"layout": "unaligned", **ALONE},
    "bf16 sliced": {"layout": "sliced", **ALONE},
    "bf16 ties": {"num_experts": 7, "top_k": 3, "ties": True, **ALONE},
    "fp32 ties": {"dtype": "float32", "top_k": 2, "ties": True, **ALONE},
    "bf16 one segment": {"shape": (1, 4), **ALONE},
    "fp64 one segment": {
        "dtype": "float64", "d_model": 16, **ALONE, "shape": (1, 4),
    },
    "bf16 all padding": {"masked": 1.0, **SHORT},
    "fp32 unaligned": {"dtype": "float32", "layout": "unaligned", **ALONE},
    "bf16 E=20 top_k=4": {"num_experts": 20, "top_k": 4, "shape": (1, 13), **ALONE},
    "stages alone": {},
    "fp16 other orders": {"dtype": "float16", "order": 1, **ALONE},
    "fp32 other orders": {"dtype": "float32", "order": 2, **ALONE},
    "bf16 top_k=2 other orders": {"top_k": 2, "masked": 0.3, "order": 3, **ALONE},
    "bf16 other orders": {"order": 4, **ALONE},
}  # fmt: skip
CORE = ("fp32 top_k=2", "bf16 top_k=2 other orders", "bf16 wide rows biased", "bf16 causal")
# The rest of a layer's settings; not options of it.
CALLS = {"dtype", "shape", "masked", "tf32", "layout", "ties", "order"}


def build(options):
    """``(layer, x, dy, mask)`` of a layer of the list."""
    import torch

    from segmoe_kernels import SegMoE
    from segmoe_kernels.testing import make_inputs

    settings = {"d_model": 64, "num_experts": 4, "segment_size": 5}
    settings |= {name: value for name, value in options.items() if name not in CALLS}
    settings.setdefault("d_ff", 2 * settings["d_model"])
    dtype = getattr(torch, options.get("dtype", "bfloat16"))
    torch.manual_seed(0)
    layer = SegMoE(**settings, dtype=dtype, backend="triton")
    with torch.no_grad():
        if options.get("ties"):  # rows in pairs: every logit twice
            layer.router.weight[:] = layer.router.weight[torch.arange(layer.num_experts) // 2]
        for name, parameter in layer.named_parameters():
            if "bias" in name:  # else they are 0
                parameter.normal_()
    shape = (*options.get("shape", (2, 37)), layer.d_model)
    x, dy, mask = make_inputs(*shape, dtype=dtype, masked=options.get("masked", 0.0))
    if options.get("layout") == "unaligned":
        x = torch.zeros(x.numel() + 1, dtype=dtype)[1:].view(shape).copy_(x)
    elif options.get("layout") == "sliced":
        x = torch.zeros(shape[0], shape[1] + 3, shape[2] + 8, dtype=dtype)[:, 2:-1, 3:-5].copy_(x)
    return layer, x, dy, mask


def run_once(layer, x, dy, mask):
    """Forward and backward: results by name, and the choices."""
    import torch

    torch.manual_seed(1)
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y, routing = layer.forward_with_routing(x, mask)
    y.backward(dy)
    results = {"y": y.detach(), "dx": x.grad}
    results |= {f"d{n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {name: value.clone() for name, value in results.items()}, routing.topk_ids


def run_stages():
    """What a layer leaves out, since a neighbour does the work of it."""
    import torch

    from segmoe_kernels import functional

    ids = torch.randint(-1, 4, (1025 * 32, 1), dtype=torch.int32)
    found = functional.permute(ids, 4, backend="triton")
    exact = functional.permute(ids, 4, backend="reference")
    parts = torch.randn(2, 3, 41, 40, requires_grad=True)
    shared = torch.randn(3, 14, 120, requires_grad=True)
    logits = torch.randn(3, 14, requires_grad=True)
    mask = torch.rand(3, 41) < 0.8
    dy = torch.randn(3, 41, 40)
    results = []
    for backend, dtype in (("triton", None), ("reference", None), ("reference", torch.float64)):
        given = [t.detach().to(dtype).requires_grad_() for t in (parts, shared, logits)]
        y = functional.combine(*given, padding_mask=mask, backend=backend)
        y.backward(dy.to(y.dtype))
        results.append({"y": y.detach()} | {str(k): t.grad for k, t in enumerate(given)})
    same = all(torch.equal(value, getattr(found, name)) for name, value in exact._asdict().items())
    return results, same


def share_of_limit(actual, eager, exact):
    """The worst error over its limit: over 1 is too large. NaN is infinite."""
    import torch

    from segmoe_kernels.testing import compare

    worst = 0.0
    for name, value in exact.items():
        found = compare(actual[name], eager[name], value)
        if value.numel() and actual[name].dtype == torch.float64:  # where eager has no error
            shares = [found.max / (1e-11 * max(1.0, value.abs().max().item()))]
        else:
            tiny = sys.float_info.min
            shares = [found.rms / (found.rms_limit + tiny), found.max / (found.max_limit + tiny)]
        worst = max([worst, *(share if share == share else float("inf") for share in shares)])  # noqa: PLR0124
    return worst


def measure(name, arch, order=None, *, options=None, execute=None):
    """A row of the report.

    Args:
        name: of a layer.
        arch: "sm_80" or "sm_90".
        order: a seed: the layer must give the same bits in another order of warps and blocks.
        options: of the layer; None looks in LAYERS.
        execute: what runs the launches in place of `ptx.harness.emulated`.
    """
    import torch
    from ptx.harness import emulated
    from ptx_dropout import dropout_of_the_kernels

    from segmoe_kernels.testing import run_layer

    options, launches, again = LAYERS[name] if options is None else options, [], []
    execute = execute or emulated
    begin = time.process_time()
    repeats = None
    torch.backends.cuda.matmul.allow_tf32 = bool(options.get("tf32"))
    if not options:
        with execute(arch, launches):
            results, same_ids = run_stages()
        share = share_of_limit(*results)
    else:
        layer, x, dy, mask = build(options)
        with execute(arch, launches):
            actual, ids = run_once(layer, x, dy, mask)
        if order is not None:
            with emulated(arch, again, order=order, races=False):
                other, _ = run_once(layer, x, dy, mask)
            repeats = all(torch.equal(actual[key], other[key]) for key in actual)
        layer.backend = "reference"
        # TF32 cuts off what float16 would round.
        expected = []
        for dtype in (torch.bfloat16 if options.get("tf32") else None, torch.float64):
            with dropout_of_the_kernels(layer, ids):
                expected.append(run_layer(layer, x, dy, mask, topk_ids=ids, dtype=dtype))
        share = share_of_limit(actual, *expected)
        with dropout_of_the_kernels(layer, ids), torch.no_grad():
            same_ids = torch.equal(layer.forward_with_routing(x, mask)[1].topk_ids, ids)
    return {
        "layer": name,
        "arch": arch,
        "kernels": sorted({launch.kernel for launch in launches}),
        "launches": len(launches),
        "share": round(share, 3),
        "ids": same_ids,
        "repeats": repeats,
        "findings": list(dict.fromkeys(f for launch in launches + again for f in launch.findings)),
        "seconds": round(time.process_time() - begin, 1),
    }


def is_fault(row):
    """Whether a row says that something is wrong."""
    wrong = not row["share"] <= 1 or not row["ids"] or row["repeats"] is False
    return bool(row["findings"] or wrong)


def render(rows):
    """The report as Markdown."""
    digests = {k: v for row in rows for k, v in row["digests"].items()}
    yes = {True: "yes", False: "NO", None: ""}
    lines = [
        "# Compiled kernels, executed",
        "",
        "Written by `make ptx`: whole layers, forward and backward, through the real launchers;",
        "the PTX that Triton emits for each architecture is executed by the emulator in",
        "`tests/ptx/`. What that can and can't show: [trust](../../docs/trust.md).",
        "",
        f"**{len(rows)}** runs with {sum(row['launches'] for row in rows)} launches of "
        f"{len(digests)} kernels; {sum(map(is_fault, rows))} with a fault.",
        "",
        "`error` is the worst of all outputs and gradients, as a share of what",
        "`segmoe_kernels.testing` allows (float64: of 1e-11; TF32: of what bfloat16 is allowed).",
        "`ids`: all choices are the reference's. `repeats`: the same bits when each warp runs",
        "alone until its barrier, warps and blocks in random order. A finding is a race, an access",
        "that is misaligned, outside its tensor, or of what nobody wrote, or an asynchronous copy",
        "or product that was not waited for. For dropout PyTorch is given the kernels' numbers, by",
        "their formula.",
        "",
        "| layer | arch | launches | error | ids | repeats | findings | seconds |",
        "|---|---|---:|---:|---|---|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['layer']} | {row['arch']} | {row['launches']} | {row['share']:.2f} | "
            f"{yes[row['ids']]} | {yes[row['repeats']]} | {len(row['findings'])} | "
            f"{row['seconds']:.0f} |"
        )
    lines += ["", "| kernel | runs | digest of its source |", "|---|---:|---|"]
    for kernel, digest in sorted(digests.items()):
        runs = sum(kernel in row["kernels"] for row in rows)
        lines.append(f"| `{kernel}` | {runs} | {digest} |")
    return "\n".join(lines) + "\n"


def write(rows):
    """Write the report."""
    report_code.save(REPORT, rows)
    REPORT.with_suffix(".md").write_text(render(rows), encoding="utf-8")


def main():
    """Run the command line."""
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))
    from benchmarks.digests import kernel_digests

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--core", choices=ARCHS, help="print the rows of a test as JSON")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes at work at once"
    )
    arguments = parser.parse_args()
    # For processes of our own, too.
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if arguments.core:
        import ptx_faults
        import ptx_kernels

        rows = [measure(name, arguments.core) for name in CORE]
        planted = ptx_faults.plant_core(arguments.core)
        small = ptx_kernels.check(arguments.core)
        print(json.dumps({"rows": rows, "planted": planted, "small": small}))  # noqa: T201
        return 0
    digests = kernel_digests()
    old = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else []
    rows = {(row["layer"], row["arch"]): row for row in old}
    waiting = []
    for key in [(name, arch) for name in LAYERS for arch in ARCHS if arguments.only in name]:
        row = rows.get(key)
        current = row and row["settings"] == repr(LAYERS[key[0]]) and not is_fault(row)
        if not current or row["digests"] != {k: digests.get(k) for k in row["kernels"]}:
            waiting.append(key)
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(measure, *key, LAYERS[key[0]].get("order")) for key in waiting]
        for done in as_completed(running):
            row = done.result()
            row["settings"] = repr(LAYERS[row["layer"]])
            row["digests"] = {k: digests[k] for k in row["kernels"]}
            rows[row["layer"], row["arch"]] = row
            print({k: v for k, v in row.items() if k not in {"kernels", "digests"}}, flush=True)  # noqa: T201
            write([rows[name, arch] for name in LAYERS for arch in ARCHS if (name, arch) in rows])
    return int(any(map(is_fault, rows.values())))


if __name__ == "__main__":
    sys.exit(main())
