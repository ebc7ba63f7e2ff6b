"""What the layer is measured against: other implementations on the parameters of a `SegMoE`.

All are optional; where one can't be used, the reason is said. Only ``eager``, ``compile`` and
``official`` are whole layers. The others are mixtures of token-wise experts without a router for
segments: here they get a plain PyTorch router and shared expert, and run their experts on the
steps of x, each with the choices of its segment (no padded copy is given to their experts).

==================== =============================================================================
name                 what runs
==================== =============================================================================
segmoe               this package, on the backend that the device gets
eager                its reference backend
compile              the reference under ``torch.compile``
grouped_mm           sort, gather, ``torch.nn.functional.grouped_mm`` twice, activation, gather back
grouped_mm_compile   the same under ``torch.compile``
official             the loop over experts of the official layer, in `official_loop`
scattermoe           ``scattermoe.mlp.MLP`` or ``GLUMLP`` (shawntan/scattermoe, Apache-2.0)
scattermoe_nosync    its linear layers behind a sort that does not wait for the host
liger                Liger-Kernel's fused MoE (BSD-2-Clause), SwiGLU only, language-model widths
transformers         ``grouped_mm_experts_forward`` of Hugging Face's transformers (Apache-2.0)
==================== =============================================================================

ScatterMoE is on no package index: put a checkout into ``peers/scattermoe`` (ignored by git), or
name its folder in the environment variable SCATTERMOE.
"""

import copy
import importlib
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import on_gpu
from benchmarks.official_loop import OfficialLoop
from benchmarks.peer_modules import (
    GroupedMM,
    Liger,
    ScatterMoE,
    ScatterMoENoSync,
    SegmentPeer,
    SkippedError,
    Transformers,
)
from segmoe_kernels import SegMoE
from segmoe_kernels.functional import resolve_backend
from segmoe_kernels.testing import route_ids

__all__ = [
    "PROVIDERS",
    "Provider",
    "SkippedError",
    "build",
    "load_scattermoe",
    "load_scattermoe_on",
    "need_triton",
    "route_ids",
]

SCATTERMOE_FOLDER = Path(__file__).resolve().parents[1] / "peers" / "scattermoe"


@dataclass(frozen=True)
class Provider:
    """One implementation of the layer, ready to be called.

    Attributes:
        name: as in the module's docstring.
        module: holds the parameters.
        call: x (B, T, D) -> y; the module, or a compiled one.
        route_ids: x -> (S, top_k) int32, the choices that ``call`` makes.
        layer_gradients: gradients by the module's parameter names -> by those of `SegMoE`.
        waits: why it can't be captured into a CUDA graph, or None.
        ours: held to the accuracy of plain PyTorch without any allowance.
        yardstick: plain PyTorch that routes in the same precision: "reference" or "loop".
    """

    name: str
    module: nn.Module
    call: Callable[[Tensor], Tensor]
    route_ids: Callable[[Tensor], Tensor]
    layer_gradients: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    waits: str | None = None
    ours: bool = False
    yardstick: str = "reference"


def load_scattermoe(*, plain: bool = False) -> types.ModuleType:
    """Import ScatterMoE from the folder in SCATTERMOE, from ``peers/scattermoe``, or installed.

    Args:
        plain: call its kernels without its operators and without ``torch.compile``, so that
            a meter sees them. For the whole process.

    Raises:
        SkippedError: if it can't be imported.
    """
    folder = Path(os.environ.get("SCATTERMOE") or SCATTERMOE_FOLDER)
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
    # Its adapters for other libraries import those; nothing here needs them.
    sys.modules.setdefault("scattermoe.utils", types.ModuleType("scattermoe.utils"))
    compiler = torch.compile
    if plain and "scattermoe" not in sys.modules:
        torch.compile = lambda function, **_: function
    try:
        package = importlib.import_module("scattermoe")
        importlib.import_module("scattermoe.mlp")
    except ImportError as error:
        raise SkippedError(f"not in {folder} and not installed ({_first_line(error)})") from error
    finally:
        torch.compile = compiler
    ops = package.kernels.ops
    ops.ALLOW_TF32 = torch.backends.cuda.matmul.allow_tf32
    if plain:
        operators = ("scatter2scatter_compileable", "groupXtY_compileable", "group_compileable")
        places = [(ops, name) for name in operators]
        for owner, name in (*places, (package.parallel_experts, "compileable_bincount")):
            operator = getattr(owner, name)
            setattr(owner, name, getattr(operator, "_init_fn", operator))
    return package


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _peer(name: str, peer: SegmentPeer, **options: Any) -> Provider:
    if peer.dropout:
        raise SkippedError("has no dropout")
    return Provider(
        name, peer, peer, peer.route_ids, peer.layer_gradients, yardstick="loop", **options
    )


def need_triton(x: Tensor) -> None:
    """Raise a SkippedError where the kernels can't run on a tensor."""
    try:
        resolve_backend("triton", x)
    except RuntimeError as error:
        raise SkippedError(str(error)) from error


def _segmoe(layer: SegMoE, device: torch.device) -> Provider:
    ours = copy.deepcopy(layer)
    if on_gpu(device) or ours.backend == "triton":
        need_triton(ours.experts.up_proj)
    return Provider("segmoe", ours, ours, lambda x: route_ids(ours, x), dict, ours=True)


HOST_LOOP = "its loop over experts reads the counts on the host"


