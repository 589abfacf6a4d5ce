"""Write the notebooks as a small static site that needs no network: make html.

An index with the comparison, and a page a notebook, in light and dark as the reader's system
asks for.
"""

import re
import shutil
from pathlib import Path

import nbformat
from links import public_name
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"
INDEX = "6_comparison"

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="style.css">
</head>
<body>
<nav>{navigation}</nav>
<main>
{body}
</main>
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
nav a { margin-right: 1rem; }
a { color: var(--link); }
.anchor-link, .prompt, .jp-InputPrompt, .jp-OutputPrompt { display: none; }
pre { margin: 0; font: 13px/1.45 ui-monospace, monospace; overflow-x: auto; }
.highlight { padding: 0.6rem 0.8rem; background: var(--code); border: 1px solid var(--line);
  border-radius: 6px; margin: 0.75rem 0; }
.jp-OutputArea-output { margin: 0.5rem 0; overflow-x: auto; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.3rem 0.5rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
"""


def main() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir()
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    # The background is the page's own.
    colours = re.sub(
        r"background:[^;}]*;?", "", f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    )
    (SITE / "style.css").write_text(colours + STYLE, encoding="utf-8")
    notebooks = {
        path.stem: nbformat.read(path, 4) for path in sorted(ROOT.glob("notebooks/*.ipynb"))
    }
    for name in notebooks:
        (SITE / page_name(name)).write_text(render(name, notebooks), encoding="utf-8")
    print(f"{len(notebooks)} pages: open {SITE.relative_to(ROOT) / 'index.html'}")


def page_name(notebook: str) -> str:
    return "index.html" if notebook == INDEX else f"{notebook}.html"


def title(notebook) -> str:
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def render(name: str, notebooks: dict) -> str:
    """Return the page of one notebook."""
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(without_badge(notebooks[name]))
    body = re.sub(r'href="(\w+)\.ipynb"', lambda link: f'href="{page_name(link[1])}"', body)
    # What is no notebook is not part of the site: it is read where the project is published.
    body = body.replace('href="../', f'href="https://github.com/{public_name()}/blob/main/')
    order = [INDEX, *(other for other in notebooks if other != INDEX)]
    navigation = "\n".join(
        f'<a href="{page_name(other)}">{title(notebooks[other]).split(":")[0]}</a>'
        for other in order
    )
    return PAGE.format(title=title(notebooks[name]), navigation=navigation, body=body)


def without_badge(notebook):
    """Take the badge out: its picture would come from the network."""
    first = notebook.cells[0]
    first.source = re.sub(r"^\[!\[.*\n\n?", "", first.source, flags=re.MULTILINE)
    return notebook


if __name__ == "__main__":
    main()
