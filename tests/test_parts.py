"""Parts of a layer that are more than their weights: hooks, adapters, subclasses, quantised."""

import copy
import re

import pytest
import torch
from layers import D, make_layer, needs_triton
from layers import place as place_of
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from segmoe_kernels.testing import make_inputs

LAYERS = {
    "segment": {"gated": True, "bias": True, "top_k": 2},
    "token": {"causal": True, "shared_expert": "token", "router_temperature": 0.5},
    "wide": {"expert_scope": "segment", "shared_expert": "token"},
    "projected": {"expert_scope": "projected", "bias": True},
    "projected_alone": {"expert_scope": "projected", "shared_expert": None},
    "dense": {"num_experts": 0, "gated": True},
}


def make(backend, **options):
    return make_layer(**options, backend=backend, device=place_of(backend), dtype=torch.float64)


def inputs(backend, masked=0.0):
    # Small for the interpreter; the last segment is cut.
    batch, length = (2, 12) if backend == "reference" else (1, 7)
    options = {"masked": masked, "device": place_of(backend), "dtype": torch.float64}
    return make_inputs(batch, length, D, **options)


class Own(nn.Linear):
    """Computes what its base class does, in a ``forward`` of its own."""

    calls = 0

    def forward(self, x):  # noqa: D102
        Own.calls += 1
        return super().forward(x)


def all_linears(layer):
    return [(name, part) for name, part in layer.named_modules() if isinstance(part, nn.Linear)]


def results(layer, x, dy, mask):
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y, routing = layer.forward_with_routing(leaf, mask)
    y.backward(dy)
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": leaf.grad, "logits": routing.router_logits.detach(), **grads}


@pytest.mark.parametrize(
    ("name", "masked", "backend"),
    [
        *((name, 0.4, "reference") for name in LAYERS),
        ("segment", 0.0, "reference"),
        pytest.param("projected", 0.4, "triton", marks=needs_triton),
    ],
)
def test_called_linear_maps_equal_read_ones(name, masked, backend):
    """Whichever of them is of another kind."""
    layer = make(backend, **LAYERS[name])
    x, dy, mask = inputs(backend, masked)
    expected = results(layer, x, dy, mask)
    linears = [place for place, _ in all_linears(layer)]
    each = [[place] for place in linears] if backend == "reference" else []
    for changed in [*each, linears]:
        other = copy.deepcopy(layer)
        for place in changed:
            other.get_submodule(place).__class__ = Own
        Own.calls = 0
        found = results(other, x, dy, mask)
        assert Own.calls == len(changed), changed
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-13, msg=key)


def watch(part):
    part.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "exception", "words"),
    [
        (lambda w: w.to("meta"), ValueError, "be on cpu as x, got meta"),
        (lambda w: w.to_sparse(), TypeError, "be a dense tensor, got layout torch.sparse_coo"),
        (lambda w: w.long(), TypeError, "have dtype float32, float16, bfloat16 or float64, got"),
        (lambda w: w > 0, TypeError, "have dtype float32, float16, bfloat16 or float64, got"),
        (lambda w: w.half(), TypeError, "have dtype torch.float32 as x"),
        (lambda w: w.double(), TypeError, "have dtype torch.float32 as x"),
    ],
    ids=["meta", "sparse", "int64", "bool", "float16", "float64"],
)
def test_called_linear_maps_are_checked_before_they_compute(change, exception, words):
    """PyTorch multiplies by what has no memory, or says nothing that helps."""
    x = make_inputs(2, 12, D).x
    for name in ("projected", "dense"):
        layer = make_layer(**LAYERS[name])
        for place, _ in all_linears(layer):
            for leaf, _ in layer.get_submodule(place).named_parameters():
                other = copy.deepcopy(layer)
                for _, part in all_linears(other):
                    watch(part)
                part = other.get_submodule(place)
                value = change(getattr(part, leaf).detach())
                setattr(part, leaf, nn.Parameter(value, requires_grad=False))
                with pytest.raises(exception, match=re.escape(words)) as raised:
                    other(x)
                assert f"SegMoE.forward: expected {place}.{leaf} to" in str(raised.value)


def wide_in_a_causal_layer():
    layer, wide = make_layer(causal=True, shared_expert="token"), make_layer()
    layer.shared_expert, layer.shared_gate = wide.shared_expert, wide.shared_gate
    return layer


def without(part):
    layer = make_layer()
    setattr(layer, part, None)
    return layer


def of_other_segments():
    layer = make_layer(segment_size=3, pooling="mean")
    layer.segment_size = 2
    return layer


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (wide_in_a_causal_layer, r"expected shared.* to have width 4 \(token\)"),
        (lambda: without("shared_expert"), "to come with shared_gate, got only one of them"),
        (lambda: without("shared_gate"), "to come with shared_gate, got only one of them"),
        (of_other_segments, r"have a width of 4 \(token\) or 8 \(segment\), got"),
    ],
    ids=["later steps", "no expert", "no gate", "other segments"],
)
def test_a_shared_path_that_does_not_fit_is_refused(make, words, hook):
    layer = make()
    if hook:
        watch(layer.shared_gate or layer.shared_expert.up_proj)
    with pytest.raises(ValueError, match=words):
        layer(make_inputs(2, 12, D).x)


