"""Layers executed as Triton's IR by the library `ttsem`: values, strays, races between programs.

`make ttsem` puts the library into build/ttsem, runs this and writes the report. The first fault of
a kernel ends the run with its line. Exit status 1 then, or if a layer is less accurate than
`segmoe_kernels.testing` allows or a planted fault isn't reported; 2 if there is no `ttsem`.
"""

import contextlib
import functools
import importlib.util
import math
import os
import re
import sys
from importlib.metadata import version
from unittest import mock

import ptx_layers
import report_code

REPORT = ptx_layers.HERE / "reports" / "ttsem.json"
ARCH = "sm_90"
# Many steps, unless a layer says its own: with one program in a launch there is nothing to race.
LAYERS = {
    name: {"shape": (3, 113), **options} if options else {}
    for name, options in ptx_layers.LAYERS.items()
    if "order" not in options
}
LAYERS["bf16 long"] = {
    "segment_size": 1,
    "shape": (4, 257),
    **ptx_layers.ALONE,
}
# Kind of report -> function of `route_kernels`, what is looked for there, what it becomes.
FAULTS = {
    "oob_read": ("load_steps", "mask=real[:, None] & (offs_d", "mask=(offs_d"),
    "oob_write": ("route_fwd_kernel", "probs, mask=mask_se", "probs, mask=mask_e[None, :]"),
    "race": (
        "route_fwd_kernel",
        "block_counts_ptr + pid.to(tl.int64) * (num_experts + 1)",
        "block_counts_ptr",
    ),
}


def extend_ttsem():
    """Fast division and fused products, larger launches, the lines of what is inlined."""
    import numpy as np
    from ptx import numerics
    from ttsem import harness, memory, mlir, ops, sanitize

    def divide(x, y):
        return np.where(np.abs(y) > 2.0**126, 0 * x, x / y).astype(x.dtype)

    def fma(interp, op, args):
        if args[0].dtype != np.float32:
            return exact(interp, op, args)
        with np.errstate(all="ignore"):
            return [numerics.fma(*np.broadcast_arrays(*args))]

    exact, ops.OPS["math.fma"] = ops.OPS["math.fma"], fma  # by fractions, one by one: minutes
    ops._EXTERN["__nv_fast_fdividef"] = (2, divide)
    memory.ACCESS_BUDGET = 20_000_000  # of a launch; beyond, races aren't looked for
    mlir.enable_generic_printing()
    # Compiled no further than what is executed.
    harness.ir_for_launch = lambda record, stage, target: mlir.to_generic(
        harness._stage_text(record, stage, target), None
    )
    source = sanitize._source_of
    sanitize._source_of = lambda op, *rest: source(op.replace("callsite(", ""), *rest)


@contextlib.contextmanager
def executed(arch, launches, programs):
    """`ptx.harness.emulated` by ttsem, which raises; ``programs``: the most of each kernel."""
    from ptx.harness import Launched
    from ttsem import harness, sanitize

    from benchmarks.codegen import pretend_triton_runs

    execute = harness.execute

    def note(record, *args, **options):
        launches.append(Launched(record.fn_name, []))
        programs[record.fn_name] = max(programs.get(record.fn_name, 0), math.prod(record.grid))
        return execute(record, *args, **options)

    def unchecked():
        launches[-1].findings.append("too large to look for races")

    with (
        mock.patch.object(harness, "execute", note),
        sanitize.session(int(arch[3:]), cuda_is_cpu=False, on_unchecked=unchecked),
        pretend_triton_runs(arch),
    ):
        yield


def plant(kind):
    """Plant a fault in the router and run a layer: the kind and text of the report."""
    from ttsem import sanitize

    from segmoe_kernels.stages.route import kernels as route_kernels

    function, old, new = FAULTS[kind]
    found = getattr(route_kernels, function)
    assert found.src.count(old) == 1
    layer, x, _, mask = ptx_layers.build(LAYERS["fp32 top_k=2"])
    with mock.patch.object(found, "_src", found.src.replace(old, new)):
        try:
            with executed(ARCH, [], {}):
                layer(x, mask)
        except sanitize.KernelFault as error:
            return error.fault.kind, str(error)
    return "", ""


def render(report):
    """The report as Markdown."""
    rows, digests = report["layers"], report["digests"]
    versions = ", ".join(f"{name} {text}" for name, text in report["versions"].items())
    lines = [
        "# Kernels executed as Triton's IR",
        "",
        f"Written by `make ttsem` with {versions}.",
        "Whole layers, forward and backward, through the real launchers; the library executes the",
        "IR that Triton makes of a kernel and ends the run at the first access out of bounds and",
        "at the first race between programs. What nobody wrote is NaN. What that can and can't",
        "show: [trust](../../docs/trust.md).",
        "",
        f"**{len(rows)}** runs with {sum(row['launches'] for row in rows)} launches of "
        f"{len(digests)} kernels; {sum(map(ptx_layers.is_fault, rows))} with a fault.",
        "",
        "`error` is the worst of all outputs and gradients, as a share of what",
        "`segmoe_kernels.testing` allows. All choices of experts are the reference's.",
        "",
        "| layer | launches | error | seconds |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.2f}"
        lines.append(f"| {row['layer']} | {row['launches']} | {share} | {row['seconds']:.0f} |")
    lines += ["", "| kernel | most programs | digest of its source |", "|---|---:|---|"]
    lines += [f"| `{k}` | {report['programs'][k]} | {digest} |" for k, digest in digests.items()]
    lines += ["", "Planted in the router:"]
    for kind, (function, old, new) in FAULTS.items():
        text = re.split(r" (?:A GPU run|Program instances run)", report["planted"][kind][1])[0]
        lines += ["", f"* `{old}` in `{function}` becomes `{new}`: {text}"]
    return "\n".join(lines) + "\n"


def main():
    """Run the layers, plant the faults, write the report."""
    if importlib.util.find_spec("ttsem") is None:
        print("ttsem isn't installed: `make ttsem` puts it into build/ttsem", file=sys.stderr)  # noqa: T201
        return 2
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ptx_layers.ROOT))
    import torch

    from benchmarks.digests import kernel_digests

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills with NaN what nobody wrote
    extend_ttsem()
    rows, programs = [], {}
    execute = functools.partial(executed, programs=programs)
    for name, options in LAYERS.items():
        rows.append(ptx_layers.measure(name, ARCH, options=options, execute=execute))
        print({k: v for k, v in rows[-1].items() if k != "kernels"}, flush=True)  # noqa: T201
    digests = kernel_digests()
    names = ("ttsem", "torch", "triton", "numpy")
    report = {
        "versions": {name: version(name).partition("+")[0] for name in names},
        "settings": repr(LAYERS),
        "layers": rows,
        "programs": programs,
        "digests": {name: digests[name] for name in sorted(programs)},
        "planted": {kind: plant(kind) for kind in FAULTS},
    }
    report_code.save(REPORT, report)
    REPORT.with_suffix(".md").write_text(render(report), encoding="utf-8")
    missed = [kind for kind, (found, _) in report["planted"].items() if found != kind]
    print(f"Planted, but not reported: {missed}")  # noqa: T201
    return int(bool(missed or any(map(ptx_layers.is_fault, rows))))


if __name__ == "__main__":
    sys.exit(main())
