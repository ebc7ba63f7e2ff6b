"""The documentation: links, pictures and snippets of its pages, and the site of `make docs`."""

import csv
import dataclasses
import importlib
import inspect
import json
import math
import posixpath
import re

import pytest
import torch
import torch.distributed as dist
from programs import ROOT, run_python
from sphinx.util.inventory import InventoryFile

import segmoe_kernels
from docs import known
from examples.studies.paired import difference
from examples.studies.report import read_runs
from examples.train_forecaster import closing

DOCS = ROOT / "docs"
PAGES = {
    **{path.stem: path for path in sorted(DOCS.glob("*.md"))},
    "readme": ROOT / "README.md",
    "changes": ROOT / "CHANGELOG.md",
    "promises": ROOT / "tests" / "PROMISES.md",
    "notes": ROOT / "benchmarks" / "NOTES.md",
    **{path.stem: path for path in sorted((ROOT / "tests" / "reports").glob("*.md"))},
}
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
# Modules that the reference lists, and those with an ``__all__`` for the package's own use.
MODULES = [
    "segmoe_kernels",
    *re.findall(r"^   (segmoe_kernels\S*)$", PAGES["api"].read_text(encoding="utf-8"), re.M),
]
INSIDE = {"layer.called", "layer.dtensor"}
INSIDE |= {"activations", "autograd", "flops", "options", "pipeline", "segments", "stats.collector"}
RUNS = ROOT / "examples" / "results"
SNIPPETS = {
    f"{name}-{number}": text
    for name, path in PAGES.items()
    for number, text in enumerate(
        re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.M)
    )
}


def test_no_python_of_a_page_is_left_out():
    fences = [
        (name, line.strip())
        for name, path in PAGES.items()
        for line in path.read_text(encoding="utf-8").splitlines()
        if "```py" in line.lower()
    ]
    assert len(fences) == len(SNIPPETS)
    assert {fence for _, fence in fences} == {"```python"}
    assert {name for name, _ in fences} >= {"readme", *(p.stem for p in DOCS.glob("*.md"))} - {
        "api",
        "index",
        "limits",
    }


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_of_a_page_are_there(name):
    text = CODE.sub("", PAGES[name].read_text(encoding="utf-8"))
    for _, target in LINK.findall(text):
        if not re.match(r"[a-z]+:|#", target):
            assert (PAGES[name].parent / target.partition("#")[0]).exists(), target


def test_each_concept_has_a_picture_and_a_snippet_and_the_index_names_it():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for path in DOCS.glob("*.md"):
        if path.name not in {"index.md", "api.md", "limits.md"}:
            text = path.read_text(encoding="utf-8")
            assert "```python" in text, path
            if path.name != "contributing.md":
                assert "](pictures/" in text, path
                assert re.search(r"Sources?\b.*:", text), path
            assert f"]({path.name})" in index
            assert f"](docs/{path.name})" in PAGES["readme"].read_text(encoding="utf-8")


def test_pictures_are_those_that_pages_show():
    shown = [
        target
        for path in DOCS.glob("*.md")
        for mark, target in LINK.findall(path.read_text(encoding="utf-8"))
        if mark.startswith("!")
    ]
    assert sorted(shown) == sorted(f"pictures/{p.name}" for p in (DOCS / "pictures").iterdir())
    for path in (DOCS / "pictures").iterdir():
        assert path.stat().st_size < 100_000, path
        assert "<dc:date>" not in path.read_text(encoding="utf-8"), path


