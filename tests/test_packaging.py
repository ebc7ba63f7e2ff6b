"""Wheel and sdist: what is in them, and that they run and type-check in a user's environment."""

import email
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

import segmoe_kernels

ROOT = Path(__file__).resolve().parents[1]
# What a checkout may hold beside the project's own files.
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "runs", "peers", "data", "results", "__pycache__", "*.egg-info"
)


def run(*command, cwd):
    """The command's output; fails with all it said."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd)},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """``(wheel, sdist)``, the wheel built from the sdist as an index would have it."""
    place = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, place / "tree", ignore=LEFT_OUT)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(place), str(place / "tree")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,), (sdist,) = place.glob("*.whl"), place.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """Python of an empty environment with the wheel; it sees this one's packages, but not ours."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built[0], cwd=place)
    packages = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place
    )
    # A path added this way has its own .pth files left alone, so no editable install is seen.
    Path(packages.strip(), "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import segmoe_kernels; print(segmoe_kernels.__file__)", cwd=place)
    assert where.startswith(packages.strip())
    return python


def test_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {name for name in archive.namelist() if ".dist-info/" in name}
    package = ROOT / "segmoe_kernels"
    expected = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    assert names == expected | {"segmoe_kernels/py.typed"}
    assert any(name.endswith("LICENSE") for name in metadata)


def test_metadata_says_what_is_needed_and_shows_the_readme(built):
    with zipfile.ZipFile(built[0]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        message = email.message_from_bytes(archive.read(name))
    assert message["Name"] == "segmoe-kernels"
    assert message["Version"] == segmoe_kernels.__version__
    assert message["Requires-Python"] == ">=3.10"
    needed = {r for r in message.get_all("Requires-Dist") if "extra ==" not in r}
    plain = {re.split(r"[>=;]", requirement)[0].strip() for requirement in needed}
    assert plain == {"einops", "numpy", "torch", "triton"}
    assert message["Description-Content-Type"] == "text/markdown"
    assert message.get_payload().startswith("# segmoe_kernels")


def test_sdist_has_what_its_own_tests_need(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert "segmoe_kernels/stages/block_kernels.py" in names
    assert "segmoe_kernels/py.typed" in names


def test_quickstart_and_doctor_run_from_the_wheel(environment, tmp_path):
    shutil.copy(ROOT / "examples" / "quickstart.py", tmp_path)
    assert "(8, 64, 64) -> (8, 64, 64)" in run(environment, "quickstart.py", cwd=tmp_path)
    said = run(environment, "-m", "segmoe_kernels", "doctor", cwd=tmp_path)
    assert re.search(rf"^segmoe_kernels +{re.escape(segmoe_kernels.__version__)}$", said, re.M)
    assert "ok" in said.splitlines()[-1].lower() or "agree" in said


USER = """
import torch
from torch import nn

from segmoe_kernels import FFNWeights, SegMoE, load_balancing_loss, replace_ffn, shard_experts
from segmoe_kernels import functional
from segmoe_kernels.adapters import WithRouterLogits
from segmoe_kernels.huggingface import register_experts


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = SegMoE(64, 128, num_experts=4, top_k=2, segment_size=5, shared_expert=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, routing = self.ffn.forward_with_routing(x)
        reveal_type(y)
        reveal_type(routing.topk_ids)
        reveal_type(load_balancing_loss(routing))
        return y


def loss(x: torch.Tensor, router: torch.Tensor, experts: FFNWeights) -> torch.Tensor:
    y, _ = functional.seg_moe(x, router, experts, segment_size=5, top_k=2)
    return y.square().mean()


model = Block()
reveal_type(replace_ffn(model, segment_sizes=[4], num_experts=4))
reveal_type(shard_experts(model.ffn))
reveal_type(WithRouterLogits(model.ffn))
register_experts()
SegMoE("64", 128, num_experts=4)
SegMoE(64, 128, num_expert=4)
functional.seg_moe(torch.ones(2, 3, 4), None, segment_size=5)
replace_ffn(model, segment_sizes=4)
"""


def test_mypy_knows_the_types_of_what_a_user_writes(environment, tmp_path):
    (tmp_path / "user.py").write_text(textwrap.dedent(USER).lstrip(), encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--no-color-output", "--no-error-summary"),
            *("--python-executable", environment, "--cache-dir", tmp_path, "user.py"),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    lines = [line.removeprefix("user.py:") for line in done.stdout.splitlines()]
    revealed = [re.search(r'Revealed type is "(.+)"', s)[1] for s in lines if "Revealed" in s]
    tensor = "torch._tensor.Tensor"
    assert revealed == [
        *(tensor, tensor, tensor, "list[str]"),
        "segmoe_kernels.layer.SegMoE",
        "segmoe_kernels.adapters.WithRouterLogits",
    ]
    errors = [line for line in lines if "error:" in line]
    kinds = [re.search(r"\[([a-z-]+)\]$", line)[1] for line in errors]
    expected = ["arg-type", "call-arg", "call-arg", "arg-type", "call-arg"]
    assert kinds == expected, errors