def _eager(layer: SegMoE, device: torch.device) -> Provider:  # noqa: ARG001  as all builders
    eager = copy.deepcopy(layer)
    eager.backend = "reference"
    return Provider("eager", eager, eager, lambda x: route_ids(eager, x), dict, waits=HOST_LOOP)


def _compile(layer: SegMoE, device: torch.device) -> Provider:
    eager = _eager(layer, device)
    compiled = torch.compile(eager.module.forward_with_routing)

    def ids(x: Tensor) -> Tensor:
        # Its products may be rounded otherwise, and near ties turn.
        with torch.no_grad():
            return compiled(x)[1].topk_ids

    return Provider("compile", eager.module, lambda x: compiled(x)[0], ids, dict, waits=HOST_LOOP)


def _grouped_mm_peer(layer: SegMoE, device: torch.device) -> Provider:  # noqa: ARG001
    return _peer("grouped_mm", GroupedMM(layer))


def _grouped_mm_compile(layer: SegMoE, device: torch.device) -> Provider:  # noqa: ARG001
    peer = GroupedMM(layer)
    if peer.w_in.dtype != torch.bfloat16:
        raise SkippedError("torch.compile takes grouped_mm in bfloat16 only")
    return Provider(
        "grouped_mm_compile",
        peer,
        torch.compile(peer),
        torch.compile(peer.route_ids),
        peer.layer_gradients,
        yardstick="loop",
    )


def _official(layer: SegMoE, device: torch.device) -> Provider:  # noqa: ARG001
    try:
        loop = OfficialLoop(layer)
    except ValueError as error:
        raise SkippedError(str(error)) from error

    def ids(x: Tensor) -> Tensor:
        missing = -x.shape[1] % loop.segment_size
        padded = F.pad(x, (0, 0, 0, missing))
        with torch.no_grad():
            return loop._route(padded.reshape(-1, loop.router_weight.shape[1]))[1].int()

    def gradients(found: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {"router.weight": found["router_weight"]}
        if "shared_gate" in found:
            named["shared_gate.weight"] = found["shared_gate"]
        for name, gradient in found.items():
            if name.startswith("shared_expert"):
                named[f"{name}.weight"] = gradient
        for name in ("up_proj", "down_proj", "gate_proj"):
            parts = [found.get(f"experts.{e}.{name}") for e in range(loop.num_experts)]
            if parts[0] is not None:
                named[f"experts.{name}"] = torch.stack(parts)
        return named

    waits = "it asks the host which segments an expert has"
    return Provider("official", loop, loop, ids, gradients, waits=waits, yardstick="loop")


def _needs_gpu(device: torch.device) -> None:
    if not on_gpu(device) and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise SkippedError(f"its kernels need a GPU, got {device.type}")


def load_scattermoe_on(device: torch.device) -> types.ModuleType:
    """`load_scattermoe`, for a device on which its kernels can run."""
    _needs_gpu(device)
    return load_scattermoe(plain=device.type != "cuda")


def _scattermoe(layer: SegMoE, device: torch.device) -> Provider:
    package = load_scattermoe_on(device)
    peer = ScatterMoE(layer, package).to(device, layer.experts.up_proj.dtype)
    return _peer("scattermoe", peer, waits="its bincount waits for the host")


def _scattermoe_nosync(layer: SegMoE, device: torch.device) -> Provider:
    return _peer("scattermoe_nosync", ScatterMoENoSync(layer, load_scattermoe_on(device)))


def _liger(layer: SegMoE, device: torch.device) -> Provider:
    if not layer.gated or layer.activation != "silu":
        raise SkippedError("SwiGLU experts only")
    if layer.d_model < 512:
        raise SkippedError("measured at language-model widths only (D >= 512)")
    _needs_gpu(device)
    try:
        module = importlib.import_module("liger_kernel.ops.fused_moe")
    except ImportError as error:
        raise SkippedError(f"can't import liger-kernel >= 0.8 ({_first_line(error)})") from error
    peer = Liger(layer, module.LigerFusedMoEFunction)
    return _peer("liger", peer, waits="it reads the number of tiles on the host")


def _transformers(layer: SegMoE, device: torch.device) -> Provider:  # noqa: ARG001
    try:
        module = importlib.import_module("transformers.integrations.moe")
        function = module.grouped_mm_experts_forward
    except (ImportError, AttributeError) as error:
        raise SkippedError(f"can't import transformers >= 5 ({_first_line(error)})") from error
    return _peer("transformers", Transformers(layer, function))


PROVIDERS: dict[str, Callable[[SegMoE, torch.device], Provider]] = {
    "segmoe": _segmoe,
    "eager": _eager,
    "compile": _compile,
    "grouped_mm": _grouped_mm_peer,
    "grouped_mm_compile": _grouped_mm_compile,
    "official": _official,
    "scattermoe": _scattermoe,
    "scattermoe_nosync": _scattermoe_nosync,
    "liger": _liger,
    "transformers": _transformers,
}


def build(
    names: tuple[str, ...], layer: SegMoE, device: torch.device
) -> tuple[list[Provider], dict[str, str]]:
    """Build every provider that can be used, and say why the others can't.

    Args:
        names: keys of `PROVIDERS`.
        layer: whose parameters all of them get.
        device: where it is.

    Returns:
        ``(providers, reasons of the skipped by name)``; reasons are printed too.
    """
    providers, skipped = [], {}
    for name in names:
        try:
            providers.append(PROVIDERS[name](layer, device))
        except SkippedError as error:
            skipped[name] = str(error)
            print(f"skipped {name}: {error}", flush=True)
    return providers, skipped
