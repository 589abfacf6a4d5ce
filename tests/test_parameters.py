"""Parameters: bad ones get one plain sentence before anything runs; and where things lie."""

import re
import shutil
import signal
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import ROOT, execute, write_npz

from mnist_utils import parameters
from mnist_utils.__main__ import main
from mnist_utils.parameters import SETTINGS, InputError, check_parameters, project_folder
from mnist_utils.training import GPUS, set_up, tf

GOOD = {"epochs": 10, "batch_size": 16, "seed": 0, "train_samples": None, "dataset": "mnist"}
GOOD |= {"precision": "float32", "results_dir": None, "keep_model": True}

BAD = {
    "epochs": (0, -1, 2.5, "ten", True, None),
    "batch_size": (0, 60_001, 32.0),
    "seed": (-1, 2**32, "0"),
    "train_samples": (0, 60_001, "all", False),
    "precision": ("float23", 32, None),
    "dataset": ("no_such_file.npz", 5, None),
    "results_dir": (5, Path("runs")),
    "keep_model": (1, "yes", None),
    "first_kernel_size": (0, 29, 2.0, None),
}
ALL_BAD = [(name, value) for name, values in BAD.items() for value in values]


@pytest.fixture
def check(tmp_path):
    """Return check_parameters with good values, but those given, in a folder of the test's."""

    def check(model="a1", **changed):
        return check_parameters(model, GOOD | {"results_dir": str(tmp_path / "runs")} | changed)

    return check


@pytest.mark.parametrize(("name", "value"), ALL_BAD)
def test_a_bad_value_is_refused_by_name_value_and_what_is_allowed(name, value, check, tmp_path):
    with pytest.raises(InputError) as error:
        check("c", **{"first_kernel_size": 2, name: value})
    message = str(error.value)
    assert re.match(rf"{name} is {re.escape(repr(value))}[; (]", message)
    assert "it must be" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_counts_are_those_of_the_images_that_are_trained_on(check):
    for model, changed, sentence in (
        ("a1", {"batch_size": 256, "train_samples": 100}, "batch_size is 256; .* train on, 100"),
        ("a1", {"dataset": "mnist-small", "train_samples": 6001}, "train_samples is .* 1 to 6000"),
        ("d", {"batch_size": 256, "train_samples": 256}, "batch_size is 256; .* train on, 252"),
        ("e", {"batch_size": 1, "train_samples": 1}, "train_samples is 1; .* from 2 to 60000"),
    ):
        with pytest.raises(InputError, match=sentence):
            check(model, **changed)
    assert check("d", batch_size=256, train_samples=261)
    for path in ROOT.glob("notebooks/[56]_model_*.ipynb"):  # they keep images back, as said here
        assert "kept_back = max(1, len(x_train) // 60)" in path.read_text()


def test_a_value_that_is_missing_or_a_model_that_is_unknown_is_refused(check):
    with pytest.raises(InputError, match="keep_model is None; it must be True or False"):
        check_parameters("a1", {name: GOOD[name] for name in GOOD if name != "keep_model"})
    with pytest.raises(InputError, match="model is 'none'; it must be one of a1, a2, b, c, d, e"):
        check("none")
    # What else a notebook has does not count.
    assert check(np=None, x_train=[1], first_kernel_size=7) == check()


def test_a_runs_folder_is_named_by_its_parameters(check, tmp_path, monkeypatch):
    name = "epochs10-batch16-samples-all-mnist-float32-seed0"
    assert check().run_folder() == tmp_path / "runs/a1" / f"{name}-by_hand"
    assert check().run_folder().is_dir()  # made, so that what is in the way is found before
    monkeypatch.setenv(parameters.CODE_VARIABLE, "c" * 64)
    assert check(keep_model=False).run_folder() == tmp_path / "runs/a1" / name
    changed = {"epochs": 3, "batch_size": 8, "seed": 1, "train_samples": 500}
    own = {"dataset": "mnist-small", "precision": "mixed_bfloat16", "first_kernel_size": 7}
    checked = check("c", **changed | own)
    name = "epochs3-batch8-samples500-mnist-small-mixed_bfloat16-first_kernel_size7-seed1"
    assert checked.run_folder() == tmp_path / "runs/c" / name
    assert parameters.title_of("c", checked.recorded()) == SETTINGS["c7"].title
    assert parameters.title_of("c", {"first_kernel_size": 5}) == "CNN C, first_kernel_size 5"


def test_a_results_folder_that_cannot_be_written_is_refused(check, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/a1").touch()  # where the run's own folder would be
    for name in ("file", "file/below", "taken"):
        with pytest.raises(InputError, match=r"results_dir is .* it must be"):
            check(results_dir=str(tmp_path / name))

    # As root may write anywhere, the refusal of the system is played.
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(parameters.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"results_dir is .* \(permission denied\); it must be"):
        check()


def test_a_data_set_is_recorded_by_its_content_never_its_path(check, small_mnist, tmp_path):
    name = check(dataset=str(small_mnist)).recorded()["dataset"]
    assert re.fullmatch(r"small-[0-9a-f]{8}", name)
    # Another file of the same name has another name in records.
    other = write_npz(tmp_path / "small.npz", {"x_train": [0]})
    assert check(dataset=str(other)).recorded()["dataset"] not in (name, "small")
    # A long name is cut: a folder's name has its limit.
    other = other.rename(tmp_path / f"{'x' * 240}.npz")
    assert len(check(dataset=str(other)).run_folder().name) < 150


def test_a_data_set_is_read_once_for_many_runs_but_anew_when_changed(check, tmp_path, monkeypatch):
    path, read, reads = tmp_path / "own.npz", Path.read_bytes, []
    path.write_bytes(b"one")
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read(path))
    names = {check(seed=seed, dataset=str(path)).dataset_name for seed in range(20)}
    assert (len(names), len(reads)) == (1, 1)
    path.write_bytes(b"other")
    assert check(dataset=str(path)).dataset_name not in names


