"""Saved models with experts, back in memory: `load_pretrained` and `with_recipe`."""

from collections.abc import Mapping
from typing import Any

from segmoe_kernels import validation as check
from segmoe_kernels.models.swap import replace_ffn

__all__ = ["load_pretrained", "with_recipe"]


def with_recipe(kind: type, recipe: Mapping[str, Any]) -> Any:
    """A model's class whose new models have experts, for loaders that build the model themselves.

    ::

        model = with_recipe(PatchTST, recipe).load("model.ckpt")                  # neuralforecast
        model = with_recipe(Forecaster, recipe).load_from_checkpoint("last.ckpt")      # Lightning

    Args:
        kind: class of the model.
        recipe: of `swap_recipe`.

    Returns:
        A class of the same name; what it makes is of class ``kind``.

    Raises:
        TypeError: if kind is no class of modules, or recipe no mapping.
    """
    name = "with_recipe"
    check.check_type(name, "kind", kind, type, "be a class")
    check.check_mapping(name, "recipe", recipe)

    class Swapped(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            replace_ffn(self, recipe=recipe)
            self.__class__ = kind

    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Swapped, attribute, getattr(kind, attribute))
    return Swapped


def load_pretrained(kind: Any, path: Any, **options: Any) -> Any:
    """Load a model of Hugging Face that `replace_ffn` has changed and ``save_pretrained`` saved.

    Args:
        kind: its class, or one such as ``transformers.AutoModelForCausalLM``.
        path: folder or name on the hub.
        **options: of ``kind.from_pretrained``.

    Returns:
        The model, in eval mode. Causal ones go without a key-value cache until
        `cached.enable_cache` is called.

    Raises:
        TypeError: if kind has no ``from_pretrained``, or path is none.
        ValueError: if the configuration holds no recipe, or one that this version can't follow.
    """
    name = "load_pretrained"
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        check.fail_type(name, "kind", "be a class of transformers' models", repr(kind))
    check.check_path(name, "path", path)
    config = options.pop("config", None)
    if config is None:
        from transformers import AutoConfig

        config = (getattr(kind, "config_class", None) or AutoConfig).from_pretrained(path)
    recipe = getattr(config, "segmoe", None)
    if recipe is None:
        rule = "have a recipe in its configuration (replace_ffn the whole model, then save it)"
        check.fail_value(name, "path", rule, repr(path))
    mapping = getattr(kind, "_model_mapping", None)
    if mapping is not None:
        kind = mapping[type(config)]
    return with_recipe(kind, recipe).from_pretrained(path, config=config, **options)
