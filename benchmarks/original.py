"""The original's code as it stands, ported line by line to today's Keras.

Ported: the imports, Input in place of input_shape, labels and images named apart. Its own are
the layers, the arrays given to ``fit`` and all other arguments; verbose=1 prints the same bar.
"""

import keras
from keras.layers import BatchNormalization, Conv2D, Dense, Dropout, Flatten, Input, MaxPooling2D
from keras.models import Sequential

batch_size = 256
num_classes = 10
epochs = 1  # the original: 10
input_shape = (28, 28, 1)


def model_a1():
    model = Sequential()
    model.add(Input(input_shape))
    model.add(Conv2D(16, kernel_size=(3, 3), activation="relu"))
    model.add(Conv2D(32, (3, 3), activation="relu"))
    model.add(Conv2D(64, (3, 3), activation="relu"))
    model.add(MaxPooling2D(pool_size=(2, 2)))
    model.add(Flatten())
    model.add(Dense(64, activation="relu"))
    model.add(Dense(num_classes, activation="softmax"))
    return model


def model_a2():
    model = Sequential()
    model.add(Input(input_shape))
    model.add(Conv2D(32, kernel_size=(3, 3), activation="relu", padding="same"))
    model.add(Conv2D(16, (3, 3), activation="relu"))
    model.add(MaxPooling2D(pool_size=(2, 2)))
    model.add(Dropout(0.5))
    model.add(Conv2D(32, (3, 3), activation="relu"))
    model.add(MaxPooling2D(pool_size=(2, 2)))
    model.add(BatchNormalization())
    model.add(Flatten())
    model.add(Dense(64, activation="relu"))
    model.add(Dropout(0.5))
    model.add(BatchNormalization())
    model.add(Dense(num_classes, activation="softmax"))
    return model


def model_b():
    model = Sequential()
    model.add(Input(input_shape))
    model.add(Conv2D(32, kernel_size=(5, 5), activation="relu", padding="same"))
    model.add(Conv2D(128, (5, 5), activation="relu", padding="same"))
    model.add(MaxPooling2D(pool_size=(2, 2)))
    model.add(Dropout(0.25))
    model.add(Conv2D(64, (5, 5), activation="relu", padding="same"))
    model.add(MaxPooling2D(pool_size=(2, 2)))
    model.add(Dropout(0.25))
    model.add(Conv2D(64, (5, 5), activation="relu", padding="same"))
    model.add(BatchNormalization())
    model.add(Conv2D(32, (5, 5), activation="relu", padding="same"))
    model.add(MaxPooling2D(pool_size=(2, 2)))
    model.add(Dropout(0.25))
    model.add(Flatten())
    model.add(Dense(128, activation="relu"))
    model.add(BatchNormalization())
    model.add(Dropout(0.5))
    model.add(Dense(num_classes, activation="softmax"))
    return model


def model_c():
    model = Sequential()
    model.add(Input(input_shape))
    model.add(Conv2D(64, kernel_size=(2, 2), activation="relu", padding="same"))
    model.add(Conv2D(128, (2, 2), activation="relu", padding="same"))
    model.add(Conv2D(64, (2, 2), activation="relu", padding="same"))
    model.add(MaxPooling2D(pool_size=(2, 2)))
    model.add(Dropout(0.25))
    model.add(Conv2D(64, (3, 3), activation="relu", padding="same"))
    model.add(Conv2D(32, (2, 2), activation="relu", padding="same"))
    model.add(MaxPooling2D(pool_size=(2, 2)))
    model.add(Conv2D(32, (3, 3), activation="relu", padding="same"))
    model.add(Conv2D(32, (2, 2), activation="relu", padding="same"))
    model.add(Dropout(0.25))
    model.add(BatchNormalization())
    model.add(Flatten())
    model.add(Dense(64, activation="relu"))
    model.add(Dropout(0.5))
    model.add(Dense(num_classes, activation="softmax"))
    return model


MODELS = {"a1": model_a1, "a2": model_a2, "b": model_b, "c": model_c}


def train(name: str, data) -> None:
    """Train a model by the original's code; ``data`` is as mnist.load_data() returns it."""
    (x_train, y_train), (x_test, y_test) = data
    x_train = x_train.reshape(x_train.shape[0], *input_shape)
    x_test = x_test.reshape(x_test.shape[0], *input_shape)
    x_train = x_train.astype("float32")
    x_test = x_test.astype("float32")
    x_train /= 255
    x_test /= 255
    y_train = keras.utils.to_categorical(y_train, num_classes)
    y_test = keras.utils.to_categorical(y_test, num_classes)
    model = MODELS[name]()
    model.compile(
        loss=keras.losses.categorical_crossentropy,
        optimizer=keras.optimizers.Adam(),
        metrics=["accuracy"],
    )
    model.fit(
        x_train,
        y_train,
        batch_size=batch_size,
        epochs=epochs,
        verbose=1,
        validation_data=(x_test, y_test),
    )
