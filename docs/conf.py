"""Settings of the documentation's site: ``make docs`` builds it, without a network.

The pages lie where they are read in the repository, so the whole of it is the source folder.
"""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import segmoe_kernels  # noqa: E402  needs the path

project = "segmoe_kernels"
release = version = segmoe_kernels.__version__
html_title = f"{project} {version}"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "benchmarks/NOTES.md",
    "benchmarks/results/clock/report.md",
    "docs/**",
    "examples/results/*.md",
    "tests/PROMISES.md",
    "tests/reports/*.md",
]
exclude_patterns = ["docs/templates"]
templates_path = [str(ROOT / "docs" / "templates")]  # it is taken relative to two folders
html_theme = "pydata_sphinx_theme"
html_theme_options = {
    "show_prev_next": False,
    "navbar_center": [],
    "secondary_sidebar_items": ["page-toc"],
}
# All pages beside each of them.
html_sidebars = {"**": ["globaltoc.html"]}
html_static_path = ["site.css"]
html_css_files = ["site.css"]
myst_heading_anchors = 3
# What a docstring has in single quotes is code of ours; it is a link where that is on a page.
default_role = "py:obj"
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
# Links into PyTorch's pages need its list of names, which only a network has.
if os.environ.get("DOCS_ONLINE"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
# Names that docstrings give without the package, and rows of their tables.
_OURS = re.compile(r"`((?:functional|reference|pipeline|models|stats|series)\.)")
_ROW = re.compile(r"^\| (.+?) \| (.+) \|$")


def mend(_app: Sphinx, _what: str, _name: str, _thing: object, _options: object,
         lines: list[str]) -> None:  # fmt: skip
    """Name modules in full, so that they become links, and write tables as lists."""
    kept = [line for line in lines if not line.startswith("|---")]
    lines[:] = [_ROW.sub(r"* \1: \2", _OURS.sub(r"`segmoe_kernels.\1", line)) for line in kept]


def lead_to_index(app: Sphinx, error: Exception | None) -> None:
    """Put a page into the site's top folder that forwards to the first one."""
    if error is None:
        page = '<meta http-equiv="refresh" content="0; url=docs/index.html">\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Connect the two."""
    app.connect("autodoc-process-docstring", mend)
    app.connect("build-finished", lead_to_index)
