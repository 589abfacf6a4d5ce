"""make run: many notebooks, failures, interruptions, and going on."""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from statistics import median

import nbformat
import papermill
import psutil
import pytest
from conftest import NOTEBOOKS, ROOT, SMALL, output_text, python, write_npz
from filelock import FileLock

from mnist_utils.__main__ import main
from mnist_utils.comparison import reference_runs
from mnist_utils.headless import Clock, execute, make_task, read_defaults, run_all
from mnist_utils.parameters import SETTINGS, InputError
from mnist_utils.plotting import format_seconds
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


def test_failing_notebooks_are_named_and_the_others_go_on(small_mnist, tmp_path):
    (tmp_path / "mnist_utils").symlink_to(ROOT / "mnist_utils")
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    breaks = {
        "a1": ("raise RuntimeError('broken')", "RuntimeError: broken"),
        "c": ("import os\nos._exit(1)", "Kernel died"),
    }
    for setting, (code, _) in breaks.items():
        path = tmp_path / f"notebooks/{SETTINGS[setting].notebook}.ipynb"
        notebook = nbformat.read(path, 4)
        notebook.cells.insert(6, nbformat.v4.new_code_cell(code))
        nbformat.write(notebook, path)
    done = subprocess.run(
        command("runs", small_mnist, "a1", "c", "a2"), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    for setting, (_, message) in breaks.items():
        (line,) = re.findall(rf"^\[./3\] {setting}: FAILED .*$", done.stdout, re.MULTILINE)
        assert message in line
        assert line.endswith("failed.ipynb")
        assert (tmp_path / re.search(r"executed copy: (\S+)$", line)[1]).is_file()
    assert "2 failed: a1, c\n" in done.stderr
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


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupted_run_goes_on_where_it_stopped(small_mnist, tmp_path):
    arguments = command(tmp_path, small_mnist, "a2", "a1", epochs=12)
    for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = start_and_wait_for_the_second(arguments)
        below = psutil.Process(process.pid).children(recursive=True)
        assert any("ipykernel_launcher" in child.cmdline() for child in below)
        process.send_signal(sent)
        assert process.wait(timeout=120) == code
        # No half record, and in time no kernel either: it sees that its parent is gone.
        ((first,), problems) = load_runs(tmp_path)
        assert (first.record.model, problems) == ("a2", [])
        _, alive = psutil.wait_procs(below, timeout=60)
        assert alive == []
    assert "Interrupted. What is recorded is kept" in process.stdout.read()

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


def test_only_a_run_by_the_same_code_with_all_its_files_counts(executed, small_mnist, tmp_path):
    given = SMALL | {"dataset": str(small_mnist), "results_dir": str(tmp_path)}
    task, done = make_task("a2", given), executed("a2")
    shutil.copytree(done.run.folder, task.folder, dirs_exist_ok=True)
    shutil.copy(done.path, task.folder / "executed.ipynb")
    assert task.finished_run()
    other = copy.deepcopy(task.notebook)
    other.cells[-1].source += "\n# changed"
    assert not replace(task, notebook=other).finished_run()

    def without(name, content=None):
        """Is the run finished with this file gone, or with another content?"""
        (file,) = task.folder.glob(name)
        kept = file.read_bytes()
        file.unlink()
        if content:
            file.write_text(content)
        finished = task.finished_run()
        file.write_bytes(kept)
        assert task.finished_run()
        return finished

    assert not without("executed.ipynb")
    assert not without("predictions-*.npz")
    record = (task.folder / "metrics.json").read_text()
    assert '"seed": 3' in record
    assert not without("metrics.json", record.replace('"seed": 3', '"seed": 1'))


def test_the_time_left_follows_the_reference_runs_and_the_pace_here(tmp_path):
    given = {"results_dir": str(tmp_path)}
    tasks = [make_task(setting, given) for setting in ("a2", "a1", "c")]
    clock = Clock(tasks, 60_000)
    references = reference_runs(load_runs(ROOT / "results")[0])
    a2, a1, c = (
        10 + 10 * median(references[s].record.seconds_per_epoch) for s in ("a2", "a1", "c")
    )
    assert sum(clock.expected.values()) == pytest.approx(a2 + a1 + c, rel=0.05)
    left = sum(clock.expected.values()) - clock.expected["a2"]
    clock.done(tasks[0], 2 * clock.expected["a2"])  # twice as slow here
    assert clock.left() == f"about {format_seconds(2 * left)} left"
    clock.skip(tasks[1])
    assert sum(clock.expected.values()) == pytest.approx(c, rel=0.05)


def test_two_processes_do_not_run_the_same(small_mnist, tmp_path):
    task = make_task("a2", {"dataset": str(small_mnist), "results_dir": str(tmp_path)})
    with FileLock(task.folder / ".lock"):
        problem = execute(task.notebook, task.given, task.folder)
    assert problem == f"Another process is running it in {task.folder}."


def test_a_parameter_that_contradicts_the_setting_is_refused():
    with pytest.raises(InputError, match="first_kernel_size is 3; for c7 it must be 7"):
        make_task("c7", {"first_kernel_size": 3})


def test_values_of_another_setting_make_a_task_that_one(tmp_path):
    def setting(name, **given):
        return make_task(name, given | {"results_dir": str(tmp_path)}).setting

    assert setting("d-speed", budget="accuracy") == "d-accuracy"
    assert setting("c", first_kernel_size=7) == "c7"
    assert setting("c", first_kernel_size=3) == "c"
    assert setting("a1", seed=7) == "a1"


def test_settings_that_the_parameters_make_one_are_run_once(
    small_mnist, tmp_path, monkeypatch, capsys
):
    ran = []
    monkeypatch.setattr("mnist_utils.headless.execute", lambda *_: ran.append(1) or "Not run.")
    given = {"first_kernel_size": 7, "batch_size": 64, "dataset": str(small_mnist)}
    assert run_all(["c", "c7", "c"], given | {"results_dir": str(tmp_path)}) == 1
    assert len(ran) == 2  # the comparison is the other
    assert capsys.readouterr().err == "2 failed: c7, 6_comparison\n"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("train_samples = 5000  # = 500 of each digit", 5000),
        ('dataset = "a#1.npz"', "a#1.npz"),
        ("train_samples = 60_000 // 10", None),
        ("train_samples =", None),
        ("epochs += 1", None),
    ],
)
def test_an_edited_parameters_cell_is_read_as_python_or_refused(line, found, tmp_path):
    notebook = nbformat.read(NOTEBOOKS / "2_model_a2.ipynb", 4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    cell.source += f"\n{line}"
    path = tmp_path / "2_model_a2.ipynb"
    nbformat.write(notebook, path)
    if found is None:
        with pytest.raises(InputError, match=r"^2_model_a2\.ipynb has a parameters cell that"):
            read_defaults(path, 0)
    else:
        assert read_defaults(path, 0)[1][line.split(" =")[0]] == found


def test_a_kernel_that_dies_as_it_starts_is_started_again(tmp_path, monkeypatch):
    # As it does when another process takes the port that it was told.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, sys\n"
        "starts = pathlib.Path(__file__).with_name('starts')\n"
        "if 'ipykernel_launcher' in sys.orig_argv:\n"
        "    with starts.open('a') as file:\n"
        "        file.write('.')\n"
        "    if starts.stat().st_size < int(os.environ['LIVES_AT']):\n"
        "        os._exit(1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('ran')")])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "", "language": "python"}
    monkeypatch.setenv("LIVES_AT", "3")
    assert execute(notebook, {}, tmp_path / "third") is None
    assert output_text(nbformat.read(tmp_path / "third/executed.ipynb", 4)) == "ran\n"
    monkeypatch.setenv("LIVES_AT", "7")
    assert "Kernel died before replying" in execute(notebook, {}, tmp_path / "never")
    assert (tmp_path / "starts").read_text() == 6 * "."


def test_make_hands_its_variables_to_the_command_line():
    values = {
        "EPOCHS": "3",
        "BATCH_SIZE": "32",
        "SEED": "7",
        "TRAIN_SAMPLES": "500",
        "PRECISION": "mixed_bfloat16",
        "DATASET": "some file.npz",
    }

    def commands(*arguments):
        # Not what an outer make was given, such as make test SEED=1.
        clean = {k: v for k, v in os.environ.items() if k not in (*values, "MAKEFLAGS")}
        done = subprocess.run(
            ["make", "-n", *arguments],
            cwd=ROOT,
            env=clean,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

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
    text = commands("sweep", "SEEDS=0-4", "MODELS=a1 a2", "SCHEDULER=tcp://host:8786", "EPOCHS=3")
    given = "sweep --models a1 a2 --seeds '0-4' --scheduler 'tcp://host:8786' -p 'epochs=3'"
    assert given in re.sub(r"[\s\\]+", " ", text)


def test_several_values_of_a_parameter_are_refused_where_one_is_taken(capsys):
    assert main(["run", "--models", "a2", "-p", "epochs=1", "-p", "epochs=2"]) == 2
    assert capsys.readouterr().err == "epochs has 2 values; run takes one, sweep several.\n"


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
