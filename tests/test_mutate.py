"""Rules of faults find their places, and the report keeps its promise; `mutate` takes minutes."""

import ast
import json

import mutate
import mutation_rules

SOURCE = """
@kernel
def f(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    for k in tl.range(0, n, BLOCK, num_stages=3):
        total += tl.load(x_ptr + k, mask=(k < n) & real, other=0.0).to(tl.float32)
    tl.store(y_ptr, total, k)
def launch(x, y):
    if x is None:
        raise ValueError("no x")
    f[(triton.cdiv(x.stride(1), 16),)](x, y, x.new_zeros(1).contiguous())
"""
CHANGES = {
    "mask": [(", mask=(k < n) & real, other=0.0", ""), (" & real", ""), ("(k < n) & real", "real")],
    "comparison": [("k < n", "k <= n")],
    "offset": [("x_ptr + k", "x_ptr"), ("x_ptr + k", "x_ptr - k")],
    "accumulation": [("+=", "=")],
    "bound": [("n, BLOCK, num", "n - BLOCK, BLOCK, num"), (", 16)", ", 16) - 1")],
    "number": [("range(0,", "range(1,")],
    "dtype": [(".to(tl.float32)", "")],
    "stride": [("stride(1)", "stride(0)")],
    "fill": [(".contiguous()", ""), ("new_zeros", "new_empty")],
    "branch": [],
}


def test_rules_find_their_places():
    for rule, changes in CHANGES.items():
        sites = [site for site in mutation_rules.sites_of("f.py", SOURCE) if site.rule == rule]
        for site, change in zip(sites, changes, strict=True):
            planted = ast.parse(mutation_rules.plant(site, SOURCE))
            assert ast.unparse(planted) == ast.unparse(ast.parse(SOURCE.replace(*change))), rule


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
