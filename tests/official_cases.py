"""The official layers' own results, recorded once; where the file is and how a case is loaded."""

import copy
import functools
import os
from pathlib import Path

import pytest
import torch

from segmoe_kernels import load_official

FILE_NAME = "official_layer_cases.pt"
_BESIDE = Path(__file__).parents[1] / ".." / "shared" / "data" / FILE_NAME
# Not SEGMOE_...: conftest.py takes those away, which are settings of the package.
PATH = Path(os.environ.get("OFFICIAL_CASES", _BESIDE)).resolve()

NAMES = (
    "tok_k1",
    "tok_k2_glu_bias",
    "seg_k1",
    "seg_k2_rem",
    "seg_bias_noshared",
    "segx_k1",
    "segx_k2_rem_glu_bias",
    "proj_k2",
)
SCOPES = {
    "token_wise": "token",
    "segment_routed_token_experts": "token",
    "segment_experts": "segment",
    "projected_segment_experts": "projected",
}

needs_cases = pytest.mark.skipif(
    not PATH.exists(), reason=f"needs {FILE_NAME} (set OFFICIAL_CASES to its path)"
)


@functools.cache
def _cases():
    return {case["name"]: case for case in torch.load(PATH, weights_only=True)}


def load_case(name):
    return copy.deepcopy(_cases()[name])


def load_layer(case, **options):
    config = case["config"]
    return load_official(
        case["state_dict"],
        segment_size=config["segment_size"],
        top_k=config["top_k"],
        expert_scope=SCOPES[case["kind"]],
        router_temperature=config["router_temperature"],
        **options,
    )
