"""Wrong options of the layer, and wrong checkpoints and schedules; rows as in `bad_calls`."""

import copy

import torch
from bad_calls import LAYER, caller, draw, layer, layer_with
from torch import nn

from segmoe_kernels import load_official, load_official_layers, segment_schedule, to_official

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


CONSTRUCTOR = [
    (f"layer_{name}_{i}", layer(**{name: value}), exception, [f"SegMoE: expected {name}", *words])
    for name, rows in {
        "d_model": [
            (4.0, TypeError, ["be an int", "4.0 (float)"]),
            (0, ValueError, ["at least 1"]),
        ],
        "d_ff": [(True, TypeError, ["be an int", "True (bool)"]), (-2, ValueError, ["got -2"])],
        "num_experts": [("4", TypeError, ["'4' (str)"]), (-1, ValueError, ["at least 0, got -1"])],
        "top_k": [
            (None, TypeError, ["be an int"]),
            (0, ValueError, ["at least 1"]),
            (4, ValueError, ["be in [1, num_experts=3], got 4"]),
        ],
        "segment_size": [(2.5, TypeError, ["be an int"]), (0, ValueError, ["at least 1, got 0"])],
        "pooling": [("median", ValueError, ["'concat', 'mean'", "got 'median'"])],
        "expert_scope": [("word", ValueError, ["'token', 'segment', 'projected'", "'word'"])],
        "shared_expert": [
            ("both", ValueError, ["'segment', 'token', None", "'both'"]),
            (True, ValueError, ["got True"]),
        ],
        "shared_d_ff": [
            (2.0, TypeError, ["be an int", "2.0 (float)"]),
            (0, ValueError, ["at least 1, got 0"]),
        ],
        "activation": [("swish", ValueError, ["'gelu', 'gelu_tanh', 'silu', 'relu'", "'swish'"])],
        "gated": [(1, TypeError, ["be True or False", "1 (int)"])],
        "bias": [("no", TypeError, ["be True or False", "'no' (str)"])],
        "causal": [
            (0, TypeError, ["be True or False"]),
            (True, ValueError, ["token", "shared_expert='segment'"]),
        ],
        "dropout": [
            ("0.1", TypeError, ["be a float"]),
            (1.0, ValueError, ["[0, 1), got 1.0"]),
            (-0.1, ValueError, ["got -0.1"]),
            (float("nan"), ValueError, ["got nan"]),
        ],
        "router_dropout": [(False, TypeError, ["be a float"]), (2, ValueError, ["[0, 1), got 2"])],
        "router_temperature": [
            (None, TypeError, ["be a float"]),
            (0.0, ValueError, ["be finite and positive"]),
            (-1.0, ValueError, ["got -1.0"]),
            (float("inf"), ValueError, ["got inf"]),
        ],
        "renormalize": [(1, TypeError, ["be True, False or None", "1 (int)"])],
        "aux_loss_weight": [
            ("0", TypeError, ["be a float"]),
            (-0.1, ValueError, ["be finite and not negative", "-0.1"]),
        ],
        "z_loss_weight": [(float("nan"), ValueError, ["be finite and not negative", "nan"])],
        "backend": [("cuda", ValueError, ["'auto', 'triton', 'reference'", "got 'cuda'"])],
        "device": [
            ("gpu", ValueError, ["a torch.device, its name or None", "'gpu'"]),
            (3.5, TypeError, ["a torch.device, its name or None", "3.5"]),
        ],
        "dtype": [(torch.int32, TypeError, ["float32, float16, bfloat16 or float64", "int32"])],
    }.items()
    for i, (value, exception, words) in enumerate(rows)
]

