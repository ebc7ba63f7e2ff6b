"""The layer inside a program: copied, forked, threaded, interrupted, transformed, run for long.

One promise a test, on both backends where it means something on both. A layer alone is the subject
of test_layer.py and test_layer_modes.py; here is what the program around it does.
"""

import contextlib
import copy
import functools
import gc
import importlib
import inspect
import io
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import GPU, HAS_TRITON, INTERPRETER
from layers import STATES, D, make_layer, train_once
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from segmoe_kernels import SegMoE, functional, load_balancing_loss
from segmoe_kernels.testing import make_inputs

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("in_programs_worker.py")
NAMES = ("default", "alone", "segment", "projected")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
both_backends = pytest.mark.parametrize("backend", BACKENDS)
# In the interpreter each case takes a second, so one layer of each execution plan has to do.
PLANS = [pytest.param(name, "triton", marks=needs_triton) for name in ("default", "segment")]
layers_of_both = pytest.mark.parametrize(
    ("name", "backend"), [*((name, "reference") for name in NAMES), *PLANS]
)


def place(backend):
    """Where a backend is tested: the reference on the CPU, the kernels where they run."""
    return "cuda" if GPU and backend == "triton" else "cpu"


def make(name, backend, **options):
    """A layer of layers.py, two steps' inputs for it."""
    layer = make_layer(**STATES[name][0], **options, backend=backend, device=place(backend))
    dtype = options.get("dtype", torch.float32)
    return layer, make_inputs(2, 12, D, dtype=dtype, device=place(backend))


def differentiate(layer, x, dy, mask=None, *, run=None):
    """Results by name, leaving no gradient behind: threads and streams may share the layer."""
    leaf = x.detach().requires_grad_()
    y = (run or layer)(leaf, mask)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, (leaf, *parameters), dy)
    return dict(zip(("y", "x", *names), (y.detach(), *grads), strict=True))


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def trained(layer, x, dy):
    """`layers.train_once`, everything in one dictionary."""
    y, dx, grads = train_once(layer, x, dy)
    grads = {name: grad.clone() for name, grad in grads.items() if grad is not None}
    return {"y": y, "x": dx, "aux_loss": layer.aux_loss.clone(), **grads}


# --- Copies and files --------------------------------------------------------------------------


def save_and_load(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


CLONES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": save_and_load,
}


@layers_of_both
def test_copies_made_in_the_middle_of_training_train_on_with_the_same_bits(name, backend):
    layer, (x, dy, _) = make(name, backend, aux_loss_weight=0.1)
    trained(layer, x, dy)
    layer.forward_with_routing(x)[0].sum().backward()  # gradients and a loss are there
    clones = [clone(layer) for clone in CLONES.values()]
    expected = trained(layer, x, dy)
    for other in clones:
        assert other.training
        assert_same_bits(trained(other, x, dy), expected)


@both_backends
def test_layer_can_be_copied_while_its_graph_is_alive(backend):
    layer, (x, dy, _) = make("default", backend, aux_loss_weight=0.1)
    expected = trained(layer, x, dy)
    layer.zero_grad()
    y = layer(x)
    clones = [clone(layer) for clone in CLONES.values()]
    y.backward(dy)
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert_same_bits(grads, {name: expected[name] for name in grads})
    for other in clones:
        assert all(parameter.grad is None for parameter in other.parameters())
        assert_same_bits(trained(other, x, dy), expected)


# What a program may do with the layer before it copies it. The loss is the one tensor that a call
# leaves on the module: it has to be a plain one.
def under_inference_mode(layer, x):
    with torch.inference_mode():
        layer(x)


def under_func_grad(layer, x):
    values = {name: p.detach() for name, p in layer.named_parameters()}
    torch.func.grad(lambda values: functional_call(layer, values, (x,)).sum())(values)


def under_nested_func_grad(layer, x):
    inner = torch.func.grad(lambda x: layer(x).square().sum())
    torch.func.grad(lambda x: inner(x).sum())(x)


def under_vjp(layer, x):
    y, pull = torch.func.vjp(layer, x.clone().requires_grad_())
    pull(torch.ones_like(y))


def under_checkpoint(layer, x):
    checkpoint(layer, x, use_reentrant=False).sum().backward()


LEGACIES = [under_inference_mode, under_func_grad, under_vjp, under_checkpoint]


