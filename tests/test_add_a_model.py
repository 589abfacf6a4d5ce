"""The README's steps to add a model, taken in a copy of the project."""

import shutil
import subprocess

import nbformat
from conftest import ROOT, python

from mnist_utils.runs import load_runs


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_model_is_added_by_the_readmes_steps(small_mnist, tmp_path):
    copy = tmp_path / "copy"
    for folder in ("mnist_utils", "notebooks", "results"):
        shutil.copytree(ROOT / folder, copy / folder)

    # 1 and 2: copy the nearest notebook; change layers, name and title.
    new = copy / "notebooks/7_model_e.ipynb"
    shutil.copy(copy / "notebooks/2_model_a2.ipynb", new)
    notebook = nbformat.read(new, 4)
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert source.count('"a2"') == 1
    for cell in notebook.cells:
        cell.source = (
            cell.source.replace('"a2"', '"e"')
            .replace('title="CNN A.2"', 'title="CNN E"')
            .replace("Conv2D(16, (3, 3)", "Conv2D(8, (5, 5)")
        )
    nbformat.write(notebook, new)
    # 3: make it known.
    parameters = copy / "mnist_utils/parameters.py"
    known = '    "b": Setting("3_model_b", "CNN B"),\n'
    replace(parameters, known, known + '    "e": Setting("7_model_e", "CNN E"),\n')

    # 4: run it.
    done = subprocess.run(
        python(
            *("-m", "mnist_utils", "run", "--models", "e", "-p", "epochs=1"),
            *("-p", "batch_size=64", "-p", f"dataset={small_mnist}"),
        ),
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ((run,), _) = load_runs(copy / "runs")
    assert run.record.model == "e"
    assert run.record.architecture.kernel_sizes[1] == [5, 5]
    assert "| CNN E |" in done.stdout
    assert "3X3 for 1st" not in done.stdout
    assert "5X5 for 2nd layer 3X3 for rest" in done.stdout
