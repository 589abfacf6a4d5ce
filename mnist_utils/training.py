"""Set TensorFlow up, prepare the data, and give the models their batches."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mnist_utils.data import CLASSES, Parts, load_mnist
from mnist_utils.parameters import ALLOWED, InputError, Parameters, images_trained_on, refusal

MUST_BE_UNSET = (
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "TF_SET_ONEDNN_FPMATH_MODE"),
    *("KERAS_MAX_EPOCHS", "KERAS_MAX_STEPS_PER_EPOCH"),
)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep back what native code writes to standard error; show it if an error is raised.

    TensorFlow logs a screenful as it is imported, before its own log level counts.
    """
    with tempfile.TemporaryFile() as kept:
        original = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(original, kept.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only
# TensorFlow uses oneDNN's kernels unasked only where a processor has instructions made for
# networks, such as AVX-512's. They are faster with AVX2 as well: benchmarks/README.md.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever keras.json or the environment say
with _quiet_stderr():
    import keras
    import tensorflow as tf

    GPUS = tf.config.list_physical_devices("GPU")


def set_up(seed: int, precision: str) -> None:
    """Set all that a run's numbers depend on but the seed, and print the device.

    The model's cell sets the seed, which then gives the same numbers on the same machine, whatever
    the reader's keras.json says. Raises InputError for mixed_float16 without a GPU, where it is
    slow and loses small gradients, and where the environment makes float32 less than it says.
    """
    if precision == "mixed_float16" and not GPUS:
        raise refusal("precision", precision, f"{ALLOWED['precision']}; no GPU was found")
    if (backend := keras.backend.backend()) != "tensorflow":  # imported before this module
        raise refusal("Keras's backend", backend, "'tensorflow': restart the kernel")
    unset = "unset: the parameters say how a run computes, and for how long"
    for name in MUST_BE_UNSET:
        if os.environ.get(name, "STRICT").upper() != "STRICT":  # the FPMATH_MODEs' own default
            raise refusal(name, os.environ[name], unset)
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_dtype_policy(precision)
    tf.config.experimental.enable_op_determinism()
    # On newer GPUs TensorFlow would compute in TF32, with 10 of float32's 23 bits, and not say so.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    device = "a GPU" if GPUS else "the CPU"
    print(f"Training on {device}, precision {precision}, seed {seed}.")


def prepare_data(parameters: Parameters) -> Parts:
    """Set up, load and prepare the data as 1_model_a1 does step by step; print what it prints.

    Returns ``(x_train, y_train), (x_test, y_test)``: images float32 (n, 28, 28, 1) from 0 to 1,
    and one-hot labels float64 (n, 10). Raises InputError for data that cannot be read, and where
    what D and E keep back to validate is all of one digit.
    """
    set_up(parameters.seed, parameters.precision)
    (x_train, y_train), (x_test, y_test) = load_mnist(
        parameters.dataset, parameters.train_samples, parameters.seed
    )
    count = len(y_train)
    kept_back = y_train[images_trained_on(parameters.model, count) :]
    if len(kept_back) >= 10 and len(set(kept_back)) == 1:  # sorted by digit
        raise InputError(
            f"dataset is {parameters.dataset!r}; its training images must be in mixed order: the "
            f"last {len(kept_back)}, kept back to validate, are all of the digit {kept_back[0]}."
        )
    x_train, x_test = prepare_images(x_train), prepare_images(x_test)
    print("x_train shape:", x_train.shape)
    print("x_test shape:", x_test.shape)
    print(x_train.shape[0], "train samples")
    print(x_test.shape[0], "test samples")
    print(y_train.shape)
    print(y_train)
    y_train = keras.utils.to_categorical(y_train, CLASSES)
    y_test = keras.utils.to_categorical(y_test, CLASSES)
    return (x_train, y_train), (x_test, y_test)


def prepare_images(images: np.ndarray) -> np.ndarray:
    """Return uint8 images (n, 28, 28) as float32 (n, 28, 28, 1) from 0 to 1."""
    return images[..., np.newaxis].astype("float32") / np.float32(255)


def make_batches(
    x: np.ndarray, y: np.ndarray, batch_size: int, shuffle_seed: int | None = None
) -> tf.data.Dataset:
    """Return a tf.data.Dataset of batches of (images, one-hot labels), both float32.

    With ``shuffle_seed`` the images are shuffled anew every epoch, in an order that the seed
    fixes; without it they stay in order. Raises InputError for a ``batch_size`` above the number
    of images that are to be shuffled.
    """
    if shuffle_seed is not None and batch_size > len(x):
        allowed = f"a whole number from 1 to the number of images to train on, {len(x)}"
        raise refusal("batch_size", batch_size, allowed)
    with tf.device("CPU"):
        x, y = tf.constant(x, tf.float32), tf.constant(y, tf.float32)
        # Indices are shuffled and a whole batch is gathered at once: much cheaper than a
        # pipeline that handles every image on its own.
        indices = tf.data.Dataset.range(len(x))
        if shuffle_seed is not None:
            indices = indices.shuffle(len(x), seed=shuffle_seed, reshuffle_each_iteration=True)
        batches = indices.batch(batch_size)
        batches = batches.map(lambda batch: (tf.gather(x, batch), tf.gather(y, batch)))
    options = tf.data.Options()
    # With autotuning on, the end of every epoch waits for its sleeping optimizer thread:
    # seconds for nothing.
    options.autotune.enabled = False
    options.deterministic = True
    return batches.prefetch(2).with_options(options)
