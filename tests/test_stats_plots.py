"""Plots of routing statistics: what their axes hold."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from layers import make_layer
from torch import nn, tensor

from segmoe_kernels import Routing, collect_routing_stats
from segmoe_kernels.stats.plots import plot_expert_load, plot_expert_usage, plot_segment_timeline


@pytest.fixture(scope="module")
def history():
    """Of two layers with 2 and 3 experts, entries at steps 2, 4 and 6."""
    model = nn.Sequential(make_layer(2), make_layer(3, top_k=2))
    with collect_routing_stats(model, every=2) as stats:
        for _ in range(6):
            model(torch.randn(2, 12, 4))
            stats.end_step()
    return stats.step_history


def cells(axis):
    """A mesh's values (rows, columns), and the edges of its columns and rows."""
    (mesh,) = axis.collections
    corners = mesh.get_coordinates()
    return mesh.get_array(), corners[0, :, 0].tolist(), corners[:, 0, 1].tolist()


@pytest.mark.parametrize("key", ["hard_fraction", "soft_fraction", "token_counts", "prob_mass"])
def test_expert_load_is_a_map_of_each_layer(history, key):
    figure = plot_expert_load(history, key=key)
    *maps, bar = figure.axes
    assert len(maps) == 2
    for i, axis in enumerate(maps):
        values, columns, rows = cells(axis)
        expected = [entry["layers"][i][key].tolist() for entry in history]
        assert np.array_equal(values, np.array(expected).T)
        assert columns == [0, 2, 4, 6]
        assert rows == [e - 0.5 for e in range(i + 3)]
        assert f"layer {i}" in axis.get_ylabel()
        top = max(e["layers"][j][key].max() for e in history for j in range(2))
        assert axis.collections[0].get_clim() == (0, 1 if "fraction" in key else top)
    assert maps[-1].get_xlabel() == "step"
    assert bar.get_ylabel() == key


@pytest.mark.parametrize(
    ("steps", "edges", "label"),
    [
        ([4], [3, 4], "step"),
        ([6, 8], [4, 6, 8], "step"),
        ([1, 9], [0, 1, 9], "step"),
        ([0, 9], [-1, 0, 9], "step"),
        ([0, 0, 0], [0, 1, 2, 3], "entry"),  # epochs without an end_step
        ([5, 3], [0, 1, 2], "entry"),
    ],
)
def test_entries_stand_at_their_steps(history, steps, edges, label):
    entries = [{**history[0], "step": step} for step in steps]
    load, usage = plot_expert_load(entries), plot_expert_usage(entries)
    values, columns, _ = cells(load.axes[0])
    assert columns == edges
    assert values.shape == (2, len(steps))
    assert usage.axes[0].lines[0].get_xdata().tolist() == edges[1:]
    assert load.axes[-2].get_xlabel() == usage.axes[-1].get_xlabel() == label


def test_expert_usage_has_a_line_for_each_layer_and_one_for_all(history):
    keys = ["entropy", "cv_hard", "num_tokens"]
    figure = plot_expert_usage(history, keys=keys)
    assert [axis.get_ylabel() for axis in figure.axes] == keys
    for axis, key in zip(figure.axes, keys, strict=True):
        lines = {line.get_label(): line for line in axis.lines}
        assert list(lines) == ["layer 0", "layer 1", "global"]
        for label, line in lines.items():
            assert line.get_xdata().tolist() == [2, 4, 6]
            stats = [
                e["global"] if label == "global" else e["layers"][int(label[-1])] for e in history
            ]
            assert line.get_ydata().tolist() == [own[key] for own in stats]
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["layer 0", "layer 1", "global"]


def test_expert_usage_shows_collapse_unless_told_otherwise(history):
    labels = [axis.get_ylabel() for axis in plot_expert_usage(history).axes]
    assert labels == ["entropy_norm", "cv_hard", "dead_experts", "switch_rate"]


# Two sequences of three segments, three experts; the last segment was not routed.
ROUTING = Routing(
    torch.zeros(6, 3),
    torch.zeros(6, 3),
    tensor([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5], [0.9, 0.1], [0.8, 0.2], [0, 0]]),
    tensor([[0, 1], [2, 0], [1, 2], [0, 2], [0, 1], [-1, -1]], dtype=torch.int32),
    tensor([4, 3, 3]),
)
NAN = float("nan")
WEIGHTS = [
    [[0.6, 0.3, NAN], [0.4, NAN, 0.5], [NAN, 0.7, 0.5]],
    [[0.9, 0.8, NAN], [NAN, 0.2, NAN], [0.1, NAN, NAN]],
]


@pytest.mark.parametrize("channels", [None, 0, 2])
@pytest.mark.parametrize("sequence", [0, 1])
def test_timeline_shows_who_took_which_segment(sequence, channels):
    shape = (8,) if channels == 0 else (8, 2)
    series = None if channels is None else torch.randn(shape, requires_grad=True)
    figure = plot_segment_timeline(
        ROUTING, segment_size=3, num_steps=8, sequence=sequence, series=series
    )
    *above, axis, bar = figure.axes
    values, columns, rows = cells(axis)
    np.testing.assert_allclose(values.filled(np.nan), WEIGHTS[sequence], rtol=1e-6)
    assert columns == [0, 3, 6, 8]  # the last segment is as long as its steps
    assert rows == [-0.5, 0.5, 1.5, 2.5]
    assert axis.get_xlim() == (0, 8)
    assert bar.get_ylabel() == "weight"
    assert len(above) == (series is not None)
    for panel in above:
        columns = series.detach().reshape(8, -1).T
        assert len(panel.lines) == len(columns)
        for line, column in zip(panel.lines, columns, strict=True):
            assert line.get_xdata().tolist() == [t + 0.5 for t in range(8)]
            assert line.get_ydata().tolist() == pytest.approx(column.tolist(), rel=1e-6)


def test_figures_need_no_display_and_are_not_kept(history):
    code = "import sys, segmoe_kernels.stats.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    figures = [plot_expert_load(history), plot_expert_usage(history)]
    figures.append(plot_segment_timeline(ROUTING, segment_size=3, num_steps=8))
    for figure in figures:
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        assert stream.getvalue().startswith(b"\x89PNG")
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


@pytest.mark.parametrize(
    "plot",
    [
        plot_expert_load,
        plot_expert_usage,
        lambda _: plot_segment_timeline(ROUTING, segment_size=3, num_steps=8),
    ],
)
def test_plots_say_what_to_install(history, plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install segmoe-kernels\[plots\]"):
        plot(history)
