"""Machine code of the kernels for GPUs that need not be there: no spill, tensor cores in use."""

import ast
import json
import shutil

import pytest
from programs import ROOT, run_python

triton = pytest.importorskip("triton")

# Kernels whose products are large wherever a program works on 64 rows or more.
LARGE = ("expert_ffn", "grouped_gemm")


@pytest.fixture(scope="module", params=["sm_90", "sm_80"])
def rows(request, tmp_path_factory):
    """What is committed; launches or kernels that it isn't of are compiled."""
    committed = ROOT / "benchmarks" / "results" / "codegen" / f"{request.param}.json"
    path = tmp_path_factory.mktemp("codegen") / committed.name
    shutil.copy(committed, path)
    words = ["--arch", request.param, "--brief", "--json", path]
    done = run_python("-m", "benchmarks.codegen", *words, status=None)
    # 1 is a fault, which a test below names.
    assert done.returncode in {0, 1}, done.stderr[-2000:]
    if triton.__version__ == "3.7.1":
        assert path.read_text() == committed.read_text(), "run: make codegen"
    return json.loads(path.read_text())


def test_no_kernel_spills_or_takes_too_much_shared_memory(rows):
    assert not [(row["kernel"], row["case"], row["fault"]) for row in rows if row["fault"]]


@pytest.mark.slow
def test_compiled_anew_a_kernel_has_its_committed_row(tmp_path, rows):
    path, case = tmp_path / "rows.json", "bfloat16 D=64 plain"
    words = ["--arch", rows[0]["arch"], "--only", case, "--brief", "--json", path]
    run_python("-m", "benchmarks.codegen", *words)
    assert json.loads(path.read_text()) == [row for row in rows if row["case"] == case]


def test_no_kernel_adds_floats_atomically(rows):
    assert sum(row["float_atomics"] for row in rows) == 0


def test_float64_launches_are_float64_throughout(rows):
    """Options and flags included: of 8 bits, flags keep a product from being compiled."""
    found = [row for row in rows if row["dtype"] == "fp64"]
    assert not [(row["kernel"], row["case"], row["narrow"]) for row in found if row["narrow"]]
    masked = set()
    for path in (ROOT / "segmoe_kernels" / "stages").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            name = getattr(node, "name", "")
            if name.endswith("_kernel") and "padding_mask_ptr" in ast.unparse(node.args):
                masked.add(name.removeprefix("_"))
    assert masked <= {row["kernel"] for row in found if " mask" in row["case"]}
    compiled = {row["kernel"] for row in found if row["instructions"]}
    assert compiled == {"route_fwd_kernel", "grouped_gemm_dw_kernel", "shared_activate_bwd_kernel"}


def test_large_products_use_tensor_cores(rows):
    checked = set()
    for row in rows:
        tile = dict(word.split("=") for word in row["tile"].split())
        if (
            row["dtype"] == "bf16"
            and row["kernel"].startswith(LARGE)
            and int(tile["BLOCK_M"]) >= 64
        ):
            checked.add(row["kernel"])
            assert row["wgmma" if row["arch"] == "sm_90" else "mma"] > 0, row
    assert {"expert_ffn_fwd_kernel", "expert_ffn_dw_kernel"} <= checked


BATCHES = """
import torch
from benchmarks import codegen
from segmoe_kernels import SegMoE

for d_model, options in (
    (64, {"top_k": 2, "bias": True}),
    (64, {"shared_expert": "token", "dropout": 0.1, "pooling": "mean"}),
    (128, {"gated": True, "causal": True, "shared_expert": None}),
):
    layer = SegMoE(
        d_model, 128, 4, segment_size=3, backend="triton", dtype=torch.bfloat16, **options
    )
    for batch, length in ((2, 31), (1, 1), (3, 48), (7, 64), (16, 96)):
        keys = set()
        x = torch.zeros(batch, length, d_model, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.ones(batch, length, dtype=torch.bool)
        with codegen.pretend_triton_runs("sm_90"):
            with codegen.caught_launches(lambda launch: keys.add(launch.key())):
                y = layer(x, mask)
                y.backward(torch.zeros_like(y))
        print(len(keys), hash(frozenset(keys)))
"""


def test_no_batch_compiles_a_kernel_anew():
    """Lengths of 1 and of multiples of 16, and any number of sequences."""
    lines = run_python("-c", BATCHES).stdout.splitlines()
    assert len(lines) == 15
    for layer in (lines[:5], lines[5:10], lines[10:]):
        assert int(layer[0].split()[0]) >= 8
        assert set(layer) == {layer[0]}
