"""Faults planted in the PTX of kernels, one at a time: does the emulator of `ptx` report them?

    python tests/ptx_faults.py           all; writes tests/reports/ptx_faults.json and .md; minutes
    python tests/ptx_faults.py TEXT      kinds whose name has the text; the others are kept

A fault is noticed where there is a report, or else a wrong result, as tests of values would see it:
where a matrix is read 16 bytes further on in shared memory, nothing but values can be wrong.
"""

import functools
import json
import os
import re
import sys
from pathlib import Path

import report_code

HERE = Path(__file__).resolve().parent
REPORT = HERE / "reports" / "ptx_faults.json"
TILES = ("sm_80", "expert_ffn_fwd_kernel")
ROUTER = ("sm_80", "route_fwd_kernel")
SCANS = ("sm_80", "_permute_place_kernel")
GROUPS = ("sm_90", "expert_ffn_fwd_kernel")
# Name -> where, what is looked for, what it becomes, and the most places to try.
KINDS = {
    "barrier removed": (ROUTER, r"bar\.sync \t0;", "", 1000),
    "barrier of a tile removed": (TILES, r"bar\.sync \t0;", "", 1000),
    "barrier of a scan removed": (SCANS, r"bar\.sync \t0;", "", 1000),
    "cp.async not waited for": (TILES, r"(cp\.async\.wait_group) \t\d+;", r"\1 9;", 9),
    "group of copies not committed": (TILES, r"cp\.async\.commit_group;", "", 9),
    "ldmatrix 16 bytes off": (
        TILES, r"(ldmatrix\S+ \t?\{[^}]*\}, \[%r\d+)(\+\d+)?\]", r"\1+16]", 9,
    ),
    "mask of a load lost": (TILES, r"@%p\d+ (ld\.global\S* \{)", r"\1", 9),
    "mask of a store lost": (TILES, r"@%p\d+ (st\.global\S* )", r"\1", 9),
    "wgmma not waited for": (GROUPS, r"(wgmma\.wait_group\.sync\.aligned) \d;", r"\1 9;", 9),
    "proxy fence lost": (GROUPS, r"fence\.proxy\.async\.shared::cta;", "", 9),
    "false claim of alignment": (TILES, "", "", 1),
    # These were true ones: see `pipelined`.
    "dhidden pipelined with a bias": (("sm_90", "grouped_gemm_dhidden_kernel"), "", "", 1),
    "dw pipelined with a bias": (("sm_90", "grouped_gemm_dw_kernel"), "", "", 1),
}  # fmt: skip
# By PTX's own rules a copy that no group took belongs to the next one, which is waited for as well:
# where that is silent nothing has changed.
HARMLESS = {"group of copies not committed"}
# What a test plants again.
CORE = {"barrier removed", "cp.async not waited for", "mask of a store lost"}
CORE |= {"wgmma not waited for", "proxy fence lost"}
CORE |= {"dhidden pipelined with a bias", "dw pipelined with a bias"}
# The rest changes nothing: see `render`.
TARGET = 90.0


def forward(where, change, *, unaligned=False):
    """Findings of a layer's forward pass under a change of the kernels' PTX, and its output."""
    import torch
    from ptx.harness import emulated

    from segmoe_kernels import SegMoE
    from segmoe_kernels.testing import make_inputs

    arch, _ = where
    torch.manual_seed(0)
    layer = SegMoE(
        64, 128, 4, segment_size=5, top_k=2, shared_expert=None, dtype=torch.bfloat16,
        backend="triton",
    )  # fmt: skip
    x, _, mask = make_inputs(2, 37, 64, dtype=torch.bfloat16, masked=0.3)
    if unaligned:
        x = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    launches = []
    with torch.no_grad(), emulated(arch, launches, change):
        y = layer(x, mask)
    return [f for launch in launches for f in launch.findings], y


def claimed_alignment():
    """Run what was compiled for an aligned tensor on one that isn't."""
    kept = {}

    def keep(launch, ptx):
        return kept.setdefault(launch.function.__name__, ptx)

    assert not forward(TILES, keep)[0]
    return forward(TILES, keep, unaligned=True)[0]


def pipelined(arch, name):
    """Let Triton pipeline a loop whose tile registers and wgmma read: it takes too few buffers."""
    import ptx_layers

    from segmoe_kernels.stages.grouped_gemm import kernels as grouped_gemm_kernels

    kernel = getattr(grouped_gemm_kernels, name)
    source = kernel.src
    changed = re.sub(r"num_stages=1 if [^)]* else None", "num_stages=None", source)
    assert changed != source
    kernel._unsafe_update_src(changed)
    try:
        found = ptx_layers.measure("bf16 wide rows biased", arch)["findings"]
    finally:
        kernel._unsafe_update_src(source)
    assert all(text.startswith(name) for text in found)
    return found


