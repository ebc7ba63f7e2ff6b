"""Wrong checkpoints and modules of other models' experts; rows as in `bad_calls`."""

import torch
from bad_calls import LAYER, caller, draw
from torch import nn

from segmoe_kernels import SegMoE, convert_state_dict
from segmoe_kernels.models.huggingface import experts_forward, register_experts


def gated():
    options = {"activation": "silu", "gated": True, "shared_expert": None}
    return SegMoE(4, 6, 3, **options).state_dict()


def checkpoint(**changes):
    """A list of experts as Mixtral names them, with values exchanged, or dropped where None."""
    state = convert_state_dict(gated(), "segmoe", "mixtral")
    state |= {name.replace("__", "."): value for name, value in changes.items()}
    return {key: value for key, value in state.items() if value is not None}


def experts(**changes):
    """A module as the experts interface describes it."""
    module = nn.Module()
    module.act_fn = nn.SiLU()
    module.gate_up_proj = nn.Parameter(draw(3, 12, 4))
    module.down_proj = nn.Parameter(draw(3, 4, 6))
    for name, value in changes.items():
        setattr(module, name, value)
    return module


class OwnGate(nn.Module):
    """Experts with a gate that isn't ``act(gate) * up``."""

    def _apply_gate(self, gate_up):
        return gate_up


def own_gate():
    module = experts()
    module.__class__ = OwnGate
    return module


run_experts = caller(
    experts_forward, self=experts(), hidden_states=draw(5, 4),
    top_k_index=torch.zeros(5, 1, dtype=torch.long), top_k_weights=draw(5, 1),
)  # fmt: skip


def forward(module):
    return run_experts(self=module)


convert = caller(convert_state_dict, state_dict=checkpoint(), source="mixtral")

ROWS = [
    ("convert_source_type", convert(source=1), TypeError, ["source", "be a str", "int"]),
    ("convert_source", convert(source="llama"), ValueError, ["source", "'time_moe'", "'llama'"]),
    ("convert_target", convert(target="x"), ValueError, ["target", "'segmoe'", "'x'"]),
    ("convert_type", convert(state_dict=[]), TypeError, ["state_dict", "be a mapping", "list"]),
    ("convert_names", convert(state_dict={0: draw(2)}), TypeError, ["state_dict", "str, got 0"]),
    (
        "convert_value",
        convert(state_dict=checkpoint(gate__weight=3.0)),
        TypeError,
        ["state_dict['gate.weight']", "be a tensor", "float"],
    ),
    (
        "convert_nothing",
        convert(state_dict={"head.weight": draw(2, 2)}),
        ValueError,
        ["state_dict", "experts as 'mixtral' names them", "head.weight"],
    ),
    (
        "convert_unknown",
        convert(state_dict=checkpoint(gate__bias=draw(3))),
        ValueError,
        ["state_dict", "no biases", "['gate.bias']"],
    ),
    (
        "convert_no_router",
        convert(state_dict=checkpoint(gate__weight=None)),
        ValueError,
        ["state_dict", "be complete", "no gate.weight"],
    ),
    (
        "convert_no_expert",
        convert(state_dict=checkpoint(experts__1__w2__weight=None)),
        ValueError,
        ["state_dict", "all experts 0 to 2 of w2", "[0, 2]"],
    ),
    (
        "convert_shapes",
        convert(state_dict=checkpoint(experts__1__w2__weight=draw(4, 5))),
        ValueError,
        ["state_dict", "one shape and dtype for w2", "(4, 5)", "(4, 6)"],
    ),
    (
        "convert_count",
        convert(
            source="mixtral_stacked",
            state_dict={
                "gate.weight": draw(2, 4),
                "experts.gate_up_proj": draw(3, 12, 4),
                "experts.down_proj": draw(3, 4, 6),
            },
        ),
        ValueError,
        ["state_dict", "2 experts in gate_up_proj", "[3, 12, 4]"],
    ),
    (
        "convert_target_lacks",
        convert(source="segmoe", target="mixtral", state_dict=LAYER.state_dict()),
        ValueError,
        ["target", "a name for every weight", "none for shared_"],
    ),
    (
        "convert_one_place",
        convert(
            source="segmoe",
            target="mixtral",
            state_dict={f"l.{n}.{key}": w for n in "ab" for key, w in gated().items()},
        ),
        ValueError,
        ["have nothing else where 'mixtral' puts 'l.b.'", "l.block_sparse_moe.experts.0.w1"],
    ),
    (
        "convert_plain",
        convert(
            source="segmoe",
            target="mixtral",
            state_dict=SegMoE(4, 6, 3, shared_expert=None).state_dict(),
        ),
        ValueError,
        ["state_dict", "be gated, as the target is", "no gate_proj"],
    ),
    (
        "experts_activation",
        forward(experts(act_fn=nn.Tanh())),
        ValueError,
        ["Module", "GELU, SiLU or ReLU", "Tanh"],
    ),
    (
        "experts_norm",
        forward(experts(has_post_expert_norm=True)),
        ValueError,
        ["no norm behind the experts"],
    ),
    (
        "experts_flags",
        forward(nn.Identity()),
        ValueError,
        ["Identity", "have act_fn, gate_up_proj"],
    ),
    (
        "experts_bias",
        forward(experts(has_bias=True)),
        ValueError,
        ["Module to have act_fn", "gate_up_proj_bias, down_proj_bias", "none of the name gate_up"],
    ),
    (
        "experts_states",
        run_experts(hidden_states=draw(1, 5, 4)),
        ValueError,
        ["hidden_states", "(N, D)", "(1, 5, 4)"],
    ),
    (
        "experts_states_type",
        run_experts(hidden_states=None),
        TypeError,
        ["hidden_states", "torch.Tensor", "NoneType"],
    ),
    (
        "experts_index",
        run_experts(top_k_index=draw(5, 1)),
        TypeError,
        ["top_k_index", "torch.int64", "got torch.float32"],
    ),
    (
        "experts_index_shape",
        run_experts(top_k_index=torch.zeros(5, dtype=torch.long)),
        ValueError,
        ["top_k_index", "(N=5, k)", "got (5,)"],
    ),
    (
        "experts_weights",
        run_experts(top_k_weights=draw(5, 2)),
        ValueError,
        ["top_k_weights", "(5, 1) as top_k_index", "(5, 2)"],
    ),
    ("experts_weights_type", run_experts(top_k_weights=None), TypeError, ["top_k_weights"]),
    ("register_name", caller(register_experts)(name=3), TypeError, ["name", "be a str", "int"]),
    ("experts_gate", forward(own_gate()), ValueError, ["OwnGate", "gate by act(gate) * up"]),
]
