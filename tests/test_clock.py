"""The model of the clock: by hand where that can be done, against published times where not."""

import json
from dataclasses import replace

import pytest
from benchmark_runs import needs_scattermoe
from programs import ROOT, run_python

pytest.importorskip("triton")

from benchmarks import report
from benchmarks.clock import render, sass, sm
from benchmarks.clock.machine import H200

# A loop that was unrolled by 4 and what it leaves over, and a guarded division.
LISTING = """
//# kernels.py 10
/*0000*/ LDC.64 R2, c[0x0][0x210];
/*0010*/ ULDC UR4, c[0x0][0x220];
/*0020*/ ISETP.NE.U32.AND P1, PT, R4, RZ, PT;
/*0030*/ @P1 BRA `(.L_x_1);
/*0040*/ I2F.U32.RP R0, UR4;
/*0050*/ MUFU.RCP R0, R0;
/*0060*/ BRA `(.L_x_2);
.L_x_1:
/*0070*/ CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64);
.L_x_2:
/*0080*/ IMAD.WIDE R6, R0, 0x4, R2;
//# kernels.py 12 split
.L_x_3:
/*0090*/ LDG.E R8, desc[UR6][R6.64];
/*00a0*/ LDG.E R9, desc[UR6][R6.64+0x4];
/*00b0*/ LDG.E R10, desc[UR6][R6.64+0x8];
/*00c0*/ LDG.E R11, desc[UR6][R6.64+0xc];
/*00d0*/ FADD R12, R8, R12;
//# kernels.py 12 split
/*00e0*/ @P0 BRA `(.L_x_3);
.L_x_4:
/*00f0*/ LDG.E R8, desc[UR6][R6.64];
/*0100*/ FADD R12, R8, R12;
/*0110*/ @P0 BRA `(.L_x_4);
//# kernels.py 13
/*0120*/ STG.E desc[UR6][R6.64], R12;
/*0130*/ EXIT;
.L_x_5:
/*0140*/ BRA `(.L_x_5);
$__internal_0_$__cuda_sm20_div_s64:
/*0150*/ IMAD.HI.U32 R0, R0, R4, RZ;
/*0160*/ RET.REL.NODEC R20;
"""
SIGNATURE = {"partials_ptr": "*fp32", "out_ptr": "*fp32", "num_splits": "i32", "BLOCK": "constexpr"}


def instructions(*texts):
    return [
        sass.Instruction("", opcode, tuple(rest.split(", ")) if rest else ())
        for opcode, _, rest in (text.partition(" ") for text in texts)
    ]


def clocks(*texts, programs=1, warps=1, machine=H200, levels=None):
    code = [sm.decode(i, machine, levels or {}) for i in instructions(*texts)]
    return sm.simulate(code, programs, warps)


def test_a_listing_becomes_a_tree_of_loops():
    pointers = sass.parameter_offsets(SIGNATURE)
    assert pointers == {0x210: "partials_ptr", 0x218: "out_ptr"}
    root = sass.read_kernel(LISTING, pointers)
    main, rest = root.inner
    assert (main.name, main.unrolled, main.rest_of) == ("split", 4, 0)
    assert (rest.name, rest.unrolled, rest.rest_of) == ("split", 1, 4)
    assert [loop.turns(11) for loop in (main, rest)] == [2, 3]
    outside = [part.name for part in root.body if isinstance(part, sass.Instruction)]
    # The slow division is left out, and so are its routine and the loop behind the end.
    assert outside == [
        "LDC",
        "ULDC",
        "ISETP",
        "BRA",
        "I2F",
        "MUFU",
        "BRA",
        "IMAD",
        "STG",
        "EXIT",
        "BRA",
    ]
    assert {name for i in main.body for name in i.reads_from} == {"partials_ptr"}


def test_a_division_without_a_short_way_counts_with_its_routine():
    unguarded = LISTING.replace("MUFU.RCP R0, R0", "MOV R0, R0")
    root = sass.read_kernel(unguarded, {})
    assert sum(isinstance(p, sass.Instruction) and p.name == "RET" for p in root.body) == 1


