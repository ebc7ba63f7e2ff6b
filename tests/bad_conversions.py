"""Wrong checkpoints and modules of other models' experts; rows as in `bad_calls`."""

import torch
from bad_calls import LAYER, T, V, caller, draw
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
    (convert(source=1), T, "be a str | int"),
    (convert(source="llama"), V, "'time_moe' | 'llama'"),
    (convert(target="x"), V, "'segmoe' | 'x'"),
    (convert(state_dict=[]), T, "be a mapping | list"),
    (convert(state_dict={0: draw(2)}), T, "str, got 0"),
    (convert(state_dict=checkpoint(gate__weight=3.0)), T,
     "state_dict['gate.weight'] | be a tensor | float"),
    (convert(state_dict={"head.weight": draw(2, 2)}), V,
     "experts as 'mixtral' names them | head.weight"),
    (convert(state_dict=checkpoint(gate__bias=draw(3))), V, "no biases | ['gate.bias']"),
    (convert(state_dict=checkpoint(gate__weight=None)), V, "be complete | no gate.weight"),
    (convert(state_dict=checkpoint(experts__1__w2__weight=None)), V,
     "all experts 0 to 2 of w2 | [0, 2]"),
    (convert(state_dict=checkpoint(experts__1__w2__weight=draw(4, 5))), V,
     "one shape and dtype for w2 | (4, 5) | (4, 6)"),
    (convert(source="mixtral_stacked", state_dict={"gate.weight": draw(2, 4),
     "experts.gate_up_proj": draw(3, 12, 4), "experts.down_proj": draw(3, 4, 6)}), V,
     "2 experts in gate_up_proj | [3, 12, 4]"),
    (convert(source="segmoe", target="mixtral", state_dict=LAYER.state_dict()), V,
     "a name for every weight | none for shared_"),
    (convert(source="segmoe", target="mixtral", state_dict={f"l.{n}.{key}": w for n in "ab" for key,
     w in gated().items()}), V,
     "have nothing else where 'mixtral' puts 'l.b.' | l.block_sparse_moe.experts.0.w1"),
    (convert(source="segmoe", target="mixtral", state_dict=SegMoE(4, 6, 3,
     shared_expert=None).state_dict()), V, "be gated, as the target is | no gate_proj"),
    (forward(experts(act_fn=nn.Tanh())), V, "Module | GELU, SiLU or ReLU | Tanh"),
    (forward(experts(has_post_expert_norm=True)), V, "no norm behind the experts"),
    (forward(nn.Identity()), V, "Identity | have act_fn, gate_up_proj"),
    (forward(experts(has_bias=True)), V,
     "Module to have act_fn | gate_up_proj_bias, down_proj_bias | none of the name gate_up"),
    (run_experts(hidden_states=draw(1, 5, 4)), V, "(N, D) | (1, 5, 4)"),
    (run_experts(hidden_states=None), T, "torch.Tensor | NoneType"),
    (run_experts(top_k_index=draw(5, 1)), T, "torch.int64 | got torch.float32"),
    (run_experts(top_k_index=torch.zeros(5, dtype=torch.long)), V, "(N=5, k) | got (5,)"),
    (run_experts(top_k_weights=draw(5, 2)), V, "(5, 1) as top_k_index | (5, 2)"),
    (run_experts(top_k_weights=None), T, "top_k_weights"),
    (caller(register_experts)(name=3), T, "be a str | int"),
    (forward(own_gate()), V, "OwnGate | gate by act(gate) * up"),
]  # fmt: skip
