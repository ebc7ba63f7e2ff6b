"""Which code a report measured, which of its files have changed since, and how reports are kept.

A report of many hours can't be made anew for each change. So it keeps a digest of each file that
its numbers come from; `python tests/report_code.py` names those that are others now.
"""

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The kernels and the plain PyTorch that they are compared with.
MEASURED = ("stages/**/*.py", "_triton/*.py", "reference/*.py")


def digests():
    """``{file: digest}`` of what is here now, files named from the package's folder."""
    package = ROOT / "segmoe_kernels"
    paths = sorted(path for pattern in MEASURED for path in package.glob(pattern))
    return {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in paths
    }


def changed_since(code):
    """Files that are new, gone or others than when a report was made of ``code``."""
    now = digests()
    return sorted(name for name in {*code, *now} if code.get(name) != now.get(name))


def describe(report):
    """What a page says about the code that it measured."""
    whole = hashlib.sha256(repr(sorted(report["code"].items())).encode()).hexdigest()[:12]
    return (
        f"Measured: kernels and reference of digest {whole}; `python tests/report_code.py` names "
        "the files that have changed since."
    )


def save(path, report):
    """Write a report as JSON, a line for each entry, so that a change shows as its rows."""
    parts = report.items() if isinstance(report, dict) else [(None, report)]
    text = ",\n".join(_lines(key, value) for key, value in parts)
    text = f"{{\n{text}\n}}" if isinstance(report, dict) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def _lines(key, value):
    name = "" if key is None else json.dumps(key) + ": "
    if not isinstance(value, (list, dict)):
        return name + json.dumps(value)
    if isinstance(value, list):
        return name + "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    entries = (f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
    return name + "{\n" + ",\n".join(entries) + "\n}"


if __name__ == "__main__":
    for report in sorted((ROOT / "tests" / "reports").glob("*.json")):
        found = json.loads(report.read_text(encoding="utf-8"))
        if "code" in found:
            changed = ", ".join(changed_since(found["code"]))
            print(f"{report.stem}: {changed or 'nothing has changed'}")  # noqa: T201