def test_a_loop_that_no_source_line_explains_is_refused():
    with pytest.raises(ValueError, match="has no variable"):
        sass.read_kernel(LISTING.replace(" 12 split", " 12"), {})


def test_registers_of_instructions():
    for text, writes, reads in (
        ("LDG.E.128 R4, desc[UR6][R2.64]", "R4 R5 R6 R7", "UR6 R2 R3"),
        ("IMAD.WIDE R6, R0, 0x4, R2", "R6 R7", "R0 R2 R3"),
        ("ISETP.GE.AND P0, PT, R1, UR4, PT", "P0", "R1 UR4"),
        ("HMMA.16816.F32.BF16 R8, R4, R2, R8", "R8 R9 R10 R11", "R4 R5 R6 R7 R2 R3 R8 R9 R10 R11"),
        ("STS.64 [R1], R2", "", "R1 R2 R3"),
    ):
        (instruction,) = instructions(text)
        assert sass.registers(instruction) == (writes.split(), reads.split()), text


def test_what_waits_for_what():
    load = "LDG.E R4, desc[UR6][R2.64]"
    # The load holds its pipe for 2 clocks, then its value is on its way.
    assert clocks(load, "FADD R5, R4, R4") == 2 + H200.l2_latency
    assert clocks(load, "FADD R5, R6, R6") == 1
    loaded = replace(instructions(load)[0], reads_from=frozenset({"x_ptr"}))
    for level, latency in (("l1", 38), ("dram", 700)):
        decoded = sm.decode(loaded, H200, {"x_ptr": level})
        assert decoded.latency == latency
    # A copy is waited for where its group is.
    copy = ("LDGSTS.E.128 [R1], desc[UR6][R2.64]", "LDGDEPBAR")
    assert clocks(*copy, "DEPBAR.LE SB0, 0x0", "FADD R5, R6, R6") == 8 + H200.l2_latency + 1
    assert clocks(*copy, "DEPBAR.LE SB0, 0x1", "FADD R5, R6, R6") < 10


def test_pipes_have_widths():
    integer = [f"LOP3.LUT R{n + 8}, R5, R6, RZ, 0xc0, !PT" for n in range(64)]
    assert clocks(*integer) == pytest.approx(64 * 2, abs=3)
    # Warps of other ports have pipes of their own, those of the same port share.
    assert clocks(*integer, warps=4) == pytest.approx(64 * 2, abs=3)
    assert clocks(*integer, warps=8) == pytest.approx(128 * 2, abs=3)
    assert clocks(*integer, programs=2, warps=4) == pytest.approx(128 * 2, abs=3)
    # The memory pipe is one for all.
    assert clocks(*["STS.128 [R1], R4"] * 32, warps=8) == pytest.approx(32 * 8 * 4, abs=30)
    product = [
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0",
    ]
    wait = ["WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R5, R24, R24"]
    assert clocks(*product, *wait, warps=4) == pytest.approx(2 * 64 + 30, abs=3)


def test_a_barrier_waits_for_the_last_warp():
    slow = ["LDG.E R4, desc[UR6][R2.64]", "FADD R5, R4, R4", "BAR.SYNC.DEFER_BLOCKING 0x0"]
    alone = clocks(*slow, "FADD R6, R7, R7", warps=1)
    assert alone == 2 + H200.l2_latency + 1 + H200.barrier_latency
    both = clocks(*slow, "FADD R6, R7, R7", warps=2)
    assert alone < both <= alone + 3


def make_kernel(body):
    loop = sass.Loop("tile", instructions(*body))
    root = sass.Loop("", [*instructions("FADD R1, R2, R2"), loop, *instructions("FADD R1, R2, R2")])
    return sass.Kernel("", "made_up", 32, 0, 4, 0, root)


