"""Stage 1 on the kernels: pooling, logits, choices and their histogram, and every gradient."""

import pytest
import torch
from stage_runs import DTYPES, check_accuracy, check_exactness, draw, run_stage

from segmoe_kernels import validation
from segmoe_kernels.functional import route

pytest.importorskip("triton")

POOLINGS = ["concat", "mean", "max", "first", "last"]
BLOCK = 64  # segments in a program


def make_stage(outputs=None, **options):
    """A stage with these options; ``outputs`` leaves the others out of backward."""
    options = {"segment_size": 3, "top_k": 2, **options}

    def stage(x, router_weight, router_start=None, *, backend):
        out = route(x, router_weight, router_start=router_start, backend=backend, **options)
        named = {
            "logits": out.router_logits,
            "probs": out.router_probs,
            "weights": out.topk_weights,
            "ids": out.topk_ids,
        }
        return {n: t if outputs is None or n in outputs else t.detach() for n, t in named.items()}

    return stage


def make_tensors(
    batch, length, d_model, num_experts, *, segment_size=3, pooling="concat", causal=False,
    dtype=torch.float64, device="cpu",
):  # fmt: skip
    width = d_model * (segment_size if pooling == "concat" else 1)
    options = {"dtype": dtype, "device": device}
    tensors = {"x": draw(batch, length, d_model, **options)}
    # Logits of unit variance, which keeps the choices apart.
    tensors["router_weight"] = draw(num_experts, width, **options) / width**0.5
    if causal:
        tensors["router_start"] = draw(width, **options)
    return tensors


def make_mask(batch, length, device="cpu"):
    """Scattered padding; the second segment of three steps has no real one."""
    mask = torch.rand(batch, length) < 0.6
    mask[:, 3:6] = False
    mask[0, :3] = torch.tensor([False, True, True])
    return mask.to(device)


