"""The record of a run and its model: whole or not there, checked when read."""

import hashlib
import io
import json
import os
import shutil
import sys
import tracemalloc
from contextlib import suppress
from functools import reduce
from threading import Barrier, BrokenBarrierError, Thread, get_ident

import numpy as np
import pytest
from test_parameters import GOOD

from mnist_utils import runs
from mnist_utils.loss_plot import DynamicLossPlot
from mnist_utils.parameters import CODE_VARIABLE, InputError, check_parameters
from mnist_utils.runs import load_model, load_record, load_runs, read_predictions, save_run
from mnist_utils.training import keras

IMAGES = np.random.default_rng(0).random((32, 28, 28, 1), "float32")
LABELS = np.eye(10)[np.arange(32) % 10]


def build():
    layers = keras.layers
    first = layers.Conv2D(4, (5, 3), padding="same", activation="relu")
    second = layers.Conv2D(2, 3, activation="relu")
    middle = [first, layers.MaxPooling2D(), second, layers.Flatten()]
    model = keras.Sequential([keras.Input((28, 28, 1)), *middle, layers.Dense(10, "softmax")])
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    return model


def train(model, epochs=2, callbacks=()):
    options = {"validation_data": (IMAGES[:8], LABELS[:8]), "batch_size": 16, "verbose": 0}
    callbacks = [*callbacks, plot := DynamicLossPlot()]
    model.fit(IMAGES, LABELS, epochs=epochs, callbacks=callbacks, **options)
    return plot


@pytest.fixture(scope="module")
def trained():
    return (model := build()), train(model)


@pytest.fixture
def save(trained, tmp_path, monkeypatch):
    """Return a function that saves a run, as the headless runner's are, and gives its folder."""
    monkeypatch.setenv(CODE_VARIABLE, "c" * 64)

    def save(test_loss=0.5, draw=None, trained=trained, **changed):
        given = GOOD | {"epochs": 2, "results_dir": str(tmp_path)} | changed
        parameters, (model, plot) = check_parameters("a1", given), trained
        plot.seed = parameters.seed  # as if it had been trained for each
        draw = parameters.seed if draw is None else draw
        probabilities = np.random.default_rng(draw).dirichlet(np.ones(10), size=32)
        save_run(model, parameters, plot, [test_loss, 0.75], probabilities, LABELS)
        return parameters.run_folder()

    return save


def test_what_is_saved_is_loaded(save, trained, tmp_path):
    record = load_record(folder := save())
    assert (record.model, record.title, record.code_sha256) == ("a1", "CNN A.1", "c" * 64)
    kept = record.run.model_dump()
    assert kept == {name: GOOD[name] for name in kept} | {"epochs": 2}
    for name, values in record.history.model_dump().items():
        assert values == pytest.approx(trained[1].history[name], abs=1e-6)
    assert (record.test_loss, record.test_accuracy, record.steps) == (0.5, 0.75, 2 * 2)
    assert record.total_seconds == pytest.approx(sum(trained[1].seconds_per_epoch), abs=0.01)
    assert record.multiply_adds == 3 * record.architecture.macs * 4 * GOOD["batch_size"]
    expected = np.random.default_rng(0).dirichlet(np.ones(10), size=32)
    arrays = read_predictions(folder)
    np.testing.assert_allclose(arrays["probabilities"], expected, atol=1e-3)
    np.testing.assert_array_equal(arrays["predicted"], expected.argmax(axis=1))
    np.testing.assert_array_equal(arrays["labels"], np.arange(32) % 10)


def test_runs_are_loaded_as_a_table_of_one_row_each(save, tmp_path):
    empty, problems = load_runs(tmp_path / "none")
    folders = [save(), save(seed=1, test_loss=0.25)]
    table, more = load_runs(tmp_path)
    assert (len(empty), problems, more) == (0, [], [])
    assert list(table.columns) == list(empty.columns)
    rows = table[["path", "setting", "seed", "by_hand", "test_loss"]].values.tolist()
    assert rows == [[folders[0], "a1", 0, False, 0.5], [folders[1], "a1", 1, False, 0.25]]


