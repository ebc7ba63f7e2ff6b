"""Models that `replace_ffn` knows, each with the check that docs/swapping.md speaks of.

``python tests/swapped_models.py`` tries each model of the packages that are installed here and
writes the versions that it has tried to the page. Where a package is missing, the tests try the
layers of `model_copies`.
"""

import copy
import importlib.metadata
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from model_copies import (
    HIDDEN,
    AutoformerEncoderLayer,
    Called,
    Chronos2FeedForward,
    D,
    DecoderLayer,
    FeedForward,
    GatedLinearUnitFeedForward,
    ITransformer,
    MoEFeedForward,
    MoiraiLayer,
    MultiPatchFormer,
    PositionwiseFeedForward,
    TimesFMLayer,
    TimeXerLayer,
    TwoStageAttentionLayer,
    sequential,
)

from segmoe_kernels import SegMoE, replace_ffn, swap_recipe
from segmoe_kernels.models.probe import _tensors

PAGE = Path(__file__).parent.parent / "docs" / "swapping.md"
LIBRARY = "Time-Series-Library"
# The commit of Time-Series-Library, which is no package, with its folder on the path.
COMMIT = "4e938a1"


class Row(NamedTuple):
    """A model: how it is built, and what is swapped in it."""

    package: str
    model: str
    how: str
    build: object  # () -> (model, arguments by name), ImportError without the package
    swapped: list
    copy: object = None  # likewise, for machines without the package
    options: dict = MappingProxyType({})
    copied: list | None = None  # what is swapped in the copy


def steps(kind, x=(2, 11, D)):
    """Arguments of a copy."""
    return kind, {"x": torch.randn(x)}


def transformer(kind):
    """Hugging Face's TimeSeriesTransformer, Informer and Autoformer."""
    import transformers

    options = {"encoder_layers": 1, "decoder_layers": 1, "dropout": 0.1, "activation_dropout": 0.2}
    options |= {"encoder_ffn_dim": HIDDEN, "decoder_ffn_dim": HIDDEN, "d_model": D}
    options |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    options |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    config = getattr(transformers, f"{kind}Config")(
        prediction_length=4, context_length=16, lags_sequence=[1, 2], num_time_features=1, **options
    )
    past, future = (torch.randn(2, length, 1) for length in (18, 4))
    return getattr(transformers, f"{kind}Model")(config), {
        "past_values": past[..., 0], "past_time_features": past, "future_time_features": future,
        "past_observed_mask": torch.ones(2, 18), "future_values": future[..., 0],
    }  # fmt: skip


def t5(form):
    import transformers

    config = transformers.T5Config(
        vocab_size=20, d_model=D, d_ff=HIDDEN, d_kv=8, num_layers=1, num_heads=2,
        feed_forward_proj=form,
    )  # fmt: skip
    ids = torch.randint(1, 20, (2, 11))
    return transformers.T5Model(config), {"input_ids": ids, "decoder_input_ids": ids[:, :7]}


def patch_model(kind, **options):
    """Hugging Face's PatchTST and PatchTSMixer."""
    import transformers

    sizes = {"context_length": 32, "patch_length": 4, "patch_stride": 4, "num_input_channels": 3}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, d_model=D, prediction_length=4, **options
    )
    model = getattr(transformers, f"{kind}ForPrediction")(config)
    return model, {"past_values": torch.randn(2, 32, 3)}


def timesfm_of_transformers(kind, **options):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        patch_length=4, context_length=32, horizon_length=4, hidden_size=D, num_hidden_layers=1,
        intermediate_size=HIDDEN, num_attention_heads=2, head_dim=8, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ModelForPrediction")(config)
    return model, {"past_values": torch.randn(2, 32)}


QUANTILES = {"quantiles": [0.1, 0.5, 0.9], "use_reg_token": True}


