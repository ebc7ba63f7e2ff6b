"""What ranks do in test_parallel.py. Imported by a worker, after the interpreter is chosen."""

import copy
import itertools
import pickle
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from segmoe_kernels import SegMoE, collect_routing_stats
from segmoe_kernels.parallel import expert_parameter_names, gather_experts, shard_experts

D, HIDDEN = 4, 6


def make(**options):
    torch.manual_seed(5)
    settings = {"segment_size": 3, "top_k": 2, "dtype": torch.float64, **options}
    sizes = settings.pop("d_ff", HIDDEN), settings.pop("num_experts", 4)
    layer = SegMoE(D, *sizes, **settings)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.normal_()
            if settings.get("router_temperature") and name == "router.weight":
                parameter[0] += 3.0  # most go to one expert
    return layer


def batches(world, sizes, masked, steps=8):
    """``(x, dy, mask)`` of each rank."""
    generator = torch.Generator().manual_seed(9)
    found = []
    for _, size in zip(range(world), itertools.cycle(sizes), strict=False):
        x, dy = (
            torch.randn(size, steps, D, generator=generator, dtype=torch.float64) for _ in "xy"
        )
        mask = torch.rand(size, steps, generator=generator) < 0.6 if masked else None
        found.append((x, dy, mask))
    return found


def equals_one_process(rank, world, options, sizes, *, masked=False, average=False):
    """Outputs and gradients of a sharded layer against the whole layer on all batches in turn."""
    whole = make(**options)
    layer = shard_experts(whole, average_gradients=average)
    inputs = batches(world, sizes, masked)
    outputs, leaves = [], []
    for x, dy, mask in inputs:
        leaf = x.clone().requires_grad_()
        y = whole(leaf, mask)
        y.backward(dy)
        outputs.append(y)
        leaves.append(leaf)
    x, dy, mask = inputs[rank]
    leaf = x.clone().requires_grad_()
    y, routing = layer.forward_with_routing(leaf, mask)
    y.backward(dy)
    close(y, outputs[rank], "y")
    close(leaf.grad, leaves[rank].grad, "dx")
    alone = whole.forward_with_routing(x, mask)[1]
    assert torch.equal(routing.expert_counts, alone.expert_counts)
    start = sum(sizes_of(whole.num_experts, world)[:rank])
    block = slice(start, start + layer.experts.num_experts)
    scale = world if average else 1
    for name, parameter in layer.named_parameters():
        expected = whole.get_parameter(name).grad
        if name.startswith("experts."):
            close(parameter.grad, expected[block] / scale, name)
            assert torch.equal(parameter, whole.get_parameter(name)[block])
        else:
            total = parameter.grad.clone()
            dist.all_reduce(total)
            close(total, expected, name)
    return layer.experts.num_experts


def sizes_of(count, world):
    return [count // world + (rank < count % world) for rank in range(world)]


def close(actual, expected, name):
    torch.testing.assert_close(
        actual, expected, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name} {m}"
    )


