"""Training in low precision: loss scaling, master weights, modules of one 16-bit dtype."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from layers import D, make_layer, needs_triton
from torch import nn

from segmoe_kernels import SegMoE, load_balancing_loss, router_z_loss, set_loss_scaler
from segmoe_kernels.testing import make_inputs

AUX = {"aux_loss_weight": 0.5, "z_loss_weight": 0.1, "top_k": 2}


def scaled_gradients(layer, x, target, scaler):
    """Gradients as the optimizer sees them, after the scaler has taken its scale out."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    loss = F.mse_loss(layer(x).float(), target)
    (scaler.scale(loss) if scaler else loss).backward()
    if scaler:
        scaler.unscale_(optimizer)
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


def test_auxiliary_losses_keep_their_size_under_a_loss_scaler():
    x, target, _ = make_inputs(2, 12, D)
    plain = make_layer(**AUX)
    expected = scaled_gradients(plain, x, target, None)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = nn.Sequential(copy.deepcopy(plain))
    model.zero_grad()
    set_loss_scaler(model, scaler)
    actual = scaled_gradients(model[0], x, target, scaler)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-7, msg=name)
    # Told nothing, the layer's loss would be 1024 times too small.
    set_loss_scaler(model, None)
    model.zero_grad()
    wrong = scaled_gradients(model[0], x, target, torch.amp.GradScaler("cpu", init_scale=1024.0))
    difference = (wrong["router.weight"] - expected["router.weight"]).abs().max()
    assert difference > 0.1 * expected["router.weight"].abs().max()
    assert torch.equal(model[0].aux_loss, plain.aux_loss)


def accumulated(model, x, weight, *, explicit=False):
    """Gradients of four micro batches, as trainers accumulate them."""
    model.zero_grad()
    parts = x.chunk(4)
    for part in parts:
        y, routing = model[0].forward_with_routing(part)
        loss = (y * weight).mean()
        if explicit:
            loss = loss + 0.3 * load_balancing_loss(routing) + 0.2 * router_z_loss(routing)
        (loss / len(parts)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_injected_losses_of_micro_batches_are_those_of_the_batch():
    model = nn.Sequential(make_layer(aux_loss_weight=0.3, z_loss_weight=0.2, dtype=torch.float64))
    plain = nn.Sequential(make_layer(dtype=torch.float64))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 10, D, dtype=torch.float64)
    weight = torch.randn(D, dtype=torch.float64)
    set_loss_scaler(model, 1 / 4)
    found = accumulated(model, x, weight)
    for name, value in accumulated(plain, x, weight, explicit=True).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)
    # Four times the same sequences: one batch of them.
    found = accumulated(model, x[:2].repeat(4, 1, 1), weight)
    for clone in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        assert clone(model)[0].loss_scaler == 1 / 4
    set_loss_scaler(model, None)
    model.zero_grad()
    (model(x[:2]) * weight).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_copies_have_no_scaler():
    layer = make_layer(**AUX)
    set_loss_scaler(layer, torch.amp.GradScaler("cpu"))
    assert copy.deepcopy(layer).loss_scaler is None
    assert pickle.loads(pickle.dumps(layer)).loss_scaler is None
    assert layer.loss_scaler is not None


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_float16_training_with_a_scaler_and_autocast_learns(backend, device):
    if backend == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    layer = make_layer(**AUX, segment_size=3, backend=backend).to(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12)
    set_loss_scaler(layer, scaler)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=5e-3)
    x, _, _ = make_inputs(4, 12, D, device=device)
    losses = []
    for _ in range(15 if backend == "reference" else 6):
        with torch.autocast(device.type, dtype=torch.float16):
            loss = F.mse_loss(layer(x), x.flip(1))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert scaler.get_scale() == 2.0**12  # nothing overflowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_in_float32_follow_a_16_bit_module(dtype):
    """The gradients of a 16-bit copy drive float32 weights; both learn as float32 alone does."""
    torch.manual_seed(0)
    master = make_layer(**AUX, segment_size=3)
    alone = copy.deepcopy(master)
    working = copy.deepcopy(master).to(dtype)
    x, _, _ = make_inputs(4, 12, D)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (master, alone)]
    losses = []
    for _ in range(20):
        y = working(x.to(dtype))
        assert y.dtype == dtype
        loss = F.mse_loss(y.float(), x.flip(1))
        working.zero_grad()
        loss.backward()
        for big, small in zip(master.parameters(), working.parameters(), strict=True):
            assert small.grad.dtype == dtype
            big.grad = small.grad.float()
        reference = F.mse_loss(alone(x), x.flip(1))
        alone.zero_grad()
        reference.backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for big, small in zip(master.parameters(), working.parameters(), strict=True):
                small.copy_(big)
        losses.append((loss.item(), reference.item()))
    assert losses[-1][0] < 0.9 * losses[0][0]
    assert losses[-1][0] == pytest.approx(losses[-1][1], rel=0.02)


def test_overflow_skips_the_step_and_halves_the_scale():
    layer = make_layer(**AUX)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1)
    set_loss_scaler(layer, scaler)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = copy.deepcopy(layer.state_dict())
    x = make_inputs(2, 12, D).x
    scaler.scale(1e6 * layer(x).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert scaler.get_scale() == 2.0**125


@needs_triton
def test_backward_inside_autocast_has_the_bits_of_one_outside(device):
    """Gradients of a float32 pass are not rounded by where they are asked for."""
    torch.manual_seed(0)
    options = {"segment_size": 3, "causal": True, "shared_expert": "token", "device": device}
    layer = SegMoE(8, 6, 4, backend="triton", **options)
    x, dy, _ = make_inputs(2, 11, 8, device=device)
    wanted = [x.requires_grad_(), *layer.parameters()]
    outside = torch.autograd.grad(layer(x), wanted, dy)
    y = layer(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        inside = torch.autograd.grad(y, wanted, dy)
    for one, other in zip(outside, inside, strict=True):
        assert torch.equal(one, other)
