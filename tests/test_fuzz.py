"""Whatever a file or a parameter holds: a result or an InputError, soon, in bounded memory."""

import gzip
import io
import json
import os
import random
import signal
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import idx, write_idx

from mnist_utils import data
from mnist_utils.parameters import InputError, check_parameters, run_name
from mnist_utils.runs import load_record, load_runs, read_predictions

HOSTILE = ["a" * 300, "a/" * 3000, "\0", "\n", "\ud800", "~nobody/x", "", [], {}, None, True]
HOSTILE += [-1, 0, 2**63, 10**400, 1e308, float("nan"), float("inf")]
VALUES = st.sampled_from(HOSTILE) | st.text() | st.integers() | st.floats()
VALUES |= st.lists(VALUES, max_size=3) | st.dictionaries(st.text(), VALUES, max_size=3)


def fuzz(check, *values):
    """Call a check with some hundred values, the same ones each time."""

    @settings(deadline=None, derandomize=True, max_examples=200, suppress_health_check=HealthCheck)
    @given(st.tuples(*values))
    def run(chosen):
        check(*chosen)

    run()


def answer(function, *arguments):
    """Return what a function gives, or the one line of its InputError, which can be printed."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    tracemalloc.start()
    try:
        return function(*arguments)
    except InputError as error:
        assert "\n" not in str(error).encode().decode()
        return str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        signal.alarm(0)
        assert peak < 2**23


SET = {"x_train": np.zeros((1, 28, 28), "uint8"), "y_train": np.full(1, 3, "uint8")}
SET |= {"x_test": SET["x_train"], "y_test": SET["y_train"]}


def npz(x_train: bytes, kind=zipfile.ZIP_DEFLATED) -> bytes:
    """Return a whole npz file, with any bytes in the place of x_train."""
    file = io.BytesIO()
    np.savez_compressed(file, **{name: SET[name] for name in ("y_train", "x_test", "y_test")})
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("x_train.npy", x_train, kind)
    return file.getvalue()


def npy(array: np.ndarray, content: bytes) -> bytes:
    """Return the header that an array has, and any bytes after it."""
    file, header = io.BytesIO(), np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


KINDS = {  # what is changed, and what makes the file of it
    "whole.npz": (npz(npy(SET["x_train"], bytes(784))), bytes),
    "array.npz": (npy(SET["x_train"], bytes(784)), npz),
    "train-images-idx3-ubyte": (idx(SET["x_train"]), bytes),
    "train-images-idx3-ubyte.gz": (idx(SET["x_train"]), gzip.compress),
    "train-labels-idx1-ubyte.gz": (gzip.compress(idx(SET["y_train"]), mtime=0), bytes),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_that_is_cut_or_changed_anywhere_is_answered(kind, tmp_path):
    path = write_idx(tmp_path / "idx", SET) / kind
    path.with_name(kind.removesuffix(".gz")).unlink(missing_ok=True)
    content, make = KINDS[kind]

    def refused(place: int, length: int, new: bytes) -> bool:
        path.write_bytes(make(content[:place] + new + content[place + length :]))
        dataset = path if path.suffix == ".npz" else path.parent
        return isinstance(answer(data.load_mnist, str(dataset)), str)

    assert not refused(0, 0, b"")
    # All of the headers; the bytes of an image are all alike.
    for place in [*range(min(len(content), 150)), *range(150, len(content), 5)]:
        assert refused(place, len(content), b"")
        refused(place, 1, bytes([content[place] ^ 1 << place % 8]))

    fuzz(
        refused, st.integers(0, 150) | st.integers(0, len(content)), st.integers(0, 8), st.binary()
    )


def test_a_hostile_data_set_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_UNPACKED", 2**22)
    zeros, huge = bytes(784 * 2**16), np.broadcast_to(np.uint8(0), (2**40, 28, 28))
    (tmp_path / "0.npz").write_bytes(npz(npy(huge[: 2**16], zeros)))
    (tmp_path / "1.npz").write_bytes(npz(npy(huge[:5], zeros)))
    (tmp_path / "2.npz").write_bytes(npz(npy(huge[:5], zeros), zipfile.ZIP_BZIP2))
    (tmp_path / "3.npz").write_bytes(npz(npy(huge[:5000], zeros[:784])))
    (tmp_path / "4.npz").write_bytes(npz(npy(huge, b"")))
    path = write_idx(tmp_path / "idx", SET) / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(idx(huge[:5]) + zeros))
    for path in tmp_path.iterdir():
        sentence = answer(data.load_mnist, str(path)).removeprefix(f"dataset {path}: ")
        assert sentence.startswith(("x_train ", "train-images")) and "missing" not in sentence


RUN = {"epochs": 2, "batch_size": 64, "seed": 3, "train_samples": None, "dataset": "mnist"}
RUN["precision"] = "float32"
LAYERS = {"conv_layers": 1, "kernel_sizes": [[5, 3]], "max_pool": True, "padding": True}
LAYERS |= {"dropout": True, "batch_normalization": True, "parameters": 9, "macs": 9, "digest": "0"}
RECORD = {"schema_version": 1, "model": "a2", "title": "A", "run": RUN, "architecture": LAYERS}
RECORD["history"] = {"loss": [1], "accuracy": [1], "val_loss": [1], "val_accuracy": [None]}
RECORD |= {"test_loss": 1, "test_accuracy": 1, "steps": 9, "seconds_per_epoch": [1]}
RECORD |= {"environment": {"threads": 2}, "predictions": {"file": "0.npz", "sha256": "0"}}
RECORD |= {"model_file": None, "code_sha256": None}


def with_value(record, value):
    """Yield the record with a value in the place of each of its values in turn."""
    for key, inner in list(record.items() if isinstance(record, dict) else enumerate(record)):
        changed = list(with_value(inner, value)) if isinstance(inner, dict | list) else []
        for new in [value, *changed]:
            copy = record.copy()
            copy[key] = new
            yield copy


def test_a_record_that_is_cut_or_has_any_values_is_answered(tmp_path):
    path = tmp_path / "a2" / run_name(RUN, by_hand=True) / "metrics.json"
    path.parent.mkdir(parents=True)
    (path.parent / "0.npz").touch()

    def taken(content: str) -> bool:
        path.write_text(content)
        answer(read_predictions, path.parent)
        runs, problems = answer(load_runs, tmp_path)
        assert len(runs) + len(problems) == 1
        assert "\n" not in "".join(problems).encode().decode()
        return not isinstance(answer(load_record, path.parent), str) and len(runs) == 1

    content = json.dumps(RECORD)
    assert taken(content)
    assert not any(taken(content[:size]) for size in range(len(content)))
    assert not taken(content.replace("9", "9" * 9999)) and not taken("[" * 9999)
    for record in (record for value in HOSTILE for record in with_value(RECORD, value)):
        taken(json.dumps(record))
    fuzz(lambda value: taken(json.dumps(random.choice(list(with_value(RECORD, value))))), VALUES)
    path.unlink()
    os.mkfifo(path)  # whoever opens it waits for ever
    assert len(answer(load_runs, tmp_path)[1]) == 1


def test_any_parameters_are_answered(tmp_path):
    usual = RUN | {"keep_model": True, "results_dir": str(tmp_path)}

    def check(name, value):
        if name == "results_dir" and isinstance(value, str | None) and value != "~nobody/x":
            value = f"{tmp_path}/{(value or '').replace('..', '')}"  # not anywhere in this machine
        return answer(check_parameters, "a2", usual | {name: value})

    assert not isinstance(check("seed", 1), str)
    os.mkfifo(tmp_path / "pipe")
    for value in [*HOSTILE, str(tmp_path / "pipe"), str(tmp_path)]:
        for name in usual:
            check(name, value)
    fuzz(check, st.sampled_from(list(usual)), VALUES)