def check_choices(out, top_k):
    """Ids are the largest probabilities, descending, the lowest expert first among equals."""
    routed = out["ids"][:, 0] >= 0
    best = out["probs"].sort(dim=-1, descending=True, stable=True).indices[:, :top_k].int()
    assert out["ids"].dtype == torch.int32
    assert torch.equal(out["ids"][routed], best[routed])
    assert (out["ids"][~routed] == -1).all()
    assert not out["probs"][~routed].any()
    assert not out["weights"][~routed].any()
    assert not out["logits"][~routed].any()


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("causal", [False, True], ids=["own", "causal"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_route_equals_reference_in_float64(pooling, causal, masked, device):
    mask = make_mask(2, 11, device) if masked else None
    tensors = make_tensors(2, 11, 5, 7, pooling=pooling, causal=causal, device=device)
    stage = make_stage(pooling=pooling, padding_mask=mask, router_temperature=0.7)
    check_choices(check_exactness(stage, tensors), top_k=2)


@pytest.mark.parametrize("renormalize", [None, False, True])
@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_route_weights_equal_reference_in_float64(top_k, renormalize, device):
    tensors = make_tensors(2, 11, 5, 7, device=device)
    out = check_exactness(make_stage(top_k=top_k, renormalize=renormalize), tensors)
    check_choices(out, top_k)
    total = out["weights"].sum(-1)
    whole = top_k == 7 or (top_k > 1 if renormalize is None else renormalize)
    assert torch.allclose(total, torch.ones_like(total)) == whole


@pytest.mark.parametrize("length", [1, 19, 21], ids=lambda n: f"T={n}")
@pytest.mark.parametrize("pooling", POOLINGS)
def test_route_of_short_and_cut_sequences_equals_reference(pooling, length, device):
    tensors = make_tensors(2, length, 4, 3, segment_size=20, pooling=pooling, device=device)
    check_exactness(make_stage(segment_size=20, pooling=pooling), tensors)


# Segments around a block of 32, columns around a tile of 64 or 128, experts around 16.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "d_model", "num_experts", "options"),
    [
        (1, 5, 1, 2, {}),
        (1, 93, 63, 15, {}),
        (2, 48, 64, 16, {}),
        (3, 33, 65, 17, {"pooling": "mean"}),
        (4, 33, 129, 5, {"pooling": "max"}),
        (4, 66, 64, 8, {"segment_size": 5}),
        (2, 40, 24, 4, {"segment_size": 4, "pooling": "last", "causal": True}),
    ],
    ids=str,
)
def test_route_is_as_accurate_as_eager(batch, length, d_model, num_experts, options, dtype, device):
    sizes = (batch, length, d_model, num_experts)
    tensors = make_tensors(*sizes, dtype=dtype, device=device, **options)
    options = {name: value for name, value in options.items() if name != "causal"}
    out = check_accuracy(make_stage(**options), tensors, ids="ids")
    assert out["logits"].dtype == torch.float32
    check_choices(out, top_k=2)


def test_route_of_512_experts_equals_reference(device):
    tensors = make_tensors(1, 30, 6, 512, device=device)
    out = check_exactness(make_stage(top_k=6), tensors)
    check_choices(out, top_k=6)
    assert out["ids"].max() > 256


@pytest.mark.parametrize("num_experts", [5, 16])
def test_route_gives_ties_to_the_lowest_expert(num_experts, device):
    tensors = make_tensors(2, 12, 4, num_experts, dtype=torch.float32, device=device)
    equal = {**tensors, "router_weight": torch.zeros_like(tensors["router_weight"])}
    out = run_stage(make_stage(top_k=num_experts), equal)
    everyone = torch.arange(num_experts, dtype=torch.int32, device=device)
    assert torch.equal(out["ids"], everyone.expand(8, -1))
    pairs = tensors["router_weight"].clone()
    pairs[1::2] = pairs[: num_experts - 1 : 2]
    out = run_stage(make_stage(top_k=num_experts), {**tensors, "router_weight": pairs})
    check_choices(out, num_experts)
    position = out["ids"].argsort(-1)
    assert (position[:, : num_experts - 1 : 2] + 1 == position[:, 1::2]).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_route_of_padding_alone_routes_nothing(pooling, device):
    tensors = make_tensors(2, 7, 4, 5, pooling=pooling, device=device)
    tensors["x"].fill_(torch.nan)
    mask = torch.zeros(2, 7, dtype=torch.bool, device=device)
    out = run_stage(make_stage(pooling=pooling, padding_mask=mask), tensors)
    check_choices(out, top_k=2)
    assert (out["ids"] == -1).all()
    assert not out["dx"].any()
    assert not out["drouter_weight"].any()


@pytest.mark.parametrize("case", ["spread", "one expert", "masked", "nothing routed"])
@pytest.mark.parametrize("segments", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 1])
def test_route_counts_the_slots_of_each_block(segments, case, device):
    x = draw(1, 2 * segments, 3, dtype=torch.float32, device=device)
    weight = draw(4, 6, dtype=torch.float32, device=device)
    mask = None
    if case == "one expert":
        weight.zero_()
    elif case == "masked":
        mask = torch.rand(1, 2 * segments, device=device) < 0.5
    elif case == "nothing routed":
        mask = torch.zeros(1, 2 * segments, dtype=torch.bool, device=device)
    out = route(x, weight, segment_size=2, top_k=2, padding_mask=mask, backend="triton")
    groups = torch.where(out.topk_ids < 0, 4, out.topk_ids).long()
    expected = [block.flatten().bincount(minlength=5).tolist() for block in groups.split(BLOCK)]
    assert out.block_counts.tolist() == [count for block in expected for count in block]
    assert out.block_counts.sum() == 2 * segments
    assert out.block_counts.dtype == torch.int32


def test_route_counts_slots_that_it_takes_in_turns(device):
    """Of more than 256 experts a program holds half of its segments at a time."""
    x = draw(1, 2 * (32 + 20), 3, dtype=torch.float32, device=device)
    weight = draw(260, 6, dtype=torch.float32, device=device)
    out = route(x, weight, segment_size=2, top_k=2, backend="triton")
    expected = [ids.flatten().bincount(minlength=261).tolist() for ids in out.topk_ids.split(32)]
    assert out.block_counts.view(2, 261).tolist() == expected


@pytest.mark.parametrize("pooling", ["concat", "max"])
def test_route_adds_up_the_splits_of_a_weight_gradient(pooling, device):
    """Enough segments for more splits than are added at once, each of several blocks."""
    tensors = make_tensors(2, 2150, 2, 3, segment_size=1, pooling=pooling, device=device)
    check_exactness(make_stage(segment_size=1, pooling=pooling), tensors)


def test_route_backward_counts_the_steps_of_its_last_split(device, monkeypatch):
    """134 blocks of 32 make 34 splits of 4: what forward may count, backward may not."""
    x = draw(1, 134 * 32, 2, device=device).requires_grad_()
    weight = draw(3, 2, device=device)
    monkeypatch.setattr(validation, "MAX_PROGRAMS", 134 * 32)
    out = route(x, weight, segment_size=1, top_k=1, backend="triton")
    with pytest.raises(ValueError, match=f"route: expected x to need at most {134 * 32} programs"):
        out.router_logits.sum().backward()
    monkeypatch.setattr(validation, "MAX_PROGRAMS", 136 * 32)
    out.router_logits.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("pooling", ["concat", "max"])
