"""Wheel and sdist: what is in them, and that they run and type-check in a user's environment."""

import email
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import segmoe_kernels
from segmoe_kernels.__main__ import CHECKS

# Environments of their own take most of a minute, and change with pyproject.toml alone.
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "segmoe_kernels"
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
    return build(tmp_path_factory.mktemp("built"), "*.whl", "*.tar.gz")


def build(place, *results, options=(), script="true"):
    """Build a copy of the tree without its leftovers, offline, with the setuptools that is here."""
    shutil.copytree(ROOT, place / "tree", ignore=LEFT_OUT)
    run("bash", "-euc", script, cwd=place / "tree")
    command = (sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", place, "tree")
    run(*command, cwd=place)
    found = [path for pattern in results for path in place.glob(pattern)]
    assert len(found) == len(results)
    return found


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """Python of an empty environment with the wheel; it sees this one's packages, but not ours."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", built[0], cwd=place)
    packages = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place
    )
    # A path added this way has its own .pth files left alone, so no editable install is seen.
    Path(packages.strip(), "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import segmoe_kernels; print(segmoe_kernels.__file__)", cwd=place)
    assert where.startswith(packages.strip())
    return python


def package_files():
    """What the package is made of, by the tree."""
    names = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    return names | {"segmoe_kernels/py.typed"}


def checksums(wheel):
    """Name and checksum of all that is in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


def test_wheel_holds_the_package_and_nothing_else(built):
    names = set(checksums(built[0]))
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == package_files()
    about = {name.partition(".dist-info/")[2] for name in names - inside}
    assert about == {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"}


def test_sdist_holds_what_builds_the_same_wheel_and_nothing_else(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    written = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    own = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    assert names == package_files() | own | written
    (direct,) = build(tmp_path, "*.whl", options=["--wheel"])
    assert checksums(direct) == checksums(built[0])


def metadata(wheel):
    """What the wheel says of itself, and the long description."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        message = email.message_from_bytes(archive.read(name))
    return message, message.get_payload(decode=True).decode("utf-8").strip()


def test_metadata_says_what_is_needed_and_shows_the_readme(built):
    message, description = metadata(built[0])
    assert message["Name"] == "segmoe-kernels"
    assert message["Version"] == segmoe_kernels.__version__
    assert message["Requires-Python"] == ">=3.10"
    assert message["License-Expression"] == "Apache-2.0"
    assert required(message) == {
        "einops>=0.8",
        "numpy>=1.26",
        "torch>=2.9",
        "triton>=3.5; platform_system == 'Linux'",
    }
    assert set(message.get_all("Provides-Extra")) == {"dev", "plots", "tensorboard"}
    assert message["Description-Content-Type"] == "text/markdown"
    assert description == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def required(message):
    """What it needs without any extra."""
    needed = message.get_all("Requires-Dist")
    return {r.replace('"', "'") for r in needed if "extra ==" not in r}


def test_a_release_knows_its_home_and_links_there(tmp_path):
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    steps = [step.get("run", "") for step in workflow["jobs"]["build"]["steps"]]
    (script,) = (step for step in steps if "README.md" in step)
    script = f"GITHUB_REPOSITORY=owner/name; GITHUB_REF_NAME=v1.2.3; {script}"
    (wheel,) = build(tmp_path, "*.whl", options=["--wheel"], script=script)
    message, description = metadata(wheel)
    assert "Repository, https://github.com/owner/name" in message.get_all("Project-URL")
    # Every link is absolute, and nothing else has changed.
    text = re.sub(r"^```.*?^```", "", description, flags=re.M | re.S)
    home = "https://github.com/owner/name/blob/v1.2.3/"
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 20
    assert all(link.startswith(home) for link in links)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert description.replace(home, "") == readme.strip()


def test_what_cites_it_and_the_recipe_for_conda_say_the_same(built):
    message, _ = metadata(built[0])
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((ROOT / ".ci" / "recipe.yaml").read_text(encoding="utf-8"))
    assert cited["version"] == recipe["package"]["version"] == message["Version"]
    assert recipe["package"]["name"] == message["Name"]
    assert cited["license"] == recipe["about"]["license"] == message["License-Expression"]
    assert cited["abstract"] == recipe["about"]["summary"] == message["Summary"]
    assert cited["references"][0]["url"].endswith("/2601.21641")
    needed = recipe["requirements"]["run"] + recipe["requirements"]["run_constraints"]
    names = {"pytorch": "torch", "python": "Requires-Python"}
    given = {names.get(name, name) + bound for name, bound in map(str.split, needed)}
    wanted = {requirement.partition(";")[0] for requirement in required(message)}
    assert given == wanted | {f"Requires-Python{message['Requires-Python']}"}


def test_quickstart_and_doctor_run_from_the_wheel(environment, tmp_path):
    shutil.copy(ROOT / "examples" / "quickstart.py", tmp_path)
    assert "(8, 64, 64) -> (8, 64, 64)" in run(environment, "quickstart.py", cwd=tmp_path)
    said = run(environment, "-m", "segmoe_kernels", "--version", cwd=tmp_path)
    assert said == f"segmoe_kernels {segmoe_kernels.__version__}\n"
    said = run(environment, "-m", "segmoe_kernels", "doctor", cwd=tmp_path)
    assert re.search(rf"^segmoe_kernels +{re.escape(segmoe_kernels.__version__)}$", said, re.M)
    checks = [line for line in said.splitlines() if line.startswith("check")]
    assert len(checks) == len(CHECKS)
    assert all(" ok, forward and gradients" in line for line in checks)


USER = """
import torch
from torch import nn

from segmoe_kernels import (
    FFNWeights,
    Routing,
    SegMoE,
    collect_routing_stats,
    collect_routings,
    convert_state_dict,
    functional,
    load_balancing_loss,
    load_official,
    replace_ffn,
    router_z_loss,
    segment_schedule,
    set_loss_scaler,
    shard_experts,
    upcycle,
)
from segmoe_kernels.models.adapters import WithRouterLogits
from segmoe_kernels.models.huggingface import register_experts
from segmoe_kernels.losses import inject_loss
from segmoe_kernels.parallel import expert_parameter_names, gather_experts


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = SegMoE(64, 128, num_experts=4, top_k=2, segment_size=5, shared_expert=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, routing = self.ffn.forward_with_routing(x)
        reveal_type(y)
        reveal_type(routing)
        return inject_loss(y, load_balancing_loss(routing) + router_z_loss([routing]))


def loss(x: torch.Tensor, router: torch.Tensor, experts: FFNWeights) -> torch.Tensor:
    y, routing = functional.seg_moe(x, router, experts, segment_size=5, top_k=2)
    reveal_type(routing.topk_ids)
    reveal_type(load_balancing_loss(routing, normalization="per_layer"))
    return y.square().mean()


model = Block()
reveal_type(replace_ffn(model, segment_sizes=[4], num_experts=4))
reveal_type(shard_experts(model.ffn, average_gradients=True))
reveal_type(gather_experts(model.ffn))
reveal_type(expert_parameter_names(model))
reveal_type(upcycle(nn.Linear(2, 2), 4))
reveal_type(segment_schedule("5,4", 2))
reveal_type(WithRouterLogits(model.ffn))
reveal_type(model.ffn.aux_loss)
with collect_routing_stats(model, every=10) as stats:
    reveal_type(stats)
with collect_routings(model) as routings:
    reveal_type(routings)
set_loss_scaler(model, torch.amp.GradScaler())
register_experts("segmoe")
# What mypy has to find:
SegMoE("64", 128, num_experts=4)
SegMoE(64, 128, num_expert=4)
functional.seg_moe(torch.ones(2, 3, 4), None, segment_size=5)
replace_ffn(model, segment_sizes=4)
shard_experts(model)
load_balancing_loss(0.5)
register_experts(name=1)
y: int = model.ffn.aux_loss
"""

# What mypy says of the last lines of it, one after another.
ERRORS = """
Argument 1 to "SegMoE" has incompatible type "str"; expected "int"  [arg-type]
Unexpected keyword argument "num_expert" for "SegMoE"; did you mean "num_experts"?  [call-arg]
Missing positional argument "experts" in call to "seg_moe"  [call-arg]
Argument 2 to "seg_moe" has incompatible type "None"; expected "Tensor"  [arg-type]
Missing named argument "num_experts" for "replace_ffn"  [call-arg]
Argument 1 to "shard_experts" has incompatible type "Block"; expected "SegMoE"  [arg-type]
Argument 1 to "load_balancing_loss" has incompatible type "float"; expected "Routing | Sequence[Routing]"  [arg-type]
Argument "name" to "register_experts" has incompatible type "int"; expected "str"  [arg-type]
Incompatible types in assignment (expression has type "Tensor", variable has type "int")  [assignment]
"""  # noqa: E501


def test_mypy_knows_the_types_of_what_a_user_writes(environment, tmp_path):
    user = USER.lstrip()
    (tmp_path / "user.py").write_text(user, encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--no-color-output", "--no-error-summary"),
            *("--python-executable", environment, "--cache-dir", tmp_path, "user.py"),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    said = re.findall(r"^user\.py:(\d+): (error|note): (.+)$", done.stdout, re.M)
    revealed = [re.search(r'"(.+)"', text)[1] for _, _, text in said if "Revealed type" in text]
    # A named tuple says its fields, too.
    named = r"tuple\[[^\[\]]*fallback=([\w.]+)\]"
    revealed = [re.sub(named, r"\1", text) for text in revealed]
    tensor, layer = "torch._tensor.Tensor", "segmoe_kernels.layer.SegMoE"
    assert revealed == [
        *(tensor, "segmoe_kernels.routing.Routing", tensor, tensor),
        *("list[str]", layer, layer, "list[str]", layer, "list[int]"),
        *("segmoe_kernels.models.adapters.WithRouterLogits", tensor),
        *(
            "segmoe_kernels.stats.collector.RoutingCollector",
            "list[segmoe_kernels.routing.Routing]",
        ),
    ]
    errors = [(int(line), text) for line, kind, text in said if kind == "error"]
    assert [text for _, text in errors] == ERRORS.strip().splitlines(), done.stdout
    # One of the calls is wrong in two ways.
    wrong = user.splitlines().index("# What mypy has to find:") + 2
    assert [line - wrong for line, _ in errors] == [0, 1, 2, 2, 3, 4, 5, 6, 7]
