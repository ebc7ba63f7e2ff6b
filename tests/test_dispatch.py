"""Operators of a layer: whoever listens hears each of them."""

import pytest
import torch

pytest.importorskip("triton")
from torch.utils._python_dispatch import TorchDispatchMode

from segmoe_kernels import SegMoE


class Names(TorchDispatchMode):
    """Keeps the operators' names."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **kwargs or {})


@pytest.fixture
def called(device):
    layer = SegMoE(16, 16, 4, segment_size=5, backend="triton", device=device)
    x = torch.randn(2, 10, 16, device=device)
    layer(x).sum().backward()
    plain = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()

    def call():
        layer(x).sum().backward()
        for before, parameter in zip(plain, layer.parameters(), strict=True):
            assert torch.equal(before, parameter.grad)

    return call


def by_mode(call):
    with Names() as mode:
        call()
    return mode.names


def by_profiler(call):
    with torch.profiler.profile() as profiler:
        call()
    return {event.name for event in profiler.events()}


@pytest.mark.parametrize("listen", [by_mode, by_profiler])
def test_whoever_listens_hears_every_operator_of_a_layer(listen, called):
    found = {
        name.partition("::")[2] for name in listen(called) if name.startswith("segmoe_kernels")
    }
    assert found >= {"route_fwd", "permute", "expert_ffn_fwd", "expert_ffn_bwd", "route_bwd"}
