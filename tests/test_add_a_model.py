"""The steps of CONTRIBUTING.md to add a model, taken in a copy of the project."""

import shutil

import nbformat
from conftest import ROOT, run_python

from mnist_utils.runs import load_record, load_runs


def replace(text: str, old: str, new: str, count: int = 1) -> str:
    assert text.count(old) == count, f"{old} is there {text.count(old)} times"
    return text.replace(old, new)


def test_a_model_is_added_by_the_steps_of_contributing(small_mnist, tmp_path):
    copy = tmp_path / "copy"
    for folder in ("mnist_utils", "notebooks", "results"):
        shutil.copytree(ROOT / folder, copy / folder)

    # 1 and 2: copy the nearest notebook; change the layers and the model's name.
    notebook = nbformat.read(copy / "notebooks/2_model_a2.ipynb", 4)
    cells = {cell.id: cell for cell in notebook.cells}
    for cell, old, new in (
        ("reached", '"a2"', '"f"'),
        ("data", '"a2"', '"f"'),
        ("model", "Conv2D(16, (3, 3)", "Conv2D(8, (5, 5)"),
    ):
        cells[cell].source = replace(cells[cell].source, old, new)
    assert '"a2"' not in "".join(cell.source for cell in notebook.cells)
    nbformat.write(notebook, copy / "notebooks/9_model_f.ipynb")
    # 3: make it known.
    path = copy / "mnist_utils/parameters.py"
    line = '    "f": Setting("9_model_f", "CNN F"),\n'
    assert line.strip() in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    last = '    "e": Setting("6_model_e", "CNN E", epochs=7),\n'
    path.write_text(replace(path.read_text(encoding="utf-8"), last, last + line), encoding="utf-8")

    # 4: try it.
    given = ("-p", "epochs=1", "-p", "batch_size=64", "-p", f"dataset={small_mnist}")
    done = run_python("-m", "mnist_utils", "run", "--models", "f", *given, cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    runs, problems = load_runs(copy / "runs")
    assert problems == []
    (run,) = runs.itertuples()
    assert run.model == "f"
    assert load_record(run.path).architecture.kernel_sizes[1] == [5, 5]
    assert "| CNN F " in done.stdout
    compared = nbformat.read(copy / "runs/8_comparison/executed.ipynb", 4)
    assert sum("CNN F" in str(cell.get("outputs")) for cell in compared.cells) >= 3
