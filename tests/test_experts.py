"""Stage 3 on the kernels: each slot's expert on its own rows, fused or as two products."""

import importlib
import itertools
from unittest import mock

import pytest
import torch
from stage_runs import DTYPES, check_accuracy, check_exactness, draw, run_stage
from torch.utils._python_dispatch import TorchDispatchMode

from segmoe_kernels.functional import expert_ffn, permute
from segmoe_kernels.routing import FFNWeights

pytest.importorskip("triton")

P = 3
# Rows whose weight gradients are products, and wider ones than the fused kernels take.
MIDDLE, WIDE = 132, 260
SCOPES = ["token", "segment"]


def make_stage(ids, num_experts, *, mask=None, **options):
    """Run the experts on these choices; biases and gate are there if the tensors are."""
    options = {"segment_size": P, **options}
    permutation = permute(ids, num_experts, backend="reference")

    def stage(x, topk_weights, *, backend, **weights):
        out = expert_ffn(
            x,
            # Routing weights are float32 at the least.
            topk_weights.to(torch.promote_types(x.dtype, torch.float32)),
            permutation,
            FFNWeights(**weights),
            padding_mask=mask,
            backend=backend,
            **options,
        )
        return {"out": out}

    return stage


def make_tensors(
    batch,
    length,
    d_model,
    d_ff,
    num_experts,
    *,
    top_k=2,
    scope="token",
    segment_size=P,
    gated=False,
    biased=False,
    dtype=torch.float64,
    device="cpu",
):
    factor = segment_size if scope == "segment" else 1
    d, f, e = d_model * factor, d_ff * factor, num_experts
    options = {"dtype": dtype, "device": device}
    segments = batch * -(-length // segment_size)
    tensors = {
        "x": draw(batch, length, d_model, **options),
        "topk_weights": torch.rand(segments, top_k, dtype=torch.float64).to(device, dtype),
        "up_proj": draw(e, f, d, **options) / d**0.5,
        "down_proj": draw(e, d, f, **options) / f**0.5,
    }
    if gated:
        tensors["gate_proj"] = draw(e, f, d, **options) / d**0.5
    if biased:
        tensors["up_proj_bias"] = draw(e, f, **options)
        tensors["down_proj_bias"] = draw(e, d, **options)
        if gated:
            tensors["gate_proj_bias"] = draw(e, f, **options)
    return tensors


def make_ids(segments, top_k, num_experts, device="cpu"):
    """Distinct experts for each segment."""
    ids = torch.rand(segments, num_experts).argsort(-1)[:, :top_k]
    return ids.int().to(device)


def make_mask(batch, length, ids, device="cpu"):
    """Scattered padding; the last segment of the first sequence has no real step."""
    mask = torch.rand(batch, length) < 0.7
    segments = -(-length // P)
    mask[0, (segments - 1) * P :] = False
    for s in range(batch * segments):
        b, start = s // segments, s % segments * P
        if not mask[b, start : start + P].any():
            ids[s] = -1
    assert (ids < 0).any()
    return mask.to(device)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("activation", "gated", "biased", "top_k", "masked"),
    [
        ("gelu", False, False, 1, False),
        ("gelu", False, True, 2, True),
        ("silu", True, False, 2, False),
        ("silu", True, True, 1, True),
        ("relu", False, True, 4, True),
        ("gelu_tanh", True, True, 2, True),
    ],
    ids=str,
)
def test_expert_ffn_equals_reference_in_float64(
    activation, gated, biased, top_k, masked, scope, device
):
    options = {"top_k": top_k, "scope": scope, "gated": gated, "biased": biased}
    tensors = make_tensors(2, 8, 5, 7, 4, device=device, **options)
    ids = make_ids(6, top_k, 4, device)
    mask = make_mask(2, 8, ids, device) if masked else None
    stage = make_stage(ids, 4, mask=mask, activation=activation, expert_scope=scope)
    out = check_exactness(stage, tensors)
    if masked:
        assert not out["out"][:, ~mask].any()
        assert not out["dx"][~mask].any()
        assert not out["dtopk_weights"][ids < 0].any()


@pytest.mark.parametrize("width", [MIDDLE, WIDE])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_expert_ffn_of_wide_rows_equals_reference(gated, width, device):
    """Products instead of one kernel; float32, whose tiles are larger, for speed."""
    ids = make_ids(6, 2, 3, device)
    mask = make_mask(2, 8, ids, device)
    tensors = make_tensors(
        2, 8, width, 9, 3, gated=gated, biased=True, dtype=torch.float32, device=device
    )
    out = check_accuracy(make_stage(ids, 3, mask=mask, activation="silu"), tensors)
    assert not out["out"][:, ~mask].any()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("length", [1, 19, 20, 21], ids=lambda n: f"T={n}")
def test_expert_ffn_of_short_and_cut_sequences_equals_reference(length, scope, device):
    segments = 2 * -(-length // 20)
    tensors = make_tensors(2, length, 1, 1, 2, scope=scope, segment_size=20, device=device)
    ids = make_ids(segments, 2, 2, device)
    check_exactness(make_stage(ids, 2, segment_size=20, expert_scope=scope), tensors)


# Rows of one expert around a tile of 32, 64 or 128; widths around powers of two.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "d_model", "d_ff", "options"),
    [
        (5, 1, 1, {"biased": True}),
        (63, 15, 33, {"biased": True, "gated": True}),
        (65, 17, 31, {}),
        (129, 33, 65, {"biased": True}),
        (66, 64, 128, {"biased": True}),
        (30, MIDDLE, 33, {"gated": True}),
        (33, 9, 7, {"scope": "segment", "gated": True, "biased": True}),
    ],
    ids=str,
)
def test_expert_ffn_is_as_accurate_as_eager(length, d_model, d_ff, options, dtype, device):
    tensors = make_tensors(1, length, d_model, d_ff, 3, dtype=dtype, device=device, **options)
    ids = make_ids(-(-length // P), 2, 3, device)
    ids[:, 0] = 1
    ids[:, 1] = torch.where(ids[:, 1] == 1, 2, ids[:, 1])
    activation = "silu" if options.get("gated") else "gelu"
    stage = make_stage(ids, 3, activation=activation, expert_scope=options.get("scope", "token"))
    out = check_accuracy(stage, tensors)
    assert out["out"].dtype == dtype


@pytest.mark.parametrize("scope", SCOPES)
def test_expert_ffn_of_unrouted_segments_is_zero(scope, device):
    tensors = make_tensors(2, 8, 4, 5, 3, scope=scope, biased=True, device=device)
    # Nothing about a segment that is not routed is read.
    tensors["x"].fill_(torch.nan)
    tensors["topk_weights"].fill_(torch.nan)
    # There is no expert 3 either, though there is memory behind expert 2.
    for name in ("up_proj", "down_proj", "up_proj_bias", "down_proj_bias"):
        behind = torch.full_like(tensors[name][:1], torch.nan)
        tensors[name] = torch.cat([tensors[name], behind])[:3]
    ids = torch.full((6, 2), -1, dtype=torch.int32, device=device)
    out = run_stage(make_stage(ids, 3, expert_scope=scope), tensors)
    for name, value in out.items():
        assert not value.any(), name


@pytest.mark.parametrize("splits", [2, 3])
def test_expert_ffn_shares_an_expert_of_a_tile_more_than_a_split(splits, device, monkeypatch):
    module = importlib.import_module("segmoe_kernels.stages.experts.launch")
    monkeypatch.setattr(module, "num_row_splits", lambda *_: splits)
    for segments in range(4, 30, 5):
        tensors = make_tensors(1, segments * P, 2, 3, 1, top_k=1, biased=True, device=device)
        ids = torch.zeros(segments, 1, dtype=torch.int32, device=device)
        check_exactness(make_stage(ids, 1), tensors)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_expert_ffn_sorts_tokens_for_wide_weight_gradients(dtype, top_k, device, monkeypatch):
    ids = make_ids(66, top_k, 3, device)
    ids[::5] = -1
    stage = make_stage(ids, 3, activation="silu", segment_size=1)
    sizes = {"segment_size": 1, "top_k": top_k, "gated": True, "dtype": dtype, "device": device}
    tensors = make_tensors(2, 33, WIDE, 9, 3, **sizes)

    def summed(x, topk_weights, **given):
        # Its gradient is the same for all choices.
        return {"y": stage(x, topk_weights, **given)["out"].sum(0)}

    launch = importlib.import_module("segmoe_kernels.stages.experts.launch")
    spy = mock.Mock(wraps=launch.sorted_rows)
    monkeypatch.setattr(launch, "sorted_rows", spy)
    check_accuracy(summed, tensors)
    spy.assert_called_once()


def test_expert_ffn_fills_no_zeros_for_the_gradient_of_its_kept_layer(device):
    tensors = make_tensors(1, 6, WIDE, 3, 2, gated=True, dtype=torch.float32, device=device)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    out = make_stage(make_ids(2, 2, 2, device), 2)(**leaves, backend="triton")["out"]
    dy = torch.ones_like(out)
    with Operators() as operators:
        out.backward(dy)
    assert any("expert_ffn_bwd" in name for name in operators.names)
    assert not [name for name in operators.names if "zero" in name]


class Operators(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("scope", "d_model"),
    [("token", 6), ("token", MIDDLE), ("token", WIDE), ("segment", 4)],
    ids=str,
)
def test_expert_ffn_dropout_equals_its_formula(scope, d_model, device):
    """With the identity for both matrices the result shows the mask; gradients must follow it."""
    width, dropout = d_model * (P if scope == "segment" else 1), 0.4
    ids = make_ids(10, 2, 2, device)
    x = draw(1, 30, d_model, dtype=torch.float32, device=device).abs() + 0.1
    weights = 0.1 + torch.rand(10, 2, device=device)
    eye = torch.eye(width, device=device).expand(2, -1, -1)
    tensors = {"x": x, "topk_weights": weights, "up_proj": eye, "down_proj": eye}
    stage = make_stage(ids, 2, activation="relu", expert_scope=scope, dropout=dropout)
    upstream = {}
    actual = run_stage(stage, tensors, upstream=upstream)
    step_weights = weights.t().repeat_interleave(P, 1)[:, None, :, None]
    scale = actual["out"] / (x * step_weights)
    kept = scale > 0.5
    torch.testing.assert_close(scale, kept / (1 - dropout), rtol=1e-5, atol=0)
    draws = kept.numel()
    assert abs(kept.float().mean().item() - 0.6) < 5 * (0.24 / draws) ** 0.5
    rows = kept.reshape(-1, d_model)
    assert rows.unique(dim=0).shape[0] > (50 if d_model > 100 else 10)

    def formula(x, topk_weights, *, backend, up_proj, down_proj):  # noqa: ARG001
        spread = topk_weights.t().repeat_interleave(P, 1)[:, None, :, None]
        choices = ids.t().long()
        if scope == "segment":
            inputs = x.reshape(10, -1).expand(2, -1, -1)
            masks = (kept / (1 - dropout)).reshape(2, 10, -1)
        else:
            inputs, choices = x.expand(2, -1, -1, -1)[:, 0], choices.repeat_interleave(P, 1)
            masks = (kept / (1 - dropout))[:, 0]
        hidden = torch.einsum("ksd,ksfd->ksf", inputs, up_proj[choices]).relu() * masks
        out = torch.einsum("ksf,ksdf->ksd", hidden, down_proj[choices])
        return {"out": out.reshape(2, 1, 30, d_model) * spread}

    expected = run_stage(formula, tensors, upstream=upstream)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("scope", "d_model", "hidden"),
    [("token", 8, 0), ("token", MIDDLE, 0), ("token", WIDE, 1), ("segment", 8, 1)],
    ids=str,
)
def test_expert_ffn_saves_no_hidden_layer_of_narrow_rows(scope, d_model, hidden, device):
    """Wide rows keep it once, before its activation; nothing else grows with d_ff and the rows."""
    tensors = make_tensors(1, 30, d_model, 64, 3, scope=scope, dtype=torch.float32, device=device)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make_stage(make_ids(10, 2, 3, device), 3, expert_scope=scope)(**leaves, backend="triton")
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
    new = sorted(size for place, size in saved.items() if place not in known)
    rows = 60 * 64 if scope == "token" else 20 * P * 64
    assert [size for size in new if size > 60] == [rows] * hidden


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("splits", [1, 3])
def test_experts_may_have_any_of_the_biases(splits, gated, monkeypatch, device):
    """Each has its own place among the kernels' partial sums, whatever others there are."""
    launch = importlib.import_module("segmoe_kernels.stages.experts.launch")
    monkeypatch.setattr(launch, "num_row_splits", lambda *_: splits)
    tensors = make_tensors(2, 30, 3, 4, 2, top_k=1, gated=gated, biased=True, device=device)
    stage = make_stage(make_ids(20, 1, 2, device), 2, activation="silu")
    biases = [name for name in tensors if name.endswith("bias")]
    for absent in (set(s) for n in (1, 2) for s in itertools.combinations(biases, n)):
        check_exactness(stage, {n: t for n, t in tensors.items() if n not in absent})


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("scope", SCOPES)
def test_expert_ffn_weight_gradients_of_any_number_of_splits(scope, splits, monkeypatch, device):
    """Without the hundreds of rows that it takes before the table splits them."""
    for name in ("experts.launch", "grouped_gemm"):
        module = importlib.import_module(f"segmoe_kernels.stages.{name}")
        monkeypatch.setattr(module, "num_row_splits", lambda *_: splits)
    length = 30 if scope == "token" else 99
    options = {"top_k": 1, "scope": scope, "gated": True, "biased": True, "device": device}
    tensors = make_tensors(2, length, 3, 4, 3, **options)
    ids = (torch.rand(2 * length // P, 1, device=device) < 0.8).int()
    check_exactness(make_stage(ids, 3, activation="silu", expert_scope=scope), tensors)
