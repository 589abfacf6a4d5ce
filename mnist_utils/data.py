"""Load and check MNIST, or any data set with the same four arrays."""

import gzip
import hashlib
import math
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mnist_utils.parameters import ALLOWED, InputError, dataset_path, refusal

CLASSES = 10
EMBEDDED = Path(__file__).with_name("mnist.npz")
# Of each array's bytes; as IDX files they have the MD5 sums that Yann LeCun published.
SHA256 = {
    "x_train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "y_train": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "x_test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "y_test": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}
IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
NPZ_NAMES = {name: name for name in SHA256}
IMAGE_SHAPES = ((28, 28), (28, 28, 1), (1, 28, 28))
IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
MOST_UNPACKED = 2**29  # bytes of an array: a hostile file must not fill the memory
Parts = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def load_mnist(dataset: str = "mnist", train_samples: int | None = None, seed: int = 0) -> Parts:
    """Return ``(x_train, y_train), (x_test, y_test)``, as keras.datasets.mnist.load_data does.

    ``x`` is uint8 of shape (n, 28, 28), ``y`` is uint8 of shape (n,) with labels 0 to 9.
    ``dataset`` is ``"mnist"``, the embedded file (no network is needed), ``"mnist-small"``, 6,000
    and 1,000 of its images, as many of each digit, or a path: of an npz file with the arrays
    x_train, y_train, x_test and y_test, or of a folder with MNIST's four IDX files, plain or .gz.
    Other integer types and a channel axis of 1 are read as well. ``train_samples`` takes that
    many training images, as many of each class as can be had, chosen by ``seed``. Raises
    InputError for anything else, with a sentence for each fault.
    """
    embedded = dataset in ("mnist", "mnist-small")
    place = (EMBEDDED, EMBEDDED.name) if embedded else (dataset_path(dataset), dataset)
    arrays = _read_arrays(*place)
    for name, array in arrays.items():
        if embedded and hashlib.sha256(array.tobytes()).hexdigest() != SHA256[name]:
            raise InputError(f"{place[1]}: {name} is not the MNIST array that we ship (SHA-256).")
    choices = [("train", 6000, 0), ("test", 1000, 0)] if dataset == "mnist-small" else []
    choices += [("train", train_samples, seed)] if train_samples is not None else []
    for part, size, chosen_by in choices:
        labels = arrays[f"y_{part}"]
        if not 1 <= size <= len(labels):
            raise refusal("train_samples", size, f"None or a whole number from 1 to {len(labels)}")
        chosen = balanced_subset(labels, size, chosen_by)
        arrays |= {name: arrays[name][chosen] for name in (f"x_{part}", f"y_{part}")}
    return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])


def balanced_subset(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return ``size`` sorted indices, as many of each class as can be had, chosen by ``seed``."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    rank_in_class = np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank_in_class[members] = np.arange(len(members))
    # The first of each class, then the second of each class, and so on.
    return np.sort(shuffled[np.argsort(rank_in_class[shuffled], kind="stable")[:size]])


def _read_arrays(path: Path, dataset: str) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file or of a folder, as uint8."""
    arrays, faults = {}, []
    try:
        read, labels = (_read_idx, IDX_FILES) if path.is_dir() else (_read_npy, NPZ_NAMES)
        if path.is_file() or not path.exists():
            zipfile.ZipFile(path).close()
        elif not path.is_dir():  # a pipe would wait for ever
            raise OSError(0, "neither a file nor a folder")
    except Exception as error:  # what a damaged archive raises: BadZipFile, ValueError, ...
        reason = getattr(error, "strerror", None) or "not an npz file, or truncated"
        fault = f"dataset {dataset}: {reason.lower()}; it must be {ALLOWED['dataset']}."
        raise InputError(fault) from None
    for name, label in labels.items():
        try:
            arrays[name] = read(path, name)
            faults += [f"{label} {fault}" for fault in _faults(name, arrays[name])]
        except InputError as error:
            faults.append(f"{label} {error}")
        except Exception as error:  # BadZipFile, zlib.error, EOFError, ValueError, ...
            reason = getattr(error, "strerror", None) or "damaged or truncated"
            faults.append(f"{label} cannot be read ({reason.lower()}).")
    for x, y in (("x_train", "y_train"), ("x_test", "y_test")):
        if {x, y} <= arrays.keys() and arrays[x].shape[:1] != arrays[y].shape[:1]:
            faults.append(f"{labels[y]} must have one label for each image of {labels[x]}.")
    if faults:
        raise InputError(f"dataset {dataset}: {' '.join(faults)}")
    shapes = {"x": (-1, 28, 28), "y": (-1,)}
    return {name: array.astype(np.uint8).reshape(shapes[name[0]]) for name, array in arrays.items()}


def _faults(name: str, array: np.ndarray) -> Iterator[str]:
    """Say what is wrong with an array's shape and values, and how to mend it."""
    images, most = (True, 255) if name[0] == "x" else (False, CLASSES - 1)
    if array.ndim == 0 or array.shape[1:] not in (IMAGE_SHAPES if images else ((),)):
        mend = {(784,): ".reshape(-1, 28, 28)", (10,): ".argmax(axis=1)"}.get(array.shape[1:])
        mend = f": save {name}{mend}" if mend else ""
        yield f"has shape {array.shape}; it must be {'(n, 28, 28)' if images else '(n,)'}{mend}."
    if array.size == 0:
        yield "is empty."
    elif images or array.ndim == 1:
        low, high = float(array.min()), float(array.max())
        inside, scaled = low >= 0 and high <= most, images and low >= 0 and high <= 1
        # Images of 0 and 1 alone are meant as black and white: as they are, all would be black.
        if not inside or array.dtype.kind not in "iu" or (scaled and high == 1):
            mend = f': save np.round({"255 * " * scaled}{name}).astype("uint8")' if inside else ""
            yield f"is {array.dtype}, {low:g} to {high:g}; it must be integers, 0 to {most}{mend}."


def _read_npy(path: Path, name: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        member = archive.NameToInfo.get(f"{name}.npy")
        if member is None:
            raise InputError("is missing.")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError("is packed in a way that NumPy does not use.")
        with archive.open(member) as file:
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            return _values(file, path, shape, dtype, fortran)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    paths = folder.glob(IDX_FILES[name].replace("-idx", "[.-]idx") + "*")
    path = min((path for path in paths if path.is_file()), default=None)
    if path is None:
        raise InputError("is missing.")
    with path.open("rb") as plain:
        zipped = plain.peek(2)[:2] == b"\x1f\x8b"  # browsers unpack files and keep the name
        file = gzip.GzipFile(fileobj=plain) if zipped else plain
        kind, dimensions = struct.unpack(">xxBB", file.read(4))
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        return _values(file, path, shape, np.dtype(IDX_TYPES[kind]), False)


def _values(file: Any, path: Path, shape: tuple, dtype: np.dtype, fortran: bool) -> np.ndarray:
    """Return the array after a header, which may lie: nothing is set aside for what it says."""
    needed, content = math.prod(shape) * dtype.itemsize, bytearray()
    if dtype.kind not in "buif":
        raise InputError(f"is of type {dtype.name}; it must hold plain numbers.")
    if needed > max(MOST_UNPACKED, path.stat().st_size):
        raise InputError(f"has {needed} bytes; above {MOST_UNPACKED}, save it uncompressed.")
    while len(content) <= needed and (chunk := file.read(2**18)):
        content += chunk
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
