"""The record of a run: describe the model, save, load and check."""

import hashlib
import io
import json
import math
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mnist_utils.parameters import InputError, Parameters

SCHEMA_VERSION = 1
RECORD_FILE = "metrics.json"

# Set by the headless runner for the kernel it starts: which code cells made the record.
CODE_VARIABLE = "MNIST_UTILS_CODE_SHA256"

Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    # Unknown names are let through: a later version may add some.
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class RunParameters(_Strict):
    """The parameters of a run; a model's own, such as first_kernel_size, are kept as well."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int | float | str | bool]

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    seed: Count
    train_samples: Annotated[int, Field(ge=1)] | None
    dataset: str
    precision: str


Size = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]


class Architecture(_Strict):
    """What the built model is; kernel_sizes holds one pair (height, width) a convolution."""

    conv_layers: Count
    kernel_sizes: list[Size]
    max_pool: bool
    padding: bool
    dropout: bool
    batch_normalization: bool
    parameters: Count
    macs: Count
    digest: str

    @model_validator(mode="after")
    def _one_size_a_layer(self):
        if len(self.kernel_sizes) != self.conv_layers:
            raise ValueError("kernel_sizes must have one pair for each of conv_layers")
        return self


class History(_Strict):
    """One number an epoch."""

    loss: list[NotNegative]
    accuracy: list[Fraction]
    val_loss: list[NotNegative]
    val_accuracy: list[Fraction]


class Predictions(_Strict):
    """The file beside the record that holds the test set's predictions."""

    file: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    sha256: str


class Record(_Strict):
    """What is kept of a run; everything the comparison needs."""

    schema_version: Annotated[int, Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)]
    model: str
    title: str
    run: RunParameters
    architecture: Architecture
    history: History
    test_loss: NotNegative
    test_accuracy: Fraction
    seconds_per_epoch: list[NotNegative]
    evaluation_seconds: NotNegative = 0.0  # of an evaluation that belongs to the model's cost
    environment: dict[str, str | int]
    predictions: Predictions
    code_sha256: str | None

    @property
    def total_seconds(self) -> float:
        """The seconds of training and validation, and of a costly evaluation."""
        return sum(self.seconds_per_epoch) + self.evaluation_seconds

    @property
    def threads(self) -> int:
        """The threads that it computed with: all cores, where an older record does not say."""
        return int(self.environment.get("threads", self.environment["cores"]))

    @model_validator(mode="after")
    def _one_number_an_epoch(self):
        lists = {**self.history.model_dump(), "seconds_per_epoch": self.seconds_per_epoch}
        for name, values in lists.items():
            if len(values) != self.run.epochs:
                raise ValueError(f"{name} has {len(values)} numbers for {self.run.epochs} epochs")
        return self


@dataclass(frozen=True)
class Run:
    """A record and the folder that it lies in."""

    record: Record
    folder: Path

    def predictions(self) -> dict[str, np.ndarray]:
        """Return the test set's ``probabilities`` (n, 10) float16, ``predicted`` and ``labels``.

        The last two are uint8 (n,). Raises InputError when the file is missing, or not what
        the record was saved with.
        """
        path = self.folder / self.record.predictions.file
        try:
            content = path.read_bytes()
        except OSError:
            raise InputError(f"{path}: the record's predictions are missing.") from None
        if hashlib.sha256(content).hexdigest() != self.record.predictions.sha256:
            raise InputError(f"{path}: not the record's predictions (its SHA-256 differs).")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)


def save_run(
    model,
    parameters: Parameters,
    *,
    title: str,
    history: dict[str, list[float]],
    seconds_per_epoch: list[float],
    test_loss: float,
    test_accuracy: float,
    probabilities: np.ndarray,
    labels: np.ndarray,
    evaluation_seconds: float = 0.0,
) -> None:
    """Save a run's record and predictions, and print where they are.

    ``model`` is the trained Keras model, ``probabilities`` its output for the test set (n, 10)
    and ``labels`` the true classes (n,). ``evaluation_seconds`` is given where the evaluation is
    part of what the model costs, as with test-time augmentation. The record is wholly there or
    not there: an older run with the same parameters stays until the new one is whole. Raises
    InputError for a number that is not finite.
    """
    folder = parameters.run_folder()
    predictions = io.BytesIO()
    np.savez_compressed(
        predictions,
        probabilities=probabilities.astype(np.float16),
        predicted=probabilities.argmax(axis=1).astype(np.uint8),  # before the rounding
        labels=labels.astype(np.uint8),
    )
    sha256 = hashlib.sha256(predictions.getvalue()).hexdigest()
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": parameters.model,
        "title": title,
        "run": parameters.recorded(),
        "architecture": describe_architecture(model),
        "history": {name: [round(v, 6) for v in history[name]] for name in History.model_fields},
        "test_loss": round(test_loss, 6),
        "test_accuracy": round(test_accuracy, 6),
        "seconds_per_epoch": [round(seconds, 3) for seconds in seconds_per_epoch],
        "evaluation_seconds": round(evaluation_seconds, 3),
        "environment": describe_environment(),
        # Named by its content, so that the older record keeps its own until it is replaced.
        "predictions": {"file": f"predictions-{sha256[:8]}.npz", "sha256": sha256},
        "code_sha256": os.environ.get(CODE_VARIABLE),
    }
    try:
        Record.model_validate(record)
    except ValidationError as error:
        raise InputError(f"The run was not saved: {first_fault(error)}.") from None
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / record["predictions"]["file"], predictions.getvalue())
    content = json.dumps(record, indent=2, allow_nan=False) + "\n"
    write_whole(folder / RECORD_FILE, content.encode())
    for older in folder.glob("predictions-*.npz"):
        if older.name != record["predictions"]["file"]:
            older.unlink()
    shown = Path(parameters.results_dir or "runs")
    print("Saved the run in", shown / folder.parent.name / folder.name)


