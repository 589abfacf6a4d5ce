"""What a run's numbers depend on is set, whatever the reader's environment says."""

import importlib
import os

from mnist_utils import training


def test_mixed_float16_trains_with_a_scaled_loss(small_arrays, monkeypatch, request, capsys):
    # There is no GPU in the tests: only what a CPU can do in the same way is tested.
    monkeypatch.setattr(training, "GPUS", ["pretended"])
    keras = training.keras
    request.addfinalizer(lambda: keras.config.set_dtype_policy("float32"))
    training.set_up(0, "mixed_float16")
    assert capsys.readouterr().out == "Training on a GPU, precision mixed_float16, seed 0.\n"
    layers = keras.layers
    middle = [layers.Conv2D(4, 3, activation="relu"), layers.Flatten()]
    last = layers.Dense(10, activation="softmax", dtype="float32")
    model = keras.Sequential([keras.Input((28, 28, 1)), *middle, last])
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    images = training.prepare_images(small_arrays["x_train"])
    labels = keras.utils.to_categorical(small_arrays["y_train"], 10)
    batches = training.make_batches(images, labels, 64, shuffle_seed=0)
    history = model.fit(batches, epochs=3, verbose=0, shuffle=False).history
    assert history["loss"][-1] < history["loss"][0]
    assert model.predict(images[:2], verbose=0).dtype == "float32"


def test_onednns_kernels_are_asked_for_unless_a_reader_set_it(monkeypatch):
    for given in ("0", None):
        monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
        if given:
            monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", given)
        importlib.reload(training)
        assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == (given or "1")
