"""Whatever a file or a parameter holds: a result or an InputError, soon, in bounded memory."""

import gzip
import io
import json
import os
import signal
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import IDX_FILES, idx, write_idx

from mnist_utils import data
from mnist_utils.parameters import InputError, check_parameters, run_name
from mnist_utils.runs import load_record, load_runs, read_predictions

fuzz = settings(
    derandomize=True, deadline=None, max_examples=200, suppress_health_check=list(HealthCheck)
)
HOSTILE = ["a" * 300, "a/" * 3000, "\0", "\n", "\ud800", "~nobody/x", "", [], {}, None, True]
HOSTILE += [-1, 0, 2**63, 10**400, 1e308, float("nan"), float("inf")]
VALUES = st.sampled_from(HOSTILE) | st.text() | st.integers() | st.floats()
VALUES |= st.lists(VALUES, max_size=3) | st.dictionaries(st.text(), VALUES, max_size=3)


@pytest.fixture(autouse=True)
def no_hang():
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(120)
    yield
    signal.alarm(0)


def answer(function, *arguments):
    """Return what a function gives, or the sentence of its InputError, that can be printed."""
    tracemalloc.start()
    try:
        return function(*arguments)
    except InputError as error:
        assert "\n" not in str(error).encode().decode()
        return str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**23


SET = {"x_train": np.zeros((1, 28, 28), "uint8"), "y_train": np.full(1, 3, "uint8")}
SET |= {"x_test": SET["x_train"], "y_test": SET["y_train"]}


def npz(x_train: bytes, kind=zipfile.ZIP_DEFLATED) -> bytes:
    """Return an npz file with other bytes in the place of x_train."""
    file = io.BytesIO()
    np.savez_compressed(file, **{name: SET[name] for name in ("y_train", "x_test", "y_test")})
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("x_train.npy", x_train, kind)
    return file.getvalue()


def npy(array: np.ndarray, content: bytes) -> bytes:
    """Return a header of an array, and what is put after it."""
    file, header = io.BytesIO(), np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


IMAGE = npy(SET["x_train"], bytes(784))
KINDS = {  # a file's content, and what makes the file of it
    "own.npz": (npz(IMAGE), bytes),
    "array.npz": (IMAGE, npz),
    "train-images-idx3-ubyte": (idx(SET["x_train"]), bytes),
    "train-images-idx3-ubyte.gz": (idx(SET["x_train"]), gzip.compress),
    "train-labels-idx1-ubyte.gz": (gzip.compress(idx(SET["y_train"]), mtime=0), bytes),
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    """Return a file's content, and a function that loads the set with another in its place."""
    content, make = KINDS[request.param]
    path = write_idx(tmp_path / "idx", SET) / request.param
    path.with_name(path.name.removesuffix(".gz")).unlink(missing_ok=True)

    def load(content: bytes):
        path.write_bytes(make(content))
        return answer(data.load_mnist, str(path if path.suffix == ".npz" else path.parent))

    assert isinstance(load(content), tuple)
    return content, load


def test_a_data_set_cut_at_any_byte_or_with_any_byte_flipped_is_answered(kind):
    content, load = kind
    for place in range(len(content)):
        assert isinstance(load(content[:place]), str)
        load(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])


def test_a_data_set_with_any_bytes_in_any_places_is_answered(kind):
    content, load = kind
    places = st.integers(0, 130) | st.integers(0, len(content))

    @fuzz
    @given(places, st.integers(0, 8), st.binary(max_size=8))
    def check(place, length, new):
        load(content[:place] + new + content[place + length :])

    check()


