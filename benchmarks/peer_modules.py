"""Experts of other packages as whole layers, on the parameters of a `SegMoE`.

They are mixtures of token-wise experts, without a router for segments. `SegmentPeer` puts a plain
PyTorch router and shared expert around them and gives each step the choices of its segment.
"""

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmoe_kernels import SegMoE
from segmoe_kernels.activations import ACTIVATIONS
from segmoe_kernels.reference.experts import dense_ffn, gather_rows


class SkippedError(Exception):
    """A peer can't be used here; the message says why."""


class SegmentPeer(nn.Module):
    """Segment router and shared expert in plain PyTorch around experts that see single steps.

    Router logits are computed in the dtype of x, softmax in float32, as the official layer does.

    Args:
        layer: with ``expert_scope="token"``, "concat" pooling, no biases and not causal.

    Attributes:
        forced_ids: (S, top_k) or None: choices to take instead of the router's own.
    """

    gate_first = True  # whether the gate's half of w_in comes before the up projection's

    def __init__(self, layer: SegMoE) -> None:
        super().__init__()
        plain = layer.expert_scope == "token" and layer.pooling == "concat"
        if not plain or layer.bias or layer.causal or layer.experts is None:
            raise SkippedError("takes token-wise experts without bias, 'concat' pooling")
        if layer.shared_expert_scope == "token":
            raise SkippedError("takes shared_expert 'segment' or None")
        self.segment_size, self.num_experts = layer.segment_size, layer.num_experts
        self.top_k, self.renormalize = layer.top_k, layer.renormalize
        self.temperature = layer.router_temperature
        self.activation, self.gated = layer.activation, layer.gated
        self.dropout = layer.dropout  # of the layer: the peer has none
        self.router = copy.deepcopy(layer.router)
        self.shared_expert = copy.deepcopy(layer.shared_expert)
        self.shared_gate = copy.deepcopy(layer.shared_gate)
        up, down, gate = (
            None if w is None else w.detach().clone() for w in layer.experts.weights()[:3]
        )
        if gate is not None:
            up = torch.cat([gate, up] if self.gate_first else [up, gate], dim=1)
        self.w_in = nn.Parameter(up)  # (E, F or 2F, D)
        self.w_out = nn.Parameter(down)  # (E, D, F)
        self.forced_ids: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (B, T, D) -> (B, T, D)."""
        batch, length, width = x.shape
        segments = self._segments(x)
        topk_weights, topk_ids = self.route(segments)
        y = self.run_experts(
            x.reshape(-1, width),
            self.per_step(topk_weights.to(x.dtype), batch, length),
            self.per_step(topk_ids, batch, length),
        ).view(batch, length, width)
        if self.shared_expert is None or self.shared_gate is None:
            return y
        shared = dense_ffn(segments, self.shared_expert.weights(), self.activation)
        shared = shared * torch.sigmoid(self.shared_gate(segments))
        return y + shared.view(batch, -1, width)[:, :length]

    def _segments(self, x: Tensor) -> Tensor:
        missing = -x.shape[1] % self.segment_size
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        return x.reshape(-1, self.segment_size * x.shape[-1])

    def per_step(self, choices: Tensor, batch: int, length: int) -> Tensor:
        """Give each step what its segment has: (S, top_k) -> (B * T, top_k)."""
        if self.segment_size == 1:
            return choices
        steps = choices.repeat_interleave(self.segment_size, dim=0)
        if length % self.segment_size:
            steps = steps.view(batch, -1, self.top_k)[:, :length].reshape(-1, self.top_k)
        return steps

    def route(self, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(topk_weights, topk_ids)``, (S, top_k) each."""
        logits = F.linear(segments, self.router.weight).float()
        if self.temperature != 1:
            logits = logits / self.temperature
        probs = torch.softmax(logits, dim=-1)
        if self.forced_ids is None:
            weights, ids = torch.topk(probs, self.top_k, dim=-1)
        else:
            ids = self.forced_ids.long()
            weights = probs.gather(-1, ids)
        if self.top_k > 1 if self.renormalize is None else self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)
        return weights, ids

    def run_experts(self, rows: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """(N, D), (N, top_k), (N, top_k) -> (N, D)."""
        raise NotImplementedError

    def use_weights(self, up: Tensor, down: Tensor, gate: Tensor | None) -> None:
        """Take other tensors than the own parameters, so that a single stage can be run."""
        if gate is not None:
            up = torch.cat([gate, up] if self.gate_first else [up, gate], dim=1)
        _set_tensor(self, "w_in", up)
        _set_tensor(self, "w_out", down)

    def hidden(self, projected: Tensor) -> Tensor:
        """Activation, and the gate where there is one, of what w_in gives."""
        function = ACTIVATIONS[self.activation].function
        if not self.gated:
            return function(projected)
        gate, up = projected.chunk(2, dim=-1)
        return function(gate) * up

    def route_ids(self, x: Tensor) -> Tensor:
        """The choices for x, (S, top_k) int32."""
        with torch.no_grad():
            return self.route(self._segments(x))[1].int()

    def layer_gradients(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename, and split the fused projection."""
        found = dict(gradients)
        up, down = found.pop("w_in"), found.pop("w_out")
        found["experts.down_proj"] = down
        if self.gated:
            halves = up.chunk(2, dim=1)
            gate, up = halves if self.gate_first else halves[::-1]
            found["experts.gate_proj"] = gate
        found["experts.up_proj"] = up
        return found


class LoopExperts(SegmentPeer):
    """A loop over experts: the yardstick of the peers' accuracy."""

    def run_experts(self, rows: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Gather, run and scatter-add for one expert after the other."""
        out = torch.zeros_like(rows)
        for e in range(self.num_experts):
            row, choice = torch.where(topk_ids == e)
            hidden = self.hidden(F.linear(rows[row], self.w_in[e]))
            y = F.linear(hidden, self.w_out[e]) * topk_weights[row, choice, None]
            out = out.index_add(0, row, y)
        return out


class GroupedMM(SegmentPeer):
    """Sort, gather, two grouped products, gather back: what PyTorch itself offers."""

    def run_experts(self, rows: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """No step waits for the host."""
        order, inverse, offsets = sorted_slots(topk_ids, self.num_experts)
        if self.top_k == 1:
            gathered = gather_rows(rows, order, inverse)
        else:
            gathered = rows.index_select(0, order // self.top_k)
        hidden = self.hidden(grouped_mm(gathered, self.w_in, offsets))
        y = grouped_mm(hidden, self.w_out, offsets)
        y = gather_rows(y, inverse, order) * topk_weights.reshape(-1, 1)
        return y if self.top_k == 1 else y.view(-1, self.top_k, y.shape[-1]).sum(1)


def _set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    # Past nn.Module, which takes nothing but a parameter under the name of one.
    module._parameters.pop(name, None)
    object.__setattr__(module, name, tensor)


def sorted_slots(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group slots by expert without waiting for the host: order, its inverse, ends (E,) int32."""
    sorted_ids, order = torch.sort(topk_ids.reshape(-1).int(), stable=True)
    experts = torch.arange(num_experts, device=order.device, dtype=sorted_ids.dtype)
    offsets = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    slots = torch.arange(order.shape[0], device=order.device)
    return order, torch.empty_like(order).scatter_(0, order, slots), offsets


def grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """PyTorch's grouped product: (M, K), (E, N, K), (E,) int32 ends -> (M, N)."""
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm
    out: Tensor = function(rows, weight.transpose(-2, -1), offs=offsets)
    return out


class ScatterMoE(SegmentPeer):
    """ScatterMoE's own modules on these parameters."""

    gate_first = False  # GLUMLP activates the second half

    def __init__(self, layer: SegMoE, package: types.ModuleType) -> None:
        super().__init__(layer)
        kind = package.mlp.GLUMLP if layer.gated else package.mlp.MLP
        self.mlp = kind(
            layer.d_model,
            layer.d_ff,
            layer.num_experts,
            layer.top_k,
            activation=ACTIVATIONS[layer.activation].function,
        )
        self.mlp.experts.weight, self.mlp.output_experts.weight = self.w_in, self.w_out

    def use_weights(self, up: Tensor, down: Tensor, gate: Tensor | None) -> None:
        """Its modules hold the parameters too."""
        super().use_weights(up, down, gate)
        _set_tensor(self.mlp.experts, "weight", self.w_in)
        _set_tensor(self.mlp.output_experts, "weight", self.w_out)

    def run_experts(self, rows: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """As published."""
        return self.mlp(rows, topk_weights, topk_ids)


class ScatterMoENoSync(SegmentPeer):
    """ScatterMoE's linear layers; its own sort counts with bincount, which waits for the host."""

    def __init__(self, layer: SegMoE, package: types.ModuleType) -> None:
        super().__init__(layer)
        self.linear = package.parallel_linear

    def run_experts(self, rows: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """As its MLP, with the counts from a search in the sorted choices."""
        sorted_ids, order = torch.sort(topk_ids.reshape(-1))
        experts = torch.arange(self.num_experts, device=rows.device)
        index = (sorted_ids, order, torch.searchsorted(sorted_ids, experts, right=True))
        w_in, w_out = self.w_in.permute(0, 2, 1), self.w_out.permute(0, 2, 1)
        projected = self.linear(rows, w_in, self.top_k, *index, grouped_out=True)
        hidden = self.hidden(projected)
        return self.linear(hidden, w_out, 1, *index, gates=topk_weights, grouped_in=True)


class Liger(SegmentPeer):
    """Liger-Kernel's fused MoE."""

    def __init__(self, layer: SegMoE, function: Any) -> None:
        super().__init__(layer)
        self.function = function

    def run_experts(self, rows: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Choices are int32 there."""
        return self.function.apply(rows, self.w_in, self.w_out, topk_ids.int(), topk_weights)


class Transformers(SegmentPeer):
    """The function that Transformers' expert modules run, with itself as the module."""

    has_bias = False
    has_post_expert_norm = False
    is_transposed = False
    _is_expert_parallel = False

    def __init__(self, layer: SegMoE, function: Callable[..., Tensor]) -> None:
        super().__init__(layer)
        self.function, self.has_gate = function, layer.gated
        self.act_fn = ACTIVATIONS[layer.activation].function

    @property
    def gate_up_proj(self) -> Tensor:
        """Fused projection of gated experts."""
        return self.w_in

    @property
    def up_proj(self) -> Tensor:
        """Projection of plain experts."""
        return self.w_in

    @property
    def down_proj(self) -> Tensor:
        """Second projection."""
        return self.w_out

    def _apply_gate(self, projected: Tensor) -> Tensor:
        return self.hidden(projected)

    def run_experts(self, rows: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Experts are called as ``forward(hidden_states, top_k_index, top_k_weights)`` there."""
        return self.function(self, rows, topk_ids, topk_weights)
