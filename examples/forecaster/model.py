"""A patch Transformer for forecasting in which every FFN is a `SegMoE` layer.

Shape letters: ``B`` windows times channels, ``L`` look-back, ``H`` horizon, ``T`` patches,
``P`` segment_size, ``D`` d_model, ``F`` d_ff, ``E`` num_experts.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from segmoe_kernels import Routing, SegMoE, collect_routings, load_balancing_loss

_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class ForecasterConfig:
    """Sizes and options of the model.

    The three kinds of FFN share everything but the routing. "segment" routes ``segment_sizes[i]``
    patches at once in layer i; "token" routes each patch by itself through the same expert pool;
    "dense" is one FFN as wide as the experts that serve a patch (``top_k`` and the shared one), so
    that the work per patch is the same.

    Attributes:
        look_back: L.
        horizon: H.
        patch: steps in a patch; it divides look_back.
        d_model: D.
        d_ff: F, of one expert.
        num_layers: blocks.
        num_heads: of attention; the head width is even.
        ffn: "dense", "token" or "segment".
        num_experts: E, without the shared one.
        top_k: experts per segment.
        segment_sizes: P of each layer, where ffn is "segment".
        shared_expert: "token" or "segment" wide, or None.
        expert_scope: what an expert sees, "token", "segment" or "projected".
        pooling: what the router sees of a segment, see `SegMoE`.
        renormalize: whether chosen probabilities are divided by their sum: "auto" (if there is
            more than one), "on" or "off".
        positions: "rope" or "learned".
        instance_norm: what a window is taken relative to, "mean" or "last" value.
        dropout: on the outputs of attention and FFN.
        hidden_dropout: inside the FFN.
        head_dropout: before the head.
        router_dropout: on the router's probabilities.
        aux_loss_weight: of the official load-balancing loss, which pools the routing of all layers.
        linear_skip: add a linear map from look-back to horizon, for all kinds alike.
    """

    look_back: int = 512
    horizon: int = 96
    patch: int = 8
    d_model: int = 16
    d_ff: int = 32
    num_layers: int = 4
    num_heads: int = 2
    ffn: str = "segment"
    num_experts: int = 4
    top_k: int = 1
    segment_sizes: tuple[int, ...] = (5, 5, 4, 4)
    shared_expert: str | None = "token"
    expert_scope: str = "token"
    pooling: str = "concat"
    renormalize: str = "auto"
    positions: str = "rope"
    instance_norm: str = "last"
    dropout: float = 0.2
    hidden_dropout: float = 0.0
    head_dropout: float = 0.2
    router_dropout: float = 0.0
    aux_loss_weight: float = 0.02
    linear_skip: bool = False

    def __post_init__(self) -> None:
        if self.look_back % self.patch:
            raise ValueError(f"patch must divide look_back={self.look_back}, got {self.patch}")
        if self.d_model % (2 * self.num_heads):
            rule = f"must be a multiple of 2 * num_heads = {2 * self.num_heads}"
            raise ValueError(f"d_model {rule}, got {self.d_model}")
        if self.ffn not in {"dense", "token", "segment"}:
            raise ValueError(f"ffn must be 'dense', 'token' or 'segment', got {self.ffn!r}")
        if self.ffn == "segment" and len(self.segment_sizes) != self.num_layers:
            rule = f"must have num_layers={self.num_layers} entries"
            raise ValueError(f"segment_sizes {rule}, got {self.segment_sizes}")

    @property
    def num_patches(self) -> int:
        """T."""
        return self.look_back // self.patch

    @property
    def dense_width(self) -> int:
        """Hidden width of the dense FFN: that of the experts which serve one patch."""
        return self.d_ff * (self.top_k + (self.shared_expert is not None))

    def layer_segment(self, layer: int) -> int:
        """P of a layer; 1 for token-wise routing."""
        return self.segment_sizes[layer] if self.ffn == "segment" else 1


def make_ffn(config: ForecasterConfig, layer: int) -> SegMoE:
    """Build the FFN of one block; this is all that differs between the three kinds."""
    if config.ffn == "dense":
        return SegMoE(config.d_model, config.dense_width, 0, dropout=config.hidden_dropout)
    return SegMoE(
        config.d_model,
        config.d_ff,
        config.num_experts,
        top_k=config.top_k,
        segment_size=config.layer_segment(layer),
        shared_expert=config.shared_expert,
        expert_scope=config.expert_scope,
        pooling=config.pooling,
        renormalize={"auto": None, "on": True, "off": False}[config.renormalize],
        dropout=config.hidden_dropout,
        router_dropout=config.router_dropout,
    )


class Attention(nn.Module):
    """Multi-head self-attention over the patches, with rotary positions if asked for."""

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)
        width = config.d_model // config.num_heads
        angles = rotary_angles(config.num_patches, width)
        self.rope = config.positions == "rope"
        # Wide enough for queries and keys at once: (T, 2 * D).
        self.register_buffer("cos", angles.cos().repeat(1, 4 * self.num_heads), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 4 * self.num_heads), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention: (B, T, D) -> (B, T, D)."""
        batch, steps, width = x.shape
        if self.rope:
            # Turning a projection's halves is turning the rows of its weights: one product more,
            # and what follows runs over whole rows instead of pieces as short as half a head.
            weight, bias = self.qkv.weight, self.qkv.bias
            turned = self._turn(weight[: 2 * width]), self._turn(bias[: 2 * width, None])[:, 0]
            projected = functional.linear(
                x, torch.cat([weight, turned[0]]), torch.cat([bias, turned[1]])
            )
            both, value, across = projected.split([2 * width, width, 2 * width], dim=-1)
            query, key = (both * self.cos + across * self.sin).chunk(2, dim=-1)
        else:
            query, key, value = self.qkv(x).chunk(3, dim=-1)
        y = functional.scaled_dot_product_attention(*map(self._heads, (query, key, value)))
        return self.out(y.transpose(1, 2).reshape(batch, steps, width))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, heads, T, D / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _turn(self, rows: Tensor) -> Tensor:
        """(2 * D, n): in each head of queries and keys, (left, right) -> (-right, left)."""
        left, right = rows.view(2 * self.num_heads, 2, -1, rows.shape[-1]).unbind(1)
        return torch.stack([-right, left], dim=1).view_as(rows)


