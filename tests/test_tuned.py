"""Tiles from a file: they replace the table's, only where asked, and no result depends on them."""

import json

import pytest
import torch

pytest.importorskip("triton")


from benchmarks import tune
from segmoe_kernels import SegMoE
from segmoe_kernels import __main__ as command
from segmoe_kernels._triton import tiles, tuned
from segmoe_kernels.testing import make_inputs

FUSED = {"gated": False, "extras": False}
DX = "expert_ffn_dx_tile(d_model=64, d_ff=128, dtype=bfloat16, gated=False, extras=False)"


@pytest.fixture
def tile_file(tmp_path, monkeypatch):
    """Write tiles for one architecture, and let the environment name the file."""
    monkeypatch.setenv("SEGMOE_ARCH", "sm_90")
    tuned._read_once.cache_clear()

    def write(questions, arch="sm_90"):
        path = tmp_path / f"tiles{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"tiles": {arch: questions}}))
        monkeypatch.setenv("SEGMOE_TILES", str(path))
        return path

    return write


def test_a_file_changes_the_answer_it_names_and_no_other(tile_file, monkeypatch):
    def answers():
        return [
            tiles.expert_ffn_dx_tile(width, 128, dtype, **FUSED)
            for width in (64, 128)
            for dtype in (torch.bfloat16, torch.float16)
        ]

    shipped = answers()
    tile_file({DX: {"block_m": 32, "num_warps": 2}})
    changed = answers()
    assert changed[0] == shipped[0]._replace(block_m=32, num_warps=2) != shipped[0]
    assert changed[1:] == shipped[1:]
    monkeypatch.setenv("SEGMOE_ARCH", "sm_80")
    assert tiles.expert_ffn_dx_tile(64, 128, torch.bfloat16, **FUSED).num_warps == 4


def test_positional_and_named_arguments_ask_the_same(tile_file):
    tile_file({DX: {"num_stages": 3}})
    named = tiles.expert_ffn_dx_tile(d_model=64, d_ff=128, dtype=torch.bfloat16, **FUSED)
    assert named == tiles.expert_ffn_dx_tile(64, 128, torch.bfloat16, **FUSED)
    assert named.num_stages == 3


def test_the_number_of_rows_is_in_no_question_but_by_its_bucket():
    def asked(function, *args, **kwargs):
        return tuned.question(function, *args, **kwargs)

    wide = {"gated": False, "activated": True, "dropout": False}
    buckets = [
        asked(tiles.grouped_gemm_tile, 64, 64, rows, torch.float16, **wide)
        for rows in (1, 16, 17, 100, 10**6)
    ]
    assert buckets[0] == buckets[1] != buckets[2]
    assert buckets[3] == buckets[4]


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        ({"block_up_tile()": {"block_m": 32}}, "values of no function of the table for 'block_up"),
        ({DX: {}}, "got {}"),
        ({DX: 3}, "got 3"),
        ({DX: {"block_k": 64}}, "the field 'block_k', not one of block_m, block_n"),
        ({DX: {"block_m": 24}}, "block_m=24, not a power of two from 16 to 1024"),
        ({DX: {"block_n": 8}}, "block_n=8, not a power of two from 16 to 1024"),
        ({DX: {"block_m": "64"}}, "block_m='64', not a power of two"),
        ({DX: {"block_m": True}}, "block_m=True, not a power of two"),
        ({DX: {"num_warps": 64}}, "num_warps=64, not a power of two from 1 to 32"),
        ({DX: {"num_stages": 0}}, "num_stages=0, not a whole number from 1 to 8"),
        ([], r"got \[\] for sm_90"),
    ],
    ids=str,
)
def test_a_file_that_no_search_writes_is_refused(questions, words, tile_file):
    path = tile_file(questions)
    with pytest.raises(ValueError, match=words) as caught:
        tiles.route_bwd_tile(64, 4, torch.float32)
    assert f"SEGMOE_TILES={str(path)!r}" in str(caught.value)


def test_an_unknown_architecture_is_refused(tile_file):
    tile_file({}, arch="sm_70")
    with pytest.raises(ValueError, match="the architecture 'sm_70', not one of sm_80, sm_90"):
        tiles.route_bwd_tile(64, 4, torch.float32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSONDecodeError"),
        ("{}", "KeyError: 'tiles'"),
        ('{"tiles": 1}', "tiles of type int"),
        ('{"tiles":' + "[" * 100_000, "RecursionError"),
    ],
    ids=["cut", "empty", "number", "deeply nested"],
)
def test_an_unreadable_file_is_refused(text, words, tile_file, tmp_path, monkeypatch):
    tile_file({}).write_text(text)
    with pytest.raises(ValueError, match=words):
        tiles.route_bwd_tile(64, 4, torch.float32)
    monkeypatch.setenv("SEGMOE_TILES", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="No such file or directory when it was opened"):
        tiles.route_bwd_tile(64, 4, torch.float32)