def table_rows(page, head):
    """Cells of the table of a page whose first line begins with ``head``, that line left out."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def results(name):
    with (ROOT / "examples" / "results" / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_table_of_baselines_is_what_the_report_says():
    text = (ROOT / "examples" / "results" / "baselines.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "| mean |" in line]
    reported = {}
    for line in lines:
        name, _, *models, _, _, linear, rolled, other, ours = (
            c.strip() for c in line.strip("|").split("|")
        )
        reported[name.replace("_rate", " rates")] = [*models, linear, rolled, other, ours]
    shown = {name: cells for name, *cells in table_rows("choosing.md", "| mean of four")}
    assert shown.keys() == reported.keys()
    for name, cells in shown.items():
        for cell, full in zip(cells, reported[name], strict=True):
            for short, long in zip(cell.split(" ± "), full.split(" ± "), strict=True):
                assert short == long or abs(float(short) - float(long)) <= 0.00051, (name, cell)


def test_the_table_of_failures_is_what_the_runs_say():
    count = 0
    for name, _, *cells in table_rows("failures.md", "| series"):
        for variant, cell in zip(("token", "P=2", "P=5", "P=8"), cells, strict=True):
            found = difference(read_runs(RUNS / "failures"), name.strip("`"), variant, "dense")
            assert cell == f"{found.mean:+.1f} ± {found.error:.1f} %", (name, variant)
            count += 1
    assert count == 24


def test_the_table_of_costs_is_what_the_files_hold():
    kinds = (
        "dense",
        "token-wise",
        "segment-wise, shared token-wide",
        "segment-wise",
        "official loop",
    )
    of_file = {
        name: {row["kind"]: row for row in results(name) if row["config"] == "small"}
        for name in ("cost.csv", "cost_triton.csv")
    }
    columns = (
        ("cost.csv", "mflop_per_patch", 1, "{:.2f}"),
        ("cost.csv", "shared_share", 100, "{:.0f} %"),
        ("cost.csv", "parameters", 1e-6, "{:.2f}"),
        ("cost_triton.csv", "ffn_bytes_per_patch_and_layer", 1, "{:,.0f}"),
        ("cost.csv", "ffn_bytes_per_patch_and_layer", 1, "{:,.0f}"),
        ("cost.csv", "train_ms", 1, "{:.0f}"),
    )
    rows = list(table_rows("choosing.md", "| | dense |"))
    assert len(rows) == len(columns)
    for (_, *cells), (name, key, factor, form) in zip(rows, columns, strict=True):
        for cell, kind in zip(cells, kinds, strict=True):
            value = form.format(factor * float(of_file[name][kind][key]))
            assert cell == value or (cell == "" and value == "0 %"), (key, kind)


def test_what_the_readme_says_is_known_is_what_the_files_say():
    text = PAGES["readme"].read_text(encoding="utf-8")
    assert known.block() in text
    assert len(text.splitlines()) <= 130


def test_the_demo_in_the_readme_is_what_the_study_found():
    """The demo trains the study's models of its first seed."""
    runs = results("planted/runs.csv")
    rows = [
        {"model": kind, "test_mse": float(row["mse_64"])}
        for kind in ("dense", "token", "P=4")
        for row in runs
        if (row["data"], row["variant"], row["seed"]) == ("planted-4", kind, "0")
    ]
    rows[2]["model"] = "segment"
    text = PAGES["readme"].read_text(encoding="utf-8")
    shown = re.findall(r"^(dense|token|segment) +([\d.]+)$", text, re.M)
    assert shown == [(row["model"], f"{row['test_mse']:.4f}") for row in rows]
    said = closing("planted-4", [{"model": "linear, closed form", "test_mse": math.inf}, *rows])
    assert said in " ".join(text.split())


def test_the_table_of_host_times_is_what_the_file_holds():
    path = ROOT / "benchmarks" / "results" / "host" / "sm_90.json"
    ratios = {
        (row["case"], row["provider"], row["pass"]): f"{row['over_official']:.2f}"
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    }
    passes = ("infer", "forward + backward")
    shown = list(table_rows("plans.md", "| over the official loop |"))
    for case, *cells in shown:
        of_case = [ratios[case, name, p] for name in ("segmoe", "grouped_mm") for p in passes]
        assert cells == of_case, case
    assert len(shown) == len({case for case, *_ in ratios})


def test_the_change_log_begins_with_this_version():
    text = PAGES["changes"].read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", text, re.M)[0] == segmoe_kernels.__version__
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= kinds


# What README's snippets are given: a model, and what a reader would have around it.
GIVEN = """
import torch
from torch import nn
from segmoe_kernels import SegMoE
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.position = nn.Parameter(torch.randn(10, 64))
    def forward(self, x):
        return self.encoder(x + self.position)
model, x = Model(), torch.randn(2, 10, 64)
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
    if "transformers" in SNIPPETS[name]:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    if name.startswith("readme"):
        exec(GIVEN, names)
        if "set_loss_scaler" in SNIPPETS[name]:
            names["model"] = names["SegMoE"](64, 32, 4)
    exec(compile(SNIPPETS[name], name, "exec"), names)


@pytest.mark.slow
def test_pictures_are_those_that_the_script_draws(tmp_path):
    run_python("-m", "docs.pictures", tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "pictures").iterdir()}
    for name in drawn:
        found, kept = (
            re.sub(r"<metadata>.*?</metadata>", "", (folder / name).read_text(), flags=re.S)
            for folder in (tmp_path, DOCS / "pictures")
        )
        found, kept = paths_of(found), paths_of(kept)
        if name in {"segments.svg", "losses.svg"}:
            # These train, and processors round differently.
            found, kept = len(found), len(kept)
        assert found == kept, name


def paths_of(svg):
    """What is drawn, to a hundredth; names of clips and markers may differ between versions."""
    numbers = re.findall(r'(?: d|points|x|y|width|height)="([^"]+)"', svg)
    return [re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}", text) for text in numbers]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built with warnings as errors: a broken link or reference is one."""
    out = tmp_path_factory.mktemp("site")
    run_python("-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", out)
    return out


