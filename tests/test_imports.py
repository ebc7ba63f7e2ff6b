"""What importing the package does, in a fresh interpreter: no triton, no CUDA, no surprises."""

import pytest
from programs import run_python

BLOCKED = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ImportError("triton is blocked")

sys.meta_path.insert(0, Blocker())
"""

IMPORT = """
import sys, torch
before = set(sys.modules)
import segmoe_kernels, segmoe_kernels.functional, segmoe_kernels.reference, segmoe_kernels.testing
assert not torch.cuda.is_initialized()
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
assert "triton" not in loaded, loaded
assert not [name for name in sys.modules if name.startswith("segmoe_kernels.stages")]
assert not [name for name in sys.modules if name.startswith("segmoe_kernels._triton")]
"""

RUN = """
import torch
from segmoe_kernels import SegMoE
layer = SegMoE(4, 6, 3, segment_size=3, top_k=2, aux_loss_weight=0.1)
x = torch.randn(2, 7, 4, requires_grad=True)
layer(x).sum().backward()
assert x.grad.isfinite().all() and layer.router.weight.grad.any()
"""

REFUSED = """
try:
    SegMoE(4, 6, 3, backend="triton")(torch.randn(2, 7, 4))
except RuntimeError as error:
    assert "needs the triton package (triton is blocked): pip install triton" in str(error)
else:
    raise AssertionError("backend='triton' ran without triton")
"""


@pytest.mark.parametrize(
    "code", [IMPORT + RUN, BLOCKED + IMPORT + RUN + REFUSED], ids=["plain", "triton_blocked"]
)
def test_import_is_light_and_the_layer_runs(code):
    hidden = ("TRITON_INTERPRET", "SEGMOE_BACKEND")
    run_python("-W", "error::RuntimeWarning", "-c", code, without=hidden, OMP_NUM_THREADS="1")


def test_public_names_are_there():
    import segmoe_kernels

    names = {"SegMoE", "load_official", "segment_schedule", "load_balancing_loss", "router_z_loss"}
    assert names <= set(segmoe_kernels.__all__)
    for name in segmoe_kernels.__all__:
        assert getattr(segmoe_kernels, name).__doc__, name
    assert segmoe_kernels.__all__ == sorted(segmoe_kernels.__all__)
