"""Wrong models for `replace_ffn` and its relatives; rows as in `bad_calls`."""

from functools import partial
from types import SimpleNamespace

import torch
from bad_calls import LAYER, T, V, caller, draw, layer_with, real
from torch import nn

from segmoe_kernels import (
    SegMoE,
    replace_ffn,
    set_loss_scaler,
    shard_experts,
    swap_recipe,
    upcycle,
)
from segmoe_kernels.models.adapters import WithRouterLogits
from segmoe_kernels.models.loading import load_pretrained, with_recipe
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


class MoEFeedForward(nn.Module):
    """The name of a mixture that is swapped with its experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(dense() for _ in range(3))


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


class Pretrained(nn.Module):
    """The name of a loader."""

    from_pretrained = None


class Backwards(nn.Sequential):
    """A forward of its own."""


class Twice(nn.Module):
    """The children of a gated MLP, another function."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.gate_proj = nn.Linear(4, 6), nn.Linear(4, 6)
        self.down_proj, self.act_fn = nn.Linear(6, 4), nn.SiLU()

    def forward(self, x):
        """Twice the hidden layer that the children say."""
        return self.down_proj(2 * self.act_fn(self.gate_proj(x)) * self.up_proj(x))


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


def following(of_ffn=None, **changes):
    """A call with a changed recipe."""

    def make():
        recipe = swap_recipe(swapped())
        entry = recipe["ffns"]["ff"]
        entry["options"] |= of_ffn or {}
        entry |= {key: value for key, value in changes.items() if key in entry}
        recipe["ffns"] |= changes.get("ffns", {})
        recipe["format"] = changes.get("format", recipe["format"])
        return replace_ffn(model(), recipe=recipe)

    make.wrong = replace_ffn, {"recipe"}
    return make


grow = caller(upcycle, ffn=dense(), num_experts=2)
shard = caller(shard_experts, layer=LAYER)
scale = caller(set_loss_scaler, model=LAYER, scaler=None)
logits = caller(WithRouterLogits.forward, self=WithRouterLogits(LAYER), x=draw(2, 5, 4))

renew = caller(with_recipe, kind=nn.Linear, recipe={})
load = caller(load_pretrained, kind=Pretrained, path="here")