@both_backends
@pytest.mark.parametrize("before", [*LEGACIES, under_nested_func_grad])
def test_loss_that_a_call_leaves_behind_is_a_plain_tensor(before, backend):
    if before is under_nested_func_grad and backend == "triton":
        backend = "reference"  # the kernels refuse it: see the second derivatives below
    layer, (x, dy, _) = make("default", backend, aux_loss_weight=0.1)
    expected = trained(layer, x, dy)
    before(layer, x)
    loss = layer.aux_loss
    assert torch.equal(loss, expected["aux_loss"])
    assert not loss.requires_grad
    assert not loss.is_inference()
    loss.add_(1)  # the caller's own
    assert torch.equal(layer.aux_loss, expected["aux_loss"])
    for clone in CLONES.values():
        assert torch.equal(clone(layer).aux_loss, expected["aux_loss"])
    assert_same_bits(trained(layer, x, dy), expected)
    layer.reset_parameters()
    assert layer.aux_loss == 0


@both_backends
def test_state_dict_goes_through_a_file_and_into_either_backend(backend, tmp_path):
    for name in STATES:
        layer, _ = make(name, backend)
        torch.save(layer.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        for target in ("reference", backend):
            other, (x, dy, _) = make(name, target)
            keys = other.load_state_dict(state, strict=True)
            assert not keys.missing_keys
            assert not keys.unexpected_keys
            assert list(other.state_dict()) == list(layer.state_dict())
        if name == "default":
            assert_same_bits(trained(other, x, dy), trained(layer, x, dy))


def test_modules_hold_parameters_and_nothing_hidden():
    """No parametrization, hook or buffer: what a state dict shows is all there is."""
    for name, (options, expected) in STATES.items():
        layer = make_layer(**options)
        assert {key for key, _ in layer.named_parameters()} == set(expected), name
        assert not list(layer.named_buffers())
        for module in layer.modules():
            assert not torch.nn.utils.parametrize.is_parametrized(module)
            hooks = [value for key, value in vars(module).items() if key.endswith("_hooks")]
            assert not any(hooks)


@both_backends
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("segment", torch.float16), ("default", torch.bfloat16), ("projected", torch.float64)],
)
def test_converted_layer_equals_one_made_in_the_dtype(name, dtype, backend):
    layer, _ = make(name, backend, aux_loss_weight=0.1)
    other, (x, dy, _) = make(name, backend, dtype=dtype, aux_loss_weight=0.1)
    layer(torch.zeros_like(x, dtype=torch.float32))  # there is a float32 loss to convert
    other.load_state_dict(layer.state_dict())
    expected = trained(other, x, dy)
    method = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}[dtype]
    for converted in (getattr(copy.deepcopy(layer), method)(), copy.deepcopy(layer).to(x)):
        assert {p.dtype for p in converted.parameters()} == {dtype}
        assert_same_bits(trained(converted, x, dy), expected)


# --- Modes -------------------------------------------------------------------------------------


@layers_of_both
def test_train_and_eval_switch_dropout_and_losses_and_leave_no_trace(name, backend):
    options = {"dropout": 0.4, "router_dropout": 0.3, "aux_loss_weight": 0.1}
    layer, (x, dy, _) = make(name, backend, **options)
    plain, _ = make(name, backend)
    plain.load_state_dict(layer.state_dict())

    def seeded():
        torch.manual_seed(11)
        return trained(layer, x, dy)

    training = seeded()
    assert training["aux_loss"] > 0
    expected = trained(plain, x, dy)
    layer.eval()
    layer._aux_loss.fill_(-1)
    evaluated = trained(layer, x, dy)
    assert evaluated.pop("aux_loss") == -1  # as evaluation writes none
    assert not torch.equal(evaluated["y"], training["y"])
    expected.pop("aux_loss")
    assert_same_bits(evaluated, expected)
    layer.train()
    assert_same_bits(seeded(), training)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@layers_of_both
def test_layer_used_without_gradients_trains_afterwards_as_if_it_had_not_been(name, mode, backend):
    layer, (x, dy, _) = make(name, backend, z_loss_weight=0.1)
    expected = trained(copy.deepcopy(layer), x, dy)
    with mode():
        y = layer(x)
        inside = torch.randn_like(x)
        assert layer(inside).shape == x.shape
    assert torch.equal(y, expected["y"])
    assert not y.requires_grad
    assert_same_bits(trained(layer, x, dy), expected)
    if mode is torch.inference_mode:
        assert y.is_inference()
        trained(layer, inside.clone(), dy)  # a copy, as everywhere in PyTorch


