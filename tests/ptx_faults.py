"""Faults planted in the PTX of kernels, one at a time: does the emulator of `ptx` report them?

    python tests/ptx_faults.py      all; writes tests/reports/ptx_faults.json and .md; minutes

A fault counts as noticed where there is a report; that a result differs doesn't.
"""

import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
REPORT = HERE / "reports" / "ptx_faults.json"
BLOCK = ("sm_80", "block", "block_fwd_kernel")
GROUPED = ("sm_90", "grouped", "expert_ffn_fwd_kernel")
# Name -> where, what is looked for, what it becomes, and the most places to try.
KINDS = {
    "barrier removed": (BLOCK, r"bar\.sync \t0;", "", 1000),
    "cp.async not waited for": (BLOCK, r"(cp\.async\.wait_group) \t\d+;", r"\1 9;", 9),
    "group of copies not committed": (BLOCK, r"cp\.async\.commit_group;", "", 9),
    "ldmatrix 16 bytes off": (
        BLOCK, r"(ldmatrix\S+ \t?\{[^}]*\}, \[%r\d+)(\+\d+)?\]", r"\1+16]", 9,
    ),
    "mask of a load lost": (BLOCK, r"@%p\d+ (ld\.global\S* \{)", r"\1", 9),
    "mask of a store lost": (BLOCK, r"@%p\d+ (st\.global\S* )", r"\1", 9),
    "wgmma not waited for": (GROUPED, r"(wgmma\.wait_group\.sync\.aligned) \d;", r"\1 9;", 9),
    "proxy fence lost": (GROUPED, r"fence\.proxy\.async\.shared::cta;", "", 9),
    "false claim of alignment": (BLOCK, "", "", 1),
}  # fmt: skip
# Barriers that order nothing in this layer are none that must be noticed.
TARGET = 95.0


def forward(where, change, *, unaligned=False):
    """Findings of a layer's forward pass under a change of the kernels' PTX."""
    import torch
    from ptx.harness import emulated

    from segmoe_kernels import SegMoE
    from segmoe_kernels.testing import make_inputs

    arch, plan, _ = where
    torch.manual_seed(0)
    layer = SegMoE(
        64, 128, 4, segment_size=5, top_k=2, shared_expert=None, dtype=torch.bfloat16,
        backend="triton",
    )  # fmt: skip
    x, _, mask = make_inputs(2, 37, 64, dtype=torch.bfloat16, masked=0.3)
    if unaligned:
        x = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    launches = []
    with torch.no_grad(), mock.patch.dict(os.environ, SEGMOE_PLAN=plan), emulated(
        arch, launches, change
    ):  # fmt: skip
        layer(x, mask)
    return [f for launch in launches for f in launch.findings]


def claimed_alignment():
    """Run what was compiled for an aligned tensor on one that isn't."""
    kept = {}

    def keep(launch, ptx):
        return kept.setdefault(launch.function.__name__, ptx)

    assert not forward(BLOCK, keep)
    return forward(BLOCK, keep, unaligned=True)


def plant(kind, nth):
    """Plant one; what is reported, and the line of the PTX."""
    where, pattern, new, _ = KINDS[kind]
    if not pattern:
        return claimed_alignment(), 0
    lines = []

    def change(launch, ptx):
        if launch.function.__name__ != where[2]:
            return ptx
        found = list(re.finditer(pattern, ptx))[nth]
        lines.append(ptx.count("\n", 0, found.start()) + 1)
        return ptx[: found.start()] + found.expand(new) + ptx[found.end() :]

    from ptx.parse import NotEmulated

    try:
        return forward(where, change), lines[0]
    except NotEmulated as error:
        return [str(error)], lines[0]


def plant_one_of_each(arch):
    """What is reported of the first place of each kind that this architecture has."""
    return {kind: plant(kind, 0)[0] for kind, (where, *_) in KINDS.items() if where[0] == arch}


def count_places():
    """Number of places of each kind."""
    texts = {}
    for where in (BLOCK, GROUPED):

        def keep(launch, ptx, where=where):
            texts.setdefault((where, launch.function.__name__), ptx)
            return ptx

        assert not forward(where, keep), "findings without a fault"
    return {
        kind: len(re.findall(pattern, texts[where, where[2]])) if pattern else 1
        for kind, (where, pattern, _, _) in KINDS.items()
    }


def places(count, most):
    """As many as allowed, spread evenly."""
    return sorted({round(k * count / min(count, most)) for k in range(min(count, most))})


def score(rows):
    """Percent of the faults that are reported."""
    return 100 * sum(row["reported"] for row in rows) / sum(row["tried"] for row in rows)


def render(rows):
    """The report as Markdown."""
    lines = [
        "# Faults planted in compiled kernels",
        "",
        "Written by `python tests/ptx_faults.py`: in the PTX of `block_fwd_kernel` (sm_80) and of",
        "`expert_ffn_fwd_kernel` (sm_90) one place is changed at a time. A fault counts only where",
        "the emulator reports one; a wrong result doesn't.",
        "",
        f"**{score(rows):.1f} %** are reported; without a fault, nothing is.",
        "",
        "| fault | places | tried | reported | silent at PTX lines | a report |",
        "|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        silent = ", ".join(map(str, row["silent"]))
        example = row["example"].replace("|", "/")
        lines.append(
            f"| {row['kind']} | {row['places']} | {row['tried']} | {row['reported']} | {silent} | "
            f"{example} |"
        )
    return "\n".join(lines) + "\n"


def main():
    """Plant all and write the report."""
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(HERE.parent))
    import torch

    torch.set_num_threads(1)
    rows = []
    for kind, count in count_places().items():
        found = {n: plant(kind, n) for n in places(count, KINDS[kind][3])}
        reports = [text for text, _ in found.values() if text]
        row = {
            "kind": kind,
            "places": count,
            "tried": len(found),
            "reported": len(reports),
            "silent": [line for text, line in found.values() if not text],
            "example": reports[0][0] if reports else "",
        }
        rows.append(row)
        print(row, flush=True)  # noqa: T201
    REPORT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    REPORT.with_suffix(".md").write_text(render(rows), encoding="utf-8")
    return int(score(rows) < TARGET)


if __name__ == "__main__":
    sys.exit(main())