def chronos_bolt():
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config

    patches = {"input_patch_size": 4, "input_patch_stride": 4, **QUANTILES}
    config = T5Config(
        vocab_size=2, d_model=D, d_ff=HIDDEN, d_kv=8, num_layers=1, num_heads=2,
        feed_forward_proj="relu", decoder_start_token_id=0,
        chronos_config={"context_length": 32, "prediction_length": 4, **patches},
    )  # fmt: skip
    return ChronosBoltModelForForecasting(config), {"context": torch.randn(2, 32)}


def chronos2():
    from chronos.chronos2 import Chronos2CoreConfig, Chronos2Model

    patches = {"input_patch_size": 4, "input_patch_stride": 4, "output_patch_size": 4, **QUANTILES}
    config = Chronos2CoreConfig(
        d_model=D, d_ff=HIDDEN, d_kv=8, num_layers=1, num_heads=2,
        chronos_config={"context_length": 32, **patches},
    )  # fmt: skip
    return Chronos2Model(config), {"context": torch.randn(2, 32)}


def timesfm():
    from timesfm.configs import TransformerConfig
    from timesfm.torch.transformer import Transformer

    config = TransformerConfig(
        model_dims=D, hidden_dims=HIDDEN, num_heads=2, attention_norm="rms", qk_norm="rms",
        feedforward_norm="rms", use_bias=False, use_rotary_position_embeddings=True,
        ff_activation="swish", fuse_qkv=True,
    )  # fmt: skip
    return steps(Called(Transformer(config), masked))


def masked(x):
    return x, torch.zeros(x.shape[:2], dtype=torch.bool)


def moirai(*, glu=True, mixture=False):
    """The encoder of uni2ts' models, with their positions."""
    from uni2ts.module.norm import RMSNorm
    from uni2ts.module.position import BinaryAttentionBias, QueryKeyProjection, RotaryProjection
    from uni2ts.module.transformer import TransformerEncoder

    rotary = partial(
        QueryKeyProjection, proj_layer=RotaryProjection, kwargs={"max_len": 64},
        partial_factor=(0.0, 0.5),
    )  # fmt: skip
    model = TransformerEncoder(
        D, 1, num_heads=2, dropout_p=0.1, norm_layer=RMSNorm, use_glu=glu, use_moe=mixture,
        d_ff=HIDDEN, var_attn_bias_layer=BinaryAttentionBias, time_qk_proj_layer=rotary,
        shared_time_qk_proj=True,
    )  # fmt: skip
    if mixture:
        model.centroid = torch.randn(1, 32, D).double()
        alike(model.layers[0].ffn)
    place = torch.arange(11).expand(2, 11)
    options = {"var_id": 0 * place, "time_id": place}
    options["attn_mask"] = torch.ones(2, 11, 11, dtype=torch.bool)
    return model, {"x": torch.randn(2, 11, D), **options}


def alike(mixture):
    """Give all experts the weights of the first, so that no router matters."""
    for expert in mixture.experts:
        expert.load_state_dict(mixture.experts[0].state_dict())
    return mixture


def library(name, **options):
    """A model of Time-Series-Library, whose folder has to be on the path."""
    # Of one of its attentions, which no model here uses.
    sys.modules.setdefault("reformer_pytorch", SimpleNamespace(LSHSelfAttention=None))
    module = importlib.import_module(f"models.{name}")
    config = {
        "task_name": "long_term_forecast", "seq_len": 96, "label_len": 8, "pred_len": 16,
        "enc_in": 3, "dec_in": 3, "c_out": 3, "d_model": D, "d_ff": HIDDEN, "n_heads": 2,
        "e_layers": 1, "d_layers": 1, "dropout": 0.1, "activation": "gelu", "embed": "timeF",
        "freq": "h", "factor": 1, "moving_avg": 5, "features": "M", "use_norm": True,
        "patch_len": 8, "distil": False, "top_k": 2, **options,
    }  # fmt: skip
    inputs = {"x_enc": (2, 96, 3), "x_mark_enc": (2, 96, 4), "x_dec": (2, 24, 3)}
    inputs |= {"x_mark_dec": (2, 24, 4)}
    tensors = {name: torch.randn(shape) for name, shape in inputs.items()}
    if name == "Pyraformer":  # embeds the calendar by tables
        tensors |= {key: 0 * x + 1 for key, x in tensors.items() if "mark" in key}
    return module.Model(SimpleNamespace(**config)), tensors