def rotary_angles(num_steps: int, width: int) -> Tensor:
    """Angles of rotary positions, (T, width / 2).

    Source: Su et al. 2021 (arXiv 2104.09864), equation 15.
    """
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.arange(num_steps)[:, None] * frequency[None]


class Block(nn.Module):
    """Pre-norm block: ``x + attention(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, config: ForecasterConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.d_model)
        self.ffn = make_ffn(config, layer)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: (B, T, D) -> (B, T, D)."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Forecaster(nn.Module):
    """Channel-independent patch Transformer: every channel of a window is one sequence."""

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.patch, config.d_model)
        positions = torch.randn(config.num_patches, config.d_model) * 0.02
        self.positions = nn.Parameter(positions) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.head_dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(config.num_patches * config.d_model, config.horizon)
        self.skip = nn.Linear(config.look_back, config.horizon) if config.linear_skip else None
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)
            nn.init.zeros_(self.skip.bias)

    def forward(self, past: Tensor) -> Tensor:
        """Forecast: (W, C, L) -> (W, C, H), in the scale of the input."""
        x, centre, spread = self._normalise(past)
        tokens = self._embed(x)
        for block in self.blocks:
            tokens = block(tokens)
        flat = self.norm(tokens).flatten(1)  # (B, T * D)
        y = self.head(self.head_dropout(flat))
        if self.skip is not None:
            y = y + self.skip(x)
        return y.view(*past.shape[:-1], -1) * spread + centre

    def forward_with_loss(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """Forecast, and the weighted load-balancing loss to add to the task's; 0 if dense."""
        if self.config.ffn == "dense":
            return self(past), past.new_zeros(())
        with collect_routings(self) as routings:
            y = self(past)
        return y, self.config.aux_loss_weight * load_balancing_loss(routings)

    @torch.no_grad()
    def routing(self, past: Tensor) -> list[Routing]:
        """Routing of every layer for a batch, in order; empty for the dense model.

        Args:
            past: (W, C, L).

        Returns:
            One `Routing` per layer; its segments are ordered window, channel, time.
        """
        if self.config.ffn == "dense":
            return []
        tokens = self._embed(self._normalise(past)[0])
        routings = []
        for block in self.blocks:
            tokens = tokens + block.attention(block.attention_norm(tokens))
            y, routing = block.ffn.forward_with_routing(block.ffn_norm(tokens))
            tokens = tokens + y
            routings.append(routing)
        return routings

    def _normalise(self, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centre = past.mean(-1, keepdim=True)
        spread = (past.var(-1, keepdim=True, unbiased=False) + _EPSILON).sqrt()
        if self.config.instance_norm == "last":
            centre = past[..., -1:]
        return ((past - centre) / spread).flatten(0, 1), centre, spread

    def _embed(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.unflatten(-1, (-1, self.config.patch)))  # (B, T, D)
        return tokens if self.positions is None else tokens + self.positions


def count_parameters(model: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def active_flops_per_token(config: ForecasterConfig) -> float:
    """Count the FLOPs of one forward pass per patch: two for each multiply-add of a product.

    Norms, activations and softmaxes are left out, and so is the turning of queries and keys by
    their positions, whichever way it is computed. An expert that does not serve a patch costs
    nothing; the padding of the last segment costs where its steps are taken side by side.

    Args:
        config: of the model.

    Returns:
        FLOPs of the whole model for one sequence, divided by T.
    """
    steps, width = config.num_patches, config.d_model
    products = steps * config.patch * width  # embedding
    for layer in range(config.num_layers):
        products += 4 * steps * width**2 + 2 * steps**2 * width  # attention
        products += _ffn_products(config, config.layer_segment(layer))
    products += steps * width * config.horizon
    if config.linear_skip:
        products += config.look_back * config.horizon
    return 2 * products / steps


def _ffn_products(config: ForecasterConfig, segment: int) -> int:
    steps, width = config.num_patches, config.d_model
    if config.ffn == "dense":
        return 2 * steps * width * config.dense_width
    num_segments = math.ceil(steps / segment)
    wide, projected = segment * width, config.expert_scope == "projected"
    concat = config.pooling == "concat" and not projected
    products = num_segments * (wide if concat else width) * config.num_experts  # router
    if projected:
        products += 2 * num_segments * wide * width
    # A row of an expert: a step, the steps of a segment side by side, or their projection.
    each = segment if config.expert_scope == "segment" else 1
    rows = steps if config.expert_scope == "token" else num_segments
    products += 2 * rows * config.top_k * each**2 * width * config.d_ff
    if config.shared_expert is not None:
        each = segment if config.shared_expert == "segment" and not projected else 1
        rows = steps if config.shared_expert == "token" and not projected else num_segments
        products += rows * (2 * each**2 * width * config.d_ff + each * width)
    return products
