"""Programs that tests start in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(*words, status=0, without=("TRITON_INTERPRET",), cwd=ROOT, **variables):
    """Run Python on the repository and return what it did; fails with all it said.

    Args:
        *words: of the command.
        status: that it must exit with; None for any.
        without: variables of the environment that it doesn't get; compiles, unless told otherwise.
        cwd: where it runs.
        **variables: that it gets.
    """
    environment = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd, env={**environment, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert status in {None, done.returncode}, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done
