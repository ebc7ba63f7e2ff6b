"""Operators past PyTorch's dispatcher: whoever listens there hears each of them all the same."""

import pytest
import torch

pytest.importorskip("triton")
from torch.utils._python_dispatch import TorchDispatchMode

from segmoe_kernels import SegMoE
from segmoe_kernels._triton import dispatch

LIBRARY = torch.library.Library("segmoe_test_dispatch", "FRAGMENT")
LIBRARY.define("double(Tensor x) -> Tensor")
HEARD = []


def double(x):
    HEARD.append("body")
    return x * 2


def heard_double(x):
    HEARD.append("dispatcher")
    return double(x)


for key in ("CPU", "CUDA"):
    LIBRARY.impl("double", heard_double, key)
LIBRARY.impl("double", torch.empty_like, "Meta")
call = dispatch.undispatched(torch.ops.segmoe_test_dispatch.double.default, double)


@pytest.fixture(autouse=True)
def forget():
    HEARD.clear()


class Names(TorchDispatchMode):
    """Keeps the operators' names."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **kwargs or {})


class Own(torch.Tensor):
    """Somebody's own tensor."""


def test_a_plain_call_runs_the_body_alone(device):
    x = torch.ones(3, device=device)
    assert torch.equal(call(x), x * 2)
    with torch.no_grad():
        call(x.requires_grad_())
    assert HEARD == ["body", "body"]


def with_mode(x):
    with Names() as mode:
        call(x)
    assert "segmoe_test_dispatch::double" in mode.names


def with_profiler(x):
    with torch.profiler.profile() as profiler:
        call(x)
    assert "segmoe_test_dispatch::double" in {event.name for event in profiler.events()}


def with_transform(x):
    torch.func.functional_call(torch.nn.Identity(), {}, (x,))
    torch.func.vjp(call, x)


def with_trace(x):
    traced = torch.jit.trace(call, (x,), check_trace=False)
    assert "segmoe_test_dispatch::double" in str(traced.graph)


def with_grad(x):
    call(x.requires_grad_())


@pytest.mark.parametrize("way", [with_mode, with_profiler, with_transform, with_trace, with_grad])
def test_whoever_listens_hears_the_operator(way, device):
    way(torch.ones(3, device=device))
    assert HEARD == ["dispatcher", "body"]


def test_other_tensors_go_to_the_dispatcher(device):
    call(torch.ones(3, device=device).as_subclass(Own))
    assert HEARD == ["dispatcher", "body"]
    assert call(torch.ones(3, device="meta")).is_meta
    assert len(HEARD) == 2


def test_a_mode_sees_every_operator_of_a_layer(device):
    layer = SegMoE(16, 16, 4, segment_size=5, backend="triton", device=device)
    x = torch.randn(2, 10, 16, device=device)
    layer(x).sum().backward()
    plain = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with Names() as mode:
        layer(x).sum().backward()
    found = {name.partition("::")[2] for name in mode.names if name.startswith("segmoe_kernels")}
    assert found >= {"route_fwd", "permute", "expert_ffn_fwd", "expert_ffn_bwd", "route_bwd"}
    for before, parameter in zip(plain, layer.parameters(), strict=True):
        assert torch.equal(before, parameter.grad)
