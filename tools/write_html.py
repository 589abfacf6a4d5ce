"""Write the README, the notebooks and the docs as a small static site: make html.

The site needs no network and is light or dark as the reader's system is. Its files lie as in the
checkout, with README.md as index.html. The older site stays until all pages are rendered.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import nbformat
from links import public_name
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"
DOCUMENTS = ("docs/method.md", "docs/cluster.md", "benchmarks/README.md", "CONTRIBUTING.md")
BADGE = re.compile(r"^\[!(\[.*\])\(.*?\)\]", re.MULTILINE)  # its picture is on the network
LINK = re.compile(r'\b(href|src)="([^":#]+)(#[^"]*)?"')  # to a file of the checkout

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{root}style.css">
</head>
<body>
<nav>{contents}</nav>
<main>
{body}
</main>
<nav class="beside">{beside}</nav>
</body>
</html>
"""

STYLE = """
:root { --text: #1f2328; --page: #fff; --code: #f6f8fa; --line: #d1d9e0; --link: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --page: #0d1117; --code: #161b22; --line: #3d444d; --link: #4493f8; }
}
body { margin: 0; color: var(--text); background: var(--page);
  font: 16px/1.55 system-ui, sans-serif; }
nav, main { max-width: 60rem; margin: 0 auto; padding: 0.75rem 1rem; }
nav { border-bottom: 1px solid var(--line); }
nav a { margin-right: 1rem; white-space: nowrap; }
nav.beside { border: 0; border-top: 1px solid var(--line); display: flex; }
nav.beside [rel=next] { margin: 0 0 0 auto; }
a { color: var(--link); }
a[aria-current] { color: var(--text); text-decoration: none; }
.anchor-link, .prompt { display: none; }
pre, code { font: 13px/1.45 ui-monospace, monospace; }
pre { margin: 0; overflow-x: auto; }
.highlight, .rendered_html > pre { padding: 0.6rem 0.8rem; margin: 0.75rem 0;
  background: var(--code); border: 1px solid var(--line); border-radius: 6px; }
.output .rendered_html > pre { padding: 0; margin: 0; background: none; border: 0; }
.output_subarea { margin: 0.5rem 0; overflow-x: auto; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { padding: 0.3rem 0.5rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
td[style*=right] { white-space: nowrap; }
"""


class Page(NamedTuple):
    """A page: where its source lies, what its own place in the site is, its title and content."""

    source: str
    place: str
    title: str
    content: NotebookNode


def main() -> None:
    pages = list(read_pages())
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".site-") as temporary:
        new = Path(temporary, "site")
        new.mkdir()
        for i, page in enumerate(pages):
            target = new / page.place
            target.parent.mkdir(exist_ok=True)
            target.write_text(render(page, pages, i, new), encoding="utf-8")
        (new / "style.css").write_text(colours() + STYLE, encoding="utf-8")
        shutil.rmtree(SITE, ignore_errors=True)
        new.rename(SITE)
    print(f"{len(pages)} pages: open {SITE.relative_to(ROOT) / 'index.html'}")


def read_pages() -> Iterator[Page]:
    """Read all pages in their order; a notebook that is none of ours is named and left out."""
    notebooks = [*sorted(ROOT.glob("notebooks/*.ipynb")), *sorted(ROOT.glob("studies/*.ipynb"))]
    documents = [ROOT / name for name in DOCUMENTS]
    for path in (ROOT / "README.md", *notebooks, *filter(Path.is_file, documents)):
        source = path.relative_to(ROOT).as_posix()
        place = "index.html" if source == "README.md" else str(PurePosixPath(source).stem) + ".html"
        place = (PurePosixPath(source).parent / place).as_posix()
        try:
            if path.parent.name == "notebooks" and not re.match(r"\d+_", path.name):
                raise ValueError("its name does not begin with a number")
            content = read(path)
            heading = content.cells[0].source.splitlines()[0]
            yield Page(source, place, heading.removeprefix("# "), content)
        except Exception as error:  # nbformat raises its own for each fault
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"{source}: left out, {reason}")


def read(path: Path) -> NotebookNode:
    """Return a notebook without folded cells and the badge's picture; Markdown becomes a cell."""
    if path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    notebook = nbformat.read(path, 4)
    if not notebook.cells:
        raise ValueError("it has no cells")
    folded = [cell.metadata.get("jupyter", {}).get("source_hidden") for cell in notebook.cells]
    notebook.cells = [cell for cell, away in zip(notebook.cells, folded, strict=True) if not away]
    notebook.cells[0].source = BADGE.sub(r"\1", notebook.cells[0].source)
    return notebook


def render(page: Page, pages: list[Page], i: int, site: Path) -> str:
    """Return the HTML of the i-th page; what it shows is copied into the site."""
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(page.content)
    places = {other.source: other.place for other in pages}

    def link(match: re.Match[str]) -> str:
        kind, target, fragment = match[1], match[2], match[3] or ""
        source = os.path.normpath(PurePosixPath(page.source).parent / target)
        if source in places:
            target = relative(places[source], page)
        elif kind == "src":
            (site / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, site / source)
        else:  # what is no page is read where the project is published
            target = f"https://github.com/{public_name()}/blob/main/{source}"
        return f'{kind}="{target}{fragment}"'

    def anchor(other: Page, text: str, attribute: str) -> str:
        return f'<a href="{relative(other.place, page)}"{attribute}>{text}</a>'

    contents = [
        anchor(other, short(other), ' aria-current="page"' if other is page else "")
        for other in pages
    ]
    beside = [anchor(other, f"← {short(other)}", ' rel="prev"') for other in pages[:i][-1:]]
    beside += [anchor(other, f"{short(other)} →", ' rel="next"') for other in pages[i + 1 :][:1]]
    return PAGE.format(
        title=page.title,
        root=relative("", page),
        contents="\n".join(contents),
        body=LINK.sub(link, body),
        beside="\n".join(beside),
    )


def relative(place: str, page: Page) -> str:
    """Return the link from a page to a place in the site."""
    return "../" * page.place.count("/") + place


def short(page: Page) -> str:
    """Return a page's title without what follows its colon or comma."""
    return re.split("[:,]", page.title)[0]


def colours() -> str:
    """Return the colours of code, light and dark; the background is the page's own."""
    light, dark = (
        HtmlFormatter(style=style).get_style_defs(".highlight")
        for style in ("default", "github-dark")
    )
    both = f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    return re.sub(r"background:[^;}]*;?", "", both)


if __name__ == "__main__":
    main()
