"""Every command of `benchmarks.gpu` in one process: nothing computes, compiles or is launched.

Run by test_gpu.py; it prints one line of JSON.
"""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["GPU_REHEARSAL"] = "dry"

from benchmarks import gpu

# Sizes of a second; argparse takes the last of an option.
REDUCED = {
    "benchmarks.clock": "--shapes 64-4-1-5-1e4",
    "benchmarks.layer": "--shapes tiny --in-process",
    "benchmarks.tune": "--shapes tiny --most 1",
}
# What pytest collects, and a data set that is not there.
LEFT_OUT = {"pytest", "benchmarks.etth1"}


def main() -> None:
    statuses, seen = {}, set()
    with tempfile.TemporaryDirectory() as name:
        os.environ["OUT"] = name
        for words in (words for stage in gpu.STAGES for words in stage.commands):
            module, *rest = gpu.command_of(words, 100.0, rehearsed=True)[2:]
            known = module, *(word for word in rest if word.startswith("--"))
            if module in LEFT_OUT or known in seen:
                continue
            seen.add(known)
            rest += REDUCED.get(module, "").split()
            package = importlib.import_module(module)
            run = (
                package
                if hasattr(package, "main")
                else importlib.import_module(f"{module}.__main__")
            )
            statuses[words] = run.main(rest)
        rows = {
            path.stem: json.loads(path.read_text())["rows"] for path in Path(name).glob("*.json")
        }
    sys.stdout.write(f"\n{json.dumps({'statuses': statuses, 'rows': rows})}\n")


if __name__ == "__main__":
    main()
