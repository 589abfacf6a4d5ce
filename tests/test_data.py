"""Loading, checking and preparing the data."""

import hashlib
import shutil
import zipfile

import keras
import numpy as np
import pytest
from conftest import write_npz

from mnist_utils import data
from mnist_utils.data import balanced_subset, load_mnist, load_test_images
from mnist_utils.parameters import InputError
from mnist_utils.training import make_batches, prepare_images


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
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        idx = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
        assert hashlib.md5(idx).hexdigest() == md5


def test_one_flipped_bit_in_the_embedded_file_is_named(tmp_path, monkeypatch):
    arrays = dict(np.load(data.EMBEDDED))
    arrays["x_test"][5, 14, 14] ^= 1
    monkeypatch.setattr(data, "EMBEDDED", write_npz(tmp_path / "mnist.npz", arrays))
    for load in (load_mnist, load_test_images):
        with pytest.raises(InputError, match=r"mnist\.npz: x_test is not the MNIST array"):
            load()


def test_the_test_images_alone_are_those_of_mnist(mnist):
    np.testing.assert_array_equal(load_test_images(), mnist[1][0])


def test_a_flipped_bit_in_the_stored_bytes_is_named(tmp_path, monkeypatch):
    path = tmp_path / "mnist.npz"
    content = bytearray(data.EMBEDDED.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(data, "EMBEDDED", path)
    with pytest.raises(InputError, match=r"mnist\.npz"):
        load_mnist()


def test_another_data_set_is_loaded_as_it_is(small_mnist, small_arrays):
    (x_train, y_train), (x_test, y_test) = load_mnist(str(small_mnist))
    np.testing.assert_array_equal(x_train, small_arrays["x_train"])
    np.testing.assert_array_equal(y_test, small_arrays["y_test"])
    assert len(y_train) == 600
    assert len(x_test) == 200


BAD_ARRAYS = {
    "x_train of shape (600, 27, 28)": ({"x_train": lambda a: a[:, 1:]}, r"x_train has shape"),
    "x_test with a channel axis": ({"x_test": lambda a: a[..., None]}, r"x_test has shape"),
    "one label too few": ({"y_train": lambda a: a[1:]}, r"y_train has shape \(599,\)"),
    "one-hot labels": ({"y_test": lambda a: np.eye(10, dtype="uint8")[a]}, r"y_test has shape"),
    "float images": ({"x_train": lambda a: a / 255}, r"x_train is float64; it must be uint8"),
    "signed labels": ({"y_train": lambda a: a.astype("int64")}, r"y_train is int64"),
    "label 10": ({"y_test": lambda a: np.where(a == 9, 10, a).astype("uint8")}, r"label 10"),
    "no test images": (
        {"x_test": lambda a: a[:0], "y_test": lambda a: a[:0]},
        r"x_test is empty",
    ),
    "pickled labels": ({"y_train": lambda a: a.astype(object)}, r"y_train holds pickled"),
    "a lacking array": ({"y_test": None}, r"has no array y_test"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_bad_array_is_named_in_one_sentence(case, small_arrays, tmp_path):
    changes, message = BAD_ARRAYS[case]
    arrays = dict(small_arrays)
    for name, change in changes.items():
        if change is None:
            del arrays[name]
        else:
            arrays[name] = change(arrays[name])
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=message) as error:
        load_mnist(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_npz_is_named(tmp_path, small_mnist):
    text = tmp_path / "text.npz"
    text.write_text("not an archive")
    truncated = tmp_path / "truncated.npz"
    truncated.write_bytes(small_mnist.read_bytes()[:20000])
    empty = tmp_path / "empty.npz"
    empty.touch()
    array = tmp_path / "array.npy"
    np.save(array, np.zeros(3))
    archive = tmp_path / "text_inside.npz"
    with zipfile.ZipFile(archive, "w") as file:
        for name in data.SHA256:
            file.writestr(f"{name}.npy", "text")
    for path in (text, truncated, empty, array, archive, tmp_path, tmp_path / "missing.npz"):
        with pytest.raises(InputError, match=path.name) as error:
            load_mnist(str(path))
        assert "\n" not in str(error.value)


def test_damage_inside_an_array_is_named(tmp_path, small_mnist):
    path = shutil.copy(small_mnist, tmp_path / "damaged.npz")
    content = bytearray(path.read_bytes())
    content[20000] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x_train"):
        load_mnist(str(path))


def test_no_flipped_bit_gives_a_traceback(tmp_path):
    arrays = {
        "x_train": np.zeros((2, 28, 28), "uint8"),
        "y_train": np.zeros(2, "uint8"),
        "x_test": np.zeros((1, 28, 28), "uint8"),
        "y_test": np.zeros(1, "uint8"),
    }
    path = write_npz(tmp_path / "small.npz", arrays)
    whole = path.read_bytes()
    refused = 0
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            load_mnist(str(path))  # some bits, such as a date's, do not matter
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 4 * len(whole)


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
    labels = mnist[0][1]
    first, same, other = (balanced_subset(labels, 500, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


@pytest.mark.parametrize("samples", [0, 60_001])
def test_train_samples_out_of_range_are_refused(samples):
    with pytest.raises(InputError, match=rf"train_samples is {samples}; .* 1 to 60000"):
        load_mnist(train_samples=samples)


@pytest.mark.parametrize(
    ("data_format", "shape"),
    [("channels_last", (3, 28, 28, 1)), ("channels_first", (3, 1, 28, 28))],
)
def test_the_channel_axis_is_where_keras_wants_it(mnist, data_format, shape):
    before = keras.config.image_data_format()
    keras.config.set_image_data_format(data_format)
    try:
        images = prepare_images(mnist[0][0][:3])
    finally:
        keras.config.set_image_data_format(before)
    assert images.shape == shape
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (0, 1)
    np.testing.assert_array_equal(np.squeeze(images) * 255, mnist[0][0][:3])


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


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(InputError, match=r"batch_size is 5; .* images to train on, 4"):
        make_batches(np.zeros((4, 1)), np.zeros((4, 1)), 5, shuffle_seed=0)
