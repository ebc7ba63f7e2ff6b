"""Wrong models for `replace_ffn` and its relatives; rows as in `bad_calls`."""

from types import SimpleNamespace

import torch
from bad_calls import LAYER, caller, draw, layer_with
from torch import nn

from segmoe_kernels import SegMoE, replace_ffn, set_loss_scaler, shard_experts, upcycle
from segmoe_kernels.models.adapters import TSLibEncoderLayer, WithRouterLogits
from segmoe_kernels.parallel import expert_parameter_names, gather_experts


def dense():
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))


def model():
    return nn.ModuleDict({"ff": dense(), "head": nn.Linear(4, 2)})


def swap(**changes):
    """A call on a new model each time."""
    good = {"segment_sizes": 3, "num_experts": 2}

    def make():
        return replace_ffn(**{"model": model(), **good, **changes})

    make.wrong = replace_ffn, set(changes)
    return make


swap.function = replace_ffn


STEPS = torch.arange(40.0).view(2, 5, 4)


class iTransformer(nn.Module):
    """A model that is known to have variates for rows."""

    def __init__(self):
        super().__init__()
        self.ff = dense()

    def forward(self, x):
        """Apply the FFN alone."""
        return self.ff(x)


class Decoder(iTransformer):
    """A model that says that it must not look ahead."""

    is_causal = True


class FullyShardedDataParallel(iTransformer):
    """The name of a wrapper that has listed the model's parameters."""


class Engine(nn.Module):
    """What trains a model and is a module itself, as DeepSpeed's is."""

    def scale(self, loss):
        """Multiply."""
        return 7 * loss


class Cached(iTransformer):
    """A model with a key-value cache."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(use_cache=False)

    def get_input_embeddings(self):
        """What tells a model of transformers."""


class Backwards(nn.Sequential):
    """A forward of its own."""


class Twice(nn.Module):
    """The children of a gated MLP, another function."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.gate_proj = nn.Linear(4, 6), nn.Linear(4, 6)
        self.down_proj, self.act_fn = nn.Linear(6, 4), nn.SiLU()

    def forward(self, x):
        """Twice what the children say."""
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def swapped(host=None):
    host = model() if host is None else host
    replace_ffn(host, segment_sizes=3, num_experts=2)
    return host


def encoder_layer():
    return swapped(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True))


def nan_ffn():
    ffn = dense()
    nn.init.constant_(ffn[0].weight, torch.nan)
    return ffn


grow = caller(upcycle, ffn=dense(), num_experts=2)
shard = caller(shard_experts, layer=LAYER)
scale = caller(set_loss_scaler, model=LAYER, scaler=None)
logits = caller(WithRouterLogits.forward, self=WithRouterLogits(LAYER), x=draw(2, 5, 4))
block = caller(
    TSLibEncoderLayer, attention=nn.Identity(), seg_moe=LAYER, norm1=nn.Identity(),
    norm2=nn.Identity(), dropout=nn.Identity(),
)  # fmt: skip

