"""Wrong calls of the functions: who, how, with which exception and which words.

One row is ``(name, call, exception, words)``; the message must contain all the words.
"""

import copy

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
    functional.seg_moe,
    x=draw(2, 5, 4),
    router_weight=draw(3, 12),
    experts=EXPERTS,
    segment_size=3,
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


def autocast(call, *, on=True):
    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            call()

    return run


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
    ("forward_list", forward([1.0]), TypeError, ["SegMoE.forward", "x", "torch.Tensor", "list"]),
    ("forward_int", forward(draw(2, 5, 4).int()), TypeError, ["x", "dtype", "torch.int32"]),
    (
        "forward_sparse",
        lambda: LAYER(draw(2, 5, 4).to_sparse()),
        TypeError,
        ["x", "dense", "sparse_coo"],
    ),
    (
        "forward_nested",
        lambda: LAYER(torch.nested.nested_tensor([draw(5, 4), draw(3, 4)])),
        TypeError,
        ["x", "dense", "a nested tensor"],
    ),
    (
        "forward_jagged",
        lambda: LAYER(torch.nested.nested_tensor([draw(5, 4)], layout=torch.jagged)),
        TypeError,
        ["x", "dense"],
    ),
    ("forward_complex", forward(draw(2, 5, 4).cfloat()), TypeError, ["x", "torch.complex64"]),
    (
        "forward_quantised",
        lambda: LAYER(torch.quantize_per_tensor(draw(2, 5, 4), 0.1, 0, torch.quint8)),
        TypeError,
        ["x", "torch.quint8"],
    ),
    (
        "forward_float8",
        forward(draw(2, 5, 4).to(torch.float8_e4m3fn)),
        TypeError,
        ["x", "torch.float8_e4m3fn"],
    ),
    ("forward_bool", forward(draw(2, 5, 4) > 0), TypeError, ["x", "torch.bool"]),
    ("forward_rank", forward(draw(4)), ValueError, ["x", "(..., T, d_model=4)", "got (4,)"]),
    ("forward_width", forward(draw(2, 5, 3)), ValueError, ["(..., T, d_model=4)", "(2, 5, 3)"]),
    (
        "forward_dtype",
        forward(draw(2, 5, 4).double()),
        TypeError,
        ["router_weight", "torch.float64"],
    ),
    ("forward_device", forward(draw(2, 5, 4).to(META)), ValueError, ["router_weight", "on meta"]),
    (
        "mask_list",
        forward(draw(2, 5, 4), [1]),
        TypeError,
        ["padding_mask", "Tensor or None", "list"],
    ),
    ("mask_int", forward(draw(2, 5, 4), MASK.int()), TypeError, ["padding_mask", "torch.bool"]),
    ("mask_shape", forward(draw(2, 5, 4), MASK[:, :4]), ValueError, ["(2, 5) as x", "got (2, 4)"]),
    ("mask_device", forward(draw(2, 5, 4), MASK.to(META)), ValueError, ["padding_mask", "on cpu"]),
    ("route_rank", route(x=draw(5, 4)), ValueError, ["route: expected x", "(B, T, D)", "(5, 4)"]),
    ("route_no_width", route(x=draw(2, 5, 0)), ValueError, ["(..., T, d_model)", "(2, 5, 0)"]),
    ("route_size", route(segment_size=0), ValueError, ["segment_size", "at least 1"]),
    ("route_weight", route(router_weight=draw(3, 4)), ValueError, ["(3, 12)", "got (3, 4)"]),
    ("route_weight_type", route(router_weight=None), TypeError, ["router_weight", "NoneType"]),
    (
        "route_steps",
        route(x=MANY_STEPS, router_weight=draw(3, 12).to(META), top_k=2),
        ValueError,
        ["route", "at most 2147483647 steps", "top_k=2", str(3 * 2**30)],
    ),
    ("route_top_k", route(top_k=4), ValueError, ["top_k", "[1, num_experts=3]", "got 4"]),
    ("route_pooling", route(pooling=None), ValueError, ["pooling", "got None"]),
    ("route_start", route(router_start=draw(4)), ValueError, ["router_start", "(12,)", "(4,)"]),
    ("route_temperature", route(router_temperature=0), ValueError, ["router_temperature"]),
    ("route_cold", route(router_temperature=float("nan")), ValueError, ["temperature", "nan"]),
    ("route_negative", route(router_temperature=-1.0), ValueError, ["temperature", "got -1.0"]),
    ("route_hot", route(router_temperature=float("inf")), ValueError, ["temperature", "got inf"]),
    ("route_top_k_float", route(top_k=1.0), TypeError, ["top_k", "be an int", "1.0 (float)"]),
    ("route_top_k_zero", route(top_k=0), ValueError, ["top_k", "at least 1", "got 0"]),
    ("route_size_bool", route(segment_size=True), TypeError, ["segment_size", "True (bool)"]),
    ("route_x_int", route(x=draw(2, 5, 4).long()), TypeError, ["x", "torch.int64"]),
    ("route_mask", route(padding_mask=MASK[:, :3]), ValueError, ["padding_mask", "(2, 5) as x"]),
    ("route_device", route(x=draw(2, 5, 4).to(META)), ValueError, ["router_weight", "on meta"]),
    ("route_weight_int", route(router_weight=draw(3, 12).int()), TypeError, ["router_weight"]),
    ("route_dropout_nan", route(router_dropout=float("nan")), ValueError, ["router_dropout"]),
    ("route_dropout", route(router_dropout=1), ValueError, ["router_dropout", "[0, 1)"]),
    (
        "route_steps_expanded",
        route(x=draw(1, 1, 1).expand(2**24, 130, 4)),
        ValueError,
        ["at most 2147483647 steps", "top_k=1", "split the batch", "2214592512", "16777216, 130"],
    ),
    (
        "seg_moe_steps_expanded",
        seg_moe(x=draw(1, 1, 1).expand(2**29, 5, 4)),
        ValueError,
        ["seg_moe", "at most 2147483647 steps", str(2**29 * 6)],
    ),
    ("route_renormalize", route(renormalize="yes"), TypeError, ["renormalize", "'yes'"]),
    ("route_backend", route(backend="cudnn"), ValueError, ["backend", "'cudnn'"]),
    ("permute_type", permute(topk_ids=[[0]]), TypeError, ["topk_ids", "torch.Tensor", "list"]),
    ("permute_dtype", permute(topk_ids=IDS.long()), TypeError, ["torch.int32", "torch.int64"]),
    ("permute_shape", permute(topk_ids=IDS[:, 0]), ValueError, ["(S, top_k)", "got (4,)"]),
    ("permute_experts", permute(num_experts=0), ValueError, ["num_experts", "at least 1"]),
    ("permute_backend", permute(backend=None), ValueError, ["backend", "None"]),
    ("permute_experts_float", permute(num_experts=3.0), TypeError, ["num_experts", "3.0 (float)"]),
    ("gemm_x_type", gemm(x=[1.0]), TypeError, ["grouped_gemm", "x", "torch.Tensor", "list"]),
    ("gemm_dtype", gemm(weight=draw(3, 6, 4).half()), TypeError, ["weight", "torch.float32 as x"]),
    ("gemm_offsets_type", gemm(expert_offsets=[0, 4]), TypeError, ["expert_offsets", "list"]),
    (
        "gemm_offsets_long",
        gemm(expert_offsets=OFFSETS.long()),
        TypeError,
        ["expert_offsets", "torch.int32", "torch.int64"],
    ),
    ("gemm_backend", gemm(backend="gpu"), ValueError, ["backend", "'gpu'"]),
    ("gemm_x", gemm(x=draw(4)), ValueError, ["grouped_gemm", "x", "(M, K)", "(4,)"]),
    ("gemm_weight", gemm(weight=draw(6, 4)), ValueError, ["weight", "(E, N, K)", "(6, 4)"]),
    ("gemm_width", gemm(weight=draw(3, 6, 5)), ValueError, ["(3, 6, 4)", "got (3, 6, 5)"]),
    ("gemm_bias", gemm(bias=draw(3, 5)), ValueError, ["bias", "(3, 6)", "(3, 5)"]),
    ("gemm_offsets", gemm(expert_offsets=OFFSETS[1:]), ValueError, ["(E + 1 = 4,)", "(3,)"]),
    ("gemm_offsets_device", gemm(expert_offsets=OFFSETS.to(META)), ValueError, ["on cpu", "meta"]),
    ("gemm_activation", gemm(activation="tanh"), ValueError, ["activation", "None", "'tanh'"]),
    ("ffn_size", ffn(segment_size=0), ValueError, ["segment_size", "at least 1"]),
    ("ffn_activation", ffn(activation=None), ValueError, ["activation", "got None"]),
    ("ffn_dropout_nan", ffn(dropout=float("nan")), ValueError, ["dropout", "[0, 1)"]),
    ("ffn_weights_type", ffn(topk_weights=None), TypeError, ["topk_weights", "NoneType"]),
    ("ffn_x_width", ffn(x=draw(2, 5, 6)), ValueError, ["experts.up_proj", "(3, 6, 6)"]),
    ("ffn_mask", ffn(padding_mask=MASK.float()), TypeError, ["padding_mask", "torch.bool"]),
    ("ffn_scope", ffn(expert_scope="projected"), ValueError, ["'token', 'segment'", "'projected'"]),
    ("ffn_weights", ffn(topk_weights=draw(3, 1)), ValueError, ["(S=4, top_k)", "got (3, 1)"]),
    ("ffn_permutation", ffn(permutation=OFFSETS), TypeError, ["be a Permutation", "Tensor"]),
    (
        "ffn_map",
        ffn(permutation=permutation(slot_to_sorted=IDS[:3, 0])),
        ValueError,
        ["permutation.slot_to_sorted", "(R=4,)", "(3,)"],
    ),
    ("ffn_experts", ffn(experts=tuple(EXPERTS)), TypeError, ["be FFNWeights", "tuple"]),
    ("ffn_up", ffn(experts=SHARED), ValueError, ["experts.up_proj", "3 dimensions", "(6, 4)"]),
    (
        "ffn_down",
        ffn(experts=EXPERTS._replace(down_proj=draw(3, 6, 4))),
        ValueError,
        ["experts.down_proj", "(3, 4, 6)", "got (3, 6, 4)"],
    ),
    (
        "ffn_missing",
        ffn(experts=EXPERTS._replace(down_proj=None)),
        TypeError,
        ["experts.down_proj", "torch.Tensor", "NoneType"],
    ),
    (
        "ffn_gate_bias",
        ffn(experts=EXPERTS._replace(gate_proj_bias=draw(3, 6))),
        ValueError,
        ["experts.gate_proj_bias", "come with gate_proj"],
    ),
    (
        "ffn_dtype",
        ffn(experts=EXPERTS._replace(up_proj=draw(3, 6, 4).half())),
        TypeError,
        ["experts.up_proj", "torch.float32 as x", "torch.autocast", "torch.float16"],
    ),
    (
        "ffn_steps",
        ffn(
            x=draw(1, 1, 1).expand(2**29, 3, 4),
            topk_weights=draw(1, 1).expand(2**29, 2),
            permutation=permutation(
                sorted_to_slot=IDS[0].expand(2**30), slot_to_sorted=IDS[0].expand(2**30)
            ),
        ),
        ValueError,
        ["expert_ffn", "at most 2147483647 steps", str(3 * 2**30)],
    ),
    ("ffn_dropout", ffn(dropout=1.5), ValueError, ["dropout", "[0, 1)"]),
    ("combine_rank", combine(expert_out=draw(2, 5, 4)), ValueError, ["(top_k, B, T, D)"]),
    ("combine_int", combine(expert_out=draw(1, 2, 5, 4).int()), TypeError, ["torch.int32"]),
    ("combine_mask", combine(padding_mask=MASK[:1]), ValueError, ["padding_mask", "(2, 5) as x"]),
    ("combine_backend", combine(backend="TRITON"), ValueError, ["backend", "'TRITON'"]),
    ("combine_alone", combine(shared_out=draw(2, 2, 12)), ValueError, ["with shared_gate_logits"]),
    (
        "combine_shared",
        combine(shared_out=draw(2, 1, 12), shared_gate_logits=draw(2, 1)),
        ValueError,
        ["shared_out", "(B=2, J, P * D)", "D=4", "T=5", "(2, 1, 12)"],
    ),
    (
        "combine_gate",
        combine(shared_out=draw(2, 2, 12), shared_gate_logits=draw(2, 3)),
        ValueError,
        ["shared_gate_logits", "(2, 2)", "(2, 3)"],
    ),
    ("seg_moe_x", seg_moe(x=None), TypeError, ["seg_moe", "x", "NoneType"]),
    ("seg_moe_top_k", seg_moe(top_k=4), ValueError, ["top_k", "[1, num_experts=3]"]),
    ("seg_moe_scope", seg_moe(expert_scope=None), ValueError, ["expert_scope", "got None"]),
    ("seg_moe_dropout", seg_moe(dropout=-0.5), ValueError, ["dropout", "got -0.5"]),
    ("seg_moe_temperature", seg_moe(router_temperature=0), ValueError, ["router_temperature"]),
    ("seg_moe_experts", seg_moe(experts=None), TypeError, ["experts", "FFNWeights"]),
    ("seg_moe_shared", seg_moe(shared=SHARED), ValueError, ["shared", "come with shared_gate"]),
    (
        "seg_moe_shared_width",
        seg_moe(shared=FFNWeights(draw(6, 8), draw(8, 6)), shared_gate=draw(1, 8)),
        ValueError,
        ["shared.up_proj", "4 (token) or 12 (segment)", "(6, 8)"],
    ),
    *(
        (
            f"seg_moe_gate_{kind}",
            autocast(seg_moe(shared=SHARED, shared_gate=gate), on=kind == "autocast"),
            exception,
            ["shared_gate", *words],
        )
        for kind, gate, exception, words in (
            ("meta", torch.ones(1, 4, device="meta"), ValueError, ["be on", "as x, got meta"]),
            ("integer", torch.ones(1, 4, dtype=torch.int64), TypeError, ["float32", "int64"]),
            ("complex", draw(1, 4).to(torch.complex64), TypeError, ["float32", "complex64"]),
            ("sparse", draw(1, 4).to_sparse(), TypeError, ["a dense tensor", "sparse"]),
            ("half", draw(1, 4).half(), TypeError, ["torch.float32 as x", "float16"]),
            ("double", draw(1, 4).double(), TypeError, ["torch.float32 as x", "float64"]),
            ("list", [1.0], TypeError, ["be a torch.Tensor", "list"]),
            ("autocast", torch.ones(1, 4).bool(), TypeError, ["float32", "torch.bool"]),
        )
    ),
    (
        "seg_moe_experts_autocast",
        autocast(seg_moe(experts=None)),
        TypeError,
        ["experts", "be FFNWeights", "NoneType"],
    ),
    (
        "seg_moe_shared_gate",
        seg_moe(shared=SHARED, shared_gate=draw(4)),
        ValueError,
        ["shared_gate", "(1, 4)", "got (4,)"],
    ),
    ("seg_moe_in_proj", seg_moe(in_proj=IN_PROJ), ValueError, ["in_proj", "only with it"]),
    (
        "seg_moe_out_proj",
        seg_moe(**PROJECTED, in_proj=IN_PROJ),
        ValueError,
        ["out_proj", "come with expert_scope='projected'"],
    ),
    (
        "seg_moe_projected_pooling",
        seg_moe(**PROJECTED, in_proj=IN_PROJ, out_proj=OUT_PROJ, pooling="max"),
        ValueError,
        ["pooling", "be 'concat'", "'max'"],
    ),
    (
        "seg_moe_projected_shape",
        seg_moe(**PROJECTED, in_proj=OUT_PROJ, out_proj=OUT_PROJ),
        ValueError,
        ["in_proj[0]", "(4, 12)", "(12, 4)"],
    ),
    (
        "seg_moe_steps",
        seg_moe(
            x=MANY_STEPS,
            router_weight=draw(3, 12).to(META),
            experts=FFNWeights(draw(3, 6, 4).to(META), draw(3, 4, 6).to(META)),
            top_k=2,
        ),
        ValueError,
        ["seg_moe", "at most 2147483647 steps", "top_k=2", str(3 * 2**30)],
    ),
    (
        "seg_moe_start",
        seg_moe(expert_scope="segment", router_start=draw(12)),
        ValueError,
        ["router_start", "token", "expert_scope='segment'"],
    ),
    (
        "programs",
        lambda: validation.check_programs("route", 2**31),
        ValueError,
        ["2147483647", "2147483648", "Split the batch"],
    ),
    (
        "forward_part",
        lambda: layer_with(shared_expert=torch.nn.Linear(12, 12))(draw(2, 6, 4)),
        TypeError,
        ["shared_expert", "modules.FeedForward, or to wrap one", "got Linear"],
    ),
    (
        "forward_dense_dtype",
        lambda: SegMoE(4, 6, 0)(draw(2, 6, 4).double()),
        TypeError,
        ["shared_expert.up_proj", "torch.float64 as x", "float32"],
    ),
    ("loss_nothing", balance(routings=[]), TypeError, ["load_balancing_loss", "at least one"]),
    ("loss_tensor", balance(routings=draw(2, 3)), TypeError, ["routings", "Routing", "Tensor"]),
    ("loss_none", balance(routings=None), TypeError, ["routings", "a Routing or", "got NoneType"]),
    ("z_loss_nothing", z_loss(routings=[]), TypeError, ["router_z_loss", "at least one"]),
    ("z_loss_dict", z_loss(routings=[{}]), TypeError, ["router_z_loss", "dict"]),
    ("z_loss_none", z_loss(routings=None), TypeError, ["router_z_loss", "got NoneType"]),
    ("inject_y", inject(y=3.0), TypeError, ["inject_loss", "y", "torch.Tensor, got float"]),
    ("inject_number", inject(loss=0.5), TypeError, ["loss", "torch.Tensor, got float"]),
    ("inject_vector", inject(loss=draw(3)), ValueError, ["loss", "shape ()", "got (3,)"]),
    ("resolve_name", resolve(backend="cuda"), ValueError, ["backend", "'reference'", "'cuda'"]),
    ("resolve_x", resolve(x=[1.0]), TypeError, ["resolve_backend", "x", "torch.Tensor", "list"]),
    ("routing_x", with_routing(x=draw(4)), ValueError, ["x", "(..., T, d_model=4)", "(4,)"]),
    ("routing_mask", with_routing(padding_mask=MASK[:1]), ValueError, ["padding_mask", "(2, 5)"]),
    ("ffn_backend", ffn(backend=1), ValueError, ["backend", "'auto'", "got 1"]),
    ("combine_loose_gate", combine(shared_gate_logits=draw(2, 2)), ValueError, ["only one"]),
    ("seg_moe_router", seg_moe(router_weight=None), TypeError, ["router_weight", "NoneType"]),
    ("seg_moe_size", seg_moe(segment_size=0), ValueError, ["segment_size", "at least 1"]),
    ("seg_moe_activation", seg_moe(activation="tanh"), ValueError, ["activation", "'tanh'"]),
    ("seg_moe_drop", seg_moe(router_dropout=1.0), ValueError, ["router_dropout", "[0, 1)"]),
    ("seg_moe_renormalize", seg_moe(renormalize=1), TypeError, ["renormalize", "1 (int)"]),
    ("seg_moe_mask", seg_moe(padding_mask=MASK[0]), ValueError, ["padding_mask", "got (5,)"]),
    ("seg_moe_backend", seg_moe(backend="gpu"), ValueError, ["backend", "'gpu'"]),
    (
        "seg_moe_shared_type",
        seg_moe(shared=tuple(SHARED), shared_gate=draw(1, 4)),
        TypeError,
        ["seg_moe: expected shared to be FFNWeights, got tuple"],
    ),
    (
        "seg_moe_shared_numbers",
        seg_moe(shared=FFNWeights(None, None), shared_gate=draw(1, 4)),
        TypeError,
        ["shared.up_proj", "torch.Tensor", "NoneType"],
    ),
    (
        "seg_moe_shared_rank",
        seg_moe(shared=FFNWeights(draw(), draw()), shared_gate=draw(1, 4)),
        ValueError,
        ["shared.up_proj", "4 (token) or 12 (segment)", "got ()"],
    ),
    (
        "seg_moe_sees_the_future",
        seg_moe(
            shared=FFNWeights(draw(18, 12), draw(12, 18)),
            shared_gate=draw(1, 12),
            router_start=draw(12),
        ),
        ValueError,
        ["shared.up_proj", "width 4 (token) with router_start", "later steps", "(18, 12)"],
    ),
    (
        "seg_moe_in_proj_type",
        seg_moe(**PROJECTED, in_proj=IN_PROJ[0], out_proj=OUT_PROJ),
        TypeError,
        ["in_proj", "(weight, bias or None)", "Tensor"],
    ),
    (
        "seg_moe_out_proj_alone",
        seg_moe(**PROJECTED, in_proj=IN_PROJ, out_proj=OUT_PROJ[:1]),
        TypeError,
        ["out_proj", "(weight, bias or None)", "tuple"],
    ),
    (
        "loss_form",
        balance(normalization="official"),
        ValueError,
        ["'global', 'per_layer', 'switch'", "'official'"],
    ),
    (
        "loss_mixed",
        balance(routings=[ROUTING, OTHER_ROUTING]),
        ValueError,
        ["one number", "[2, 3]"],
    ),
    ("oracle_dropout", refuse_dropout, ValueError, ["oracle", "eval mode", "dropout=0.5"]),
]
