"""Rules of faults find their places, and the report keeps its promise; `mutate` takes minutes."""

import ast
import json

import mutate
import mutation_rules


def test_every_fault_that_is_drawn_can_be_planted():
    sites = list(mutate.all_sites())
    drawn = mutate.draw(sites, mutate.COUNT)
    assert len(set(drawn)) == mutate.COUNT
    assert {site.file for site in drawn} == {site.file for site in sites}
    rules = mutation_rules.IN_BOTH | mutation_rules.IN_KERNELS | mutation_rules.IN_LAUNCHERS
    assert {site.rule for site in drawn} == rules
    for site in drawn:
        text = (mutate.PACKAGE / site.file).read_text(encoding="utf-8")
        planted = mutation_rules.plant(site, text)
        assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(text)), site.name
        assert all((mutate.HERE.parent / t).is_file() for t in mutate.tests_of(site.file))


def test_the_tests_notice_nearly_all_faults():
    report = json.loads(mutate.REPORT.read_text(encoding="utf-8"))
    rows = report["faults"]
    assert len({row["name"] for row in rows}) == len(rows) > mutate.COUNT / 2
    assert mutate.score(rows) >= mutate.TARGET
    # One that a test notices is not equivalent.
    assert all(row["outcome"] == "survived" for row in rows if "equivalent" in row)
    assert mutate.REPORT.with_suffix(".md").read_text(encoding="utf-8") == mutate.render(report)