def first_rank_wins_and_gather_gives_it_back(rank, world):
    """Ranks that start from other values end with the first rank's; a round trip is exact."""
    torch.manual_seed(100 + rank)
    layer = SegMoE(D, HIDDEN, 5, bias=True, gated=True)
    layer.router.weight.requires_grad_(False)
    if rank % 2:  # memory in another order
        turned = layer.experts.up_proj.detach().transpose(1, 2).contiguous().transpose(1, 2)
        layer.experts.up_proj = nn.Parameter(turned)
    layer.loss_scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(layer.state_dict())
    sharded = shard_experts(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    again = gather_experts(sharded)
    assert type(again) is SegMoE
    assert again.loss_scaler is sharded.loss_scaler is layer.loss_scaler
    assert not again.router.weight.requires_grad
    gathered = [None] * world
    dist.all_gather_object(gathered, (before, again.state_dict()))
    for _, state in gathered:
        assert state.keys() == before.keys()
        assert all(torch.equal(value, gathered[0][0][name]) for name, value in state.items())
    raises(TypeError, "gather_experts(layer) first", lambda: pickle.dumps(sharded))
    # A copy works, and shares nothing but the group.
    copied = copy.deepcopy(sharded).eval()
    x = torch.randn(2, 7, D)
    assert torch.equal(copied(x), sharded.eval()(x))
    sharded.load_state_dict(copied.state_dict())
    assert set(expert_parameter_names(nn.Sequential(sharded))) == {
        f"0.experts.{name}" for name, _ in sharded.experts.named_parameters()
    }


def frozen_parts_do_not_hang(rank, world):
    """Whatever needs no gradient, all ranks run the same collectives in backward."""
    for frozen in itertools.product([False, True], repeat=3):
        layer = shard_experts(make(num_experts=2))
        for module, off in zip((layer.router, layer.experts), frozen, strict=False):
            module.requires_grad_(not off)
        size = world - 1 - rank
        x = torch.randn(size, 8, D, dtype=torch.float64, requires_grad=not frozen[2])
        layer(x).sum().backward()
        assert (layer.experts.up_proj.grad is None) == frozen[1]
        assert (layer.router.weight.grad is None) == frozen[0]
    with torch.no_grad():
        assert layer(x).shape == x.shape


def refuses_before_sending(rank, world):
    """Layers that differ, and inputs that do not fit, raise on every rank without a row sent."""
    if world > 1:
        for layer in (make(top_k=1 + rank % 2), make(gated=bool(rank % 2)), make()):
            layer.router.requires_grad_(rank % 2 == 0)
            raises(ValueError, "others than rank 0's on ranks [1", lambda: shard_experts(layer))  # noqa: B023  called here
    real, dist.all_to_all_single = dist.all_to_all_single, None
    try:
        for options in ({}, {"shared_expert": None}, {"expert_scope": "projected"}):
            layer = shard_experts(make(**options))
            x = torch.zeros(2, 7, D)
            raises(TypeError, "have dtype torch.float32 as x", lambda: layer(x))  # noqa: B023
            other = torch.zeros(2, 7, D, dtype=torch.float64, device="meta")
            raises(ValueError, "be on meta as x", lambda: layer(other))  # noqa: B023
            raises(ValueError, f"d_model={D})", lambda: layer(x[..., 1:].double()))  # noqa: B023
    finally:
        dist.all_to_all_single = real


def raises(kind, text, call):
    try:
        call()
    except kind as error:
        assert text in str(error), error  # noqa: PT017  no pytest in a worker
    else:
        raise AssertionError(f"{kind.__name__} with {text!r} was not raised")


def empty_and_nested_batches(rank, _world):
    """No sequence, no step, one step, more dimensions; other shapes on other ranks."""
    whole = make(bias=True)
    layer = shard_experts(whole)
    shapes = [(0, 5), (2, 0), (2, 3, 7), (7,), (1, 1), (2, 2)]
    for i in range(len(shapes)):
        x = torch.randn(*shapes[(i + rank) % len(shapes)], D, dtype=torch.float64)
        leaf = x.requires_grad_()
        layer(leaf).sum().backward()
        got, leaf.grad = leaf.grad, None
        whole(leaf).sum().backward()
        close(got, leaf.grad, "dx")
        close(layer(x), whole(x), "y")


def dropout_and_checkpoints(rank, _world, backend):
    """Dropout repeats after the same seed, so a checkpointed layer computes what a plain one does.

    Without dropout, as in evaluation, it is one process's layer.
    """
    options = {"router_dropout": 0.1, "aux_loss_weight": 0.1, "backend": backend, "num_experts": 3}
    whole = make(dropout=0.3, **options)
    layer = shard_experts(whole)
    x = torch.randn(1 + rank % 2, 4, D, dtype=torch.float64)
    close(layer.eval()(x), whole.eval()(x), "y")
    layer.train()
    results = []
    for reentrant in (None, False, True):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(rank)
        layer.zero_grad()
        y = layer(leaf) if reentrant is None else checkpoint(layer, leaf, use_reentrant=reentrant)
        y.sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not torch.equal(layer(x), results[0][0])


def autocast_as_one_process(rank, world):
    """In bfloat16, also on ranks without an expert."""
    whole = make(num_experts=2, bias=True, dtype=torch.float32)
    layer = shard_experts(whole)
    x, dy, _ = batches(world, [1, 2], masked=False)[rank]
    x, dy = x.float(), dy.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), whole(x)
    assert y.dtype == torch.float32
    assert not torch.equal(expected, whole(x))  # autocast was on
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    y.backward(dy)
    expected.backward(dy)
    for name in ("router.weight", "shared_expert.up_proj.weight"):
        found, wanted = layer.get_parameter(name).grad, whole.get_parameter(name).grad
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05, msg=name)


def compiled_as_eager(rank, world):
    """A graph break, no failure."""
    layer = shard_experts(make())
    x = batches(world, [1, 2], masked=False)[rank][0]
    close(torch.compile(layer, backend="eager")(x), layer(x), "y")