def test_the_architecture_is_read_off_the_model_and_told_by_a_digest(trained):
    def digest(units=8, **options):
        dense = keras.layers.Dense(units, **options)
        return runs.architecture_digest(keras.Sequential([keras.Input((4,)), dense]))

    found = runs.describe_architecture(trained[0])
    macs = 28 * 28 * 15 * 1 * 4 + 12 * 12 * 9 * 4 * 2 + 12 * 12 * 2 * 10  # by hand
    expected = {"conv_layers": 2, "kernel_sizes": [[5, 3], [3, 3]], "macs": macs}
    expected |= {"max_pool": True, "padding": True, "dropout": False, "batch_normalization": False}
    assert found == found | expected | {"parameters": trained[0].count_params()}
    assert digest(name="other", dtype="bfloat16") == digest()
    assert len({digest(), digest(9), digest(activation="relu"), digest(use_bias=False)}) == 4


def test_layers_within_layers_and_other_convolutions_are_counted():
    layers = keras.layers
    first, second = layers.Conv2D(4, 3, groups=2), layers.SeparableConv2D(8, 3, strides=2)
    inner = keras.Sequential([first, second, layers.DepthwiseConv2D((1, 3), use_bias=False)])
    outer = [keras.Input((12, 12, 2)), inner, layers.Flatten(), layers.Dense(10)]
    found = runs.describe_architecture(keras.Sequential(outer))
    # By hand: 10 x 10, then 4 x 4, then 4 x 2 places.
    macs = 100 * 9 * 4 + 16 * (9 * 4 + 4 * 8) + 8 * 3 * 8 + 64 * 10
    assert (found["macs"], found["conv_layers"]) == (macs, 3)
    assert found["kernel_sizes"] == [[3, 3], [3, 3], [1, 3]]
    for change in (keras.Sequential([layers.Conv2D(4, 3)]), layers.Conv2D(4, 3)):
        other = keras.Sequential([outer[0], change, layers.Flatten(), layers.Dense(10)])
        assert runs.architecture_digest(other) != found["digest"]


@pytest.mark.parametrize("describes_itself", [True, False])
def test_a_model_that_keras_cannot_save_costs_only_itself(describes_itself, save, capsys):
    class Noise(keras.layers.Layer):
        def __init__(self, amount, **options):
            super().__init__(**options)
            self.amount = amount

        def call(self, inputs):
            return self.amount * inputs

    noise = Noise(2.0 if describes_itself else np.ones(1))  # which Keras cannot write down
    layers = [keras.Input((28, 28, 1)), noise, keras.layers.Flatten()]
    model = keras.Sequential([*layers, keras.layers.Dense(10, "softmax")])
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    folder = save(trained=(model, train(model)))
    assert "The model itself is not saved: " in capsys.readouterr().out
    assert load_record(folder).model_file is None
    assert len(read_predictions(folder)["labels"]) == 32


def test_a_run_by_hand_never_touches_a_headless_one(save, monkeypatch):
    headless = save()
    before = {path.name: path.read_bytes() for path in headless.iterdir()}
    monkeypatch.delenv(CODE_VARIABLE)
    assert save(test_loss=0.25, draw=1).name == f"{headless.name}-by_hand"
    assert {path.name: path.read_bytes() for path in headless.iterdir()} == before
    table, problems = load_runs(headless.parents[1])
    assert (list(table.by_hand), problems) == ([False, True], [])


def test_the_same_parameters_replace_a_run_as_a_whole(save):
    folder = save()
    first = read_predictions(folder)
    save(test_loss=0.25, draw=1, keep_model=False)
    assert load_record(folder).test_loss == 0.25
    assert (read_predictions(folder)["predicted"] != first["predicted"]).any()
    assert sorted(path.suffix for path in folder.glob("[!.]*")) == [".json", ".npz"]


def test_two_that_save_the_same_run_at_once_do_so_one_after_the_other(save, monkeypatch):
    write, order, both = runs.write_whole, [], Barrier(2)

    def write_slowly(path, content):
        order.append(get_ident())
        with suppress(BrokenBarrierError):
            both.wait(timeout=1)  # together, where nothing holds the other back
        write(path, content)

    monkeypatch.setattr(runs, "write_whole", write_slowly)
    savers = [Thread(target=save, kwargs={"draw": draw}) for draw in (1, 2)]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()
    assert order == 3 * [order[0]] + 3 * [order[-1]] and order[0] != order[-1]
    assert read_predictions(save()) and load_model(save())


