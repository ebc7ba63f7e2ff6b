"""Checkpoints of Time-MoE, Mixtral and Qwen2-MoE in and out, against the real models."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segmoe_kernels import SegMoE, convert_state_dict
from segmoe_kernels.models.checkpoints import DIALECTS

E, D, HIDDEN = 4, 16, 24


class TimeMoELayer(nn.Module):
    """Time-MoE's mixture, after its formula: per-expert lists, a shared expert top_k times as wide.

    Source: Maple728/Time-MoE, models/modeling_time_moe.py, ``TimeMoeSparseExpertsLayer``.
    """

    def __init__(self, top_k=2):
        super().__init__()

        def ffn(hidden):
            return nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(D, hidden, bias=False),
                    "up_proj": nn.Linear(D, hidden, bias=False),
                    "down_proj": nn.Linear(hidden, D, bias=False),
                }
            )

        self.top_k = top_k
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(ffn(HIDDEN) for _ in range(E))
        self.shared_expert = ffn(top_k * HIDDEN)
        self.shared_expert_gate = nn.Linear(D, 1, bias=False)

    def forward(self, x):
        """(N, D) to (N, D)."""

        def run(ffn, x):
            return ffn["down_proj"](F.silu(ffn["gate_proj"](x)) * ffn["up_proj"](x))

        probs = self.gate(x).softmax(-1)
        weights, ids = probs.topk(self.top_k)
        outputs = torch.stack([run(expert, x) for expert in self.experts], 1)
        chosen = outputs.gather(1, ids[..., None].expand(-1, -1, D))
        shared = self.shared_expert_gate(x).sigmoid() * run(self.shared_expert, x)
        return (weights[..., None] * chosen).sum(1) + shared


def random_mixture(dialect, place="", shared=None):
    """A state dict with the given dialect's keys, from one of ours."""
    torch.manual_seed(0)
    shared = {"shared_expert": "token", "shared_d_ff": 40} if shared else {"shared_expert": None}
    layer = SegMoE(D, HIDDEN, E, activation="silu", gated=True, **shared)
    ours = {place + key: value for key, value in layer.state_dict().items()}
    return ours, convert_state_dict(ours, "segmoe", dialect)


def check_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def test_time_moe_layer_computes_the_same():
    torch.manual_seed(0)
    theirs = TimeMoELayer().double()
    ours = SegMoE(
        D, HIDDEN, E, top_k=2, activation="silu", gated=True, renormalize=False,
        shared_expert="token", shared_d_ff=2 * HIDDEN, dtype=torch.float64,
    )  # fmt: skip
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), "time_moe"))
    x = torch.randn(3, 7, D, dtype=torch.float64)
    expected = theirs(x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
    check_same(convert_state_dict(ours.state_dict(), "segmoe", "time_moe"), theirs.state_dict())


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_mixture_of_transformers_computes_the_same(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "num_experts_per_tok": 2, "hidden_act": "silu"}
    options = {"top_k": 2, "activation": "silu", "gated": True, "dtype": torch.float64}
    if kind == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

        config = transformers.MixtralConfig(intermediate_size=HIDDEN, num_local_experts=E, **sizes)
        options |= {"shared_expert": None, "renormalize": True}
    else:
        from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock as Block

        config = transformers.Qwen2MoeConfig(
            moe_intermediate_size=HIDDEN, shared_expert_intermediate_size=40, num_experts=E,
            norm_topk_prob=False, **sizes,
        )  # fmt: skip
        options |= {"shared_expert": "token", "shared_d_ff": 40, "renormalize": False}
    theirs = Block(config).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = SegMoE(D, HIDDEN, E, **options)
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), f"{kind}_stacked"))
    x = torch.randn(2, 9, D, dtype=torch.float64)
    # Their router's softmax is in float32 whatever the model's dtype.
    torch.testing.assert_close(ours(x), theirs(x.clone()), rtol=1e-5, atol=1e-5)
    back = convert_state_dict(ours.state_dict(), "segmoe", f"{kind}_stacked")
    check_same(back, theirs.state_dict())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_and_back_is_the_same(dialect):
    shared = "mixtral" not in dialect
    ours, theirs = random_mixture(dialect, "model.layers.3.mlp.", shared)
    check_same(convert_state_dict(theirs, dialect, dialect), theirs)
    block = DIALECTS[dialect].block or "mlp"
    assert all(key.startswith(f"model.layers.3.{block}.") for key in theirs)
    back = convert_state_dict(theirs, dialect)
    check_same({k.replace(f".{block}.", ".mlp."): v for k, v in back.items()}, ours)


def test_a_whole_model_keeps_its_other_weights():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=11, hidden_size=D, intermediate_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=E, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    stacked = model.state_dict()
    lists = convert_state_dict(stacked, "mixtral_stacked", "mixtral")
    assert lists["model.layers.1.block_sparse_moe.experts.3.w3.weight"].shape == (HIDDEN, D)
    assert "model.layers.1.block_sparse_moe.gate.weight" in lists
    assert "model.layers.0.self_attn.q_proj.weight" in lists
    check_same(convert_state_dict(lists, "mixtral", "mixtral_stacked"), stacked)


