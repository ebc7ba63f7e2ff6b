"""Run the kernels under NVIDIA's compute-sanitizer: memcheck, racecheck, initcheck, synccheck.

    make sanitize                             all four; writes sanitizer.json
    python tests/sanitize.py --tools memcheck --deadline 500

Needs a GPU and compute-sanitizer: of the CUDA toolkit, or of nvidia-cuda-sanitizer-api-cu12 on PyPI
(``--sanitizer`` says where its command is). A run without the sanitizer comes first and compiles.
Then each tool sees one layer of each kind, forward and backward, in each dtype; every tensor has an
allocation of its own, so that what is beyond it is no other tensor. Two planted faults, a store
beyond a tensor and a read of what nobody wrote, must be found, or "clean" would mean nothing.

Results go to the folder in the environment variable OUT, else ``benchmarks/results/<device>/``.
Exit status 1 if a tool found something, or missed a planted fault.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

from benchmarks.common import environment  # noqa: E402
from benchmarks.store import code_version, results_folder  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# A fault of each kind that a tool of the four must see, by the name of `plant`'s argument.
PLANTED = {"memcheck": "beyond", "initcheck": "unwritten"}
FOUND = 9
# Our kernels alone: PyTorch's and cuBLAS's have names with capitals.
OURS = r"regex=^_?[a-z][a-z0-9_]*_kernel$"
SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
# Seconds that a tool may take.
PATIENCE = 500.0

GATED = {"top_k": 2, "gated": True, "activation": "silu", "bias": True, "shared_expert": "token"}
# Every kernel, and each branch that reads or writes memory in another way.
LAYERS = (
    {},
    GATED,
    {"top_k": 1, "shared_expert": None, "pooling": "max", "segment_size": 5},
    {"causal": True, "shared_expert": None, "pooling": "mean"},
    {"expert_scope": "segment", "bias": True},
    {"expert_scope": "projected", "gated": True},
    {"d_model": 264, "d_ff": 72, "shared_expert": None},
)
DTYPES = ("bfloat16", "float32")
SHAPE = (3, 41)
DEFAULTS = {"d_model": 40, "d_ff": 72, "num_experts": 4, "top_k": 1, "segment_size": 3}
# More than one program of `permute` counts alone.
SLOTS = 1025 * 32


def say(text: str) -> None:
    """Print at once, whatever the output goes to."""
    print(text, flush=True)  # noqa: T201  a command prints


def run_layers(device: str, most: int | None = None) -> int:
    """Run the first layers forward and backward, without a tool or inside one; return how many."""
    from segmoe_kernels import SegMoE
    from segmoe_kernels.testing import make_inputs, run_layer

    layers = LAYERS[:most]
    for options in layers:
        settings = {**DEFAULTS, **options}
        for name in DTYPES:
            dtype = getattr(torch, name)
            layer = SegMoE(**settings, backend="triton", dtype=dtype, device=device)
            shape = (*SHAPE, settings["d_model"])
            inputs = make_inputs(*shape, dtype=dtype, device=device, masked=0.2)
            run_layer(layer, *inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    return len(layers) * len(DTYPES)


def run_stages(device: str) -> None:
    """Run what a layer leaves out: stages that a neighbour does the work of."""
    from segmoe_kernels import functional

    ids = torch.randint(-1, 4, (SLOTS, 1), dtype=torch.int32, device=device)
    functional.permute(ids, 4, backend="triton")
    batch, steps, width = 3, 41, 40
    expert_out = torch.randn(2, batch, steps, width, device=device, requires_grad=True)
    shared_out = torch.randn(batch, 14, 3 * width, device=device, requires_grad=True)
    logits = torch.randn(batch, 14, device=device, requires_grad=True)
    mask = torch.rand(batch, steps, device=device) < 0.8
    y = functional.combine(expert_out, shared_out, logits, padding_mask=mask, backend="triton")
    y.backward(torch.randn_like(y))
    if device == "cuda":
        torch.cuda.synchronize()


def plant(fault: str, device: str) -> None:
    """Commit a fault that a tool must report."""
    import triton
    import triton.language as tl

    @triton.jit
    def planted_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < 30)
        tl.store(y_ptr + offs, x + 1.0, mask=offs < count)

    y = torch.zeros(30, device=device)
    x = torch.ones(30, device=device) if fault == "beyond" else torch.empty(30, device=device)
    planted_kernel[(1,)](x, y, 32 if fault == "beyond" else 30, BLOCK=32)
    if device == "cuda":
        torch.cuda.synchronize()


def command_of(tool: str, sanitizer: Path, worker: list[str]) -> list[str]:
    """The worker's command inside a tool."""
    command = [str(sanitizer), "--tool", tool, "--error-exitcode", str(FOUND)]
    command += ["--kernel-name", OURS, "--target-processes", "application-only"]
    # The wheel keeps its libraries beside the command's folder, where it doesn't look.
    libraries = sanitizer.resolve().parents[1] / "lib"
    if (libraries / "libsanitizer-collection.so").exists():
        command += ["--injection-path", str(libraries)]
    if tool == "memcheck":
        command += ["--padding", "256"]
    return [*command, *worker]


