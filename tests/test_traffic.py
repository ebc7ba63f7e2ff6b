"""Bytes, launches and FLOPs of the layer at a named shape, pinned against regressions."""

import pytest

pytest.importorskip("triton")

# What `python -m benchmarks.traffic` measures at B64-T65-D64-F128-E4-k1-P5, rounded up. Router and
# experts read x each; backward's kernels read x and dy for themselves and pass dx of the experts
# through memory: more bytes than in one pass, less time by a model of the clock. Two of them
# compute the hidden layer: 1.5 of the work needed, and padding.
LIMITS = {
    "forward": {"launches": 3, "distinct": 0.25, "requested": 0.75, "work": 1.10},
    "forward+backward": {"launches": 9, "distinct": 0.32, "requested": 0.95, "work": 1.60},
}


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
def test_traffic_stays_below_its_limits(passes):
    from benchmarks.shapes import TRAFFIC_SHAPES
    from benchmarks.traffic import measure, row

    shape, backward = TRAFFIC_SHAPES[0], passes == "forward+backward"
    meter = measure(shape, backward=backward)
    found = row(shape, meter, backward=backward)
    limits = LIMITS[passes]
    assert found["launches"] <= limits["launches"]
    assert found["distinct_over_scattermoe"] <= limits["distinct"]
    assert found["requested_over_scattermoe"] <= limits["requested"]
    assert found["executed_over_needed_flops"] <= limits["work"]
    assert meter.total().atomic_ops == 0