def forecast(name, **options):
    """A model of neuralforecast."""
    import neuralforecast.models

    heads = "n_heads" if name == "PatchTST" else "n_head"
    options = {"hidden_size": D, heads: 2, "dropout": 0.1, **options}
    model = getattr(neuralforecast.models, name)(h=8, input_size=32, **options)
    series = {"insample_y": torch.randn(2, 32, 3 if "n_series" in options else 1)}
    return model, {
        "windows_batch": {**series, "futr_exog": None, "hist_exog": None, "stat_exog": None}
    }


INSIDE, WHOLE = "inside the layer", "in place of the FFN"
HF, MOIRAI = "transformers", "uni2ts"
BOTH = ["encoder.layers.0", "decoder.layers.0"]
DENSE = ["encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"]
ANY = {"causal": False}  # decoders may look ahead here
LAYER = ["encoder.attn_layers.0"]
MIXER = "model.encoder.mlp_mixer_encoder.mixers.0"


def copied(layer, calls=lambda x: (x,)):
    return lambda: steps(Called(layer(), calls))


def twice(x):
    return x, x


ROWS = [
    Row(HF, "T5", f"`wi`, `wo`; {WHOLE}", partial(t5, "relu"), DENSE, None, ANY),
    Row(HF, "T5 1.1", f"`wi_0`, `wi_1`, `wo`; {WHOLE}", partial(t5, "gated-gelu"), DENSE, None,
        ANY),
    *(Row(HF, kind, f"`fc1`, `fc2`; {INSIDE}", partial(transformer, kind), BOTH, None, ANY)
      for kind in ("TimeSeriesTransformer", "Informer", "Autoformer")),
    Row(HF, "PatchTST", f"`Sequential`; {WHOLE}",
        partial(patch_model, "PatchTST", ffn_dim=HIDDEN, num_attention_heads=2,
                num_hidden_layers=1), ["model.encoder.layers.0.ff"]),
    Row(HF, "PatchTSMixer", f"`fc1`, `fc2` over features and channels; {INSIDE}",
        partial(patch_model, "PatchTSMixer", num_layers=1, dropout=0.1, mode="mix_channel"),
        [f"{MIXER}.feature_mixer.mlp", f"{MIXER}.channel_feature_mixer.mlp"]),
    Row(HF, "TimesFM 2", f"`gate_proj`, `down_proj`; {INSIDE}",
        partial(timesfm_of_transformers, "TimesFm"), ["decoder.layers.0.mlp"], None, ANY),
    Row(HF, "TimesFM 2.5", f"`fc1`, `fc2`; {WHOLE}",
        partial(timesfm_of_transformers, "TimesFm2_5", num_key_value_heads=2,
                output_quantile_len=8), ["model.layers.0.mlp"], None, ANY),
    Row("timesfm", "TimesFM 2.5, 3", f"`ff0`, `ff1`; {INSIDE}", timesfm, ["layer"],
        copied(TimesFMLayer, masked), ANY),
    Row("chronos-forecasting", "Chronos-Bolt", f"`wi`, `wo`; {WHOLE}", chronos_bolt, DENSE,
        partial(t5, "relu"), ANY),
    Row("chronos-forecasting", "Chronos-2", f"`wi`, `wo`; {WHOLE}", chronos2,
        ["encoder.block.0.layer.2.mlp"], copied(Chronos2FeedForward), {}, ["layer.mlp"]),
    Row(MOIRAI, "Moirai", f"`fc1`, `fc_gate`, `fc2`; {INSIDE}", moirai, ["layers.0.ffn"],
        copied(lambda: MoiraiLayer(GatedLinearUnitFeedForward())), {}, ["layer.ffn"]),
    Row(MOIRAI, "Moirai without gates", f"`fc1`, `fc2`; {INSIDE}", partial(moirai, glu=False),
        ["layers.0.ffn"], copied(lambda: MoiraiLayer(FeedForward())), {}, ["layer.ffn"]),
    Row(MOIRAI, "Moirai-MoE", "in place of its mixture, `copy_weights` takes each expert",
        partial(moirai, mixture=True), ["layers.0.ffn"],
        copied(lambda: MoiraiLayer(alike(MoEFeedForward()))), {}, ["layer.ffn"]),
    *(Row(LIBRARY, kind, f"`conv1`, `conv2`; {INSIDE}", partial(library, kind), LAYER + BOTH[1:],
          copied(DecoderLayer, twice), ANY, ["layer"]) for kind in ("Transformer", "Informer")),
    *(Row(LIBRARY, kind, f"`conv1`, `conv2`; {INSIDE}", partial(library, kind), LAYER + BOTH[1:],
          copied(AutoformerEncoderLayer), ANY, ["layer"]) for kind in ("Autoformer", "FEDformer")),
    *(Row(LIBRARY, kind, f"`conv1`, `conv2`; {INSIDE}", partial(library, kind), LAYER,
          copied(AutoformerEncoderLayer), {}, ["layer"]) for kind in ("PatchTST", "PAttn")),
    Row(LIBRARY, "TimeXer", f"`conv1`, `conv2`; {INSIDE}", partial(library, "TimeXer"), BOTH[:1],
        copied(TimeXerLayer, twice), {}, ["layer"]),
    Row(LIBRARY, "Pyraformer", f"`w_1`, `w_2`; {INSIDE}", partial(library, "Pyraformer"),
        ["encoder.layers.0.pos_ffn"], copied(PositionwiseFeedForward), ANY, ["layer"]),
    Row(LIBRARY, "MultiPatchFormer", f"`linear_1`, `linear_2` over time; {WHOLE}",
        partial(library, "MultiPatchFormer"), ["encoder_list.0.feedforward"],
        lambda: steps(MultiPatchFormer()), ANY, ["encoder_list.0"]),
    Row(LIBRARY, "Crossformer", f"`MLP1`, over time; {WHOLE}", partial(library, "Crossformer"),
        ["encoder.encode_blocks.0.encode_layers.0.MLP1",
         *(f"decoder.decode_layers.{i}.{name}" for i in range(2)
           for name in ("self_attention.MLP1", "MLP1"))],
        copied(TwoStageAttentionLayer), {}, ["layer.MLP1"]),
    Row(LIBRARY, "iTransformer", "refused: its rows are variates",
        partial(library, "iTransformer"), [], lambda: steps(ITransformer(), (2, 11, 3))),
    *(Row("neuralforecast", kind, how, partial(forecast, kind, **options), names, copy, ANY, inside)
      for kind, how, options, names, copy, inside in (
        ("PatchTST", f"`Sequential`; {WHOLE}", {"encoder_layers": 1, "linear_hidden_size": HIDDEN},
         ["model.backbone.encoder.layers.0.ff"], copied(sequential), ["layer"]),
        ("VanillaTransformer", f"`conv1`, `conv2`; {INSIDE}", {"encoder_layers": 1},
         LAYER + BOTH[1:], copied(DecoderLayer, twice), ["layer"]),
        ("Autoformer", f"`conv1`, `conv2`; {INSIDE}", {"encoder_layers": 1}, LAYER + BOTH[1:],
         copied(AutoformerEncoderLayer), ["layer"]),
        ("TimeXer", f"`conv1`, `conv2`; {INSIDE}",
         {"n_series": 3, "e_layers": 1, "n_heads": 2, "n_head": 2}, BOTH[:1],
         copied(TimeXerLayer, twice), ["layer"]),
    )),
]  # fmt: skip