def statistics_of_all_ranks(rank, world):
    """Counters are summed when read, once; of sharded layers as of plain ones."""
    model = nn.Sequential(make(aux_loss_weight=0.1), shard_experts(make(router_temperature=0.1)))
    stats = collect_routing_stats(model, all_reduce=True)
    inputs = batches(world, [1, 2], masked=False, steps=6)
    for _ in range(2):
        model(inputs[rank][0])
        stats.end_step()
    found = stats.compute()
    steps = [entry["layers"][1]["num_tokens"] for entry in stats.step_history]
    stats.close()
    alone = nn.Sequential(make(aux_loss_weight=0.1), make(router_temperature=0.1))
    with collect_routing_stats(alone) as expected:
        for x, _, _ in inputs * 2:
            alone(x)
        theirs = expected.compute()
    for i, own in found["layers"].items():
        for key, value in own.items():
            close(torch.as_tensor(value), torch.as_tensor(theirs["layers"][i][key]), key)
    return {"steps": steps, "epoch": found["layers"][0]["num_tokens"]}


def stuck(rank, _world):
    """One rank never comes."""
    if rank == 1:
        time.sleep(60)
    dist.barrier()


def bytes_sent(rank, world, size):
    """Bytes to other ranks, forward and backward, and this rank's slots by the rank they go to."""
    sent = []
    real = dist.all_to_all_single

    def spy(out, tensor, receive, send, group=None):
        row = tensor.element_size() * tensor[0].numel() if len(tensor) else 0
        sent.append(row * (sum(send) - send[rank]))
        return real(out, tensor, receive, send, group=group)

    torch.manual_seed(7)
    layer = shard_experts(SegMoE(D, HIDDEN, 5, segment_size=3, top_k=2))
    x, dy = (torch.randn(size + rank, 7, D, requires_grad=True) for _ in "xy")
    dist.all_to_all_single = spy
    try:
        y, routing = layer.forward_with_routing(x)
        y.backward(dy)
    finally:
        dist.all_to_all_single = real
    counts = routing.expert_counts.split(sizes_of(5, world))
    return {"sent": sent, "to": [part.sum().item() for part in counts]}


def groups_of_some_ranks(rank, world):
    """Two groups side by side, each with its own experts."""
    halves = [dist.new_group(list(range(world))[i::2]) for i in range(2)]
    mine = halves[rank % 2]
    layer = shard_experts(make(), mine)
    blocks = sizes_of(4, dist.get_world_size(mine))
    assert layer.experts.num_experts == blocks[dist.get_rank(mine)]
    x = batches(world, [2], masked=False)[rank][0]
    close(layer(x), make()(x), "y")
    raises(RuntimeError, "not in the group", lambda: shard_experts(make(), halves[1 - rank % 2]))


def model_of(*layers):
    torch.manual_seed(3)
    head = nn.Linear(D, 1, dtype=torch.float64)
    return nn.Sequential(*layers, head)


def one_step(model, x, target, *, ranks=1):
    loss = F.mse_loss(model(x), target, reduction="sum") / ranks
    loss.backward()


def both_step(optimizers, model, whole, data, rank, *, first=None):
    """A step of this rank's model on its batch, and of one process's on all: the ranks' mean.

    ``first(batch)`` is what the rank does before with the same batch, to accumulate gradients.
    """
    for optimizer in optimizers:
        optimizer.zero_grad()
    batches_each = 1 if first is None else 2
    if first is not None:
        first(data[rank])
    one_step(model, *data[rank])
    for x, target in data * batches_each:
        one_step(whole, x, target)
    assert all(p.grad is not None for p in model.parameters())
    for parameter in whole.parameters():
        parameter.grad /= len(data)
    for optimizer in optimizers:
        optimizer.step()


def data_parallel(rank, world, sharded):
    """DDP without unused parameters: every parameter has a gradient each step, the mean's."""
    options = {"num_experts": 6, "top_k": 1, "aux_loss_weight": 0.01, "z_loss_weight": 0.01}
    whole = model_of(make(**options), make(shared_expert="token", **options))
    data = [(x, x.sum(-1, keepdim=True)) for x, _, _ in batches(world, [1], masked=False, steps=4)]
    model = copy.deepcopy(whole)
    if sharded:
        for i in range(2):
            model[i] = shard_experts(model[i], average_gradients=True)
        names = expert_parameter_names(model)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, whole)]

    def unreduced(batch):
        with wrapped.no_sync():
            one_step(wrapped, *batch)

    for first in (None, unreduced, None):
        both_step(optimizers, wrapped, whole, data, rank, first=first)
    for i in range(2):
        layer = gather_experts(model[i]) if sharded else model[i]
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(
                parameter, whole[i].get_parameter(name), rtol=1e-6, atol=1e-7, msg=name
            )


