"""Load and check MNIST, or any data set with the same four arrays."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mnist_utils.parameters import InputError, refusal

CLASSES = 10
IMAGE_SHAPE = (28, 28)
EMBEDDED = Path(__file__).with_name("mnist.npz")

# Of each array's bytes; written back as IDX files, the arrays have the MD5 sums that
# Yann LeCun published for his.
SHA256 = {
    "x_train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "y_train": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "x_test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "y_test": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}


def load_mnist(dataset: str = "mnist", train_samples: int | None = None, seed: int = 0):
    """Return ``(x_train, y_train), (x_test, y_test)``, as keras.datasets.mnist.load_data does.

    ``x`` is uint8 of shape (n, 28, 28), ``y`` is uint8 of shape (n,) with labels 0 to 9.
    ``dataset`` is ``"mnist"``, the embedded file (no network is needed), or the path of an npz
    file with the arrays x_train, y_train, x_test and y_test. ``train_samples`` takes that many
    training images, as many of each class as can be had, chosen by ``seed``.

    Raises InputError, in one sentence that names the file and array, for anything else.
    """
    embedded = dataset == "mnist"
    name = EMBEDDED.name if embedded else str(dataset)
    arrays = _read_embedded() if embedded else _read_arrays(Path(dataset), name)
    for part in ("train", "test"):
        _check_part(arrays, part, name)
    x_train, y_train = arrays["x_train"], arrays["y_train"]
    if train_samples is not None:
        if not 1 <= train_samples <= len(y_train):
            raise refusal(
                "train_samples",
                train_samples,
                f"None (all images) or a whole number from 1 to {len(y_train)}",
            )
        chosen = balanced_subset(y_train, train_samples, seed)
        x_train, y_train = x_train[chosen], y_train[chosen]
    return (x_train, y_train), (arrays["x_test"], arrays["y_test"])


def load_test_images() -> np.ndarray:
    """Return the embedded test images alone, uint8 (10000, 28, 28): unpacking all takes longer.

    Raises InputError, as load_mnist does, when the file is not the one this project ships.
    """
    return _read_embedded(["x_test"])["x_test"]


def balanced_subset(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return ``size`` sorted indices, as many of each class as can be had, chosen by ``seed``."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    rank_in_class = np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank_in_class[members] = np.arange(len(members))
    # The first of each class, then the second of each class, and so on.
    in_turn = shuffled[np.argsort(rank_in_class[shuffled], kind="stable")]
    return np.sort(in_turn[:size])


def _read_embedded(wanted: Iterable[str] = SHA256) -> dict[str, np.ndarray]:
    """Return the embedded arrays, or those named, checked by their SHA-256."""
    arrays = _read_arrays(EMBEDDED, EMBEDDED.name, wanted)
    for array_name, array in arrays.items():
        if hashlib.sha256(array.tobytes()).hexdigest() != SHA256[array_name]:
            raise InputError(
                f"{EMBEDDED.name}: {array_name} is not the MNIST array it should be "
                "(its SHA-256 differs); it must be the file this project ships."
            )
    return arrays


def _read_arrays(path: Path, name: str, wanted: Iterable[str] = SHA256) -> dict[str, np.ndarray]:
    """Return the four arrays of an npz file, or those named."""
    try:
        archive = np.load(path, allow_pickle=False)
    except OSError as error:
        reason = (error.strerror or "it cannot be read").lower()
        raise InputError(f"dataset {name}: {reason}; it must be an npz file.") from None
    except Exception:  # what a damaged archive raises: BadZipFile, ValueError, EOFError, ...
        raise InputError(
            f"dataset {name} is not an npz file, or is truncated; it must be an npz file with "
            f"the arrays {', '.join(SHA256)}."
        ) from None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise InputError(f"dataset {name} is a single array; it must be an npz file.")
    with archive:
        return {array_name: _read_array(archive, array_name, name) for array_name in wanted}


def _read_array(archive, array_name: str, name: str) -> np.ndarray:
    if array_name not in archive.files:
        found = ", ".join(archive.files) or "none"
        raise InputError(
            f"dataset {name} has no array {array_name} (found: {found}); "
            f"it must have {', '.join(SHA256)}."
        )
    try:
        array = archive[array_name]
        if isinstance(array, np.ndarray):
            return array
        found = "is no array"
    except ValueError as error:
        found = "holds pickled objects" if "pickle" in str(error).lower() else "cannot be read"
    except Exception:
        found = "is damaged"
    raise InputError(
        f"dataset {name}: {array_name} {found}; it must be a plain array of numbers."
    ) from None


def _check_part(arrays: dict[str, np.ndarray], part: str, name: str) -> None:
    """Check the images and labels of one part, "train" or "test"."""
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    if x.ndim != 3 or x.shape[1:] != IMAGE_SHAPE:
        raise InputError(f"dataset {name}: x_{part} has shape {x.shape}; it must be (n, 28, 28).")
    if y.shape != x.shape[:1]:
        raise InputError(
            f"dataset {name}: y_{part} has shape {y.shape}; it must be ({len(x)},), "
            f"one label for each image of x_{part}."
        )
    for array_name in (f"x_{part}", f"y_{part}"):
        dtype = arrays[array_name].dtype
        if dtype != np.uint8:
            raise InputError(f"dataset {name}: {array_name} is {dtype}; it must be uint8.")
    if len(x) == 0:
        raise InputError(f"dataset {name}: x_{part} is empty; it must hold at least one image.")
    if y.max() >= CLASSES:
        raise InputError(f"dataset {name}: y_{part} holds label {y.max()}; labels must be 0 to 9.")
