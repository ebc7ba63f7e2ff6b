"""Mutation score: plant faults in the kernels, one at a time, and count those that tests notice.

``python tests/mutate.py`` works in a copy of the repository, never in the repository itself. For
each mutant of `mutants` it runs the few tests that should notice and, where they don't, every test
of the kernels (not for mutants said to be equivalent). Results are written after each mutant, and a
mutant whose text and tests are unchanged keeps its result, so that a run can be stopped and goes on
where it was. A test that takes too long counts as noticing, and is recorded as such. Ends with the
score; 1 below 95 %.
"""

import argparse
import ast
import concurrent.futures
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from mutants import ALL_KERNEL_TESTS, MUTANTS, Mutant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGE = Path("segmoe_kernels")
REPORT = ROOT / "tests" / "reports" / "mutation.json"
TARGET = 95.0
# Seconds. The unmutated tests take a fifth of it at most.
NARROW_LIMIT, WIDE_LIMIT = 240, 1800
NOTICED = ("caught", "timeout")
WRONG_PACKAGE = 99
# What takes seconds to import is imported once, in a process that each run is forked from. The
# interpreter is chosen when triton is imported; the package is imported by each run, from its copy.
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = (
    "torch", "torch.testing", "torch.fx.experimental.symbolic_shapes", "torch.utils.flop_counter",
    "triton", "triton.language", "triton.runtime.interpreter", "sympy", "einops", "pytest",
    "hypothesis", "pytest_benchmark.plugin", "xdist.plugin",
)  # fmt: skip
# One time of change for each text that a file has had: bytecode is kept by it, to the second.
TIMES = itertools.count(int(time.time()))


def functions_of(text: str) -> dict[str, tuple[int, int]]:
    """Name of each function, ``Class.name`` for methods, and where it lies in the text."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}
    for node in ast.parse(text).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for function in inner:
            if isinstance(function, ast.FunctionDef):
                place = starts[function.lineno - 1], starts[function.end_lineno]
                found[prefix + function.name] = place
    return found


def apply(mutant: Mutant, text: str) -> str:
    """Return the file's text with the fault planted.

    Raises:
        ValueError: if the old text isn't there once, or ``nth`` doesn't say which one is meant.
    """
    places = functions_of(text)
    if mutant.function not in places:
        raise ValueError(f"{mutant.name}: no function {mutant.function} in {mutant.file}")
    start, end = places[mutant.function]
    found = [m.start() for m in re.finditer(re.escape(mutant.old), text[start:end])]
    if not found or (mutant.nth is None and len(found) > 1) or (mutant.nth or 0) >= len(found):
        raise ValueError(f"{mutant.name}: {len(found)} times {mutant.old!r} in {mutant.function}")
    place = start + found[mutant.nth or 0]
    changed = text[:place] + mutant.new + text[place + len(mutant.old) :]
    ast.parse(changed)
    return changed


def fingerprint(mutant: Mutant) -> str:
    """What a result depends on, but for the code around the fault."""
    parts = (mutant.file, mutant.function, mutant.old, mutant.new, mutant.nth, mutant.tests)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def copy_repository(folder: Path) -> Path:
    """Copy what git tracks and what it neither tracks nor ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return folder


def environment(copy: Path) -> dict[str, str]:
    """The copy's package goes before an installed one."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SEGMOE_")}
    return {**kept, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def check_import(copy: Path) -> None:
    """Make sure that tests in the copy import the copy's package.

    Raises:
        RuntimeError: if they import another one.
    """
    done = subprocess.run(
        [sys.executable, "-c", "import segmoe_kernels; print(segmoe_kernels.__file__)"],
        cwd=copy, env=environment(copy), capture_output=True, text=True, check=True,
    )  # fmt: skip
    if Path(done.stdout.strip()).resolve() != (copy / PACKAGE / "__init__.py").resolve():
        raise RuntimeError(f"the copy's tests would import {done.stdout.strip()}")


def _in_child(copy: Path, tests: tuple[str, ...], log: Path) -> None:
    """Run pytest in the copy as ``python -m pytest`` would, in a process forked for it."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    os.environ.clear()
    os.environ.update(environment(copy))
    # What is imported so far lives on: nothing to look through for garbage.
    gc.freeze()
    # A forkserver writes no bytecode of its own.
    sys.dont_write_bytecode = False
    # This file's folder isn't the copy's.
    sys.path[:] = [str(copy), *(path for path in sys.path if not Path(path).is_relative_to(HERE))]
    for name in ("mutants", "mutate"):
        sys.modules.pop(name, None)
    import pytest

    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-rfE", *tests]))
    package = sys.modules.get("segmoe_kernels")
    if package is not None and not Path(package.__file__).resolve().is_relative_to(copy):
        code = WRONG_PACKAGE
    sys.stdout.flush()
    os._exit(code)