def test_epochs_that_were_not_trained_are_told_and_recorded(save, capsys):
    model, early = build(), keras.callbacks.EarlyStopping("val_loss", min_delta=9, patience=1)
    folder = save(epochs=5, trained=(model, train(model, 5, [early])))
    assert "Stopped after 2 of 5 epochs.\nSaved the run in" in capsys.readouterr().out
    (run,) = load_runs(folder.parents[1])[0].itertuples()
    assert (run.epochs, run.trained_epochs) == (5, 2)


def test_what_the_seed_does_not_give_is_not_saved(save, trained, tmp_path, capsys):
    model = build()
    plots = [train(model), train(model)]
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    plots.append(train(model))
    assert capsys.readouterr().out.count("This model was trained before, so what follows is") == 2
    # Another model than the watched one, one trained before, and that one compiled anew.
    pairs = [(trained[0], plots[0]), (model, plots[1]), (model, plots[2])]
    # And one whose training was interrupted in its second epoch.
    model, plot = build(), DynamicLossPlot()

    def interrupt(batch, logs):
        if plot.seconds_per_epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, 3, [plot, keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)])
    assert len(plot.history["loss"]) == 1
    for pair in (*pairs, (model, plot)):
        with pytest.raises(InputError, match="not saved: the model was not trained once"):
            save(trained=pair)
    with pytest.raises(InputError, match="not saved: test_loss"):
        save(test_loss=float("nan"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_model_is_read_by_an_older_keras_too(save, monkeypatch):
    folder, init = save(), keras.initializers.GlorotUniform.__init__

    def older(self, seed=None):  # without an argument that a later version has
        init(self, seed=seed)

    monkeypatch.setattr(keras.initializers.GlorotUniform, "__init__", older)
    assert load_model(folder).count_params() > 0


def change_record(folder, **changes):
    """Set fields of a record; a__b is b in a."""
    path = folder / "metrics.json"
    record = json.loads(path.read_text())
    for place, value in changes.items():
        *parents, last = place.split("__")
        reduce(dict.get, parents, record)[last] = value
    path.write_text(json.dumps(record))


def test_a_parameter_changed_since_it_was_checked_is_not_saved(save, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "batch_size", 7, raising=False)
    with pytest.raises(InputError, match=r"^The run is not saved: batch_size is 7, and was"):
        save()


def test_a_copy_and_a_run_in_anothers_folder_are_named_and_left_out(save, tmp_path):
    first = save()
    names = [first.name.replace("seed0", end) for end in ("seed0-by_hand", "seed1", "seed2")]
    copies = [*map(first.with_name, names), tmp_path / "a2" / first.name]
    for copy in copies:
        shutil.copytree(first, copy)
    change_record(copies[2], run__seed=2)
    expected = [f"it lies in another run's folder; its own is 'a1/{first.name}'."] * 4
    expected[2] = f"it repeats the run in {first}."
    table, problems = load_runs(tmp_path)
    assert list(table.path) == [first]
    assert problems == [f"{c / 'metrics.json'}: {e}" for c, e in zip(copies, expected, strict=True)]


BAD_RECORDS = [
    ({"schema_version": 99}, "schema_version: Input should be less than or equal to 1"),
    ({"history__loss": [0.5, float("nan")]}, "history.loss.1"),
    ({"history__val_loss": [0.5]}, "val_loss has 1 numbers; loss has 2"),
    ({"run__epochs": 1}, "history has 2 of 1 epochs"),
    ({"test_accuracy": 98.5}, "test_accuracy"),
    ({"predictions__file": "../x.npz"}, "predictions.file"),
    ({"architecture__kernel_sizes": [[3, 3]]}, "one pair for each"),
    ({"run__first_kernel_size": float("nan")}, "first_kernel"),
    ({"architecture__macs": 10**400}, "architecture.macs"),
    ({"test_loss": 1e300}, "test_loss"),
    ({"title": "$\\frac{$"}, "title"),
    ({"run__dataset": "x" * 1000}, "run.dataset"),
    ("{", "Invalid JSON"),
    ("[" * 100_000, "Invalid JSON"),
    ("[]", "Input should be"),
]


def test_a_bad_record_is_named_and_left_out(save, tmp_path):
    bad, good = save(seed=1), save(seed=2)
    path = bad / "metrics.json"
    whole = path.read_text()
    for change, message in BAD_RECORDS:
        path.write_text(whole if isinstance(change, dict) else change)
        change_record(bad, **change) if isinstance(change, dict) else None
        table, (problem,) = load_runs(tmp_path)
        assert list(table.path) == [good]
        assert problem.startswith(f"{path}: ") and message in problem and "\n" not in problem


def replace_file(folder, entry, content):
    """Put other content where a record's file lies, and let the record confirm it."""
    name = json.loads((folder / "metrics.json").read_text())[entry]["file"]
    (folder / name).write_bytes(content)
    change_record(folder, **{f"{entry}__sha256": hashlib.sha256(content).hexdigest()})
    return folder / name


def test_predictions_that_are_none_are_refused_in_bounded_memory(save, monkeypatch, request):
    whole = {"probabilities": np.zeros((32, 10), "f2")}
    whole |= dict.fromkeys(("predicted", "labels"), np.zeros(32, "u1"))

    def packed(**changed):
        np.savez_compressed(file := io.BytesIO(), **whole | changed)
        return file.getvalue()

    folder = save()
    monkeypatch.setattr(runs, "MOST_BYTES", 10**7)
    request.addfinalizer(tracemalloc.stop)
    for content in (
        packed(labels=np.array([{}] * 32)),  # pickled
        packed(probabilities=np.zeros((32, 9), "f2")),
        packed(probabilities=np.zeros((32, 10))),
        packed(predicted=np.zeros(31, "u1")),
        packed()[:-40],
        b"no zip",
        b"PK\5\6" + bytes(18),  # an empty one
        packed(probabilities=np.zeros((2**23, 10), "f2")),  # a bomb: 168 million bytes
    ):
        path = replace_file(folder, "predictions", content)
        tracemalloc.start()
        with pytest.raises(InputError, match=f"^{path}: not the predictions of a run, though"):
            read_predictions(folder)
        assert tracemalloc.get_traced_memory()[1] < 2 * 10**7


def test_files_of_another_run_or_none_are_refused(save):
    folder, other = save(seed=1), save(seed=2)
    (mine,) = folder.glob("*.npz")
    for path, read in ((mine, read_predictions), (folder / "model.keras", load_model)):
        path.write_bytes(path.read_bytes() + b"x")
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
    answers = [m.predict(IMAGES, verbose=0) for m in (load_model(folder), trained[0])]
    np.testing.assert_array_equal(*answers)
    assert not keras.saving.load_model(folder / "model.keras").compiled  # no optimizer is kept
    # Code in a file, which Keras's safe mode does not run.
    code = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x)])
    code.save(tmp_path / "code.keras")
    whole = (folder / "model.keras").read_bytes()
    for content in (b"", b"no Keras file", whole[:5000], (tmp_path / "code.keras").read_bytes()):
        path = replace_file(folder, "model_file", content)
        with pytest.raises(InputError, match=f"^{path}: not a Keras model, or one of another"):
            load_model(folder)
    save(keep_model=False)
    with pytest.raises(InputError, match="its model was not kept; remove the folder, and run it"):
        load_model(folder)


