"""Every promise of PROMISES.md has tests, and they exist."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TEXT = (HERE / "PROMISES.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and "::" in line]
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def names_in(file):
    """Names of the test functions of a module."""
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_a_test():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")]
    titles = [line for line in rows if line.startswith("| promise")]
    assert len(titles) == TEXT.count("\n## ")
    assert len(ROWS) == len(rows) - len(titles) > 30
    for row in ROWS:
        assert NAMED.search(row), row


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED.findall(TEXT)}))
def test_named_tests_exist(file):
    named = {name for found, name in NAMED.findall(TEXT) if found == file}
    assert named - names_in(file) == set()


def test_linked_reports_exist():
    links = re.findall(r"\]\((\S+)\)", TEXT)
    assert len(links) == 7
    assert all((HERE / link).is_file() for link in links)


def test_targets_exist():
    makefile = (HERE.parent / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make (\w+)`", TEXT))
    assert targets >= {"test", "gpu", "sanitize", "accuracy", "fuzz", "mutants", "matrix"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_what_make_quick_names_exists():
    makefile = (HERE.parent / "Makefile").read_text(encoding="utf-8")
    listed = re.search(r"^QUICK := \$\(addprefix tests/test_,(.*?)\)$", makefile, re.M | re.S)[1]
    named = listed.replace("\\", " ").split()
    assert len(named) > 10
    for file, _, test in (name.partition("::") for name in named):
        assert not test or test in names_in(f"test_{file}"), file
        assert (HERE / f"test_{file}").is_file()
