"""Mutation score: plant faults in the kernels, one at a time, and count those that tests notice.

Draws a sample of the faults of `mutation_rules`, evenly over files and rules and always the same,
and works in a copy of the repository. For each fault it runs the tests of its stage until one
fails, and that one without the fault, where it has to pass. Results are written after each, and one
whose function is unchanged is kept, so that a run can be stopped and goes on where it was. A
survivor that no test could notice gets the reason as "equivalent" in the report's JSON, by hand,
and is left out of the score. Exit status 1 below 95 %.
"""

import functools
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from multiprocessing.context import ForkProcess
from pathlib import Path

import report_code
from mutation_rules import plant, sites_of

HERE = Path(__file__).resolve().parent
PACKAGE, REPORT = HERE.parent / "segmoe_kernels", HERE / "reports" / "mutation.json"
COUNT, TARGET, NOTICED = 140, 95.0, ("caught", "timeout")
LIMIT = 150  # seconds for one test, fifteen times what the longest takes
# Modules of tests by stage or file, the narrowest first, where it's not the one of the same name.
TESTS = {
    "route": ["route", "routed"], "router": ["route", "routed"], "permute": ["permute", "routed"],
    "ffn": ["experts"], "grouped_gemm": ["grouped_gemm", "experts"], "__init__": ["routed"],
    "whole": ["routed", "shared"],
    "sequences": ["experts", "grouped_gemm"], "partials": ["partials", "grouped_gemm", "experts"],
    "launch": ["resolve_backend", "addresses", "flops", "combine", "shared", "grouped_gemm"],
}  # fmt: skip
# What holds for stages and layers of every kind.
LAST = ["stage_properties", "triton_layer", "numbers"]


def all_sites():
    """Every fault; files of ``_triton`` without a kernel choose tiles, which no result shows."""
    for path in sorted([*PACKAGE.glob("stages/**/*.py"), *PACKAGE.glob("_triton/*.py")]):
        text = path.read_text(encoding="utf-8")
        if path.parent.name != "_triton" or re.search(r"^@(kernel|triton\.jit)", text, re.M):
            yield from sites_of(path.relative_to(PACKAGE).as_posix(), text)


def draw(sites, count):
    """Round by round a site of each file, of the rule that has been drawn least."""
    drawn, chosen, waiting = Counter(), [], {}
    for site in sorted(sites, key=lambda s: (s.file, hashlib.sha256(s.name.encode()).digest())):
        waiting.setdefault(site.file, []).append(site)
    while len(chosen) < count and any(waiting.values()):
        for own in filter(None, waiting.values()):
            chosen.append(min(own, key=lambda site: drawn[site.rule]))
            own.remove(chosen[-1])
            drawn[chosen[-1].rule] += 1
    return chosen[:count]


def tests_of(file):
    """Modules of tests of a file."""
    name = Path(file).with_suffix("").parts[1]
    return [f"tests/test_{test}.py" for test in (*TESTS.get(name, [name]), *LAST)]