def test_home_and_relative_places_are_understood(check, small_mnist, tmp_path, monkeypatch):
    name = check(dataset=str(small_mnist)).dataset_name
    home, checkout = tmp_path / "home", tmp_path / "checkout"
    deep = checkout / "runs/a2/one/of/many"
    for folder in (home, checkout / "mnist_utils", checkout / "notebooks", deep):
        folder.mkdir(parents=True)
    [shutil.copy(small_mnist, folder) for folder in (home, checkout)]
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(deep)
    assert check(dataset="~/small.npz").dataset_name == name
    assert check(results_dir="~/own").run_folder().parents[1] == home / "own"
    # An executed copy that is run again where it lies: the project is the checkout above it.
    assert project_folder() == checkout
    assert check(dataset="small.npz").dataset_name == name
    assert check(results_dir=None).run_folder().parents[1] == checkout / "runs"
    monkeypatch.chdir(checkout / "runs/a2/one")
    assert check(results_dir="runs").run_folder().parents[1] == checkout / "runs"
    assert list(deep.iterdir()) == []
    # From a notebook's folder it is the same one as from the root, unless it lies there already.
    (checkout / "notebooks/here").mkdir()
    monkeypatch.chdir(checkout / "notebooks")
    for given, place in (("own", "own"), ("here", "notebooks/here"), ("../up", "up")):
        folder = check(results_dir=given).run_folder().parents[1].resolve()
        assert folder == checkout / place
    # Outside of any checkout it is the one that the helpers lie in.
    monkeypatch.chdir(home)
    assert (project_folder(), parameters.results_folder(None)) == (ROOT, ROOT / "runs")


def test_the_headless_runner_says_where_the_files_really_are(check, small_mnist, monkeypatch):
    monkeypatch.setenv(parameters.DATASET_VARIABLE, str(small_mnist))
    monkeypatch.setenv(parameters.RESULTS_VARIABLE, str(small_mnist.parent / "elsewhere"))
    checked = check(dataset="not/here/digits.npz", results_dir="somewhere")
    assert re.fullmatch(r"digits-[0-9a-f]{8}", checked.dataset_name)
    assert checked.run_folder().parents[1] == small_mnist.parent / "elsewhere"
    assert (checked.dataset, checked.results_dir) == ("not/here/digits.npz", "somewhere")


def test_set_up_refuses_what_would_make_the_precision_another(monkeypatch):
    if not GPUS:
        with pytest.raises(InputError, match=r"precision is 'mixed_float16'; .*no GPU was found"):
            set_up(0, "mixed_float16")
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "TF_SET_ONEDNN_FPMATH_MODE"):
        monkeypatch.setenv(name, "BF16")
        with pytest.raises(InputError, match=rf"^{name} is 'BF16'; it must be unset: the param"):
            set_up(0, "float32")
        monkeypatch.setenv(name, "strict")
    for name in ("KERAS_MAX_EPOCHS", "KERAS_MAX_STEPS_PER_EPOCH"):
        monkeypatch.setenv(name, "1")
        with pytest.raises(InputError, match=rf"^{name} is '1'; it must be unset: the param"):
            set_up(0, "float32")
        monkeypatch.delenv(name)
    tf.config.experimental.enable_tensor_float_32_execution(True)  # as it is unasked
    set_up(0, "float32")
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_a_notebook_shows_the_sentence_and_no_traceback(tmp_path):
    output = tmp_path / "out.ipynb"
    with pytest.raises(papermill.PapermillExecutionError):
        execute("4_model_c", output, epochs=2.5, results_dir=str(tmp_path / "runs"))
    notebook = nbformat.read(output, 4)
    errors = [o for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "error"]
    sentence = "InputError: epochs is 2.5; it must be a whole number of 1 or more."
    assert [error.traceback for error in errors] == [[sentence]]
    # Refused by the first cell after the parameters, before anything is loaded.
    assert "x_train shape" not in str(notebook) and not (tmp_path / "runs").exists()


COMMANDS = [
    ("--models a2 -p epochs=ten", "epochs is 'ten'; it must be a whole number of 1 or more."),
    ("--models a2 -p epochs=true", "epochs is True; it must be a whole number of 1 or more."),
    ("-p batch_size=70000", "batch_size is 70000; it must be a whole number from 1 to"),
    ("--models a2 -p epoch=3", "epoch is not a parameter of 2_model_a2; it has epochs,"),
    ("-p epochs", "-p is 'epochs'; it must be NAME=VALUE"),
    ("--models a3", "models has 'a3'; it must be some of a1, a2, b, c, c7, d, e"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMANDS)
def test_the_command_line_refuses_before_anything_runs(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # which main sets for the process
    assert main(["run", *arguments.split(), "--results-dir", str(tmp_path / "runs")]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert message in error
    assert not list(tmp_path.glob("runs/*"))
