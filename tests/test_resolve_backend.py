"""The choice of backend: by device, by what is installed, by the environment."""

import builtins
import sys

import pytest
import torch

from segmoe_kernels import SegMoE, functional
from segmoe_kernels.functional import resolve_backend


@pytest.fixture
def no_environment(monkeypatch):
    for name in ("SEGMOE_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.usefixtures("no_environment")
def test_resolve_backend_on_cpu_is_the_reference():
    x = torch.zeros(1)
    assert resolve_backend("auto", x) == "reference"
    assert resolve_backend("reference", x) == "reference"
    with pytest.raises(RuntimeError, match=r"needs a GPU, got cpu tensors.*TRITON_INTERPRET=1"):
        resolve_backend("triton", x)


def test_resolve_backend_under_the_interpreter(no_environment):
    no_environment.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", torch.zeros(1)) == "triton"
    assert resolve_backend("auto", torch.zeros(1)) == "reference"


@pytest.mark.interpreter
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_refused_where_the_interpreter_multiplies_it_wrongly(autocast, monkeypatch):
    """`test_doctor_as_a_command` has Triton's own interpreter; that of the tests is corrected."""
    launch = pytest.importorskip("segmoe_kernels._triton.launch")
    assert launch.interprets_bfloat16()
    monkeypatch.setattr(launch, "interprets_bfloat16", lambda: False)
    for scope in ("token", "segment"):
        layer = SegMoE(4, 6, 3, segment_size=2, expert_scope=scope, backend="triton")
        x = torch.zeros(1, 4, 4)
        assert layer(x).isfinite().all()
        if not autocast:
            layer, x = layer.bfloat16(), x.bfloat16()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(RuntimeError, match=r"can't run bfloat16 .*or backend='reference'"),
        ):
            layer(x)


def test_resolve_backend_environment_overrides_auto(no_environment):
    no_environment.setenv("TRITON_INTERPRET", "1")
    no_environment.setenv("SEGMOE_BACKEND", "triton")
    assert resolve_backend("auto", torch.zeros(1)) == "triton"
    assert resolve_backend("reference", torch.zeros(1)) == "reference"
    no_environment.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="backend='triton'"):
        resolve_backend("auto", torch.zeros(1))
    no_environment.setenv("SEGMOE_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"expected SEGMOE_BACKEND to be one of .*got 'cudnn'"):
        resolve_backend("auto", torch.zeros(1))


@pytest.mark.usefixtures("no_environment")
def test_resolve_backend_of_other_devices_is_the_reference():
    x = torch.zeros(1, device="meta")
    assert resolve_backend("auto", x) == "reference"
    with pytest.raises(RuntimeError, match="needs a CUDA or ROCm device, got meta tensors"):
        resolve_backend("triton", x)


def test_resolve_backend_without_triton(no_environment):
    no_environment.setitem(sys.modules, "triton", None)
    no_environment.setattr(functional, "_WARNED", set())

    class OnGPU:
        device = torch.device("cuda", 0)

    with pytest.warns(RuntimeWarning, match="the reference runs.*pip install triton") as caught:
        found = [resolve_backend("auto", OnGPU()) for _ in range(3)]
    assert found == ["reference"] * 3
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="needs the triton package"):
        resolve_backend("triton", OnGPU())


def test_resolve_backend_reference_imports_no_triton(no_environment):
    real = builtins.__import__

    def guarded(name, *args, **options):
        assert not name.startswith("triton")
        return real(name, *args, **options)

    no_environment.setattr(builtins, "__import__", guarded)
    assert resolve_backend("reference", torch.zeros(1)) == "reference"
