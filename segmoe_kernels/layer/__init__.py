"""`SegMoE`, the drop-in layer."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segmoe_kernels import validation as check
from segmoe_kernels.functional import resolve_backend, run_layer
from segmoe_kernels.layer.decoding import Stepwise
from segmoe_kernels.layer.modules import (
    Experts,
    FeedForward,
    SegmentRouter,
    call_around,
    is_plain,
    reset_linear,
)
from segmoe_kernels.losses import (
    check_scaler,
    inject_loss,
    load_balancing_loss,
    router_z_loss,
    scale_loss,
)
from segmoe_kernels.options import Options
from segmoe_kernels.pipeline import autocast_weights
from segmoe_kernels.reference.experts import dense_ffn
from segmoe_kernels.routing import FFNWeights, LayerWeights, Routing

__all__ = ["SegMoE", "set_loss_scaler"]


class OfficialNames(NamedTuple):
    """What differs between official classes in their keys."""

    nested: str  # before an expert's projections: "1." inside a Sequential, else ""
    shared: str  # the shared expert's maps: "proj" of Linear, "conv" of 1x1 convolutions


# What is called around the computation, in this order.
_PARTS = {"router": SegmentRouter, "experts": Experts, "shared_expert": FeedForward}


class SegMoE(Stepwise):
    """Mixture of experts that routes segments of contiguous time steps; replaces an FFN.

    A sequence is cut into segments of ``segment_size`` steps (the last one as if padded with
    zeros); a router looks at the whole segment and sends it to ``top_k`` experts; a shared expert
    serves every segment. ``y = layer(x)`` has the shape and dtype of x.

    With ``shared_expert="segment"``, ``expert_scope="token"`` and the other defaults this is the
    layer of the official code; `load_official` reads its checkpoints. Differences: an expert
    without a segment gets a zero gradient instead of none; ties go to the lowest expert.

    Args:
        d_model: D, width of the model.
        d_ff: F, width of an expert's hidden layer (``P * F`` in segment-wide experts).
        num_experts: E; 0 gives the plain dense FFN of width D.
        top_k: experts per segment, 1 to E.
        segment_size: P, steps in a segment; 1 is the ordinary token-wise mixture.
        pooling: what the router sees of a segment: "concat" (its P steps side by side), or over
            its real steps "mean", "max", "first", "last".
        expert_scope: "token" applies an expert to each step (official), "segment" to the
            concatenated steps (the paper's wording), "projected" to a D-wide projection of the
            segment.
        shared_expert: "segment" (official), "token", or None. With "projected" both names mean
            the same: one FFN on the projected segment.
        shared_d_ff: width of the shared expert's hidden layer, ``P`` times that in "segment";
            None: d_ff (official). Time-MoE's and Qwen2-MoE's is wider than their experts'.
        activation: a name in `segmoe_kernels.activations.ACTIVATIONS`, such as exact "gelu".
        gated: hidden is ``act(gate(x)) * up(x)`` instead of ``act(up(x))``.
        bias: biases in every FFN and projection; the router has none.
        dropout: on the hidden layers, in training.
        router_dropout: on the router's probabilities, in training (official behaviour).
        router_temperature: divides the router's logits.
        renormalize: divide the chosen probabilities by their sum. None: only where top_k > 1.
            Official checkpoints older than 2026-06-28 were trained with True at top_k = 1.
        causal: route segment j on segment j - 1, so that ``y[t]`` never depends on ``x[>t]``.
        aux_loss_weight: weight of this layer's own load-balancing loss, whose gradient the
            returned tensor carries in training (the training loop stays as it is). The official
            recipe is another loss, 0.02 times one that pools the routing of all layers; layers
            with a weight of 0.02 each add about as many times that as there are layers. For the
            official one leave this at 0 and see `stats.collect_routings`; so, too, where one
            output gets several backward calls, or one for gradients of inputs: the injected
            gradient would count in each.
        z_loss_weight: likewise for the router z-loss.
        backend: "auto", "triton" or "reference"; see `functional.resolve_backend`.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        aux_loss: () tensor, detached: the weighted auxiliary losses of the last call in training.
        loss_scaler: what scales the task's loss: ``torch.amp.GradScaler``, a number, or None; see
            `set_loss_scaler`. Copies and pickles keep a number only.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a value out of range, or options that exclude each other.

    Source: arXiv 2601.21641; evortigosa/segmoe_forecast, model/MoE.py, class ``MoESegment``.
    """

    # Called as (layer, routing, segments of one sequence) after each pass; copies have none.
    _observers: tuple[Any, ...] = ()
    _loss_scaler: Any = None
    # How the checkpoint that it came from names its parts, for `to_official`.
    _official: OfficialNames | None = None
    # What it stands for in a model, for `swap_recipe`.
    _place: Any = None

    @check.refuse_other_names
    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        top_k: int = 1,
        segment_size: int = 1,
        pooling: str = "concat",
        expert_scope: str = "token",
        shared_expert: str | None = "segment",
        shared_d_ff: int | None = None,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        router_dropout: float = 0.0,
        router_temperature: float = 1.0,
        renormalize: bool | None = None,
        causal: bool = False,
        aux_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_ff, self.num_experts = d_model, d_ff, num_experts
        self.top_k, self.segment_size = top_k, segment_size
        self.pooling, self.expert_scope = pooling, expert_scope
        self.shared_expert_scope, self.shared_d_ff = shared_expert, shared_d_ff
        self.activation, self.gated, self.bias = activation, gated, bias
        self.dropout, self.router_dropout = dropout, router_dropout
        self.router_temperature, self.renormalize = router_temperature, renormalize
        self.causal = causal
        self.aux_loss_weight, self.z_loss_weight = aux_loss_weight, z_loss_weight
        self.backend = backend
        self._check_options()
        check.check_device("SegMoE", "device", device)
        if dtype is not None:
            check.check_dtype("SegMoE", "dtype", dtype)
        self._make_parts({"device": device, "dtype": dtype})
        # Neither buffer nor parameter: no state dict, broadcast or loader has to know it.
        self._aux_loss = self._no_loss()

    def _make_parts(self, factory: dict[str, Any]) -> None:
        """The modules that hold parameters; their order is that of the random numbers, too."""
        self.router: SegmentRouter | None = None
        self.experts: Experts | None = None
        self.shared_expert: FeedForward | None = None
        self.shared_gate: nn.Linear | None = None
        self.in_proj: nn.Linear | None = None
        self.out_proj: nn.Linear | None = None
        width, hidden, experts, size = self.d_model, self.d_ff, self.num_experts, self.segment_size
        shared, projected = self.shared_expert_scope, self.expert_scope == "projected"
        of_ffn = {"gated": self.gated, "bias": self.bias, **factory}
        if experts == 0:
            self.shared_expert = FeedForward(width, hidden, **of_ffn)
            return
        if projected:
            self.in_proj = nn.Linear(width * size, width, bias=self.bias, **factory)
            self.out_proj = nn.Linear(width, width * size, bias=self.bias, **factory)
            reset_linear(self.in_proj)
            reset_linear(self.out_proj)
        pooled = width * (size if self.pooling == "concat" and not projected else 1)
        self.router = SegmentRouter(pooled, experts, causal=self.causal, **factory)
        factor = size if self.expert_scope == "segment" else 1
        self.experts = Experts(experts, width * factor, hidden * factor, **of_ffn)
        if shared is not None:
            factor = size if shared == "segment" and not projected else 1
            hidden = hidden if self.shared_d_ff is None else self.shared_d_ff
            self.shared_expert = FeedForward(width * factor, hidden * factor, **of_ffn)
            self.shared_gate = nn.Linear(width * factor, 1, bias=False, **factory)
            reset_linear(self.shared_gate)

    def _options(self) -> Options:
        """What the stages do, as the attributes say now."""
        kind = self.pooling, self.expert_scope, self.activation
        router = self.router_dropout, self.router_temperature, self.renormalize
        return Options(self.segment_size, self.top_k, *kind, self.dropout, *router)

    def _check_options(self) -> None:
        name = "SegMoE"
        sizes = {"d_model": 1, "d_ff": 1, "num_experts": 0}
        for size, least in sizes.items():
            setattr(self, size, check.check_integer(name, size, getattr(self, size), least))
        for option, value in self._options().checked(name)._asdict().items():
            setattr(self, option, value)
        if self.top_k > self.num_experts > 0:
            rule = f"be in [1, num_experts={self.num_experts}]"
            check.fail_value(name, "top_k", rule, self.top_k)
        shared = self.shared_expert_scope
        check.check_choice(name, "shared_expert", shared, check.SHARED_EXPERTS)
        if self.shared_d_ff is not None:
            self.shared_d_ff = check.check_integer(name, "shared_d_ff", self.shared_d_ff, 1)
            if shared is None or self.num_experts == 0:
                rule = "be None without a shared expert beside experts"
                check.fail_value(name, "shared_d_ff", rule, self.shared_d_ff)
        for flag in ("gated", "bias", "causal"):
            check.check_flag(name, flag, getattr(self, flag))
        for weight in ("aux_loss_weight", "z_loss_weight"):
            value = check.check_positive(name, weight, getattr(self, weight), zero=True)
            setattr(self, weight, value)
        check.check_choice(name, "backend", self.backend, check.BACKENDS)
        if self.causal and (self.expert_scope != "token" or shared == "segment"):
            rule = (
                "be False unless expert_scope='token' and shared_expert is 'token' or None "
                "(a wider scope would let a step see later ones)"
            )
            got = f"expert_scope={self.expert_scope!r}, shared_expert={shared!r}"
            check.fail_value(name, "causal", rule, got)

    @property
    def loss_scaler(self) -> Any:
        """What scales the task's loss: an object with ``scale(loss)``, a number, or None."""
        if "loss_scaler" in self._modules:  # PyTorch puts a module past the setter
            check_scaler("SegMoE", "loss_scaler", self._modules["loss_scaler"])
        return self._loss_scaler

    @loss_scaler.setter
    def loss_scaler(self, scaler: Any) -> None:
        self._loss_scaler = check_scaler("SegMoE", "loss_scaler", scaler)

    @property
    def aux_loss(self) -> Tensor:
        """() tensor, detached: the weighted auxiliary losses of the last call in training."""
        # A copy, as compiled code writes in place. Who loads a layer that was made on the meta
        # device puts parameters into it, nothing else.
        unweighted = self.aux_loss_weight == 0 and self.z_loss_weight == 0
        return self._no_loss() if unweighted or self._aux_loss.is_meta else self._aux_loss.clone()

    def _no_loss(self) -> Tensor:
        """A loss of 0 in the dtype that losses have here, beside the parameters."""
        beside = next(self.parameters())
        dtype = torch.float64 if beside.dtype == torch.float64 else torch.float32
        return torch.zeros((), dtype=dtype, device=beside.device)

    def _apply(self, fn: Any, recurse: bool = True) -> "SegMoE":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._keep_loss(self.aux_loss.to(self._no_loss()))
        return self

    def reset_parameters(self) -> None:
        """Initialise every parameter anew (a meta-device module needs it once it has memory)."""
        for module in (self.router, self.experts, self.shared_expert):
            if module is not None:
                module.reset_parameters()
        for linear in (self.shared_gate, self.in_proj, self.out_proj):
            if linear is not None:
                reset_linear(linear)
        self._aux_loss = self._no_loss()

    @check.refuse_other_names
    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., T, D).
            padding_mask: (..., T) bool, True = real. Masked steps contribute nothing and get 0.

        Returns:
            (..., T, D), dtype of x.

        Raises:
            TypeError: for a wrong type or dtype.
            ValueError: for a wrong shape or device.
            RuntimeError: if backend="triton" can't run here.
        """
        return self.forward_with_routing(x, padding_mask)[0]

    @check.refuse_other_names
    def forward_with_routing(
        self, x: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """As `forward`, with its arguments, but ``(y, routing)``.

        The routing's logits and probabilities carry gradients, for explicit losses.
        """
        check.check_x("SegMoE.forward", x, self.d_model)
        # Traced code as well: a mask of other values or another order would be used as it is.
        check.check_mask("SegMoE.forward", padding_mask, x)
        run = self._forward_experts if self.num_experts else self._forward_dense

        def run_inside(x: Tensor, *weights: Any) -> tuple[Tensor, ...]:
            y, found = run(x, padding_mask, *weights)
            return y, *found  # tensors side by side, where hooks on the parts find them

        y, *fields = self._call_parts(x, run_inside)
        routing = Routing(*fields)
        if self.num_experts == 0:
            return y, routing
        # An exported program is the layer alone.
        for observe in () if torch.compiler.is_exporting() else self._observers:
            observe(self, routing, -(-x.shape[-2] // self.segment_size))
        return self._inject_losses(y, routing), routing

    def _call_parts(self, x: Tensor, function: Any) -> Any:
        """Call ``function(x, *weights)`` inside calls of all parts."""
        parts = []
        for name, kind in _PARTS.items():
            part = getattr(self, name)
            if part is not None:
                if not isinstance(part, kind) and not any(
                    isinstance(m, kind) for m in part.modules()
                ):
                    rule = f"be a segmoe_kernels.layer.modules.{kind.__name__}, or to wrap one"
                    check.fail_type("SegMoE.forward", name, rule, type(part).__name__)
                parts.append(part)
        return call_around(parts, x, function)

    def _forward_experts(
        self,
        x: Tensor,
        padding_mask: Tensor | None,
        router: tuple[Tensor, Tensor | None],
        experts: FFNWeights,
        shared: FeedForward | None = None,
        run: Callable[..., tuple[Tensor, Routing]] | None = None,
    ) -> tuple[Tensor, Routing]:
        run = run or self._run
        gate, in_proj, out_proj = self.shared_gate, self.in_proj, self.out_proj
        if self.causal != (router[1] is not None):
            rule = "be as the layer was made: its router has a start vector only then"
            check.fail_value("SegMoE.forward", "causal", rule, self.causal)
        options = self._options()
        if not self.training and (options.dropout or options.router_dropout):
            options = options._replace(dropout=0.0, router_dropout=0.0)
        plain = (shared is None or shared.is_plain()) and all(
            map(is_plain, (gate, in_proj, out_proj))
        )
        # The stages know no bias of the gate, which somebody's own may have.
        if not plain or (gate is not None and gate.bias is not None):
            # Not imported by those who don't need it, as below.
            from segmoe_kernels.layer.called import run_called

            called = shared, gate, in_proj, out_proj
            weights = LayerWeights(router[0], experts, router_start=router[1])
            return run_called(run, x, weights, options, padding_mask, self.backend, *called)
        weights = LayerWeights(
            router[0],
            experts,
            None if shared is None else shared.weights(),
            None if gate is None else gate.weight,
            None if in_proj is None else (in_proj.weight, in_proj.bias),
            None if out_proj is None else (out_proj.weight, out_proj.bias),
            router[1],
        )
        return run(x, weights, options, padding_mask)

    def _run(
        self, x: Tensor, weights: LayerWeights, options: Options, padding_mask: Tensor | None
    ) -> tuple[Tensor, Routing]:
        """Run the stages; `parallel` has other ones."""
        of_meshes = (x, weights.router_weight, weights.experts.up_proj)
        if any(hasattr(tensor, "device_mesh") for tensor in of_meshes):
            from segmoe_kernels.layer.dtensor import run_local

            return run_local(run_layer, x, weights, options, padding_mask, self.backend)
        return run_layer(x, weights, options, padding_mask, self.backend)

    def _forward_dense(
        self, x: Tensor, padding_mask: Tensor | None, ffn: FeedForward
    ) -> tuple[Tensor, Routing]:
        if not torch.compiler.is_compiling():
            resolve_backend(self.backend, x)
        if padding_mask is not None:
            x = x.masked_fill(~padding_mask[..., None], 0)
        options = self._options().checked("SegMoE.forward")
        dropout = options.dropout if self.training else 0.0
        if ffn.is_plain():
            weights = ffn.weights()
            cast, dtype = autocast_weights(x, LayerWeights(weights.up_proj, weights))
            weights = cast.experts
            like = torch.empty(0, dtype=dtype, device=x.device)
            check.check_ffn("SegMoE.forward", "shared_expert", weights, like, self.d_model, None)
            y = dense_ffn(x.to(dtype), weights, self.activation, dropout)
        else:
            y = ffn.run(x, self.activation, dropout)
        y = y.to(x.dtype)
        if padding_mask is not None:
            y = y.masked_fill(~padding_mask[..., None], 0)
        num_segments = math.prod(x.shape[:-2]) * -(-x.shape[-2] // self.segment_size)
        accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
        nothing = x.new_zeros(num_segments, 0, dtype=accumulate)
        ids = nothing.to(torch.int32)
        return y, Routing(nothing, nothing, nothing, ids, ids.new_zeros(0))

    def _inject_losses(self, y: Tensor, routing: Routing) -> Tensor:
        if not self.training or (self.aux_loss_weight, self.z_loss_weight) == (0.0, 0.0):
            return y
        losses = []
        kinds = {"aux_loss_weight": load_balancing_loss, "z_loss_weight": router_z_loss}
        for name, function in kinds.items():  # which may have been set since the layer was made
            weight = check.check_positive("SegMoE.forward", name, getattr(self, name), zero=True)
            if weight:
                losses.append(weight * function(routing))
        if not losses:
            return y
        loss = sum(losses[1:], start=losses[0])
        if not torch.compiler.is_exporting():  # a program has no attributes to keep it in
            self._keep_loss(loss.detach())
        if not torch.is_grad_enabled():
            return y
        return inject_loss(y, scale_loss(loss, self.loss_scaler))

    def _keep_loss(self, value: Tensor) -> None:
        kept = self._aux_loss
        if not torch.compiler.is_compiling():
            # A plain tensor, which outlives transforms of torch.func and inference mode: a module
            # that kept what they wrap could be neither copied nor saved.
            value = torch.func.debug_unwrap(value)
            if value.is_inference():
                with torch.inference_mode(False):
                    value = value.clone()
        elif (kept.device, kept.dtype) == (value.device, value.dtype):
            # In place: inside a checkpoint the compiler refuses a new attribute. By ``data``, as
            # the checkpoint takes what is written for one of its inputs.
            kept.data.copy_(value)
            return
        self._aux_loss = value

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        # A copied scaler would go on with the scale of the moment, an observer watch two layers.
        scaler = self.loss_scaler if isinstance(self.loss_scaler, int | float) else None
        return {**state, "_loss_scaler": scaler, "_observers": ()}

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        names = ["d_model", "d_ff", "num_experts", *Options._fields, "gated", "bias", "causal"]
        names += ["aux_loss_weight", "z_loss_weight", "backend"]
        shared = f"shared_expert={self.shared_expert_scope!r}"
        if self.shared_d_ff is not None:
            shared += f", shared_d_ff={self.shared_d_ff}"
        return ", ".join([*(f"{name}={getattr(self, name)!r}" for name in names), shared])


def set_loss_scaler(model: nn.Module, scaler: Any) -> None:
    """Tell all layers of a model what scales the task's loss.

    The gradient of an injected auxiliary loss has the scale 1, whatever the training loop does to
    the task's loss. Where that is divided by N to accumulate gradients over N micro batches, or
    multiplied by ``torch.amp.GradScaler``, which takes the scale out of all gradients before the
    optimizer's step, the layers have to do the same::

        set_loss_scaler(model, 1 / N)       # N micro batches; once, then train as ever
        scaler = torch.amp.GradScaler()
        set_loss_scaler(model, scaler)      # float16

    Args:
        model: with `SegMoE` layers inside.
        scaler: a positive number, an object with ``scale(loss)`` that multiplies, or None.

    Raises:
        TypeError: if model is not a module, or scaler neither a number nor has ``scale``, or is a
            module itself, as DeepSpeed's engine is.
        ValueError: if the number is not positive and finite, or model has no layer.
    """
    check.check_module("set_loss_scaler", "model", model)
    layers = [module for module in model.modules() if isinstance(module, SegMoE)]
    if not layers:
        rule = "have a SegMoE inside"
        check.fail_value("set_loss_scaler", "model", rule, type(model).__name__)
    scaler = check_scaler("set_loss_scaler", "scaler", scaler)
    for layer in layers:
        layer.loss_scaler = scaler
