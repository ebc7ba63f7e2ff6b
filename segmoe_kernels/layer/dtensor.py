"""The layer on `torch.distributed.tensor.DTensor`: every rank runs the kernels on what it has."""

from collections.abc import Callable

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.utils._pytree import tree_map_only

from segmoe_kernels import validation as check
from segmoe_kernels.options import Options
from segmoe_kernels.routing import LayerWeights, Routing

__all__ = ["run_local"]


def run_local(
    function: Callable[..., tuple[Tensor, Routing]],
    x: Tensor,
    weights: LayerWeights,
    options: Options,
    padding_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Routing]:
    """Run ``function``, such as `functional.run_layer`, on local tensors.

    Weights are gathered where they are sharded. x may be replicated, or sharded on a batch
    dimension; then a weight's gradient is a sum over the ranks (`Partial`), which DTensor adds up.
    y is laid out as x; routing is of this rank's segments, local.
    """
    if not isinstance(x, DTensor):
        rule = "be a DTensor, as the weights are"
        check.fail_type("SegMoE.forward", "x", rule, type(x).__name__)
    mesh, layout = x.device_mesh, x.placements
    for placement in layout:
        batch = isinstance(placement, Shard) and placement.dim < x.ndim - 2
        if not batch and not isinstance(placement, Replicate):
            rule = "be replicated or sharded on a batch dimension"
            check.fail_value("SegMoE.forward", "x", rule, placement)
    gathered = [Replicate()] * len(layout)
    grads: list[Placement] = [Partial() if isinstance(p, Shard) else Replicate() for p in layout]

    def local(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            return tensor.redistribute(mesh, gathered).to_local(grad_placements=grads)
        if any(isinstance(placement, Shard) for placement in layout):
            # Its gradient would be of this rank's part of the batch alone.
            rule = "have a DTensor for every weight, as x is sharded"
            check.fail_type("SegMoE.forward", "layer", rule, f"a {type(tensor).__name__}")
        return tensor

    if isinstance(padding_mask, DTensor):
        padding_mask = padding_mask.redistribute(mesh, layout).to_local()
    weights = tree_map_only(Tensor, local, weights)
    # x's gradient lies as x does: each rank has all of its own part's.
    steps = x.to_local(grad_placements=layout)
    y, routing = function(steps, weights, options, padding_mask, backend)
    return DTensor.from_local(y, mesh, layout, shape=x.shape, stride=x.stride()), routing
