"""Dense FFNs of other models become SegMoE: `replace_ffn`, `upcycle` and the adapters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segmoe_kernels import SegMoE, replace_ffn, upcycle
from segmoe_kernels.models.adapters import ExpertsInside, SegMoEEncoderLayer, WithRouterLogits

D, F_, T = 16, 24, 11


def encoder(layers=2, activation="gelu", **options):
    torch.manual_seed(0)
    settings = {"batch_first": True, "dropout": 0.0, **options}
    layer = nn.TransformerEncoderLayer(D, 2, F_, activation=activation, **settings)
    nested = settings["batch_first"] and not settings.get("norm_first")
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)
    with torch.no_grad():  # the layers start as copies of one
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.double()


class Attention(nn.Module):
    """The interface of Time-Series-Library's attention."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, q, k, v, attn_mask=None, tau=None, delta=None):
        """Attend; what the caller passes has to arrive."""
        assert tau == delta == 1
        return self.inner(q, k, v, attn_mask=attn_mask)


class EncoderLayer(nn.Module):
    """The interface of Time-Series-Library's encoder layer, and its formula."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.attention = Attention()
        self.conv1, self.conv2 = nn.Conv1d(D, F_, 1), nn.Conv1d(F_, D, 1)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout, self.activation = nn.Dropout(dropout), F.relu

    def forward(self, x, attn_mask=None, tau=None, delta=None):
        """Return the output and the attention."""
        y, weights = self.attention(x, x, x, attn_mask=attn_mask, tau=tau, delta=delta)
        x = self.norm1(x + self.dropout(y))
        hidden = self.dropout(self.activation(self.conv1(x.mT)))
        return self.norm2(x + self.dropout(self.conv2(hidden).mT)), weights


class GatedMLP(nn.Module):
    """The interface of the MLP in Llama and its relatives."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(D, F_, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(F_, D, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        """Gate by SiLU."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def sequential(*, dropout=0.0, behind=False, activation=None):
    parts = [nn.Linear(D, F_), activation or nn.GELU()]
    parts.append(nn.Dropout(dropout) if dropout else nn.Identity())
    parts.append(nn.Linear(F_, D))
    return nn.Sequential(*parts, *([nn.Dropout(0.25)] if behind else []))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, SegMoE)]


FFNS = {
    "sequential": sequential,
    "tanh": lambda: sequential(activation=nn.GELU(approximate="tanh")),
    "relu": lambda: sequential(activation=nn.ReLU()),
    "no bias": lambda: nn.Sequential(
        nn.Linear(D, F_, bias=False), nn.SiLU(), nn.Linear(F_, D, bias=False)
    ),
    "one bias": lambda: nn.Sequential(nn.Linear(D, F_), nn.SiLU(), nn.Linear(F_, D, bias=False)),
    "gated": GatedMLP,
}


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_upcycled_layer_computes_what_the_dense_ffn_does(ffn, top_k):
    torch.manual_seed(1)
    dense = FFNS[ffn]().double()
    layer = upcycle(dense, 4, top_k=top_k, segment_size=3)
    x = torch.randn(2, T, D, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-12, atol=1e-12)
    assert layer.experts.up_proj.shape == (4, F_, D)
    assert layer.training == dense.training


def test_noise_parts_the_experts_by_its_standard_deviation():
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    layer = upcycle(dense, 3, noise=0.1)
    for ours, theirs in ((layer.experts.up_proj, dense[0]), (layer.experts.down_proj, dense[2])):
        added = ours - theirs.weight
        assert added.std(dim=(1, 2)).sub(0.1 * theirs.weight.std()).abs().max() < 2e-3 * 0.1
        assert (added[0] - added[1]).abs().max() > 0
    torch.testing.assert_close(layer.experts.up_proj_bias, dense[0].bias.expand(3, -1))