@layers_of_both
def test_layer_without_anything_to_train_keeps_no_graph(name, backend):
    layer, (x, dy, _) = make(name, backend, aux_loss_weight=0.1)
    expected = trained(layer, x, dy)
    layer.zero_grad()
    layer.requires_grad_(False)
    y = layer(x)
    assert not y.requires_grad
    assert torch.equal(y, expected["y"])
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(dy)
    assert torch.equal(leaf.grad, expected["x"])
    assert all(p.grad is None for p in layer.parameters())
    layer.requires_grad_(True)
    assert_same_bits(trained(layer, x, dy), expected)


# --- Gradients as PyTorch handles them ---------------------------------------------------------


@pytest.mark.parametrize("masked", [0.0, 0.3], ids=["full", "masked"])
@layers_of_both
def test_inputs_are_never_written(name, masked, backend):
    layer, _ = make(name, backend, aux_loss_weight=0.1)
    inputs = make_inputs(2, 12, D, masked=masked, device=place(backend))
    x, dy, mask = inputs
    x.requires_grad_()
    watched = {"x": x, "dy": dy, "mask": mask, **dict(layer.named_parameters())}
    watched = {key: t for key, t in watched.items() if t is not None}
    before = {key: (t._version, t.detach().clone()) for key, t in watched.items()}
    y, routing = layer.forward_with_routing(x, mask)
    outputs = {"y": y, **routing._asdict()}
    found = {key: (t._version, t.detach().clone()) for key, t in outputs.items()}
    y.backward(dy)
    for tensors, states in ((watched, before), (outputs, found)):
        for key, tensor in tensors.items():
            version, value = states[key]
            assert tensor._version == version, key
            assert torch.equal(tensor, value), key


@both_backends
def test_stages_never_write_their_inputs(backend):
    device = place(backend)
    x, _, mask = make_inputs(2, 12, D, masked=0.3, device=device)
    layer, _ = make("default", backend)
    weight, experts = layer.router.weight, layer.experts.weights()
    routed = functional.route(
        x, weight, segment_size=5, top_k=2, padding_mask=mask, backend=backend
    )
    permutation = functional.permute(routed.topk_ids, 3, backend=backend)
    shared, gate_logits = torch.randn(2, 3, 5 * D, device=device), torch.randn(2, 3, device=device)
    rows = torch.randn(int(permutation.expert_offsets[-1]), D, device=device)
    out = functional.expert_ffn(
        x, routed.topk_weights, permutation, experts, segment_size=5, backend=backend
    ).detach()
    calls = {
        "route": lambda x, weight: (
            functional.route(
                x, weight, segment_size=5, top_k=2, padding_mask=mask, backend=backend
            ).topk_weights
        ),
        "expert_ffn": lambda x, weights: functional.expert_ffn(
            x, weights, permutation, experts, segment_size=5, padding_mask=mask, backend=backend
        ),
        "grouped_gemm": lambda rows, up: functional.grouped_gemm(
            rows, up, permutation.expert_offsets, activation="gelu", backend=backend
        ),
        "combine": lambda out, shared, logits: functional.combine(
            out, shared, logits, padding_mask=mask, backend=backend
        ),
    }
    arguments = {
        "route": (x, weight),
        "expert_ffn": (x, routed.topk_weights),
        "grouped_gemm": (rows, experts.up_proj),
        "combine": (out, shared, gate_logits),
    }
    indices = {"mask": mask, "ids": routed.topk_ids, **permutation._asdict()}
    for name, call in calls.items():
        leaves = [t.detach().clone().requires_grad_() for t in arguments[name]]
        watched = [*leaves, *indices.values(), *(w for w in experts if w is not None)]
        before = [(t._version, t.detach().clone()) for t in watched]
        y = call(*leaves)
        upstream = torch.randn_like(y)
        kept = upstream.clone()
        torch.autograd.grad(y, leaves, upstream)
        assert torch.equal(upstream, kept), name
        for tensor, (version, value) in zip(watched, before, strict=True):
            assert tensor._version == version, name
            assert torch.equal(tensor, value), name


