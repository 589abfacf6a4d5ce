"""Set TensorFlow up, and give the models their batches."""

import os
import tempfile
from contextlib import contextmanager

import numpy as np

from mnist_utils.parameters import ALLOWED, InputError, check_batch_size, refusal


@contextmanager
def _quiet_stderr():
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
with _quiet_stderr():
    import keras
    import tensorflow as tf

    GPUS = tf.config.list_physical_devices("GPU")


def set_up(seed: int, precision: str) -> None:
    """Set the seeds, deterministic operations and the precision, and print the device.

    The same seed then gives the same numbers on the same machine. Raises InputError for
    mixed_float16 without a GPU: there it is slow and loses small gradients.
    """
    if precision == "mixed_float16" and not GPUS:
        raise refusal("precision", precision, f"{ALLOWED['precision']}; no GPU was found")
    if keras.backend.backend() != "tensorflow":
        raise InputError(
            f"KERAS_BACKEND is {keras.backend.backend()!r}; it must be 'tensorflow' here."
        )
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    keras.config.set_dtype_policy(precision)
    device = "a GPU" if GPUS else "the CPU"
    print(f"Training on {device}, precision {precision}, seed {seed}.")


def prepare_images(images: np.ndarray) -> np.ndarray:
    """Return uint8 images (n, 28, 28) as float32 in [0, 1], with a channel axis.

    The axis is the last, or the second when keras.config.image_data_format() is
    "channels_first".
    """
    axis = 1 if keras.config.image_data_format() == "channels_first" else -1
    return np.expand_dims(images, axis).astype("float32") / np.float32(255)


def make_batches(x, y, batch_size: int, shuffle_seed: int | None = None) -> tf.data.Dataset:
    """Return a tf.data.Dataset of batches of (images, one-hot labels), both float32.

    With ``shuffle_seed`` the images are shuffled anew every epoch, in an order that the seed
    fixes; without it they stay in order. Raises InputError for a ``batch_size`` above the
    number of images that are to be shuffled.
    """
    if shuffle_seed is not None:
        check_batch_size(batch_size, len(x))
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
