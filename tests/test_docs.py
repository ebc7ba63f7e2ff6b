"""The documentation: links, pictures and snippets of its pages, and the site of `make docs`."""

import importlib
import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
build = importlib.import_module("build")
PAGES = build.pages()
SNIPPETS = {
    f"{name}-{number}": text
    for name, path in PAGES.items()
    for number, text in enumerate(
        re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.M)
    )
}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_of_a_page_are_there(name):
    text = build.CODE.sub("", PAGES[name].read_text(encoding="utf-8"))
    for _, target in build.LINK.findall(text):
        if not re.match(r"[a-z]+:|#", target):
            assert (PAGES[name].parent / target.partition("#")[0]).exists(), target


def test_each_concept_has_a_picture_and_a_snippet_and_the_index_names_it():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for path in DOCS.glob("*.md"):
        if path.name != "index.md":
            text = path.read_text(encoding="utf-8")
            assert "](pictures/" in text, path
            assert "```python" in text, path
            assert f"]({path.name})" in index


# What README's snippets are given: a model, and what a reader would have around it.
GIVEN = """
import torch
from torch import nn
from segmoe_kernels import SegMoE
model = nn.TransformerEncoder(
    nn.TransformerEncoderLayer(64, 2, 32, batch_first=True), 6, enable_nested_tensor=False
)
ffn = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64))
scaler = torch.amp.GradScaler("cpu")
state = {
    "model.layers.0.block_sparse_moe.gate.weight": torch.ones(2, 4),
    **{
        f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight": torch.ones(shape)
        for e in range(2)
        for name, shape in (("w1", (3, 4)), ("w2", (4, 3)), ("w3", (3, 4)))
    },
}
def train(model, after_each_step):
    for _ in range(100):
        model(torch.randn(1, 10, 64))
        after_each_step()
"""


@pytest.fixture
def process_group(tmp_path):
    """One process as a group, for what needs one."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SNIPPETS)
@pytest.mark.usefixtures("process_group")
def test_a_snippet_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    if name.startswith("readme"):
        exec(GIVEN, names)
        if "collect_routing_stats" in SNIPPETS[name]:
            names["model"] = names["SegMoE"](64, 32, 4)
    exec(compile(SNIPPETS[name], name, "exec"), names)


def test_pictures_are_those_that_the_script_draws(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "docs.pictures", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "pictures").iterdir()}
    # Those without training: their numbers are the same on every machine.
    for name in ("permutation", "experts", "shared", "plans", "precision", "parallel"):
        found, kept = (
            re.sub(
                r"<metadata>.*?</metadata>", "", (folder / f"{name}.svg").read_text(), flags=re.S
            )
            for folder in (tmp_path, DOCS / "pictures")
        )
        assert paths_of(found) == paths_of(kept), name


def paths_of(svg):
    """What is drawn, to a hundredth; names of clips and markers may differ between versions."""
    numbers = re.findall(r'(?: d|points|x|y|width|height)="([^"]+)"', svg)
    return [re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}", text) for text in numbers]


class Links(HTMLParser):
    """Collects what a page links, shows, and calls its own."""

    def __init__(self):
        super().__init__()
        self.targets, self.anchors = [], set()

    def handle_starttag(self, _tag, attributes):
        """Note links and anchors."""
        for name, value in attributes:
            if name in {"href", "src"} and value:
                self.targets.append(value)
            if name == "id":
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "docs.build", str(out)],
        cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warn" not in done.stderr, done.stderr[-2000:]
    return out


def test_every_link_of_the_site_leads_somewhere(site):
    parsed = {}
    for path in site.rglob("*.html"):
        parsed[path] = Links()
        parsed[path].feed(path.read_text(encoding="utf-8"))
    assert len(parsed) > 25
    broken = []
    for path, links in parsed.items():
        for target in links.targets:
            if re.match(r"[a-z]+:|//", target):
                continue
            file, _, anchor = target.partition("#")
            place = (path.parent / file).resolve() if file else path
            there = place.exists()
            if there and anchor and place in parsed:
                there = anchor in parsed[place].anchors
            if not there:
                broken.append((path.name, target))
    assert not broken


def test_reference_has_every_public_name_with_its_arguments(site):
    for module_name in build.MODULES:
        module = importlib.import_module(module_name)
        page = site / "api" / (module_name.replace(".", "/") + ".html")
        text = page.read_text(encoding="utf-8")
        for name in module.__all__:
            assert f'id="{name}"' in text, (module_name, name)
            thing = getattr(module, name)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                assert inspect.getdoc(thing), (module_name, name)
    layer = (site / "api" / "segmoe_kernels" / "layer.html").read_text(encoding="utf-8")
    assert "<strong>segment_size" in layer
    assert "<h6" in layer  # headings of the sections of a docstring: arguments, errors


def test_public_functions_say_what_they_take_and_give():
    missing = []
    for module_name in build.MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.isfunction(thing) or thing.__module__ != module_name:
                continue
            text = inspect.getdoc(thing) or ""
            if f"See `functional.{name}`" in text:
                continue
            if inspect.signature(thing).parameters and "Args:" not in text:
                missing.append(f"{module_name}.{name}: Args")
            returns = inspect.signature(thing).return_annotation
            nothing = returns in {None, "None"} or "Iterator[None]" in str(returns)
            if not nothing and "Returns:" not in text:
                missing.append(f"{module_name}.{name}: Returns")
    assert not missing