def test_variables_that_change_numbers_are_recorded_but_never_a_path(monkeypatch):
    for name in [name for name in os.environ if runs.LIBRARIES.match(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")  # as always
    assert runs.describe_environment()["variables"] == ""
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/somebody/dump")
    monkeypatch.setenv("CUDA_PATH", r"C:\Users\somebody\cuda")
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "3")
    found = runs.describe_environment()
    expected = "CUDA_PATH ONEDNN_MAX_CPU_ISA=AVX2 TF_ENABLE_ONEDNN_OPTS=0 XLA_FLAGS"
    assert (found["variables"], found["threads"]) == (expected, 3)
    assert not {os.uname().nodename, os.environ.get("USER", "-")} & {*map(str, found.values())}


def test_a_processor_is_told_by_its_generation_and_its_widest_vectors(monkeypatch):
    text = "model name\t: X 9\ncpu family\t: 6\nmodel\t: 85\nflags\t: sse avx2 avx512f{}\n\n"
    for more, expected in (("", "AVX-512"), (" avx512_bf16", "AVX-512 with bfloat16")):
        monkeypatch.setattr(runs.Path, "read_text", lambda path, more=more: text.format(more))
        assert runs.processor() == f"X 9, family 6 model 85, {expected}"
    monkeypatch.setattr(runs.Path, "read_text", lambda path: exec("raise FileNotFoundError"))
    assert runs.processor()
