"""Layers and inputs of a configuration, with uniform and with skewed routing."""

import torch
from torch import Tensor

from benchmarks.common import on_gpu
from benchmarks.shapes import Workload
from segmoe_kernels import SegMoE
from segmoe_kernels.testing import Inputs

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PARTS = ("routed", "whole")
ROUTINGS = ("uniform", "skewed")
SKEW = 0.7


def make_case(
    workload: Workload,
    *,
    part: str,
    routing: str,
    dtype: torch.dtype,
    device: torch.device,
    dropout: float = 0.0,
) -> tuple[SegMoE, Inputs]:
    """Make a layer and what it is called with, the same for the same arguments.

    Args:
        workload: sizes and kind of expert.
        part: "routed" has no shared expert, "whole" the segment-wide one.
        routing: "uniform" is what random routers do to random inputs; with "skewed" 70 % of the
            segments choose expert 0 (among their top_k).
        dtype: of parameters and inputs.
        device: of both.
        dropout: of the hidden layers, in training.

    Returns:
        ``(layer, inputs)``.
    """
    torch.manual_seed(0)
    shape = workload.shape
    layer = SegMoE(
        shape.d_model,
        shape.d_ff,
        shape.num_experts,
        top_k=shape.top_k,
        segment_size=shape.segment_size,
        shared_expert=None if part == "routed" else "segment",
        activation=workload.activation,
        gated=workload.gated,
        dropout=dropout,
        device=device,
        dtype=dtype,
    )
    # Drawn where it is used: 10^8 numbers take seconds on a CPU.
    generator = torch.Generator(layer.router.weight.device).manual_seed(0)
    size = (shape.batch, shape.length, shape.d_model)
    x, dy = (
        torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)
        for _ in range(2)
    )
    if routing == "skewed":
        _skew(layer, x)
    return layer, Inputs(x, dy)


def _skew(layer: SegMoE, x: Tensor) -> None:
    """Make feature 0 the constant 1, which serves expert 0 as a bias on its logit."""
    shape = x.shape
    x[..., 0] = 1
    weight = layer.router.weight.detach()
    weight[:, :: shape[-1]] = 0
    padded = torch.nn.functional.pad(x, (0, 0, 0, -shape[1] % layer.segment_size))
    logits = padded.reshape(-1, weight.shape[1]).float() @ weight.float().t()
    if layer.num_experts > layer.top_k:
        rival = logits[:, 1:].topk(layer.top_k, dim=-1).values[:, -1]
        margins = (rival - logits[:, 0]).sort().values
        weight[0, 0] = margins[int(SKEW * (margins.numel() - 1))]


def busiest_expert_share(ids: Tensor, num_experts: int) -> float:
    """The share of segments that choose the expert that most choose.

    Args:
        ids: (S, top_k).
        num_experts: E.
    """
    counts = torch.bincount(ids.reshape(-1).long(), minlength=num_experts)
    return counts.max().item() / ids.shape[0]


def release_memory(device: torch.device) -> None:
    """Give cached memory back, so that one measurement doesn't crowd out the next."""
    if on_gpu(device):
        torch.cuda.empty_cache()