@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_encoder_with_copied_weights_computes_the_same(padding, batch_first, norm_first, mode):
    """Eval without gradients is where PyTorch takes its shortcut for a whole layer."""
    model = encoder(batch_first=batch_first, norm_first=norm_first).train(mode == "train")
    swapped = copy.deepcopy(model)
    names = replace_ffn(swapped, segment_sizes=[3, 4], num_experts=3, copy_weights=True)
    assert names == ["layers.0", "layers.1"]
    assert all(layer.training == (mode == "train") for layer in layers_of(swapped))
    x = torch.randn(3, T, D, dtype=torch.float64)
    hidden = torch.zeros(3, T, dtype=torch.bool)
    hidden[1, 7:], hidden[2, 1:] = True, True
    mask = None
    if padding != "none":
        mask = hidden
        if padding == "float":
            mask = torch.zeros(3, T, dtype=x.dtype).masked_fill(hidden, -torch.inf)
    with torch.set_grad_enabled(mode != "no_grad"):
        steps = x if batch_first else x.transpose(0, 1)
        expected, actual = (m(steps, src_key_padding_mask=mask) for m in (model, swapped))
    if not batch_first:
        expected, actual = expected.transpose(0, 1), actual.transpose(0, 1)
    real = torch.ones_like(hidden) if mask is None else ~hidden
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-10, atol=1e-10)
    assert actual.isfinite().all()


@pytest.mark.parametrize("which", [r"layers\.0", r"layers\.1"])
def test_one_swapped_layer_of_an_encoder_gets_padded_batches(which):
    """Without gradients PyTorch would hand nested tensors from an unchanged layer to the next."""
    model = encoder().eval()
    swapped = copy.deepcopy(model)
    replace_ffn(swapped, match=which, segment_sizes=3, num_experts=2, copy_weights=True)
    x = torch.randn(3, T, D, dtype=torch.float64)
    hidden = torch.zeros(3, T, dtype=torch.bool)
    hidden[1, 7:], hidden[2, 1:] = True, True
    with torch.no_grad():
        expected, actual = (m(x, src_key_padding_mask=hidden) for m in (model, swapped))
    torch.testing.assert_close(actual[~hidden], expected[~hidden], rtol=1e-10, atol=1e-10)


def test_padding_of_an_encoder_is_routed_nowhere():
    model = encoder(layers=1)
    replace_ffn(model, segment_sizes=2, num_experts=3, aux_loss_weight=0.1)
    x = torch.randn(2, 8, D, dtype=torch.float64)
    hidden = torch.zeros(2, 8, dtype=torch.bool)
    hidden[1, 2:] = True
    seen = []
    (layer,) = layers_of(model)
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model(x, src_key_padding_mask=hidden)
    assert torch.equal(seen[0], ~hidden)


def test_swapped_encoder_learns_and_its_auxiliary_loss_reaches_the_router():
    model = encoder()
    replace_ffn(model, segment_sizes="3,5", num_experts=4, aux_loss_weight=0.02, top_k=2)
    assert [layer.segment_size for layer in layers_of(model)] == [3, 5]
    x = torch.randn(4, T, D, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x), x.flip(1))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(layer.aux_loss > 0 for layer in layers_of(model))


@pytest.mark.parametrize("behind", [False, True])
def test_sequential_is_replaced_where_it_is(behind):
    model = nn.ModuleDict({"ff": sequential(dropout=0.1, behind=behind), "head": nn.Linear(D, 2)})
    shared = model["ff"]
    model["again"] = shared  # one FFN in two places stays one
    assert replace_ffn(model, segment_sizes=5, num_experts=4, top_k=2) == ["ff"]
    layer = model["ff"][3].seg_moe if behind else model["ff"]
    assert isinstance(layer, SegMoE)
    assert model["again"] is model["ff"]
    assert (layer.d_model, layer.d_ff, layer.dropout, layer.bias) == (D, F_, 0.1, True)
    assert (layer.top_k, layer.segment_size, layer.activation) == (2, 5, "gelu")
    if behind:
        assert model["ff"][4].p == 0.25
    assert model["ff"](torch.randn(2, 3, T, D)).shape == (2, 3, T, D)


