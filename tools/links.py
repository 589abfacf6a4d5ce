"""Set the repository's public name, which badges and first cells lead to.

Usage: make links REPO=owner/name. The name is kept in pyproject.toml, under project.urls; from
there it goes into the notebooks.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = ROOT / "pyproject.toml"
PUBLIC = re.compile(r'^Repository = "https://github\.com/(\S+)"$', re.MULTILINE)
NAME = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")


def public_name() -> str:
    """Return the owner/name under which the project is published."""
    found = PUBLIC.search(PYPROJECT.read_text(encoding="utf-8"))
    if found is None:
        sys.exit("pyproject.toml has no Repository of GitHub's; it must name one.")
    return found[1]


def main(new: str) -> None:
    if not NAME.fullmatch(new):
        sys.exit(f"REPO is {new!r}; it must be owner/name, as on GitHub.")
    old = public_name()
    notebooks = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("studies/*.ipynb")]
    for path in (PYPROJECT, *sorted(notebooks)):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(old, new), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {text.count(old)} places")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