def test_a_hostile_data_set_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_UNPACKED", 2**22)
    zeros, huge = bytes(784 * 2**16), np.broadcast_to(np.uint8(0), (2**40, 28, 28))
    (tmp_path / "0.npz").write_bytes(npz(npy(huge[: 2**16], zeros)))
    (tmp_path / "1.npz").write_bytes(npz(npy(huge[:5], zeros)))
    (tmp_path / "2.npz").write_bytes(npz(npy(huge[:5], zeros), zipfile.ZIP_BZIP2))
    (tmp_path / "3.npz").write_bytes(npz(npy(huge[:5000], zeros[:784])))
    (tmp_path / "4.npz").write_bytes(npz(npy(huge, b"")))
    folder = write_idx(tmp_path / "idx", SET)
    (folder / IDX_FILES["x_train"]).write_bytes(gzip.compress(idx(huge[:5]) + zeros))
    for path in tmp_path.iterdir():
        sentence = answer(data.load_mnist, str(path)).removeprefix(f"dataset {path}: ")
        assert sentence.startswith(("x_train ", "train-images")) and "missing" not in sentence


RECORD = json.loads(
    """{"schema_version": 1, "model": "a2", "title": "CNN A.2", "run": {"epochs": 2,
    "batch_size": 64, "seed": 3, "train_samples": null, "dataset": "mnist",
    "precision": "float32"}, "architecture": {"conv_layers": 1, "kernel_sizes": [[5, 3]],
    "max_pool": true, "padding": true, "dropout": true, "batch_normalization": true,
    "parameters": 9, "macs": 9, "digest": "0"}, "history": {"loss": [1, 1], "accuracy": [1, 1],
    "val_loss": [1, null], "val_accuracy": [1, null]}, "test_loss": 1, "test_accuracy": 1,
    "steps": 9, "seconds_per_epoch": [1, 1], "environment": {"threads": 2, "device": "CPU"},
    "predictions": {"file": "0.npz", "sha256": "0"}, "model_file": null, "code_sha256": null}"""
)


def ways(value, here=()):
    """Yield the way to each value inside a record."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*here, key)
        if isinstance(inner, dict | list):
            yield from ways(inner, (*here, key))


def changed(way, new) -> str:
    """Return the record, as JSON, with one value changed."""
    record = json.loads(json.dumps(RECORD))
    inner = record
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = new
    return json.dumps(record)


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a record in every way, and says whether it is taken."""
    folder = tmp_path / "a2" / run_name(RECORD["run"], by_hand=True)
    folder.mkdir(parents=True)
    (folder / "0.npz").touch()

    def read(content: str) -> bool:
        (folder / "metrics.json").write_text(content)
        answer(read_predictions, folder)
        runs, problems = answer(load_runs, tmp_path)
        assert len(runs) + len(problems) == 1
        assert "\n" not in "".join(problems).encode().decode()
        return not isinstance(answer(load_record, folder), str) and len(runs) == 1

    return read


def test_a_record_cut_at_any_byte_is_refused(read):
    content = json.dumps(RECORD)
    assert read(content)
    assert not any(read(content[:size]) for size in range(len(content)))
    assert not read(content.replace('"steps": 9', '"steps": ' + 9999 * "9"))
    assert not read(9999 * "[")


def test_a_record_with_any_values_is_answered(read):
    for way in ways(RECORD):
        for value in HOSTILE:
            read(changed(way, value))

    @fuzz
    @given(st.sampled_from(list(ways(RECORD))), VALUES)
    def check(way, value):
        read(changed(way, value))

    check()


GIVEN = {"epochs": 1, "batch_size": 1, "seed": 0, "train_samples": None, "dataset": "mnist"}
GIVEN |= {"precision": "float32", "keep_model": True}


def test_any_parameters_are_answered(tmp_path):
    def check(name, value):
        if name == "results_dir" and isinstance(value, str):  # not anywhere on this machine
            value = f"{tmp_path}/{value.replace('..', '')}"
        answer(check_parameters, "a2", GIVEN | {"results_dir": str(tmp_path), name: value})

    os.mkfifo(tmp_path / "pipe")
    names = [*GIVEN, "results_dir"]
    for value in [*HOSTILE, str(tmp_path / "pipe"), "pipe/a", str(tmp_path)]:
        for name in names:
            check(name, value)
    fuzz(given(st.sampled_from(names), VALUES)(check))()