def find_sanitizer(given: str | None) -> Path | None:
    """The path of the command, or None."""
    wheel = Path("nvidia", "cuda_sanitizer_api", "bin", "compute-sanitizer")
    candidates = [given] if given else [shutil.which("compute-sanitizer")]
    if not given:
        candidates += [*map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
        candidates += [str(Path(folder, wheel)) for folder in sys.path]
    found = (Path(name) for name in candidates if name)
    return next((path for path in found if path.is_file()), None)


def run_tool(command: list[str], limit_s: float) -> dict[str, object]:
    """Run a command; return what became of it, and the first lines of what was found."""
    began = time.monotonic()
    # Every tensor an allocation of its own; and not the interpreter.
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
    try:
        done = subprocess.run(
            command, check=False, cwd=ROOT, env=variables, text=True, timeout=limit_s,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"status": "stopped", "seconds": round(time.monotonic() - began)}
    summary = SUMMARY.findall(done.stdout)
    reports = [line for line in done.stdout.splitlines() if line.startswith("=====")]
    if not summary:
        # Without it nothing was looked at, whatever the exit status says.
        status, reports = "failed", done.stdout.splitlines()[-20:]
    elif done.returncode == 0 and not int(summary[-1]):
        status, reports = "clean", []
    else:
        status = "found"
    return {
        "status": status,
        "exit_status": done.returncode,
        "errors": int(summary[-1]) if summary else None,
        "lines": reports[:40],
        "seconds": round(time.monotonic() - began),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tools", default=",".join(TOOLS), metavar="LIST", help="which of them")
    parser.add_argument("--sanitizer", metavar="FILE", help="compute-sanitizer's command")
    parser.add_argument("--layers", type=int, metavar="N", help="the first kinds alone, no stages")
    parser.add_argument("--deadline", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    parser.add_argument("--out", metavar="FOLDER", help="of the results")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plant", choices=sorted(PLANTED.values()), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.plant:
        plant(args.plant, args.device)
        return 0
    if args.work:
        if args.layers is None:
            run_stages(args.device)
        say(f"{run_layers(args.device, args.layers)} layers")
        return 0
    tools = args.tools.split(",")
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        parser.error(f"--tools must name {', '.join(TOOLS)}, got {unknown[0]!r}")
    sanitizer = find_sanitizer(args.sanitizer)
    if sanitizer is None:
        say("no compute-sanitizer: it is in the CUDA toolkit and in nvidia-cuda-sanitizer-api-cu12")
        return 1
    if args.device == "cuda" and not torch.cuda.is_available():
        say("no GPU here: the sanitizer looks at kernels that run on one")
        return 1
    return _check(tools, sanitizer, args)


def _check(tools: list[str], sanitizer: Path, args: argparse.Namespace) -> int:
    """Compile, run the tools, write the results after each."""
    ends = time.monotonic() + args.deadline
    path = results_folder(args.device, args.out) / "sanitizer.json"
    worker = [sys.executable, str(Path(__file__).resolve()), "--device", args.device]
    work = [*worker, "--work"]
    if args.layers is not None:
        work += ["--layers", str(args.layers)]
    compiled = subprocess.run(work, check=False, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if compiled.returncode:
        say("the layers fail without the sanitizer, too")
        return 1
    say(compiled.stdout.strip())
    results: dict[str, dict[str, object]] = {}
    for tool in tools:
        runs = [("layers", work)]
        if tool in PLANTED:
            runs.insert(0, ("planted", [*worker, "--plant", PLANTED[tool]]))
        for name, command in runs:
            limit = min(PATIENCE, max(1.0, ends - time.monotonic()))
            row = run_tool(command_of(tool, sanitizer, command), limit)
            row["good"] = row["status"] == ("found" if name == "planted" else "clean")
            results[f"{tool} {name}"] = row
            path.parent.mkdir(parents=True, exist_ok=True)
            text = {"environment": environment(), "code": code_version(), "results": results}
            path.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
            say(f"{tool} {name}: {row['status']} after {row['seconds']} s")
            if not row["good"]:
                say("\n".join(map(str, row.get("lines", []))))
    say(f"results in {path}")
    return 0 if all(row["good"] for row in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
