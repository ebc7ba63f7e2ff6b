"""Expert parallelism on `torch.distributed`: each rank keeps some experts, segments travel.

::

    layer = shard_experts(SegMoE(...))         # on every rank, before the optimizer is made
    y = layer(x)                               # x is this rank's own batch

A rank routes its own segments with the whole router, sends each routed slot's segment (P steps at
once) and weight to the rank that has the slot's expert, runs its experts on what it gets, and
sends the weighted outputs back. The shared expert runs where the segment is. Four collectives a
call (counts, segments, weights, outputs), three more in backward.
"""

import copy
import hashlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from segmoe_kernels import pipeline
from segmoe_kernels import validation as check
from segmoe_kernels.functional import backend_stages
from segmoe_kernels.layer import SegMoE
from segmoe_kernels.layer.modules import Experts
from segmoe_kernels.options import Options, check_layer
from segmoe_kernels.routing import FFNWeights, LayerWeights, RouterOutput, Routing
from segmoe_kernels.segments import segments

__all__ = ["expert_parameter_names", "gather_experts", "shard_experts"]


_T = TypeVar("_T", bound=SegMoE)


class _Group:
    """A process group, the same one in all copies of a layer."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Group":
        return self

    def __reduce__(self) -> Any:
        message = "a layer with sharded experts can't be pickled: gather_experts(layer) first"
        raise TypeError(message)


def expert_blocks(num_experts: int, world: int) -> list[int]:
    """How many experts each of ``world`` ranks has: the first one more where E is no multiple."""
    each, more = divmod(num_experts, world)
    return [each + (rank < more) for rank in range(world)]


class _ShardedSegMoE(SegMoE):
    """What `shard_experts` returns: ``experts`` is this rank's block."""

    _group: _Group
    _average_gradients: bool

    def _run(
        self, x: Tensor, weights: LayerWeights, options: Options, padding_mask: Tensor | None
    ) -> tuple[Tensor, Routing]:
        group = self._group
        if self._average_gradients:
            scaled = [None if w is None else _scale_grad(w, group.world) for w in weights.experts]
            weights = weights._replace(experts=FFNWeights(*scaled))  # type: ignore[arg-type]  # up and down are never None
        local = backend_stages(self.backend, x)
        check.check_weights("SegMoE.forward", x, weights)
        weights, dtype = pipeline.autocast_weights(x, weights)
        num_local = expert_blocks(self.num_experts, group.world)[group.rank]
        options = check_layer("SegMoE.forward", x, weights, dtype, options, num_local=num_local)
        stages: Any = SimpleNamespace(
            routed_experts=partial(_routed_experts, group, local),
            shared_combine=local.shared_combine,
            combine=local.combine,
        )
        return pipeline.run_stages(stages, x, weights, options, padding_mask)


def shard_experts(layer: SegMoE, group: Any = None, *, average_gradients: bool = False) -> SegMoE:
    """Make a layer of which each rank of a process group keeps a block of the experts.

    Every rank calls it, and from then on calls the layer and its backward as often as the others,
    with batches of any size, also none. Results are those of one process to rounding, with both
    backends. Dropout inside the experts is drawn by the rank that has them: reproducible, but
    other numbers than one process draws.
    Auxiliary losses are of each rank's own segments, as under data parallelism. The sizes of what
    is sent are read by the host: one synchronisation a call, and a graph break under
    ``torch.compile``. What a rank alone refuses, such as an x of the wrong dtype, leaves the
    others waiting until the group's timeout; checkpointed layers send twice, on all ranks.

    Gradients: each rank's loss reaches the experts wherever they are, so an expert's gradient is
    the sum over the ranks' losses. Router, shared expert and all other parameters get the gradient
    of this rank's loss alone, for the training loop to add up. Where it takes the mean instead, as
    `torch.nn.parallel.DistributedDataParallel` does, pass ``average_gradients=True`` and keep the
    experts out of it::

        names = expert_parameter_names(model)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)

    Args:
        layer: SegMoE with experts, the same on every rank; the first rank's values win. It stays
            as it is. On the meta device no values are sent: load them afterwards, as ranks that
            call ``reset_parameters`` after the same seed have the same experts.
        group: process group of ``torch.distributed``; None: all ranks. NCCL for GPUs, gloo for
            CPUs.
        average_gradients: divide the experts' gradients by the number of ranks of the group. If
            several groups have the same experts, average over those that hold the same block.

    Returns:
        SegMoE with the same options. Its ``experts`` hold this rank's block, E / world of them
        (the first ranks have one more where E is no multiple; ranks beyond E have none), under the
        same names: a checkpoint of it, or of an optimizer, is this rank's, for the same number of
        ranks. `gather_experts` gives the whole layer, which any number of ranks may shard again.

    Raises:
        TypeError: if layer is not a SegMoE, or average_gradients no bool.
        ValueError: if it has no experts, or the ranks' layers differ in more than values.
        RuntimeError: if ``torch.distributed`` is not initialised, or this rank not in the group.
    """
    name = "shard_experts"
    if type(layer) is not SegMoE:
        check.fail_type(name, "layer", "be a SegMoE, not yet sharded", type(layer).__name__)
    check.check_flag(name, "average_gradients", average_gradients)
    if layer.experts is None:
        check.fail_value(name, "layer", "have experts", "num_experts=0")
    if type(layer.experts) is not Experts:
        rule = "have experts without adapters, wrappers and parametrisations (add them afterwards)"
        check.fail_type(name, "layer", rule, type(layer.experts).__name__)
    check.check_group(name, group)
    own = _Group(group)
    _check_equal(layer, own)
    source = 0 if group is None else dist.get_global_rank(group, 0)
    blocks = expert_blocks(layer.num_experts, own.world)
    start = sum(blocks[: own.rank])

    def cut(tensor: Tensor) -> Tensor:
        return tensor[start : start + blocks[own.rank]].clone()

    with torch.no_grad():
        copied = copy.deepcopy(layer)
        for tensor in [*copied.parameters(), *copied.buffers()]:
            if tensor.device.type != "meta":
                # Collectives send memory as it lies, and strides may differ between ranks.
                value = tensor.contiguous()
                dist.broadcast(value, source, group=group)
                tensor.copy_(value)
    result = _with_experts(copied, cut, _ShardedSegMoE)
    result.loss_scaler = layer.loss_scaler  # copies have none
    result._group, result._average_gradients = own, average_gradients
    return result


