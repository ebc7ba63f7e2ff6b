"""Digests of kernels' sources: committed reports say by them which kernels they are of."""

import ast
import hashlib
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "segmoe_kernels"


def kernel_digests() -> dict[str, str]:
    """Name -> digest of each kernel's source, and of all compiled functions that it calls."""
    texts: dict[str, str] = {}
    calls: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            decorators = {ast.unparse(d) for d in getattr(node, "decorator_list", ())}
            if isinstance(node, ast.FunctionDef) and decorators & {"kernel", "triton.jit"}:
                source = ast.get_source_segment(text, node)
                words = tokenize.generate_tokens(io.StringIO(source).readline)
                skipped = {tokenize.COMMENT, tokenize.NL}
                texts[node.name] = " ".join(w.string for w in words if w.type not in skipped)
                calls[node.name] = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    found = {}
    for name in (name for name in texts if name.endswith("_kernel")):
        needed = {name}
        while more := {c for n in needed for c in calls[n] & texts.keys()} - needed:
            needed |= more
        joined = "\n".join(texts[n] for n in sorted(needed))
        found[name] = hashlib.sha256(joined.encode()).hexdigest()[:12]
    return found