ROWS = [
    ("swap_model_type", swap(model=[dense()]), TypeError, ["model", "torch.nn.Module", "list"]),
    ("swap_flag", swap(copy_weights=1), TypeError, ["copy_weights", "True or False", "1 (int)"]),
    ("swap_noise", swap(noise=-0.5), ValueError, ["noise", "finite and not negative", "-0.5"]),
    ("swap_noise_alone", swap(noise=0.5), ValueError, ["noise", "0 without copy_weights", "0.5"]),
    ("swap_match_type", swap(match=3), TypeError, ["match", "a regular expression", "int"]),
    (
        "swap_match_class",
        swap(match=nn.Linear),
        TypeError,
        ["match", "name and module", "class Linear"],
    ),
    ("swap_match_syntax", swap(match="(ff"), ValueError, ["match", "regular expression", "'(ff'"]),
    (
        "swap_match_nothing",
        swap(match="fff"),
        ValueError,
        ["match", "select an FFN", "'fff'", "'ff' (Sequential): is not selected"],
    ),
    (
        "swap_match_other",
        swap(match="head"),
        ValueError,
        ["match", "TransformerEncoderLayer", "'head' (Linear): can't be a"],
    ),
    (
        "swap_model_without",
        swap(model=nn.ModuleList([nn.Linear(4, 4)])),
        ValueError,
        ["model", "have inside what can be", "nothing that looks like an FFN"],
    ),
    (
        "swap_model_is_ffn",
        swap(model=dense()),
        ValueError,
        ["model", "(Sequential): is an FFN alone, of which upcycle() makes a layer"],
    ),
    ("swap_sizes_type", swap(segment_sizes=[2.5]), TypeError, ["segment_sizes", "int", "2.5"]),
    ("swap_sizes_value", swap(segment_sizes=0), ValueError, ["segment_sizes", "at least 1"]),
    (
        "swap_sizes_count",
        swap(segment_sizes=[3, 4]),
        ValueError,
        ["segment_sizes", "have 1 or num_layers=1 sizes", "[3, 4]"],
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
    ("swap_causal", swap(causal=1), TypeError, ["causal", "True, False or None", "1 (int)"]),
    ("swap_aux", swap(aux_loss_weight="1"), TypeError, ["aux_loss_weight", "a float", "'1' (str)"]),
    ("swap_z", swap(z_loss_weight=-1.0), ValueError, ["z_loss_weight", "not negative", "-1.0"]),
    ("swap_parts_type", swap(parts=["0"]), TypeError, ["parts", "names to names", "['0']"]),
    (
        "swap_parts_keys",
        swap(parts={"up": "0", "down": "2", "wide": "1"}),
        ValueError,
        ["parts", "'up', 'down' and 'activation'", "['down', 'up', 'wide']"],
    ),
    (
        "swap_parts_nothing",
        swap(parts={"up": "wi", "down": "wo", "activation": "act"}, match="ff"),
        ValueError,
        ["match", "'ff' (Sequential): lacks one of {'up': 'wi',"],
    ),
    (
        "swap_inverted",
        lambda: replace_ffn(iTransformer(), segment_sizes=3, num_experts=2),
        ValueError,
        ["model", "time steps for rows at 'ff'", "iTransformer, whose rows are variates"],
    ),
    (
        "swap_decoder",
        lambda: replace_ffn(Decoder(), segment_sizes=3, num_experts=2),
        ValueError,
        ["causal", "for the decoder around 'ff'", "None for Decoder"],
    ),
    (
        "swap_wrapped",
        swap(model=FullyShardedDataParallel()),
        ValueError,
        ["model", "be swapped before it is wrapped", "FullyShardedDataParallel at ''"],
    ),
    ("swap_example_type", swap(example_inputs=3), TypeError, ["example_inputs", "a tuple", "int"]),
    (
        "swap_example_shape",
        swap(example_inputs=(torch.ones(1, 3, 4),)),
        ValueError,
        ["example_inputs", "at least 2 sequences, (B, T, ...)", "[(1, 3, 4)]"],
    ),
    (
        "swap_example_meta",
        swap(example_inputs=(torch.ones(2, 3, 4, device="meta"),)),
        ValueError,
        ["example_inputs", "have values", "tensors on meta"],
    ),
    (
        "swap_example_equal",
        swap(example_inputs=(torch.ones(2, 3, 4),)),
        ValueError,
        ["example_inputs", "sequences that differ", "equal ones"],
    ),
    (
        "swap_example_breaks",
        lambda: replace_ffn(
            Decoder(), segment_sizes=3, num_experts=2, causal=False, example_inputs=(STEPS,)
        ),
        ValueError,
        ["model", "keep its causality", "experts at 'ff', which break it"],
    ),
    (
        "swap_example_unseen",
        lambda: replace_ffn(
            Decoder(),
            segment_sizes=7,
            num_experts=2,
            causal=True,
            shared_expert=None,
            example_inputs=(STEPS,),
        ),
        ValueError,
        ["example_inputs", "send 'ff' more than a single row", "no change", "at zero?"],
    ),
    (
        "swapped_rows",
        lambda: swapped()["ff"](draw(3, 4)),
        ValueError,
        ["SegMoE.forward", "x", "with a batch at 'ff'", "(3, 4)"],
    ),
    (
        "encoder_causal_mask",
        lambda: encoder_layer()(draw(2, 5, 4), src_mask=torch.full((5, 5), -torch.inf).triu(1)),
        ValueError,
        ["src_mask", "show later steps", "causal=True", "a causal mask"],
    ),
    (
        "swapped_mask",
        lambda: encoder_layer()(draw(2, 5, 4), src_key_padding_mask=torch.full((2, 5), -1e9)),
        ValueError,
        ["src_key_padding_mask", "below half of its dtype's lowest", "-1000000000.0"],
    ),
    (
        "swapped_causal",
        lambda: encoder_layer()(draw(2, 5, 4), is_causal=True),
        ValueError,
        ["is_causal", "replace_ffn(causal=True)", "True"],
    ),
    (
        "swapped_cache",
        lambda: swapped(Cached())(use_cache=True),
        ValueError,
        ["Cached", "use_cache", "segments begin anew"],
    ),
    (
        "swapped_past",
        lambda: swapped(Cached())(past_key_values=[]),
        ValueError,
        ["Cached", "past_key_values", "be None", "list"],
    ),
    (
        "upcycle_forward",
        grow(ffn=Backwards(*dense())),
        ValueError,
        ["ffn", "Backwards, which extends Sequential"],
    ),
    (
        "upcycle_differs",
        grow(ffn=Twice()),
        ValueError,
        ["ffn", "Twice, which computes something else than its parts say"],
    ),
    (
        "upcycle_nan",
        lambda: upcycle(nan_ffn(), 2),
        ValueError,
        ["upcycle", "compute at first what the FFN does", "a difference of nan"],
    ),
    ("upcycle_type", grow(ffn="ffn"), TypeError, ["ffn", "torch.nn.Module", "str"]),
    ("upcycle_noise", grow(noise="0"), TypeError, ["noise", "be a float", "'0' (str)"]),
    (
        "upcycle_other",
        grow(ffn=nn.Linear(4, 4)),
        ValueError,
        ["ffn", "a Sequential of Linear", "got Linear"],
    ),
    ("adapter_type", caller(WithRouterLogits)(layer=dense()), TypeError, ["layer", "be a SegMoE"]),
    (
        "adapter_dense",
        lambda: WithRouterLogits(SegMoE(4, 6, 0)),
        ValueError,
        ["layer", "have experts", "num_experts=0"],
    ),
    ("block_layer", block(seg_moe=dense()), TypeError, ["seg_moe", "be a SegMoE", "Sequential"]),
    ("block_norm", block(norm1=None), TypeError, ["norm1", "torch.nn.Module", "NoneType"]),
    ("block_norm2", block(norm2=1), TypeError, ["norm2", "torch.nn.Module", "int"]),
    ("block_attention", block(attention=None), TypeError, ["attention", "NoneType"]),
    ("block_dropout", block(dropout=0.1), TypeError, ["dropout", "torch.nn.Module", "float"]),
    ("logits_x", logits(x=draw(4)), ValueError, ["x", "(..., T, d_model=4)", "got (4,)"]),
    ("logits_mask", logits(padding_mask=1), TypeError, ["padding_mask", "Tensor or None", "int"]),
    ("upcycle_experts", grow(num_experts=0), ValueError, ["num_experts", "at least 1"]),
    ("names_model", caller(expert_parameter_names)(model=[]), TypeError, ["model", "list"]),
    ("shard_type", shard(layer=dense()), TypeError, ["layer", "be a SegMoE", "Sequen"]),
    (
        "shard_flag",
        shard(average_gradients=2),
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
        "shard_wrapped",
        lambda: shard_experts(layer_with(experts=torch.nn.Sequential())),
        TypeError,
        ["layer", "without adapters, wrappers", "Sequential"],
    ),
    (
        "shard_alone",
        lambda: shard_experts(LAYER),
        RuntimeError,
        ["shard_experts needs torch.distributed", "init_process_group"],
    ),
    (
        "gather_type",
        caller(gather_experts)(layer=LAYER),
        TypeError,
        ["layer", "a layer from shard_experts", "SegMoE"],
    ),
    (
        "scaler_model",
        scale(model=[LAYER]),
        TypeError,
        ["model", "torch.nn.Module", "list"],
    ),
    (
        "scaler_type",
        scale(scaler="1024"),
        TypeError,
        ["scaler", "a number, None, or have scale(loss)", "got str"],
    ),
    (
        "scaler_no_layer",
        scale(model=nn.Linear(2, 2)),
        ValueError,
        ["set_loss_scaler: expected model to have a SegMoE inside", "Linear"],
    ),
    ("scaler_zero", scale(scaler=0.0), ValueError, ["scaler", "positive, got 0"]),
    ("scaler_flag", scale(scaler=True), TypeError, ["scaler", "True (bool)"]),
    ("scaler_module", scale(scaler=Engine()), TypeError, ["scaler", "be no module", "got Engine"]),
]
