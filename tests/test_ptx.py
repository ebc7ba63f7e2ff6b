"""Kernels executed as they are compiled, on a CPU; `make ptx` runs all layers, for minutes."""

import json

import numpy as np
import ptx_faults
import ptx_layers
import pytest
from programs import run_python
from ptx import numerics
from ptx.parse import NotEmulated, execution_order, parse

from benchmarks.digests import kernel_digests

pytest.importorskip("triton")


@pytest.mark.parametrize("arch", ptx_layers.ARCHS)
def test_compiled_layers_are_accurate_without_race_or_stray_access(arch):
    """One test: the parts share a process, in which the interpreter isn't chosen."""
    found = json.loads(run_python(ptx_layers.__file__, "--core", arch).stdout)
    # The emulator itself: it has raised where small kernels differ from PyTorch.
    assert len(found["small"][0]) == 6
    assert found["small"][1] == []
    kinds = {kind for kind in ptx_faults.CORE if ptx_faults.KINDS[kind][0][0] == arch}
    assert found["planted"].keys() == kinds
    assert [kind for kind, noticed in found["planted"].items() if not noticed] == []
    assert [row["layer"] for row in found["rows"]] == list(ptx_layers.CORE)
    assert [row for row in found["rows"] if ptx_layers.is_fault(row)] == []


def test_the_report_is_of_these_layers_and_kernels():
    rows = json.loads(ptx_layers.REPORT.read_text(encoding="utf-8"))
    expected = [(name, arch) for name in ptx_layers.LAYERS for arch in ptx_layers.ARCHS]
    assert [(row["layer"], row["arch"]) for row in rows] == expected
    assert [(row["layer"], row["arch"]) for row in rows if ptx_layers.is_fault(row)] == []
    digests = kernel_digests()
    for row in rows:
        assert row["settings"] == repr(ptx_layers.LAYERS[row["layer"]])
        # Other sources than those that were run: `make ptx` runs what has changed.
        assert row["digests"] == {name: digests[name] for name in row["kernels"]}, row["layer"]
    assert {name for row in rows for name in row["kernels"]} == digests.keys()
    assert ptx_layers.REPORT.with_suffix(".md").read_text() == ptx_layers.render(rows)


def test_planted_faults_are_reported():
    rows = json.loads(ptx_faults.REPORT.read_text(encoding="utf-8"))
    assert [row["kind"] for row in rows] == list(ptx_faults.KINDS)
    assert all(row["tried"] and row["reported"] + row["wrong"] for row in rows)
    assert ptx_faults.score(rows) >= ptx_faults.TARGET
    assert ptx_faults.REPORT.with_suffix(".md").read_text() == ptx_faults.render(rows)


def test_threads_that_part_meet_before_what_follows_their_loop():
    """0 -> 1; the loop 1 -> 4 -> 2 -> 1 with a way round 2; after it 3."""
    edges = np.zeros((5, 5), bool)
    for edge in [(0, 1), (1, 4), (1, 3), (4, 2), (4, 1), (2, 1)]:
        edges[edge] = True
    assert execution_order(edges) == [0, 1, 4, 2, 3]


@pytest.mark.parametrize(
    ("function", "operands", "expected"),
    [
        # Squared, 2^-24 above a float: a tie, which the addend breaks beyond the digits of float64.
        ("fma", [np.float32(1 + 2**-12)] * 2 + [np.float32(2**-60)], 1 + 2**-11 + 2**-23),
        ("fma", [np.float32(1 + 2**-12)] * 2 + [np.float32(-(2**-60))], 1 + 2**-11),
        ("bfe", [np.uint32(0xABCD1234), np.uint32(8), np.uint32(12)], 0xD12),
        ("bfe", [np.int32(0x00000F00), np.uint32(8), np.uint32(4)], -1),
        ("prmt", [np.uint32(0x03020100), np.uint32(0x07060584), np.uint32(0xC750)], 0xFF070500),
        ("div", [np.int32(-7), np.int32(2)], -3),
        ("rem", [np.int32(-7), np.int32(2)], -1),
        ("shl", [np.uint32(1), np.uint32(32)], 0),
        ("shr", [np.int32(-8), np.uint32(40)], -1),
        ("popc", [np.uint32(0xF0000001)], 5),
    ],
)
def test_arithmetic_of_ptx(function, operands, expected):
    arrays = [np.array([x]) for x in operands]
    assert numerics.FUNCTIONS[function](*arrays)[0] == expected


def test_what_is_not_emulated_is_refused():
    with pytest.raises(NotEmulated, match="without a kernel"):
        parse(".version 8.0")
    with pytest.raises(NotEmulated, match="the operand __local_depot0"):
        numerics.constant("__local_depot0", "b32")
