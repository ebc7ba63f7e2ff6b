"""Run the core tests on every pair of torch and triton releases, each in an environment of its own.

    python tests/matrix.py [--torch 2.13,...] [--triton 3.6,...] [--json FILE] [--keep DIR]
                           [--every N] [--again] [--index URL] [--cuda]

Without a GPU: the kernels run in Triton's interpreter, and are compiled for sm_90 once for each
triton, beside the newest torch that installs. A release is a pair of numbers; pip takes its latest
patch. torch is installed only as a wheel without CUDA, which is a tenth of the size: other wheels
are recorded as such unless ``--cuda`` is given. ``--index`` names a further package index.

The report is written after each pair, as JSON and as a table beside it (``.md``). What the report
has is not run again unless ``--again`` is given; what did not install is tried again. Exit status
1 if a test failed or a kernel has a fault.
"""

import argparse
import itertools
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report_code

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "tests" / "reports" / "versions.json"
TORCH = ("2.9", "2.10", "2.11", "2.12", "2.13")
TRITON = ("3.5", "3.6", "3.7", "3.8", "3.9")
# Each stage, the layer, tracing, what is refused, and the patches of the interpreter.
MODULES: tuple[str, ...] = ("route", "permute", "experts", "grouped_gemm", "combine")
MODULES += ("shared", "triton_layer", "compile", "partials", "validation")
MODULES += ("interp_bf16", "interp_releases")
OTHERS = ("einops", "hypothesis", "pytest")
ARCH = "sm_90"
# A run that takes this many seconds hangs.
PATIENCE = 3600

Report = dict[str, Any]
log = logging.getLogger("matrix")


class Fault(Exception):
    """What the report says in place of a result."""


def number(release: str) -> tuple[int, ...]:
    """Turn "2.10" into what sorts after "2.9"."""
    return tuple(map(int, release.split(".")))


def releases(text: str, known: tuple[str, ...]) -> list[str]:
    """Read a list such as ``3.6,3.7``; an empty text means all that are known."""
    if not text:
        return list(known)
    named = {word.strip() for word in text.split(",")}
    for release in named:
        if not re.fullmatch(r"\d+\.\d+", release):
            raise ValueError(f"a release is two numbers such as {known[0]}, got {release!r}")
    return sorted(named, key=number)


def pairs(torches: Iterable[str], tritons: Iterable[str]) -> list[str]:
    """Names of all pairs, the newest first: those that people have."""
    found = itertools.product(sorted(torches, key=number), sorted(tritons, key=number))
    return [f"torch {torch}, triton {triton}" for torch, triton in reversed(list(found))]


def split(pair: str) -> tuple[str, str]:
    """Return the two releases of a name that `pairs` made."""
    torch, triton = pair.split(", ")
    return torch.removeprefix("torch "), triton.removeprefix("triton ")


def wanted(rows: dict[str, Any], names: Iterable[str], *, again: bool) -> list[str]:
    """Leave out what has a result already."""
    return [name for name in names if again or "passed" not in rows.get(name, {})]


def chosen(ids: Iterable[str], every: int) -> list[str]:
    """Take the first and then every n-th set of parameters of each test function."""
    functions: dict[str, list[str]] = defaultdict(list)
    for test in ids:
        functions[test.split("[", 1)[0]].append(test)
    return [test for tests in functions.values() for test in tests[::every]]


def needs_cuda(requirements: Iterable[str]) -> bool:
    """Say whether a torch wheel with these requirements brings CUDA with it."""
    return any(re.match(r"nvidia-|cuda-|triton|pytorch-triton", text) for text in requirements)


def own_triton(requirements: Iterable[str]) -> str | None:
    """Return the triton release that a torch wheel asks for, as text: "3.7.1" or "~=3.8.0"."""
    for text in requirements:
        if found := re.match(r"triton\s*([=~<>!]=?[^;\s]+)", text):
            return found[1].removeprefix("==")
    return None