def run_tests(copy: Path, tests: tuple[str, ...], limit: float) -> tuple[str, str]:
    """Return "passed", "caught" or "timeout", and the first test that failed."""
    log = copy / "mutate.log"
    process = FORKS.Process(target=_in_child, args=(copy, tests, log), daemon=True)
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return "timeout", f"longer than {limit:.0f} s"
    code, output = process.exitcode, log.read_text(encoding="utf-8", errors="replace")
    if code == 0:
        return "passed", ""
    if code == WRONG_PACKAGE:
        raise RuntimeError("the tests imported another package than the copy's")
    # 4 and 5: a wrong option, no such test. Such an error must not look like a caught mutant.
    if code == 5 or (code == 4 and "conftest" not in output):
        raise RuntimeError(f"pytest {' '.join(tests)}: {output[-1000:]}")
    if code < 0:
        return "caught", f"the process died of signal {-code}"
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    return "caught", failed.group(1).removeprefix("tests/") if failed else "while it was imported"


def write(path: Path, text: str) -> None:
    """Change a file so that no bytecode of another text is taken for its own."""
    path.write_text(text, encoding="utf-8")
    now = next(TIMES)
    os.utime(path, (now, now))


def try_mutant(mutant: Mutant, copy: Path, *, narrow: bool) -> dict[str, object]:
    """Plant one fault in the copy, run the tests, take the fault out again."""
    path = copy / PACKAGE / mutant.file
    text = path.read_text(encoding="utf-8")
    began = time.monotonic()
    write(path, apply(mutant, text))
    try:
        outcome, by = run_tests(copy, mutant.tests, NARROW_LIMIT)
        selection = "narrow"
        if outcome == "passed" and not narrow and not mutant.equivalent:
            selection = "all"
            outcome, by = run_tests(copy, ALL_KERNEL_TESTS, WIDE_LIMIT)
    finally:
        write(path, text)
    if outcome == "passed":
        outcome = "survived"
    return {
        "outcome": outcome,
        "by": by,
        "tests": selection,
        "seconds": round(time.monotonic() - began),
        "fingerprint": fingerprint(mutant),
    }


def describe(mutant: Mutant, result: dict[str, object]) -> dict[str, object]:
    """A row of the report."""
    return {
        "name": mutant.name,
        "file": mutant.file,
        "function": mutant.function,
        "what": mutant.what,
        "equivalent": mutant.equivalent,
        **result,
    }


def is_current(mutant: Mutant, result: dict[str, object] | None) -> bool:
    """Whether a result holds for the mutant as it is now; a narrow survivor's doesn't.

    Unless it is equivalent: that is an argument, which tests can't prove but may refute.
    """
    if result is None or result["fingerprint"] != fingerprint(mutant):
        return False
    return bool(result["outcome"] != "survived" or result["tests"] == "all" or mutant.equivalent)


