"""Which execution plan runs: one deterministic rule over shapes."""

import os

import torch

from segmoe_kernels import validation as check
from segmoe_kernels._triton.tiles import MAX_BLOCK_WIDTH

PLANS = ("auto", "block", "grouped")

# Beyond this many experts a run of segments leaves most tiles of rows empty.
MAX_BLOCK_EXPERTS = 16

# From how many rows on "block" is faster.
MIN_BLOCK_ROWS = 300_000


def choose_plan(
    d_model: int, num_experts: int, top_k: int, num_rows: int, expert_scope: str
) -> str:
    """Say which plan the Triton backend takes: "block" or "grouped".

    "block" routes, sorts and runs the experts in one kernel: x is read once and nothing between x
    and y reaches memory. It needs few experts and rows that fit a program. The environment
    variable SEGMOE_PLAN overrides the choice where both can run: token scope, E <= 16, D <= 64, not
    on ROCm, where a barrier does not order global memory, through which "block" passes its lists.
    Modelled us of a bfloat16 forward, P = 5 (``benchmarks/NOTES.md``):

    =============================  ========  ====================================================
    k >= 2, at least 300,000 rows  block     3e5 rows: 162 for 180, 1e6: 429 for 579 (E = 8, k = 2)
    k >= 2, fewer rows             grouped   1e5 rows: 65 for 111, 1e4: 19 for 96 (E = 8, k = 2)
    k = 1                          grouped   1e5 rows: 35 for 62, 1e4: 13 for 53 (E = 4); 1e6: 278
                                             for 232, but backward 630 for 677
    =============================  ========  ====================================================

    An exported program, which serves any number of rows, has "grouped".

    Args:
        d_model: D.
        num_experts: E.
        top_k: choices of a segment.
        num_rows: B * T.
        expert_scope: "token" or "segment" ("projected" runs as "token").

    Returns:
        "block" or "grouped".

    Raises:
        ValueError: if SEGMOE_PLAN is not one of `PLANS`.
    """
    wanted = os.environ.get("SEGMOE_PLAN", "auto")
    check.check_choice("choose_plan", "SEGMOE_PLAN", wanted, PLANS)
    fits = (
        expert_scope == "token"
        and num_experts <= MAX_BLOCK_EXPERTS
        and d_model <= MAX_BLOCK_WIDTH
        and torch.version.hip is None
    )
    if not fits or wanted != "auto":
        return "block" if fits and wanted == "block" else "grouped"
    # A program that is exported has a symbol for the number of rows, which may not be asked.
    wins = top_k > 1 and not torch.compiler.is_exporting() and num_rows >= MIN_BLOCK_ROWS
    return "block" if wins else "grouped"
