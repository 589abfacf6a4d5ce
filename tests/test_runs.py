"""The record of a run and its model: whole or not there, checked when read."""

import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import tracemalloc

import numpy as np
import pytest
from conftest import python

from mnist_utils import runs
from mnist_utils.loss_plot import DynamicLossPlot
from mnist_utils.parameters import CODE_VARIABLE, InputError, check_parameters
from mnist_utils.runs import load_model, load_record, load_runs, read_predictions, save_run
from mnist_utils.training import keras

GOOD = {"epochs": 2, "batch_size": 16, "seed": 0, "train_samples": None, "dataset": "mnist"}
GOOD |= {"precision": "float32", "results_dir": None, "keep_model": True}
IMAGES = np.random.default_rng(0).random((32, 28, 28, 1), "float32")
LABELS = np.eye(10)[np.arange(32) % 10]


def build():
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(4, (5, 3), padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(2, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    return model


def train(model, epochs=2, callbacks=()):
    plot, validation = DynamicLossPlot(), (IMAGES[:8], LABELS[:8])
    options = {"epochs": epochs, "batch_size": 16, "callbacks": [*callbacks, plot], "verbose": 0}
    model.fit(IMAGES, LABELS, validation_data=validation, **options)
    return plot


@pytest.fixture(scope="module")
def trained():
    model = build()
    return model, train(model)


@pytest.fixture
def save(trained, tmp_path, monkeypatch):
    """Return a function that saves a run, as the headless runner's are, and gives its folder."""
    monkeypatch.setenv(CODE_VARIABLE, "c" * 64)

    def save(test_loss=0.5, draw=None, trained=trained, **changed):
        given = GOOD | {"results_dir": str(tmp_path)} | changed
        parameters, (model, plot) = check_parameters("a1", given), trained
        draw = parameters.seed if draw is None else draw
        probabilities = np.random.default_rng(draw).dirichlet(np.ones(10), size=32)
        save_run(model, parameters, plot, [test_loss, 0.75], probabilities, LABELS)
        return parameters.run_folder()

    return save


def test_what_is_saved_is_loaded(save, trained, tmp_path):
    record = load_record(folder := save())
    assert (record.model, record.title, record.code_sha256) == ("a1", "CNN A.1", "c" * 64)
    kept = ("epochs", "batch_size", "seed", "train_samples", "dataset", "precision")
    assert record.run.model_dump() == {name: GOOD[name] for name in kept}
    for name, values in record.history.model_dump().items():
        assert values == pytest.approx(trained[1].history[name], abs=1e-6)
    assert (record.test_loss, record.test_accuracy) == (0.5, 0.75)
    assert record.total_seconds == pytest.approx(sum(trained[1].seconds_per_epoch), abs=0.01)
    assert record.steps == 2 * 2
    assert record.multiply_adds == 3 * record.architecture.macs * 4 * 16
    expected = np.random.default_rng(0).dirichlet(np.ones(10), size=32)
    arrays = read_predictions(folder)
    np.testing.assert_allclose(arrays["probabilities"], expected, atol=1e-3)
    np.testing.assert_array_equal(arrays["predicted"], expected.argmax(axis=1))
    np.testing.assert_array_equal(arrays["labels"], np.arange(32) % 10)


def test_runs_are_loaded_as_a_table_of_one_row_each(save, tmp_path):
    empty, problems = load_runs(tmp_path / "none")
    assert (len(empty), problems) == (0, [])
    folders = [save(), save(seed=1, test_loss=0.25)]
    table, problems = load_runs(tmp_path)
    assert problems == []
    assert list(table.columns) == list(empty.columns)
    assert list(table.path) == folders
    assert list(table.test_loss) == [0.5, 0.25]
    assert list(table.seed) == [0, 1]
    assert set(table.setting) == {"a1"} and not table.by_hand.any()


def test_the_architecture_is_read_off_the_model(save, trained):
    architecture = load_record(save()).architecture
    assert architecture.conv_layers == 2
    assert architecture.kernel_sizes == [[5, 3], [3, 3]]
    assert (architecture.max_pool, architecture.padding) == (True, True)
    assert (architecture.dropout, architecture.batch_normalization) == (False, False)
    assert architecture.parameters == trained[0].count_params()
    # Output places x kernel x channels in x channels out, by hand.
    convolutions = 28 * 28 * 15 * 1 * 4 + 12 * 12 * 9 * 4 * 2
    assert architecture.macs == convolutions + 12 * 12 * 2 * 10


def test_the_digest_tells_architectures_apart_but_not_names_or_precision():
    def dense(units=8, **options):
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, **options)])

    digest = runs.architecture_digest(dense())
    assert runs.architecture_digest(dense(name="other", dtype="bfloat16")) == digest
    assert runs.architecture_digest(dense(activation="relu")) != digest
    assert runs.architecture_digest(dense(units=9)) != digest


