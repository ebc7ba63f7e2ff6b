"""What a swap has made of a model, as JSON: `swap_recipe`."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from segmoe_kernels import validation as check
from segmoe_kernels.layer import SegMoE

__all__ = ["swap_recipe"]

FORMAT = 1
"""Of recipes: a new number where an older version would misread them."""
_OPTIONS = [
    name for name in inspect.signature(SegMoE).parameters if name not in {"device", "dtype"}
]


class Place(NamedTuple):
    """Where a `SegMoE` came to lie, and in place of what."""

    ffn: str  # the class that was there
    parts: Mapping[str, str] | None
    inside: bool
    below: str  # name of the layer under that of the FFN; "" where it is in its place


def swap_recipe(model: nn.Module) -> dict[str, Any]:
    """What `replace_ffn` has made of a model, for ``replace_ffn(model, recipe=...)`` on a new one.

    ::

        recipe = swap_recipe(model)                     # json.dump(recipe, file)
        replace_ffn(new_model, recipe=recipe)
        new_model.load_state_dict(model.state_dict())

    Models of Hugging Face carry it in ``config.segmoe``.

    Args:
        model: one that `replace_ffn` has changed, or that has such a one inside.

    Returns:
        Dict of numbers, words and None: ``format``, and for each FFN by its name what it was and
        the options of its `SegMoE`.

    Raises:
        TypeError: if model is not a module.
        ValueError: if nothing in it was swapped.
    """
    check.check_module("swap_recipe", "model", model)
    ffns = {}
    for name, layer in model.named_modules():
        place = getattr(layer, "_place", None)
        if isinstance(layer, SegMoE) and isinstance(place, Place):
            options = {option: _option(layer, option) for option in _OPTIONS}
            around = model.get_submodule(name.removesuffix(place.below).removesuffix("."))
            ffns[name.removesuffix(place.below).removesuffix(".")] = {
                "ffn": place.ffn,
                "parts": None if place.parts is None else dict(place.parts),
                "inside": place.inside,
                "may_look_ahead": getattr(around, "may_look_ahead", False),
                "options": options,
            }
    if not ffns:
        check.fail_value("swap_recipe", "model", "have swapped FFNs", type(model).__name__)
    return {"format": FORMAT, "ffns": ffns}


def _option(layer: SegMoE, name: str) -> Any:
    return getattr(layer, "shared_expert_scope" if name == "shared_expert" else name)


def read_recipe(recipe: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """FFNs of a recipe by name; refuses what this version can't follow."""
    fail, name = check.fail_value, "replace_ffn"
    check.check_mapping(name, "recipe", recipe)
    if recipe.get("format") != FORMAT:
        rule = f"have the format {FORMAT} that this version can follow"
        fail(name, "recipe", rule, repr(recipe.get("format")))
    ffns = recipe.get("ffns")
    check.check_mapping(name, "recipe['ffns']", ffns)
    known = {
        "ffn": str,
        "parts": dict | None,
        "inside": bool,
        "may_look_ahead": bool,
        "options": dict,
    }
    for ffn, entry in ffns.items():
        check.check_mapping(name, f"recipe['ffns'][{ffn!r}]", entry)
        wrong = entry.keys() ^ known.keys()
        wrong |= {
            key for key in known.keys() & entry.keys() if not isinstance(entry[key], known[key])
        }
        if wrong:
            fail(name, "recipe", f"say of {ffn!r} {', '.join(known)}", f"wrong {sorted(wrong)}")
        if unknown := sorted(entry["options"].keys() ^ set(_OPTIONS)):
            rule = f"have the options of this version's SegMoE at {ffn!r}"
            fail(name, "recipe", rule, f"others or none: {unknown}")
        yield ffn, entry
