"""Checkpoints in and out: round trips, the official key layouts, schedules."""

import copy

import pytest
import torch
from layers import make_layer
from torch import nn

from segmoe_kernels import load_official, load_official_layers, segment_schedule, to_official

SIZE = 5
LAYERS = {
    "token": {},
    "gated_bias": {"gated": True, "bias": True, "activation": "silu"},
    "bias": {"bias": True},
    "alone": {"shared_expert": None},
    "segment": {"expert_scope": "segment"},
    "segment_gated": {"expert_scope": "segment", "gated": True, "activation": "silu"},
    "projected_bias": {"expert_scope": "projected", "bias": True},
    "token_wise": {"segment_size": 1},
    "token_wise_mean": {"segment_size": 1, "pooling": "first"},
    "token_wise_shared": {"segment_size": 1, "shared_expert": "token"},
    "dense": {"num_experts": 0},
    "double": {"dtype": torch.float64},
    "half": {"dtype": torch.bfloat16},
}


def load_back(layer, state, prefix=""):
    return load_official(
        state,
        segment_size=layer.segment_size,
        top_k=layer.top_k,
        expert_scope=layer.expert_scope,
        prefix=prefix,
    )


def draw_all(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@pytest.mark.parametrize("prefix", ["", "backbone.transformer.0.moeff."])
@pytest.mark.parametrize("name", LAYERS)
def test_to_official_and_load_official_round_trip(name, prefix):
    layer = draw_all(make_layer(**LAYERS[name])).eval()
    state = {**to_official(layer, prefix=prefix), "head.weight": torch.ones(2)}
    state = state if prefix else to_official(layer)
    loaded = load_back(layer, state, prefix)
    assert not loaded.training
    assert loaded.state_dict().keys() == layer.state_dict().keys()
    for key, value in layer.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
        assert loaded.state_dict()[key].dtype == value.dtype
    x = torch.randn(2, 7, 4).to(next(layer.parameters()).dtype)
    assert torch.equal(loaded(x), layer(x))
    again = to_official(loaded, prefix=prefix)
    assert all(torch.equal(again[key], state[key]) for key in again)


def test_to_official_names_of_the_segment_layer():
    state = to_official(make_layer(gated=True, bias=True, activation="silu", num_experts=2))
    expected = {"gating.weight": (2, 20), "shared_gating.weight": (1, 20)}
    for e in range(2):
        for part, shape in {"up": (6, 4), "gate": (6, 4), "down": (4, 6)}.items():
            expected[f"experts.{e}.1.{part}_proj.weight"] = shape
            expected[f"experts.{e}.1.{part}_proj.bias"] = shape[:1]
    for part, shape in {"up": (30, 20), "gate": (30, 20), "down": (20, 30)}.items():
        expected[f"shared_expert.{part}_proj.weight"] = shape
        expected[f"shared_expert.{part}_proj.bias"] = shape[:1]
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize("options", [{"segment_size": 1}, {"expert_scope": "segment"}])
def test_to_official_names_without_the_sequential(options):
    keys = to_official(make_layer(**options)).keys()
    assert "experts.0.up_proj.weight" in keys
    assert not any(key.startswith("experts.0.1.") for key in keys)


def test_to_official_swaps_gate_and_up():
    layer = draw_all(make_layer(gated=True, activation="silu"))
    state = to_official(layer)
    assert torch.equal(state["experts.1.1.up_proj.weight"], layer.experts.gate_proj[1])
    assert torch.equal(state["experts.1.1.gate_proj.weight"], layer.experts.up_proj[1])
    assert torch.equal(state["shared_expert.up_proj.weight"], layer.shared_expert.gate_proj.weight)
    assert torch.equal(state["shared_expert.gate_proj.weight"], layer.shared_expert.up_proj.weight)


def test_to_official_shares_no_memory():
    layer = draw_all(make_layer())
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for value in to_official(layer).values():
        assert not value.requires_grad
        value.zero_()
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def parametrised(layer):
    nn.utils.parametrizations.weight_norm(layer.shared_expert.up_proj)


def with_a_bias(layer):
    layer.shared_gate = nn.Linear(20, 1)


def wrapped(layer):
    layer.router = nn.Sequential(layer.router)


class Doubled(nn.Linear):
    """Not what its weight says."""

    def forward(self, x):
        """Twice that of a linear map."""
        return 2 * super().forward(x)


def subclassed(layer):
    layer.shared_expert.down_proj.__class__ = Doubled


def hooked(layer):
    layer.shared_gate.register_forward_hook(lambda _, __, out: 2 * out)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (parametrised, "shared_expert.up_proj.parametrizations.weight.original0"),
        (with_a_bias, "shared_gate.bias"),
        (wrapped, "router.0.weight"),
        (subclassed, "shared_expert.down_proj: Doubled"),
        (hooked, "shared_gate: Linear"),
    ],
)
def test_to_official_refuses_what_is_not_merged(change, key):
    layer = make_layer()
    change(layer)
    with pytest.raises(ValueError, match=r"\(merge adapters and parametrisations first") as raised:
        to_official(layer)
    assert f"'{key}'" in str(raised.value)