ROWS = [
    (swap(model=[dense()]), T, "torch.nn.Module | list"),
    (swap(copy_weights=1), T, "True or False | 1 (int)"),
    (swap(noise=-0.5), V, "finite and not negative | -0.5"),
    (swap(noise=0.5), V, "0 without copy_weights | 0.5"),
    (swap(match=3), T, "a regular expression | int"),
    (swap(match=nn.Linear), T, "name and module | class Linear"),
    (swap(match="(ff"), V, "regular expression | '(ff'"),
    (swap(match="fff"), V, "select an FFN | 'fff' | 'ff' (Sequential): is not selected"),
    (swap(match="head"), V, "TransformerEncoderLayer | 'head' (Linear): can't be a"),
    (swap(model=nn.ModuleList([nn.Linear(4, 4)])), V,
     "have inside what can be | nothing that looks like an FFN"),
    (swap(model=dense()), V, "(Sequential): is an FFN alone, of which upcycle() makes a layer"),
    (swap(segment_sizes=[2.5]), T, "int | 2.5"),
    (swap(segment_sizes=0), V, "at least 1"),
    (swap(segment_sizes=[3, 4]), V, "have 1 or num_layers=1 sizes | [3, 4]"),
    (partial(swap(segment_sizes="3,4")), V, "num_layers=1 | '3,4'"),
    (swap(num_experts="2"), T, "'2' (str)"),
    (swap(copy_weights=True, d_ff=7), V, "the dense FFN's 6 where its weights are copied | got 7"),
    (swap(copy_weights=True, expert_scope="segment"), V,
     "'token' where weights are copied | 'segment'"),
    (swap(copy_weights=True, num_experts=0), V, "at least 1 where weights are copied"),
    (partial(swap(model=nn.ModuleDict({"ff": MoEFeedForward()}), copy_weights=True)), V,
     "num_experts | be the mixture's 3 where its weights are copied | 2"),
    (swap(recipe={}), V, "recipe | be the only argument beside the model | others"),
    (lambda: replace_ffn(model(), recipe=[]), T, "recipe | mapping | list"),
    (following(format=2), V, "recipe | have the format 1 that this version can follow | got 2"),
    (following({"speed": 2}), V,
     "have the options of this version's SegMoE at 'ff' | others or none: ['speed']"),
    (following(inside="no"), V, "say of 'ff' ffn, parts, inside, | wrong ['inside']"),
    (following(ffn="MLP"), V, "fit the model, with a MLP at 'ff' | got Sequential"),
    (following(ffns={"up": {"ffn": "MLP"}}), V, "say of 'up' | wrong ['inside', 'may_look_ahead'"),
    (following(parts={"up": "0", "down": "2", "activation": "relu"}), V,
     "understands, at 'ff' | got computes something else than its parts say"),
    (following({"d_model": 8}), V, "have d_model=4 at 'ff', as the model | got 8"),
    (caller(swap_recipe)(model=3), T, "torch.nn.Module | int"),
    (lambda: swap_recipe(model()), V, "model | have swapped FFNs | ModuleDict"),
    (renew(kind=3), T, "kind | be a class | int"),
    (renew(recipe=3), T, "recipe | mapping | int"),
    (load(kind=nn.Linear), T, "kind | be a class of transformers' models | Linear"),
    (load(path=3), T, "path | int"),
    (partial(load(config=SimpleNamespace())), V,
     "path | have a recipe in its configuration | got 'here'"),
    (swap(causal=1), T, "True, False or None | 1 (int)"),
    (swap(aux_loss_weight="1"), T, "a float | '1' (str)"),
    (swap(z_loss_weight=-1.0), V, "not negative | -1.0"),
    (swap(parts=["0"]), T, "names to names | ['0']"),
    (swap(parts={"up": "0", "down": "2", "wide": "1"}), V,
     "'up', 'down' and 'activation' | ['down', 'up', 'wide']"),
    (swap(parts={"up": "wi", "down": "wo", "activation": "act"}, match="ff"), V,
     "'ff' (Sequential): lacks one of {'up': 'wi',"),
    (lambda: replace_ffn(iTransformer(), segment_sizes=3, num_experts=2), V,
     "model | 'ff' (Sequential): has variates for rows, no time steps"),
    (lambda: replace_ffn(Decoder(), segment_sizes=3, num_experts=2), V,
     "causal | for the decoder around 'ff' | None for Decoder"),
    (swap(model=FullyShardedDataParallel()), V,
     "be swapped before it is wrapped | FullyShardedDataParallel at ''"),
    (swap(example_inputs=3), T, "a tuple | int"),
    (swap(example_inputs=(torch.ones(1, 3, 4),)), V,
     "at least 2 sequences, (B, T, ...) | [(1, 3, 4)]"),
    (swap(example_inputs=(torch.ones(2, 3, 4, device="meta"),)), V,
     "have values | tensors on meta"),
    (real(swap(example_inputs=(torch.ones(2, 3, 4),))), V, "sequences that differ | equal ones"),
    (real(lambda: replace_ffn(Decoder(), segment_sizes=3, num_experts=2, causal=False,
     example_inputs=(STEPS,))), V, "model | keep its causality | experts at 'ff', which break it"),
    (real(lambda: replace_ffn(Decoder(), segment_sizes=7, num_experts=2, causal=True,
     shared_expert=None, example_inputs=(STEPS,))), V,
     "send 'ff' more than a single row | no change | at zero?"),
    (lambda: swapped()["ff"](draw(3, 4)), V, "SegMoE.forward | x | with a batch at 'ff' | (3, 4)"),
    (real(lambda: encoder_layer()(draw(2, 5, 4), src_mask=torch.full((5, 5), -torch.inf).triu(1))),
     V, "show later steps | causal=True | a causal mask"),
    (real(lambda: encoder_layer()(draw(2, 5, 4), src_key_padding_mask=torch.full((2, 5),
     -1000000000.0))), V, "below half of its dtype's lowest | -1000000000.0"),
    (lambda: encoder_layer()(draw(2, 5, 4), is_causal=True), V, "replace_ffn(causal=True) | True"),
    (lambda: swapped(Cached())(use_cache=True), V, "Cached | segments begin anew"),
    (lambda: swapped(Cached())(past_key_values=[]), V, "Cached | be None | list"),
    (grow(ffn=Backwards(*dense())), V, "Backwards, which extends Sequential"),
    (grow(ffn=Twice()), V, "Twice, which computes something else than its parts say"),
    (real(lambda: upcycle(nan_ffn(), 2)), V,
     "upcycle | compute at first what the FFN does | a difference of nan"),
    (grow(ffn="ffn"), T, "torch.nn.Module | str"),
    (grow(noise="0"), T, "be a float | '0' (str)"),
    (grow(ffn=nn.Linear(4, 4)), V, "a Sequential of Linear | got Linear"),
    (caller(WithRouterLogits)(layer=dense()), T, "be a SegMoE"),
    (lambda: WithRouterLogits(SegMoE(4, 6, 0)), V, "layer | have experts | num_experts=0"),
    (logits(x=draw(4)), V, "(..., T, d_model=4) | got (4,)"),
    (logits(padding_mask=1), T, "Tensor or None | int"),
    (grow(num_experts=0), V, "at least 1"),
    (caller(expert_parameter_names)(model=[]), T, "list"),
    (shard(layer=dense()), T, "be a SegMoE | Sequen"),
    (shard(average_gradients=2), T, "True or False | 2 (int)"),
    (lambda: shard_experts(SegMoE(4, 6, 0)), V, "layer | have experts | num_experts=0"),
    (lambda: shard_experts(layer_with(experts=torch.nn.Sequential())), T,
     "layer | without adapters, wrappers | Sequential"),
    (lambda: shard_experts(LAYER), RuntimeError,
     "shard_experts needs torch.distributed | init_process_group"),
    (caller(gather_experts)(layer=LAYER), T, "a layer from shard_experts | SegMoE"),
    (scale(model=[LAYER]), T, "torch.nn.Module | list"),
    (scale(scaler="1024"), T, "a number, None, or have scale(loss) | got str"),
    (scale(model=nn.Linear(2, 2)), V,
     "set_loss_scaler: expected model to have a SegMoE inside | Linear"),
    (scale(scaler=0.0), V, "positive, got 0"),
    (scale(scaler=True), T, "True (bool)"),
    (scale(scaler=Engine()), T, "be no module | got Engine"),
]  # fmt: skip
