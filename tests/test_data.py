"""Loading, checking and preparing the data."""

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import write_npz
from test_parameters import GOOD

from mnist_utils import data
from mnist_utils.data import IDX_FILES, balanced_subset, load_mnist
from mnist_utils.parameters import InputError, check_parameters, dataset_name
from mnist_utils.training import make_batches, prepare_data


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    """Return an array as the bytes of an IDX file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, kind, array.ndim]) + sizes + array.tobytes()


def write_idx(folder: Path, arrays: dict, spell=lambda name: name, pack=bytes) -> Path:
    folder.mkdir()
    for name, file in IDX_FILES.items():
        (folder / spell(file)).write_bytes(pack(idx(arrays[name])))
    return folder


def assert_loaded(path: Path, arrays: dict):
    loaded = load_mnist(str(path))
    for array, name in zip((*loaded[0], *loaded[1]), IDX_FILES, strict=True):
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, arrays[name])


def refused(path: Path) -> str:
    """Return the sentences that refuse a data set, and see that they name it."""
    with pytest.raises(InputError) as error:
        load_mnist(str(path))
    assert str(error.value).startswith(f"dataset {path}: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_embedded_data_is_mnist_bit_for_bit(mnist):
    (x_train, y_train), (x_test, y_test) = mnist
    assert (x_train.shape, y_train.shape) == ((60000, 28, 28), (60000,))
    assert (x_test.shape, y_test.shape) == ((10000, 28, 28), (10000,))
    # The MD5 sums published for LeCun's uncompressed IDX files.
    for array, md5 in (
        (x_train, "6bbc9ace898e44ae57da46a324031adb"),
        (y_train, "a25bea736e30d166cdddb491f175f624"),
        (x_test, "2646ac647ad5339dbf082846283269ea"),
        (y_test, "27ae3e4e09519cfbb04c329615203637"),
    ):
        assert hashlib.md5(idx(array)).hexdigest() == md5


def test_one_flipped_bit_in_the_embedded_file_is_named(tmp_path, monkeypatch):
    content = bytearray(data.EMBEDDED.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "stored.npz").write_bytes(content)
    arrays = dict(np.load(data.EMBEDDED))
    arrays["x_test"][5, 14, 14] ^= 1
    monkeypatch.setattr(data, "EMBEDDED", write_npz(tmp_path / "mnist.npz", arrays))
    with pytest.raises(InputError, match=r"mnist\.npz: x_test is not the MNIST array"):
        load_mnist()
    monkeypatch.setattr(data, "EMBEDDED", tmp_path / "stored.npz")
    with pytest.raises(InputError, match=r"stored\.npz: x_train cannot be read"):
        load_mnist()


def test_the_small_set_is_a_part_of_mnist_with_as_many_of_each_digit_whatever_the_seed(mnist):
    (x_train, y_train), (x_test, y_test) = load_mnist("mnist-small", seed=0)
    assert np.bincount(y_train).tolist() == [600] * 10
    assert np.bincount(y_test).tolist() == [100] * 10
    assert {image.tobytes() for image in x_train} <= {image.tobytes() for image in mnist[0][0]}
    (few, _), (x_test_again, _) = load_mnist("mnist-small", train_samples=50, seed=5)
    assert {image.tobytes() for image in few} <= {image.tobytes() for image in x_train}
    np.testing.assert_array_equal(x_test_again, x_test)
    for samples in (0, 6001):
        with pytest.raises(InputError, match=rf"train_samples is {samples}; .* 1 to 6000\."):
            load_mnist("mnist-small", train_samples=samples)


READABLE = {
    "uint8": {},
    "signed labels": {"y_train": lambda a: a.astype("int64"), "y_test": lambda a: a.astype(">i2")},
    "wide images": {"x_train": lambda a: a.astype(">u4")},
    "a channel axis": {"x_train": lambda a: a[..., None], "x_test": lambda a: a[:, None]},
    "Fortran's order": {"x_train": np.asfortranarray},
}


@pytest.mark.parametrize("case", READABLE)
def test_what_is_unambiguous_is_read(case, small_arrays, tmp_path):
    changed = {name: change(small_arrays[name]) for name, change in READABLE[case].items()}
    assert_loaded(write_npz(tmp_path / "own.npz", small_arrays | changed), small_arrays)


IDX_SPELLINGS = {
    "plain": (lambda name: name, bytes),
    "gzip": (lambda name: f"{name}.gz", gzip.compress),
    "a dot": (lambda name: name.replace("-idx", ".idx"), bytes),
    "unpacked by a browser": (lambda name: f"{name}.gz", bytes),
}


@pytest.mark.parametrize("case", IDX_SPELLINGS)
def test_a_folder_of_idx_files_is_read(case, small_arrays, tmp_path):
    folder = write_idx(tmp_path / "own", small_arrays, *IDX_SPELLINGS[case])
    (folder / "t10k-images-idx3-ubyte unpacked").mkdir()  # as some archives unpack
    assert dataset_name(str(folder)).startswith("own-")
    assert_loaded(folder, small_arrays)
    (path,) = folder.glob("train-labels*")
    path.write_bytes(idx(small_arrays["y_train"].astype(">i4"), kind=0x0C))
    assert_loaded(folder, small_arrays)


TIMES = '0 to 1; it must be integers, 0 to 255: save np.round(255 * x_train).astype("uint8").'
BAD_ARRAYS = {
    "one row too few": ("x_train", lambda a: a[:, 1:], "x_train has shape (600, 27, 28);"),
    "flat": ("x_test", lambda a: a.reshape(-1, 784), ": save x_test.reshape(-1, 28, 28)."),
    "one label less": ("y_train", lambda a: a[1:], "y_train must have one label for each image"),
    "one-hot": ("y_test", lambda a: np.eye(10)[a], "(n,): save y_test.argmax(axis=1)."),
    "floats in [0, 1]": ("x_train", lambda a: a / 255, f"x_train is float64, {TIMES}"),
    "black and white": ("x_train", lambda a: a > 127, f"x_train is bool, {TIMES}"),
    "zeros and ones": ("x_train", lambda a: a // 128, f"x_train is uint8, {TIMES}"),
    "standardized": ("x_train", lambda a: a / 79 - 0.4, "it must be integers, 0 to 255."),
    "NaN": ("x_train", lambda a: a * np.nan, "nan to nan; it must be integers, 0 to 255."),
    "float labels": ("y_train", lambda a: a / 1, ': save np.round(y_train).astype("uint8").'),
    "label 10": ("y_test", lambda a: a + 1, "uint8, 1 to 10; it must be integers, 0 to 9."),
    "label -1": ("y_test", lambda a: a.astype("int8") - 1, "y_test is int8, -1 to 8;"),
    "texts": ("y_test", lambda a: a.astype(str), "y_test is of type str"),
    "pickled": ("y_train", lambda a: a.astype(object), "y_train is of type object;"),
    "no images": ("x_test", lambda a: a[:0], "x_test is empty."),
    "a number": ("x_test", lambda a: a[0, 0, 0], "x_test has shape ();"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_bad_array_is_named_with_what_mends_it(case, small_arrays, tmp_path):
    name, change, message = BAD_ARRAYS[case]
    changed = {name: change(small_arrays[name])}
    assert message in refused(write_npz(tmp_path / "bad.npz", small_arrays | changed))


def test_all_faults_are_named_at_once_and_what_is_said_to_mend_them_does(small_arrays, tmp_path):
    bad = {name: small_arrays[name] / 255 for name in ("x_train", "x_test")}
    bad["x_test"] = bad["x_test"].reshape(-1, 784)
    bad["y_train"] = np.eye(10)[small_arrays["y_train"]]
    path = write_npz(tmp_path / "bad.npz", bad)
    sentences = refused(path).removeprefix(f"dataset {path}: ").removesuffix(".").split(". ")
    assert len(sentences) == 5
    assert sentences.pop() == "y_test is missing"
    for sentence in sentences:
        name, mend = sentence.split()[0], sentence.split(": save ")[1]
        bad[name] = eval(mend, {"np": np} | bad)
    assert_loaded(write_npz(path, bad | {"y_test": small_arrays["y_test"]}), small_arrays)


def test_a_file_that_is_no_npz_is_named(tmp_path, small_mnist):
    content = bytearray(small_mnist.read_bytes())
    content[20000] ^= 0xFF
    (tmp_path / "damaged.npz").write_bytes(content)
    np.save(tmp_path / "array.npy", np.zeros(3))
    os.mkfifo(tmp_path / "pipe.npz")  # nobody writes to it: whoever opens it waits for ever
    for path in [tmp_path / "array.npy", tmp_path / "pipe.npz", tmp_path, tmp_path / "missing.npz"]:
        refused(path)  # whatever else a file may hold: test_fuzz.py
    assert "x_train cannot be read (damaged or truncated)." in refused(tmp_path / "damaged.npz")


def test_a_damaged_or_missing_idx_file_is_named(tmp_path, small_arrays):
    folder = write_idx(tmp_path / "own", small_arrays)
    content = idx(small_arrays["x_train"])
    (folder / IDX_FILES["y_test"]).unlink()
    short, longer, cut = content[:-1], content + b"1", gzip.compress(content)[:-9]
    unknown, many_axes = b"\0\0\7" + content[3:], bytes([0, 0, 8, 255]) + bytes(4 * 255)
    for bad in (b"", b"\0\0\x08", short, longer, cut, unknown, many_axes):
        (folder / IDX_FILES["x_train"]).write_bytes(bad)
        message = refused(folder)
        assert "train-images-idx3-ubyte cannot be read (damaged or truncated)." in message
        assert "t10k-labels-idx1-ubyte is missing." in message


@pytest.mark.parametrize("size", [1, 10, 1000, 54_210, 59_999, 60_000])
def test_a_subset_has_as_many_of_each_class_as_can_be_had(mnist, size):
    labels = mnist[0][1]
    chosen = balanced_subset(labels, size, seed=0)
    assert len(np.unique(chosen)) == size
    counts, available = np.bincount(labels[chosen], minlength=10), np.bincount(labels)
    # No class is below another one unless all of its images are taken.
    short = counts < counts.max() - 1
    assert (counts[short] == available[short]).all()


def test_the_seed_chooses_the_subset(mnist):
    first, same, other = (balanced_subset(mnist[0][1], 500, seed).tolist() for seed in (1, 1, 2))
    assert first == same != other


def test_what_is_kept_back_to_validate_must_not_be_all_of_one_digit(mnist, tmp_path):
    (x, y), (x_test, y_test) = mnist
    order = np.argsort(y[:1200], kind="stable")
    arrays = {"x_train": x[order], "y_train": y[order], "x_test": x_test, "y_test": y_test}
    given = GOOD | {"results_dir": str(tmp_path), "train_samples": 600}
    given["dataset"] = str(write_npz(tmp_path / "sorted.npz", arrays))
    with pytest.raises(InputError, match=r"^dataset is .*sorted.npz'; .* last 10, .* the digit 9"):
        prepare_data(check_parameters("d", given))
    prepare_data(check_parameters("a1", given))  # which keeps none back


def _orders(batches, epochs=2):
    return [np.concatenate([y.numpy()[:, 0] for _, y in batches]) for _ in range(epochs)]


def test_batches_are_reshuffled_each_epoch_and_the_seed_fixes_the_orders():
    numbers = np.arange(100, dtype="float32")[:, None]
    images = numbers[:, None, None]
    first = _orders(make_batches(images, numbers, 32, shuffle_seed=5))
    again = _orders(make_batches(images, numbers, 32, shuffle_seed=5))
    other = _orders(make_batches(images, numbers, 32, shuffle_seed=6))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any()
    assert (first[0] != other[0]).any()
    for order in first:
        np.testing.assert_array_equal(np.sort(order), numbers[:, 0])


def test_an_image_keeps_its_label_and_test_images_their_order():
    numbers = np.arange(100, dtype="float32")[:, None]
    for x, y in make_batches(numbers * 2, numbers, 32, shuffle_seed=5):
        np.testing.assert_array_equal(x, y * 2)
    (order,) = _orders(make_batches(numbers, numbers, 32), epochs=1)
    np.testing.assert_array_equal(order, numbers[:, 0])


def test_the_batches_are_not_autotuned():
    # Autotuning makes the end of every epoch wait: shared knowledge of this project.
    batches = make_batches(np.zeros((4, 1)), np.zeros((4, 1)), 2)
    assert batches.options().autotune.enabled is False