def fully_sharded(rank, world):
    """FSDP2; experts on dimension 1, as there are fewer of them than ranks may be."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (world,))
    # FSDP2 shards dimension 1 where the world divides it.
    options = {"num_experts": 2, "top_k": 1, "shared_expert": "token", "bias": True, "d_ff": 8}
    whole = model_of(make(**options), make(**options))
    data = [(x, x.sum(-1, keepdim=True)) for x, _, _ in batches(world, [2], masked=False)]
    model = copy.deepcopy(whole)

    def placement(parameter):
        return Shard(1) if parameter.ndim == 3 else Shard(0)

    for layer in model[:2]:
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh)
    assert isinstance(model[0].experts.up_proj, DTensor)
    assert model[0].experts.up_proj.placements == (Shard(1),)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (model, whole)]
    for _ in range(2):
        both_step(optimizers, model, whole, data, rank)
    for name, parameter in model.named_parameters():
        close(parameter.full_tensor(), whole.get_parameter(name), name)


def fully_sharded_parts(rank, world):
    """FSDP2 with parts of a layer as units of their own, inside a sharded model or alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (world,))
    for options, units, inside in (
        ({"bias": True, "gated": True}, ("experts", "shared_expert", "router"), True),
        ({}, ("shared_gate", "shared_expert.up_proj", "experts"), True),
        ({"expert_scope": "projected"}, ("in_proj", "out_proj", "shared_expert"), True),
        ({"causal": True, "shared_expert": "token"}, ("router", "experts"), False),
    ):
        whole = model_of(make(**options), make(aux_loss_weight=0.1, **options))
        data = [(x, x.sum(-1, keepdim=True)) for x, _, _ in batches(world, [2], masked=False)]
        model = copy.deepcopy(whole)
        for layer in model[:2]:
            for unit in units:
                fully_shard(layer.get_submodule(unit), mesh=mesh)
        if inside:
            fully_shard(model, mesh=mesh)
        assert isinstance(next(model[0].get_submodule(units[0]).parameters()), DTensor)
        optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (model, whole)]
        for _ in range(2):
            if inside:
                both_step(optimizers, model, whole, data, rank)
            else:  # the other parameters are the loop's to add up: here all ranks see one batch
                both_step(optimizers, model, whole, [data[0]] * world, rank)
        for name, parameter in model.named_parameters():
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            close(full, whole.get_parameter(name), f"{units} {name}")


def dtensor_weights(_rank, world):
    """Weights replicated or sharded over a mesh, x replicated or sharded: results of plain ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    for expert_scope, weights, place in (
        ("token", Replicate(), Replicate()),
        ("token", Shard(0), Shard(0)),
        ("projected", Replicate(), Shard(0)),
    ):
        plain = make(expert_scope=expert_scope, bias=True)
        layer = copy.deepcopy(plain)
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                value = distribute_tensor(parameter.detach(), mesh, [weights])
                setattr(module, name, nn.Parameter(value))
        generator = torch.Generator().manual_seed(1)
        x, dy = (torch.randn(4, 8, D, generator=generator, dtype=torch.float64) for _ in "xy")
        mask = torch.rand(4, 8, generator=generator) < 0.7
        leaf = x.clone().requires_grad_()
        expected = plain(leaf, mask)
        expected.backward(dy)
        spread, upstream, real = (distribute_tensor(t, mesh, [place]) for t in (x, dy, mask))
        spread.requires_grad_()
        y = layer(spread, real)
        assert isinstance(y, DTensor)
        assert y.placements == (place,)
        assert y.to_local().shape[0] == (4 if place == Replicate() else 4 // world)
        y.backward(upstream)
        close(y.full_tensor(), expected, "y")
        close(spread.grad.full_tensor(), leaf.grad, "dx")
        for name, parameter in layer.named_parameters():
            assert parameter.grad.placements == (weights,)
            close(parameter.grad.full_tensor(), plain.get_parameter(name).grad, name)
    raises(TypeError, "expected x to be a DTensor", lambda: layer(x))
    beside = distribute_tensor(x, mesh, [Shard(1)])
    raises(ValueError, "expected x to be replicated or sharded", lambda: layer(beside))
    layer.experts.down_proj = nn.Parameter(plain.experts.down_proj.detach())
    raises(TypeError, "a DTensor for every weight, as x is sharded", lambda: layer(spread))
    layer.out_proj.register_forward_hook(lambda *_: None)
    raises(ValueError, "plain torch.nn.Linear modules where", lambda: layer(spread))
