"""FLOPs that PyTorch's counter sees: those of the layer's definition, on both backends."""

import pytest
import torch
from programs import run_python
from torch.utils.flop_counter import FlopCounterMode

from segmoe_kernels import SegMoE, functional
from segmoe_kernels.flops import FORMULAS

B, T, D, F, E, P = 2, 7, 8, 12, 4, 3
SEGMENTS, STEPS = B * 3, B * T
CASES = {
    "one": {"top_k": 1},
    "two": {"top_k": 2, "pooling": "mean"},
    "gated": {"top_k": 2, "gated": True, "shared_expert": None},
    "token": {"top_k": 3, "shared_expert": "token", "shared_d_ff": 5},
    "segment": {"top_k": 2, "expert_scope": "segment", "shared_expert": None, "pooling": "max"},
    "dropout": {"top_k": 1, "dropout": 0.5, "shared_expert": None},
}
BACKENDS = ["reference", "triton"]


def forward_flops(
    top_k, steps=STEPS, gated=False, shared_expert="segment", shared_d_ff=F, **options
):
    """From the formulas of the layer; padding of the last segment counts where it is computed."""
    products = 3 if gated else 2
    wide = options.get("expert_scope") == "segment"
    experts = SEGMENTS * P * P if wide else steps
    flops = experts * top_k * products * 2 * D * F
    pooled = P * D if options.get("pooling", "concat") == "concat" else D
    flops += 2 * SEGMENTS * pooled * E
    if shared_expert is not None:
        steps = P if shared_expert == "segment" else 1
        rows = SEGMENTS if shared_expert == "segment" else STEPS
        flops += rows * (products * 2 * steps * D * steps * shared_d_ff + 2 * steps * D)
    return flops


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_counter_sees_what_the_layer_needs(case, backend, device):
    options = CASES[case]
    if backend != "reference":
        pytest.importorskip("triton")
    layer = SegMoE(D, F, E, segment_size=P, **options, backend=backend, device=device)
    x = torch.randn(B, T, D, device=device, requires_grad=True)
    # The reference computes the padding of the last segment, too.
    needed = forward_flops(steps=SEGMENTS * P if backend == "reference" else STEPS, **options)
    counter = FlopCounterMode(display=False)
    layer(x)  # loads the kernels, of which the counter did not know
    with counter:
        y = layer(x)
    assert counter.get_total_flops() == needed
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * needed


def test_frozen_parts_are_not_counted(device):
    layer = SegMoE(D, F, E, segment_size=P, shared_expert=None, backend="reference")
    layer.to(device).experts.requires_grad_(False)
    x = torch.randn(B, T, D, device=device, requires_grad=True)
    y = layer(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    experts = SEGMENTS * P * 2 * 2 * D * F
    # x's gradient takes as much as forward, the router's two products twice.
    assert counter.get_total_flops() == experts + 2 * 2 * SEGMENTS * P * D * E


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_grouped_gemm_is_counted(backend, device):
    if backend == "triton":
        pytest.importorskip("triton")
    x = torch.randn(10, 6, device=device, requires_grad=True)
    weight = torch.randn(3, 5, 6, device=device, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 10], dtype=torch.int32, device=device)
    functional.grouped_gemm(x, weight, offsets, backend=backend)
    with FlopCounterMode(display=False) as counter:
        functional.grouped_gemm(x, weight, offsets, backend=backend).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 6 * 5


def test_every_operator_with_products_has_a_formula():
    pytest.importorskip("triton")
    import segmoe_kernels.stages  # defines operators
    import segmoe_kernels.stats.collector  # noqa: F401  likewise

    names = [
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(("segmoe_kernels::", "segmoe_reference::"))
    ]
    without = set(names) - FORMULAS.keys()
    routing = {"count_routing", "permute"}
    assert without == {*routing, "combine_bwd", "combine_fwd", "loss_scale"}
    assert not FORMULAS.keys() - set(names)


def test_first_call_of_a_process_is_counted():
    program = f"""
import torch
from segmoe_kernels import SegMoE
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    SegMoE({D}, {F}, {E}, segment_size={P}, backend="reference")(torch.zeros({B}, {T}, {D}))
print(counter.get_total_flops())
"""
    found = run_python("-c", program)
    assert int(found.stdout) == forward_flops(top_k=1, steps=SEGMENTS * P)
