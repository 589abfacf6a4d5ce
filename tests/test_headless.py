"""make run: many notebooks, failures, interruptions, and going on."""

import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import papermill
import psutil
import pytest
from conftest import NOTEBOOKS, ROOT, python, write_npz

from mnist_utils.headless import make_task
from mnist_utils.runs import load_runs


def command(results, dataset, *models, **parameters):
    given = {"epochs": 2, "batch_size": 64, "dataset": dataset} | parameters
    pairs = [argument for name, value in given.items() for argument in ("-p", f"{name}={value}")]
    return python("-m", "mnist_utils", "run", "--models", *models, *pairs, "--results-dir", results)


def run(results, dataset, *models, **parameters):
    return subprocess.run(
        command(results, dataset, *models, **parameters), cwd=ROOT, capture_output=True, text=True
    )


def test_all_of_it_ends_in_the_table_and_a_second_call_runs_nothing(small_mnist, tmp_path):
    first = run(tmp_path, small_mnist, "a2", "a1")
    assert first.returncode == 0, first.stdout + first.stderr
    runs, problems = load_runs(tmp_path)
    assert problems == []
    assert sorted(found.record.model for found in runs) == ["a1", "a2"]
    # Progress with the time left, by notebook and by epoch.
    assert re.search(r"^\[1/2\] a2: training; about .* left for all$", first.stdout, re.MULTILINE)
    assert len(re.findall(r"^    Epoch [12]/2: loss ", first.stdout, re.MULTILINE)) == 4
    assert re.search(r"^\| CNN A\.1 .*\n\| CNN A\.2 ", first.stdout, re.MULTILINE)
    assert (tmp_path / "6_comparison/executed.ipynb").is_file()
    for found in runs:
        assert (found.folder / "executed.ipynb").is_file()
        assert not (found.folder / "executing.ipynb").exists()

    times = {found.folder: (found.folder / "metrics.json").stat().st_mtime_ns for found in runs}
    second = run(tmp_path, small_mnist, "a2", "a1")
    assert second.returncode == 0
    assert second.stdout.count("recorded already, kept") == 2
    assert "Epoch 1/2" not in second.stdout
    for folder, written in times.items():
        assert (folder / "metrics.json").stat().st_mtime_ns == written


def test_a_failing_notebook_is_named_and_the_others_go_on(small_mnist, tmp_path):
    # The notebooks refuse any backend but TensorFlow; nothing before them looks at it.
    done = subprocess.run(
        command(tmp_path, small_mnist, "a1", "a2"),
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    for setting in ("a1", "a2"):
        (line,) = re.findall(rf"^\[./2\] {setting}: FAILED .*$", done.stdout, re.MULTILINE)
        assert "InputError: KERAS_BACKEND is 'numpy'; it must be 'tensorflow' here." in line
        copy = re.search(r"executed copy: (\S+)$", line)[1]
        assert copy.endswith("failed.ipynb")
        assert os.path.isfile(copy)
    assert "2 failed: a1, a2" in done.stderr
    assert load_runs(tmp_path) == ([], [])


def test_a_bad_data_set_is_refused_before_anything_runs(small_arrays, tmp_path):
    tiny = small_arrays | {name: small_arrays[name][:32] for name in ("x_train", "y_train")}
    wrong = small_arrays | {"x_test": small_arrays["x_test"] / 255}
    for arrays, message in (
        (tiny, "batch_size is 64; it must be a whole number from 1 to the number of training"),
        (wrong, "x_test is float64; it must be uint8."),
    ):
        done = run(tmp_path / "runs", write_npz(tmp_path / "bad.npz", arrays), "a1", "a2")
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def start_and_wait_for_training(results, dataset):
    """Start a run of A.2 with many epochs, and return it when the first epoch is through."""
    process = subprocess.Popen(
        command(results, dataset, "a2", epochs=1000),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if "Epoch    1/1000" in line:
            return process
    raise AssertionError("the run ended before its first epoch")


def kernels() -> set[int]:
    """Return the process ids of this Python's kernels."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if sys.executable in arguments and "ipykernel_launcher" in arguments:
            found.add(process.pid)
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_half_done_and_goes_on(sent, small_mnist, tmp_path):
    before = kernels()
    process = start_and_wait_for_training(tmp_path, small_mnist)
    assert kernels() - before
    process.send_signal(sent)
    output, _ = process.communicate()
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert "Interrupted. What is recorded is kept" in output
    else:
        assert process.returncode == -signal.SIGKILL
    # No record, and in time no kernel either: it sees that its parent is gone.
    assert load_runs(tmp_path) == ([], [])
    deadline = time.monotonic() + 60
    while kernels() - before and time.monotonic() < deadline:
        time.sleep(0.5)
    assert kernels() <= before

    done = run(tmp_path, small_mnist, "a2", epochs=1)
    assert done.returncode == 0, done.stdout
    ((found,), problems) = load_runs(tmp_path)
    assert problems == []
    assert found.record.run.epochs == 1


def test_nbconvert_executes_a_notebook_and_leaves_one_loss_plot(small_mnist, tmp_path):
    prepared, executed = tmp_path / "prepared.ipynb", tmp_path / "executed.ipynb"
    papermill.execute_notebook(
        NOTEBOOKS / "2_model_a2.ipynb",
        prepared,
        {"epochs": 2, "batch_size": 64, "dataset": str(small_mnist), "results_dir": str(tmp_path)},
        prepare_only=True,
    )
    subprocess.run(
        python("-m", "nbconvert", "--execute", "--to", "notebook", "--output", executed, prepared),
        cwd=ROOT,
        check=True,
    )
    (cell,) = [c for c in nbformat.read(executed, 4).cells if "model.fit(" in c.source]
    assert len([o for o in cell.outputs if "image/png" in o.get("data", {})]) == 1
    assert "".join(o.text for o in cell.outputs if "text" in o).count("Epoch ") == 2


def test_a_run_of_other_code_cells_is_run_again(executed, small_mnist):
    done = executed("a2")
    folder = done.run.folder.parents[1]
    parameters = {"epochs": 2, "batch_size": 64, "seed": 3, "dataset": str(small_mnist)}
    task = make_task("a2", parameters | {"results_dir": str(folder)})
    assert task.finished_run() is not None
    other = type(task)(**(vars(task) | {"code": "of other cells"}))
    assert other.finished_run() is None


@pytest.mark.parametrize("folder", [ROOT, NOTEBOOKS])
def test_plain_papermill_works_from_the_root_and_from_notebooks(folder, small_mnist, tmp_path):
    notebook = os.path.relpath(NOTEBOOKS / "2_model_a2.ipynb", folder)
    done = subprocess.run(
        python(
            *("-m", "papermill", notebook, tmp_path / "out.ipynb"),
            *("-p", "epochs", 1, "-p", "batch_size", 64, "-p", "train_samples", 100),
            *("-p", "dataset", small_mnist, "-p", "results_dir", tmp_path / "runs"),
        ),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ((found,), problems) = load_runs(tmp_path / "runs")
    assert problems == []
    assert found.record.run.train_samples == 100
    assert found.record.code_sha256 is None
