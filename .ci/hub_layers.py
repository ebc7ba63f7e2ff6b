"""Layers of the kernel on Hugging Face's Hub: forwards for modules that hold the tensors."""

from torch import Tensor, nn

from segmoe_kernels.functional import run_layer
from segmoe_kernels.layer.modules import Experts, FeedForward, SegmentRouter
from segmoe_kernels.losses import inject_loss, load_balancing_loss, router_z_loss, scale_loss
from segmoe_kernels.options import Options
from segmoe_kernels.routing import LayerWeights

__all__ = ["SegMoE"]


class SegMoE(nn.Module):
    """The layer on the tensors and options of the module whose forward this replaces.

    That module names them as `SegMoE` of the package does; an option that it lacks has the default
    of `functional.seg_moe`. Its parts are read, not called: no hooks or adapters on them.
    """

    has_backward = True
    can_torch_compile = True

    segment_size: int
    router: SegmentRouter
    experts: Experts

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return (..., T, D) for x (..., T, D) and padding_mask (..., T), True = real."""
        options = Options(**{n: getattr(self, n) for n in Options._fields if hasattr(self, n)})
        if not self.training:
            options = options._replace(dropout=0.0, router_dropout=0.0)
        shared = getattr(self, "shared_expert", None)
        gate = getattr(self, "shared_gate", None)
        projections = (getattr(self, name, None) for name in ("in_proj", "out_proj"))
        weights = LayerWeights(
            self.router.weight,
            Experts.weights(self.experts),
            None if shared is None else FeedForward.weights(shared),
            None if gate is None else gate.weight,
            *(None if p is None else (p.weight, p.bias) for p in projections),
            getattr(self.router, "start", None),
        )
        y, routing = run_layer(x, weights, options, padding_mask, getattr(self, "backend", "auto"))
        losses = {"aux_loss_weight": load_balancing_loss, "z_loss_weight": router_z_loss}
        for name, function in losses.items():
            weight = getattr(self, name, 0.0)
            if self.training and weight:
                loss = weight * function(routing)
                y = inject_loss(y, scale_loss(loss, getattr(self, "loss_scaler", None)))
        return y