def test_encoder_layer_of_time_series_library_still_returns_its_attention():
    torch.manual_seed(3)
    model = nn.Sequential(EncoderLayer()).double()
    old = copy.deepcopy(model)
    assert replace_ffn(model, segment_sizes=4, num_experts=3, copy_weights=True) == ["0"]
    assert isinstance(model[0].conv2, ExpertsInside)
    x = torch.randn(2, T, D, dtype=torch.float64)
    for actual, expected in zip(
        model[0](x, tau=1, delta=1), old[0](x, tau=1, delta=1), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_dropout_of_time_series_library_is_that_of_the_experts():
    model = nn.Sequential(EncoderLayer(dropout=0.3))
    replace_ffn(model, segment_sizes=4, num_experts=3)
    assert layers_of(model)[0].dropout == 0.3
    assert model[0].dropout.p == 0.3


def test_router_logits_adapter_returns_a_row_for_each_segment():
    layer = SegMoE(D, F_, 4, segment_size=3).double()
    x = torch.randn(2, T, D, dtype=torch.float64)
    y, logits = WithRouterLogits(layer)(x)
    assert torch.equal(y, layer(x))
    assert logits.shape == (2 * 4, 4)
    torch.testing.assert_close(logits, layer.forward_with_routing(x)[1].router_logits)


def test_match_selects_by_name_or_by_function():
    names = replace_ffn(encoder(3), match=r"layers\.[02]", segment_sizes=2, num_experts=2)
    assert names == ["layers.0", "layers.2"]

    def last(name, module):
        return isinstance(module, nn.TransformerEncoderLayer) and name.endswith("2")

    assert replace_ffn(encoder(3), match=last, segment_sizes=2, num_experts=2) == ["layers.2"]


def test_a_second_call_finds_nothing_more():
    model = encoder()
    replace_ffn(model, segment_sizes=2, num_experts=2)
    with pytest.raises(ValueError, match="have inside"):
        replace_ffn(model, segment_sizes=2, num_experts=2)


@pytest.mark.parametrize(
    "broken",
    [
        {"segment_sizes": [2, 0]},
        {"segment_sizes": [2, 3, 4]},
        {"num_experts": -1},
        {"top_k": 9},
        {"match": "nothing"},
        {"match": "layers"},
        {"copy_weights": True, "d_ff": 3},
        {"copy_weights": True, "num_experts": 0},
        {"copy_weights": True, "expert_scope": "segment"},
    ],
    ids=str,
)
def test_an_error_leaves_the_model_as_it_was(broken):
    model = encoder()
    before = dict(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"segmoe_kernels\.(replace_ffn|SegMoE)"):
        replace_ffn(model, **{"segment_sizes": 2, "num_experts": 2, **broken})
    assert [type(module) for module in model.modules()] == kinds
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("channel_attention", [False, True])
@pytest.mark.parametrize("norm_type", ["batchnorm", "layernorm"])
def test_hugging_face_patchtst_takes_segment_wise_experts(channel_attention, norm_type):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.PatchTSTConfig(
        num_input_channels=3, context_length=64, patch_length=8, patch_stride=8, d_model=D,
        ffn_dim=F_, num_hidden_layers=3, num_attention_heads=2, prediction_length=8,
        channel_attention=channel_attention, norm_type=norm_type, ff_dropout=0.1,
    )  # fmt: skip
    model = transformers.PatchTSTForPrediction(config).eval()
    old = copy.deepcopy(model)
    names = replace_ffn(
        model, match=r".*\.layers\.\d+\.ff", segment_sizes="3,2,1", num_experts=2,
        copy_weights=True,
    )  # fmt: skip
    assert names == [f"model.encoder.layers.{i}.ff" for i in range(3)]
    past, future = torch.randn(4, 64, 3), torch.randn(4, 8, 3)
    expected = old(past_values=past, future_values=future)
    actual = model(past_values=past, future_values=future)
    torch.testing.assert_close(actual.prediction_outputs, expected.prediction_outputs)
    torch.testing.assert_close(actual.loss, expected.loss)
    model.train()(past_values=past, future_values=future).loss.backward()
    experts = [layer.experts.up_proj.grad for layer in layers_of(model)]
    assert all(grad.abs().max() > 0 for grad in experts)


def test_encoder_layer_outside_an_encoder_becomes_ours():
    layer = nn.TransformerEncoderLayer(D, 2, F_, batch_first=True)
    assert replace_ffn(layer, segment_sizes=4, num_experts=2) == [""]
    assert isinstance(layer, SegMoEEncoderLayer)
    assert layer(torch.randn(2, T, D)).shape == (2, T, D)
    assert layer(torch.randn(T, D)).shape == (T, D)
