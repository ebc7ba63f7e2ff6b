"""Wrong models and checkpoints for `replace_ffn` and its relatives; rows as in `bad_calls`."""

import torch
from bad_calls import LAYER, caller, draw
from torch import nn

from segmoe_kernels import (
    SegMoE,
    convert_state_dict,
    replace_ffn,
    set_loss_scaler,
    shard_experts,
    upcycle,
)  # fmt: skip
from segmoe_kernels.adapters import TSLibEncoderLayer, WithRouterLogits
from segmoe_kernels.huggingface import experts_forward
from segmoe_kernels.parallel import gather_experts


def dense():
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))


def model():
    return nn.ModuleDict({"ff": dense(), "head": nn.Linear(4, 2)})


def swap(**changes):
    """A call on a new model each time."""
    good = {"segment_sizes": 3, "num_experts": 2}
    return lambda: replace_ffn(**{"model": model(), **good, **changes})


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


def forward(module, ids=None):
    ids = torch.zeros(5, 1, dtype=torch.long) if ids is None else ids
    return lambda: experts_forward(module, draw(5, 4), ids, draw(5, 1))


convert = caller(convert_state_dict, state_dict=checkpoint(), source="mixtral")
grow = caller(upcycle, ffn=dense(), num_experts=2)
block = caller(
    TSLibEncoderLayer, attention=nn.Identity(), seg_moe=LAYER, norm1=nn.Identity(),
    norm2=nn.Identity(), dropout=nn.Identity(),
)  # fmt: skip

ROWS = [
    ("swap_model_type", swap(model=[dense()]), TypeError, ["model", "torch.nn.Module", "list"]),
    ("swap_flag", swap(copy_weights=1), TypeError, ["copy_weights", "True or False", "1 (int)"]),
    ("swap_noise", swap(noise=-0.5), ValueError, ["noise", "finite and not negative", "-0.5"]),
    ("swap_match_type", swap(match=3), TypeError, ["match", "a regular expression", "int"]),
    ("swap_match_syntax", swap(match="(ff"), ValueError, ["match", "regular expression", "'(ff'"]),
    (
        "swap_match_nothing",
        swap(match="fff"),
        ValueError,
        ["match", "select an FFN", "'fff'", "['ff', "],
    ),
    (
        "swap_match_other",
        swap(match="head"),
        ValueError,
        ["match", "TransformerEncoderLayer", "Linear at 'head'"],
    ),
    (
        "swap_model_without",
        swap(model=nn.ModuleList([nn.Linear(4, 4)])),
        ValueError,
        ["model", "have inside what can be", "['0']"],
    ),
    (
        "swap_model_is_ffn",
        swap(model=dense()),
        ValueError,
        ["model", "upcycle() makes a layer of an FFN alone", "Sequential"],
    ),
    ("swap_sizes_type", swap(segment_sizes=[2.5]), TypeError, ["segment_sizes", "int", "2.5"]),
    ("swap_sizes_value", swap(segment_sizes=0), ValueError, ["segment_sizes", "at least 1"]),
    (
        "swap_sizes_count",
        swap(segment_sizes=[3, 4]),
        ValueError,
        ["segment_sizes", "have 1 or 1 sizes", "[3, 4]"],
    ),
    ("swap_sizes_text", swap(segment_sizes="3,4"), ValueError, ["num_layers=1", "'3,4'"]),
    ("swap_experts", swap(num_experts="2"), TypeError, ["num_experts", "'2' (str)"]),
    (
        "swap_copied_width",
        swap(copy_weights=True, d_ff=7),
        ValueError,
        ["d_ff", "the dense FFN's 6 where its weights are copied", "got 7"],
    ),
    (
        "swap_copied_scope",
        swap(copy_weights=True, expert_scope="segment"),
        ValueError,
        ["expert_scope", "'token' where weights are copied", "'segment'"],
    ),
    (
        "swap_copied_nothing",
        swap(copy_weights=True, num_experts=0),
        ValueError,
        ["num_experts", "at least 1 where weights are copied"],
    ),
    ("upcycle_type", grow(ffn="ffn"), TypeError, ["ffn", "torch.nn.Module", "str"]),
    ("upcycle_noise", grow(noise="0"), TypeError, ["noise", "be a float", "'0' (str)"]),
    (
        "upcycle_other",
        grow(ffn=nn.Linear(4, 4)),
        ValueError,
        ["ffn", "a Sequential of Linear", "got Linear"],
    ),
    ("adapter_type", lambda: WithRouterLogits(dense()), TypeError, ["layer", "be a SegMoE"]),
    (
        "adapter_dense",
        lambda: WithRouterLogits(SegMoE(4, 6, 0)),
        ValueError,
        ["layer", "have experts", "num_experts=0"],
    ),
    ("block_layer", block(seg_moe=dense()), TypeError, ["seg_moe", "be a SegMoE", "Sequential"]),
    ("block_norm", block(norm1=None), TypeError, ["norm1", "torch.nn.Module", "NoneType"]),
    ("shard_type", lambda: shard_experts(dense()), TypeError, ["layer", "be a SegMoE", "Sequen"]),
    (
        "shard_flag",
        lambda: shard_experts(LAYER, average_gradients=2),
        TypeError,
        ["average_gradients", "True or False", "2 (int)"],
    ),
    (
        "shard_dense",
        lambda: shard_experts(SegMoE(4, 6, 0)),
        ValueError,
        ["layer", "have experts", "num_experts=0"],
    ),
    (
        "shard_alone",
        lambda: shard_experts(LAYER),
        RuntimeError,
        ["shard_experts needs torch.distributed", "init_process_group"],
    ),
    (
        "gather_type",
        lambda: gather_experts(LAYER),
        TypeError,
        ["layer", "a layer from shard_experts", "SegMoE"],
    ),
    (
        "scaler_model",
        lambda: set_loss_scaler([LAYER], None),
        TypeError,
        ["model", "torch.nn.Module", "list"],
    ),
    (
        "scaler_type",
        lambda: set_loss_scaler(LAYER, "1024"),
        TypeError,
        ["scaler", "a number, None, or have scale(loss)", "got str"],
    ),
    ("scaler_zero", lambda: set_loss_scaler(LAYER, 0.0), ValueError, ["scaler", "positive, got 0"]),
    ("scaler_flag", lambda: set_loss_scaler(LAYER, True), TypeError, ["scaler", "True (bool)"]),
    ("convert_source_type", convert(source=1), TypeError, ["source", "be a str", "int"]),
    ("convert_source", convert(source="llama"), ValueError, ["source", "'time_moe'", "'llama'"]),
    ("convert_target", convert(target="x"), ValueError, ["target", "'segmoe'", "'x'"]),
    ("convert_type", convert(state_dict=[]), TypeError, ["state_dict", "be a mapping", "list"]),
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
        ["state_dict", "one shape for w2", "(4, 5), (4, 6)"],
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
    ("experts_gate", forward(own_gate()), ValueError, ["OwnGate", "gate by act(gate) * up"]),
]
