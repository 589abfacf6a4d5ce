"""The benchmarks measure what they say, and their page shows what was measured."""

import json
import re
import subprocess
import sys
from statistics import median

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT, python

from mnist_utils.parameters import SETTINGS
from mnist_utils.runs import architecture_digest, load_runs

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Return a function that imports a file of benchmarks/."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield __import__
    for name in ("measure", "original", "many_runs"):
        sys.modules.pop(name, None)


def measured(*arguments) -> dict:
    command = python(BENCHMARKS / "one.py", *arguments)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_originals_networks_are_those_of_the_notebooks(benchmark):
    runs, _ = load_runs(ROOT / "results")
    recorded = {
        run.record.model: run.record.architecture.digest
        for run in runs
        if run.record.run.model_dump().get("first_kernel_size") != 7
    }
    models = benchmark("original").MODELS
    assert {name: architecture_digest(make()) for name, make in models.items()} == {
        name: recorded[name] for name in models
    }


@pytest.mark.parametrize("way", ["original", "float32"])
def test_an_epoch_is_measured(way):
    one = measured("a2", way, 2560)
    assert one["seconds"] > 0
    assert 300 < one["peak_megabytes"] < 10_000


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


def test_the_originals_code_is_traced_before_it_is_timed(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    command = python("-c", COUNT_TRACES)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_originals_code_runs_with_tensorflows_own_choice_of_kernels(monkeypatch):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    chosen = "os.environ.get('TF_ENABLE_ONEDNN_OPTS')"
    # What it learns in two steps is chance, and no matter here.
    script = "import os, one; one.timed_fit = lambda run: run(); "
    script += f"one.train_original('a2', 512); print({chosen})"
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    done = subprocess.run(python("-c", script), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "None"


def test_the_page_shows_what_was_measured(benchmark, tmp_path, monkeypatch):
    measure = benchmark("measure")
    committed = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(committed, encoding="utf-8")
    monkeypatch.setattr(measure, "HERE", tmp_path)
    measure.report()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == committed
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def measured_with(instructions: str) -> dict:
    """Return the measurements of the first machine whose processor has such instructions."""
    machines = json.loads((BENCHMARKS / "measurements.json").read_text())
    return next(m for m in machines if instructions in m["machine"]["processor"])


def share(rounds: list[dict], way: str, other: str) -> float:
    """Return how many per cent of the other model's ten epochs a budget takes, the median."""
    return median(100 * row[way]["seconds"] / (10 * row[other]["seconds"]) for row in rounds)


def test_model_ds_first_screen_says_what_was_measured():
    first = nbformat.read(NOTEBOOKS / "5_model_d.ipynb", 4).cells[0].source
    fast, slow = (measured_with(name)["budgets"] for name in ("AVX-512", "AVX2"))
    float32, bfloat16 = (share(fast["d-speed"], way, "b") for way in ("float32", "mixed_bfloat16"))
    said = f"for speed, {float32:.1f} % in float32 and {bfloat16:.1f} % in mixed bfloat16 with "
    said += "AVX-512, in one round, and "
    said += f"{share(slow['d-speed'], 'float32', 'b'):.1f} % in float32 with AVX2, in two rounds; "
    accuracy = share(slow["d-accuracy"], "float32", "a1")
    assert said + f"for accuracy {accuracy:.0f} % with AVX2, in two rounds." in first
    rounds = [len(fast["d-speed"]), len(slow["d-speed"]), len(slow["d-accuracy"])]
    assert rounds == [1, 2, 2]


def test_ds_budgets_were_measured_with_the_epochs_that_they_have():
    machines = json.loads((BENCHMARKS / "measurements.json").read_text())
    measured = {
        (setting, row[precision]["epochs"])
        for machine in machines
        for setting, rounds in machine["budgets"].items()
        for row in rounds
        for precision in ("float32", "mixed_bfloat16")
        if precision in row
    }
    assert measured == {(name, SETTINGS[name].epochs) for name in ("d-speed", "d-accuracy")}


def test_measuring_keeps_other_machines_and_other_models(benchmark, tmp_path, monkeypatch):
    measure = benchmark("measure")
    here = {"processor": "this", "cores": 2}
    monkeypatch.setattr(measure, "describe_machine", lambda: here)
    known = [
        {"machine": machine, "rounds": {"a1": ["old"]}, "budgets": {}, "around": ["old"]}
        for machine in (here, here | {"cores": 64}, here | {"processor": "another"})
    ]
    monkeypatch.setattr(measure, "MEASUREMENTS", tmp_path / "measurements.json")
    measure.MEASUREMENTS.write_text(json.dumps(known))
    monkeypatch.setattr(measure, "measure_model", lambda model, number, _: f"{model} {number}")
    measure.measure(["a2"], 1)
    after = json.loads(measure.MEASUREMENTS.read_text())
    assert sorted(map(str, after)) == sorted(
        map(str, [*known[1:], known[0] | {"rounds": {"a1": ["old"], "a2": ["a2 0"]}}])
    )
    monkeypatch.setattr(measure, "measure_around", lambda: "new")
    measure.measure(["a2"], 1)  # in the older round's place
    measure.measure(["a1"], 2, add=True)
    after = json.loads(measure.MEASUREMENTS.read_text())
    (mine,) = (one for one in after if one["machine"] == here)
    assert mine["rounds"] == {"a1": ["old", "a1 1", "a1 2"], "a2": ["a2 0"]}
    assert mine["around"] == ["old", "new", "new"]

    def interrupted(model, number, _):
        if number == 2:
            raise KeyboardInterrupt
        return number

    monkeypatch.setattr(measure, "measure_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure.measure(["c"], 3)
    after = json.loads(measure.MEASUREMENTS.read_text())
    (mine,) = (one for one in after if one["machine"] == here)
    assert mine["rounds"]["c"] == [0, 1]


def test_the_page_on_many_runs_follows_from_the_reference_runs(benchmark):
    many_runs = benchmark("many_runs")
    page = (ROOT / "docs/many_runs.md").read_text(encoding="utf-8")
    any_client = dict.fromkeys(("sweep_ms", "resume_ms", "disk_kb", "task_kb"), 1.0)
    rows = many_runs.needs_table(any_client).splitlines()
    for row in rows:
        if "hours" in row:
            assert row in page
    assert sum("hours" in row for row in rows) == 4
    longest = max(many_runs.core_minutes())
    assert f"longest run, {longest:.0f} core-minutes" in page


def test_a_sweep_with_stand_ins_records_every_run(benchmark, monkeypatch):
    many_runs = benchmark("many_runs")
    monkeypatch.setattr(many_runs.sweep, "run_on_worker", many_runs.make_stand_in())
    figures = many_runs.measure(12)
    assert figures["runs"] == 12
    # Two processes, each of which does some of it.
    assert min(figures["client_ms"], figures["scheduler_ms"]) > 0
    assert min(figures["sweep_ms"], figures["resume_ms"], figures["disk_kb"]) > 0


def test_the_comparison_is_timed_from_its_kernel_to_its_last_cell():
    one = measured("comparison", "opened")
    assert one["seconds"] > 0
    assert 50 < one["peak_megabytes"] < 10_000


def test_what_the_comparison_says_of_bfloat16_was_measured():
    cells = nbformat.read(NOTEBOOKS / "6_comparison.ipynb", 4).cells
    prose = "\n".join(cell.source for cell in cells)
    said = re.search(r"A\.1 trains (\S+) times .*, A\.2 (\S+) and D, speed, (\S+) times", prose)
    measured = measured_with("bfloat16")
    every = measured["rounds"] | measured["budgets"]
    for number, setting in zip(said.groups(), ("a1", "a2", "d-speed"), strict=True):
        ways = [(row["float32"], row["mixed_bfloat16"]) for row in every[setting]]
        ratios = [float32["seconds"] / bfloat16["seconds"] for float32, bfloat16 in ways]
        assert float(number) == round(median(ratios), 1)
    accuracy = share(measured_with("AVX2")["budgets"]["d-accuracy"], "float32", "a1")
    assert f"in two rounds, it took {accuracy:.0f} % of A.1's time" in prose