def test_load_official_shares_no_memory():
    layer = draw_all(make_layer())
    state = to_official(layer)
    loaded = load_back(layer, state)
    for value in state.values():
        value.zero_()
    assert all(parameter.all() for parameter in loaded.parameters())


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
        assert actual[key].dtype == value.dtype


@pytest.mark.parametrize("segment_size", [1, SIZE])
@pytest.mark.parametrize("nested", [True, False])
def test_experts_with_and_without_the_sequential_are_read_and_written_back(nested, segment_size):
    """MoESegment has it at one step as well, MoEFeedForward never."""
    layer = draw_all(make_layer(segment_size=segment_size)).eval()
    state = {}
    for key, value in to_official(layer).items():
        flat = key.replace(".1.", ".", 1) if segment_size > 1 and key.startswith("exp") else key
        parts = flat.split(".")
        inside = [*parts[:2], "1", *parts[2:]] if parts[0] == "experts" and nested else parts
        state[".".join(inside)] = value
    assert any(key.startswith("experts.1.1.") for key in state) is nested
    x = torch.randn(2, 7, 4)
    loaded = load_back(layer, state)
    assert torch.equal(loaded(x), layer(x))
    assert_same_state(to_official(copy.deepcopy(loaded)), state)


def test_convolutions_of_width_1_are_read_and_written_back():
    layer = draw_all(make_layer(bias=True)).eval()
    state = {}
    for key, value in to_official(layer).items():
        if key.startswith("shared_expert."):
            conv = key.replace("_proj", "_conv")
            state[conv] = value[..., None] if key.endswith("weight") else value
        else:
            state[key] = value
    assert "shared_expert.up_conv.weight" in state
    x = torch.randn(2, 7, 4)
    loaded = load_back(layer, state)
    assert torch.equal(loaded(x), layer(x))
    assert_same_state(to_official(loaded), state)


def test_load_official_keeps_the_dtype_of_every_tensor():
    """A router saved in float32 beside experts in bfloat16 loses no bit."""
    state = to_official(draw_all(make_layer()))
    state = {k: v if k == "gating.weight" else v.bfloat16() for k, v in state.items()}
    loaded = load_official(state, segment_size=SIZE)
    assert loaded.router.weight.dtype == torch.float32
    assert_same_state(to_official(loaded), state)
    x = torch.randn(2, 7, 4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loaded(x)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, loaded.float()(x), rtol=5e-2, atol=5e-2)


def test_load_official_layers_builds_all_of_a_model():
    """Eleven layers: the keys of a file may be sorted as text."""
    sizes = [SIZE, 4, 4, 3, 3, 1, 1, 2, 2, 2, 6]
    layers = [draw_all(make_layer(segment_size=size)).eval() for size in sizes]
    names = [f"net.{i}.moeff" for i in range(11)]
    state = {"net.0.norm.weight": torch.ones(4), "step": torch.tensor(3)}
    for name, layer in zip(names, layers, strict=True):
        state |= to_official(layer, prefix=f"{name}.")
    text = ",".join(map(str, sizes))
    for schedule in (sizes, text):
        state = dict(sorted(state.items()))
        loaded = load_official_layers(state, segment_sizes=schedule, dropout=0.2)
        assert list(loaded) == names
        for layer, other in zip(layers, loaded.values(), strict=True):
            assert (other.segment_size, other.dropout) == (layer.segment_size, 0.2)
            x = torch.randn(2, 7, 4)
            assert torch.equal(other(x), layer(x))


def test_load_official_clamps_top_k():
    layer = make_layer()
    loaded = load_official(to_official(layer), segment_size=SIZE, top_k=7)
    assert loaded.top_k == 3


def test_load_official_passes_options_on():
    state = to_official(make_layer())
    options = {"top_k": 2, "router_temperature": 1.7, "renormalize": False, "dropout": 0.2}
    options |= {"router_dropout": 0.1, "aux_loss_weight": 0.02, "z_loss_weight": 0.001}
    options["backend"] = "reference"
    loaded = load_official(state, segment_size=SIZE, **options)
    assert {name: getattr(loaded, name) for name in options} == options


def test_load_official_renormalize_restores_old_checkpoints():
    """Before 2026-06-28 the weight at top_k = 1 was 1."""
    layer = draw_all(make_layer(shared_expert=None)).eval()
    old = load_official(to_official(layer), segment_size=SIZE, renormalize=True)
    x = torch.randn(2, 5, 4)
    routing = layer.forward_with_routing(x)[1]
    scale = routing.topk_weights.reshape(2, 1, 1)
    torch.testing.assert_close(old(x) * scale, layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "layers", "expected"),
    [
        ("5", 3, [5, 5, 5]),
        ("5,5,4,4,3,3", 6, [5, 5, 4, 4, 3, 3]),
        (" 3 , 12 ", 2, [3, 12]),
        ("1", 1, [1]),
        (4, 3, [4, 4, 4]),
        ([4], 2, [4, 4]),
        ((5, 4), 2, [5, 4]),
    ],
)
def test_segment_schedule_reads(sizes, layers, expected):
    assert segment_schedule(sizes, layers) == expected
