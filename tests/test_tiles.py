"""The table of tiles: deterministic, complete, and blind to the number of rows inside a bucket."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from segmoe_kernels._triton import tile_table, tiles

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WIDTHS = (1, 8, 16, 40, 64, 100, 128, 256)
VARIANTS = [
    {"gated": gated, "extras": extras}
    for gated, extras in itertools.product((False, True), repeat=2)
]
FUSED = ("expert_ffn_fwd_tile", "expert_ffn_dx_tile", "expert_ffn_dw_tile")


def is_power(number):
    return number > 0 and number & (number - 1) == 0


def assert_sound(tile):
    if isinstance(tile, tuple) and not hasattr(tile, "options"):  # an entry of the table
        tile = tile_table.TileConfig(*tile[:2], 16, *tile[2:])
    *blocks, warps, stages, registers = tile
    assert registers == 0 or 64 <= registers <= min(255, 2048 // warps)
    assert all(is_power(size) and size >= 16 for size in blocks)
    assert warps in {4, 8, 16}
    assert 1 <= stages <= 4


@pytest.fixture(params=tile_table.TILES_OF)
def arch(request, monkeypatch):
    monkeypatch.setenv("SEGMOE_ARCH", request.param)
    return request.param


def most_columns(operation):
    if operation.startswith("expert_ffn_dw"):
        return tiles.MAX_FUSED_DW_WIDTH
    return tiles.MAX_FUSED_WIDTH


def test_every_entry_of_the_tables_is_sound():
    for key, widths in tile_table.FUSED_TILES.items():
        most = most_columns(key[0])
        assert set(widths) == {width for width in (64, 128, 256) if width <= most}, key
        for entries in widths.values():
            assert len(entries) == 4, key
            for entry in entries:
                assert_sound(entry)
    for key, rows in tile_table.GEMM_TILES.items():
        assert set(rows) == {16, 32, 64, 128}, key
        for tile in rows.values():
            assert_sound(tile)


@pytest.mark.parametrize("name", FUSED)
def test_fused_tiles_are_sound_for_every_width_and_dtype(name, arch):  # noqa: ARG001
    widths = [width for width in WIDTHS if width <= most_columns(name)]
    dtypes = [d for d in DTYPES if d != torch.float32 or name != "expert_ffn_dw_tile"]
    for d_model, d_ff, dtype, variant in itertools.product(widths, (1, 48, 512), dtypes, VARIANTS):
        tile = getattr(tiles, name)(d_model, d_ff, dtype, **variant)
        assert_sound(tile)
        assert tile.block_k >= d_model
        assert tile.block_n <= max(16, 2 * d_ff)
        assert tile == getattr(tiles, name)(d_model, d_ff, dtype, **variant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm_tiles_are_the_same_within_a_bucket_of_rows(dtype, arch):  # noqa: ARG001
    buckets = [(0, 16), (17, 32), (33, 64), (65, 10**9)]
    for n, k in itertools.product((16, 48, 96, 640, 4096), repeat=2):
        for least, most in buckets:
            rows = (least, (least + most) // 2, most)
            for choices in itertools.product((False, True), repeat=3):
                options = dict(zip(("gated", "activated", "dropout"), choices, strict=True))
                answers = {tiles.grouped_gemm_tile(n, k, r, dtype, **options) for r in rows}
                assert len(answers) == 1
                assert_sound(next(iter(answers)))
            for variant in VARIANTS:
                answers = {tiles.grouped_gemm_dhidden_tile(n, k, r, dtype, **variant) for r in rows}
                assert len(answers) == 1
                assert_sound(next(iter(answers)))
        for bias, gathered in itertools.product((False, True), repeat=2):
            assert_sound(tiles.grouped_gemm_dw_tile(n, k, dtype, bias=bias, gathered=gathered))


@pytest.mark.parametrize(
    ("tile", "columns", "splits"),
    [
        ((64, 64, 64, 4, 1), 2, 132),  # two of 4 warps fit the registers of a multiprocessor
        ((64, 64, 128, 4, 1), 4, 66),
        ((64, 32, 256, 8, 1), 16, 8),  # never a second wave: 128 programs, not 144
        ((32, 64, 64, 8, 2, 128), 8, 33),
        ((32, 16, 64, 16, 1), 1, 132),
        ((64, 16, 16, 4, 1), 1000, 1),
    ],
)
def test_splits_of_weight_gradients_are_one_wave(tile, columns, splits):
    tile = tile_table.TileConfig(*tile)
    assert tiles.num_row_splits(10**7, tile, columns) == splits
    # Two tiles a split at least.
    assert tiles.num_row_splits(5_000, tile, 1) <= 5_000 // (2 * tile.block_m)
    assert tiles.num_row_splits(1, tile, 1) == 1


def test_architecture_is_chosen_by_the_environment(monkeypatch):
    for name in tile_table.TILES_OF:
        monkeypatch.setenv("SEGMOE_ARCH", name)
        assert tile_table.architecture() == name
    monkeypatch.setenv("SEGMOE_ARCH", "sm_1")
    with pytest.raises(ValueError, match="SEGMOE_ARCH"):
        tile_table.architecture()


@pytest.mark.interpreter
def test_architecture_without_a_gpu(monkeypatch):
    monkeypatch.delenv("SEGMOE_ARCH", raising=False)
    assert tile_table.architecture() == "sm_90"


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"), ((8, 6), "sm_120"), ((8, 9), "sm_120"), ((9, 0), "sm_90"),
        ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((12, 0), "sm_120"), ((7, 5), "sm_80"),
    ],
)  # fmt: skip
def test_architecture_of_a_gpu(capability, name, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert tile_table._architecture_of.__wrapped__(0) == name


def test_registers_are_limited_where_the_table_says_so(arch):
    tile = tile_table.TileConfig(64, 64, 64, 8, 2)
    assert tile.options() == {"num_warps": 8, "num_stages": 2}
    limited = tile._replace(max_registers=255).options()
    if arch == "gfx942":  # the option is ptxas's
        assert limited == tile.options()
    else:
        assert limited == {**tile.options(), "maxnreg": 255}
        # What a multiprocessor has is shared by all warps of a program.
        assert tile._replace(max_registers=255, num_warps=16).options()["maxnreg"] == 128


def test_many_experts_are_routed_a_few_segments_at_a_time():
    for experts, dtype in itertools.product((4, 64, 256, 257, 512), DTYPES):
        tile = tiles.route_fwd_tile(64, experts, dtype)
        assert tiles.segments_per_block(1, experts) % tile.block_m == 0
        assert tile.block_m * max(16, experts) <= 8192
