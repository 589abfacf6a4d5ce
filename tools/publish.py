"""Publish the reference runs: from runs/ into results/, the notebooks and the README.

Usage, in the checkout's root after `make run`: .venv/bin/python tools/publish.py [MODEL ...]

Takes each run that the present code cells made with the reference parameters, or with another
seed or precision. Of the models named it takes the place of the one published; with none named,
only what is not yet published is taken, for runs/ also holds what was run for other ends.
Its record and predictions go to results/; of a reference run the outputs go into the notebook
and the figures into the prose. Published runs that other code cells made are removed: they would
be averaged with the new ones. Last, the comparison is executed over results/ alone, and its
table and figure go into the README.
"""

import base64
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill

from mnist_utils.comparison import reference_runs, setting_of, summary_table
from mnist_utils.headless import code_sha256
from mnist_utils.parameters import SETTINGS
from mnist_utils.runs import RECORD_FILE, Run, load_runs
from mnist_utils.spread import accuracy_over_seeds, over_seeds, reference_sentence

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
README_FIGURE = RESULTS / "accuracy_and_time.png"


def main(settings: list[str]) -> None:
    if unknown := [setting for setting in settings if setting not in SETTINGS]:
        sys.exit(f"MODEL is {unknown[0]!r}; it must be one of {', '.join(SETTINGS)}.")
    runs = [
        run for run in load_runs(ROOT / "runs")[0] if not settings or setting_of(run) in settings
    ]
    outputs = [run.folder for run in reference_runs(runs).values()]
    present = {place(run): run.record.code_sha256 for run in load_runs(RESULTS)[0]}
    for precision in ("float32", "mixed_bfloat16"):
        for setting, group in over_seeds(runs, precision).items():
            for run in group:
                if settings or present.get(place(run)) != run.record.code_sha256:
                    publish_run(setting, run, with_outputs=run.folder in outputs)
    for run in load_runs(RESULTS)[0]:
        remove_if_stale(run)
    published = load_runs(RESULTS)[0]
    references, groups = reference_runs(published), over_seeds(published)
    for name in {setting.notebook for setting in SETTINGS.values()}:
        own = {s: groups[s] for s in references if SETTINGS[s].notebook == name}
        write_sentence(ROOT / f"notebooks/{name}.ipynb", own)
    for setting, run in references.items():
        if (run.folder / "executed.ipynb").exists():
            take_prose(
                run.folder / "executed.ipynb",
                ROOT / f"notebooks/{SETTINGS[setting].notebook}.ipynb",
            )
    publish_comparison()
    write_readme(references, groups)


def place(run: Run) -> Path:
    """Return where a run lies below runs/ or results/; two of the same parameters share it."""
    return Path(run.folder.parent.name, run.folder.name)


def publish_run(setting: str, run: Run, with_outputs: bool) -> None:
    """Copy a run to results/, and its outputs into the notebook if it ran with the defaults."""
    name = f"{setting}, {run.record.run.precision}, seed {run.record.run.seed}"
    path = ROOT / f"notebooks/{SETTINGS[setting].notebook}.ipynb"
    notebook = nbformat.read(path, 4)
    if not (run.folder / "executed.ipynb").exists():
        print(f"{name}: left out, it has no executed notebook; make it by make run")
        return
    executed = clean(nbformat.read(run.folder / "executed.ipynb", 4))
    if not run.record.code_sha256 == code_sha256(notebook) == code_sha256(executed):
        print(f"{name}: left out, other code cells made it")
        return
    folder = RESULTS / place(run)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(run.folder / run.record.predictions.file, folder)
    if with_outputs:
        if any("injected-parameters" in cell.metadata.get("tags", []) for cell in executed.cells):
            write_notebook(executed, folder / "executed.ipynb")
        else:
            take_outputs(notebook, executed)
            write_notebook(notebook, path)
    shutil.copy(run.folder / RECORD_FILE, folder)  # last: with it the run counts as published
    print(f"{name}: published")


