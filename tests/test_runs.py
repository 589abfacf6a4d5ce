"""The record of a run: whole or not there, checked when read."""

import json
import shutil

import keras
import numpy as np
import pytest

from mnist_utils import runs
from mnist_utils.parameters import InputError, check_parameters
from mnist_utils.runs import load_run, load_runs, save_run


@pytest.fixture(scope="module")
def model():
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(4, (5, 3), padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(2, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


@pytest.fixture
def save(model, tmp_path):
    """Return a function that saves a run of two epochs, and gives its folder."""

    def save(seed=0, test_loss=0.5, draw=0, **changed):
        parameters = check_parameters(
            "a1", epochs=2, batch_size=256, seed=seed, results_dir=str(tmp_path), **changed
        )
        probabilities = np.random.default_rng(draw).dirichlet(np.ones(10), size=50)
        values = [0.25, 0.125]
        save_run(
            model,
            parameters,
            title="CNN A.1",
            history=dict.fromkeys(("loss", "accuracy", "val_loss", "val_accuracy"), values),
            seconds_per_epoch=[1.5, 1.25],
            test_loss=test_loss,
            test_accuracy=0.75,
            probabilities=probabilities,
            labels=np.arange(50) % 10,
        )
        return parameters.run_folder()

    return save


def test_what_is_saved_is_loaded(save):
    run = load_run(save())
    record = run.record
    assert record.model == "a1"
    assert record.run.model_dump() == {
        "epochs": 2,
        "batch_size": 256,
        "seed": 0,
        "train_samples": None,
        "dataset": "mnist",
        "precision": "float32",
    }
    assert record.history.val_loss == [0.25, 0.125]
    assert record.seconds_per_epoch == [1.5, 1.25]
    assert (record.test_loss, record.test_accuracy) == (0.5, 0.75)
    expected = np.random.default_rng(0).dirichlet(np.ones(10), size=50)
    arrays = run.predictions()
    np.testing.assert_allclose(arrays["probabilities"], expected, atol=1e-3)
    np.testing.assert_array_equal(arrays["predicted"], expected.argmax(axis=1))


def test_the_architecture_is_read_off_the_model(save, model):
    architecture = load_run(save()).record.architecture
    assert architecture.conv_layers == 2
    assert architecture.kernel_sizes == [[5, 3], [3, 3]]
    assert (architecture.max_pool, architecture.padding) == (True, True)
    assert (architecture.dropout, architecture.batch_normalization) == (False, False)
    assert architecture.parameters == model.count_params()
    # Output places x kernel x channels in x channels out, by hand.
    convolutions = 28 * 28 * 15 * 1 * 4 + 12 * 12 * 9 * 4 * 2
    assert architecture.macs == convolutions + 12 * 12 * 2 * 10


def test_the_digest_tells_architectures_apart_but_not_names_or_precision(model):
    def dense(units=8, **options):
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, **options)])

    digest = runs.architecture_digest(dense())
    assert runs.architecture_digest(dense(name="other", dtype="bfloat16")) == digest
    assert runs.architecture_digest(dense(activation="relu")) != digest
    assert runs.architecture_digest(dense(units=9)) != digest


def test_other_parameters_never_overwrite_a_run(save):
    folders = {save(), save(seed=1), save(train_samples=300), save(precision="mixed_bfloat16")}
    assert len(folders) == 4
    assert all(load_run(folder) for folder in folders)


def test_the_same_parameters_replace_a_run_as_a_whole(save):
    folder = save(test_loss=0.5)
    first = load_run(folder).predictions()
    assert save(test_loss=0.25, draw=1) == folder
    assert load_run(folder).record.test_loss == 0.25
    assert (load_run(folder).predictions()["probabilities"] != first["probabilities"]).any()
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".npz"]


