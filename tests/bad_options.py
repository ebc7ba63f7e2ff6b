"""Wrong options of the layer, and wrong checkpoints and schedules; rows as in `bad_calls`."""

import copy
from functools import partial

import torch
from bad_calls import LAYER, T, V, caller, draw, layer, layer_with, real
from torch import nn

from segmoe_kernels import (
    SegMoE,
    load_official,
    load_official_layers,
    segment_schedule,
    to_official,
)

schedule = caller(segment_schedule, sizes="5,5,4", num_layers=3)
official = caller(load_official, state_dict=to_official(layer()()), segment_size=3)
write = caller(to_official, layer=LAYER)
MODEL = to_official(LAYER, prefix="net.0.moe.")
whole = caller(load_official_layers, state_dict=MODEL, segment_sizes=3)


def changed_keys(**changes):
    """The official state dict with values exchanged, or dropped where None."""
    state = {key.replace(".", "__"): value for key, value in to_official(LAYER).items()}
    state.update(changes)
    return {key.replace("__", "."): value for key, value in state.items() if value is not None}


def part_of_a_layer():
    """As `shard_experts` leaves one on a rank."""
    part = copy.deepcopy(LAYER)
    part.experts.num_experts = 2
    return part


def gate_elsewhere():
    """On the meta device, and called for its bias."""
    new = layer()()
    new.shared_gate = nn.Linear(12, 1, device="meta")
    return new


NAN, INF, X = float("nan"), float("inf"), draw(2, 5, 4)
# Option, its value, exception and words.
CONSTRUCTOR = [
    ("d_model", 4.0, T, "be an int | 4.0 (float)"), ("d_model", 0, V, "at least 1"),
    ("d_ff", True, T, "be an int | True (bool)"), ("d_ff", -2, V, "got -2"),
    ("num_experts", "4", T, "'4' (str)"), ("num_experts", -1, V, "at least 0, got -1"),
    ("top_k", None, T, "be an int"), ("top_k", 0, V, "at least 1"),
    ("top_k", 4, V, "be in [1, num_experts=3], got 4"),
    ("segment_size", 2.5, T, "be an int"), ("segment_size", 0, V, "at least 1, got 0"),
    ("pooling", "median", V, "'concat', 'mean' | got 'median'"),
    ("expert_scope", "word", V, "'token', 'segment', 'projected' | 'word'"),
    ("shared_expert", "both", V, "'segment', 'token', None | 'both'"),
    ("shared_expert", True, V, "got True"),
    ("shared_d_ff", 2.0, T, "be an int | 2.0 (float)"), ("shared_d_ff", 0, V, "at least 1, got 0"),
    ("activation", "swish", V, "'gelu', 'gelu_tanh', 'silu', 'relu' | 'swish'"),
    ("gated", 1, T, "be True or False | 1 (int)"), ("bias", "no", T, "True or False | 'no' (str)"),
    ("causal", 0, T, "be True or False"), ("causal", True, V, "token | shared_expert='segment'"),
    ("dropout", "0.1", T, "be a float"), ("dropout", 1.0, V, "[0, 1), got 1.0"),
    ("dropout", -0.1, V, "got -0.1"), ("dropout", NAN, V, "got nan"),
    ("router_dropout", False, T, "be a float"), ("router_dropout", 2, V, "[0, 1), got 2"),
    ("router_temperature", None, T, "be a float"), ("router_temperature", -1.0, V, "got -1.0"),
    ("router_temperature", 0.0, V, "be finite and positive"),
    ("router_temperature", INF, V, "got inf"),
    ("renormalize", 1, T, "be True, False or None | 1 (int)"),
    ("aux_loss_weight", "0", T, "be a float"),
    ("aux_loss_weight", -0.1, V, "be finite and not negative | -0.1"),
    ("z_loss_weight", NAN, V, "be finite and not negative | nan"),
    ("backend", "cuda", V, "'auto', 'triton', 'reference' | got 'cuda'"),
    ("device", "gpu", V, "a torch.device, its name or None | 'gpu'"),
    ("device", 3.5, T, "a torch.device, its name or None | 3.5"),
    ("dtype", torch.int32, T, "float32, float16, bfloat16 or float64 | int32"),
]  # fmt: skip

# Words that people try; others stand in `validation.OTHER_NAMES`.
WORDS = {
    "n_experts": "num_experts", "num_local_experts": "num_experts", "hidden_size": "d_model",
    "exp_segment_size": "segment_size", "patch_len": "segment_size", "intermediate_size": "d_ff",
    "num_experts_per_tok": "top_k",
}  # fmt: skip

