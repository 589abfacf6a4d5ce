"""Bad parameters: one plain sentence, before anything is loaded or trained."""

import re
import subprocess

import nbformat
import papermill
import pytest
from conftest import NOTEBOOKS, ROOT, python, write_npz

from mnist_utils import parameters
from mnist_utils.parameters import SETTINGS, InputError, check_parameters
from mnist_utils.training import GPUS, set_up

GOOD = {"epochs": 10, "batch_size": 256, "seed": 0}

BAD = [
    ("epochs", 0),
    ("epochs", -1),
    ("epochs", 2.5),
    ("epochs", "ten"),
    ("epochs", True),
    ("epochs", None),
    ("batch_size", 0),
    ("batch_size", 60_001),
    ("batch_size", 32.0),
    ("seed", -1),
    ("seed", 2**32),
    ("seed", "0"),
    ("train_samples", 0),
    ("train_samples", 60_001),
    ("train_samples", "all"),
    ("train_samples", False),
    ("precision", "float23"),
    ("precision", 32),
    ("dataset", "no_such_file.npz"),
    ("dataset", 5),
    ("results_dir", 5),
    ("first_kernel_size", 0),
    ("first_kernel_size", 29),
    ("first_kernel_size", None),
    ("budget", "large"),
    ("budget", 1),
    ("budget", None),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name_value_and_what_is_allowed(name, value, tmp_path):
    values = GOOD | {"results_dir": str(tmp_path)} | {name: value}
    with pytest.raises(InputError) as error:
        check_parameters("c", **values)
    message = str(error.value)
    assert re.match(rf"{name} is {re.escape(repr(value))}[; (]", message)
    assert "it must be" in message
    assert "\n" not in message


def test_a_batch_above_the_samples_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"batch_size is 256; .* images to train on, 100"):
        check_parameters("a1", **GOOD, train_samples=100, results_dir=str(tmp_path))


def test_what_model_d_keeps_back_counts_as_well(tmp_path):
    values = GOOD | {"budget": "speed", "results_dir": str(tmp_path)}
    with pytest.raises(InputError, match=r"batch_size is 256; .* images to train on, 252"):
        check_parameters("d", **values, train_samples=256)
    assert check_parameters("d", **values, train_samples=261)
    with pytest.raises(InputError, match=r"train_samples is 1; .* from 2 to 60000"):
        check_parameters("d", **values | {"batch_size": 1}, train_samples=1)
    # As the notebook's own cell has it.
    (cell,) = (
        c
        for c in nbformat.read(NOTEBOOKS / "5_model_d.ipynb", 4).cells
        if "kept_back =" in c.source
    )
    assert "kept_back = max(1, len(x_train) // 60)" in cell.source


def test_good_values_pass_and_the_folder_is_made(tmp_path):
    folder = tmp_path / "new" / "runs"
    checked = check_parameters("a1", **GOOD, train_samples=60_000, results_dir=str(folder))
    assert checked.epochs == 10
    assert checked.run_folder().parents[1] == folder
    assert list(checked.run_folder().iterdir()) == []


def test_a_budget_sets_the_epochs_that_are_not_given(tmp_path):
    values = {"batch_size": 256, "seed": 0, "budget": "accuracy", "results_dir": str(tmp_path)}
    checked = check_parameters("d", epochs=None, **values)
    assert checked.epochs == SETTINGS["d-accuracy"].epochs
    assert check_parameters("d", epochs=2, **values).epochs == 2
    assert checked.recorded()["budget"] == "accuracy"
    speed = check_parameters("d", epochs=None, **values | {"budget": "speed"})
    assert speed.epochs == SETTINGS["d-speed"].epochs
    assert speed.run_folder() != checked.run_folder()
    with pytest.raises(InputError, match=r"epochs is 0; it must be None .* or a whole number"):
        check_parameters("d", epochs=0, **values)
    with pytest.raises(InputError, match="budget is None; it must be"):
        check_parameters("d", epochs=None, **values | {"budget": None})
    with pytest.raises(InputError, match="epochs is None; it must be a whole number"):
        check_parameters("a1", epochs=None, batch_size=256, seed=0)


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="model is 'none'; it must be one of a1, a2, b, c"):
        check_parameters("none", **GOOD, results_dir=str(tmp_path))