def test_a_broken_link_stops_the_build(tmp_path):
    (tmp_path / "index.md").write_text("# Page\n\n[there](nowhere.md)\n", encoding="utf-8")
    words = ["-q", "-W", "-C", "-D", "extensions=myst_parser", str(tmp_path), str(tmp_path / "out")]
    done = run_python("-m", "sphinx", *words, status=None)
    assert done.returncode != 0
    assert "nowhere" in done.stderr


def test_the_site_has_every_page_and_begins_at_its_top(site):
    for path in PAGES.values():
        page = site / path.relative_to(ROOT).with_suffix(".html")
        assert page.is_file(), page
    assert "url=docs/index.html" in (site / "index.html").read_text(encoding="utf-8")


def test_reference_has_the_public_names_and_no_others(site):
    with (site / "objects.inv").open("rb") as stream:
        names = InventoryFile.load(stream, "", posixpath.join)
    found = {name for kind in ("function", "class", "data") for name in names.get(f"py:{kind}", {})}
    assert set(names["py:module"]) == set(MODULES) - {"segmoe_kernels"}
    modules = [importlib.import_module(name) for name in MODULES]
    public = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in modules
        for name in module.__all__
    }
    for thing in public.values():
        # What has its definition elsewhere, or two public names, may stand under either.
        names = {name for name, other in public.items() if other is thing}
        defined = {f"{thing.__module__}.{thing.__name__}"} if hasattr(thing, "__name__") else set()
        assert (names | defined) & found, names
        public = public | dict.fromkeys(defined, thing)
    assert found <= set(public)
    overview = PAGES["api"].read_text(encoding="utf-8")
    listed = re.findall(r"^   ~segmoe_kernels\.(\w+)$", overview, re.M)
    assert sorted(listed) == sorted(segmoe_kernels.__all__)


def test_every_module_with_public_names_is_in_the_reference():
    found = set()
    package = ROOT / "segmoe_kernels"
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        inside = {"stages", "_triton"} & set(parts)
        if not inside and "\n__all__ = [" in path.read_text(encoding="utf-8"):
            found.add(".".join(part for part in parts if part != "__init__"))
    listed = {name.removeprefix("segmoe_kernels").lstrip(".") for name in MODULES}
    assert found == listed | INSIDE
    assert not listed & INSIDE


def arguments_of(thing):
    """Arguments that a public function or class has to explain, by their order."""
    text = inspect.getdoc(thing) or ""
    if not callable(thing) or "See `functional." in text or " makes one." in text:
        return []
    if inspect.isclass(thing) and (
        dataclasses.is_dataclass(thing) or "__init__" not in vars(thing)
    ):
        return []
    return [*inspect.signature(thing).parameters]


def test_public_names_say_what_they_take_and_give():
    missing = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            thing, place = getattr(module, name), f"{module_name}.{name}"
            if not callable(thing):
                continue
            text = inspect.getdoc(thing) or ""
            section = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{text}\n", re.M)
            explained = re.findall(r"^    \**(\w+):", section[1], re.M) if section else []
            if not text or explained != arguments_of(thing):
                missing.append(f"{place}: Args")
            if inspect.isclass(thing):
                fields = (
                    getattr(thing, "__annotations__", {}) if "__init__" not in vars(thing) else {}
                )
                fields = [f for f in fields if not f.startswith("_") and f != "seg_moe"]
                if dataclasses.is_dataclass(thing):
                    fields = [field.name for field in dataclasses.fields(thing)]
                missing += [
                    f"{place}.{f}" for f in fields if not re.search(rf"^    {f}:", text, re.M)
                ]
                methods = {key: m for key, m in vars(thing).items() if not key.startswith("_")}
                missing += [
                    f"{place}.{key}"
                    for key, m in methods.items()
                    if (inspect.isfunction(m) or isinstance(m, property)) and not inspect.getdoc(m)
                ]
            elif "See `functional." not in text:
                returns = inspect.signature(thing).return_annotation
                nothing = returns in {None, "None"} or "Iterator[None]" in str(returns)
                if not nothing and "Returns:" not in text:
                    missing.append(f"{place}: Returns")
    assert not missing
