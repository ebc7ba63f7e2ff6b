"""Triton's cache, carried to another machine and counted: which kernels were there, which were not.

Triton writes absolute paths into its cache, which then misses in every other folder; here an entry
is known by its own folder. Its keys depend on Triton's own files and compiled library, on ptxas, on
some variables of the environment, on a kernel's source, name and line, on what it is specialised
for, its options and the target; on no path, no driver and no PyTorch. `unpack` looks at what of
this can differ between two machines.

TRITON_CACHE_MANAGER names the class, KERNEL_LOG a file that gets a line for each question: "hit" or
"miss", and the kernel or "launcher".
"""

import hashlib
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

from triton import __version__
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.runtime import cache

__all__ = ["LOG", "Carried", "key_parts", "pack", "unpack"]

LOG = "KERNEL_LOG"
ARCH = 90
_PARTS = "parts.json"


class Carried(cache.FileCacheManager):  # type: ignore[misc]  # Triton has no types
    """Triton's own, but for paths."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The files of a kernel, by name."""
        there = self.has_file(f"__grp__{filename}")
        _note("hit" if there else "miss", filename.removesuffix(".json"))
        if not there:
            return None
        files = (path for path in Path(self.cache_dir).iterdir() if path.is_file())
        return {path.name: str(path) for path in files if not path.name.startswith("__grp__")}

    def get_file(self, filename: str) -> str | None:
        """A launcher, which the machine's C compiler makes."""
        path: str | None = super().get_file(filename)
        if filename.endswith(".so"):
            _note("hit" if path else "miss", "launcher")
        return path


def _note(what: str, name: str) -> None:
    if log := os.environ.get(LOG):
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{what} {name}\n")


def key_parts() -> dict[str, Any]:
    """What keys of the cache depend on beside a kernel: two machines share one if equal."""
    return {
        "triton": __version__,
        "files of triton": hashlib.sha256(cache.triton_key().encode()).hexdigest()[:16],
        "ptxas": get_ptxas_version(ARCH),
        "environment": dict(sorted(get_cache_invalidating_env_vars().items())),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",  # of launchers
    }


def pack(build: Path, archive: Path) -> None:
    """Put ``build/triton`` into an archive, with what its keys depend on."""
    (build / _PARTS).write_text(json.dumps(key_parts()), encoding="utf-8")
    with tarfile.open(archive, "w:gz") as file:
        for name in (_PARTS, "triton"):
            file.add(build / name, name)


def unpack(archive: Path, build: Path) -> bool:
    """Take kernels from an archive; say whether they are for this machine, and if not, why.

    Args:
        archive: that `pack` wrote.
        build: gets ``triton``, which stays as it is if it is there.
    """
    if not archive.exists():
        print(f"no {archive}: kernels are compiled as they are asked for")
        return False
    if not (build / "triton").exists():
        with tarfile.open(archive) as file:
            file.extractall(build, filter="data")
    carried, here = json.loads((build / _PARTS).read_text(encoding="utf-8")), key_parts()
    other = [
        f"{key}: {carried[key]!r}, here {here[key]!r}" for key in here if carried[key] != here[key]
    ]
    print("kernels were compiled ahead" + ", but for other " * bool(other) + "; ".join(other))
    return not other