def test_a_results_folder_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/a1").touch()  # where the run's own folder would be
    for path in (file, file / "below", tmp_path / "runs"):
        with pytest.raises(InputError, match=r"results_dir is .* it must be"):
            check_parameters("a1", **GOOD, results_dir=str(path))


def test_a_read_only_results_folder_is_refused(tmp_path, monkeypatch):
    # As root may write anywhere, the refusal of the system is played.
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(parameters.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"permission denied"):
        check_parameters("a1", **GOOD, results_dir=str(tmp_path / "runs"))


def test_a_record_never_holds_the_path_of_a_data_set(small_mnist, small_arrays, tmp_path):
    checked = check_parameters("a1", **GOOD, dataset=str(small_mnist), results_dir=str(tmp_path))
    recorded = checked.recorded()
    assert re.fullmatch(r"small-[0-9a-f]{8}", recorded["dataset"])
    # A long name is cut: a folder's name has its limit.
    long = write_npz(tmp_path / f"{'x' * 240}.npz", small_arrays)
    checked = check_parameters("a1", **GOOD, dataset=str(long), results_dir=str(tmp_path))
    assert len(checked.run_folder().name) < 150
    # Another file of the same name has another name in records.
    other = write_npz(tmp_path / "small.npz", small_arrays | {"y_test": small_arrays["y_test"] * 0})
    checked = check_parameters("a1", **GOOD, dataset=str(other), results_dir=str(tmp_path))
    assert checked.recorded()["dataset"] != recorded["dataset"]


@pytest.mark.skipif(bool(GPUS), reason="there is a GPU")
def test_mixed_float16_needs_a_gpu():
    with pytest.raises(InputError, match=r"precision is 'mixed_float16'; .*no GPU was found"):
        set_up(0, "mixed_float16")


def test_a_notebook_shows_the_sentence_and_no_traceback(tmp_path):
    output = tmp_path / "out.ipynb"
    with pytest.raises(papermill.PapermillExecutionError):
        papermill.execute_notebook(
            NOTEBOOKS / "4_model_c.ipynb",
            output,
            {"epochs": 2.5, "results_dir": str(tmp_path / "runs")},
            cwd=ROOT,
            progress_bar=False,
        )
    notebook = papermill.iorw.load_notebook_node(str(output))
    errors = [o for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert [error.traceback for error in errors] == [
        ["InputError: epochs is 2.5; it must be a whole number of 1 or more."]
    ]
    # Refused by the first cell after the parameters, before anything is loaded.
    assert "load_mnist" not in "".join(c.source for c in notebook.cells if c.get("execution_count"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--models", "a2", "-p", "epochs=ten"],
            "epochs is 'ten'; it must be a whole number of 1 or more.",
        ),
        (
            ["--models", "a2", "-p", "epochs=true"],
            "epochs is True; it must be a whole number of 1 or more.",
        ),
        (["-p", "batch_size=70000"], "batch_size is 70000; it must be a whole number from 1 to"),
        (
            ["--models", "a2", "-p", "epoch=3"],
            "epoch is not a parameter of 2_model_a2; it has epochs,",
        ),
        (["-p", "epochs"], "-p is 'epochs'; it must be NAME=VALUE"),
        (
            ["--models", "a3"],
            "models has 'a3'; it must be some of a1, a2, b, c, c7, d-speed, d-acc",
        ),
    ],
)
def test_the_command_line_refuses_in_one_sentence_before_anything_runs(
    arguments, message, tmp_path
):
    command = python("-m", "mnist_utils", "run", *arguments, "--results-dir", tmp_path / "runs")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not list(tmp_path.glob("runs/*"))