def test_long_loops_are_continued_at_their_pace(monkeypatch, tmp_path):
    monkeypatch.setattr(sm, "CACHE", tmp_path)
    sm._stored.cache_clear()
    kernel = make_kernel(["LDG.E R4, desc[UR6][R2.64]", "FADD R5, R4, R5", "MUFU.EX2 R6, R5"])
    found = sm.run(kernel, 2, H200, {}, {"tile": 100})
    code = [*kernel.root.body[:1], *kernel.root.inner[0].body * 100, *kernel.root.body[2:]]
    whole = sm.simulate([sm.decode(i, H200, {}) for i in code], 2, 4)
    assert found.clocks == pytest.approx(whole, rel=0.01)
    assert found.busy["special"] == pytest.approx(100 * 8 * 2)
    # Kept, with the machine that it was for.
    (kept,) = (tmp_path / "runs").glob("*.json")
    before = kept.read_text()
    assert sm.run(kernel, 2, H200, {}, {"tile": 200}).clocks == pytest.approx(2 * whole, rel=0.02)
    assert kept.read_text() == before
    sm.run(kernel, 2, replace(H200, special_busy=16.0), {}, {"tile": 100})
    assert kept.read_text() != before
    with pytest.raises(ValueError, match="a loop over 'tile': say how often"):
        sm.run(kernel, 2, H200, {}, {})


@pytest.fixture(scope="module")
def facts():
    return json.loads(run_python("tests/clock_facts.py").stdout)


def test_launches_are_caught_without_running(facts):
    forward, backward = facts["names"]
    assert forward[0] == "route_fwd_kernel"
    assert forward[-1] == "_combine_fwd_kernel"
    assert backward.count("expert_ffn_dw_kernel") == 1
    assert facts["x_bytes"] == 1_000_020 * 64 * 2
    # Of 200,004 segments the hidden layer of the shared expert, in 16 bits.
    assert facts["mm"]["written"] == 200_004 * 640 * 2
    assert "_combine_fwd_kernel" not in facts["single"]


def test_other_tiles_change_what_follows_from_them(facts):
    assert facts["no such number"].startswith("sum_splits_kernel has no 'BLOCK_Q'; it has ")
    narrow, wide = facts["dw_grids"]
    assert wide[1] < narrow[1]
    assert wide[0] > narrow[0]
    assert facts["digests"][0] != facts["digests"][1]


