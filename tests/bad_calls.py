"""Wrong calls of the functions: who, how, with which exception and which words.

One row is ``(call, exception, words)``: the message has all the words, which bars part, and the
name of an argument that `caller` was given; it names another one's where `partial` is around it.
"""

import copy
from functools import partial

import torch

from segmoe_kernels import (
    FFNWeights,
    SegMoE,
    functional,
    load_balancing_loss,
    router_z_loss,
    validation,
)
from segmoe_kernels.losses import inject_loss
from segmoe_kernels.testing import make_inputs, oracle

META = torch.device("meta")
T, V = TypeError, ValueError


def caller(function, **good):
    """``call(**changes)``: the good call with some arguments exchanged, not yet made.

    It knows whose arguments it gets wrong: ``call(...).wrong == (function, names)``.
    """

    def call(**changes):
        def make():
            return function(**{**good, **changes})

        make.wrong = function, set(changes)
        return make

    call.function = function
    return call


def draw(*shape):
    return torch.zeros(shape)


# B=2, T=5, P=3, J=2, S=4, D=4, F=6, E=3, top_k=1
EXPERTS = FFNWeights(draw(3, 6, 4), draw(3, 4, 6))
SHARED = FFNWeights(draw(6, 4), draw(4, 6))
PROJECTED = {"expert_scope": "projected", "router_weight": draw(3, 4)}
IN_PROJ, OUT_PROJ = (draw(4, 12), None), (draw(12, 4), None)
MASK = torch.ones(2, 5, dtype=torch.bool)
IDS = torch.zeros(4, 1, dtype=torch.int32)
OFFSETS = torch.tensor([0, 4, 4, 4], dtype=torch.int32)
# Too many for two choices of each.
MOST = "at most 2147483647 steps"
MANY_STEPS = torch.empty(2**29, 3, 4, device=META)
PERMUTATION = functional.permute(IDS, 3, backend="reference")

layer = caller(SegMoE, d_model=4, d_ff=6, num_experts=3, segment_size=3)
route = caller(
    functional.route, x=draw(2, 5, 4), router_weight=draw(3, 12), segment_size=3, top_k=1
)
permute = caller(functional.permute, topk_ids=IDS, num_experts=3)
gemm = caller(functional.grouped_gemm, x=draw(4, 4), weight=draw(3, 6, 4), expert_offsets=OFFSETS)
ffn = caller(
    functional.expert_ffn,
    x=draw(2, 5, 4),
    topk_weights=draw(4, 1),
    permutation=PERMUTATION,
    experts=EXPERTS,
    segment_size=3,
)
combine = caller(functional.combine, expert_out=draw(1, 2, 5, 4))
seg_moe = caller(
    functional.seg_moe, x=draw(2, 5, 4), router_weight=draw(3, 12), experts=EXPERTS, segment_size=3
)
LAYER = layer()()
ROUTING = LAYER.forward_with_routing(draw(2, 5, 4))[1]
OTHER_ROUTING = layer(num_experts=2)().forward_with_routing(draw(2, 5, 4))[1]
balance = caller(load_balancing_loss, routings=[ROUTING])
z_loss = caller(router_z_loss)
inject = caller(inject_loss, y=draw(2, 3), loss=draw())
resolve = caller(functional.resolve_backend, backend="auto", x=draw(1))
with_routing = caller(SegMoE.forward_with_routing, self=LAYER, x=draw(2, 5, 4))


call_layer = caller(SegMoE.forward, self=LAYER, x=draw(2, 5, 4))


def forward(x, mask=None):
    return call_layer(x=x) if mask is None else call_layer(padding_mask=mask)


def gated(gate):
    return seg_moe(shared=SHARED, shared_gate=gate)


def autocast(call):
    return torch.autocast("cpu", torch.bfloat16)(call)


def real(call):
    """A call that fake tensors can't make: of another kind, or values are looked at."""
    call.real = True
    return call


def layer_with(**parts):
    """A layer of which somebody has exchanged a part."""
    other = copy.deepcopy(LAYER)
    for name, part in parts.items():
        setattr(other, name, part)
    return other


def permutation(**changes):
    return PERMUTATION._replace(**changes)


def refuse_dropout():
    noisy = copy.deepcopy(LAYER)
    noisy.dropout = 0.5
    oracle(noisy, *make_inputs(2, 5, 4))


