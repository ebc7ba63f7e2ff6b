"""What `replace_ffn` must not swap, and what a swap must not change without a word."""

import copy
import logging
from collections import deque
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_swap import F_, D, EncoderLayer, GatedMLP, T, encoder, layers_of, sequential
from torch import nn

from segmoe_kernels import SegMoE, replace_ffn, upcycle

SIZES = {"segment_sizes": 3, "num_experts": 2, "shared_expert": "token"}


def holding(ffn):
    return nn.ModuleDict({"ff": ffn})


class Block(nn.Module):
    """A module made of children and a forward, as of a model that we don't know."""

    def __init__(self, forward, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.how = forward

    def forward(self, *args):
        """As it was told."""
        return self.how(self, *args)


def mixture(router, experts):
    """The parts of a mixture of experts of tokens."""
    block = Block(None, **{experts: nn.ModuleList([GatedMLP(), GatedMLP()])})
    setattr(block, router, nn.Parameter(torch.ones(D, 2)) if "w_" in router else nn.Linear(D, 2))
    return block


def unchanged(model, call, *args, **options):
    """That a refused swap leaves the model as it was, bit for bit; returns the message."""
    kinds = [type(module) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="segmoe_kernels") as caught:
        call(model, *args, **options)
    assert [type(module) for module in model.modules()] == kinds
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [module.training for module in model.modules()] == modes
    assert list(model.state_dict()) == keys
    return str(caught.value)


@pytest.mark.parametrize("names", [("gate", "experts"), ("router", "ffns"), ("w_gate", "mlps")])
def test_experts_of_another_mixture_are_left(names):
    model = nn.ModuleList([mixture(*names), GatedMLP()])
    message = unchanged(model[:1], replace_ffn, **SIZES)
    assert (
        f"'0.{names[1]}.0' and 1 more (GatedMLP): is inside the mixture of experts '0'" in message
    )
    message = unchanged(model, replace_ffn, match=r"0\..*\.1", **SIZES)
    assert f"'0.{names[1]}.1' (GatedMLP): is inside the mixture" in message
    with pytest.warns(UserWarning, match=rf"left '0.{names[1]}.0' and 1 more"):
        assert replace_ffn(model, **SIZES) == ["1"]


def test_a_list_of_ffns_is_no_mixture_without_a_router():
    model = nn.ModuleDict({"ffs": nn.ModuleList([GatedMLP(), GatedMLP()]), "head": nn.Linear(D, 2)})
    assert replace_ffn(model, **SIZES) == ["ffs.0", "ffs.1"]


def test_rows_without_a_sequence_are_refused():
    def pooled():
        return Block(lambda block, x: block.proj(x.mean(1)), proj=sequential())

    model, x = pooled(), torch.randn(4, T, D)
    words = "have shape (..., T, D) with a batch at 'proj': rows alone are no sequence, got (4, 16)"
    assert words in unchanged(model, replace_ffn, example_inputs=(x,), **SIZES)
    assert model(x).shape == (4, D)
    replace_ffn(model, **SIZES)
    for swapped in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="rows alone are no sequence"):
            swapped(x)
    model.proj(x)


class Residual(nn.Sequential):
    """A subclass with a forward of its own."""

    def forward(self, x):
        """Residual."""
        return x + super().forward(x)


class Clamped(GatedMLP):
    """Other than its children say, for large values alone."""

    def forward(self, x):
        """Clamp the gate."""
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))


class GELUActivation(nn.Module):
    """The name that transformers gives another function."""

    def forward(self, x):
        """Quick GELU."""
        return x * torch.sigmoid(1.702 * x)


class Quantised(nn.Linear):
    """A subclass of a part."""


class Narrow(nn.TransformerEncoderLayer):
    """A subclass that may do anything."""


def patched():
    ffn = GatedMLP()
    ffn.forward = lambda x: x
    return ffn


def hooked(name):
    ffn = sequential()
    if name == "weights":
        ffn[0].weight.register_hook(lambda grad: grad)
    else:
        getattr(ffn[0] if "pre" in name else ffn, name)(lambda *_: None)
    return ffn


def half_frozen():
    ffn = sequential()
    ffn[0].weight.requires_grad_(False)
    return ffn


def alpha(layer):
    layer.dropout = nn.AlphaDropout(0.3)
    return layer