def load(path: Path) -> dict[str, dict[str, object]]:
    """Rows by the name of their mutant."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["mutants"]
    return {row["name"]: row for row in rows}


def save(path: Path, results: dict[str, dict[str, object]]) -> None:
    """Write the rows in the order of the list, and the report beside them."""
    rows = [describe(m, _measured(results[m.name])) for m in MUTANTS if m.name in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"mutants": rows}, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(render(rows), encoding="utf-8")


def _measured(row: dict[str, object]) -> dict[str, object]:
    return {key: row[key] for key in ("outcome", "by", "tests", "seconds", "fingerprint")}


def score(rows: list[dict[str, object]]) -> float:
    """Percentage of the mutants noticed, equivalent ones left out."""
    counted = [row for row in rows if not row["equivalent"]]
    return 100 * sum(row["outcome"] in NOTICED for row in counted) / max(1, len(counted))


def render(rows: list[dict[str, object]]) -> str:
    """The report, in Markdown."""
    counted = [row for row in rows if not row["equivalent"]]
    equivalent = [row for row in rows if row["equivalent"]]
    survivors = [row for row in counted if row["outcome"] not in NOTICED]
    outcomes = Counter(row["outcome"] for row in counted)
    lines = [
        "# Mutation score",
        "",
        "Made by `make mutants` (`tests/mutate.py`), which plants the faults of `tests/mutants.py`",
        "one at a time in a copy of the package and runs tests until one fails; where the few that",
        "should notice don't, all tests of the kernels.",
        "",
        f"**{score(rows):.1f} %** of {len(counted)} mutants are noticed: {outcomes['caught']} by",
        f"a test that fails, {outcomes['timeout']} by one that doesn't end.",
        f"{len(survivors)} survive; {len(equivalent)} more are equivalent: what they change can't",
        "be seen in a result. They",
        "are not counted, and are listed below.",
        "",
        "| file | mutants | noticed | survived | equivalent |",
        "|---|---|---|---|---|",
    ]
    for file in dict.fromkeys(row["file"] for row in rows):
        own = [row for row in counted if row["file"] == file]
        noticed = sum(row["outcome"] in NOTICED for row in own)
        same = sum(row["file"] == file for row in equivalent)
        lines.append(f"| `{file}` | {len(own)} | {noticed} | {len(own) - noticed} | {same} |")
    lines += ["", "## Survivors", ""]
    lines += [f"* `{row['name']}`: {row['what']}." for row in survivors] or ["None."]
    lines += ["", "## Equivalent mutants", ""]
    lines += [f"* `{r['name']}`: {r['what']}. {r['equivalent']}" for r in equivalent] or ["None."]
    wrong = [row for row in equivalent if row["outcome"] in NOTICED]
    if wrong:
        names = ", ".join(f"`{row['name']}`" for row in wrong)
        lines += ["", f"Noticed all the same, so not equivalent: {names}."]
    lines += ["", "## Who noticed", "", "| mutant | fault | noticed by |", "|---|---|---|"]
    for row in counted:
        if row["outcome"] in NOTICED:
            by = str(row["by"]).replace("|", "\\|")
            what = str(row["what"]).replace("|", "\\|")
            lines.append(f"| `{row['name']}` | {what} | `{by}` |")
    return "\n".join(lines) + "\n"


def check_unmutated(copy: Path, mutants: list[Mutant]) -> None:
    """Run what the mutants will run, without a fault.

    Raises:
        RuntimeError: if a test fails.
    """
    choices = dict.fromkeys(mutant.tests for mutant in mutants)
    modules = dict.fromkeys(t for tests in choices for t in tests if t in ALL_KERNEL_TESTS[:-2])
    # Modules of the kernels once, whatever is chosen of them.
    runs = [(*modules, *ALL_KERNEL_TESTS[-2:])] if modules else []
    runs += [t for t in choices if not {a for a in t if a.startswith("tests/")} <= modules.keys()]
    for tests in runs:
        outcome, by = run_tests(copy, tests, WIDE_LIMIT)
        if outcome != "passed":
            raise RuntimeError(f"without a mutant, {' '.join(tests)} gives {outcome}: {by}")


def say(*words: object) -> None:
    """Print at once, whatever the output goes to."""
    print(*words, flush=True)  # noqa: T201  a command prints


def main() -> int:
    """Run the mutants that have no result yet, and say the score."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="TEXT", help="mutants whose name or file has this text")
    parser.add_argument("--json", metavar="FILE", type=Path, default=REPORT, help="results")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="copies at work at once")
    parser.add_argument("--again", action="store_true", help="rerun mutants that have a result")
    parser.add_argument(
        "--narrow", action="store_true", help="don't run all tests where the narrow choice passes"
    )
    options = parser.parse_args()
    results = load(options.json)
    wanted = [m for m in MUTANTS if not options.only or options.only in f"{m.file} {m.name}"]
    waiting = [m for m in wanted if options.again or not is_current(m, results.get(m.name))]
    began = time.monotonic()
    if waiting:
        stopping = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            # Ends with the mutants at work; their results are kept.
            signal.signal(number, lambda *_: stopping.set())
        os.environ["TRITON_INTERPRET"] = "1"
        FORKS.set_forkserver_preload(list(PRELOADED))
        lock, copies = threading.Lock(), queue.SimpleQueue()
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            for i in range(options.jobs):
                copies.put(copy_repository(Path(folder, str(i))))
            first = copies.get()
            check_import(first)
            check_unmutated(first, waiting)
            copies.put(first)
            say(f"unmutated tests pass ({time.monotonic() - began:.0f} s)")

            def work(mutant: Mutant) -> None:
                if stopping.is_set():
                    return
                copy = copies.get()
                try:
                    result = try_mutant(mutant, copy, narrow=options.narrow)
                finally:
                    copies.put(copy)
                with lock:
                    results[mutant.name] = result
                    save(options.json, results)
                    took = f"{result['seconds']:4} s"
                    say(took, result["outcome"], mutant.name, result["by"])

            with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
                for done in [pool.submit(work, mutant) for mutant in waiting]:
                    done.result()
    save(options.json, results)
    rows = list(load(options.json).values())
    left = len(MUTANTS) - len(rows)
    say(f"{score(rows):.1f} % of the mutants are noticed; {left} have not been run")
    return 0 if score(rows) >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
