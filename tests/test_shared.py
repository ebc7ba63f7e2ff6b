"""The shared expert and the sum with the choices against the float64 reference."""

import pytest
import torch
from stage_runs import DTYPES, check_accuracy, check_exactness, check_same, run_stage

from segmoe_kernels import FFNWeights, reference

stages = pytest.importorskip("segmoe_kernels.stages")

DEFAULTS = {"batch": 2, "length": 11, "d_model": 6, "size": 3, "d_ff": 7, "top_k": 2}
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "gated": {"gated": True, "activation": "silu"},
    "gated bias": {"gated": True, "bias": True, "activation": "relu"},
    "tanh": {"activation": "gelu_tanh", "top_k": 1},
    "whole segments": {"length": 12, "bias": True},
    "one step": {"size": 1, "gated": True},
    "short sequence": {"length": 2, "size": 5, "batch": 3},
    "one row": {"batch": 1, "length": 3},
    "nothing": {"batch": 0, "gated": True, "bias": True},
    "no step": {"length": 0, "bias": True},
    "wide": {"d_model": 16, "size": 2, "d_ff": 20, "gated": True, "bias": True},
    # More columns than a program takes at once.
    "columns": {"batch": 1, "length": 9, "d_model": 66, "size": 5, "d_ff": 70, "bias": True},
}


def draw_case(dtype=torch.float64, device="cpu", **options):
    """``(stage, tensors, mask)`` of `stage_runs`."""
    o = {**DEFAULTS, **options}
    generator = torch.Generator().manual_seed(3)
    width, hidden = o["size"] * o["d_model"], o["size"] * o["d_ff"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=wide)).to(device, dtype)

    tensors = {
        "expert_out": draw(o["top_k"], o["batch"], o["length"], o["d_model"]),
        "x": draw(o["batch"], o["length"], o["d_model"]),
        "up_proj": draw(hidden, width, scale=width**-0.5),
        "down_proj": draw(width, hidden, scale=hidden**-0.5),
        "shared_gate": draw(1, width, scale=width**-0.5),
    }
    if o.get("gated"):
        tensors["gate_proj"] = draw(hidden, width, scale=width**-0.5)
    if o.get("bias"):
        tensors["up_proj_bias"], tensors["down_proj_bias"] = draw(hidden), draw(width)
        if o.get("gated"):
            tensors["gate_proj_bias"] = draw(hidden)
    mask = None
    if o.get("masked"):
        mask = torch.rand(o["batch"], o["length"], generator=generator) < 0.6
        mask[:1, : o["size"]] = False
        mask = mask.to(device)
    keywords = {"segment_size": o["size"], "activation": o.get("activation", "gelu")}
    keywords |= {"dropout": o.get("dropout", 0.0), "padding_mask": mask}

    def stage(expert_out, x, shared_gate, *, backend, **weights):
        function = (stages if backend == "triton" else reference).shared_combine
        return {"y": function(expert_out, x, FFNWeights(**weights), shared_gate, **keywords)}

    return stage, tensors, mask


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_shared_combine_equals_reference_in_float64(options, masked, device):
    stage, tensors, _ = draw_case(device=device, **options, masked=masked)
    check_exactness(stage, tensors)


@pytest.mark.parametrize("options", [{"length": 2101}, {"length": 4, "batch": 530}], ids=str)
def test_weight_gradients_add_up_over_runs_of_rows(options, device):
    # 33 programs and more, of which 32 are added up at once; sequences end inside them.
    stage, tensors, _ = draw_case(
        device=device, d_model=2, size=2, d_ff=3, top_k=1, bias=True, gated=True, masked=True,
        **options,
    )  # fmt: skip
    check_exactness(stage, tensors)


ACCURACY = {
    "plain": {"batch": 3, "length": 37, "d_model": 24, "size": 5, "d_ff": 30},
    "all": {"length": 21, "gated": True, "bias": True, "masked": True, "activation": "silu"},
    "tiles": {"batch": 5, "length": 79, "d_model": 64, "size": 3, "d_ff": 48, "masked": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ACCURACY.values(), ids=ACCURACY)
def test_shared_combine_is_as_accurate_as_eager(options, dtype, device):
    stage, tensors, _ = draw_case(dtype, device, **options)
    check_accuracy(stage, tensors)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_dropout_of_shared_combine_passes_gradcheck(gated, device):
    stage, tensors, _ = draw_case(
        device=device, batch=1, length=5, d_model=3, size=2, d_ff=4, gated=gated, bias=True,
        dropout=0.4,
    )  # fmt: skip

    def run_seeded(*values):
        torch.manual_seed(5)
        return stage(**dict(zip(tensors, values, strict=True)), backend="triton")["y"]

    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(run_seeded, leaves, fast_mode=True)


def test_shared_combine_takes_views_of_a_fused_projection(device):
    stage, tensors, _ = draw_case(device=device, gated=True, bias=True)
    gate, up = torch.cat([tensors["gate_proj"], tensors["up_proj"]]).chunk(2)
    columns = {name: tensors[name].t().contiguous().t() for name in ("gate_proj", "down_proj")}
    wide = torch.cat([tensors["gate_proj"], tensors["up_proj"]], 1)
    one = {"gate_proj": wide[:, : wide.shape[1] // 2]}  # up keeps other strides
    vectors = [name for name in tensors if name.endswith("bias") or name == "shared_gate"]
    apart = {name: torch.stack([tensors[name], tensors[name] + 1], -1)[..., 0] for name in vectors}
    upstream = {}
    expected = run_stage(stage, tensors, upstream=upstream)
    for views in ({"gate_proj": gate, "up_proj": up}, columns, one, apart):
        actual = run_stage(stage, {**tensors, **views}, upstream=upstream)
        check_same(actual, expected, rounded=1e-13)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_backward_keeps_the_hidden_layer_once(gated, device):
    stage, tensors, _ = draw_case(device=device, length=12, gated=gated)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    given, kept = {id(t) for t in leaves.values()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stage(**leaves, backend="triton")
    own = sum(t.numel() for t in kept if id(t) not in given and t.ndim == 2 and t.shape[0] == 8)
    assert own == (2 if gated else 1) * 8 * 21
