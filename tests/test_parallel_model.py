"""The cost model of expert parallelism, worked by hand. test_parallel.py counts real bytes."""

import json

import pytest
from programs import run_python

from benchmarks.parallel_model import (
    Rates,
    Setting,
    exchanged_bytes,
    parameters,
    step,
    step_flops,
    travelling_slots,
)
from segmoe_kernels.parallel import expert_blocks

RATES = Rates(bandwidth=10.0, latency=5.0, flops=2.0)
# 60 segments of 2 steps of width 4, hidden 8, 3 experts, 16-bit numbers.
SETTING = Setting(60, 2, 4, 8, 3)


def test_blocks_are_those_of_the_layer():
    assert expert_blocks(5, 3) == [2, 2, 1]
    assert expert_blocks(2, 4) == [1, 1, 0, 0]


def test_bytes_by_hand():
    # 2 ranks have 2 and 1 of the experts: of 60 slots 20 and 40 go away, 40 and 20 are served.
    assert travelling_slots(SETTING, 2, 0) == pytest.approx((20, 40))
    assert travelling_slots(SETTING, 2, 1) == pytest.approx((40, 20))
    # A segment is 2 * 4 numbers of 2 bytes; one expert's count is 8 bytes.
    sent = exchanged_bytes(SETTING, 20, 40, 2, 0)
    assert sent == [1 * 8, 20 * 16, 20 * 4, 40 * 16, 20 * 16, 40 * 16, 40 * 4]


def test_time_by_hand():
    assert parameters(SETTING) == {"experts": 3 * 2 * 4 * 8, "others": 3 * 8}
    # Two products of 2 * 4 * 8 FLOPs on 120 rows, the router's 3 outputs of 8 columns; 3 times.
    flops = 3 * (120 * 2 * 2 * 32 + 120 * 2 * 4 * 3)
    assert step_flops(SETTING) == flops
    alone = step(SETTING, RATES, 1, experts_are_sharded=True)
    assert alone["step_s"] == pytest.approx(flops / 2e12)
    assert alone["exchange_bytes"] == alone["reduce_bytes"] == alone["collectives"] == 0
    both = step(SETTING, RATES, 2, experts_are_sharded=False)
    assert both["reduce_bytes"] == (192 + 24) * 4
    assert both["step_s"] == pytest.approx(flops / 2e12 + 216 * 4 / 10e9 + 5e-6)
    apart = step(SETTING, RATES, 2, experts_are_sharded=True)
    assert apart["reduce_bytes"] == 24 * 4
    assert apart["collectives"] == 8
    assert apart["busiest_rank_rows"] == pytest.approx(4 / 3)
    more = (4 / 3 - 1) * 3 * 120 * 2 * 2 * 32
    exchange = 8 + 40 * 16 + 20 * 4 + 80 * 16 + 40 * 4
    assert apart["exchange_bytes"] == pytest.approx(exchange)
    time = (flops + more) / 2e12 + (exchange + 96) / 10e9 + 8 * 5e-6
    assert apart["step_s"] == pytest.approx(time)
    assert apart["expert_bytes_held"] == pytest.approx(192 * 2 * 2 / 3)


def test_shared_expert_and_gate_count():
    wide = SETTING._replace(shared_steps=2, gated=True)
    assert parameters(wide) == {"experts": 3 * 3 * 32, "others": 24 + 3 * 4 * 32 + 8}
    each = 2 * 3 * 32
    assert step_flops(wide) == 3 * (120 * each + 120 * 2 * each + 120 * 2 * 4 * 3)


def command(*words, status=0):
    return run_python("-m", "benchmarks.parallel_model", *words, status=status)


def test_command_line(tmp_path):
    refused = command("--latency", "5", status=1)
    assert "needs --bandwidth, --flops: nothing is assumed" in refused.stderr
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps(RATES._asdict()))
    done = command("--rates", str(rates), "--worlds", "1,2", "--json", "-", "--segments", "60",
                   "--segment-size", "2", "--d-model", "4", "--d-ff", "8", "--num-experts", "3",
                   "--shared-steps", "0", "--layers", "1")  # fmt: skip
    rows = json.loads(done.stdout)["rows"]
    assert [(row["world"], row["experts"]) for row in rows] == [
        (1, "replicated"), (1, "sharded"), (2, "replicated"), (2, "sharded")
    ]  # fmt: skip
    assert rows[3]["step_s"] == step(SETTING, RATES, 2, experts_are_sharded=True)["step_s"]
    table = command("--rates", str(rates), "--worlds", "8")
    assert "not measured" in table.stdout
    assert len(table.stdout.splitlines()) == 4
    assert "exchange = (away + served)" in command("--formula").stdout