# Layers


def run(layer, inputs):
    """Output and gradients, with the same random numbers each time."""
    torch.manual_seed(1)
    x = inputs.x.clone().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], inputs.dy)


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{"gated": True, "top_k": 2}, {"dropout": 0.3}], ids=str)
def test_results_do_not_depend_on_the_tiles(options, device, tile_file):
    torch.manual_seed(0)
    layer = SegMoE(32, 48, 4, segment_size=3, backend="triton", device=device, **options).train()
    inputs = make_inputs(2, 40, 32, device=device)
    found = []
    asked = tune.asked_functions(lambda: found.append(run(layer, inputs)))
    fields = tuned.replaceable_fields()
    assert len(asked) >= 3
    smallest = {
        question: {f: 16 for f in fields[name] if f.startswith("block")}
        for name, (_, questions) in asked.items()
        for question in questions
    }
    tile_file({q: {**blocks, "num_warps": 4} for q, blocks in smallest.items()})
    replaced = tune.asked_functions(lambda: found.append(run(layer, inputs)))
    for name, (tile, _) in replaced.items():
        assert all(getattr(tile, f) == 16 for f in fields[name] if f.startswith("block"))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# The file


@pytest.mark.slow
@pytest.mark.interpreter
def test_a_search_writes_tiles_that_are_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SEGMOE_ARCH", "sm_90")
    path = tmp_path / "tiles.json"
    # Every candidate is faster than the one before.
    times = iter(range(1000, 0, -1))
    monkeypatch.setattr(tune, "summary", lambda _: {"time_median_ms": 0.9 ** -next(times)})
    options = ["--device", "cpu", "--shapes", "tiny-k2", "--dtype", "float32", "--only", "dw_tile"]
    options += ["--most", "2", "--rounds", "2", "--budget", "0", "--out", str(tmp_path)]
    assert tune.main([*options, "--write", str(path)]) == 0
    assert f"SEGMOE_TILES={path}" in capsys.readouterr().out
    ((asked, fields),) = tuned.read_tiles(str(path))["sm_90"].items()
    assert asked.startswith("grouped_gemm_dw_tile(n=")
    monkeypatch.setenv("SEGMOE_TILES", str(path))
    words = dict(word.strip().split("=") for word in asked.partition("(")[2][:-1].split(","))
    sizes = int(words["n"]), int(words["k"])
    flags = {name: words[name] == "True" for name in ("bias", "gathered")}
    tile = tiles.grouped_gemm_dw_tile(*sizes, torch.float32, **flags)
    assert {field: getattr(tile, field) for field in fields} == fields


def test_winners_are_put_beside_those_of_earlier_searches(tmp_path, tile_file):
    path = tmp_path / "folder" / "tiles.json"
    tile_file({})
    other = DX.replace("d_model=64", "d_model=128")
    tune.write_tiles(path, "sm_90", [DX], {"block_m": 32})
    tune.write_tiles(path, "sm_90", [other], {"num_warps": 8})
    tune.write_tiles(path, "sm_80", [DX], {"block_m": 16})
    tune.write_tiles(path, "sm_90", [DX], {"num_warps": 2})
    assert tuned.read_tiles(str(path)) == {
        "sm_80": {DX: {"block_m": 16}},
        "sm_90": {DX: {"block_m": 32, "num_warps": 2}, other: {"num_warps": 8}},
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["tiles.json"]


def test_a_wrong_file_is_not_written_over(tmp_path, capsys):
    path = tmp_path / "notes.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="SEGMOE_TILES"):
        tune.write_tiles(path, "sm_90", [DX], {"block_m": 32})
    # Said before the search begins.
    assert tune.main(["--device", "cpu", "--write", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: segmoe_kernels: SEGMOE_TILES=")
    assert path.read_text() == "[1, 2]"


def test_doctor_says_whose_tiles_are_taken(tile_file, monkeypatch, capsys):
    path = tile_file({DX: {"block_m": 32}})
    assert tiles.describe_source() == f"the table's for sm_90, but 1 of its answers from {path}"
    monkeypatch.delenv("SEGMOE_TILES")
    assert tiles.describe_source() == "the table's for sm_90"
    monkeypatch.setenv("SEGMOE_TILES", "none.json")
    assert command.main(["doctor"]) == 1
    assert "SEGMOE_TILES='none.json': expected a file" in capsys.readouterr().out
