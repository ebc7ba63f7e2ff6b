"""Models that `replace_ffn` knows, and recipes of what it made of them."""

import copy
import json

import pytest
import torch
from model_copies import Called, D, DecoderLayer, GatedLinearUnitFeedForward, MoEFeedForward
from swapped_models import PAGE, ROWS, check, table, written
from torch import nn

from segmoe_kernels import SegMoE, replace_ffn, swap_recipe

pytest.importorskip("transformers", minversion="5.0")

SWAP = {"segment_sizes": 3, "num_experts": 2, "shared_expert": "token"}


@pytest.mark.filterwarnings("ignore:segmoe_kernels.replace_ffn")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.package} {row.model}")
def test_model_with_one_copied_expert_is_the_dense_one(row):
    check(row)


def test_the_page_lists_what_was_tried():
    page = PAGE.read_text("utf-8")
    assert "\n".join(table(written())) in page
    assert not [row for row in ROWS if written()[row.package, row.model] == "-"]


@pytest.mark.slow  # compiled also in test_swap_refusals.py
def test_experts_inside_a_layer_are_compiled_exported_and_copied():
    layer = Called(DecoderLayer(), lambda x: (x, x)).eval()
    replace_ffn(layer, **SWAP)
    x = torch.randn(2, 11, D)
    expected = layer(x)
    exported = torch.export.export(layer, (x,)).module()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for other in (copy.deepcopy(layer), compiled, exported):
        torch.testing.assert_close(other(x), expected)


def test_experts_of_a_mixture_are_copied_one_by_one():
    model = nn.ModuleDict({"ffn": MoEFeedForward()})
    theirs = [expert.fc_gate.weight.clone() for expert in model["ffn"].experts]
    with pytest.raises(ValueError, match="num_experts to be the mixture's 4 where its weights are"):
        replace_ffn(model, **{**SWAP, "shared_expert": None}, copy_weights=True)
    replace_ffn(model, segment_sizes=3, num_experts=4, copy_weights=True)
    layer = model["ffn"].seg_moe
    assert isinstance(layer, SegMoE)
    assert torch.equal(layer.experts.gate_proj, torch.stack(theirs))
    assert model["ffn"](torch.randn(2, 3, 7, D), centroid=torch.randn(4, D)).shape == (2, 3, 7, D)


def tied():
    first, second = GatedLinearUnitFeedForward(), GatedLinearUnitFeedForward()
    second.fc1 = first.fc1
    return nn.ModuleList([first, second])


def flattening():
    class Flat(GatedLinearUnitFeedForward):
        def forward(self, x, centroid=None):
            return super().forward(x.flatten(0, 1), centroid).view_as(x)

    return nn.ModuleList([Flat()])


@pytest.mark.parametrize(
    ("build", "words"),
    [(tied, "shares weights with another module"), (flattening, "of shape [(4, 16)]")],
)
def test_what_can_not_go_inside_is_refused(build, words):
    with pytest.raises(ValueError, match="replace_ffn") as caught:
        replace_ffn(build(), **SWAP)
    assert words in str(caught.value)


def test_a_recipe_that_can_not_be_followed_leaves_the_model():
    """More of them: bad_swaps.py."""
    model, fresh = (nn.ModuleDict({"ff": GatedLinearUnitFeedForward()}) for _ in range(2))
    replace_ffn(model, **SWAP)
    recipe = json.loads(json.dumps(swap_recipe(model)))
    recipe["ffns"]["other"] = recipe["ffns"]["ff"]
    kinds = [type(module) for module in fresh.modules()]
    with pytest.raises(ValueError, match="with a GatedLinearUnitFeedForward at 'other', got none"):
        replace_ffn(fresh, recipe=recipe)
    assert [type(module) for module in fresh.modules()] == kinds
