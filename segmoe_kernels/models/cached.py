"""Key-value caches of Hugging Face's decoders, with the state of causal `SegMoE` layers inside.

The cache carries a `StepState` for each layer, next to its keys and values: who reorders, repeats
or resets the cache does the same to these.
"""

import functools
import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

from segmoe_kernels import validation as check
from segmoe_kernels.layer import SegMoE
from segmoe_kernels.layer.decoding import StepState
from segmoe_kernels.models.adapters import mixes_steps
from segmoe_kernels.models.search import refuse_cache

__all__ = ["enable_cache"]

_NAME = "enable_cache"


def enable_cache(model: nn.Module) -> None:
    """Let a Hugging Face decoder whose FFNs are causal `SegMoE` layers use its key-value cache.

    ``generate`` then runs experts on new tokens alone, and gives the tokens that it gives without
    a cache: greedy, sampled, by beams, in chunks of a prompt, or going on from a cache that an
    earlier call has left. An ``attention_mask`` of (B, T) reaches the experts: each sequence of
    the batch has the segments that it has alone, wherever it is padded, in eval mode; in training,
    experts go on without it. Layers stay as they are, but for their class; the flags ``use_cache``
    that `replace_ffn` has switched off are on again. Statistics count calls without a cache alone.

    Refused in later calls, by name: a cache that something else has filled or cut (assisted
    decoding does), masks of another form (those of static caches), compiled code with a cache, and
    layers that one call runs twice.

    Args:
        model: changed in place; ``transformers >= 5``.

    Raises:
        TypeError: if model is not a module.
        ValueError: if it has no `SegMoE` that mixes steps, one that isn't causal or is sharded,
            or is no decoder with a cache.
    """
    check.check_module(_NAME, "model", model)
    layers = [m for m in model.modules() if isinstance(m, SegMoE) and mixes_steps(m)]
    if not layers:
        check.fail_value(_NAME, "model", "have a SegMoE that mixes steps", type(model).__name__)
    for layer in layers:
        if not layer.causal or type(layer) not in {SegMoE, _SteppingSegMoE}:
            rule = "have causal layers, not sharded"
            got = f"{type(layer).__name__} with causal={layer.causal}"
            check.fail_value(_NAME, "model", rule, got)
    models: list[Any] = [m for m in model.modules() if hasattr(m, "get_input_embeddings")]
    models = [m for m in models if hasattr(getattr(m, "config", None), "use_cache")]
    decoders = [m for m in models if set(layers) <= set(m.modules())]
    if not decoders or getattr(decoders[-1].config, "is_encoder_decoder", False):
        rule = "be a decoder of Hugging Face, with config.use_cache, around all layers"
        check.fail_value(_NAME, "model", rule, type(model).__name__)
    for index, layer in enumerate(layers):
        layer.__class__ = _SteppingSegMoE
        layer._index = index  # type: ignore[assignment]  # of nn.Module
    for module in models:
        hooks: Any = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is refuse_cache]:
            del hooks[key]
        module.config.use_cache = True
        generation: Any = getattr(module, "generation_config", None)
        if generation is not None:
            generation.use_cache = True
    innermost = decoders[-1]  # of those around each other
    if _enter not in innermost._forward_pre_hooks.values():
        innermost.register_forward_pre_hook(_enter, with_kwargs=True)
        innermost.register_forward_hook(_leave, always_call=True)


class _Call(threading.local):
    """The decoder's call that runs in this thread."""

    cache: Any = None
    mask: Tensor | None = None
    after: dict[int, StepState] | None = None


_call = _Call()


class _SteppingSegMoE(SegMoE):
    """A `SegMoE` that goes on from the state in the cache of the call that runs."""

    _index: int

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """As `SegMoE.forward`, behind the tokens that the cache has."""
        after, cache = _call.after, _call.cache
        mask = _call.mask if padding_mask is None else padding_mask
        if torch.compiler.is_compiling() or after is None or (cache is None and _call.mask is None):
            return super().forward(x, padding_mask)
        if self._index in after:
            rule = "run each SegMoE once, to use a cache"
            check.fail_value("SegMoE.forward", "model", rule, "a second call of one")
        before = None if cache is None else cache._segmoe_states.get(self._index)
        y, after[self._index] = self.step(x, before, mask, skip_padding=mask is not None)
        return y


def _enter(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Find the cache and the mask of a call, a pre-hook of decoders."""
    parameters = inspect.signature(module.forward).parameters
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    name, kind = ("cache" if "cache" in parameters else "past_key_values"), type(module).__name__
    cache, use_cache = given.get("cache", given.get("past_key_values")), given.get("use_cache")
    if torch.compiler.is_compiling():
        _refuse_compiled(kind, name, cache)
        return args, kwargs
    use_cache = module.config.use_cache if use_cache is None else use_cache
    if cache is None and use_cache and not module.training:
        from transformers import DynamicCache

        cache = DynamicCache(config=module.config)
        kwargs = {**kwargs, name: cache}
    if cache is not None:
        _carry_states(kind, name, cache)
    mask = None if module.training else given.get("attention_mask")
    if mask is not None:
        inputs = given.get("input_ids")
        inputs = given["inputs_embeds"] if inputs is None else inputs
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            check.fail_value(kind, "attention_mask", "have shape (B, T), or be None", got)
        mask = mask[:, -inputs.shape[1] :].bool()
        # A look that waits for a GPU, at prompts alone: whole ones take the faster way.
        mask = None if mask.shape[1] > 1 and bool(mask.all()) else mask
    _call.cache, _call.mask, _call.after = cache, mask, {}
    return args, kwargs


def _refuse_compiled(kind: str, name: str, cache: Any) -> None:
    if cache is not None:
        rule = "be None in compiled code (generate: disable_compile=True)"
        check.fail_value(kind, name, rule, type(cache).__name__)


def _leave(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    """Keep the new states, unless the call broke: a hook that is always called."""
    if torch.compiler.is_compiling():
        return
    cache, after = _call.cache, _call.after
    _call.cache = _call.mask = _call.after = None
    if cache is not None and output is not None:
        cache._segmoe_states, cache._segmoe_length = after, int(cache.get_seq_length())


def _carry_states(kind: str, name: str, cache: Any) -> None:
    """Make a cache carry states; refuse one whose tokens the layers have not seen."""
    length = int(cache.get_seq_length())
    if length == 0:
        if not hasattr(cache, "_segmoe_states"):
            cache.__class__ = _carrying(type(cache))  # type: ignore[arg-type]  # a type can be hashed
        cache._segmoe_states, cache._segmoe_length = {}, 0
    seen = getattr(cache, "_segmoe_length", 0)
    if seen != length:
        rule = "hold the tokens that this model has seen with it (not cut, as by assisted decoding)"
        check.fail_value(kind, name, rule, f"{length} tokens, of which {seen} were seen")


@functools.cache
def _carrying(kind: Any) -> Any:
    """The class of a cache whose batch changes together with that of its states."""

    class Carrying(kind):  # type: ignore[misc]
        _segmoe_states: dict[int, StepState]

        def _select(self, index: Tensor) -> None:
            states = self._segmoe_states.items()
            self._segmoe_states = {
                key: state.index_select(index.to(state.place.device)) for key, state in states
            }

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._select(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            for state in [*self._segmoe_states.values()][:1]:
                index = torch.arange(state.place.shape[0], device=state.place.device)
                self._select(index.repeat_interleave(repeats))

    Carrying.__name__ = kind.__name__
    return Carrying