def _in_child(copy, tests):
    """Run pytest in the copy as ``python -m pytest`` would, in a process forked for it."""
    with (copy / "mutate.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(copy)
    # This file's folder isn't the copy's.
    sys.path[:] = [str(copy), *(path for path in sys.path if not Path(path).is_relative_to(HERE))]
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-rfE", "-k", "not instructions"]
    code = pytest.main([*options, *tests])
    sys.stdout.flush()
    os._exit(code)


def run_tests(copy, tests):
    """Return "survived", "caught" or "timeout", and the first test that failed."""
    log, size = copy / "mutate.log", -1
    log.write_text("")
    process = ForkProcess(target=_in_child, args=(copy, tests), daemon=True)
    process.start()
    while process.is_alive() and size != log.stat().st_size:
        size = log.stat().st_size
        process.join(LIMIT)
    if process.is_alive():
        process.kill()
        return "timeout", f"no test ended in {LIMIT} s"
    output, code = log.read_text(encoding="utf-8", errors="replace"), process.exitcode
    if code in (3, 4, 5):  # what went wrong is pytest itself
        raise RuntimeError(f"pytest of {tests} ended with {code}: {output[-1000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    return ("caught", failed[1] if failed else f"status {code}") if code else ("survived", "")


@functools.cache
def passes(copy, test):
    """Whether a test that caught a fault passes where nothing is planted."""
    return run_tests(copy, [test])[0] == "survived"


def try_site(site, copy):
    """Plant one fault in the copy, run the tests, take the fault out again; a row of the report."""
    path = copy / PACKAGE.name / site.file
    text = path.read_text(encoding="utf-8")
    path.write_text(plant(site, text), encoding="utf-8")
    outcome, by = run_tests(copy, tests_of(site.file))
    path.write_text(text, encoding="utf-8")
    if "::" in by and not passes(copy, by):
        raise RuntimeError(f"{by} fails without a fault")
    row = {"name": site.name, "line": site.line, "what": site.what, "digest": site.digest}
    return {**row, "outcome": outcome, "by": by}


def score(rows):
    """Percentage of the faults noticed, equivalent ones left out."""
    counted = [row["outcome"] in NOTICED for row in rows if "equivalent" not in row]
    return 100 * sum(counted) / max(1, len(counted))


def render(report):
    """The report, in Markdown."""
    rows, tally, kinds = report["faults"], Counter(), (*NOTICED, "survived", "equivalent")
    for row in rows:
        file, _, rule, _ = row["name"].split()
        kind = "equivalent" if "equivalent" in row else row["outcome"]
        tally.update([(f"`{file}`", kind), (rule, kind), ("all", kind)])
    names = sorted({name for name, _ in tally})
    left = [(row, f"* `{row['name']}`: {row['what']}.") for row in rows if not row["by"]]
    same = [f"{text} {row['equivalent']}" for row, text in left if "equivalent" in row]
    gaps = [text for row, text in left if "equivalent" not in row]
    lines = [
        "# Mutation score\n",
        f"**{score(rows):.1f} %** of {len(rows) - len(same)} planted faults are noticed;"
        f" {COUNT - len(rows)} more of the sample have not been tried to the end.\n",
        f"Made by `make mutants` (`tests/mutate.py`): of the {report['sites']} faults that the",
        "rules of `tests/mutation_rules.py` find a place for, a sample is planted in a copy of the",
        "package, one at a time, and tests run until one fails or doesn't end (timeout).",
        "Equivalent ones change nothing that can be seen in a result, and aren't counted.\n",
        report_code.describe(report),
        f"\n| file or rule | {' | '.join(kinds)} |\n|---|---|---|---|---|",
        *(f"| {n} | {' | '.join(str(tally[n, kind]) for kind in kinds)} |" for n in names),
        *("\n## Survivors\n", *(gaps or ["None."]), "\n## Equivalent\n", *(same or ["None."])),
    ]
    return "\n".join(lines) + "\n"


def save(report):
    """Write the results, a line each, and the page beside them."""
    head = json.dumps({**report, "faults": []}, indent=1).removesuffix("[]\n}")
    rows = ",\n".join(json.dumps(row) for row in report["faults"])
    REPORT.write_text(f"{head}[\n{rows}\n]}}\n", encoding="utf-8")
    REPORT.with_suffix(".md").write_text(render(report), encoding="utf-8")


def main():
    """Try the faults that have no result yet, and say the score; with "--page" only the score."""
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    if "--page" not in sys.argv:
        # A survivor is tried again: there may be a new test.
        known = {r["digest"]: r for r in report["faults"] if r["by"] or "equivalent" in r}
        sites = list(all_sites())
        report = {"code": report_code.digests(), "sites": len(sites), "faults": []}
        sys.dont_write_bytecode = True  # within a second it could be taken for another text's
        os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        # Once, in the process that each run is forked from; the package by each, from the copy.
        for name in ("torch.testing", "triton.runtime.interpreter", "hypothesis", "pytest"):
            importlib.import_module(name)
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            ignored = shutil.ignore_patterns(".*", "build", "__pycache__")
            copy = shutil.copytree(HERE.parent, Path(folder, "copy"), ignore=ignored)
            rows = {site: known.get(site.digest) for site in draw(sites, COUNT)}
            for site, row in rows.items():
                rows[site] = row or try_site(site, copy)
                print(rows[site], flush=True)  # noqa: T201  a command prints
                report["faults"] = [row for row in rows.values() if row]
                save(report)
    save(report)
    print(f"{score(report['faults']):.1f} % of the faults are noticed")  # noqa: T201
    return 0 if score(report["faults"]) >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