@layers_of_both
def test_gradients_accumulate_and_a_retained_graph_gives_them_again(name, backend):
    layer, (x, dy, _) = make(name, backend, aux_loss_weight=0.1)
    leaf = x.clone().requires_grad_()
    leaves = {"x": leaf, **dict(layer.named_parameters())}
    y = layer(leaf)
    first = dict(
        zip(leaves, torch.autograd.grad(y, [*leaves.values()], dy, retain_graph=True), strict=True)
    )
    kept = {key: grad.clone() for key, grad in first.items()}
    y.backward(dy, retain_graph=True)
    assert_same_bits({key: t.grad for key, t in leaves.items()}, kept)
    assert_same_bits(first, kept)  # handed out once, never written again
    y.backward(dy)
    assert_same_bits(
        {key: t.grad for key, t in leaves.items()}, {k: g + g for k, g in kept.items()}
    )
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)
    # The gradient of another batch is added to what is there.
    other = make_inputs(2, 12, D, seed=1, device=place(backend))
    single = differentiate(layer, other.x, other.dy)
    layer(other.x).backward(other.dy)
    for key, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, kept[key] + kept[key] + single[key]), key


@layers_of_both
def test_tensors_changed_between_forward_and_backward_are_noticed_or_not_needed(name, backend):
    layer, (x, dy, _) = make(name, backend)
    expected = differentiate(layer, x, dy)
    noticed = set()
    for changed in ("x", *(key for key, _ in layer.named_parameters())):
        other = copy.deepcopy(layer)
        leaf = x.clone().requires_grad_()
        inner = leaf * 1
        y = other(inner)
        with torch.no_grad():
            (inner if changed == "x" else other.get_parameter(changed)).mul_(-2)
        try:
            y.backward(dy)
        except RuntimeError as error:
            # The second is how PyTorch says it of one expert's view.
            assert re.search("modified (by an )?inplace", str(error))  # noqa: PT017  one good end
            noticed.add(changed)
            continue
        # Backward had no use for it: the step is that of the tensors that forward saw.
        grads = {key: p.grad for key, p in other.named_parameters()}
        assert_same_bits({"y": y.detach(), "x": leaf.grad, **grads}, expected)
    assert noticed >= {"experts.up_proj", "experts.down_proj", "router.weight"}


@pytest.mark.parametrize(("name", "backend"), [("projected", "reference"), PLANS[0]])
def test_what_wraps_a_module_changes_no_bit(name, backend):
    layer, (x, dy, _) = make(name, backend, aux_loss_weight=0.1, dropout=0.2)

    def seeded(run=None):
        torch.manual_seed(5)
        return differentiate(layer, x, dy, run=run)

    expected = seeded()
    for reentrant in (False, True):
        # Reentrant checkpoints know .backward() alone.
        torch.manual_seed(5)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = checkpoint(layer, leaf, use_reentrant=reentrant)
        y.backward(dy)
        grads = {key: p.grad for key, p in layer.named_parameters()}
        assert_same_bits({"y": y.detach(), "x": leaf.grad, **grads}, expected)
    layer.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(seeded(), expected)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        assert_same_bits(seeded(), expected)
    seen = []
    handles = [
        layer.register_forward_hook(lambda *_: seen.append("forward")),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    assert_same_bits(seeded(), expected)
    assert seen == ["forward", "backward"]
    for handle in handles:
        handle.remove()


# --- Derivatives of other kinds ----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gradient_penalty_of_a_layer_with_injected_loss_equals_that_of_an_explicit_loss(name):
    options = {"top_k": 2, "dtype": torch.float64}
    layer, (x, dy, _) = make(name, "reference", **options, aux_loss_weight=0.3)
    plain, _ = make(name, "reference", **options)
    plain.load_state_dict(layer.state_dict())
    results = []
    for module in (layer, plain):
        leaf = x.clone().requires_grad_()
        y, routing = module.forward_with_routing(leaf)
        total = (y * dy).sum()
        if module is plain:
            total = total + 0.3 * load_balancing_loss(routing)
        (dx,) = torch.autograd.grad(total, leaf, create_graph=True)
        penalty = dx.square().sum()
        leaves = {"x": leaf, **dict(module.named_parameters())}
        grads = torch.autograd.grad(penalty, [*leaves.values()], allow_unused=True)
        results.append(dict(zip(leaves, grads, strict=True)))
    for key, expected in results[1].items():
        assert (expected is None) == (results[0][key] is None), key
        if expected is not None:
            torch.testing.assert_close(results[0][key], expected, rtol=1e-10, atol=1e-12)
    assert results[1]["router.weight"].any()


@needs_triton
@pytest.mark.parametrize("name", ["default", "segment", "projected", "gated_bias"])
def test_kernels_refuse_second_derivatives_whoever_asks(name):
    """Or they are right: where plain PyTorch around the kernels needs but their first ones."""
    layer, (x, dy, _) = make(name, "triton", dtype=torch.float64)
    answers = {}
    for backend in ("triton", "reference"):
        layer.backend = backend
        leaf = x.to(place("triton")).requires_grad_()
        leaves = {"x": leaf, **dict(layer.named_parameters())}
        grads = torch.autograd.grad(layer(leaf), [*leaves.values()], dy, create_graph=True)
        for key, grad in zip(leaves, grads, strict=True):
            if not grad.requires_grad:  # linear in x, as a last bias is
                answers[backend, key] = None
                continue
            try:
                second = torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True)[0]
            except RuntimeError as error:
                message = "backend='triton' has no second derivatives; use backend='reference'"
                assert message in str(error)  # noqa: PT017  one good end
                second = "refused"
            answers[backend, key] = second
    for key in leaves:
        ours, exact = answers["triton", key], answers["reference", key]
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)
        elif ours is None:
            assert exact is None
    for key in ("x", "router.weight", "experts.up_proj", "experts.down_proj"):
        assert answers["triton", key] == "refused", key
        assert answers["reference", key].any(), key


