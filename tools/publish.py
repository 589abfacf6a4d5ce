"""Publish the reference runs: from runs/ into results/, the notebooks and the README.

Usage, in the checkout's root after `make run`: .venv/bin/python tools/publish.py

Takes each headless run in runs/ that the present code cells made with the reference parameters,
whatever its seed, in float32 or mixed_bfloat16, and that is not published yet. Its record and
predictions go to results/, of seed 0 the trained model as well, which must have been kept, and the
outputs into the notebook.
Published runs that other code cells made are removed: they would be averaged with the new ones.
Last, all that shows results is executed anew over results/ alone: the notebooks' first screens,
7_your_digits, 8_comparison, the study and the README's table.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
from nbformat import NotebookNode

from mnist_utils.comparison import reference_rows, results_table
from mnist_utils.parameters import CODE_VARIABLE, RESULTS_VARIABLE, SETTINGS
from mnist_utils.runs import MODEL_FILE, RECORD_FILE, code_sha256, load_runs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
BEGIN, END = "<!-- table: written by tools/publish.py -->\n", "<!-- end -->"
MOST_BFLOAT16 = ("a1", "a2", "d")  # which the study compares

sys.path.append(str(ROOT / "benchmarks"))
from measure import markdown, training_seconds  # noqa: E402


def main() -> None:
    for run in load_runs(RESULTS)[0].itertuples():
        if pd.isna(run.setting) or run.code_sha256 != code_sha256(read(notebook_of(run.setting))):
            shutil.rmtree(run.path)
            print(f"{run.path.relative_to(ROOT)}: removed, other code cells made it")
    runs = load_runs(ROOT / "runs")[0]
    bfloat16 = runs[(runs["precision"] == "mixed_bfloat16") & runs["setting"].isin(MOST_BFLOAT16)]
    for wanted in (runs, bfloat16.assign(precision="float32")):
        for run in reference_rows(wanted).itertuples():
            publish_run(run)
    show_results()


def publish_run(run: Any) -> None:
    """Copy a run to results/; of the reference run itself take the outputs into its notebook."""
    place = Path(run.path.parent.name, run.path.name)
    path = notebook_of(run.setting)
    notebook = read(path)
    if (RESULTS / place / RECORD_FILE).exists() or run.code_sha256 != code_sha256(notebook):
        return
    record = json.loads((run.path / RECORD_FILE).read_text(encoding="utf-8"))
    with_model = run.seed == 0 and "float32" in place.name
    if with_model and record["model_file"] is None:
        print(f"{place}: not published, its model was not kept")
        return
    (RESULTS / place).mkdir(parents=True, exist_ok=True)
    shutil.copy(run.path / record["predictions"]["file"], RESULTS / place)
    if with_model:
        shutil.copy(run.path / MODEL_FILE, RESULTS / place)
        executed = read(run.path / "executed.ipynb")
        if not papermill.utils.any_tagged_cell(executed, "injected-parameters"):
            take_outputs(notebook.cells, executed.cells)
            write(notebook, path)
    else:
        record["model_file"] = None
    content = json.dumps(record, indent=2) + "\n"
    (RESULTS / place / RECORD_FILE).write_text(content, encoding="utf-8")  # last
    print(f"{place}: published")


def show_results() -> None:
    """Execute anew what shows results, over results/ alone: a reader's own runs stay out."""
    with tempfile.TemporaryDirectory() as empty:
        os.environ[RESULTS_VARIABLE] = empty
        for name in sorted({setting.notebook for setting in SETTINGS.values()}):
            refresh(ROOT / f"notebooks/{name}.ipynb", only=("setup", "reached"))
        for name in ("notebooks/7_your_digits", "notebooks/8_comparison", "studies/steps_of_d"):
            refresh(ROOT / f"{name}.ipynb")
        del os.environ[RESULTS_VARIABLE]
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    text = before + BEGIN + readme_table() + END + rest.split(END)[1]
    readme.write_text(text, encoding="utf-8", newline="\n")


def refresh(path: Path, only: tuple[str, ...] = ()) -> None:
    """Execute a notebook, or some of its cells by their ids, and keep the outputs."""
    notebook = read(path)
    wanted = [cell for cell in notebook.cells if not only or cell.id in only]
    part = nbformat.from_dict({**notebook, "cells": wanted})
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, path.name)
        nbformat.write(part, source)
        executed = papermill.execute_notebook(
            source, None, cwd=path.parent, progress_bar=False, coalesce_streams=True
        )
    counts = [cell.get("execution_count") for cell in wanted]
    take_outputs(wanted, executed.cells)
    for cell, count in zip(wanted, counts, strict=True):
        if only and cell.cell_type == "code":  # the others may not have been executed
            cell.execution_count = count
    write(notebook, path)


def take_outputs(cells: list[NotebookNode], executed: list[NotebookNode]) -> None:
    """Put the outputs of executed cells into the same cells of a notebook."""
    both = ([cell for cell in many if cell.cell_type == "code"] for many in (cells, executed))
    for target, source in zip(*both, strict=True):
        target.outputs = source.outputs
        target.execution_count = source.execution_count


def readme_table() -> str:
    """Return the table of the README's first screen, in Markdown."""
    table = results_table(reference_rows(load_runs(RESULTS)[0]))
    table.del_column("test loss")
    times = training_seconds()
    cells = [f"{times[s]:,.0f} s" if s in times else "not measured yet" for s in SETTINGS]
    table.add_column("time on two cores", cells)
    return markdown([table.field_names, *table.rows]) + "\n"


def notebook_of(setting: str) -> Path:
    return ROOT / f"notebooks/{SETTINGS[setting].notebook}.ipynb"


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, 4)


def write(notebook: NotebookNode, path: Path) -> None:
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ.pop(CODE_VARIABLE, None)
    main()
