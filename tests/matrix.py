"""Run core tests and compile the kernels for sm_90 with pairs of torch and triton releases.

    python tests/matrix.py [--every N] [TORCH/TRITON ...]

A pair such as ``2.13/3.6`` gets an environment of its own, in which pip takes the latest patch of
each. Without a GPU the kernels run in Triton's interpreter. Rows of `reports/versions.md` are
written after each pair; those of other pairs stay. Exit status 1 if something failed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections import defaultdict
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "tests" / "reports" / "versions.md"
# The newest torch with each triton, and each older torch with the triton that it ships with.
PAIRS = ("2.13/3.9", "2.13/3.8", "2.13/3.7", "2.13/3.6", "2.13/3.5")
PAIRS += ("2.12/3.7", "2.11/3.6", "2.10/3.6", "2.9/3.5")
# Each stage, the layer, tracing, what is refused, and the patches of the interpreter.
MODULES = ("route", "permute", "experts", "grouped_gemm", "combine", "shared", "triton_layer")
MODULES += ("compile", "partials", "validation", "interp_bf16", "interp_releases")
HEAD = """# Releases of torch and triton

Written by `make matrix` (`tests/matrix.py`), not by hand. No GPU: the kernels ran in Triton's
interpreter, and were compiled for sm_90. Tests: {modules} of `tests/test_*.py`.

| torch | triton | tests | code for sm_90 | on |
|---|---|---|---|---|
"""


def chosen(ids, every):
    """Take the first and then every n-th set of parameters of each test function."""
    functions = defaultdict(list)
    for test in ids:
        functions[test.split("[", 1)[0]].append(test)
    return [test for tests in functions.values() for test in tests[::every]]


def run(python, *words, **variables):
    """Run a module of an environment; its exit status and its last line."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SEGMOE_", "PYTEST_"))}
    kept.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [str(python), "-m", *map(str, words)],
        cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.strip().splitlines() or ["no message"]


def attempt(pair, folder, every):
    """The row of a pair, and whether all went well."""
    torch, triton = pair.split("/")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # triton comes second: a torch with CUDA asks for one release, and this replaces it.
    for words in ([f"torch=={torch}.*"], [f"triton=={triton}.*", "numpy"]):
        others = ("einops", "hypothesis", "pytest")
        status, lines = run(python, "pip", "install", "--quiet", "--no-compile", *words, *others)
        if status:
            return [torch, triton, f"does not install: {lines[-1]}", "", date.today()], False
    _, lines = run(python, "pip", "freeze")
    found = dict(line.split("==") for line in lines if "==" in line)
    # No plugin but ours, no cache in the tree; the interpreter even where there is a GPU.
    command = ["pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    variables = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    files = [f"tests/test_{name}.py" for name in MODULES]
    failed, lines = run(python, *command, "--collect-only", *files, **variables)
    if not failed:
        (folder / "ids").write_text("\n".join(chosen([x for x in lines if "::" in x], every)))
        failed, lines = run(python, *command, f"@{folder / 'ids'}", **variables)
    tests = lines[-1].strip("= ")
    words = ("benchmarks.codegen", "--arch", "sm_90", "--brief")
    faults, lines = run(python, *words, TRITON_CACHE_DIR=str(folder / "cache"))
    row = [found["torch"], found["triton"], tests, lines[-1], date.today()]
    return row, not failed and not faults


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", default=PAIRS, metavar="TORCH/TRITON")
    parser.add_argument(
        "--every", type=int, default=6, metavar="N", help="one in N sets of a test's parameters"
    )
    arguments = parser.parse_args()
    for pair in arguments.pairs:
        if not re.fullmatch(r"\d+\.\d+/\d+\.\d+", pair):
            parser.error(f"a pair is two releases such as {PAIRS[0]}, got {pair!r}")
    rows, well = {}, True
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if re.match(r"\| \d", line):
            rows["/".join(re.findall(r"\d+\.\d+", line)[:2])] = line
    for pair in arguments.pairs:
        with tempfile.TemporaryDirectory() as folder:  # each takes more than a gigabyte
            row, good = attempt(pair, Path(folder), arguments.every)
        well &= good
        rows[pair] = "| " + " | ".join(map(str, row)) + " |"
        print(rows[pair], flush=True)  # noqa: T201
        ordered = sorted(rows, key=lambda p: [int(n) for n in re.findall(r"\d+", p)], reverse=True)
        head = HEAD.format(modules=", ".join(MODULES))
        PAGE.write_text(head + "\n".join(map(rows.get, ordered)) + "\n", encoding="utf-8")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