def test_called_linear_maps_may_bring_their_weights_or_cast():
    """As offloading does, in ``forward``, and others in a hook."""
    layer, x = make_layer(bias=True), make_inputs(2, 12, D).x
    expected, half = layer(x), copy.deepcopy(layer)
    gate = layer.shared_gate
    weight, gate.weight = gate.weight, nn.Parameter(gate.weight.detach().to("meta"))
    gate.forward = lambda rows: rows @ weight.T
    up = layer.shared_expert.up_proj.double()
    up.register_forward_pre_hook(lambda _, args: args[0].double())
    up.register_forward_hook(lambda *found: found[-1].float())
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    watch(half.shared_gate.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(half(x), expected, rtol=5e-2, atol=5e-2)


def test_hooks_see_the_calls_of_every_part():
    layer = make_layer(**LAYERS["projected"], top_k=2)
    x, dy, mask = make_inputs(2, 12, D, masked=0.3)
    expected = results(layer, x, dy, mask)
    parts = dict(layer.named_modules())
    del parts[""]
    seen = []
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: seen.append(f"{name} before"))
        part.register_forward_hook(lambda *_, name=name: seen.append(f"{name} behind"))
        part.register_full_backward_hook(lambda *_, name=name: seen.append(f"{name} backward"))
    found = results(layer, x, dy, mask)
    wanted = [f"{name} {when}" for name in parts for when in ("before", "behind", "backward")]
    assert sorted(seen) == sorted(wanted)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["segment", "projected"])
def test_a_bias_of_the_shared_gate_counts(name):
    layer, x = make_layer(**LAYERS[name]), make_inputs(2, 12, D).x
    alone = copy.deepcopy(layer)
    alone.shared_expert = alone.shared_gate = None
    weight = layer.shared_gate.weight
    layer.shared_gate = nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        layer.shared_gate.bias.fill_(-60)
    torch.testing.assert_close(layer(x), alone(x))
    layer(x).sum().backward()
    assert layer.shared_gate.bias.grad is not None


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, weight):  # noqa: D102
        return 2 * weight


@pytest.mark.parametrize("place", ["router.weight", "experts.up_proj", "shared_gate.weight"])
def test_parametrised_parts_act_and_learn(place):
    layer, x = make_layer(), make_inputs(2, 12, D).x
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        doubled.get_parameter(place).mul_(2)
    module, _, leaf = place.rpartition(".")
    parametrize.register_parametrization(layer.get_submodule(module), leaf, Twice())
    torch.testing.assert_close(layer(x), doubled(x), rtol=1e-5, atol=1e-6)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamically_quantised_maps_are_run():
    layer, x = make_layer(bias=True).eval(), make_inputs(2, 12, D).x
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
    assert not all_linears(quantised)
    y = layer(x)
    change = (quantised(x) - y).norm() / y.norm()
    assert 1e-5 < change < 0.05


class Checkpointed(nn.Module):
    """A wrapper that somebody puts around a part."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *args):  # noqa: D102
        return checkpoint(self.part, *args, use_reentrant=False)


def test_wrapped_parts_are_called_inside_their_wrappers():
    layer = make_layer(gated=True, aux_loss_weight=0.1)
    x, dy, _ = make_inputs(2, 12, D)
    expected = results(layer, x, dy, None)
    for name in ("router", "experts", "shared_expert"):
        setattr(layer, name, Checkpointed(getattr(layer, name)))
    found = results(layer, x, dy, None)
    for key, value in expected.items():
        inside = re.sub(r"^(router|experts|shared_expert)\.", r"\1.part.", key)
        assert torch.equal(found[inside], value), key


# --- Adapters ----------------------------------------------------------------------------------

peft = pytest.importorskip("peft")
TARGETS = ["experts.up_proj", "experts.down_proj", "experts.gate_proj", "router.weight"]


def adapt(model, **options):
    config = peft.LoraConfig(r=2, **options)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "reference") for name in ("segment", "token", "projected")),
        pytest.param("projected", "triton", marks=needs_triton),
    ],
)
def test_adapters_on_every_part_act_learn_and_merge(name, backend):
    layer = make(backend, **{"gated": True, **LAYERS[name]})
    names, linears = {n for n, _ in layer.named_parameters()}, all_linears(layer)
    x = inputs(backend).x
    plain = layer(x)
    adapted = adapt(nn.Sequential(layer), target_modules="all-linear", target_parameters=TARGETS)
    y = adapted(x)
    y.square().sum().backward()
    learning = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in learning.values())
    adapters = {n.split(".lora_")[0] for n in learning}
    assert len(adapters) == len(TARGETS) + len(linears)
    assert (y - plain).abs().max() > 0.1
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x), plain, rtol=1e-6, atol=1e-6)
    for part in learning if backend == "reference" else ():  # each by itself moves the output
        changed = adapted.get_parameter(part)
        before = changed.detach().clone()
        with torch.no_grad():
            changed.zero_()
            assert not torch.allclose(adapted(x), y, rtol=0, atol=1e-4), part
            changed.copy_(before)
    merged = adapted.eval().merge_and_unload()
    assert {n for n, _ in merged[0].named_parameters()} == names
    assert (merged(x) - y).abs().max() < 1e-5


def test_whole_parts_are_trained_beside_adapters():
    """``modules_to_save`` wraps the router; the rest is frozen."""
    layer, x = make_layer(), make_inputs(2, 12, D).x
    adapted = adapt(
        nn.ModuleDict({"ffn": layer, "head": nn.Linear(D, D)}),
        target_modules=["head"], modules_to_save=["router"],
    )  # fmt: skip
    inner = adapted.base_model.model["ffn"]
    inner(x).square().sum().backward()
    assert {n for n, p in inner.named_parameters() if p.grad is not None} == {
        "router.modules_to_save.default.weight"
    }


@pytest.mark.parametrize("name", ["segment", "projected"])
def test_called_linear_maps_are_compiled_whole(name):
    layer, x = make_layer(**LAYERS[name]), make_inputs(2, 12, D).x
    for _, part in all_linears(layer):
        part.register_forward_hook(lambda _, __, out: 2 * out)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