def gather_experts(layer: SegMoE) -> SegMoE:
    """Make the whole layer again, on every rank; all ranks of the group have to call it.

    Args:
        layer: from `shard_experts`. It stays as it is.

    Returns:
        SegMoE with all experts, to save or to go on with in one process.

    Raises:
        TypeError: if layer is not from `shard_experts`.
    """
    if not isinstance(layer, _ShardedSegMoE):
        rule = "be a layer from shard_experts"
        check.fail_type("gather_experts", "layer", rule, type(layer).__name__)
    own = layer._group
    blocks = expert_blocks(layer.num_experts, own.world)

    def gather(part: Tensor) -> Tensor:
        padded = part.new_zeros(max(blocks), *part.shape[1:])
        padded[: part.shape[0]] = part
        parts = [torch.empty_like(padded) for _ in blocks]
        dist.all_gather(parts, padded, group=own.group)
        return torch.cat([part[:size] for part, size in zip(parts, blocks, strict=True)])

    result = _with_experts(copy.deepcopy(layer), gather, SegMoE)
    result.loss_scaler = layer.loss_scaler
    del result._group, result._average_gradients
    return result


def expert_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that differ between ranks, for what treats all ranks as equal.

    Args:
        model: with layers from `shard_experts` inside, or one of them.

    Returns:
        As in ``model.named_parameters()``; empty without such layers.

    Raises:
        TypeError: if model is not a module.
    """
    check.check_module("expert_parameter_names", "model", model)
    return [
        name
        for prefix, module in model.named_modules()
        if isinstance(module, _ShardedSegMoE) and module.experts is not None
        for name, _ in module.experts.named_parameters(prefix=f"{prefix}.experts".lstrip("."))
    ]


def _check_equal(layer: SegMoE, own: _Group) -> None:
    """Refuse layers that differ between ranks, on all of them, before any value is sent."""
    device = next(layer.parameters()).device
    if device.type == "meta":
        return
    # What is frozen decides what backward sends.
    shapes = [
        (name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()
    ]
    digest = hashlib.sha256(f"{layer.extra_repr()} {shapes}".encode()).digest()
    mine = torch.tensor([int.from_bytes(digest[:7], "big")], device=device)
    theirs = [torch.empty_like(mine) for _ in range(own.world)]
    dist.all_gather(theirs, mine, group=own.group)
    numbers = torch.cat(theirs).tolist()
    others = [rank for rank, number in enumerate(numbers) if number != numbers[0]]
    if others:
        rule = "have the same options, shapes, dtypes and frozen parts on every rank"
        check.fail_value("shard_experts", "layer", rule, f"others than rank 0's on ranks {others}")


def _with_experts(layer: SegMoE, function: Callable[[Tensor], Tensor], kind: type[_T]) -> _T:
    """The layer as another class, with each of its experts' parameters changed."""
    assert layer.experts is not None  # `shard_experts` looked
    for name, parameter in layer.experts.named_parameters():
        with torch.no_grad():
            changed = function(parameter.detach())
        setattr(layer.experts, name, nn.Parameter(changed, parameter.requires_grad))
    layer.experts.num_experts = layer.experts.up_proj.shape[0]
    layer.__class__ = kind
    return cast(_T, layer)


