"""``python -m segmoe_kernels doctor``: its report, its check and its exit codes."""

import ctypes
import importlib.metadata
import platform
import re
import subprocess

import pytest
import torch
from conftest import GPU
from programs import ROOT, run_python

import segmoe_kernels
from segmoe_kernels import __main__ as command
from segmoe_kernels import reference

BACKEND = "triton" if GPU else "reference"


@pytest.fixture
def no_environment(monkeypatch):
    for name in command.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_doctor_reports_and_passes(no_environment, capsys):
    no_environment.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert command.main(["doctor"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    width = command.NAME_WIDTH
    rows = {line[:width].strip(): line[width:] for line in lines}
    assert rows["segmoe_kernels"] == segmoe_kernels.__version__
    assert rows["python"] == platform.python_version()
    assert rows["torch"] == torch.__version__
    assert set(command.OLDEST) <= rows.keys()
    assert rows["CUDA_VISIBLE_DEVICES"] == "0"
    assert [name for name in command.VARIABLES if name in rows] == ["CUDA_VISIBLE_DEVICES"]
    assert rows["backend"].startswith(f"{BACKEND} on ")
    checks = [value for name, value in rows.items() if name.startswith("check")]
    assert checks == ["ok, forward and gradients against float64"] * (8 if GPU else 5)
    place = f"kernels on {torch.cuda.get_device_name()}" if GPU else "reference on CPU"
    assert last == f"ready: {place}"


def test_the_oldest_releases_are_those_that_the_package_asks_for():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)', text, re.M))
    assert {name: asked[name] for name in command.OLDEST} == command.OLDEST


@pytest.mark.parametrize(
    ("package", "version", "line"),
    [
        ("torch", "2.8.1+cu128", "not ready: torch >= 2.9"),
        ("einops", None, "not ready: einops >= 0.8"),
        ("triton", "3.4.0", "not ready: triton >= 3.5" if GPU else "ready: reference on CPU"),
        ("transformers", "4.57.6", "ready: "),
    ],
)
def test_doctor_says_what_is_missing(no_environment, capsys, package, version, line):
    real = importlib.metadata.version

    def other(name):
        if name == package and version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version if name == package else real(name)

    no_environment.setattr(importlib.metadata, "version", other)
    no_environment.setattr(command, "CHECKS", ())
    no_environment.setattr(command, "MORE_KERNELS", ())
    assert command.main(["doctor"]) == line.startswith("not")
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith(line)
    assert f"{package:<{command.NAME_WIDTH}}{version or 'not installed'}" in out
    assert ("too old" in out) == (version is not None)


@pytest.mark.skipif(GPU, reason="a machine with a driver has another one")
@pytest.mark.parametrize("driver", [12080, None], ids=["there", "none"])
def test_doctor_reads_the_driver(no_environment, capsys, tmp_path, driver):
    if driver is not None:  # a library such as the driver's: one function, which writes a number
        source = f"int cuDriverGetVersion(int *version) {{ *version = {driver}; return 0; }}"
        command_line = ["cc", "-shared", "-xc", "-", "-o", str(tmp_path / "libcuda.so.1")]
        subprocess.run(command_line, input=source, text=True, check=True)
        real = ctypes.CDLL
        no_environment.setattr(ctypes, "CDLL", lambda name: real(str(tmp_path / name)))
    no_environment.setattr(torch.version, "cuda", "13.0")
    command._print_devices()
    row = "none" if driver is None else "up to CUDA 12.8"
    out = capsys.readouterr().out
    assert re.search(rf"CUDA driver +{row}; PyTorch is built with CUDA 13.0\n", out)
    assert "none that PyTorch can use\n" in out


@pytest.mark.skipif(GPU, reason="explains why a machine without a GPU runs the reference")
def test_doctor_explains_the_backend(no_environment):
    cpu = torch.device("cpu")
    assert "needs a GPU, got cpu tensors" in command._explain_backend(cpu)
    no_environment.setenv("TRITON_INTERPRET", "1")
    assert "would run interpreted" in command._explain_backend(cpu)
    no_environment.setenv("SEGMOE_BACKEND", "triton")
    assert command._explain_backend(cpu) == "triton on cpu: SEGMOE_BACKEND says so"


def test_doctor_fails_with_a_wrong_gradient(no_environment, capsys):
    real = reference.combine

    def wrong(expert_out, *args, **options):
        # Right in float64, the oracle; in the checked dtype one gradient is lost.
        if expert_out.dtype != torch.float64:
            expert_out = torch.cat([expert_out[:, :1].detach(), expert_out[:, 1:]], 1)
        return real(expert_out, *args, **options)

    no_environment.setenv("SEGMOE_BACKEND", "reference")
    no_environment.setattr(reference, "combine", wrong)
    no_environment.setattr(command, "run_layer", run_eager_unbroken(real))
    assert command.main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("FAILED") == 5
    assert "\nnot ready: check of token scope failed, " in captured.out
    assert "less accurate than plain PyTorch" in captured.err


def run_eager_unbroken(real):
    """`run_layer` whose plain PyTorch run, the yardstick, is not the broken one."""
    from unittest import mock

    from segmoe_kernels.testing import run_layer

    def run(layer, *inputs, backend=None, **options):
        if backend is None:
            return run_layer(layer, *inputs, **options)
        with mock.patch.object(reference, "combine", real):
            return run_layer(layer, *inputs, backend=backend, **options)

    return run


def test_doctor_fails_when_nothing_can_run(no_environment, capsys):
    no_environment.setenv("SEGMOE_BACKEND", "cudnn")
    assert command.main(["doctor"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not ready: ")
    assert "expected SEGMOE_BACKEND to be one of" in last


def test_doctor_as_a_command():
    variables = {"OMP_NUM_THREADS": "1", "SEGMOE_BACKEND": "triton"}
    result = run_python("-m", "segmoe_kernels", "doctor", without=(), **variables)
    assert result.stdout.count("ok, forward and gradients against float64") == 7 - (not GPU)
    if not GPU:
        # Triton's own interpreter; that of the other tests is corrected.
        assert re.search(r"check, bfloat16 +refused: .* multiplies it wrongly", result.stdout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["surgeon"], "invalid choice: 'surgeon'"),
        ([], "the following arguments are required: command"),
        (["doctor", "now"], "unrecognized arguments: now"),
    ],
)
def test_main_refuses_unknown_commands(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: python -m segmoe_kernels")
    assert words in error