ROWS = [
    *CONSTRUCTOR,
    (
        "layer_shared_width_of_nothing",
        layer(shared_expert=None, shared_d_ff=8),
        ValueError,
        ["expected shared_d_ff to be None without a shared expert", "got 8"],
    ),
    (
        "layer_projected_pooling",
        layer(expert_scope="projected", pooling="mean"),
        ValueError,
        ["pooling", "'concat' with expert_scope='projected'", "got 'mean'"],
    ),
    (
        "layer_causal_segment",
        layer(expert_scope="segment", shared_expert=None, causal=True),
        ValueError,
        ["causal", "expert_scope='segment', shared_expert=None"],
    ),
    (
        "layer_causal_later",
        lambda: layer_with(causal=True)(draw(2, 5, 4)),
        ValueError,
        ["SegMoE.forward: expected causal to be as the layer was made", "got True"],
    ),
    (
        "layer_gate_elsewhere",
        lambda: gate_elsewhere()(draw(2, 5, 4)),
        ValueError,
        ["SegMoE.forward: expected shared_gate.weight to be on cpu as x, got meta"],
    ),
    ("schedule_type", schedule(sizes=[5.5]), TypeError, ["sizes", "be an int", "5.5 (float)"]),
    ("schedule_layers", schedule(num_layers=0), ValueError, ["num_layers", "at least 1"]),
    ("schedule_zero", schedule(sizes="5,0,3"), ValueError, ["positive integers", "'5,0,3'"]),
    ("schedule_word", schedule(sizes="5,,3"), ValueError, ["positive integers", "'5,,3'"]),
    ("schedule_count", schedule(sizes="5,4"), ValueError, ["1 or num_layers=3", "2 in '5,4'"]),
    ("official_size", official(segment_size=0), ValueError, ["segment_size", "at least 1"]),
    ("official_top_k", official(top_k=0), ValueError, ["top_k", "at least 1"]),
    ("official_scope", official(expert_scope="V0"), ValueError, ["expert_scope", "'V0'"]),
    (
        "official_prefix",
        official(prefix="moe."),
        ValueError,
        ["prefix='moe.'", "experts.0.1.up_proj.weight"],
    ),
    (
        "official_in_a_model",
        official(state_dict={f"net.0.moe.{key}": value for key, value in changed_keys().items()}),
        ValueError,
        ["for one inside a model pass prefix='net.0.moe.'", "net.0.moe.gating.weight"],
    ),
    (
        "official_prefix_without_dot",
        official(
            state_dict={f"moe.{key}": value for key, value in changed_keys().items()}, prefix="moe"
        ),
        ValueError,
        ["pass prefix='moe.'"],
    ),
    (
        "official_value",
        official(state_dict=changed_keys(gating__weight=[1.0])),
        TypeError,
        ["state_dict['gating.weight']", "be a tensor", "list"],
    ),
    (
        "official_unknown",
        official(state_dict=changed_keys(head__weight=draw(2), norm__bias=draw(1))),
        ValueError,
        ["only keys of an official Seg-MoE layer", "['head.weight', 'norm.bias']"],
    ),
    (
        "official_dwconv",
        official(state_dict=changed_keys(shared_expert__dw_conv__weight=draw(4, 1, 3))),
        ValueError,
        ["'dwconv'", "shared_expert.dw_conv.weight"],
    ),
    (
        "official_wide_conv",
        official(state_dict=changed_keys(shared_expert__up_conv__weight=draw(18, 12, 3))),
        ValueError,
        ["shared_expert.up_conv.weight"],
    ),
    (
        "official_gap",
        official(state_dict=changed_keys(experts__1__1__up_proj__weight=None)),
        ValueError,
        ["up_proj of every expert 0 to 1", "[0, 2]"],
    ),
    (
        "official_uneven",
        official(state_dict=changed_keys(experts__1__1__up_proj__weight=draw(5, 4))),
        ValueError,
        ["up_proj of one shape", "(5, 4)", "(6, 4)"],
    ),
    (
        "official_router_only",
        official(state_dict={"gating.weight": draw(3, 12)}),
        ValueError,
        ["up_proj weights of experts or of a shared expert", "router.weight"],
    ),
    (
        "official_vector",
        official(state_dict={"shared_expert.up_proj.weight": draw(3)}),
        ValueError,
        ["up_proj weights of two dimensions", "(3,)"],
    ),
    (
        "official_widths",
        official(expert_scope="segment", segment_size=5),
        ValueError,
        ["divisible by segment_size=5", "(6, 4)"],
    ),
    (
        "official_other_size",
        official(segment_size=4),
        ValueError,
        ["segment_size=4", "'token'", "router.weight: expected (3, 16), got (3, 12)"],
    ),
    ("official_type", official(state_dict=[1]), TypeError, ["state_dict", "a mapping", "list"]),
    ("official_names", official(state_dict={1: draw(2)}), TypeError, ["state_dict", "str, got 1"]),
    ("official_prefix_type", official(prefix=None), TypeError, ["prefix", "be a str", "NoneType"]),
    (
        "official_temperature",
        official(router_temperature=0.0),
        ValueError,
        ["router_temperature", "finite and positive"],
    ),
    ("official_renormalize", official(renormalize=0), TypeError, ["renormalize", "0 (int)"]),
    (
        "official_options",
        official(gated=True, dropout=0.1),
        TypeError,
        ["options", "dropout, router_dropout", "['gated']"],
    ),
    ("official_dropout", official(dropout=1.5), ValueError, ["dropout", "[0, 1)", "1.5"]),
    (
        "official_integers",
        official(state_dict=changed_keys(gating__weight=draw(3, 12).int())),
        TypeError,
        ["state_dict['gating.weight']", "torch.int32"],
    ),
    (
        "official_dtypes",
        official(state_dict=changed_keys(experts__1__1__up_proj__weight=draw(6, 4).half())),
        TypeError,
        ["up_proj of one dtype in every expert", "torch.float16", "torch.float32"],
    ),
    (
        "official_devices",
        official(state_dict=changed_keys(gating__weight=draw(3, 12).to("meta"))),
        ValueError,
        ["on one device", "['cpu', 'meta']"],
    ),
    ("whole_type", whole(state_dict=None), TypeError, ["load_official_layers", "state_dict"]),
    (
        "whole_nothing",
        whole(state_dict={"head.weight": draw(2)}),
        ValueError,
        ["state_dict", "keys of layers", "head.weight"],
    ),
    ("whole_sizes", whole(segment_sizes=0), ValueError, ["segment_sizes", "at least 1"]),
    ("whole_count", whole(segment_sizes="3,4"), ValueError, ["segment_sizes", "num_layers=1"]),
    ("whole_prefix", whole(prefix="net."), TypeError, ["have no prefix", "'net.'"]),
    ("to_official_type", write(layer={}), TypeError, ["layer", "be a SegMoE", "dict"]),
    ("to_official_prefix", write(prefix=0), TypeError, ["prefix", "be a str", "int"]),
    (
        "to_official_more",
        lambda: to_official(gate_elsewhere()),
        ValueError,
        ["layer", "merge adapters and parametrisations first", "['shared_gate.bias']"],
    ),
    (
        "to_official_part",
        lambda: to_official(part_of_a_layer()),
        ValueError,
        ["layer", "all experts (gather_experts first)", "2 of 3"],
    ),
    *(
        (
            f"to_official_{option}",
            lambda options=options: to_official(layer(**options)()),
            ValueError,
            ["official counterpart", *words],
        )
        for option, options, words in [
            ("causal", {"causal": True, "shared_expert": None}, ["causal=True"]),
            ("pooling", {"pooling": "mean"}, ["pooling='mean'"]),
            ("activation", {"activation": "silu"}, ["'gelu'", "activation='silu'"]),
            ("gated", {"gated": True}, ["'silu'", "activation='gelu'"]),
            ("shared", {"shared_expert": "token"}, ["shared_expert", "'token'"]),
            ("shared_width", {"shared_d_ff": 7}, ["shared_d_ff=7"]),
            ("weights", {"top_k": 2, "renormalize": False}, ["renormalize=False"]),
        ]
    ),
]