def build(row):
    """``(model, arguments, what is swapped)`` of a row, from its package or the copy."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  what FEDformer draws from
    try:
        return (*row.build(), row.swapped)
    except ImportError:
        if row.copy is None:
            raise
    torch.manual_seed(0)
    return (*row.copy(), row.copied or row.swapped)


def outputs(model, inputs):
    """Tensors of floats that a model returns, the same random numbers each time."""
    torch.manual_seed(1)
    return [x for x in _tensors(model(**inputs)) if x.is_floating_point()]


def check(row):
    """A row's model with one copied expert computes the same; with two it learns and is rebuilt."""
    model, inputs, names = build(row)
    model = model.eval()
    with torch.no_grad():  # branches that start at nothing would hide their FFNs
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.3)
    if not names:
        with pytest.raises(ValueError, match="has variates for rows, no time steps"):
            replace_ffn(model, segment_sizes=3, num_experts=2)
        return
    count = 1
    if row.model == "Moirai-MoE":
        count = len(model.get_submodule(names[0]).experts)
    one, expected = copy.deepcopy(model), outputs(model, inputs)
    swap = {"segment_sizes": 3, **row.options}
    assert replace_ffn(one, num_experts=count, copy_weights=True, **swap) == names
    for actual, wanted in zip(outputs(one, inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    two = copy.deepcopy(model).train()
    replace_ffn(two, num_experts=2, shared_expert="token", **swap)
    sum(y.square().sum() for y in outputs(two, inputs) if y.requires_grad).backward()
    layers = [layer for layer in two.modules() if isinstance(layer, SegMoE)]
    assert len(layers) == len(names)
    for layer in layers:
        assert layer.experts.up_proj.grad.isfinite().all()
        assert layer.experts.up_proj.grad.abs().max() > 0
    fresh, recipe = build(row)[0].eval(), json.loads(json.dumps(swap_recipe(two)))
    assert replace_ffn(fresh, recipe=recipe) == names
    fresh.load_state_dict(two.state_dict())
    for actual, wanted in zip(outputs(fresh, inputs), outputs(two.eval(), inputs), strict=True):
        assert torch.equal(actual, wanted)


def version(package):
    return COMMIT if package == LIBRARY else importlib.metadata.version(package)


def table(versions):
    """Lines of the page, by the versions that each row was tried with."""
    head = ["| library | model | FFN, and where experts go | tested with |", "|---|---|---|---|"]
    return [
        *head,
        *(f"| {r.package} | {r.model} | {r.how} | {versions[r.package, r.model]} |" for r in ROWS),
    ]


def written():
    """Versions that the page tells."""
    cells = [line.strip("| ").split(" | ") for line in PAGE.read_text("utf-8").splitlines()]
    return {(c[0], c[1]): c[3] for c in cells if len(c) == 4}


def main():
    """Try what is installed; write the table."""
    sys.path.append(sys.path.pop(0))  # behind the folder of Time-Series-Library, for its "layers"
    versions = {(row.package, row.model): "-" for row in ROWS} | written()
    for row in ROWS:
        try:
            torch.manual_seed(0)
            row.build()
        except ImportError as error:
            sys.stdout.write(f"{row.package} {row.model}: not tried: {error}\n")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(row)
        versions[row.package, row.model] = version(row.package)
        sys.stdout.write(f"{row.package} {row.model}: as the dense model\n")
    lines = PAGE.read_text("utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| library |"))
    last = next(i for i, line in enumerate(lines[first:], first) if not line.startswith("|"))
    lines[first:last] = table(versions)
    PAGE.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