def test_w1_is_the_gate_and_w3_is_up():
    ours, theirs = random_mixture("mixtral")
    for e in range(E):
        assert torch.equal(theirs[f"experts.{e}.w1.weight"], ours["experts.gate_proj"][e])
        assert torch.equal(theirs[f"experts.{e}.w3.weight"], ours["experts.up_proj"][e])
    fused = convert_state_dict(ours, "segmoe", "mixtral_stacked")["experts.gate_up_proj"]
    assert torch.equal(fused[:, :HIDDEN], ours["experts.gate_proj"])


def test_a_dense_layer_of_the_same_name_is_left_alone():
    _, theirs = random_mixture("qwen2_moe", "model.layers.1.mlp.", shared=True)
    dense = {"model.layers.0.mlp.up_proj.weight": torch.randn(HIDDEN, D)}
    converted = convert_state_dict({**dense, **theirs}, "qwen2_moe")
    assert converted.keys() >= dense.keys()
    assert "model.layers.1.mlp.experts.up_proj" in converted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: [d.pop(f"experts.{e}.w3.weight") for e in range(E)], "no experts.w3"),
        (
            lambda d: d.update({"experts.1.w2.weight": d["experts.1.w2.weight"].half()}),
            "one shape and dtype for w2",
        ),
        (
            lambda d: d.update({f"experts.{e}.w2.weight": torch.zeros(2, 2) for e in range(E)}),
            "matrices that fit each other under '', got ['experts.up_proj: (4, 24, 16)', 'exp",
        ),
        (
            lambda d: d.update({"gate.weight": torch.zeros(E, D + 1)}),
            "matrices that fit each other under '', got",
        ),
    ],
    ids=["projection", "dtype", "down", "width"],
)
def test_what_is_missing_is_said(change, words):
    """More of it: bad_conversions.py."""
    _, theirs = random_mixture("mixtral")
    change(theirs)
    with pytest.raises(ValueError, match=re.escape(words)):
        convert_state_dict(theirs, "mixtral")


@pytest.mark.parametrize("dialect", ["time_moe", "qwen2_moe", "mixtral"])
def test_lists_of_experts_without_gates_are_refused(dialect):
    """They are gated models: no mixture without gates is made of a part of one."""
    _, theirs = random_mixture(dialect)
    gate = DIALECTS[dialect].parts["gate"]
    theirs = {k: v for k, v in theirs.items() if not re.match(rf"experts\.\d+\.{gate}\.", k)}
    with pytest.raises(ValueError, match=rf"be complete under '', got no experts\.{gate}\."):
        convert_state_dict(theirs, dialect)


def test_halves_of_unequal_size_are_refused():
    _, theirs = random_mixture("mixtral_stacked")
    theirs["experts.gate_up_proj"] = theirs["experts.gate_up_proj"][:, 1:]
    with pytest.raises(ValueError, match=r"even second dimension .* got \[4, 47, 16\]"):
        convert_state_dict(theirs, "mixtral_stacked")


@pytest.mark.parametrize("target", [name for name in DIALECTS if name != "segmoe"])
def test_a_router_of_segments_goes_into_no_model_of_tokens(target):
    layer = SegMoE(D, HIDDEN, E, segment_size=5, gated=True, shared_expert=None)
    ours = layer.state_dict()
    check_same(convert_state_dict(ours, "segmoe"), ours)
    with pytest.raises(ValueError, match="router of width 80 over experts of width 16"):
        convert_state_dict(ours, "segmoe", target)


def test_a_mixture_under_another_name_is_not_left_behind():
    _, theirs = random_mixture("mixtral", "layers.0.mlp.")
    other = {k.replace("0.block_sparse_moe", "1.moe"): v for k, v in theirs.items()}
    with pytest.raises(ValueError, match=r"named 'block_sparse_moe', got \['layers\.1\.moe\.'\]"):
        convert_state_dict(theirs | other, "mixtral")


@pytest.mark.parametrize("dialect", ["segmoe", "time_moe", "qwen2_moe_stacked"])
def test_a_shared_expert_is_whole_or_not_there(dialect):
    _, theirs = random_mixture(dialect, shared=True)
    keys = [key for key in theirs if key.startswith("shared_")]
    assert len(keys) == 4
    for key in keys:
        rest = {name: value for name, value in theirs.items() if name != key}
        with pytest.raises(ValueError, match=f"be complete under '', got no {key}"):
            convert_state_dict(rest, dialect)
        wrong = {**theirs, key: theirs[key][..., 1:]}
        with pytest.raises(ValueError, match="matrices that fit each other"):
            convert_state_dict(wrong, dialect)


def test_a_shared_expert_of_segments_goes_into_no_model_of_tokens():
    layer = SegMoE(D, HIDDEN, E, segment_size=5, pooling="mean", gated=True)
    with pytest.raises(ValueError, match="a shared expert of width 80 over experts of width 16"):
        convert_state_dict(layer.state_dict(), "segmoe", "qwen2_moe")


@pytest.mark.parametrize("second", [True, False], ids=["mixture", "other"])
def test_what_would_come_to_lie_in_one_place_is_refused(second):
    state, _ = random_mixture("mixtral", "l.ffn.")
    if second:
        state |= {key.replace("ffn", "other"): tensor for key, tensor in state.items()}
    else:
        state["l.block_sparse_moe.gate.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"have nothing else where 'mixtral' puts 'l\."):
        convert_state_dict(state, "segmoe", "mixtral")
