"""The layers that are called, the peers beside them, and how their calls are timed."""

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.timing import Clock, Timing, time_interleaved
from segmoe_kernels import SegMoE

__all__ = ["CASES", "DTYPES", "PASSES", "PROVIDERS", "Case", "calls_of", "measure"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PASSES = ("infer", "forward + backward")
PROVIDERS = ("segmoe", "official", "grouped_mm", "scattermoe", "scattermoe_nosync")


@dataclass(frozen=True)
class Case:
    """One layer, so small that PyTorch's own CPU kernels take next to no time.

    Attributes:
        backend: "triton", which launches on the stub, or "reference", which computes on the CPU.
        options: of `SegMoE`.
    """

    backend: str
    options: dict[str, Any]


# B 2, T 10, D 16, F 16, E 4, k 1, P 5.
CASES = {
    "no shared expert": Case("triton", {"shared_expert": None}),
    "shared expert": Case("triton", {"shared_expert": "segment"}),
    "two choices": Case("triton", {"shared_expert": None, "num_experts": 8, "top_k": 2}),
    "reference": Case("reference", {"shared_expert": None}),
    "reference + shared expert": Case("reference", {"shared_expert": "segment"}),
}
_SIZES = {"d_model": 16, "d_ff": 16, "num_experts": 4, "segment_size": 5}
_BATCH, _LENGTH = 2, 10


def calls_of(
    case: Case, dtype: torch.dtype, providers: Iterable[str]
) -> tuple[dict[tuple[str, str], Callable[[], object]], dict[str, str]]:
    """Every provider's passes as functions without arguments.

    Args:
        case: the layer.
        dtype: of it.
        providers: keys of `benchmarks.peers.PROVIDERS`.

    Returns:
        ``({(provider, pass): function}, {provider: why it is skipped})``.
    """
    torch.manual_seed(0)
    layer = SegMoE(**_SIZES | case.options, backend=case.backend, dtype=dtype)
    x, dy = torch.randn(2, _BATCH, _LENGTH, layer.d_model).to(dtype)
    found, skipped = {}, {}
    # The stub is as good as a GPU to the kernels of peers.
    peers._needs_gpu = lambda _: None
    for name in providers:
        try:
            provider = peers.PROVIDERS[name](layer, x.device)
        except peers.SkippedError as error:
            skipped[name] = str(error)
            continue
        parameters = list(provider.module.parameters())
        functions = _passes(provider.call, parameters, x, dy)
        found |= {(name, passed): function for passed, function in functions.items()}
    return found, skipped


def _passes(
    call: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor, dy: Tensor
) -> dict[str, Callable[[], object]]:
    leaf = x.detach().requires_grad_()
    wanted = (leaf, *parameters)

    def infer() -> Tensor:
        with torch.no_grad():
            return call(x)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(leaf), wanted, dy, allow_unused=True)

    return dict(zip(PASSES, (infer, train), strict=True))


def measure(functions: Mapping[Any, Callable[[], object]], *, rounds: int) -> dict[Any, Timing]:
    """CPU time, for others share the cores; without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        clock = Clock(torch.device("cpu"))
        return time_interleaved(
            functions, clock, budget_s=0, least_rounds=rounds, most_rounds=rounds
        )
    finally:
        gc.enable()
