"""The shared expert and the sum with the choices against the float64 reference."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from segmoe_kernels import FFNWeights, SegMoE, reference
from segmoe_kernels.testing import assert_as_accurate, make_inputs, run_layer

pytest.importorskip("triton")

from segmoe_kernels.stages import shared_combine

OPS = torch.ops.segmoe_kernels
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
    "wide": {"d_model": 16, "size": 2, "d_ff": 20, "gated": True, "bias": True},
}


def draw_case(dtype=torch.float64, device="cpu", **options):
    """The tensors of one call by name, and its keywords."""
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
        "dy": draw(o["batch"], o["length"], o["d_model"]),
    }
    if o.get("gated"):
        tensors["gate_proj"] = draw(hidden, width, scale=width**-0.5)
    if o.get("bias"):
        tensors["up_proj_bias"] = draw(hidden)
        tensors["down_proj_bias"] = draw(width)
        if o.get("gated"):
            tensors["gate_proj_bias"] = draw(hidden)
    keywords = {"segment_size": o["size"], "activation": o.get("activation", "gelu")}
    keywords["dropout"] = o.get("dropout", 0.0)
    if o.get("masked"):
        mask = torch.rand(o["batch"], o["length"], generator=generator) < 0.6
        mask[0, : o["size"]] = False
        keywords["padding_mask"] = mask.to(device)
    return tensors, keywords


def call(function, tensors, keywords):
    weights = FFNWeights(**{name: tensors.get(name) for name in FFNWeights._fields})
    return function(
        tensors["expert_out"], tensors["x"], weights, tensors["shared_gate"], **keywords
    )


def run(function, tensors, keywords, dtype=None, frozen=()):
    """The output and the gradients, by name."""
    tensors = {k: t.to(dtype or t.dtype).detach() for k, t in tensors.items()}
    wanted = [name for name in tensors if name not in {"dy", *frozen}]
    for name in wanted:
        tensors[name].requires_grad_()
    y = call(function, tensors, keywords)
    results = {"y": y.detach()}
    if wanted:
        grads = torch.autograd.grad(y, [tensors[name] for name in wanted], tensors["dy"])
        results.update({f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)})
    return results


def assert_equals_reference(tensors, keywords):
    expected = run(reference.shared_combine, tensors, keywords)
    actual = run(shared_combine, tensors, keywords)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_shared_combine_equals_reference_in_float64(options, masked, device):
    assert_equals_reference(*draw_case(device=device, **options, masked=masked))


def test_passes_of_more_columns_than_a_program_takes_at_once(device):
    sizes = {"batch": 1, "length": 9, "d_model": 66, "size": 5, "d_ff": 70}
    assert_equals_reference(*draw_case(device=device, **sizes, bias=True))


@pytest.mark.parametrize("shape", [(0, 7), (2, 0)], ids=str)
def test_shared_combine_takes_an_empty_batch(shape, device):
    options = {"batch": shape[0], "length": shape[1], "bias": True, "gated": True}
    assert_equals_reference(*draw_case(device=device, **options))


@pytest.mark.parametrize("options", [{"length": 2101}, {"length": 4, "batch": 530}], ids=str)
def test_weight_gradients_add_up_over_runs_of_rows(options, device):
    # 33 programs and more, of which 32 are added up at once; sequences end inside them.
    case = draw_case(
        device=device, d_model=2, size=2, d_ff=3, top_k=1, bias=True, gated=True, masked=True,
        **options,
    )  # fmt: skip
    assert_equals_reference(*case)


ACCURACY = {
    "plain": {"batch": 3, "length": 37, "d_model": 24, "size": 5, "d_ff": 30},
    "all": {"length": 21, "gated": True, "bias": True, "masked": True, "activation": "silu"},
    "tiles": {"batch": 5, "length": 79, "d_model": 64, "size": 3, "d_ff": 48, "masked": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", ACCURACY.values(), ids=ACCURACY)
def test_shared_combine_is_as_accurate_as_eager(options, dtype, device):
    tensors, keywords = draw_case(dtype, device, **options)
    actual = run(shared_combine, tensors, keywords)
    eager = run(reference.shared_combine, tensors, keywords)
    exact = run(reference.shared_combine, tensors, keywords, torch.float64)
    assert_as_accurate(actual, eager, exact)


@pytest.mark.parametrize("masked", [0.0, 0.3], ids=["full", "masked"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_expert": "token", "gated": True, "activation": "silu"},
        {"expert_scope": "projected", "bias": True},
        {"shared_expert": "token", "causal": True, "top_k": 2},
    ],
    ids=str,
)
def test_layer_equals_reference_in_float64(options, masked, device):
    torch.manual_seed(1)
    layer = SegMoE(
        **{"d_model": 6, "d_ff": 9, "num_experts": 2, "segment_size": 3, **options},
        backend="triton", dtype=torch.float64, device=device,
    ).eval()  # fmt: skip
    inputs = make_inputs(2, 11, 6, dtype=torch.float64, device=device, masked=masked)
    actual = run_layer(layer, *inputs)
    expected = run_layer(layer, *inputs, backend="reference")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-11, msg=name)


def test_layer_runs_under_autocast(device):
    layer = SegMoE(8, 12, 2, segment_size=3, backend="triton", device=device)
    x, dy, _ = make_inputs(2, 8, 8, device=device)
    exact = run_layer(layer, x, dy, backend="reference", dtype=torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        actual = run_layer(layer, x, dy)
    for name, value in exact.items():
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(actual[name].double(), value, rtol=0.05, atol=0.05, msg=name)


def test_shared_combine_takes_views_of_a_fused_projection(device):
    tensors, keywords = draw_case(device=device, gated=True, bias=True)
    both = torch.cat([tensors["gate_proj"], tensors["up_proj"]])
    gate, up = both.chunk(2)
    columns = {name: tensors[name].t().contiguous().t() for name in ("gate_proj", "down_proj")}
    expected = run(shared_combine, tensors, keywords)
    wide = torch.cat([tensors["gate_proj"], tensors["up_proj"]], 1)
    one = {"gate_proj": wide[:, : wide.shape[1] // 2]}  # up keeps other strides
    vectors = [name for name in tensors if name.endswith("bias") or name == "shared_gate"]
    apart = {name: torch.stack([tensors[name], tensors[name] + 1], -1)[..., 0] for name in vectors}
    for views in ({"gate_proj": gate, "up_proj": up}, columns, one, apart):
        for name, value in run(shared_combine, {**tensors, **views}, keywords).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_shared_combine_passes_gradcheck(gated, dropout, device):
    tensors, keywords = draw_case(
        device=device, batch=1, length=5, d_model=3, size=2, d_ff=4, gated=gated, bias=True,
        dropout=dropout,
    )  # fmt: skip
    del tensors["dy"]
    leaves = [t.requires_grad_() for t in tensors.values()]

    def run_seeded(*values):
        torch.manual_seed(5)
        return call(shared_combine, dict(zip(tensors, values, strict=True)), keywords)

    assert torch.autograd.gradcheck(run_seeded, leaves, fast_mode=True)


def test_every_call_drops_others(device):
    tensors, keywords = draw_case(device=device, dropout=0.5)
    torch.manual_seed(7)
    first, second = (call(shared_combine, tensors, keywords) for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(call(shared_combine, tensors, keywords), first)
    assert not torch.equal(first, second)


def test_shared_combine_repeats_bitwise(device):
    tensors, keywords = draw_case(torch.float32, device, d_model=16, bias=True)
    first, second = (run(shared_combine, tensors, keywords) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nan_stays_in_its_segment(device):
    tensors, keywords = draw_case(torch.float32, device, length=12)
    clean = run(shared_combine, tensors, keywords)
    tensors["x"][1, 4] = torch.nan
    dirty = run(shared_combine, tensors, keywords)
    hit = torch.zeros(2, 12, dtype=torch.bool, device=device)
    hit[1, 3:6] = True
    for name in ("y", "dx"):
        assert torch.equal(dirty[name][~hit], clean[name][~hit])
        assert dirty[name][hit].isnan().all()


@pytest.mark.parametrize("d_model", [6, 16])
def test_masked_steps_are_never_read(d_model, device):
    tensors, keywords = draw_case(
        torch.float32, device, d_model=d_model, bias=True, gated=True, masked=True
    )
    padding = ~keywords["padding_mask"][..., None]
    tensors["expert_out"] = tensors["expert_out"].masked_fill(padding, 0)
    clean = run(shared_combine, tensors, keywords)
    for name in ("x", "dy"):
        tensors[name] = tensors[name].masked_fill(padding, torch.nan)
    dirty = run(shared_combine, tensors, keywords)
    for name in clean.keys() - {"dexpert_out"}:
        assert torch.equal(dirty[name], clean[name]), name
    assert not clean["y"].masked_select(padding).any()
    assert not clean["dx"].masked_select(padding).any()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_backward_keeps_the_hidden_layer_once(gated, device):
    tensors, keywords = draw_case(device=device, length=12, gated=gated)
    given = {id(t) for t in tensors.values()}
    for tensor in tensors.values():
        tensor.requires_grad_()
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(shared_combine, tensors, keywords)
    own = sum(t.numel() for t in kept if id(t) not in given and t.ndim == 2 and t.shape[0] == 8)
    assert own == (2 if gated else 1) * 8 * 21


def test_operators_agree_with_their_fakes(device):
    tensors, keywords = draw_case(device=device, gated=True, masked=True)
    names = ("x", "up_proj", "down_proj", "gate_proj")
    weights = [*(tensors[name] for name in names), None, None, None, tensors["shared_gate"][0]]
    options = (3, "gelu", 0.0)
    tests = ("test_schema", "test_faketensor")
    mask = keywords["padding_mask"]
    for keep in (False, True):
        args = (tensors["expert_out"], *weights, mask, None, *options, keep)
        torch.library.opcheck(OPS.shared_combine_fwd.default, args, test_utils=tests)
    _, *kept = OPS.shared_combine_fwd(*args)
    need = [True, True, False, True, False, False, False, True]
    args = (tensors["dy"], *weights, mask, None, *kept, *options, need)
    torch.library.opcheck(OPS.shared_combine_bwd.default, args, test_utils=tests)
