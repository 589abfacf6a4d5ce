"""The benchmarks measure what they say, and their page shows what was measured."""

import json
import sys

import pytest
from conftest import ROOT, run_python

from mnist_utils.parameters import SETTINGS

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Return a function that imports a file of benchmarks/."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield __import__
    for name in ("measure", "one", "original"):
        sys.modules.pop(name, None)


def last_lines(*arguments) -> list[str]:
    done = run_python(*arguments, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-2:]


def check_measured(line: str) -> None:
    measured = json.loads(line)
    assert measured["seconds"] > 0
    assert 50 < measured["megabytes"] < 10_000


def test_a_notebook_is_measured():
    check_measured(last_lines("one.py", "d", "float32", 2560)[-1])


def test_the_original_is_measured_with_tensorflows_own_choice_of_kernels(monkeypatch):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    script = "import os, one; one.main('a2', 'original', '2560'); "
    script += "print(os.environ.get('TF_ENABLE_ONEDNN_OPTS'))"
    measured, kernels = last_lines("-c", script)
    check_measured(measured)
    assert kernels == "None"


def test_the_comparison_is_timed_from_its_kernel_to_its_last_cell():
    check_measured(last_lines("one.py", "8_comparison", "around")[-1])


# Keras calls a layer's Python code only while it traces a graph.
COUNT_TRACES = """
import keras, numpy as np, one

traced = []

class Layer(keras.layers.Layer):
    def call(self, x):
        traced.append(x.shape)
        return x

class Began(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        traced.clear()

x = np.random.default_rng(0).random((1000, 4), "float32")
y = np.eye(2)[x.argmax(axis=1) % 2]
model = keras.Sequential([keras.Input((4,)), Layer(), keras.layers.Dense(2, "softmax")])
model.compile(loss="categorical_crossentropy", metrics=["accuracy"])
given = {"batch_size": 256, "validation_data": (x, y), "callbacks": [Began()]}
one.timed_fit(lambda: model.fit(x, y, **given))
print(traced)
"""


def test_the_originals_code_is_traced_before_it_is_timed():
    assert last_lines("-c", COUNT_TRACES)[-1] == "[]"


def test_the_page_shows_what_was_measured(benchmark, tmp_path, monkeypatch):
    committed = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(committed, encoding="utf-8")
    measure = benchmark("measure")
    monkeypatch.setattr(measure, "HERE", tmp_path)
    measure.report()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == committed
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    for setting, seconds in measure.training_seconds().items():
        assert SETTINGS[setting].title in committed
        assert f"| {measure.seconds_text(seconds)} " in committed.split("whole training")[1]
    assert list(measure.training_seconds()) == list(SETTINGS)


def test_each_whole_round_is_kept_beside_the_other_models(benchmark, tmp_path, monkeypatch):
    measure, here = benchmark("measure"), {"processor": "this"}
    monkeypatch.setattr(measure, "MEASUREMENTS", tmp_path / "measurements.json")
    monkeypatch.setattr(measure, "describe_machine", lambda: here)

    def measure_model(model, number, with_bfloat16):
        if number == 2:
            raise KeyboardInterrupt
        return {"float32": {"seconds": number, "macs": 7}}

    monkeypatch.setattr(measure, "measure_model", measure_model)
    old = {"machine": here, "macs": {}, "rounds": {"a1": ["old"], "c": ["old"]}}
    new = [{"float32": {"seconds": number}} for number in range(2)]
    for machine, kept in ((here, {"a1": ["old"]}), ({"processor": "another"}, {})):
        measure.MEASUREMENTS.write_text(json.dumps(old | {"machine": machine}))
        with pytest.raises(KeyboardInterrupt):
            measure.measure(["c"], 3)
        after = json.loads(measure.MEASUREMENTS.read_text())
        assert after == {"machine": here, "macs": {"c": 7}, "rounds": kept | {"c": new}}
