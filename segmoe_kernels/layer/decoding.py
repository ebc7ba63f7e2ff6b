"""Causal layers on some steps at a time: what `SegMoE.step` runs, and what it keeps between calls.

The experts of a segment are known when it begins. So a call needs the steps of the running segment,
on which the next one will be routed, the routing of the running one, and the place in it. New steps
are written behind the kept ones, into a window that begins with the running segment; the window's
segments are routed, and the new steps alone go through experts. Shapes depend on the number of new
steps alone and places are tensors: nothing waits for the device, nothing is compiled anew.
"""

import math
from typing import Any, NamedTuple

import torch
from einops import repeat
from torch import Tensor, nn

from segmoe_kernels import validation as check
from segmoe_kernels.functional import run_layer
from segmoe_kernels.options import Options
from segmoe_kernels.routing import FFNWeights, LayerWeights, RouterOutput, Routing

__all__ = ["StepState", "Stepwise"]

_NAME = "SegMoE.step"


class StepState(NamedTuple):
    """What a causal layer keeps of the steps so far: a pytree of tensors whose shapes stay.

    Attributes:
        steps: (..., P, D), dtype of x. Steps of the running segment; 0 where none has come yet.
        real: (..., P) bool. False where a step was padding.
        topk_weights: (..., top_k) float32 (float64 where x is). Routing of the running segment.
        topk_ids: (..., top_k) int32.
        place: (...) int64. How many steps of the running segment have come, 0 to P - 1.
    """

    steps: Tensor
    real: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    place: Tensor

    def to(self, device: torch.device | str) -> "StepState":
        """The same on another device."""
        return StepState(*(tensor.to(device) for tensor in self))

    def index_select(self, order: Tensor) -> "StepState":
        """The sequences ``order``, (N,) integers, of the first batch dimension, as beams want."""
        return StepState(*(tensor.index_select(0, order) for tensor in self))


# A torch.load with weights_only=True takes it as it takes tensors.
torch.serialization.add_safe_globals([StepState])


class Stepwise(nn.Module):
    """Gives `SegMoE` its ``step``."""

    @check.refuse_other_names
    def step(
        self: Any,
        x: Tensor,
        state: StepState | None = None,
        padding_mask: Tensor | None = None,
        *,
        skip_padding: bool = False,
    ) -> tuple[Tensor, StepState]:
        """Apply a causal layer to the next steps of sequences.

        Together they equal one call of the layer over whole sequences. The first does bit for bit;
        later ones run the same products for other numbers of rows, whose sums may be rounded in
        another order (and where two experts are as likely up to that, another one be chosen).
        Dropout is drawn for each call, the router's once for each segment. Losses and statistics
        are of whole sequences: calls are not counted, and a layer that has a loss to add refuses.

        Args:
            x: (..., n, D). The next n steps of each sequence, n = 0 included.
            state: what the call before returned, which stays as it is; None where sequences begin.
            padding_mask: (..., n) bool, True = real. Masked steps contribute nothing and get 0.
            skip_padding: masked steps take no place in a segment, so that every sequence has the
                segments that it has without them, wherever they are (else they take one, as in a
                call of the layer).

        Returns:
            ``(y, state)``: (..., n, D) in the dtype of x, and the StepState behind these steps.

        Raises:
            TypeError: for a wrong type or dtype.
            ValueError: for a layer that is not causal, has a loss to add in training or is sharded,
                a state of another layer or batch, or another wrong shape or device.
            RuntimeError: if backend="triton" can't run here.
        """
        check.check_x(_NAME, x, self.d_model)
        check.check_mask(_NAME, padding_mask, x)
        check.check_flag(_NAME, "skip_padding", skip_padding)
        if not self.causal:
            rule = "be True: in other layers, a step's expert depends on later steps"
            check.fail_value(_NAME, "causal", rule, False)
        for name in ("aux_loss_weight", "z_loss_weight"):
            if self.training and getattr(self, name):
                rule = "be 0 in training: the loss is of whole sequences"
                check.fail_value(_NAME, name, rule, getattr(self, name))
        if state is not None:
            _check_state(x, state, self.segment_size, self.top_k)
        if self.num_experts == 0:
            y: Tensor = self.forward(x, padding_mask)
            return y, _begin(x, self.segment_size, self.top_k) if state is None else state
        batch_shape = x.shape[:-2]
        flat = state
        if state is not None:
            batch, dims = math.prod(batch_shape), len(batch_shape)
            flat = StepState(*(t.reshape((batch, *t.shape[dims:])) for t in state))

        def run_inside(x: Tensor, *weights: Any) -> tuple[Tensor, ...]:
            stepping = _Stepping(flat, skip_padding)

            def run(
                x: Tensor, weights: LayerWeights, options: Options, mask: Tensor | None
            ) -> tuple[Tensor, Routing]:
                held = weights.experts.up_proj
                if hasattr(held, "device_mesh") or held.shape[0] != self.num_experts:
                    rule = "hold all of its experts as plain tensors"
                    check.fail_value(
                        _NAME, "layer", rule, f"{type(held).__name__} {tuple(held.shape)}"
                    )
                return run_layer(x, weights, options, mask, self.backend, stepping.on)

            y, _ = self._forward_experts(x, padding_mask, *weights, run=run)
            assert stepping.state is not None  # which the run has left
            return y, *stepping.state

        y, *kept = self._call_parts(x, run_inside)
        return y, StepState(*(t.reshape((*batch_shape, *t.shape[1:])) for t in kept))


