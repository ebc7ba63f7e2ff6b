"""What is kept in ``build/clock``: compiled kernels and simulated runs."""

import functools
import hashlib
import os
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / "build" / "clock"


@functools.cache
def source_digest(*paths: Path) -> str:
    """A digest of files: what a stored result was made by."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