IMPOSTORS = {
    "residual": (lambda: Residual(*sequential()), "extends Sequential, so its forward may do more"),
    "clamped": (Clamped, "computes something else than its parts say"),
    "activation": (lambda: sequential(activation=GELUActivation()), "transformers: GELUActivation"),
    "own": (lambda: sequential(activation=nn.Tanh()), "transformers: Tanh"),
    "norm inside": (
        lambda: nn.Sequential(nn.Linear(D, F_), nn.LayerNorm(F_), nn.GELU(), nn.Linear(F_, D)),
        "other parts than Linear, activation, Dropout and Linear: ['Linear', 'LayerNorm'",
    ),
    "encoder layer": (lambda: Narrow(D, 2, F_), "extends TransformerEncoderLayer"),
    "instance": (patched, "has a forward set on an instance: of GatedMLP"),
    "forward hook": (lambda: hooked("register_forward_hook"), "has hooks, of Sequential"),
    "pre hook": (lambda: hooked("register_forward_pre_hook"), "has hooks, of Linear"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), "has hooks, of Sequential"),
    "weight hook": (lambda: hooked("weights"), "has hooks, of weights"),
    "quantised": (
        lambda: nn.Sequential(Quantised(D, F_), nn.GELU(), nn.Linear(F_, D)),
        "has a up that is no plain Linear: test_swap_refusals.Quantised of Parameter",
    ),
    "half frozen": (half_frozen, "some weights frozen and others not"),
    "alpha dropout": (lambda: alpha(nn.TransformerEncoderLayer(D, 2, F_)), "has a AlphaDropout"),
    "alpha dropout of convolutions": (lambda: alpha(EncoderLayer()), "has a AlphaDropout"),
}


@pytest.mark.parametrize("case", IMPOSTORS)
def test_what_only_looks_like_an_ffn_is_refused_with_the_reason(case):
    build, words = IMPOSTORS[case]
    model = holding(build())
    for match in (None, "ff"):
        message = unchanged(model, replace_ffn, match=match, **SIZES)
        assert "'ff' (" in message
        assert words in message
    with pytest.raises(ValueError, match="upcycle: expected ffn"):
        upcycle(build(), 2)


PLACES = {
    "list": lambda m: [m],
    "tuple": lambda m: (m,),
    "dict": lambda m: {"a": m},
    "itself": lambda m: m,
    "nested": lambda m: [(0, m)],
    "set": lambda m: {m},
    "deque": lambda m: deque([m]),
    "closure": lambda m: lambda x: x + m(x),
    "default": lambda m: [lambda x, ff=m: ff(x)],
    "method": lambda m: m.forward,
    "partial": lambda m: partial(torch.utils.checkpoint.checkpoint, m, use_reentrant=False),
}


@pytest.mark.parametrize("put", PLACES.values(), ids=PLACES)
def test_an_ffn_that_is_called_from_no_module_is_left(put):
    model = Block(lambda block, x: x + block.ff(x), ff=sequential())
    vars(model)["kept"] = put(model.ff)
    assert "is also in kept, which is no module" in unchanged(model, replace_ffn, **SIZES)


def test_a_compiled_ffn_is_left():
    """What torch.compile returns for a module goes on to call the module that it was given."""
    model = holding(torch.compile(sequential(), backend="eager"))
    assert "which is no module: a swap would not" in unchanged(model, replace_ffn, **SIZES)