def _kinds(x: Tensor, segment_size: int, top_k: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each field of a state for these sequences."""
    lead, float_type = x.shape[:-2], torch.promote_types(x.dtype, torch.float32)
    return [
        ((*lead, segment_size, x.shape[-1]), x.dtype),
        ((*lead, segment_size), torch.bool),
        ((*lead, top_k), float_type),
        ((*lead, top_k), torch.int32),
        ((*lead,), torch.int64),
    ]


def _begin(x: Tensor, segment_size: int, top_k: int) -> StepState:
    """The state in front of the first step, whose routing is still to be found."""
    kinds = _kinds(x, segment_size, top_k)
    state = StepState(*(x.new_zeros(shape, dtype=dtype) for shape, dtype in kinds))
    return state._replace(real=~state.real)


def _check_state(x: Tensor, state: Any, segment_size: int, top_k: int) -> None:
    """Refuse what is not the state of such a layer for these sequences."""
    if not isinstance(state, StepState):
        check.fail_type(_NAME, "state", "be a StepState or None", type(state).__name__)
    kinds = _kinds(x, segment_size, top_k)
    for name, tensor, (shape, dtype) in zip(StepState._fields, state, kinds, strict=True):
        if not isinstance(tensor, Tensor):
            check.fail_type(_NAME, f"state.{name}", "be a torch.Tensor", type(tensor).__name__)
        if tensor.shape != shape:
            rule = f"have shape {shape} for this layer and x"
            check.fail_value(_NAME, f"state.{name}", rule, tuple(tensor.shape))
        if tensor.dtype != dtype:
            check.fail_type(_NAME, f"state.{name}", f"have dtype {dtype}", tensor.dtype)
        if tensor.device != x.device:
            check.fail_value(_NAME, f"state.{name}", f"be on {x.device} as x", tensor.device)


class _Stepping:
    """Stands in for a backend's stages: `pipeline.Stages` on steps behind a state."""

    def __init__(self, state: StepState | None, skip_padding: bool) -> None:
        self.state, self.skip_padding = state, skip_padding

    def on(self, stages: Any) -> "_Stepping":
        """Run on the stages of a backend."""
        self.stages = stages
        self.combine, self.shared_combine = stages.combine, stages.shared_combine
        return self

    def routed_experts(
        self,
        x: Tensor,
        router_weight: Tensor,
        experts: FFNWeights,
        options: Options,
        *,
        router_start: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, RouterOutput, Tensor]:
        """Stages 1 to 3; leaves the state behind these steps in ``state``."""
        of_router: Any = {**options.of_router(), "router_start": router_start}
        if self.state is None and not (self.skip_padding or options.router_dropout):
            # Segments begin where x does: a whole call, and its end once more for the state.
            first = max(x.shape[1] // options.segment_size - 1, 0) * options.segment_size
            mask = None if padding_mask is None else padding_mask[:, first:]
            self._advance(x[:, first:], router_weight, of_router, mask)
            out: tuple[Tensor, RouterOutput, Tensor] = self.stages.routed_experts(
                x,
                router_weight,
                experts,
                options,
                router_start=router_start,
                padding_mask=padding_mask,
            )
            return out
        routed, weights, ids = self._advance(x, router_weight, of_router, padding_mask)
        permutation = self.stages.permute(ids, router_weight.shape[0])
        expert_out = self.stages.expert_ffn(
            x.to(experts.up_proj.dtype),
            weights,
            permutation,
            experts,
            **options._replace(segment_size=1).of_experts(),
            padding_mask=padding_mask,
        )
        return expert_out, routed, permutation.expert_counts

    def _advance(
        self,
        x: Tensor,
        router_weight: Tensor,
        of_router: dict[str, Any],
        padding_mask: Tensor | None,
    ) -> tuple[RouterOutput, Tensor, Tensor]:
        """Route; ``(routed, topk_weights, topk_ids)``, the latter of each step of x, (B * n, k)."""
        size = of_router["segment_size"]
        batch, count, _ = x.shape
        old = self.state
        kept = _begin(x, size, of_router["top_k"]) if old is None else old
        # Room for the new steps and all of the segment that begins behind them.
        room = -(-(size - 1 + count) // size) * size
        place = kept.place[:, None] + torch.arange(count, device=x.device)
        filled = kept.place + count
        if self.skip_padding and padding_mask is not None and count:
            come = padding_mask.cumsum(1)
            filled = kept.place + come[:, -1]
            # Padding goes behind the room, where nobody looks.
            place = torch.where(padding_mask, kept.place[:, None] + come - 1, size + room)
        window = torch.cat([kept.steps, x.new_zeros(batch, room + 1, x.shape[-1])], 1)
        window = window.scatter(1, place[..., None].expand_as(x), x)[:, :-1]
        # Steps that have not come count as real: the segment that runs will be routed.
        real = torch.cat([kept.real, kept.real.new_ones(batch, room + 1)], 1)
        if padding_mask is not None:
            real = real.scatter(1, place, padding_mask)
            place = place.clamp_max(size + room - 1)
        real = real[:, :-1]
        routed = self.stages.route(window, router_weight, **of_router, padding_mask=real)
        pieces = (batch, 1 + room // size)
        weights, ids = (t.unflatten(0, pieces) for t in (routed.topk_weights, routed.topk_ids))
        if old is not None:
            weights = torch.cat([kept.topk_weights[:, None], weights[:, 1:]], 1)
            ids = torch.cat([kept.topk_ids[:, None], ids[:, 1:]], 1)
        # Of steps: no index occurs twice, so gradients are added in one order.
        weights, ids = (repeat(t, "b j k -> b (j p) k", p=size) for t in (weights, ids))
        begin = filled // size * size
        running = begin[:, None] + torch.arange(size, device=x.device)
        self.state = StepState(
            _at(window, running),
            real.gather(1, running),
            _at(weights, begin[:, None])[:, 0],
            _at(ids, begin[:, None])[:, 0],
            filled - begin,
        )
        weights, ids = _at(weights, place), _at(ids, place)
        if padding_mask is not None:
            ids = ids.masked_fill(~padding_mask[..., None], -1)
        return routed, weights.flatten(0, 1), ids.flatten(0, 1)


def _at(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of each sequence: (B, L, W) at (B, M) -> (B, M, W)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
