"""The same four networks in plain PyTorch with a DataLoader, as its users write them."""

import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 256
# PyTorch's batch normalization moves its averages by 1 - what Keras calls momentum.
NORMALIZATION = {"eps": 0.001, "momentum": 0.01}


def conv(channels: int, filters: int, size: int, padding: int | str = 0):
    return nn.Conv2d(channels, filters, size, padding=padding), nn.ReLU()


def model_a1():
    return nn.Sequential(
        *conv(1, 16, 3),
        *conv(16, 32, 3),
        *conv(32, 64, 3),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 11 * 11, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def model_a2():
    return nn.Sequential(
        *conv(1, 32, 3, padding="same"),
        *conv(32, 16, 3),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        *conv(16, 32, 3),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(32, **NORMALIZATION),
        nn.Flatten(),
        nn.Linear(32 * 5 * 5, 64),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.BatchNorm1d(64, **NORMALIZATION),
        nn.Linear(64, 10),
    )


def model_b():
    return nn.Sequential(
        *conv(1, 32, 5, padding="same"),
        *conv(32, 128, 5, padding="same"),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        *conv(128, 64, 5, padding="same"),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        *conv(64, 64, 5, padding="same"),
        nn.BatchNorm2d(64, **NORMALIZATION),
        *conv(64, 32, 5, padding="same"),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(32 * 3 * 3, 128),
        nn.ReLU(),
        nn.BatchNorm1d(128, **NORMALIZATION),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )


def model_c():
    return nn.Sequential(
        *conv(1, 64, 2, padding="same"),
        *conv(64, 128, 2, padding="same"),
        *conv(128, 64, 2, padding="same"),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        *conv(64, 64, 3, padding="same"),
        *conv(64, 32, 2, padding="same"),
        nn.MaxPool2d(2),
        *conv(32, 32, 3, padding="same"),
        *conv(32, 32, 2, padding="same"),
        nn.Dropout(0.25),
        nn.BatchNorm2d(32, **NORMALIZATION),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(64, 10),
    )


MODELS = {"a1": model_a1, "a2": model_a2, "b": model_b, "c": model_c}


def make_loader(images, labels, shuffle: bool) -> DataLoader:
    x = torch.from_numpy(images).unsqueeze(1).float() / 255
    return DataLoader(
        TensorDataset(x, torch.from_numpy(labels).long()), batch_size=BATCH_SIZE, shuffle=shuffle
    )


def train(name: str, data) -> float:
    """Train one epoch and validate; return the seconds of both, without the first two steps."""
    (x_train, y_train), (x_test, y_test) = data
    model, loss_function = MODELS[name](), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters())

    def train_epoch(loader):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_function(model(x), y)
            loss.backward()
            optimizer.step()

    def validate(loader) -> float:
        model.eval()
        right = 0
        with torch.no_grad():
            for x, y in loader:
                right += (model(x).argmax(1) == y).sum().item()
        return right / len(loader.dataset)

    warm_up = make_loader(x_train[: 2 * BATCH_SIZE], y_train[: 2 * BATCH_SIZE], shuffle=True)
    train_epoch(warm_up)
    validate(warm_up)
    train_loader = make_loader(x_train, y_train, shuffle=True)
    test_loader = make_loader(x_test, y_test, shuffle=False)
    began = time.perf_counter()
    train_epoch(train_loader)
    accuracy = validate(test_loader)
    seconds = time.perf_counter() - began
    assert accuracy > 0.2, f"{name} learnt nothing: {accuracy:.2%}"
    return seconds