def remove_if_stale(run: Run) -> None:
    """Remove a published run that other code cells made than those of its notebook."""
    setting = setting_of(run)
    if setting is None:
        return
    present = nbformat.read(ROOT / f"notebooks/{SETTINGS[setting].notebook}.ipynb", 4)
    if run.record.code_sha256 != code_sha256(present):
        shutil.rmtree(run.folder)
        print(f"{run.folder.relative_to(ROOT)}: removed, other code cells made it")


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take papermill's metadata out of a notebook."""
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def take_outputs(notebook, executed) -> None:
    """Put the outputs of an executed copy into a notebook with the same code cells."""
    targets, sources = (
        [cell for cell in nb.cells if cell.cell_type == "code"] for nb in (notebook, executed)
    )
    for target, source in zip(targets, sources, strict=True):
        target.outputs = source.outputs
        target.execution_count = source.execution_count


def write_sentence(path: Path, groups: dict[str, list[Run]]) -> None:
    """Write what each setting's runs over seeds reached into a notebook's first screen."""
    notebook = nbformat.read(path, 4)
    parts = [
        f"{SETTINGS[setting].title + ': ' if len(groups) > 1 else ''}{reference_sentence(runs)}"
        for setting, runs in groups.items()
    ]
    sentence = ". ".join(parts) or "not run yet"
    cell = notebook.cells[0]
    cell.source = re.sub(
        r"^\*\*Reference run.*$", f"**Reference run**: {sentence}.", cell.source, flags=re.MULTILINE
    )
    write_notebook(notebook, path)


def take_prose(copy: Path, path: Path) -> None:
    """Put a notebook's present prose into an executed copy of it, with links that lead there."""
    executed = nbformat.read(copy, 4)
    prose = {cell.id: cell.source for cell in nbformat.read(path, 4).cells}
    for cell in executed.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((?!https?:)", "](../../../notebooks/", prose[cell.id])
    write_notebook(executed, copy)


def publish_comparison() -> None:
    """Execute the comparison over results/ alone: a reader's own runs stay out of it."""
    path = ROOT / "notebooks/6_comparison.ipynb"
    with tempfile.TemporaryDirectory() as temporary:
        for folder in ("mnist_utils", "results"):
            (Path(temporary) / folder).symlink_to(ROOT / folder)
        (Path(temporary) / "notebooks").mkdir()
        executed = papermill.execute_notebook(
            path,
            None,
            cwd=Path(temporary) / "notebooks",
            progress_bar=False,
            coalesce_streams=True,
        )
    notebook = nbformat.read(path, 4)
    take_outputs(notebook, clean(executed))
    write_notebook(notebook, path)
    for cell in notebook.cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if data.get("text/plain", "").startswith("Test accuracy of each model"):
                README_FIGURE.write_bytes(base64.b64decode(data["image/png"]))


def write_readme(references: dict[str, Run], groups: dict[str, list[Run]]) -> None:
    """Write the summary table, from the records, between the README's markers."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    begin, end = "<!-- comparison: written by tools/publish.py -->\n", "<!-- end -->"
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    readme.write_text(
        before + begin + markdown_table(references, groups) + end + after,
        encoding="utf-8",
        newline="\n",
    )


def markdown_table(references: dict[str, Run], groups: dict[str, list[Run]]) -> str:
    """Return the summary table in Markdown, with a column for the accuracy over seeds."""
    missing = [setting for setting in SETTINGS if setting not in references]
    table = summary_table(references.values(), missing)
    over = [f"{accuracy_over_seeds(groups[s])} (n = {len(groups[s])})" for s in references]
    table.add_column("over seeds (%)", over + [""] * len(missing))
    rows = [table.field_names, ["---"] * len(table.field_names), *table.rows]
    return "".join(f"| {' | '.join(str(value) for value in row)} |\n" for row in rows)


def write_notebook(notebook, path: Path) -> None:
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
