"""Which execution plan runs: one deterministic rule over shapes."""

import os

import torch

from segmoe_kernels import validation as check
from segmoe_kernels._triton.tiles import MAX_FUSED_WIDTH

PLANS = ("auto", "block", "grouped")

# Beyond this many experts a run of segments leaves most tiles of rows empty.
MAX_BLOCK_EXPERTS = 16


def choose_plan(d_model: int, num_experts: int, expert_scope: str) -> str:
    """Say which plan the Triton backend takes: "block" or "grouped".

    "block" routes, sorts and runs the experts in one kernel: x is read once and nothing between x
    and y reaches memory. It needs few experts and rows that fit a program. The environment
    variable SEGMOE_PLAN overrides the choice where both can run.

    ===================================  ========  ==============================================
    token scope, E <= 16, D <= 256       block     bytes and launches: ``benchmarks/NOTES.md``;
                                                   time is not measured yet
    ROCm                                 grouped   a barrier there does not order global memory,
                                                   through which "block" passes its lists
    all else                             grouped   the only one that can
    ===================================  ========  ==============================================

    Args:
        d_model: D.
        num_experts: E.
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
        and d_model <= MAX_FUSED_WIDTH
        and torch.version.hip is None
    )
    return "block" if fits and wanted != "grouped" else "grouped"