def plant(kind, nth):
    """Plant one; what is reported, whether the result is wrong, and the line of the PTX."""
    import torch

    where, pattern, new, _ = KINDS[kind]
    if not pattern:
        return claimed_alignment() if where == TILES else pipelined(*where), False, 0
    lines = []

    def change(launch, ptx):
        if launch.function.__name__ != where[1]:
            return ptx
        found = list(re.finditer(pattern, ptx))[nth]
        lines.append(ptx.count("\n", 0, found.start()) + 1)
        return ptx[: found.start()] + found.expand(new) + ptx[found.end() :]

    from ptx.parse import NotEmulated

    try:
        found, y = forward(where, change)
    except NotEmulated as error:
        return [str(error)], True, lines[0]
    return found, not torch.equal(y, right_output(where)), lines[0]


@functools.cache
def right_output(where):
    """What the layer gives without a fault, of which nothing may be reported."""
    found, y = forward(where, None)
    assert not found
    return y


def plant_core(arch):
    """Whether one place of the kinds in CORE that this architecture has is noticed again."""
    rows = json.loads(REPORT.read_text(encoding="utf-8"))
    rows = [r for r in rows if r["kind"] in CORE and KINDS[r["kind"]][0][0] == arch]
    found = {row["kind"]: plant(row["kind"], row["first"]) for row in rows}
    return {kind: bool(reports or wrong) for kind, (reports, wrong, _) in found.items()}


def count_places():
    """Number of places of each kind."""
    texts = {}
    for where in (TILES, GROUPS, ROUTER, SCANS):

        def keep(launch, ptx, where=where):
            texts.setdefault((where, launch.function.__name__), ptx)
            return ptx

        forward(where, keep)
    return {
        kind: len(re.findall(pattern, texts[where, where[1]])) if pattern else 1
        for kind, (where, pattern, _, _) in KINDS.items()
    }


def places(count, most):
    """As many as allowed, spread evenly."""
    return sorted({round(k * count / min(count, most)) for k in range(min(count, most))})


def score(rows):
    """Percent of the faults that are noticed; of HARMLESS kinds only those count."""
    noticed = sum(row["reported"] + row["wrong"] for row in rows)
    silent = sum(len(row["silent"]) for row in rows if row["kind"] not in HARMLESS)
    return 100 * noticed / (noticed + silent)


def render(rows):
    """The report as Markdown."""
    lines = [
        "# Faults planted in compiled kernels",
        "",
        "Written by `make ptx`: in the PTX of a kernel one place is changed at a time. Barriers",
        "are of `route_fwd_kernel`, `_permute_place_kernel` (a scan), `expert_ffn_fwd_kernel` (a",
        "tile), masks, copies and matrices of the latter (sm_80),",
        "products and fences of the latter for sm_90. Two kernels",
        "are compiled as they once were, with loops that Triton pipelines wrongly. Where nothing",
        "is reported the result may be wrong, which tests of values see; what is silent changes",
        "nothing here: a barrier between what isn't shared, a mask of numbers that nobody uses, a",
        "wait at the end, a group that is waited for with the next one (not counted).",
        "",
        f"**{score(rows):.1f} %** are noticed; without a fault, nothing is reported.",
        "",
        "| fault | places | tried | reported | else wrong | silent at PTX lines | a report |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for row in rows:
        silent = ", ".join(map(str, row["silent"]))
        example = row["example"].replace("|", "/")
        lines.append(
            f"| {row['kind']} | {row['places']} | {row['tried']} | {row['reported']} | "
            f"{row['wrong']} | {silent} | "
            f"{example} |"
        )
    return "\n".join(lines) + "\n"


def main():
    """Plant all and write the report."""
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(HERE.parent))
    import torch

    torch.set_num_threads(1)
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    old = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() and only else []
    rows = [row for row in old if only not in row["kind"]]
    for kind, count in count_places().items():
        if only not in kind:
            continue
        found = {n: plant(kind, n) for n in places(count, KINDS[kind][3])}
        reports = [text for text, *_ in found.values() if text]
        silent = [part for part in found.values() if not part[0]]
        row = {
            "kind": kind,
            "places": count,
            "tried": len(found),
            "first": next((n for n, (text, wrong, _) in found.items() if text or wrong), None),
            "reported": len(reports),
            "wrong": sum(wrong for _, wrong, _ in silent),
            "silent": [line for _, wrong, line in silent if not wrong],
            "example": reports[0][0] if reports else "",
        }
        rows.append(row)
        print(row, flush=True)  # noqa: T201
        rows.sort(key=lambda row: list(KINDS).index(row["kind"]))
        report_code.save(REPORT, rows)
        REPORT.with_suffix(".md").write_text(render(rows), encoding="utf-8")
    return int(score(rows) < TARGET)


if __name__ == "__main__":
    sys.exit(main())
