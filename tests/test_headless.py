"""make run: many notebooks, failures, interruptions, and going on."""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import nbformat
import papermill
import psutil
import pytest
from conftest import NOTEBOOKS, ROOT, python, write_npz
from filelock import FileLock

from mnist_utils.headless import execute, make_task
from mnist_utils.parameters import InputError
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
    assert "Parameters: epochs=2, batch_size=64, dataset=" in first.stdout
    assert re.search(r"^\[1/2\] a2: training; about .* left for all$", first.stdout, re.MULTILINE)
    assert len(re.findall(r"^    Epoch [12]/2: loss ", first.stdout, re.MULTILINE)) == 4
    assert re.search(r"^\| CNN A\.1 .*\n\| CNN A\.2 ", first.stdout, re.MULTILINE)
    assert (tmp_path / "6_comparison/executed.ipynb").is_file()
    for found in runs:
        assert (found.folder / "executed.ipynb").is_file()
        assert not (found.folder / "executing.ipynb").exists()
        metadata = nbformat.read(found.folder / "executed.ipynb", 4).metadata
        assert metadata.papermill.input_path.endswith("executing.ipynb")

    times = {found.folder: (found.folder / "metrics.json").stat().st_mtime_ns for found in runs}
    second = run(tmp_path, small_mnist, "a2", "a1")
    assert second.returncode == 0
    assert second.stdout.count("recorded already, kept") == 2
    assert "Epoch 1/2" not in second.stdout
    for folder, written in times.items():
        assert (folder / "metrics.json").stat().st_mtime_ns == written


BREAKS = {
    "an error": ("raise RuntimeError('broken')", "RuntimeError: broken"),
    "a dead kernel": ("import os\nos._exit(1)", "Kernel died"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_failing_notebook_is_named_and_the_others_go_on(case, small_mnist, tmp_path):
    code, message = BREAKS[case]
    (tmp_path / "mnist_utils").symlink_to(ROOT / "mnist_utils")
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    path = tmp_path / "notebooks/1_model_a1.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells.insert(6, nbformat.v4.new_code_cell(code))
    nbformat.write(notebook, path)
    done = subprocess.run(
        command("runs", small_mnist, "a1", "a2"), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = re.findall(r"^\[1/2\] a1: FAILED .*$", done.stdout, re.MULTILINE)
    assert message in line
    assert line.endswith("failed.ipynb")
    assert (tmp_path / re.search(r"executed copy: (\S+)$", line)[1]).is_file()
    assert "1 failed: a1\n" in done.stderr
    assert "Traceback" not in done.stderr
    ((run,), problems) = load_runs(tmp_path / "runs")
    assert (run.record.model, problems) == ("a2", [])


def test_a_bad_data_set_is_refused_before_anything_runs(small_arrays, tmp_path):
    tiny = small_arrays | {name: small_arrays[name][:32] for name in ("x_train", "y_train")}
    wrong = small_arrays | {"x_test": small_arrays["x_test"] / 255}
    for arrays, message in (
        (tiny, "batch_size is 64; it must be a whole number from 1 to the number of images"),
        (wrong, "x_test is float64; it must be uint8."),
    ):
        done = run(tmp_path / "runs", write_npz(tmp_path / "bad.npz", arrays), "a1", "a2")
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def start_and_wait_for_the_second(arguments):
    """Start a run of two models, and return it when the second one is training."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    second = False
    for line in process.stdout:
        second = second or line.startswith("[2/2]")
        if second and re.match(r" +Epoch +1/", line):
            return process
    raise AssertionError("the run ended before the second model trained")


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
def test_an_interrupted_run_goes_on_where_it_stopped(sent, small_mnist, tmp_path):
    before = kernels()
    arguments = command(tmp_path, small_mnist, "a2", "a1", epochs=12)
    process = start_and_wait_for_the_second(arguments)
    assert kernels() - before
    process.send_signal(sent)
    output, _ = process.communicate()
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert "Interrupted. What is recorded is kept" in output
    else:
        assert process.returncode == -signal.SIGKILL
    # No half record, and in time no kernel either: it sees that its parent is gone.
    ((first,), problems) = load_runs(tmp_path)
    assert (first.record.model, problems) == ("a2", [])
    deadline = time.monotonic() + 60
    while kernels() - before and time.monotonic() < deadline:
        time.sleep(0.5)
    assert kernels() <= before

    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "[1/2] a2: recorded already, kept" in done.stdout
    assert "[2/2] a1: training" in done.stdout
    runs, problems = load_runs(tmp_path)
    assert ([run.record.model for run in runs], problems) == (["a1", "a2"], [])
    assert not list(tmp_path.glob("*/*/executing.ipynb"))


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


def test_only_a_run_by_the_same_code_with_its_executed_notebook_counts(small_mnist, tmp_path):
    assert run(tmp_path, small_mnist, "a2", epochs=1).returncode == 0
    given = {"epochs": 1, "batch_size": 64, "dataset": str(small_mnist)}
    task = make_task("a2", given | {"results_dir": str(tmp_path)})
    assert task.finished_run()
    other = copy.deepcopy(task.notebook)
    other.cells[-1].source += "\n# changed"
    assert not replace(task, notebook=other).finished_run()
    # The record of another run, in this run's folder.
    record = task.folder / "metrics.json"
    content = record.read_text()
    record.write_text(content.replace('"seed": 0', '"seed": 1'))
    assert not task.finished_run()
    record.write_text(content)
    assert task.finished_run()
    (task.folder / "executed.ipynb").unlink()
    assert not task.finished_run()


def test_two_processes_do_not_run_the_same(small_mnist, tmp_path):
    task = make_task("a2", {"dataset": str(small_mnist), "results_dir": str(tmp_path)})
    with FileLock(task.folder / ".lock"):
        problem = execute(task.notebook, task.given, task.folder)
    assert problem == f"Another process is running it in {task.folder}."


def test_a_parameter_that_contradicts_the_setting_is_refused():
    with pytest.raises(InputError, match="first_kernel_size is 3; for c7 it must be 7"):
        make_task("c7", {"first_kernel_size": 3})


def test_make_hands_its_variables_to_the_command_line():
    def commands(*arguments):
        done = subprocess.run(
            ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout

    values = {
        "EPOCHS": "3",
        "BATCH_SIZE": "32",
        "SEED": "7",
        "TRAIN_SAMPLES": "500",
        "PRECISION": "mixed_bfloat16",
        "DATASET": "some file.npz",
    }
    text = commands(
        "run", *(f"{k}={v}" for k, v in values.items()), "RESULTS_DIR=there", "MODELS=a1 c"
    )
    for name, value in values.items():
        assert f"-p '{name.lower()}={value}'" in text
    assert "--results-dir 'there'" in text
    assert "run --models a1 c " in text
    assert re.search(r"-p 'epochs=2' +-p 'train_samples=1000'", commands("quick"))
    assert " -p " not in commands("run")
    assert "--models" not in commands("run")


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