def test_a_run_by_hand_never_touches_a_headless_one(save, monkeypatch):
    headless = save()
    before = {path.name: path.read_bytes() for path in headless.iterdir()}
    monkeypatch.delenv(CODE_VARIABLE)
    by_hand = save(test_loss=0.25, draw=1)
    assert by_hand.name == f"{headless.name}-by_hand"
    assert {path.name: path.read_bytes() for path in headless.iterdir()} == before
    table, problems = load_runs(headless.parents[1])
    assert (list(table.by_hand), problems) == ([False, True], [])


def test_the_same_parameters_replace_a_run_as_a_whole(save):
    folder = save()
    first = read_predictions(folder)
    assert save(test_loss=0.25, draw=1, keep_model=False) == folder
    assert load_record(folder).test_loss == 0.25
    assert (read_predictions(folder)["probabilities"] != first["probabilities"]).any()
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".npz"]


def test_a_run_cut_off_while_it_is_replaced_leaves_the_older_one_whole(save, monkeypatch):
    folder, write = save(), runs.write_whole

    def cut_off(path, content):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(runs, "write_whole", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save(test_loss=0.25, draw=1)
    assert load_record(folder).test_loss == 0.5
    read_predictions(folder)
    load_model(folder)


def test_a_process_killed_while_it_writes_leaves_nothing_for_long(save):
    folder = save()
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from mnist_utils import runs
        runs.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        runs.write_whole(Path(sys.argv[1]), b"new")"""
    assert subprocess.run(python("-c", script, folder / "metrics.json")).returncode == -9
    (part,) = folder.glob(".*")
    assert part.read_bytes() == b"new"
    assert load_record(folder).test_loss == 0.5
    save()
    assert not list(folder.glob(".*"))


def test_a_full_disk_leaves_the_older_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    runs.write_whole(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))  # the system refuses more
    try:
        with pytest.raises(OSError, match="too large"):
            runs.write_whole(path, bytes(2**21))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_epochs_that_were_not_trained_are_told_and_recorded(save, capsys):
    model, early = build(), keras.callbacks.EarlyStopping("val_loss", min_delta=9, patience=1)
    folder = save(epochs=5, trained=(model, train(model, 5, [early])))
    assert "Stopped after 2 of 5 epochs.\nSaved the run in" in capsys.readouterr().out
    assert (load_record(folder).run.epochs, load_record(folder).trained_epochs) == (5, 2)
    table, problems = load_runs(folder.parents[1])
    assert (list(table.epochs), list(table.trained_epochs), problems) == ([5], [2], [])


def test_what_the_seed_does_not_give_is_not_saved(save, trained, tmp_path):
    model = build()
    first = train(model)
    with pytest.raises(InputError, match="not saved: the model was not trained once"):
        save(trained=(trained[0], first))  # another model than the one that was watched
    again = train(model)
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    for plot in (again, train(model)):
        with pytest.raises(InputError, match="not saved: the model was not trained once"):
            save(trained=(model, plot))
    with pytest.raises(InputError, match="not saved: test_loss"):
        save(test_loss=float("nan"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def change_record(folder, change):
    path = folder / "metrics.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_copy_and_a_run_in_anothers_folder_are_named_and_left_out(save, tmp_path):
    first = save()
    expected = {}
    for name, change in {
        "seed1": lambda record: None,
        "seed2": lambda record: record["run"].update(seed=2),
        "seed0-by_hand": lambda record: None,
    }.items():
        copy = first.with_name(first.name.replace("seed0", name))
        shutil.copytree(first, copy)
        change_record(copy, change)
        own = f"it lies in another run's folder; its own is a1/{first.name}."
        said = f"it repeats the run in {first}." if name == "seed2" else own
        expected[copy] = f"{copy / 'metrics.json'}: {said}"
    shutil.copytree(first, moved := tmp_path / "a2" / first.name)
    expected[moved] = f"{moved / 'metrics.json'}: {own}"
    table, problems = load_runs(tmp_path)
    assert list(table.path) == [first]
    assert sorted(problems) == sorted(expected.values())


def put(**changes):
    """Return a function that sets fields of a record; a__b is b in a."""

    def change(record):
        for place, value in changes.items():
            *parents, last = place.split("__")
            target = record
            for parent in parents:
                target = target[parent]
            target[last] = value

    return change


BAD_RECORDS = [
    (put(schema_version=99), "schema_version is 99, newer"),
    (put(schema_version=None), "schema_version"),
    (put(test_loss=float("nan")), "test_loss"),
    (put(history__loss=[0.5, float("nan")]), "history.loss.1"),
    (put(history__val_loss=[0.5]), "val_loss has 1 numbers; loss has 2"),
    (put(run__epochs=1), "history has 2 of 1 epochs"),
    (put(test_accuracy=98.5), "test_accuracy"),
    (put(predictions__file="../x.npz"), "predictions.file"),
    (put(architecture__kernel_sizes=[[3, 3]]), "one pair for each"),
    (put(run__first_kernel_size=float("nan")), "first_kernel"),
    (put(run={"epochs": 2}), "run.batch_size"),
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "Input should be"),
]


def test_a_bad_record_is_named_and_left_out(save, tmp_path):
    bad, good = save(seed=1), save(seed=2)
    path = bad / "metrics.json"
    whole = path.read_text()
    for change, message in BAD_RECORDS:
        path.write_text(change if isinstance(change, str) else whole)
        if callable(change):
            change_record(bad, change)
        table, (problem,) = load_runs(tmp_path)
        assert list(table.path) == [good]
        assert problem.startswith(f"{path}: ") and message in problem
        assert "\n" not in problem


def replace_file(folder, entry, content):
    """Put other content where a record's file lies, and let the record confirm it."""
    name = json.loads((folder / "metrics.json").read_text())[entry]["file"]
    (folder / name).write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    change_record(folder, put(**{f"{entry}__sha256": sha256}))
    return folder / name


def packed(**changed):
    file = io.BytesIO()
    arrays = {"probabilities": np.zeros((32, 10), "f2"), "predicted": np.zeros(32, "u1")}
    np.savez_compressed(file, **arrays | {"labels": np.zeros(32, "u1")} | changed)
    return file.getvalue()


HOSTILE = [
    packed(labels=np.array([{}] * 32)),  # pickled
    packed(probabilities=np.zeros((32, 9), "f2")),
    packed(probabilities=np.zeros((32, 10))),
    packed(predicted=np.zeros(31, "u1")),
    packed()[:-40],
    b"no zip",
    b"PK\5\6" + bytes(18),  # an empty one
    packed(probabilities=np.zeros((2**23, 10), "f2")),  # a bomb: 168 million bytes
]


def test_predictions_that_are_none_are_refused_in_bounded_memory(save, monkeypatch):
    folder = save()
    monkeypatch.setattr(runs, "MOST_BYTES", 10**7)
    for content in HOSTILE:
        path = replace_file(folder, "predictions", content)
        tracemalloc.start()
        with pytest.raises(InputError) as error:
            read_predictions(folder)
        assert tracemalloc.get_traced_memory()[1] < 2 * 10**7
        tracemalloc.stop()
        assert str(error.value).startswith(f"{path}: not the predictions of a run")


def test_files_of_another_run_or_none_are_refused(save):
    folder, other = save(seed=1), save(seed=2)
    (mine,), (theirs,) = folder.glob("*.npz"), other.glob("*.npz")
    for path, read in ((mine, read_predictions), (folder / "model.keras", load_model)):
        whole = path.read_bytes()
        path.write_bytes(whole + b"x")
        with pytest.raises(InputError, match=f"^{path}: not the record's file .its SHA-256"):
            read(folder)
        path.unlink()
        with pytest.raises(InputError, match=f"^{path}: no such file or directory.$"):
            read(folder)
    # A run without its predictions is named and left out, when all are loaded.
    table, problems = load_runs(folder.parents[1])
    assert (list(table.path), problems) == ([other], [f"{mine}: missing."])


def test_a_model_is_loaded_or_refused_in_a_sentence(save, trained, tmp_path):
    folder = save()
    model = load_model(folder)
    np.testing.assert_array_equal(
        model.predict(IMAGES, verbose=0), trained[0].predict(IMAGES, verbose=0)
    )
    assert model.optimizer is None  # its state is not kept
    # Code in a file, which Keras's safe mode does not run.
    code = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x)])
    code.save(tmp_path / "code.keras")
    whole = (folder / "model.keras").read_bytes()
    for content in (b"", b"no Keras file", whole[:5000], (tmp_path / "code.keras").read_bytes()):
        path = replace_file(folder, "model_file", content)
        with pytest.raises(InputError, match=f"^{path}: not a Keras model, or one of another"):
            load_model(folder)
    folder = save(keep_model=False)
    assert load_record(folder).model_file is None
    assert not (folder / "model.keras").exists()
    with pytest.raises(InputError, match="its model was not kept; run it again with keep_model"):
        load_model(folder)


def test_variables_that_change_numbers_are_recorded_but_never_a_path(monkeypatch):
    for name in [name for name in os.environ if runs.LIBRARIES.match(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")  # as always
    assert runs.describe_environment()["variables"] == ""
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/somebody/dump")
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "3")
    found = runs.describe_environment()
    assert found["variables"] == "ONEDNN_MAX_CPU_ISA=AVX2 TF_ENABLE_ONEDNN_OPTS=0 XLA_FLAGS"
    assert found["threads"] == 3
    assert not {os.uname().nodename, os.environ.get("USER", "-")} & {*map(str, found.values())}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("sse avx2 avx512f avx512_bf16", "AVX-512 with bfloat16"), ("sse avx2", "AVX2")],
)
def test_a_processor_is_told_by_its_generation_and_its_widest_vectors(flags, expected, monkeypatch):
    info = f"model name\t: X 9\ncpu family\t: 6\nmodel\t: 85\nflags\t: {flags}\n\n"
    monkeypatch.setattr(runs.Path, "read_text", lambda path: info)
    assert runs.processor() == f"X 9, family 6 model 85, {expected}"
    monkeypatch.setattr(runs.Path, "read_text", lambda path: exec("raise FileNotFoundError"))
    assert runs.processor()
