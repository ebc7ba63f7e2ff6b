"""The algorithm of the official layer in plain PyTorch: a loop over experts, the baseline to beat.

Written from its description: right-pad, route whole segments, build a one-hot mask of the choices,
and for each expert in turn gather its segments, run it on their steps and scatter-add the result.

Source: arXiv 2601.21641; ``MoESegment`` in evortigosa/segmoe_forecast, model/MoE.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmoe_kernels import SegMoE
from segmoe_kernels.activations import ACTIVATIONS
from segmoe_kernels.routing import FFNWeights


class OfficialLoop(nn.Module):
    """The loop over experts, on the parameters of a `SegMoE`.

    The values are shared in memory; gradients are the loop's own. As in the official layer each
    expert is a parameter of its own, and one without a segment gets no gradient.

    Args:
        layer: with ``expert_scope="token"``, ``pooling="concat"``, ``causal=False``,
            num_experts > 0, and shared_expert "segment" or None: what the official layer does.

    Raises:
        ValueError: for a layer with other options.
    """

    def __init__(self, layer: SegMoE) -> None:
        super().__init__()
        official = (
            layer.expert_scope == "token"
            and layer.pooling == "concat"
            and layer.shared_expert_scope in {"segment", None}
            and not layer.causal
        )
        if not official or layer.router is None or layer.experts is None:
            raise ValueError(f"expected the options of the official layer, got {layer!r}.")
        self.segment_size, self.num_experts = layer.segment_size, layer.num_experts
        self.top_k, self.renormalize = layer.top_k, layer.renormalize
        self.temperature, self.router_dropout = layer.router_temperature, layer.router_dropout
        self.router_weight = nn.Parameter(layer.router.weight.detach())
        weights = layer.experts.weights()
        self.experts = nn.ModuleList(
            _FFN(FFNWeights(*(None if w is None else w[e] for w in weights)), layer)
            for e in range(layer.num_experts)
        )
        self.shared_expert: _FFN | None = None
        self.shared_gate: nn.Parameter | None = None
        if layer.shared_expert is not None and layer.shared_gate is not None:
            self.shared_expert = _FFN(layer.shared_expert.weights(), layer)
            self.shared_gate = nn.Parameter(layer.shared_gate.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (B, T, D) -> (B, T, D)."""
        batch, length, width = x.shape
        missing = -length % self.segment_size
        if missing:
            x = torch.cat([x, x.new_zeros(batch, missing, width)], dim=1)
        segments = x.reshape(-1, self.segment_size * width)  # (S, P * D)
        topk_weights, topk_ids = self._route(segments)

        steps = segments.view(-1, self.segment_size, width)
        routed = torch.zeros_like(steps)
        chosen = F.one_hot(topk_ids, self.num_experts).permute(2, 1, 0)  # (E, top_k, S)
        for expert, mask in zip(self.experts, chosen, strict=True):
            choice, segment = torch.where(mask)
            if segment.numel() == 0:
                continue
            y = expert(steps.index_select(0, segment)) * topk_weights[segment, choice, None, None]
            routed.index_add_(0, segment, y.to(routed.dtype))

        out = routed.view_as(segments)
        if self.shared_expert is not None and self.shared_gate is not None:
            gate = torch.sigmoid(F.linear(segments, self.shared_gate))
            out = out + self.shared_expert(segments) * gate
        return out.view(batch, -1, width)[:, :length]

    def _route(self, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(topk_weights, topk_ids)``, (S, top_k) each."""
        logits = F.linear(segments, self.router_weight)
        probs = torch.softmax(logits.float() / self.temperature, dim=-1)
        probs = F.dropout(probs, self.router_dropout, self.training)
        weights, ids = torch.topk(probs, self.top_k, dim=-1)
        if self.top_k > 1 if self.renormalize is None else self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)
        return weights.to(segments.dtype), ids


class _FFN(nn.Module):
    """One FFN whose parameters are views of those of a layer."""

    def __init__(self, weights: FFNWeights, layer: SegMoE) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[layer.activation].function
        self.dropout = layer.dropout
        for name, weight in weights._asdict().items():
            shared = None if weight is None else nn.Parameter(weight.detach())
            self.register_parameter(name, shared)

    def forward(self, x: Tensor) -> Tensor:
        up = F.linear(x, self.up_proj, self.up_proj_bias)
        if self.gate_proj is None:
            hidden = self.activation(up)
        else:
            hidden = self.activation(F.linear(x, self.gate_proj, self.gate_proj_bias)) * up
        hidden = F.dropout(hidden, self.dropout, self.training)
        return F.linear(hidden, self.down_proj, self.down_proj_bias)
