"""`SegMoE` behind the interfaces of other models' layers."""

from typing import Any

import torch
from torch import Tensor, nn

from segmoe_kernels import validation as check
from segmoe_kernels.layer import SegMoE

__all__ = ["SegMoEEncoderLayer", "TSLibEncoderLayer", "WithRouterLogits"]


def mixes_steps(layer: SegMoE) -> bool:
    """Whether a step's output depends on other steps: not with plain FFNs or token-wise experts."""
    return layer.num_experts > 0 and (layer.segment_size > 1 or layer.causal)


class SegMoEEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` whose FFN is the `SegMoE` in ``seg_moe``.

    `replace_ffn` turns encoder layers into it. What ``src_key_padding_mask`` hides is padding for
    the experts, too: it is not routed and comes out as 0 of the FFN. In a mask of floats, whatever
    is below half of the dtype's lowest value hides a step.

    Raises:
        ValueError: for ``is_causal=True`` if the experts see later steps; see `replace_ffn`.
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
        if (
            is_causal
            and mixes_steps(self.seg_moe)
            and not (
                self.seg_moe.causal or self.may_look_ahead or src.shape[_time_dim(self, src)] == 1
            )
        ):
            rule = "be False where experts see later steps (swap with replace_ffn(causal=True))"
            check.fail_value("SegMoEEncoderLayer", "is_causal", rule, True)
        padding = src_key_padding_mask
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), src_mask, padding, is_causal=is_causal)
            return x + self._experts_block(self.norm2(x), padding)
        attended: Tensor = self.norm1(
            src + self._sa_block(src, src_mask, padding, is_causal=is_causal)
        )
        out: Tensor = self.norm2(attended + self._experts_block(attended, padding))
        return out

    def _experts_block(self, x: Tensor, padding: Tensor | None) -> Tensor:
        real = None
        if padding is not None:
            real = ~_hidden(padding)
        batch_first = _time_dim(self, x) == x.ndim - 2
        steps = x if batch_first else x.transpose(0, 1)
        y: Tensor = self.seg_moe(steps, real)
        dropped: Tensor = self.dropout2(y if batch_first else y.transpose(0, 1))
        return dropped


def _time_dim(layer: SegMoEEncoderLayer, x: Tensor) -> int:
    return 1 if layer.self_attn.batch_first and x.ndim == 3 else 0


def _hidden(mask: Tensor) -> Tensor:
    """Steps that a mask hides: a mask of floats is added to the attention's logits."""
    return mask if mask.dtype == torch.bool else mask < torch.finfo(mask.dtype).min / 2


def refuse_rows(place: str, _: nn.Module, args: tuple[Any, ...]) -> None:
    """Refuse rows without a batch of sequences around them, in place of an FFN of single rows."""
    if args and isinstance(args[0], Tensor) and args[0].ndim == 2:
        rule = f"have shape (..., T, D) with a batch at {place!r}: rows alone are no sequence"
        check.fail_value("SegMoE.forward", "x", rule, tuple(args[0].shape))


def check_padding(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Refuse a mask of floats that neither hides a step nor leaves it as it is.

    A pre-hook of what a user calls, as `torch.nn.TransformerEncoder` hands bool masks on as floats:
    so a GPU is waited for where the user's own mask has floats, and once a call.
    """
    inside = len(args) > 2
    mask = args[2] if inside else kwargs.get("src_key_padding_mask")
    if mask is None or not mask.is_floating_point():
        return args, kwargs
    odd = ~_hidden(mask) & (mask != 0)
    if torch.compiler.is_compiling():
        # Compiled code can't look and refuse: NaN in all outputs, rather than wrong ones.
        mask = mask.masked_fill(odd, torch.nan)
        if inside:
            return (*args[:2], mask, *args[3:]), kwargs
        return args, {**kwargs, "src_key_padding_mask": mask}
    if bool(odd.any()):
        rule = "be 0 or below half of its dtype's lowest value, such as -inf (or use a bool mask)"
        check.fail_value(type(module).__name__, "src_key_padding_mask", rule, mask[odd][0].item())
    return args, kwargs


class TSLibEncoderLayer(nn.Module):
    """The encoder layer of Time-Series-Library and its relatives: returns ``(x, attention)``.

    Args:
        attention: called as ``attention(x, x, x, attn_mask=..., tau=..., delta=...)``, returns
            ``(y, weights)``.
        seg_moe: SegMoE, in place of the two convolutions.
        norm1: behind the attention.
        norm2: behind the experts.
        dropout: on both outputs.

    Raises:
        TypeError: if an argument is not a module, or seg_moe not a SegMoE.

    Source: thuml/Time-Series-Library, layers/Transformer_EncDec.py, ``EncoderLayer``.
    """

    def __init__(
        self,
        attention: nn.Module,
        seg_moe: SegMoE,
        norm1: nn.Module,
        norm2: nn.Module,
        dropout: nn.Module,
    ) -> None:
        super().__init__()
        _check_layer("TSLibEncoderLayer", "seg_moe", seg_moe)
        parts = {"attention": attention, "norm1": norm1, "norm2": norm2, "dropout": dropout}
        for name, module in parts.items():
            check.check_module("TSLibEncoderLayer", name, module)
        self.attention, self.seg_moe = attention, seg_moe
        self.norm1, self.norm2, self.dropout = norm1, norm2, dropout

    def forward(
        self, x: Tensor, attn_mask: Any = None, tau: Any = None, delta: Any = None
    ) -> tuple[Tensor, Any]:
        """Return ``(y, attention weights)``: (B, T, D) and what the attention gives."""
        attended, weights = self.attention(x, x, x, attn_mask=attn_mask, tau=tau, delta=delta)
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self.seg_moe(x))), weights


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
        _check_layer("WithRouterLogits", "layer", layer)
        if layer.num_experts == 0:
            check.fail_value("WithRouterLogits", "layer", "have experts", "num_experts=0")
        self.layer = layer

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ``(y, router_logits)``: (..., T, D) and (S, E), a row for each segment."""
        y, routing = self.layer.forward_with_routing(x, padding_mask)
        return y, routing.router_logits


def _check_layer(function: str, name: str, layer: object) -> None:
    if not isinstance(layer, SegMoE):
        check.fail_type(function, name, "be a SegMoE", type(layer).__name__)
