"""Layers executed as Triton's IR by the library ttsem; `make ttsem` runs them, outside CI."""

import importlib.util
import json
import re

import ptx_layers
import ttsem_layers

from benchmarks.digests import kernel_digests


def test_the_report_is_of_these_layers_and_kernels():
    report = json.loads(ttsem_layers.REPORT.read_text(encoding="utf-8"))
    assert report["settings"] == repr(ttsem_layers.LAYERS)
    assert [row["layer"] for row in report["layers"]] == list(ttsem_layers.LAYERS)
    assert [row for row in report["layers"] if ptx_layers.is_fault(row)] == []
    digests = kernel_digests()
    # Other sources than those that were run: `make ttsem`, minutes.
    assert report["digests"] == {name: digests[name] for name in report["digests"]}
    assert report["digests"].keys() == digests.keys()
    assert {name for row in report["layers"] for name in row["kernels"]} == report["digests"].keys()
    # One program has nobody to race with.
    assert [name for name, programs in report["programs"].items() if programs == 1] == []
    assert ttsem_layers.REPORT.with_suffix(".md").read_text() == ttsem_layers.render(report)


def test_planted_faults_are_reported_with_their_line():
    planted = json.loads(ttsem_layers.REPORT.read_text(encoding="utf-8"))["planted"]
    assert list(planted) == list(ttsem_layers.FAULTS)
    for kind, (found, text) in planted.items():
        assert found == kind
        assert re.search(r"`\w+\.py:\d+: .*tl\.(load|store)\(", text)


def test_without_ttsem_it_is_said_so(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert ttsem_layers.main() == 2
    assert "`make ttsem`" in capsys.readouterr().err