def tangent_of(layer, x, moving, tangent):
    """The tangent of y where one tensor moves, or None where PyTorch says that there is none."""
    values = {key: p.detach() for key, p in layer.named_parameters()}
    values["x"] = x
    with forward_ad.dual_level():
        values[moving] = forward_ad.make_dual(values[moving], tangent)
        inner = values.pop("x")
        y = functional_call(layer, values, (inner,))
        return forward_ad.unpack_dual(y).tangent


FORWARD_MODE = [
    pytest.param(backend, name, marks=marks)
    for backend, marks in (("reference", []), ("triton", [needs_triton]))
    for name in (STATES if backend == "reference" else ("default", "segment", "projected"))
]


@pytest.mark.parametrize(("backend", "name"), FORWARD_MODE)
def test_forward_mode_is_refused_or_right_whatever_moves(backend, name):
    """Nothing requires a gradient here, so no node of the graph is there to refuse."""
    layer, (x, dy, _) = make(name, backend, dtype=torch.float64)
    grads = differentiate(layer, x, dy)
    modes = (contextlib.nullcontext, torch.no_grad) if backend == "reference" else (torch.no_grad,)
    refused = []
    for moving in grads.keys() - {"y"}:
        start = x if moving == "x" else layer.get_parameter(moving)
        direction = torch.randn_like(start)
        expected = (grads[moving] * direction).sum()
        for mode in modes:
            try:
                with mode():
                    tangent = tangent_of(layer, x, moving, direction)
            except (RuntimeError, NotImplementedError) as error:
                assert "jvp" in str(error)  # noqa: PT017  one of two good ends
                refused.append(moving)
                continue
            # A tensor that y doesn't depend on has no tangent, a dropped one is a wrong result.
            found = torch.zeros_like(expected) if tangent is None else (tangent * dy).sum()
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert ("x" in refused) == (name != "dense")


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_kernels_refuse_jvp_and_vmap_by_name(name):
    layer, (x, _, _) = make(name, "triton")
    with pytest.raises(NotImplementedError, match="jvp function"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    stack = torch.stack([x, x])
    for mode in (contextlib.nullcontext, torch.no_grad):
        with mode(), pytest.raises(RuntimeError, match=r"vmap over .* does not have vmap support"):
            torch.func.vmap(layer)(stack)
    values = {key: torch.stack([p, p]).detach() for key, p in layer.named_parameters()}
    with pytest.raises(RuntimeError, match=r"vmap over .* does not have vmap support"):
        torch.func.vmap(lambda values: functional_call(layer, values, (x,)))(values)


@pytest.mark.parametrize("name", STATES)
def test_reference_without_gradients_is_mapped_right_or_refuses(name):
    """With gradients it refuses: test_reference_grad.py."""
    layer, (x, _, _) = make(name, "reference", dtype=torch.float64)
    stack = torch.stack([x, x.flip(0), x + 1])
    expected = torch.stack([layer(one) for one in stack]).detach()
    try:
        with torch.no_grad():
            actual = torch.func.vmap(layer)(stack)
    except RuntimeError as error:
        assert "vmap" in str(error)  # noqa: PT017  one of two good ends
        return
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@layers_of_both
def test_func_grad_and_functional_call_equal_backward(name, backend):
    layer, (x, dy, _) = make(name, backend, aux_loss_weight=0.1)
    expected = differentiate(layer, x, dy)
    values = {key: p.detach() for key, p in layer.named_parameters()}

    def loss(values, x):
        return (functional_call(layer, values, (x,)) * dy).sum()

    grads, dx = torch.func.grad(loss, argnums=(0, 1))(values, x)
    assert_same_bits({"y": expected["y"], "x": dx, **grads}, expected)
    assert all(p.grad is None for p in layer.parameters())


# --- Processes, threads, streams, devices ------------------------------------------------------


def run_worker(*arguments):
    """Start the worker script in a process of its own, one thread, no CUDA."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **hidden},
        cwd=ROOT,
        start_new_session=True,
    )


def finish(process, seconds=240):
    """Wait for a worker and all that it started; return its exit status and output."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, out, err


CHILD_BACKENDS = ("reference", "triton") if INTERPRETER else ("reference",)


@pytest.fixture(scope="module")
def digests():
    """What each kind of child computes."""
    status, out, err = finish(run_worker("processes", *CHILD_BACKENDS))
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize("backend", CHILD_BACKENDS)
@pytest.mark.parametrize(("child", "count"), [("fork", 1), ("spawn", 1), ("loader", 2)])
def test_child_process_gives_the_bits_of_its_parent(child, count, backend, digests):
    assert digests[backend][child] == digests[backend]["parent"] * count


def in_threads(layer, batches, repeats):
    """Each thread trains on a batch of its own, all at the same time; results by batch."""
    start = threading.Barrier(len(batches))

    def work(batch):
        start.wait()
        return [differentiate(layer, *batch) for _ in range(repeats)]

    with ThreadPoolExecutor(len(batches)) as pool:
        return list(pool.map(work, batches))


def make_batches(device, d_model=16):
    """Batches of four sizes, one masked: what threads or streams shared would not fit."""
    return [
        make_inputs(2 + i, 40 + 9 * i, d_model, seed=i, masked=0.2 * (i == 3), device=device)
        for i in range(4)
    ]


THREADED = {"token": {}, "segment": {"expert_scope": "segment"}, "gated": {"gated": True}}


def make_threaded(name, backend, device):
    return SegMoE(
        16, 24, 4, top_k=2, segment_size=5, aux_loss_weight=0.1, backend=backend, device=device,
        **THREADED[name],
    )  # fmt: skip


@pytest.mark.parametrize("name", THREADED)
def test_four_threads_equal_one_on_the_reference(name):
    layer = make_threaded(name, "reference", "cpu")
    batches = make_batches("cpu")
    expected = [differentiate(layer, *batch) for batch in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads alternate within a call, not only between calls
    try:
        found = in_threads(layer, batches, repeats=12)
    finally:
        sys.setswitchinterval(interval)
    for results, reference in zip(found, expected, strict=True):
        for result in results:
            assert_same_bits(result, reference)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", THREADED)
def test_four_threads_equal_one_on_the_kernels(name):
    """The interpreter keeps its state in module globals: this needs real launches."""
    layer = make_threaded(name, "triton", "cuda")
    batches = make_batches("cuda")
    expected = [differentiate(layer, *batch) for batch in batches]
    for results, reference in zip(in_threads(layer, batches, 25), expected, strict=True):
        for result in results:
            assert_same_bits(result, reference)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", THREADED)
def test_four_streams_equal_one(name):
    layer = make_threaded(name, "triton", "cuda")
    batches = make_batches("cuda")
    expected = [differentiate(layer, *batch) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    found = []
    for _ in range(25):
        for stream, batch in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(differentiate(layer, *batch))
    torch.cuda.synchronize()
    for result, reference in zip(found, itertools.cycle(expected)):
        assert_same_bits(result, reference)


@pytest.mark.gpu
@needs_triton
def test_kernels_run_on_the_current_stream():
    """What a busy stream has yet to write is waited for; nothing runs on the default stream."""
    layer = make_threaded("token", "triton", "cuda")
    batch = make_batches("cuda")[0]
    expected = differentiate(layer, *batch)
    late = torch.zeros_like(batch.x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(batch.x)
        found = differentiate(layer, late, batch.dy)
    stream.synchronize()
    assert_same_bits(found, expected)


class Guard:
    """Stands in for the device guard and knows how deep it is entered."""

    def __init__(self):
        self.depth, self.devices = 0, set()

    @contextlib.contextmanager
    def enter(self, x):  # noqa: D102
        self.devices.add(x.device)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


@pytest.mark.interpreter
def test_kernels_are_launched_and_tiles_chosen_under_the_guard(monkeypatch):
    """Triton launches on the current GPU and tiles are those of the current GPU's kind."""
    from triton.runtime import interpreter

    from segmoe_kernels import stages  # noqa: F401  all operators are there
    from segmoe_kernels._triton import launch, tile_table

    guard, seen = Guard(), {"launch": [], "tile": []}
    monkeypatch.setattr(launch, "device_guard", guard.enter)
    execute, architecture = interpreter.GridExecutor.__call__, tile_table.architecture

    def spying_execute(self, *args, **kwargs):
        seen["launch"].append((self.fn.__name__, guard.depth))
        return execute(self, *args, **kwargs)

    def spying_architecture():
        seen["tile"].append(("architecture", guard.depth))
        return architecture()

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", spying_execute)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("segmoe_kernels."):
            for key, value in list(vars(module).items()):
                if value is architecture:
                    monkeypatch.setattr(module, key, spying_architecture)
    for name in ("default", "segment", "projected"):
        layer, (x, dy, _) = make(name, "triton", aux_loss_weight=0.1)
        train_once(layer, x, dy)
    assert len(seen["launch"]) > 5
    assert seen["tile"]
    outside = {what for calls in seen.values() for what, depth in calls if depth == 0}
    assert not outside
    assert guard.devices == {torch.device("cpu")}


@needs_triton
def test_guard_makes_the_tensors_gpu_current(monkeypatch):
    from segmoe_kernels._triton.launch import device_guard

    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x) or "guard")
    on_gpu = types.SimpleNamespace(is_cuda=True)
    assert device_guard(on_gpu) == "guard"
    assert entered == [on_gpu]
    with device_guard(torch.zeros(1)):
        assert len(entered) == 1


UNTOUCHED = """
import sys, torch
def refuse(name):
    def call(*args, **kwargs):
        raise AssertionError(f"torch.cuda.{name} was called")
    return call
for name in ("is_available", "device_count", "current_device", "init", "_lazy_init",
             "get_device_capability", "get_device_properties", "current_stream"):
    setattr(torch.cuda, name, refuse(name))
import importlib, pkgutil, segmoe_kernels
for module in pkgutil.walk_packages(segmoe_kernels.__path__, "segmoe_kernels."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert "segmoe_kernels.stages.route" in sys.modules
"""


@needs_triton
def test_importing_every_module_asks_cuda_nothing():
    """A program may fork, or choose its GPU, after it has imported us."""
    result = subprocess.run(
        [sys.executable, "-c", UNTOUCHED], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr


# --- A long life -------------------------------------------------------------------------------


def module_state():
    """The size of every container and cache that the package keeps in its modules."""
    sizes = {}
    modules = {name: m for name, m in sys.modules.items() if name.startswith("segmoe_kernels.")}
    for module_name, module in modules.items():
        for key, value in vars(module).items():
            if key.startswith("__"):
                continue
            if isinstance(value, list | dict | set | bytearray):
                sizes[module_name, key] = len(value)
            elif isinstance(value, functools._lru_cache_wrapper):
                sizes[module_name, key] = value.cache_info().currsize
            elif isinstance(value, torch.Tensor):
                sizes[module_name, key] = value._version
            for name, held in vars(value).items() if inspect.isclass(value) else ():
                if isinstance(held, list | dict | set) and not name.startswith("__"):
                    sizes[module_name, key, name] = len(held)
    return sizes


@both_backends
def test_modules_keep_nothing_of_the_shapes_they_have_seen(backend):
    def work(length):
        layer, _ = make("default", backend, aux_loss_weight=0.1)
        train_once(layer, *make_inputs(1, length, D, device=place(backend))[:2])
        layer, _ = make("segment", backend)
        train_once(layer, *make_inputs(2, length, D, device=place(backend))[:2])

    work(3)
    before = module_state()
    assert any(key[1] == "_WARNED" for key in before)
    # Lengths that no other test has shown to this process.
    for length in (31, 47) if backend == "reference" else (32, 48):
        work(length)
    assert module_state() == before


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_training_steps_keep_no_memory():
    """Counts are taken without the collector's help: no step leaves a cycle for it either."""
    layer = make_layer(d_model=32, d_ff=32, top_k=2, shared_expert=None, aux_loss_weight=0.1)
    x = torch.randn(4, 64, 32, requires_grad=True)  # 32 KiB: a tensor kept by each step shows
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def steps(count):
        for _ in range(count):
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            x.grad = None

    count = 1000
    steps(100)
    gc.collect()
    gc.disable()
    try:
        objects, resident = len(gc.get_objects()), resident_bytes()
        steps(count)
        more_objects = len(gc.get_objects()) - objects
        more_bytes = resident_bytes() - resident
    finally:
        gc.enable()
    assert more_objects < count / 4
    assert more_bytes < count * x.nbytes / 4


@pytest.mark.interpreter
def test_training_steps_on_the_kernels_keep_no_object():
    """The interpreter itself makes cycles: counts are taken behind the collector."""
    layer = make_layer(d_model=4, num_experts=2, segment_size=2, shared_expert=None,
                       aux_loss_weight=0.1, backend="triton")  # fmt: skip
    x = torch.randn(1, 4, 4, requires_grad=True)

    def steps(count):
        for _ in range(count):
            layer.zero_grad()
            x.grad = None
            layer(x).sum().backward()
        gc.collect()
        alive = gc.get_objects()
        return len(alive), sum(issubclass(type(one), torch.Tensor) for one in alive)

    objects, tensors = steps(3)
    count = 12
    more_objects, more_tensors = steps(count)
    assert more_tensors <= tensors
    assert more_objects - objects < count / 2


# --- Interruption and resumption ---------------------------------------------------------------

TINY = [
    *("--data", "multiscale", "--look-back", "64", "--horizon", "8", "--d-model", "8"),
    *("--d-ff", "8", "--num-layers", "1", "--segment-sizes", "3", "--epochs", "3"),
    *("--train-fraction", "0.01", "--batch-size", "16", "--threads", "1", "--quiet", "--no-plots"),
]


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("examples.train_forecaster")


def outcome(out):
    """All that a finished run found, but for times."""
    (run,) = json.loads((out / "result.json").read_text())["runs"]
    timeless = [
        {key: value for key, value in epoch.items() if not key.endswith("_s")}
        for epoch in run["history"]
    ]
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    return (timeless, run["validation"], run["test"], run["best_epoch"]), state


@pytest.fixture(scope="module")
def uninterrupted(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    assert example.main([*TINY, "--out", str(out)]) == 0
    return outcome(out)


def interrupt(stop, number, out):
    """Start the example, send it a signal where it stops; exit status and what it said."""
    flag = out / "stopped"
    process = run_worker("train", stop, flag, *TINY, "--out", out)
    deadline = time.monotonic() + 120
    while not flag.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        os.kill(process.pid, number)
    status, _, err = finish(process, 60)
    assert flag.exists(), err
    return status, err


@pytest.mark.parametrize(
    ("stop", "number"),
    [("step", signal.SIGKILL), ("step", signal.SIGINT), ("save", signal.SIGKILL)],
    ids=["killed_in_an_epoch", "ctrl_c_in_an_epoch", "killed_while_writing"],
)
def test_training_goes_on_after_a_signal_as_if_there_had_been_none(
    stop, number, example, uninterrupted, tmp_path, capsys
):
    status, said = interrupt(stop, number, tmp_path)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 130
        assert re.search(r"interrupted; the same command with --resume goes on\n\Z", said)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)  # whole, of the first epoch
    assert len(state["history"]) == 1
    assert not (tmp_path / "result.json").exists()
    assert example.main([*TINY, "--out", str(tmp_path), "--resume"]) == 0
    assert "going on after epoch 1" in capsys.readouterr().out
    found, expected = outcome(tmp_path), uninterrupted
    assert found[0] == expected[0]
    for part in ("model", "best_state"):
        assert_same_bits(found[1][part], expected[1][part])
    assert torch.equal(found[1]["torch_rng"], expected[1]["torch_rng"])
    leftover = [path.name for path in tmp_path.glob(".checkpoint.pt.*")]
    # A killed process can't tidy up; one that was asked to end does.
    assert len(leftover) == (stop == "save")
