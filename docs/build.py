"""Write the documentation as HTML: the pages of this folder, and the API reference by pdoc.

    python -m docs.build [FOLDER]

Writes into ``build/docs`` unless told otherwise; begin at its ``index.html``.
"""

import importlib
import inspect
import re
import shutil
import sys
from pathlib import Path

import pdoc
import pdoc.render
from pdoc.render_helpers import to_html

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "segmoe_kernels"
# Modules with an ``__all__`` that only other modules of the package import.
INSIDE = {"layer.called", "layer.dtensor"}
INSIDE |= {"activations", "autograd", "flops", "options", "pipeline", "segments", "stats.collector"}


def find_modules() -> dict[str, Path]:
    """Modules with an ``__all__``, but for the kernels' ones: name -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        inside = {"stages", "_triton"} & set(parts)
        if not inside and "\n__all__ = [" in path.read_text(encoding="utf-8"):
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = tuple(
    f"segmoe_kernels.{name}".rstrip(".") for name in find_modules() if name not in INSIDE
)
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 52rem;
  padding: 1rem 1.5rem 4rem; }}
nav {{ font-size: .9rem; padding: .3rem 0; }}
nav:last-of-type {{ border-bottom: 1px solid #ddd; }}
nav a {{ margin-right: .8rem; }}
a {{ color: #33658a; }}
img {{ max-width: 100%; display: block; margin: 1rem 0; }}
pre {{ background: #f5f6f8; padding: .8rem; overflow-x: auto; font-size: .85rem; }}
code {{ font-family: ui-monospace, monospace; font-size: .9em; }}
table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25rem .8rem .25rem 0; text-align: left; }}
</style>
</head>
<body>
{links}
{body}
</body>
</html>
"""


def pages() -> dict[str, Path]:
    """Every page by its name: those of this folder first, then what lies elsewhere."""
    found = {path.stem: path for path in sorted(DOCS.glob("*.md"))}
    return {
        **found,
        "readme": ROOT / "README.md",
        "changes": ROOT / "CHANGELOG.md",
        "promises": ROOT / "tests" / "PROMISES.md",
        "notes": ROOT / "benchmarks" / "NOTES.md",
        **{path.stem: path for path in sorted((ROOT / "tests" / "reports").glob("*.md"))},
    }


def modules_page() -> str:
    """A page of all public modules and their names, as Markdown."""
    lines = ["# API reference", "", "| module | what | names |", "|---|---|---|"]
    for name in MODULES:
        module = importlib.import_module(name)
        target = f"api/{name.replace('.', '/')}.html"
        what = (inspect.getdoc(module) or "").partition("\n\n")[0].replace("\n", " ")
        names = ", ".join(f"[{public}]({target}#{public})" for public in module.__all__)
        lines.append(f"| [{name}]({target}) | {what} | {names} |")
    return "\n".join(lines)


def link(target: str, source: Path, out: Path) -> str:
    """Where a link of a page leads in the site; files that are no pages are copied into it."""
    if re.match(r"[a-z]+:|#", target):
        return target
    path, mark, anchor = target.partition("#")
    place = (source.parent / path).resolve()
    for name, page in pages().items():
        if place == page:
            return f"{name}.html{mark}{anchor}"
    copied = out / "files" / place.relative_to(ROOT)
    copied.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(place, copied)
    return f"{copied.relative_to(out).as_posix()}{mark}{anchor}"


def render(name: str, source: Path, out: Path) -> str:
    """One page as HTML."""
    text = source.read_text(encoding="utf-8")
    parts = CODE.split(text)
    for number in range(0, len(parts), 2):  # not inside code
        parts[number] = LINK.sub(lambda m: f"{m[1]}({link(m[2], source, out)})", parts[number])
    return frame(name, "".join(parts))


def frame(name: str, text: str) -> str:
    """Markdown as a page with links to all others: the concepts, then what lies elsewhere."""
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    concepts = [path.stem for path in sorted(DOCS.glob("*.md")) if path.stem != "index"]
    others = [other for other in pages() if other not in {"index", *concepts}]
    links = "\n".join(
        "<nav>" + " ".join(f'<a href="{other}.html">{other}</a>' for other in row) + "</nav>"
        for row in (["index", "api", *concepts], others)
    )
    return PAGE.format(title=title[1] if title else name, links=links, body=to_html(text))


def without_double_colons(text: str) -> str:
    """Mend what pdoc leaves of the ``::`` that begins a block of code in a docstring."""
    return re.sub(r"<p>::</p>\s*(?=<pre)|(?<=:):(?=</p>\s*<pre)", "", text)


def main() -> None:
    """Build the site anew."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    shutil.rmtree(out, ignore_errors=True)
    pdoc.render.configure(
        docformat="google",
        show_source=False,
        footer_text="segmoe_kernels",
        template_directory=DOCS / "templates",
    )
    pdoc.pdoc(*MODULES, output_directory=out / "api")
    for path in (out / "api").rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        path.write_text(without_double_colons(text), encoding="utf-8")
    for name, source in pages().items():
        (out / f"{name}.html").write_text(render(name, source, out), encoding="utf-8")
    (out / "api.html").write_text(frame("api", modules_page()), encoding="utf-8")
    print(f"{out / 'index.html'}")


if __name__ == "__main__":
    main()