def render(report: Report) -> str:
    """Write the report as Markdown."""
    lines = [
        "# Releases of torch and triton",
        "",
        "Written by `make matrix` (`tests/matrix.py`) from `versions.json`; not by hand. "
        f"Python {report['python']}, {report['machine']}, no GPU: the kernels ran in Triton's "
        f"interpreter. Of `tests/test_*.py`: {', '.join(report['modules'])}; of each test function "
        f"{_share(report['every'])}.",
        "",
        "## Tests",
        "",
        "| torch | triton | numpy | passed | failed | skipped | remark |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    rows: dict[str, Any] = report["pairs"]
    absent: dict[tuple[str, str], list[str]] = defaultdict(list)
    for pair in pairs({split(name)[0] for name in rows}, {split(name)[1] for name in rows}):
        row = rows.get(pair, {})
        if "passed" in row:
            cells = [row[key] for key in ("torch", "triton", "numpy", "passed", "failed")]
            remarks = [f"{len(tests)}: {cause}" for cause, tests in row["failures"].items()]
            lines.append(_line([*cells, row["skipped"], "; ".join(remarks)]))
        elif row:
            torch, triton = split(pair)
            absent[torch, row["reason"]].append(triton)
    for (torch, reason), tritons in absent.items():
        lines.append(_line([torch, ", ".join(reversed(tritons)), "", "", "", "", reason]))
    lines += ["", f"## Machine code for {report['arch']}", ""]
    lines += ["| triton | torch | kernels | faults |", "|---|---|--:|---|"]
    for _, row in sorted(report["code"].items(), key=lambda item: number(item[0]), reverse=True):
        faults = "; ".join(row["faults"]) or "none"
        lines.append(_line([row["triton"], row["torch"], row.get("kernels", ""), faults]))
    lines += ["", "## What torch itself asks for", ""]
    lines += ["| torch | triton | its wheel here |", "|---|---|---|"]
    for _, row in sorted(report["torch"].items(), key=lambda item: number(item[0]), reverse=True):
        wheel = row.get("reason") or ("with CUDA" if row["cuda"] else "without CUDA")
        lines.append(_line([row["version"], row.get("triton") or "not known", wheel]))
    return "\n".join(lines) + "\n"


def _line(cells: list[Any]) -> str:
    texts = (str(cell).replace("|", "\\|") for cell in cells)
    return "|" + "".join(f" {text} |" if text else " |" for text in texts)


def _share(every: int) -> str:
    if every == 1:
        return "every set of parameters"
    return f"the first set of parameters and each {every}th after it"


def write(report: Report, path: Path) -> None:
    """Write the report and its table."""
    report_code.save(path, report)
    path.with_suffix(".md").write_text(render(report), encoding="utf-8")


def _run(command: list[Any], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SEGMOE_", "PYTEST_"))}
    environment.pop("TRITON_INTERPRET", None)
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | variables
    try:
        return subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise Fault(f"no result after {PATIENCE} s") from None


def _last_line(text: str, start: str = "") -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith(start)]
    return lines[-1] if lines else "no message"


class Pip:
    """A recent pip that installs into other environments; looking up needs no download with it."""

    def __init__(self, folder: Path, index: str | None) -> None:
        venv.create(folder / "pip", with_pip=True)
        self.python = folder / "pip" / "bin" / "python"
        self.options = ["--extra-index-url", index] if index else []
        self._call("install", "--upgrade", "pip>=23.3")

    def _call(self, *words: Any) -> str:
        done = _run([self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *words])
        if done.returncode:
            raise Fault(_last_line(done.stderr, "ERROR:").removeprefix("ERROR: "))
        return done.stdout

    def install(self, python: Path, *requirements: str) -> None:
        """Install into the environment of ``python``."""
        self._call("--python", python, "install", *self.options, *requirements)

    def metadata(self, requirement: str) -> dict[str, Any]:
        """Return the metadata of the wheel that would be installed."""
        words = ("--dry-run", "--no-deps", "--ignore-installed", "--report", "-")
        text = self._call("install", *words, *self.options, requirement)
        found: dict[str, Any] = json.loads(text)["install"][0]["metadata"]
        return found


@dataclass
class Matrix:
    """A report in the making."""

    report: Report
    path: Path
    folder: Path
    pip: Pip
    cuda: bool

    def look_up(self, release: str) -> None:
        """Find the wheel of a torch release, and the triton release it asks for."""
        try:
            found = self.pip.metadata(f"torch=={release}.*")
        except Fault as fault:
            self.report["torch"][release] = {"version": release, "reason": str(fault)}
            raise
        requirements = found.get("requires_dist", [])
        row = {
            "version": found["version"],
            "cuda": needs_cuda(requirements),
            "triton": own_triton(requirements),
        }
        if "+" in found["version"]:  # a build without CUDA asks for no triton; the plain one does
            plain = found["version"].split("+")[0]
            try:
                row["triton"] = own_triton(self.pip.metadata(f"torch==={plain}")["requires_dist"])
            except Fault as fault:
                log.info("torch %s: %s", plain, fault)
        self.report["torch"][release] = row

    def place(self, pair: str) -> Path:
        """Return the folder of a pair's environment."""
        return self.folder / "torch-{}-triton-{}".format(*split(pair))

    def environment(self, pair: str) -> Path:
        """Make the environment of a pair unless it is there, and return its interpreter."""
        torch, triton = split(pair)
        folder = self.place(pair)
        python = folder / "bin" / "python"
        if not (folder / "ready").exists():
            found = self.report["torch"][torch]
            if "reason" in found:
                raise Fault(f"does not install: {found['reason']}")
            if found["cuda"] and not self.cuda:
                raise Fault(f"not installed: torch {found['version']} is here only with CUDA")
            log.info("%s: installing", pair)
            venv.create(folder, clear=True)
            try:
                # triton comes second: a torch with CUDA asks for one release, and this replaces it.
                self.pip.install(python, f"torch=={found['version']}", *OTHERS)
                self.pip.install(python, f"triton=={triton}.*", "numpy")
            except Fault as fault:
                raise Fault(f"does not install: {fault}") from None
            (folder / "ready").touch()
        return python

    def versions(self, python: Path) -> dict[str, str]:
        """Return what is installed."""
        names = ("torch", "triton", "numpy", *OTHERS)
        code = "import importlib.metadata as m, json; "
        code += f"print(json.dumps({{name: m.version(name) for name in {names}}}))"
        found: dict[str, str] = json.loads(_run([python, "-c", code]).stdout)
        return found

    def test(self, pair: str) -> None:
        """Run the tests of a pair."""
        python = self.environment(pair)
        row: dict[str, Any] = self.versions(python)
        log.info("%s: testing", pair)
        try:
            row |= counts(self._pytest(python))
        except Fault as fault:  # installed, so this is a result
            row |= {"passed": 0, "failed": 1, "skipped": 0, "failures": {str(fault): ["all"]}}
        self.report["pairs"][pair] = row

    def _pytest(self, python: Path) -> str:
        """Return pytest's result file."""
        folder = python.parents[1]
        # No plugin but ours, no cache in the tree; the interpreter even where there is a GPU.
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
        variables = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        files = [f"tests/test_{name}.py" for name in self.report["modules"]]
        done = _run([*command, "--collect-only", *files], **variables)
        if done.returncode:
            raise Fault(f"tests can't be collected: {_last_line(done.stdout, 'E ')}")
        ids = [line for line in done.stdout.splitlines() if "::" in line]
        (folder / "ids").write_text("\n".join(chosen(ids, self.report["every"])))
        result = folder / "result.xml"
        result.unlink(missing_ok=True)
        done = _run([*command, f"--junitxml={result}", f"@{folder / 'ids'}"], **variables)
        if not result.exists():
            raise Fault(f"tests ended without a result: {_last_line(done.stdout + done.stderr)}")
        return result.read_text(encoding="utf-8")

    def compile(self, triton: str, pair: str) -> None:
        """Compile the kernels with the triton of a pair."""
        python = self.environment(pair)
        versions = self.versions(python)
        row: dict[str, Any] = {"triton": versions["triton"], "torch": versions["torch"]}
        log.info("triton %s: compiling for %s", triton, ARCH)
        result = python.parents[1] / "code.json"
        result.unlink(missing_ok=True)
        command = [python, "-m", "benchmarks.codegen", "--arch", ARCH, "--brief", "--json", result]
        done = _run(command, TRITON_CACHE_DIR=str(python.parents[1] / "cache"))
        if result.exists():
            found = json.loads(result.read_text(encoding="utf-8"))
            faults = [f"{r['kernel']} ({r['case']}) {r['fault']}" for r in found if r["fault"]]
            row |= {"kernels": len(found), "passed": len(found) - len(faults), "faults": faults}
        else:
            row["faults"] = [_last_line(done.stderr)]
        self.report["code"][triton] = row

    def attempt(self, rows: str, name: str, step: Callable[..., None], *arguments: str) -> None:
        """Take a step; what goes wrong becomes the row's reason, and the next step follows."""
        try:
            step(*arguments)
        except (Fault, OSError, ValueError, subprocess.SubprocessError) as fault:
            if rows == "pairs":
                self.report[rows][name] = {"reason": str(fault)}
            log.info("%s: %s", name, fault)
        write(self.report, self.path)


def counts(xml: str) -> dict[str, Any]:
    """Read pytest's result file: how many tests, and what failed, by cause."""
    cases = list(ET.fromstring(xml).iter("testcase"))
    skipped = sum(case.find("skipped") is not None for case in cases)
    failures: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
                failures[cause(found.get("message", ""))].append(name)
                break
    failed = sum(map(len, failures.values()))
    return {
        "passed": len(cases) - skipped - failed,
        "failed": failed,
        "skipped": skipped,
        "failures": dict(failures),
        "seconds": round(sum(float(case.get("time", 0)) for case in cases)),
    }


def cause(message: str) -> str:
    """Shorten pytest's message; an error in a kernel comes wrapped, once for each call in it."""
    first = (message.splitlines() or ["no message"])[0].replace("\\", "")
    inner = first.rpartition("InterpreterError")[2].strip(": ()\"'")
    return inner.replace("('", ": ")[:120]


def newest_with(triton: str, report: Report) -> str | None:
    """Return the pair of a triton release and the newest torch whose tests ran."""
    rows = report["pairs"]
    for pair in pairs({split(name)[0] for name in rows}, [triton]):
        if "passed" in rows.get(pair, {}):
            return pair
    return None


def fresh(every: int) -> Report:
    """Make a report without rows."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "modules": list(MODULES),
        "every": every,
        "arch": ARCH,
        "torch": {},
        "pairs": {},
        "code": {},
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="", metavar="LIST", help=f"of {','.join(TORCH)}")
    parser.add_argument("--triton", default="", metavar="LIST", help=f"of {','.join(TRITON)}")
    parser.add_argument("--json", type=Path, default=REPORT, metavar="FILE", help="the report")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the environments there")
    parser.add_argument(
        "--every", type=int, default=6, metavar="N", help="one in N sets of a test's parameters"
    )
    parser.add_argument("--again", action="store_true", help="run what has a result, too")
    parser.add_argument("--index", metavar="URL", help="a further package index for pip")
    parser.add_argument("--cuda", action="store_true", help="install torch with CUDA if need be")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torches, tritons = releases(arguments.torch, TORCH), releases(arguments.triton, TRITON)

    report = fresh(arguments.every)
    if arguments.json.exists():
        earlier = json.loads(arguments.json.read_text(encoding="utf-8"))
        same = all(earlier[key] == report[key] for key in ("modules", "every", "python", "machine"))
        if not same and not arguments.again:
            parser.error(f"{arguments.json} is of other tests or another machine; see --again")
        if same:
            report = earlier

    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        pip = Pip(folder, arguments.index)
        matrix = Matrix(report, arguments.json, folder, pip, arguments.cuda)
        for release in torches:
            matrix.attempt("torch", f"torch {release}", matrix.look_up, release)
        names = pairs(torches, tritons)
        tests = wanted(report["pairs"], names, again=arguments.again)
        code = wanted(report["code"], tritons, again=arguments.again)
        for pair in names:
            triton = split(pair)[1]
            if pair in tests:
                matrix.attempt("pairs", pair, matrix.test, pair)
            if triton in code and newest_with(triton, report) == pair:
                matrix.attempt("code", f"triton {triton}", matrix.compile, triton, pair)
            if arguments.keep is None:  # each takes more than a gigabyte
                shutil.rmtree(matrix.place(pair), ignore_errors=True)
    failed = sum(row.get("failed", 0) for row in report["pairs"].values())
    failed += sum(len(row["faults"]) for row in report["code"].values())
    log.info("%s", render(report))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