@pytest.mark.parametrize("used", [["logits"], ["probs"], ["weights"], ["logits", "weights"]])
def test_route_gradient_of_some_outputs_equals_reference(used, pooling, device):
    tensors = make_tensors(2, 11, 5, 4, pooling=pooling, device=device)
    check_exactness(make_stage(used, pooling=pooling), tensors)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_route_keeps_nan_in_its_segment(pooling, device):
    options = {"pooling": pooling, "dtype": torch.float32, "device": device}
    tensors = make_tensors(2, 12, 5, 4, **options)
    stage = make_stage(pooling=pooling)
    upstream = {}
    clean = run_stage(stage, tensors, upstream=upstream)
    # "first" and "last" look at one step each: the outer ones are hit, the middle one is not.
    x = tensors["x"].clone()
    x[1, [3, 5], 2] = torch.nan
    dirty = run_stage(stage, {**tensors, "x": x}, upstream=upstream)
    hit = torch.arange(8, device=device) == 5
    assert dirty["probs"][hit].isnan().all()
    for name in ("logits", "probs", "weights", "ids"):
        assert torch.equal(dirty[name][~hit], clean[name][~hit]), name
    # A NaN beats every number and ties with itself.
    assert dirty["ids"][hit].tolist() == [[0, 1]]
    steps = hit.repeat_interleave(3).view(2, 12)
    assert torch.equal(dirty["dx"][~steps], clean["dx"][~steps])
    # The column too: the earliest of two NaN is the maximum, and takes the gradient.
    assert dirty["dx"][1, 5 if pooling == "last" else 3, 2].isnan()
    assert dirty["drouter_weight"].isnan().any()


def test_route_takes_infinite_logits(device):
    """Softmax subtracts the largest logit: 1e30 is no more than certainty."""
    x = torch.ones(1, 2, 1, device=device)
    weight = torch.tensor([[1.0], [1e30], [-1e30]], device=device)
    tensors = {"x": x, "router_weight": weight}
    out = run_stage(make_stage(["probs", "weights"], segment_size=1), tensors)
    assert out["probs"].tolist() == [[0, 1, 0]] * 2
    assert out["ids"].tolist() == [[1, 0]] * 2
    assert all(value.isfinite().all() for value in out.values())


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("spread", [1, 15], ids=lambda s: f"spread={s}")
def test_route_dropout_equals_its_formula(spread, renormalize, device):
    """The mask is read off the result; then everything follows, gradients included.

    At this rate some segments lose all their probabilities, and weights stay 0, gradients finite;
    with a wide spread others keep so little that the divisor is the constant 1e-6.
    """
    tensors = make_tensors(4, 60, 4, 3, device=device)
    tensors["router_weight"] *= spread
    dropout, top_k = 0.7, 2
    stage = make_stage(renormalize=renormalize, router_dropout=dropout)
    upstream = {}
    actual = run_stage(stage, tensors, upstream=upstream)
    scale = actual["probs"] / torch.softmax(actual["logits"], -1)
    kept = scale > 0.5
    expected_scale = kept.double() / (1 - dropout)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    check_choices(actual, top_k)
    assert (~kept.any(-1)).any()
    total = actual["probs"].sum(-1)
    assert ((total > 0) & (total < 1e-6)).any() == (spread > 1)

    def formula(x, router_weight, *, backend):  # noqa: ARG001  one formula for every backend
        logits = x.unflatten(1, (20, 3)).flatten(0, 1).flatten(1) @ router_weight.t()
        probs = torch.softmax(logits, -1) * scale
        weights = probs.gather(-1, actual["ids"].long())
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)
        return {"logits": logits, "probs": probs, "weights": weights, "ids": actual["ids"]}

    expected = run_stage(formula, tensors, upstream=upstream, backend="reference")
    # The mask is not drawn again in backward: run_stage would differ from the formula.
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_route_dropout_has_its_rate(device):
    x, weight = torch.zeros(1, 600, 1, device=device), torch.zeros(20, 1, device=device)
    options = {"segment_size": 1, "top_k": 1, "router_dropout": 0.25, "backend": "triton"}
    probs = route(x, weight, **options).router_probs
    kept = probs > 0
    # 12000 draws: standard deviation 0.004 of the rate, 0.018 of a column's.
    assert abs(kept.float().mean().item() - 0.75) < 5 * 0.004
    assert (kept.float().mean(0) - 0.75).abs().max() < 5 * 0.018
    assert kept.unique(dim=0).shape[0] > 500
    torch.testing.assert_close(probs[kept], torch.full_like(probs[kept], 0.05 / 0.75))
