"""`SegMoE` behind the interfaces of other models' layers."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from segmoe_kernels import validation as check
from segmoe_kernels.layer import SegMoE

__all__ = ["SegMoEEncoderLayer", "WithRouterLogits"]


def mixes_steps(layer: SegMoE) -> bool:
    """Whether a step's output depends on other steps: not with plain FFNs or token-wise experts."""
    return layer.num_experts > 0 and (layer.segment_size > 1 or layer.causal)


class SegMoEEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` whose FFN is the `SegMoE` in ``seg_moe``.

    `replace_ffn` turns encoder layers into it. What ``src_key_padding_mask`` hides is padding for
    the experts, too: it is not routed and comes out as 0 of the FFN. In a mask of floats, whatever
    is below half of the dtype's lowest value hides a step.

    Raises:
        ValueError: for a causal mask, or ``is_causal=True``, if the experts see later steps; see
            `replace_ffn`. The values of a mask are looked at, which waits for a GPU once a call.
    """

    seg_moe: SegMoE
    # Set where `replace_ffn` was told causal=False.
    may_look_ahead = False

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention and experts, each with its residual; arguments as in the base class."""
        if is_causal and _looks_ahead(self) and src.shape[_time_dim(self, src)] > 1:
            rule = "be False where experts see later steps (swap with replace_ffn(causal=True))"
            check.fail_value("SegMoEEncoderLayer", "is_causal", rule, True)
        padding = src_key_padding_mask
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), src_mask, padding, is_causal=is_causal)
            return x + self._experts_block(self.norm2(x), padding)
        x = self.norm1(src + self._sa_block(src, src_mask, padding, is_causal=is_causal))
        out: Tensor = self.norm2(x + self._experts_block(x, padding))
        return out

    def _experts_block(self, x: Tensor, padding: Tensor | None) -> Tensor:
        real = None if padding is None else ~_hidden(padding)
        batch_first = _time_dim(self, x) == x.ndim - 2
        steps = x if batch_first else x.transpose(0, 1)
        y = self.seg_moe(steps, real)
        dropped: Tensor = self.dropout2(y if batch_first else y.transpose(0, 1))
        return dropped


def _time_dim(layer: SegMoEEncoderLayer, x: Tensor) -> int:
    return 1 if layer.self_attn.batch_first and x.ndim == 3 else 0


def _hidden(mask: Tensor) -> Tensor:
    """Steps that a mask hides: a mask of floats is added to the attention's logits."""
    return mask if mask.dtype == torch.bool else mask < torch.finfo(mask.dtype).min / 2


def refuse_rows(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
    """Refuse rows without a batch of sequences around them, where an FFN of single rows was."""
    if args and isinstance(args[0], Tensor) and args[0].ndim == 2:
        rule = f"have shape (..., T, D) with a batch at {name!r}: rows alone are no sequence"
        check.fail_value("SegMoE.forward", "x", rule, tuple(args[0].shape))


# Whether an encoder that looked at the masks is running in this thread.
_encoder = threading.local()


def check_masks(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Refuse causal masks where experts look ahead, and floats that neither hide a step nor not.

    A pre-hook of encoders and of their layers. An encoder hands bool masks on as floats, so its
    layers leave the look to it: a GPU is waited for once a call, and only for what the user gave.
    """
    # Compiled code can't look and refuse: NaN in all outputs, rather than wrong ones.
    compiling = torch.compiler.is_compiling()
    if not compiling and getattr(_encoder, "runs", False):
        return None
    encoder = isinstance(module, nn.TransformerEncoder)
    name = "mask" if encoder else "src_mask"
    names = ("src", name, "src_key_padding_mask", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    causal = None
    if not given.get("is_causal"):  # which a layer refuses without a look
        causal = _is_causal(module, given.get(name))
    if causal is not None and compiling:
        given["src"] = given["src"].masked_fill(causal, torch.nan)
    elif causal is not None and bool(causal):
        rule = "show later steps where experts see them (swap with replace_ffn(causal=True))"
        check.fail_value(type(module).__name__, name, rule, "a causal mask")
    mask = given.get("src_key_padding_mask")
    if mask is not None and mask.is_floating_point():
        odd = ~_hidden(mask) & (mask != 0)
        if compiling:
            given["src_key_padding_mask"] = mask.masked_fill(odd, torch.nan)
        elif bool(odd.any()):
            rule = "be 0 or below half of its dtype's lowest value, such as -inf (or a bool mask)"
            got = mask[odd][0].item()
            check.fail_value(type(module).__name__, "src_key_padding_mask", rule, got)
    if compiling:
        return (given.pop("src"),), given
    _encoder.runs = encoder
    return None


def leave_encoder(*_: Any) -> None:
    """Let layers look at masks again: a hook behind an encoder, which errors reach, too."""
    if not torch.compiler.is_compiling():
        _encoder.runs = False


def _looks_ahead(layer: nn.Module) -> bool:
    """Whether experts see later steps that nobody allowed them to see."""
    if not isinstance(layer, SegMoEEncoderLayer) or layer.may_look_ahead:
        return False
    return mixes_steps(layer.seg_moe) and not layer.seg_moe.causal


def _is_causal(module: Any, mask: Tensor | None) -> Tensor | None:
    """Whether a mask hides all later steps of a sequence; None where that would do no harm."""
    layers = module.layers if isinstance(module, nn.TransformerEncoder) else [module]
    looking = [layer for layer in layers if _looks_ahead(layer)]
    if mask is None or not looking or mask.shape[-1] == 1:
        return None
    later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    hidden = _hidden(mask) | ~later
    if mask.ndim == 2:
        return hidden.all()
    # (B * heads, T, T): a step is hidden where no head sees it.
    heads: Tensor = hidden.unflatten(0, (-1, int(looking[0].self_attn.num_heads)))
    return heads.flatten(1).all(1).any()


class _Rows(threading.local):
    """What an FFN inside a layer gets, from its first map to its last."""

    kept: Tensor | None = None


_rows = _Rows()


class KeepRows(nn.Module):
    """In place of an FFN's first maps inside a layer: keeps the rows for the experts.

    Activation and dropout, which the layer's forward calls next, get nothing to do.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of no sequence."""
        _rows.kept = x
        return x.new_empty((0, *x.shape[1:]))


class ExpertsInside(nn.Module):
    """In place of an FFN's last map inside a layer: a `SegMoE` on the rows of the first one."""

    def __init__(self, seg_moe: nn.Module, *, channels_first: bool) -> None:
        super().__init__()
        self.seg_moe, self.channels_first = seg_moe, channels_first

    def forward(self, _: Tensor) -> Tensor:
        """Return what the FFN would."""
        x, _rows.kept = _rows.kept, None
        assert x is not None
        y: Tensor = self.seg_moe(x.mT).mT if self.channels_first else self.seg_moe(x)
        return y


class MixtureOfSegments(nn.Module):
    """A `SegMoE` where a mixture of tokens was, for whose router its layer gave more than rows."""

    def __init__(self, seg_moe: nn.Module) -> None:
        super().__init__()
        self.seg_moe = seg_moe

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """(..., T, D) to (..., T, D); other arguments, such as ``centroid``, aren't used."""
        y: Tensor = self.seg_moe(x)
        return y


def put_inside(
    module: nn.Module, maps: Mapping[str, nn.Linear | nn.Conv1d], experts: nn.Module
) -> None:
    """Put experts where the maps of an FFN are inside a module, whose forward stays."""
    keep = KeepRows()
    for name, part in maps.items():
        new = ExpertsInside(experts, channels_first=isinstance(part, nn.Conv1d))
        put(module, part, new if name == "down" else keep)


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module everywhere another one is."""
    for parent in list(model.modules()):
        # Not `named_children`, which names a module once.
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


class WithRouterLogits(nn.Module):
    """A `SegMoE` for models whose FFN has to return ``(output, router_logits)``.

    Args:
        layer: SegMoE with experts.

    Raises:
        TypeError: if layer is not a SegMoE.
        ValueError: if it has no experts.
    """

    def __init__(self, layer: SegMoE) -> None:
        super().__init__()
        check.check_type("WithRouterLogits", "layer", layer, SegMoE, "be a SegMoE")
        if layer.num_experts == 0:
            check.fail_value("WithRouterLogits", "layer", "have experts", "num_experts=0")
        self.layer = layer

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ``(y, router_logits)``: (..., T, D) and (S, E), a row for each segment."""
        y, routing = self.layer.forward_with_routing(x, padding_mask)
        return y, routing.router_logits