def test_a_model_that_is_wrapped_for_several_processes_is_refused():
    """The wrapper would add up the gradients of the parameters that it has seen."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.ModuleDict({"net": nn.parallel.DistributedDataParallel(holding(sequential()))})
        words = "be swapped before it is wrapped, and before an optimizer is made, got Distributed"
        assert words in unchanged(model, replace_ffn, **SIZES)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("ffn", "words"),
    [
        (sequential(behind=True), "does more than its FFN"),
        (nn.TransformerEncoderLayer(D, 2, F_, batch_first=True), "does more than its FFN"),
        (EncoderLayer(), "does more than its FFN"),
    ],
    ids=["behind", "encoder layer", "convolutions"],
)
def test_upcycle_refuses_what_a_layer_would_lose(ffn, words):
    with pytest.raises(ValueError, match=f"upcycle: expected ffn .* which {words}"):
        upcycle(ffn, 2)


def test_upcycle_keeps_a_frozen_ffn_frozen():
    layer = upcycle(sequential().requires_grad_(False), 2)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_weights_tied_between_ffns_are_refused():
    first, second = sequential(), sequential()
    second[0].weight = first[0].weight
    message = unchanged(nn.ModuleList([first, second]), replace_ffn, **SIZES)
    assert "'0' and 1 more (Sequential): shares weights with another module" in message
    gated = GatedMLP()
    gated.gate_proj.weight = gated.up_proj.weight
    assert "shares weights" in unchanged(holding(gated), replace_ffn, **SIZES)


def wi_wo(dropout=0.0, behind=False):
    def forward(block, x):
        y = F.gelu(block.inner.wi(x), approximate="tanh") * block.wi_0(x)
        return block.drop(block.wo(y)) if behind else block.wo(block.drop(y))

    return Block(
        forward, inner=nn.ModuleDict({"wi": nn.Linear(D, F_)}), wi_0=nn.Linear(D, F_),
        wo=nn.Linear(F_, D), drop=nn.Dropout(dropout),
    )  # fmt: skip


def test_parts_describe_ffns_of_other_classes():
    torch.manual_seed(0)
    model = nn.ModuleList([wi_wo(0.25), sequential()]).double()
    old = copy.deepcopy(model).eval()
    parts = {"up": "wi_0", "gate": "inner.wi", "down": "wo", "activation": "gelu_tanh"}
    swap = {"segment_sizes": 3, "num_experts": 2, "copy_weights": True}
    message = unchanged(model, replace_ffn, parts=parts, **swap)
    assert "'0' (Block): computes something else in training than its parts say" in message
    parts["dropout"] = "drop"
    for wrong in ({"up": "inner.wi", "gate": "wi_0"}, {"activation": "gelu"}):
        message = unchanged(model, replace_ffn, parts={**parts, **wrong}, **swap)
        assert "'0' (Block): computes something else than its parts say" in message
    message = unchanged(holding(wi_wo(0.25, behind=True)), replace_ffn, parts=parts, **swap)
    assert "computes something else in training" in message
    assert replace_ffn(model, parts=parts, **swap) == ["0"]
    assert (model[0].dropout, model[0].activation, model[0].gated) == (0.25, "gelu_tanh", True)
    x = torch.randn(2, T, D, dtype=torch.float64)
    torch.testing.assert_close(model.eval()[0](x), old[0](x), rtol=1e-12, atol=1e-12)


def test_a_refusal_lists_what_looks_like_an_ffn():
    def mlp():
        return Block(None, fc1=nn.Linear(D, F_), fc2=nn.Linear(F_, D))

    projections = Block(None, q_proj=nn.Linear(D, F_), o_proj=nn.Linear(F_, D))
    others = {"odd": sequential(activation=nn.Tanh()), "attention": projections}
    model = nn.ModuleDict({**{str(i): mlp() for i in range(8)}, **others})
    message = unchanged(model, replace_ffn, **SIZES)
    assert (
        "'0' and 7 more (Block): needs parts={'up': 'fc1', 'down': 'fc2', 'activation'" in message
    )
    assert "'odd' (Sequential): has an activation other than GELU" in message
    assert "attention" not in message


@pytest.mark.parametrize("name", ["aux_loss_weight", "z_loss_weight"])
def test_weights_of_losses_are_shared_among_the_layers(name):
    model = encoder(layers=4)
    replace_ffn(model, **{**SIZES, name: 0.02})
    assert [getattr(layer, name) for layer in layers_of(model)] == [0.005] * 4
    if name == "aux_loss_weight":
        routings = []
        for layer in layers_of(model):
            layer._observers = (lambda _, routing, __: routings.append(routing),)
        model(torch.randn(2, T, D, dtype=torch.float64))
        total = sum(layer.aux_loss for layer in layers_of(model))
        losses = [
            2 * (seen.expert_counts / seen.expert_counts.sum() * seen.router_probs.mean(0)).sum()
            for seen in routings
        ]
        torch.testing.assert_close(total, 0.02 * torch.stack(losses).mean().detach())


def test_growth_is_said(caplog):
    model = encoder(layers=2)
    before = sum(parameter.numel() for parameter in model.parameters())
    with caplog.at_level(logging.WARNING, "segmoe_kernels"):
        replace_ffn(model, **SIZES)
    after = sum(parameter.numel() for parameter in model.parameters())
    growth = f"2 SegMoE in place of FFNs; from {before:,} to {after:,} parameters"
    assert growth in caplog.text
    assert f"({after / before:.1f} x)" in caplog.text


def test_noise_on_a_single_weight_is_finite():
    ffn = nn.Sequential(nn.Linear(1, 1), nn.GELU(), nn.Linear(1, 1))
    ups = upcycle(ffn, 500, noise=0.1).experts.up_proj
    assert ups.std().item() == pytest.approx(0.1 * ffn[0].weight.abs().item(), rel=0.2)


def test_swapped_places_are_compiled_whole_and_copied():
    model = nn.Sequential(nn.Linear(D, D), sequential(dropout=0.1, behind=True)).eval()
    replace_ffn(model, **SIZES)
    assert isinstance(model[1][3].seg_moe, SegMoE)
    x = torch.randn(2, T, D)
    for other in (copy.deepcopy(model), torch.compile(model, backend="eager", fullgraph=True)):
        torch.testing.assert_close(other(x), model(x))