ROWS = [
    *((partial(SegMoE, 4, 6, 3, **{word: 4}), T, f"SegMoE: expected {ours} to be | got {word}.")
      for word, ours in WORDS.items()),
    *((partial(call, X, mask=None), T, "expected padding_mask to be | "
       "True = real | got mask.") for call in (LAYER, LAYER.forward_with_routing, LAYER.step)),
    (partial(LAYER, X, attention_mask=None), T, "SegMoE.forward: expected padding_mask to be"),
    *((layer(**{o: v}), e, f"SegMoE: expected {o} | {words}") for o, v, e, words in CONSTRUCTOR),
    (layer(shared_expert=None, shared_d_ff=8), V,
     "expected shared_d_ff to be None without a shared expert | got 8"),
    (layer(expert_scope="projected", pooling="mean"), V,
     "'concat' with expert_scope='projected' | got 'mean'"),
    (layer(expert_scope="segment", shared_expert=None, causal=True), V,
     "expert_scope='segment', shared_expert=None"),
    *((real(lambda n=n, v=v: layer_with(**{n: v})(X)), e, f"SegMoE.forward: expected {n} to be")
      for n in ("aux_loss_weight", "z_loss_weight") for v, e in ((-0.1, V), (NAN, V), ("1", T))),
    (lambda: layer_with(causal=True)(draw(2, 5, 4)), V,
     "SegMoE.forward: expected causal to be as the layer was made | got True"),
    (lambda: gate_elsewhere()(draw(2, 5, 4)), V,
     "SegMoE.forward: expected shared_gate.weight to be on cpu as x, got meta"),
    (schedule(sizes=[5.5]), T, "be an int | 5.5 (float)"),
    (schedule(num_layers=0), V, "at least 1"),
    (schedule(sizes="5,0,3"), V, "positive integers | '5,0,3'"),
    (schedule(sizes="5,,3"), V, "positive integers | '5,,3'"),
    (schedule(sizes="5,4"), V, "1 or num_layers=3 | 2 in '5,4'"),
    (official(segment_size=0), V, "at least 1"),
    (official(top_k=0), V, "at least 1"),
    (official(expert_scope="V0"), V, "'V0'"),
    (official(prefix="moe."), V, "prefix='moe.' | experts.0.1.up_proj.weight"),
    (official(state_dict={f"net.0.moe.{key}": value for key, value in changed_keys().items()}), V,
     "for one inside a model pass prefix='net.0.moe.' | net.0.moe.gating.weight"),
    (official(state_dict={f"moe.{key}": value for key, value in changed_keys().items()},
     prefix="moe"), V, "pass prefix='moe.'"),
    (official(state_dict=changed_keys(gating__weight=[1.0])), T,
     "state_dict['gating.weight'] | be a tensor | list"),
    (official(state_dict=changed_keys(head__weight=draw(2), norm__bias=draw(1))), V,
     "only keys of an official Seg-MoE layer | ['head.weight', 'norm.bias']"),
    (official(state_dict=changed_keys(shared_expert__dw_conv__weight=draw(4, 1, 3))), V,
     "'dwconv' | shared_expert.dw_conv.weight"),
    (official(state_dict=changed_keys(shared_expert__up_conv__weight=draw(18, 12, 3))), V,
     "shared_expert.up_conv.weight"),
    (official(state_dict=changed_keys(experts__1__1__up_proj__weight=None)), V,
     "up_proj of every expert 0 to 1 | [0, 2]"),
    (official(state_dict=changed_keys(experts__1__1__up_proj__weight=draw(5, 4))), V,
     "up_proj of one shape | (5, 4) | (6, 4)"),
    (official(state_dict={"gating.weight": draw(3, 12)}), V,
     "up_proj weights of experts or of a shared expert | router.weight"),
    (official(state_dict={"shared_expert.up_proj.weight": draw(3)}), V,
     "up_proj weights of two dimensions | (3,)"),
    (official(expert_scope="segment", segment_size=5), V, "divisible by segment_size=5 | (6, 4)"),
    (official(segment_size=4), V,
     "segment_size=4 | 'token' | router.weight: expected (3, 16), got (3, 12)"),
    (official(state_dict=[1]), T, "a mapping | list"),
    (official(state_dict={1: draw(2)}), T, "str, got 1"),
    (official(prefix=None), T, "be a str | NoneType"),
    (official(router_temperature=0.0), V, "finite and positive"),
    (official(renormalize=0), T, "0 (int)"),
    (official(gated=True, dropout=0.1), T, "options | dropout, router_dropout | ['gated']"),
    (official(dropout=1.5), V, "[0, 1) | 1.5"),
    (official(state_dict=changed_keys(gating__weight=draw(3, 12).int())), T,
     "state_dict['gating.weight'] | torch.int32"),
    (official(state_dict=changed_keys(experts__1__1__up_proj__weight=draw(6, 4).half())), T,
     "up_proj of one dtype in every expert | torch.float16 | torch.float32"),
    (official(state_dict=changed_keys(gating__weight=draw(3, 12).to("meta"))), V,
     "on one device | ['cpu', 'meta']"),
    (whole(state_dict=None), T, "load_official_layers"),
    (whole(state_dict={"head.weight": draw(2)}), V, "keys of layers | head.weight"),
    (whole(segment_sizes=0), V, "at least 1"),
    (whole(segment_sizes="3,4"), V, "num_layers=1"),
    (whole(prefix="net."), T, "have no prefix | 'net.'"),
    (write(layer={}), T, "be a SegMoE | dict"),
    (write(prefix=0), T, "be a str | int"),
    (lambda: to_official(gate_elsewhere()), V,
     "layer | merge adapters and parametrisations first | ['shared_gate.bias']"),
    (lambda: to_official(part_of_a_layer()), V,
     "layer | all experts (gather_experts first) | 2 of 3"),
    *((lambda o=o: to_official(layer(**o)()), V, f"official counterpart | {words}") for o,
     words in (({"causal": True, "shared_expert": None}, "causal=True"), ({"pooling": "mean"},
     "pooling='mean'"), ({"activation": "silu"}, "'gelu' | activation='silu'"), ({"gated": True},
     "'silu' | activation='gelu'"), ({"shared_expert": "token"}, "shared_expert | 'token'"),
     ({"shared_d_ff": 7}, "shared_d_ff=7"), ({"top_k": 2, "renormalize": False},
     "renormalize=False"))),
]  # fmt: skip