def test_a_run_cut_off_while_it_is_replaced_leaves_the_older_one_whole(save, monkeypatch):
    folder = save(test_loss=0.5)
    write = runs.write_whole

    def cut_off(path, content):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(runs, "write_whole", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save(test_loss=0.25, draw=1)
    run = load_run(folder)
    assert run.record.test_loss == 0.5
    run.predictions()


def test_a_number_that_is_not_finite_is_refused_and_nothing_is_saved(save, tmp_path):
    with pytest.raises(InputError, match=r"not saved: test_loss"):
        save(test_loss=float("nan"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not list(save().glob("*.part"))


def _changed(**changes):
    def change(text):
        record = json.loads(text)
        for path, value in changes.items():
            *parents, last = path.split("__")
            target = record
            for parent in parents:
                target = target[parent]
            target[last] = value
        return json.dumps(record)

    return change


BAD_RECORDS = {
    "truncated": (lambda text: text[: len(text) // 2], "not JSON"),
    "empty": (lambda text: "", "not JSON"),
    "a list": (lambda text: "[]", "Input should be"),
    "a newer schema": (_changed(schema_version=99), "schema_version is 99, newer"),
    "no schema": (_changed(schema_version=None), "schema_version"),
    "NaN for a loss": (_changed(test_loss=float("nan")), "test_loss"),
    "a loss that is text": (_changed(test_loss="0.5"), "test_loss"),
    "NaN in the history": (_changed(history__loss=[0.5, float("nan")]), "history.loss.1"),
    "an epoch too few": (_changed(history__val_loss=[0.5]), "val_loss has 1 numbers for 2"),
    "an accuracy in per cent": (_changed(test_accuracy=98.5), "test_accuracy"),
    "a path for the predictions": (_changed(predictions__file="../x.npz"), "predictions.file"),
    "a kernel of one number": (_changed(architecture__kernel_sizes=[[3], [3]]), "kernel_sizes.0"),
    "a kernel too few": (_changed(architecture__kernel_sizes=[[3, 3]]), "one pair for each"),
    "NaN in a parameter of its own": (
        _changed(run__first_kernel_size=float("nan")),
        "first_kernel",
    ),
    "true for a version": (_changed(schema_version=True), "schema_version"),
    "no training images": (_changed(run__train_samples=0), "train_samples"),
    "nested without end": (lambda text: "[" * 100_000, "not JSON"),
    "a run without a seed": (_changed(run={"epochs": 2}), "run.batch_size"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_named_and_left_out(case, save, tmp_path):
    change, message = BAD_RECORDS[case]
    bad, good = save(seed=1), save(seed=2)
    path = bad / "metrics.json"
    path.write_text(change(path.read_text()))
    found, (problem,) = load_runs(tmp_path)
    assert [run.folder for run in found] == [good]
    assert problem.startswith(f"{path}: ")
    assert message in problem
    assert "\n" not in problem


def test_predictions_of_another_run_are_refused(save):
    folder, other = save(seed=1), save(seed=2, draw=1)
    (mine,), (theirs,) = folder.glob("*.npz"), other.glob("*.npz")
    shutil.copy(theirs, mine)
    with pytest.raises(InputError, match="SHA-256 differs"):
        load_run(folder).predictions()
    mine.unlink()
    with pytest.raises(InputError, match="missing"):
        load_run(folder).predictions()
    # Such a run is named and left out; it does not bring the comparison down.
    found, (problem,) = load_runs(folder.parents[1])
    assert [run.folder for run in found] == [other]
    assert str(mine) in problem


def test_a_file_half_written_is_not_left_behind(tmp_path, monkeypatch):
    path = tmp_path / "file"
    runs.write_whole(path, b"old")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(runs.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        runs.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("model name\t: X 9\nflags\t: sse avx2 avx512f avx512_bf16", "X 9, AVX-512 with bfloat16"),
        ("model name\t: X 9\nflags\t: sse avx2\n\nmodel name\t: X 9", "X 9, AVX2"),
        ("model name\t: X 9\nflags\t: sse", "X 9"),
    ],
)
def test_a_processor_is_told_by_its_name_and_its_widest_vectors(cpuinfo, expected, monkeypatch):
    monkeypatch.setattr(runs.Path, "read_text", lambda path: cpuinfo)
    assert runs.processor() == expected


def test_where_there_is_no_cpuinfo_the_processor_is_named_all_the_same(monkeypatch):
    def fail(path):
        raise FileNotFoundError

    monkeypatch.setattr(runs.Path, "read_text", fail)
    assert runs.processor()