def test_a_compiled_kernel_is_read(facts):
    """One loop, which reads partial sums alone."""
    assert facts["loops"] == [["", 1], ["start", 1]]
    assert facts["reads"] == ["partials_ptr"]
    assert facts["read again"]
    assert facts["resident"] == min(65536 // (-(-facts["registers"] // 8) * 8 * 128), 16)
    few, some, many = facts["sum_splits_us"]
    assert few < some < many
    # A chain of turns of 32 splits: the difference is the same for each.
    assert (many - some) / 6 == pytest.approx((some - few) / 5, rel=0.15)
    assert facts["no trips"] == "sum_splits_kernel has a loop over 'start': say how often it runs"


def test_published_times_are_met(facts):
    """Within the tolerances that `checks` states, and nearly so with other guesses."""
    rows = facts["checks"].pop("as it is")
    assert [row["configuration"] for row in rows if not row["holds"]] == []
    assert len(rows) == 4
    for name, others in facts["checks"].items():
        for row, other in zip(rows, others, strict=True):
            assert other["modelled"] == pytest.approx(row["modelled"], rel=0.25), name
    moved = {name: o[3]["modelled"] for name, o in facts["checks"].items()}
    assert moved["integer pipe at full rate"] <= rows[3]["modelled"]


def test_modelled_beside_measured(facts):
    """Operators of PyTorch are one row; what the model doesn't know is among them."""
    rows = {row.pop("kernel"): row for row in facts["compared"]}
    assert list(rows) == ["aten", "sum_splits_kernel"]
    us = facts["sum_splits_us"][1]
    aten = rows["aten"]
    assert (aten["modelled_us"], aten["measured_us"]) == (13.5, 40.0)
    assert aten["measured_over_modelled"] == pytest.approx(40 / 13.5)
    assert rows["sum_splits_kernel"]["measured_us"] == 7.0
    assert rows["sum_splits_kernel"]["modelled_us"] == pytest.approx(us, abs=0.005)  # rounded
    (parts,) = rows["sum_splits_kernel"]["parts"]
    assert max(parts) == pytest.approx(us, abs=0.005)
    assert facts["why not"] in {"no GPU", None} or "sm_90" in facts["why not"]


def test_shared_experts_are_modelled(facts):
    names, us = facts["shared"]
    assert names.count("mm") >= 2
    assert "shared_activate_kernel" in names
    assert us > 0


def layer_row(provider, passed, us, launches, calls=()):
    return {
        "kind": "layer", "configuration": "64-4-1-5-1e4", "provider": provider, "pass": passed,
        "launches": launches, "modelled_us": us, "calls": list(calls),
        **{f"modelled_us_with_{n}us_launches": us + n * launches for n in (1, 2)},
    }  # fmt: skip


def test_report_shows_both_costs_of_a_launch(tmp_path):
    calls = [{"name": "route_fwd_kernel", "modelled_us": 10.0, "bound": "latency"}]
    rows = [
        layer_row("segmoe", "forward", 10.0, 2, calls),
        layer_row("segmoe", "backward", 20.0, 4),
        layer_row("scattermoe", "forward", 30.0, 20),
        layer_row("scattermoe", "backward", 40.0, 30),
        {"kind": "check", "configuration": "attention", "unit": "TFLOP/s", "published": [4, 5],
         "modelled": 4.5, "holds": True},
    ]  # fmt: skip
    assert render.is_modelled(rows)
    (tmp_path / "sm_90.json").write_text(json.dumps({"environment": {}, "rows": rows}))
    report.write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Modelled, not measured")
    assert "| 64-4-1-5-1e4 | 12 / 24 | 50 / 70 | 4.17, 3.33 |" in text
    assert "| 64-4-1-5-1e4 | 14 / 28 | 70 / 100 | 5.00, 4.05 |" in text
    assert "route_fwd 10 (latency)" in text
    assert "| attention, TFLOP/s | 4 to 5 | 4.5 |" in text


def test_committed_rows_are_modelled_and_complete():
    path = ROOT / "benchmarks" / "results" / "clock" / "sm_90.json"
    content = json.loads(path.read_text())
    assert {"torch", "triton", "ptxas", "modelled_gpu"} <= set(content["environment"])
    for row in content["rows"]:
        if row["kind"] == "layer" and "pass" in row:
            total = sum(call["modelled_us"] for call in row["calls"])
            assert row["modelled_us"] == pytest.approx(total, rel=0.01)
            assert len(row["kernels"]) == 12
    assert render.sections(content["rows"])


def command(*words, status=0):
    return run_python("-m", "benchmarks.clock", *words, status=status)


@pytest.mark.slow
def test_command_line(tmp_path):
    out = tmp_path / "rows.json"
    command(
        "table", "--shapes", "64-4-1-5-1e4", "--providers", "auto,scattermoe", "--json", str(out)
    )
    rows = json.loads(out.read_text())["rows"]
    assert {row["provider"] for row in rows} == {"auto", "scattermoe"}
    tried = command("kernel", "sum_splits", "--shape", "64-4-1-5-1e4", "--set", "num_warps=1,4")
    assert tried.stdout.count(" us ") == 3
    command("kernel", "nothing", "--shape", "64-4-1-5-1e4", status=1)


@pytest.mark.slow
@needs_scattermoe
def test_scattermoe_is_caught_with_all_its_operators():
    done = command("layer", "--shape", "64-4-1-5-1e4", "--provider", "scattermoe")
    lines = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert lines.count("_scatter2scatter") == 4
    assert lines.count("_groupXtY") == lines.count("_group") == 2
    for operator in ("sort", "bincount", "topk", "gelu", "gelu_backward", "bmm"):
        assert f"aten.{operator}" in lines