ROWS = [
    (forward([1.0]), T, "SegMoE.forward | x | torch.Tensor | list"),
    (forward(draw(2, 5, 4).int()), T, "x | dtype | torch.int32"),
    (real(lambda: LAYER(draw(2, 5, 4).to_sparse())), T, "x | dense | sparse_coo"),
    (real(lambda: LAYER(torch.nested.nested_tensor([draw(5, 4), draw(3, 4)]))), T,
     "x | dense | a nested tensor"),
    (real(lambda: LAYER(torch.nested.nested_tensor([draw(5, 4)], layout=torch.jagged))), T,
     "x | dense"),
    (forward(draw(2, 5, 4).cfloat()), T, "x | torch.complex64"),
    (real(lambda: LAYER(torch.quantize_per_tensor(draw(2, 5, 4), 0.1, 0, torch.quint8))), T,
     "x | torch.quint8"),
    (forward(draw(2, 5, 4).to(torch.float8_e4m3fn)), T, "x | torch.float8_e4m3fn"),
    (forward(draw(2, 5, 4) > 0), T, "x | torch.bool"),
    (forward(draw(4)), V, "x | (..., T, d_model=4) | got (4,)"),
    (forward(draw(2, 5, 3)), V, "(..., T, d_model=4) | (2, 5, 3)"),
    (forward(draw(2, 5, 4).double()), T, "router_weight | torch.float64"),
    (forward(draw(2, 5, 4).to(META)), V, "router_weight | on meta"),
    (forward(draw(2, 5, 4), [1]), T, "padding_mask | Tensor or None | list"),
    (forward(draw(2, 5, 4), MASK.int()), T, "padding_mask | torch.bool"),
    (forward(draw(2, 5, 4), MASK[:, :4]), V, "(2, 5) as x | got (2, 4)"),
    (forward(draw(2, 5, 4), MASK.to(META)), V, "padding_mask | on cpu"),
    (route(x=draw(5, 4)), V, "route: expected x | (B, T, D) | (5, 4)"),
    (route(x=draw(2, 5, 0)), V, "(..., T, d_model) | (2, 5, 0)"),
    (route(segment_size=0), V, "at least 1"),
    (route(router_weight=draw(3, 4)), V, "(3, 12) | got (3, 4)"),
    (route(router_weight=None), T, "NoneType"),
    (route(x=MANY_STEPS, router_weight=draw(3, 12).to(META), top_k=2), V,
     f"route | {MOST} | top_k=2 | {3 * 2**30}"),
    (route(top_k=4), V, "[1, num_experts=3] | got 4"),
    (route(pooling=None), V, "got None"),
    (route(router_start=draw(4)), V, "(12,) | (4,)"),
    (route(router_temperature=0), V, "router_temperature"),
    (route(router_temperature=float("nan")), V, "temperature | nan"),
    (route(router_temperature=-1.0), V, "temperature | got -1.0"),
    (route(router_temperature=float("inf")), V, "temperature | got inf"),
    (route(top_k=1.0), T, "be an int | 1.0 (float)"),
    (route(top_k=0), V, "at least 1 | got 0"),
    (route(segment_size=True), T, "True (bool)"),
    (route(x=draw(2, 5, 4).long()), T, "torch.int64"),
    (route(padding_mask=MASK[:, :3]), V, "(2, 5) as x"),
    (route(x=draw(2, 5, 4).to(META)), V, "router_weight | on meta"),
    (route(router_weight=draw(3, 12).int()), T, "router_weight"),
    (route(router_dropout=float("nan")), V, "router_dropout"),
    (route(router_dropout=1), V, "[0, 1)"),
    (route(x=draw(1, 1, 1).expand(2**24, 130, 4)), V,
     f"{MOST} | top_k=1 | split the batch | 2214592512 | 16777216, 130"),
    (seg_moe(x=draw(1, 1, 1).expand(2**29, 5, 4)), V, f"seg_moe | {MOST} | {2**29 * 6}"),
    (route(renormalize="yes"), T, "'yes'"),
    (route(backend="cudnn"), V, "'cudnn'"),
    (permute(topk_ids=[[0]]), T, "torch.Tensor | list"),
    (permute(topk_ids=IDS.long()), T, "torch.int32 | torch.int64"),
    (permute(topk_ids=IDS[:, 0]), V, "(S, top_k) | got (4,)"),
    (permute(num_experts=0), V, "at least 1"),
    (permute(backend=None), V, "None"),
    (permute(num_experts=3.0), T, "3.0 (float)"),
    (gemm(x=[1.0]), T, "grouped_gemm | torch.Tensor | list"),
    (gemm(weight=draw(3, 6, 4).half()), T, "torch.float32 as x"),
    (gemm(expert_offsets=[0, 4]), T, "list"),
    (gemm(expert_offsets=OFFSETS.long()), T, "torch.int32 | torch.int64"),
    (gemm(backend="gpu"), V, "'gpu'"),
    (gemm(x=draw(4)), V, "grouped_gemm | (M, K) | (4,)"),
    (gemm(weight=draw(6, 4)), V, "(E, N, K) | (6, 4)"),
    (gemm(weight=draw(3, 6, 5)), V, "(3, 6, 4) | got (3, 6, 5)"),
    (gemm(bias=draw(3, 5)), V, "(3, 6) | (3, 5)"),
    (gemm(expert_offsets=OFFSETS[1:]), V, "(E + 1 = 4,) | (3,)"),
    (gemm(expert_offsets=OFFSETS.to(META)), V, "on cpu | meta"),
    (gemm(activation="tanh"), V, "None | 'tanh'"),
    (ffn(segment_size=0), V, "at least 1"),
    (ffn(activation=None), V, "got None"),
    (ffn(dropout=float("nan")), V, "[0, 1)"),
    (ffn(topk_weights=None), T, "NoneType"),
    (partial(ffn(x=draw(2, 5, 6))), V, "experts.up_proj | (3, 6, 6)"),
    (ffn(padding_mask=MASK.float()), T, "torch.bool"),
    (ffn(expert_scope="projected"), V, "'token', 'segment' | 'projected'"),
    (ffn(topk_weights=draw(3, 1)), V, "(S=4, top_k) | got (3, 1)"),
    (ffn(permutation=OFFSETS), T, "be a Permutation | Tensor"),
    (ffn(permutation=permutation(slot_to_sorted=IDS[:3, 0])), V,
     "permutation.slot_to_sorted | (R=4,) | (3,)"),
    (ffn(experts=tuple(EXPERTS)), T, "be FFNWeights | tuple"),
    (ffn(experts=SHARED), V, "experts.up_proj | 3 dimensions | (6, 4)"),
    (ffn(experts=EXPERTS._replace(down_proj=draw(3, 6, 4))), V,
     "experts.down_proj | (3, 4, 6) | got (3, 6, 4)"),
    (ffn(experts=EXPERTS._replace(down_proj=None)), T,
     "experts.down_proj | torch.Tensor | NoneType"),
    (ffn(experts=EXPERTS._replace(gate_proj_bias=draw(3, 6))), V,
     "experts.gate_proj_bias | come with gate_proj"),
    (ffn(experts=EXPERTS._replace(up_proj=draw(3, 6, 4).half())), T,
     "experts.up_proj | torch.float32 as x | torch.autocast | torch.float16"),
    (ffn(x=draw(1, 1, 1).expand(2**29, 3, 4), topk_weights=draw(1, 1).expand(2**29, 2),
     permutation=permutation(sorted_to_slot=IDS[0].expand(2**30),
     slot_to_sorted=IDS[0].expand(2**30))), V, f"expert_ffn | {MOST} | {3 * 2**30}"),
    (ffn(dropout=1.5), V, "[0, 1)"),
    (combine(expert_out=draw(2, 5, 4)), V, "(top_k, B, T, D)"),
    (combine(expert_out=draw(1, 2, 5, 4).int()), T, "torch.int32"),
    (combine(padding_mask=MASK[:1]), V, "(2, 5) as x"),
    (combine(backend="TRITON"), V, "'TRITON'"),
    (combine(shared_out=draw(2, 2, 12)), V, "with shared_gate_logits"),
    (combine(shared_out=draw(2, 1, 12), shared_gate_logits=draw(2, 1)), V,
     "(B=2, J, P * D) | D=4 | T=5 | (2, 1, 12)"),
    (combine(shared_out=draw(2, 2, 12), shared_gate_logits=draw(2, 3)), V, "(2, 2) | (2, 3)"),
    (seg_moe(x=None), T, "seg_moe | NoneType"),
    (seg_moe(top_k=4), V, "[1, num_experts=3]"),
    (seg_moe(expert_scope=None), V, "got None"),
    (seg_moe(dropout=-0.5), V, "got -0.5"),
    (seg_moe(router_temperature=0), V, "router_temperature"),
    (seg_moe(experts=None), T, "FFNWeights"),
    (seg_moe(shared=SHARED), V, "come with shared_gate"),
    (seg_moe(shared=FFNWeights(draw(6, 8), draw(8, 6)), shared_gate=draw(1, 8)), V,
     "shared.up_proj | 4 (token) or 12 (segment) | (6, 8)"),
    (gated(torch.ones(1, 4, device="meta")), V, "be on | as x, got meta"),
    (gated(torch.ones(1, 4, dtype=torch.int64)), T, "float32 | int64"),
    (gated(draw(1, 4).to(torch.complex64)), T, "float32 | complex64"),
    (gated(draw(1, 4).to_sparse()), T, "a dense tensor | sparse"),
    (gated(draw(1, 4).half()), T, "torch.float32 as x | float16"),
    (gated(draw(1, 4).double()), T, "torch.float32 as x | float64"),
    (gated([1.0]), T, "be a torch.Tensor | list"),
    (autocast(gated(torch.ones(1, 4).bool())), T, "float32 | torch.bool"),
    (autocast(seg_moe(experts=None)), T, "be FFNWeights | NoneType"),
    (seg_moe(shared=SHARED, shared_gate=draw(4)), V, "(1, 4) | got (4,)"),
    (seg_moe(in_proj=IN_PROJ), V, "only with it"),
    (seg_moe(**PROJECTED, in_proj=IN_PROJ), V, "out_proj | come with expert_scope='projected'"),
    (seg_moe(**PROJECTED, in_proj=IN_PROJ, out_proj=OUT_PROJ, pooling="max"), V,
     "be 'concat' | 'max'"),
    (seg_moe(**PROJECTED, in_proj=OUT_PROJ, out_proj=OUT_PROJ), V,
     "in_proj[0] | (4, 12) | (12, 4)"),
    (seg_moe(x=MANY_STEPS, router_weight=draw(3, 12).to(META), experts=FFNWeights(draw(3, 6,
     4).to(META), draw(3, 4, 6).to(META)), top_k=2), V,
     f"seg_moe | {MOST} | top_k=2 | {3 * 2**30}"),
    (seg_moe(expert_scope="segment", router_start=draw(12)), V, "token | expert_scope='segment'"),
    (lambda: validation.check_programs("route", 2**31), V,
     "2147483647 | 2147483648 | Split the batch"),
    (lambda: layer_with(shared_expert=torch.nn.Linear(12, 12))(draw(2, 6, 4)), T,
     "modules.FeedForward, or to wrap one | got Linear"),
    (lambda: SegMoE(4, 6, 0)(draw(2, 6, 4).double()), T,
     "shared_expert.up_proj | torch.float64 as x | float32"),
    (balance(routings=[]), T, "load_balancing_loss | at least one"),
    (balance(routings=draw(2, 3)), T, "Routing | Tensor"),
    (balance(routings=None), T, "a Routing or | got NoneType"),
    (z_loss(routings=[]), T, "router_z_loss | at least one"),
    (z_loss(routings=[{}]), T, "router_z_loss | dict"),
    (z_loss(routings=None), T, "router_z_loss | got NoneType"),
    (inject(y=3.0), T, "inject_loss | torch.Tensor, got float"),
    (inject(loss=0.5), T, "torch.Tensor, got float"),
    (inject(loss=draw(3)), V, "shape () | got (3,)"),
    (resolve(backend="cuda"), V, "'reference' | 'cuda'"),
    (resolve(x=[1.0]), T, "resolve_backend | torch.Tensor | list"),
    (with_routing(x=draw(4)), V, "(..., T, d_model=4) | (4,)"),
    (with_routing(padding_mask=MASK[:1]), V, "(2, 5)"),
    (ffn(backend=1), V, "'auto' | got 1"),
    (combine(shared_gate_logits=draw(2, 2)), V, "only one"),
    (seg_moe(router_weight=None), T, "NoneType"),
    (seg_moe(segment_size=0), V, "at least 1"),
    (seg_moe(activation="tanh"), V, "'tanh'"),
    (seg_moe(router_dropout=1.0), V, "[0, 1)"),
    (seg_moe(renormalize=1), T, "1 (int)"),
    (seg_moe(padding_mask=MASK[0]), V, "got (5,)"),
    (seg_moe(backend="gpu"), V, "'gpu'"),
    (seg_moe(shared=tuple(SHARED), shared_gate=draw(1, 4)), T,
     "seg_moe: expected shared to be FFNWeights, got tuple"),
    (seg_moe(shared=FFNWeights(None, None), shared_gate=draw(1, 4)), T,
     "shared.up_proj | torch.Tensor | NoneType"),
    (seg_moe(shared=FFNWeights(draw(), draw()), shared_gate=draw(1, 4)), V,
     "shared.up_proj | 4 (token) or 12 (segment) | got ()"),
    (seg_moe(shared=FFNWeights(draw(18, 12), draw(12, 18)), shared_gate=draw(1, 12),
     router_start=draw(12)), V,
     "shared.up_proj | width 4 (token) with router_start | later steps | (18, 12)"),
    (seg_moe(**PROJECTED, in_proj=IN_PROJ[0], out_proj=OUT_PROJ), T,
     "(weight, bias or None) | Tensor"),
    (seg_moe(**PROJECTED, in_proj=IN_PROJ, out_proj=OUT_PROJ[:1]), T,
     "(weight, bias or None) | tuple"),
    (balance(normalization="official"), V, "'global', 'per_layer', 'switch' | 'official'"),
    (balance(routings=[ROUTING, OTHER_ROUTING]), V, "one number | [2, 3]"),
    (refuse_dropout, V, "oracle | eval mode | dropout=0.5"),
]  # fmt: skip
