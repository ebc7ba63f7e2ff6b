"""Swapped models that were saved come back, by the loaders of other libraries."""

import copy

import pytest
import torch
from swapped_models import patch_model
from test_swap import encoder
from test_swap_hugging_face import llama
from torch import nn

from segmoe_kernels import SegMoE, replace_ffn, swap_recipe
from segmoe_kernels.models.loading import load_pretrained, with_recipe

SWAP = {"segment_sizes": 3, "num_experts": 2, "shared_expert": "token"}


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.filterwarnings("ignore:segmoe_kernels.replace_ffn")
def test_pretrained_model_comes_back_with_its_experts(tmp_path, auto):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    if auto:
        kind, model, inputs = transformers.AutoModelForCausalLM, llama(), torch.arange(9)[None]
        inputs = {"input_ids": inputs}
    else:
        model, inputs = patch_model("PatchTSMixer", num_layers=1)
        kind = type(model)
    replace_ffn(model.eval(), **SWAP, causal=True, top_k=2, aux_loss_weight=0.1)
    model.save_pretrained(tmp_path / "one")
    loaded = load_pretrained(kind, tmp_path / "one")
    assert type(loaded) is type(model)
    assert swap_recipe(loaded) == swap_recipe(model) == model.config.segmoe
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    loaded.save_pretrained(tmp_path / "two")
    half = load_pretrained(kind, tmp_path / "two", dtype=torch.bfloat16)
    assert {w.dtype for w in half.parameters()} == {torch.bfloat16}
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    half.train()(**inputs)[0].float().sum().backward()
    layers = [layer for layer in half.modules() if isinstance(layer, SegMoE)]
    assert layers
    assert all(layer.aux_loss > 0 for layer in layers)


def test_a_configuration_without_a_recipe_is_refused(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="path to have a recipe in its configuration"):
        load_pretrained(type(model), tmp_path)


class Forecaster(nn.Module):
    """What Lightning's and neuralforecast's loaders rely on: hyperparameters and a class."""

    def __init__(self, width=16, dropout=0.1):
        super().__init__()
        self.hparams = {"width": width, "dropout": dropout}
        ffn = nn.Sequential(
            nn.Linear(width, 24), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, width)
        )
        self.backbone = nn.ModuleDict({"ff": ffn})

    def save(self, path):
        """As both do."""
        torch.save({"hyper_parameters": self.hparams, "state_dict": self.state_dict()}, path)

    @classmethod
    def load_from_checkpoint(cls, path):
        """As both do: a new model by its hyperparameters, then its weights."""
        saved = torch.load(path, weights_only=True)
        model = cls(**saved["hyper_parameters"])
        model.load_state_dict(saved["state_dict"])
        return model


def test_a_loader_that_makes_the_model_itself_makes_it_with_experts(tmp_path):
    """Tried with pytorch-lightning 2.6.6 and neuralforecast 3.3.0, too."""
    model = Forecaster(dropout=0.3)
    replace_ffn(model, **SWAP)
    model.save(tmp_path / "last.ckpt")
    with pytest.raises(RuntimeError, match="Missing key"):
        Forecaster.load_from_checkpoint(tmp_path / "last.ckpt")
    kind = with_recipe(Forecaster, swap_recipe(model))
    assert (kind.__name__, kind.__module__) == ("Forecaster", Forecaster.__module__)
    loaded = kind.load_from_checkpoint(tmp_path / "last.ckpt")
    assert type(loaded) is Forecaster
    assert loaded.hparams == model.hparams
    x = torch.randn(2, 7, 16)
    assert torch.equal(loaded.eval().backbone["ff"](x), model.eval().backbone["ff"](x))
    copy.deepcopy(loaded)


def test_recipes_of_encoders_keep_their_leave_to_look_ahead_and_names_of_what_is_around():
    mask = torch.ones(11, 11, dtype=torch.bool).triu(1)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    for causal in (False, None):
        model = nn.ModuleDict({"inner": encoder()})
        replace_ffn(model["inner"], **SWAP, causal=causal)
        fresh = nn.ModuleDict({"inner": encoder()})
        assert replace_ffn(fresh, recipe=swap_recipe(model)) == [
            "inner.layers.0", "inner.layers.1",
        ]  # fmt: skip
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh.eval()["inner"](x), model.eval()["inner"](x))
        if causal is False:
            fresh["inner"](x, mask)
        else:
            with pytest.raises(ValueError, match="show later steps"):
                fresh["inner"](x, mask)
