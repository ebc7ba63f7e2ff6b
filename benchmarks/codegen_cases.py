"""What `codegen` compiles: layers, products and shared experts of the sizes that people build."""

from collections.abc import Callable
from typing import Any

import torch

from segmoe_kernels import FFNWeights, SegMoE, functional, stages


def run_layer(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Forward and backward of a layer on the Triton backend.

    Args:
        dtype: of the layer.
        options: of the layer, and ``masked``: with a padding mask, ``segments``: their number in
            each of two sequences, ``unaligned``: x and dy are views whose rows begin anywhere.
    """
    settings = {"d_model": 64, "num_experts": 4, "segment_size": 5, **options}
    settings.setdefault("d_ff", 2 * settings["d_model"])
    masked, segments = settings.pop("masked", False), settings.pop("segments", 3)
    unaligned = settings.pop("unaligned", False)
    layer = SegMoE(**settings, backend="triton", dtype=dtype)
    shape = (2, segments * layer.segment_size - 1, layer.d_model + unaligned)
    x = torch.zeros(shape, dtype=dtype)[..., int(unaligned) :]
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if masked else None
    y = layer(x.requires_grad_(), mask)
    y.backward(torch.zeros_like(x))


def _layer_case(dtype: torch.dtype, **options: Any) -> Callable[[], None]:
    return lambda: run_layer(dtype, options)


def _gemm_case(dtype: torch.dtype, n: int, k: int) -> Callable[[], None]:
    def run() -> None:
        x = torch.zeros(4096, k, dtype=dtype, requires_grad=True)
        weight = torch.zeros(8, n, k, dtype=dtype, requires_grad=True)
        offsets = torch.zeros(9, dtype=torch.int32)
        y = functional.grouped_gemm(x, weight, offsets, backend="triton")
        y.backward(torch.zeros_like(y))

    return run


def _shared_case(dtype: torch.dtype, **options: Any) -> Callable[[], None]:
    """Forward and backward of the shared expert and the sum with the choices."""

    def run() -> None:
        d_model, steps = options["d_model"], options["segment_size"]
        width, hidden = steps * d_model, 2 * steps * d_model
        gated, masked = options.get("gated", False), options.get("masked", False)
        extras = options.get("extras", masked)

        def parameter(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, requires_grad=True)

        weights = FFNWeights(
            parameter(hidden, width),
            parameter(width, hidden),
            parameter(hidden, width) if gated else None,
            parameter(hidden) if extras else None,
            parameter(hidden) if gated and extras else None,
            parameter(width) if extras else None,
        )
        x = parameter(2, 3 * steps - 1, d_model)
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if masked else None
        y = stages.shared_combine(
            parameter(2, *x.shape),
            x,
            weights,
            parameter(1, width),
            segment_size=steps,
            activation="silu" if gated else "gelu",
            dropout=0.2 if extras else 0.0,
            padding_mask=mask,
        )
        y.backward(torch.zeros_like(y))

    return run


def _combine_case(dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of the sum with a shared path from elsewhere."""

    def run() -> None:
        expert_out = torch.zeros(2, 2, 14, 64, dtype=dtype, requires_grad=True)
        shared_out = torch.zeros(2, 3, 5 * 64, dtype=dtype, requires_grad=True)
        gate = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
        mask = torch.ones(2, 14, dtype=torch.bool)
        y = functional.combine(expert_out, shared_out, gate, padding_mask=mask, backend="triton")
        y.backward(torch.zeros_like(y))

    return run


# What the table of tiles tells apart.
EXTRAS = {"bias": True, "masked": True, "dropout": 0.2, "router_dropout": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain bias": {"bias": True},
    "plain extras": EXTRAS,
    "gated": {"gated": True, "activation": "silu"},
    "gated gelu bias": {"gated": True, "bias": True},
    "gated extras": {"gated": True, "activation": "silu", **EXTRAS},
}


def _float64_cases() -> dict[str, Callable[[], None]]:
    """Every kernel that reads a mask, then every option."""
    dtype, sizes = torch.float64, {"d_model": 16, "d_ff": 32, "shared_expert": None}
    extras = {**EXTRAS, "router_temperature": 0.7}
    gated = {"gated": True, "activation": "silu"}
    layers = {
        "mask": {},
        "mask segment scope": {"expert_scope": "segment"},
        "extras": extras,
        "extras gated top_k=2": {**extras, **gated, "top_k": 2},
        "extras segment scope": {**extras, **gated, "expert_scope": "segment"},
        "unmasked": {**extras, **gated, "masked": False},
        "gelu_tanh": {"activation": "gelu_tanh"},
        "relu": {"activation": "relu"},
        "renormalize": {"renormalize": True},
        "many experts": {"num_experts": 100, "top_k": 3},
        "wide": {"d_model": 272, **extras, **gated},
        **{pooling: {"pooling": pooling} for pooling in ("mean", "max", "first", "last")},
        "causal": {"causal": True, "pooling": "last", "router_temperature": 0.7},
        "projected": {"expert_scope": "projected", **extras},
    }
    found = {}
    for name, options in layers.items():
        found[f"float64 {name}"] = _layer_case(dtype, **{**sizes, "masked": True, **options})
    options = {"d_model": 16, "segment_size": 3, "masked": True}
    found["float64 mask shared"] = _shared_case(dtype, **options, extras=False)
    found["float64 extras shared"] = _shared_case(dtype, **options)
    found["float64 extras shared gated"] = _shared_case(dtype, **options, gated=True)
    return {**found, "float64 mask combine": _combine_case(dtype)}


def brief_cases() -> list[str]:
    """Names of the cases that a test compiles: the kernels of each width."""
    names = ["float32 D=64 plain", "float32 D=256 gated"]
    for d_model in (64, 128, 256):
        names += [f"bfloat16 D={d_model} plain", f"bfloat16 D={d_model} gated top_k=2"]
    names += ["bfloat16 D=512 gated S=40", "bfloat16 shared D=64 P=3"]
    names += ["bfloat16 D=256 unaligned", "float32 D=128 unaligned"]
    return [*names, *_float64_cases()]


# Of a float64 launch the widths of its arguments tell nearly all: a brief run compiles these alone.
BRIEF_FLOAT64 = ("route_fwd_kernel", "grouped_gemm_dw_kernel", "shared_activate_bwd_kernel")


def cases() -> dict[str, Callable[[], None]]:
    """Name -> what is run. Widths and options of the layers that people build."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for d_model in (64, 128, 256):
            for variant, options in VARIANTS.items():
                routed = {"d_model": d_model, "shared_expert": None, **options}
                label = f"{name} D={d_model} {variant}"
                found[label] = _layer_case(dtype, **routed)
                found[f"{label} top_k=2"] = _layer_case(dtype, **routed, top_k=2)
            found[f"{name} D={d_model} shared"] = _layer_case(dtype, d_model=d_model)
            found[f"{name} D={d_model} unaligned"] = _layer_case(
                dtype, d_model=d_model, shared_expert=None, unaligned=True
            )
        wide = {"d_model": 128, "expert_scope": "segment", "shared_expert": None}
        found[f"{name} segment scope"] = _layer_case(dtype, **wide)
        for d_model, steps in ((64, 3), (128, 5), (256, 5)):
            sizes = {"d_model": d_model, "segment_size": steps}
            found[f"{name} shared D={d_model} P={steps}"] = _shared_case(dtype, **sizes)
        sizes = {"d_model": 128, "segment_size": 5}
        found[f"{name} shared gated"] = _shared_case(dtype, **sizes, gated=True)
        for gated in (False, True):
            case = f"{name} shared dropout mask bias{' gated' if gated else ''}"
            found[case] = _shared_case(dtype, **sizes, gated=gated, masked=True)
        sizes = {"d_model": 64, "segment_size": 3, "masked": True}
        found[f"{name} shared mask D=64 P=3"] = _shared_case(dtype, **sizes)
    bf16 = torch.bfloat16
    found["bfloat16 D=16"] = _layer_case(bf16, d_model=16)
    found["bfloat16 dropout mask"] = _layer_case(
        bf16, d_model=128, dropout=0.2, router_dropout=0.1, masked=True, segment_size=3
    )
    for pooling in ("mean", "max", "first", "last"):
        found[f"bfloat16 {pooling}"] = _layer_case(bf16, pooling=pooling, masked=True)
    found["bfloat16 causal"] = _layer_case(bf16, causal=True, shared_expert="token")
    found["bfloat16 E=128"] = _layer_case(bf16, d_model=2048, num_experts=128, top_k=8)
    found["bfloat16 E=512"] = _layer_case(bf16, num_experts=512, top_k=2)
    found["bfloat16 D=2048"] = _layer_case(bf16, d_model=2048, segment_size=1, num_experts=8)
    found["bfloat16 gated D=512"] = _layer_case(bf16, d_model=512, gated=True, activation="silu")
    # Rows too wide for the fused kernels; so many an expert that each height of tile is taken.
    for variant, options in VARIANTS.items():
        wide = {"d_model": 512, "shared_expert": None, **options}
        for segments in (10, 20, 40):
            for dtype in (bf16, torch.float32):
                name = f"{str(dtype).removeprefix('torch.')} D=512 {variant} S={segments}"
                found[name] = _layer_case(dtype, **wide, segments=segments)
    found["float16 D=128"] = _layer_case(torch.float16, d_model=128)
    found["float64 D=64"] = _layer_case(torch.float64)
    found |= _float64_cases()
    found["bfloat16 grouped_gemm"] = _gemm_case(bf16, 256, 128)
    return found