def load_run(folder: Path) -> Run:
    """Return the run in a folder; raise InputError that names the file and the field at fault."""
    path = folder / RECORD_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or 'cannot be read').lower()}.") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON, or truncated.") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version is {version}, newer than this version's {SCHEMA_VERSION}."
        )
    try:
        return Run(Record.model_validate(content), folder)
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error)}.") from None


def load_runs(results: Path) -> tuple[list[Run], list[str]]:
    """Return all runs below a results folder, and a sentence for each run left out.

    A run is left out when its record or its predictions are missing, damaged or not its own.
    """
    runs, problems = [], []
    for path in sorted(results.glob(f"*/*/{RECORD_FILE}")):
        try:
            run = load_run(path.parent)
            run.predictions()
            runs.append(run)
        except InputError as error:
            problems.append(str(error))
    return runs, problems


def first_fault(error: ValidationError) -> str:
    """Return the first fault that pydantic found, as "field: what is wrong"."""
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is wholly there or not there: beside, fsync, rename."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    with suppress(OSError):  # not every system can sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def describe_architecture(model) -> dict:
    """Read the comparison's columns, the cost and a digest off a built Keras model."""
    layers = model.layers
    convolutions = [layer for layer in layers if _kind(layer) == "Conv2D"]
    kinds = {_kind(layer) for layer in layers}
    return {
        "conv_layers": len(convolutions),
        "kernel_sizes": [list(layer.kernel_size) for layer in convolutions],
        "max_pool": "MaxPooling2D" in kinds,
        "padding": any(layer.padding == "same" for layer in convolutions),
        "dropout": "Dropout" in kinds,
        "batch_normalization": any("BatchNormalization" in kind for kind in kinds),
        "parameters": model.count_params(),
        "macs": sum(_multiply_adds(layer) for layer in layers),
        "digest": architecture_digest(model),
    }


def _kind(layer) -> str:
    return type(layer).__name__


def _multiply_adds(layer) -> int:
    """Return the multiply-adds that a layer needs for one image; only matrix products count."""
    if _kind(layer) not in ("Conv2D", "Dense"):
        return 0
    kernel = math.prod(layer.kernel.shape)
    if _kind(layer) == "Dense":
        return kernel
    _, *output = layer.output.shape
    return kernel * math.prod(output) // layer.filters


# What tells the layers of this collection apart. Names, seeds and precision do not; keys that
# one Keras version knows and another does not must not change the digest.
_DIGEST_KEYS = (
    "filters",
    "kernel_size",
    "strides",
    "padding",
    "activation",
    "use_bias",
    "units",
    "rate",
    "pool_size",
    "momentum",
    "epsilon",
)


def architecture_digest(model) -> str:
    """Return 16 hex digits that say which architecture a model has."""
    layers = []
    for layer in model.layers:
        config = layer.get_config()
        layers.append([_kind(layer), {key: config[key] for key in _DIGEST_KEYS if key in config}])
    shape = list(model.input_shape[1:])
    content = json.dumps([shape, layers], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


# The processor's flags for vector instructions, widest first, and what they are called.
VECTORS = {
    "amx_bf16": "AMX with bfloat16",
    "avx512_bf16": "AVX-512 with bfloat16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def describe_environment() -> dict[str, str | int]:
    """Return versions, processor and device; never a path, a host or a user."""
    import keras
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    count_cores = getattr(os, "sched_getaffinity", None)
    cores = len(count_cores(0)) if count_cores else os.cpu_count() or 1
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "system": platform.system(),
        "processor": processor(),
        "cores": cores,
        # A sweep gives each run one thread, by this variable of TensorFlow's.
        "threads": int(os.environ.get("TF_NUM_INTRAOP_THREADS") or cores),
        "device": details[0].get("device_name", "GPU") if gpus else "CPU",
    }


def processor() -> str:
    """Return the processor's name and, where Linux tells, its widest vectors; never a host.

    The name alone can hide a factor of two: a virtual machine calls several generations the same.
    """
    with suppress(OSError):
        pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        facts = {name.strip(): value.strip() for name, _, value in pairs}
        if name := facts.get("model name"):
            flags = facts.get("flags", "").split()
            vectors = [text for flag, text in VECTORS.items() if flag in flags]
            return ", ".join([name, *vectors[:1]])
    return platform.processor() or platform.machine()
