"""The list of mutants fits the code, and the report the list; `mutate` runs them, for minutes."""

import ast
import json
from collections import Counter

import mutate
import pytest
from mutants import MUTANTS, Mutant

PACKAGE = mutate.ROOT / mutate.PACKAGE


def compiled_functions():
    """``(file, name)`` of every function that Triton compiles."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator) in {"kernel", "triton.jit"}
                for decorator in node.decorator_list
            ):
                yield path.relative_to(PACKAGE).as_posix(), node.name


@pytest.fixture(scope="module")
def rows():
    return json.loads(mutate.REPORT.read_text(encoding="utf-8"))["mutants"]


def test_every_mutant_fits_the_code():
    faults = []
    for mutant in MUTANTS:
        text = (PACKAGE / mutant.file).read_text(encoding="utf-8")
        try:
            assert mutate.apply(mutant, text) != text, mutant.name
        except ValueError as error:
            faults.append(str(error))
    assert not faults
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1


def test_every_compiled_function_has_mutants():
    """Kernels three at least, what they call one."""
    found = Counter((mutant.file, mutant.function) for mutant in MUTANTS)
    places = list(compiled_functions())
    assert len(places) > 40
    for place in places:
        assert found[place] >= (3 if place[1].endswith("_kernel") else 1), place


@pytest.mark.parametrize(
    ("old", "nth", "message"),
    [("b = 2", None, "0 times"), ("a", None, "2 times"), ("a", 2, "2 times")],
    ids=["absent", "ambiguous", "too few"],
)
def test_a_fault_that_has_no_place_is_refused(old, nth, message):
    text = "def f():\n    a = 1\n    return a\n\n\ndef g():\n    b = 2\n"
    with pytest.raises(ValueError, match=message):
        mutate.apply(Mutant("f.py", "f", "name", old, "c", "fault", (), nth), text)
    with pytest.raises(ValueError, match="no function h"):
        mutate.apply(Mutant("f.py", "h", "name", "a", "c", "fault", ()), text)


def test_a_fault_is_planted_in_its_function():
    text = "def f():\n    return 1\n\n\nclass C:\n    def f(self):\n        return 1\n"
    mutant = Mutant("f.py", "C.f", "name", "return 1", "return 2", "fault", ())
    assert mutate.apply(mutant, text) == text[:-2] + "2\n"


def test_the_report_is_of_these_mutants(rows):
    assert [row["name"] for row in rows] == [mutant.name for mutant in MUTANTS]
    for mutant, row in zip(MUTANTS, rows, strict=True):
        assert mutate.is_current(mutant, row), mutant.name
        assert mutate.describe(mutant, {}).items() <= row.items(), mutant.name
    report = mutate.REPORT.with_suffix(".md").read_text(encoding="utf-8")
    assert report == mutate.render(rows)


def test_the_tests_notice_nearly_all_mutants(rows):
    assert mutate.score(rows) >= mutate.TARGET
    for row in rows:
        # One that a test notices is not equivalent.
        assert not (row["equivalent"] and row["outcome"] in mutate.NOTICED), row["name"]