class _ScaleGrad(torch.autograd.Function):
    """Pass a tensor through; divide its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.divisor, None


_scale_grad: Any = _ScaleGrad.apply


class _Exchange(torch.autograd.Function):
    """Send runs of rows to the ranks in order, get theirs; backward sends the gradients back.

    One function for all tensors of a hop, so that every rank runs the same collectives in the
    same order whatever its engine finds ready first.
    """

    @staticmethod
    def forward(
        ctx: Any, group: Any, send: list[int], receive: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        out = tuple(_all_to_all(tensor, send, receive, group) for tensor in tensors)
        needs = ctx.needs_input_grad[3:]
        ctx.mark_non_differentiable(*(t for t, n in zip(out, needs, strict=True) if not n))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        back = (
            _all_to_all(grad, ctx.receive, ctx.send, ctx.group) if needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad[3:], strict=True)
        )
        return None, None, None, *back


_exchange: Any = _Exchange.apply


def _all_to_all(tensor: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    out = tensor.new_empty(sum(receive), *tensor.shape[1:])
    dist.all_to_all_single(out, tensor.contiguous(), receive, send, group=group)
    return out


def _routed_experts(
    own: _Group,
    local: Any,
    x: Tensor,
    router_weight: Tensor,
    experts: FFNWeights,
    options: Options,
    *,
    router_start: Tensor | None,
    padding_mask: Tensor | None,
) -> tuple[Tensor, RouterOutput, Tensor]:
    """`reference.routed_experts` of this rank's segments, whose experts are on all ranks."""
    batch, length, _ = x.shape
    num_experts, top_k, segment_size = router_weight.shape[0], options.top_k, options.segment_size
    start, mask = router_start, padding_mask
    routed = local.route(
        x, router_weight, **options.of_router(), router_start=start, padding_mask=mask
    )
    order = local.permute(routed.topk_ids, num_experts)
    blocks = expert_blocks(num_experts, own.world)
    send, receive, counts = _exchange_counts(own, order.expert_counts, blocks)
    # Slots in the order of their experts are in the order of the ranks that have these.
    slots = order.sorted_to_slot[: sum(send)].long()
    pieces = segments(x.to(experts.up_proj.dtype), segment_size, padding_mask)
    rows = rearrange(pieces, "b j p d -> (b j) p d")[slots // top_k]
    weights = routed.topk_weights.reshape(-1, 1)[slots]
    rows, weights = _exchange(own.group, send, receive, rows, weights)
    if blocks[own.rank]:
        number = torch.arange(blocks[own.rank], dtype=torch.int32, device=x.device)
        ids = number.repeat(own.world).repeat_interleave(counts, output_size=sum(receive))
        out = local.expert_ffn(
            rows,
            weights,
            local.permute(ids[:, None], blocks[own.rank]),
            experts,
            **options.of_experts(),
        )[0]
    else:
        # No row comes here, but backward has to pass as on the other ranks.
        nothing = [w.sum() for w in experts if w is not None]
        out = rows * weights[..., None].to(rows.dtype) + torch.stack(nothing).sum()
    (out,) = _exchange(own.group, receive, send, out)
    y = out.new_zeros(routed.topk_ids.numel(), *out.shape[1:]).index_copy(0, slots, out)
    # Sizes are named, as those of an empty batch can't be derived.
    y = rearrange(y, "(b j k) p d -> k b (j p) d", b=batch, j=-(-length // segment_size), k=top_k)[
        :, :, :length
    ]
    if padding_mask is not None:
        y = y.masked_fill(~padding_mask[..., None], 0)
    return y, routed, order.expert_counts


def _exchange_counts(
    own: _Group, expert_counts: Tensor, blocks: list[int]
) -> tuple[list[int], list[int], Tensor]:
    """Tell every rank how many slots it gets for each of its experts.

    ``(send, receive, counts)``: slots to and from each rank, and (world * block,) slots from each
    rank for each of this rank's experts.
    """
    mine = expert_counts.long()
    counts = _all_to_all(mine, blocks, [blocks[own.rank]] * own.world, own.group)
    # One copy to the host for both: collectives want the sizes there.
    both = torch.cat([mine, counts]).tolist()
    send = [sum(both[sum(blocks[:r]) : sum(blocks[: r + 1])]) for r in range(own.world)]
    theirs, size = both[len(mine) :], blocks[own.rank]
    receive = [sum(theirs[r * size : (r + 1) * size]) for r in range(own.world)]
    return send, receive, counts
