"""The layer inside a program: copied, switched, differentiated in every way, on both backends.

One promise a test. A layer alone is the subject of test_layer.py, processes, threads and long runs
that of test_in_processes.py.
"""

import contextlib
import copy
import io
import pickle
import re

import pytest
import torch
from layers import (
    STATES,
    D,
    assert_same_bits,
    both_backends,
    make_layer,
    needs_triton,
    place,
    train_once,
)
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from segmoe_kernels import load_balancing_loss
from segmoe_kernels.testing import make_inputs

NAMES = ("default", "alone", "segment", "projected")
# In the interpreter each case takes a second, so one layer of each execution plan has to do.
PLANS = [pytest.param(name, "triton", marks=needs_triton) for name in ("default", "segment")]
layers_of_both = pytest.mark.parametrize(
    ("name", "backend"), [*((name, "reference") for name in NAMES), *PLANS]
)


def make(name, backend, **options):
    """A layer of layers.py, a step's inputs for it."""
    layer = make_layer(**STATES[name][0], **options, backend=backend, device=place(backend))
    dtype = options.get("dtype", torch.float32)
    return layer, make_inputs(2, 12, D, dtype=dtype, device=place(backend))


def differentiate(layer, x, dy, mask=None):
    """Results by name, leaving no gradient behind: threads and streams may share the layer."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf, mask)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, (leaf, *parameters), dy)
    return dict(zip(("y", "x", *names), (y.detach(), *grads), strict=True))


def trained(layer, x, dy, **options):
    """`layers.train_once`, and the loss that is left behind."""
    return {**train_once(layer, x, dy, **options), "aux_loss": layer.aux_loss.clone()}


# --- Copies and files --------------------------------------------------------------------------


def save_and_load(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


CLONES = (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), save_and_load)


@layers_of_both
def test_copies_made_in_the_middle_of_training_train_on_with_the_same_bits(name, backend):
    """Beside gradients and a loss, and while a graph is alive."""
    layer, (x, dy, _) = make(name, backend, aux_loss_weight=0.1)
    expected = trained(layer, x, dy)
    clones = [clone(layer) for clone in CLONES]
    layer.zero_grad()
    y = layer(x)
    clones += [clone(layer) for clone in CLONES]
    assert all(p.grad is None for other in clones[3:] for p in other.parameters())
    y.backward(dy)
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert_same_bits(grads, {name: expected[name] for name in grads})
    for other in clones:
        assert other.training
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


@both_backends
@pytest.mark.parametrize(
    "before",
    [under_inference_mode, under_func_grad, under_vjp, under_checkpoint, under_nested_func_grad],
)
def test_loss_that_a_call_leaves_behind_is_a_plain_tensor(before, backend):
    if before is under_nested_func_grad and backend == "triton":
        pytest.skip("the kernels refuse second derivatives")
    layer, (x, dy, _) = make("default", backend, aux_loss_weight=0.1)
    expected = trained(layer, x, dy)
    before(layer, x)
    loss = layer.aux_loss
    assert torch.equal(loss, expected["aux_loss"])
    assert not loss.requires_grad
    assert not loss.is_inference()
    loss.add_(1)  # the caller's own
    for clone in (lambda layer: layer, *CLONES):
        assert torch.equal(clone(layer).aux_loss, expected["aux_loss"])
    assert_same_bits(trained(layer, x, dy), expected)
    layer.reset_parameters()
    assert layer.aux_loss == 0


@both_backends
def test_state_dict_goes_through_a_file_and_into_either_backend(backend, tmp_path):
    for name in STATES:
        layer, (x, dy, _) = make(name, backend)
        torch.save(layer.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        for target in ("reference", backend):
            other, _ = make(name, target)
            other.load_state_dict(state, strict=True)
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
            assert not any(value for key, value in vars(module).items() if key.endswith("_hooks"))


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
    torch.manual_seed(11)
    training = trained(layer, x, dy)
    assert training["aux_loss"] > 0
    layer.eval()
    layer._aux_loss.fill_(-1)
    evaluated = trained(layer, x, dy)
    assert evaluated.pop("aux_loss") == -1  # as evaluation writes none
    assert not torch.equal(evaluated["y"], training["y"])
    assert_same_bits(evaluated, train_once(plain, x, dy))
    torch.manual_seed(11)
    assert_same_bits(trained(layer.train(), x, dy), training)


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
    layer.requires_grad_(False)
    y = layer(x)
    assert not y.requires_grad
    found = trained(layer, x, dy)
    assert_same_bits(found, {key: expected[key] for key in ("y", "x", "aux_loss")})
    layer.requires_grad_(True)
    assert_same_bits(trained(layer, x, dy), expected)


# --- Gradients as PyTorch handles them ---------------------------------------------------------


@pytest.mark.parametrize("masked", [0.0, 0.3], ids=["full", "masked"])
@layers_of_both
def test_inputs_are_never_written(name, masked, backend):
    """Those of each stage: test_stage_properties.py."""
    layer, _ = make(name, backend, aux_loss_weight=0.1)
    x, dy, mask = make_inputs(2, 12, D, masked=masked, device=place(backend))
    x.requires_grad_()
    watched = [t for t in (x, dy, mask, *layer.parameters()) if t is not None]
    before = [(t._version, t.detach().clone()) for t in watched]
    y, routing = layer.forward_with_routing(x, mask)
    outputs = [y, *routing]
    before += [(t._version, t.detach().clone()) for t in outputs]
    y.backward(dy)
    for tensor, (version, value) in zip([*watched, *outputs], before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, value)


@layers_of_both
def test_gradients_accumulate_and_a_retained_graph_gives_them_again(name, backend):
    layer, (x, dy, _) = make(name, backend, aux_loss_weight=0.1)
    leaf = x.clone().requires_grad_()
    leaves = {"x": leaf, **dict(layer.named_parameters())}
    y = layer(leaf)
    first = torch.autograd.grad(y, [*leaves.values()], dy, retain_graph=True)
    first = dict(zip(leaves, first, strict=True))
    kept = {key: grad.clone() for key, grad in first.items()}
    y.backward(dy, retain_graph=True)
    assert_same_bits({key: t.grad for key, t in leaves.items()}, kept)
    assert_same_bits(first, kept)  # handed out once, never written again
    y.backward(dy)
    twice = {key: grad + grad for key, grad in kept.items()}
    assert_same_bits({key: t.grad for key, t in leaves.items()}, twice)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)
    # The gradient of another batch is added to what is there.
    other = make_inputs(2, 12, D, seed=1, device=place(backend))
    single = differentiate(layer, other.x, other.dy)
    layer(other.x).backward(other.dy)
    for key, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, twice[key] + single[key]), key


@layers_of_both
def test_tensors_changed_between_forward_and_backward_are_noticed_or_not_needed(name, backend):
    layer, (x, dy, _) = make(name, backend)
    expected = differentiate(layer, x, dy)
    noticed = set()
    for changed in ("x", *(key for key, _ in layer.named_parameters())):
        other = copy.deepcopy(layer)

        def run(leaf, other=other, changed=changed):
            inner = leaf * 1
            y = other(inner)
            with torch.no_grad():
                (inner if changed == "x" else other.get_parameter(changed)).mul_(-2)
            return y

        try:
            found = train_once(other, x, dy, run=run)
        except RuntimeError as error:
            # The second is how PyTorch says it of one expert's view.
            assert re.search("modified (by an )?inplace", str(error))  # noqa: PT017  one good end
            noticed.add(changed)
            continue
        # Backward had no use for it: the step is that of the tensors that forward saw.
        assert_same_bits(found, expected)
    assert noticed >= {"experts.up_proj", "experts.down_proj", "router.weight"}


@pytest.mark.parametrize(("name", "backend"), [("projected", "reference"), PLANS[0]])
def test_what_wraps_a_module_changes_no_bit(name, backend):
    """Checkpoints, memory on the host, anomaly mode, hooks."""
    layer, (x, dy, _) = make(name, backend, aux_loss_weight=0.1, dropout=0.2, router_dropout=0.2)

    def seeded(run=None):
        torch.manual_seed(5)
        return train_once(layer, x, dy, run=run)

    expected = seeded()
    for reentrant in (False, True):
        run = lambda leaf, r=reentrant: checkpoint(layer, leaf, use_reentrant=r)  # noqa: E731
        assert_same_bits(seeded(run), expected)
    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(seeded(), expected)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        assert_same_bits(seeded(), expected)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    assert_same_bits(seeded(), expected)
    assert seen == ["forward", "backward"]


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
        leaves = {"x": leaf, **dict(module.named_parameters())}
        grads = torch.autograd.grad(dx.square().sum(), [*leaves.values()], allow_unused=True)
        results.append(dict(zip(leaves, grads, strict=True)))
    for key, expected in results[1].items():
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
            second = None
            try:
                if grad.requires_grad:  # but linear in x, as a last bias is
                    second = torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True)[0]
            except RuntimeError as error:
                message = "backend='triton' has no second derivatives; use backend='reference'"
                assert message in str(error)  # noqa: PT017  one good end
                second = "refused"
            answers[backend, key] = second
    for key in leaves:
        if not isinstance(answers["triton", key], str):
            exact = answers["reference", key]
            torch.testing.assert_close(answers["triton", key], exact, rtol=1e-9, atol=1e-11)
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
        return forward_ad.unpack_dual(functional_call(layer, values, (inner,))).tangent


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "reference") for name in STATES), *PLANS,
     pytest.param("projected", "triton", marks=needs_triton)],
)  # fmt: skip
def test_forward_mode_is_refused_or_right_whatever_moves(name, backend):
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


@layers_of_both
def test_jvp_and_vmap_are_refused_by_name(name, backend):
    layer, (x, _, _) = make(name, backend)
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    values = {key: torch.stack([p, p]).detach() for key, p in layer.named_parameters()}
    modes = (contextlib.nullcontext, torch.no_grad) if backend == "triton" else ()
    calls = [(mode, layer, torch.stack([x, x])) for mode in modes]
    calls += [(contextlib.nullcontext, lambda v: functional_call(layer, v, (x,)), values)]
    for mode, function, stack in calls:
        with mode(), pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(function)(stack)


@pytest.mark.parametrize("name", STATES)
def test_reference_without_gradients_is_mapped_right_or_refuses(name):
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
