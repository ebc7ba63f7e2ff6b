"""Makes a kernel of Hugging Face's Hub from the package: ``python .ci/hub.py FOLDER``.

The folder gets what ``kernel-builder upload`` takes and the library ``kernels`` loads: for each
backend the package under a name of its own, since two versions may be loaded side by side. So
imports become relative and operators are registered under that name.
"""

import hashlib
import json
import re
import sys
from base64 import b64encode
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "segmoe_kernels"
# What a kernel can't be asked for, or needs more than the Hub has: a command, a test kit, NumPy.
LEFT_OUT = {"__main__.py", "testing.py", "series"}
BACKENDS = {"cpu": {}, "cuda": {"archs": ["8.0+PTX"]}, "rocm": {}}
IMPORT = re.compile(r"^( *from )segmoe_kernels\b\.?", re.M)
# Where operators are registered, and where they are called.
NAMESPACE = re.compile(r'(?<=Library\(")segmoe_\w+|(?<=torch\.ops\.)segmoe_\w+|\bsegmoe_\w+(?=::)')


def sources() -> dict[str, str]:
    """Text of each file by its name in the kernel, imports made relative."""
    files = {path.relative_to(PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}
    files = {name: path for name, path in files.items() if name.parts[0] not in LEFT_OUT}
    files[Path("layers.py")] = ROOT / ".ci" / "hub_layers.py"
    texts = {}
    for name, path in files.items():
        dots = "." * len(name.parts)
        texts[name.as_posix()] = IMPORT.sub(rf"\g<1>{dots}", path.read_text(encoding="utf-8"))
    start = "__all__ = [\n"
    more = f'from . import functional, layers\n\n{start}    "functional",\n    "layers",\n'
    texts["__init__.py"] = texts["__init__.py"].replace(start, more)
    return texts


def write(folder: Path) -> None:
    """Write the kernel for each backend."""
    texts = sources()
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:7]
    version = re.search(r'^__version__ = "(\d+)', texts["__init__.py"], re.M)
    for backend, more in BACKENDS.items():
        kernel_id = f"_segmoe_kernels_{backend}_{digest}"
        files = {name: NAMESPACE.sub(kernel_id, text).encode() for name, text in texts.items()}
        sums = {name: b64encode(hashlib.sha256(data).digest()) for name, data in files.items()}
        metadata = {
            "name": "segmoe-kernels",
            "id": kernel_id,
            "version": int(version[1]),
            "license": "Apache-2.0",
            "python-depends": ["einops"],
            "backend": {"type": backend, **more},
            "digest": {"algorithm": "sha256", "files": {n: s.decode() for n, s in sums.items()}},
        }
        files["metadata.json"] = json.dumps(metadata, indent=2).encode()
        for name, data in files.items():
            path = folder / "build" / f"torch-{backend}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
