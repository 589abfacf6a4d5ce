"""The record of a run and the trained model: save, load and check."""

import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mnist_utils.parameters import (
    CODE_VARIABLE,
    OWN,
    InputError,
    Parameters,
    run_name,
    setting_of,
    title_of,
)

if TYPE_CHECKING:  # slow to import, and here only load_model needs TensorFlow
    import keras
    import nbformat

    from mnist_utils.loss_plot import DynamicLossPlot

SCHEMA_VERSION = 1
RECORD_FILE = "metrics.json"
MODEL_FILE = "model.keras"
EXECUTED, FAILED = "executed.ipynb", "failed.ipynb"  # what the headless runner executed
LOCK = ".lock"  # of a folder, while it is written
MOST_BYTES = 10**9  # of a file that is read whole; the largest here has a few million

Fraction = Annotated[float, Field(ge=0, le=1)]
# Bounded, so that no record's numbers overflow, nor its words fill a table or are taken for TeX.
MOST = 10**12
NotNegative = Annotated[float, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
Words = Annotated[str, Field(max_length=100, pattern=r"^[^$\x00-\x1f]*$")]


class _Strict(BaseModel):
    # Unknown names are let through: a later version may add some.
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class RunParameters(_Strict):
    """The parameters of a run; a model's own, such as first_kernel_size, are kept as well."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, NotNegative | Count | Words | bool]

    epochs: Positive
    batch_size: Positive
    seed: Count
    train_samples: Positive | None
    dataset: Words
    precision: Words


class Architecture(_Strict):
    """What the built model is; kernel_sizes holds one pair (height, width) a convolution.

    ``macs`` are the multiply-adds of its convolutions and dense layers for one image.
    """

    conv_layers: Count
    kernel_sizes: list[Annotated[list[Positive], Field(min_length=2, max_length=2)]]
    max_pool: bool
    padding: bool
    dropout: bool
    batch_normalization: bool
    parameters: Count
    macs: Count
    digest: str

    @model_validator(mode="after")
    def _one_size_a_layer(self) -> "Architecture":
        if len(self.kernel_sizes) != self.conv_layers:
            raise ValueError("kernel_sizes must have one pair for each of conv_layers")
        return self


class History(_Strict):
    """One number an epoch; None where it was not validated."""

    loss: list[NotNegative]
    accuracy: list[Fraction]
    val_loss: list[NotNegative | None]
    val_accuracy: list[Fraction | None]


class File(_Strict):
    """A file beside the record, tied to it by its content."""

    file: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
    sha256: str


class Record(_Strict):
    """What is kept of a run; everything the comparison needs."""

    schema_version: Annotated[int, Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)]
    model: Words
    title: Words
    run: RunParameters
    architecture: Architecture
    history: History
    test_loss: NotNegative
    test_accuracy: Fraction
    steps: Count | None = None  # of the optimizer
    seconds_per_epoch: list[NotNegative]
    evaluation_seconds: NotNegative = 0.0  # of an evaluation that belongs to the model's cost
    environment: dict[str, str | Count]
    predictions: File
    model_file: File | None = None
    code_sha256: str | None

    @property
    def trained_epochs(self) -> int:
        """The epochs that it was really trained for; fewer than run.epochs if it was stopped."""
        return len(self.history.loss)

    @property
    def total_seconds(self) -> float:
        """The seconds of training and validation, and of a costly evaluation."""
        return sum(self.seconds_per_epoch) + self.evaluation_seconds

    @property
    def multiply_adds(self) -> int | None:
        """Those of the whole training: a step costs about three passes forward."""
        if self.steps is None:
            return None
        return 3 * self.architecture.macs * self.steps * self.run.batch_size

    @model_validator(mode="after")
    def _one_number_an_epoch(self) -> "Record":
        lists = {**self.history.model_dump(), "seconds_per_epoch": self.seconds_per_epoch}
        count = self.trained_epochs
        for name, values in lists.items():
            if len(values) != count:
                raise ValueError(f"{name} has {len(values)} numbers; loss has {count}")
        if not 1 <= count <= self.run.epochs:
            raise ValueError(f"history has {count} of {self.run.epochs} epochs")
        return self


def save_run(
    model: "keras.Model",
    parameters: Parameters,
    loss_plot: "DynamicLossPlot",
    score: Sequence[float],
    probabilities: np.ndarray,
    y_test: np.ndarray,
    evaluation_seconds: float = 0.0,
) -> None:
    """Save a run's record, its predictions and the trained model, and print where they are.

    ``loss_plot`` watched the training; ``score`` is the test loss and the test accuracy;
    ``probabilities`` are the model's answers for the test set (n, 10), ``y_test`` its one-hot
    labels (n, 10). ``evaluation_seconds`` are given where the evaluation is part of the cost. The
    files are wholly there or not there, the record last. Raises InputError for a number that is
    not finite, for parameters changed since they were checked, for a model that was not built
    with the seed and trained from its start to its end by this one ``fit``, so that the seed does
    not give its numbers, and for an evaluation older than the training. A model that Keras cannot
    save is named and left out.
    """
    seed = parameters.seed % (2**31 - 1)  # as TensorFlow keeps it
    whole = loss_plot.model is model and loss_plot.fresh and loss_plot.ended
    if not whole or loss_plot.seed != seed:
        raise InputError(
            "The run is not saved: the model was not trained once, from its start to its end, by "
            "the cell above, so its numbers are not those of the seed. Run the cells from the "
            "model's on."
        )
    if any(old is given for old in loss_plot.outdated for given in (score, probabilities)):
        raise InputError(
            "The run is not saved: its evaluation is that of an earlier training. Run the cells "
            "after the training's again."
        )
    # The notebook's variables, or the script's: changed since they were checked, they were used.
    now = vars(sys.modules["__main__"])
    for name in ("epochs", "batch_size", "seed", "train_samples", "dataset", "precision", *OWN):
        if now.get(name, getattr(parameters, name)) != getattr(parameters, name):
            raise InputError(
                f"The run is not saved: {name} is {now[name]!r}, and was "
                f"{getattr(parameters, name)!r} when it was checked. Run the cells from the "
                "parameters on."
            )
    history = {
        name: [None if value is None else round(float(value), 6) for value in values]
        for name, values in loss_plot.history.items()
    }
    arrays = io.BytesIO()
    np.savez_compressed(
        arrays,
        probabilities=probabilities.astype(np.float16),
        predicted=probabilities.argmax(axis=1).astype(np.uint8),  # before the rounding
        labels=y_test.argmax(axis=1).astype(np.uint8),
    )
    sha256 = hashlib.sha256(arrays.getvalue()).hexdigest()
    # Named by its content, so that an older record keeps its own until it is replaced.
    files = {f"predictions-{sha256[:8]}.npz": arrays.getvalue()}
    model_file = None
    if parameters.keep_model:
        try:
            content = files[MODEL_FILE] = model_bytes(model)
            model_file = {"file": MODEL_FILE, "sha256": hashlib.sha256(content).hexdigest()}
        except Exception as error:  # what Keras raises for layers that it cannot read again
            reason = str(error).strip() or type(error).__name__
            print("The model itself is not saved:", reason.splitlines()[0])
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": parameters.model,
        "title": title_of(parameters.model, parameters.recorded()),
        "run": parameters.recorded(),
        "architecture": describe_architecture(model),
        "history": history,
        "test_loss": round(float(score[0]), 6),
        "test_accuracy": round(float(score[1]), 6),
        "steps": int(model.optimizer.iterations),
        "seconds_per_epoch": [round(seconds, 3) for seconds in loss_plot.seconds_per_epoch],
        "evaluation_seconds": round(evaluation_seconds, 3),
        "environment": describe_environment(),
        "predictions": {"file": f"predictions-{sha256[:8]}.npz", "sha256": sha256},
        "model_file": model_file,
        "code_sha256": os.environ.get(CODE_VARIABLE),
    }
    try:
        Record.model_validate(record)
    except ValidationError as error:
        raise InputError(f"The run was not saved: {first_fault(error)}.") from None
    folder = parameters.run_folder()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    with FileLock(folder / LOCK):  # two kernels may save the same run at once
        write_files(folder, {**files, RECORD_FILE: text.encode()})
    if len(history["loss"]) < parameters.epochs:
        print(f"Stopped after {len(history['loss'])} of {parameters.epochs} epochs.")
    # As the reader gave it: a worker's own folder is a temporary one.
    shown = Path(parameters.results_dir or "runs", parameters.model, folder.name)
    print("Saved the run in", shown)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files whole, the record last, and remove those whose place they take.

    The folder is locked: what another process began to write, it was killed while it wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(files, key=lambda name: name == RECORD_FILE):
        write_whole(folder / name, files[name])
    older = [EXECUTED, FAILED, ".*.part"]
    older += ["predictions-*.npz", MODEL_FILE] if RECORD_FILE in files else []
    for path in (path for pattern in older for path in folder.glob(pattern)):
        if path.name not in files:
            path.unlink(missing_ok=True)


def load_record(folder: Path) -> Record:
    """Return a folder's record; raise InputError that names the file and the field at fault."""
    path = folder / RECORD_FILE
    try:
        return Record.model_validate_json(_read(path))
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error)}.") from None


def load_runs(results: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return all runs below a results folder, a row a run, and a sentence for each left out.

    A run is left out when its record is damaged, when its folder is that of other parameters,
    and when its predictions are those of another run: it is a copy, and no further seed.
    """
    rows, problems = [], []
    seen: dict[str, Path] = {}
    for path in sorted(results.glob(f"*/*/{RECORD_FILE}")):
        folder = path.parent
        try:
            record = load_record(folder)
            run = record.run.model_dump()
            own = f"{record.model}/{run_name(run, by_hand=record.code_sha256 is None)}"
            if own != f"{folder.parent.name}/{folder.name}":
                raise InputError(f"{path}: it lies in another run's folder; its own is {own!r}.")
            if not os.path.isfile(folder / record.predictions.file):
                raise InputError(f"{folder / record.predictions.file}: missing.")
            first = seen.setdefault(record.predictions.sha256, folder)
            if first != folder:
                raise InputError(f"{path}: it repeats the run in {first}.")
        except InputError as error:
            problems.append(str(error))
            continue
        rows.append(_row(record, folder, run))
    return pd.DataFrame(rows, columns=COLUMNS), problems


COLUMNS = [
    *("model", "setting", "title", "seed", "epochs", "trained_epochs", "batch_size"),
    *("train_samples", "dataset", "precision", "by_hand", "parameters", "macs", "multiply_adds"),
    *("test_loss", "test_accuracy", "seconds", "threads", "digest", "code_sha256"),
    *("val_accuracy", "path"),
]


def _row(record: Record, folder: Path, run: dict[str, Any]) -> list[Any]:
    """Return a run's values for COLUMNS."""
    values = record.__dict__ | record.architecture.__dict__ | run
    values |= {
        "setting": setting_of(record.model, run),
        "title": title_of(record.model, run) or record.title,
        "trained_epochs": record.trained_epochs,
        "by_hand": record.code_sha256 is None,
        "multiply_adds": record.multiply_adds,
        "seconds": record.total_seconds,
        "threads": record.environment.get("threads"),
        "val_accuracy": record.history.val_accuracy,
        "path": folder,
    }
    return [values[name] for name in COLUMNS]


def read_predictions(folder: Path) -> dict[str, np.ndarray]:
    """Return the test set's ``probabilities`` (n, 10) float16, ``predicted`` and ``labels``.

    The last two are uint8 (n,). Raises InputError when the file is missing, is not what the
    record was saved with, or holds anything else.
    """
    entry = load_record(folder).predictions
    content = io.BytesIO(_read_checked(folder, entry))
    try:
        _check_size(content)
        with np.load(content, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("probabilities", "predicted", "labels")}
        kinds = [(array.dtype, array.shape) for array in found.values()]
        count = len(found["labels"])
        if kinds != [(np.float16, (count, 10)), (np.uint8, (count,)), (np.uint8, (count,))]:
            raise ValueError
    except Exception:  # what a damaged or hostile archive raises: BadZipFile, KeyError, ...
        raise InputError(
            f"{folder / entry.file}: not the predictions of a run, though its SHA-256 fits."
        ) from None
    return found


def load_model(folder: Path) -> "keras.Model":
    """Return the trained model of a run, not compiled, read in Keras's safe mode.

    Raises InputError when it was not kept, is missing, or is not the one of the record.
    """
    entry = load_record(folder).model_file
    if entry is None:
        raise InputError(
            f"{folder}: its model was not kept; remove the folder, and run it again with "
            "keep_model = True."
        )
    content = _read_checked(folder, entry)
    from mnist_utils.training import keras

    try:
        _check_size(io.BytesIO(content))
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, MODEL_FILE)
            path.write_bytes(content)
            return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception:  # what Keras raises for a file that is none: ValueError, TypeError, ...
        raise InputError(
            f"{folder / entry.file}: not a Keras model, or one of another version."
        ) from None


def _check_size(content: io.BytesIO) -> None:
    """Raise an exception for what is no zip file, or one that is too large when unpacked."""
    with zipfile.ZipFile(content) as archive:
        if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
            raise ValueError


def model_bytes(model: "keras.Model") -> bytes:
    """Return a model as a .keras file, without the state of its optimizer."""

    # Not by clone_model, which compiles the copy as well: an optimizer would be saved with it.
    copy = type(model).from_config(model.get_config())
    copy.set_weights(model.get_weights())
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, MODEL_FILE)
        copy.save(path)
        return without_defaults(path.read_bytes())


def without_defaults(model: bytes) -> bytes:
    """Return a .keras file that names no argument of a layer which has its default.

    Keras writes all of them, and an older Keras refuses a file with one that it does not know.
    """
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(model)) as old, zipfile.ZipFile(result, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename == "config.json":
                content = json.dumps(json.loads(content, object_hook=_drop_defaults)).encode()
            new.writestr(entry, content)
    return result.getvalue()


def _drop_defaults(part: dict[str, Any]) -> dict[str, Any]:
    """Drop the defaults of a part of a model's configuration, if it is that of a Keras object."""
    class_ = getattr(sys.modules.get(part.get("module") or ""), part.get("class_name", ""), None)
    if class_ is None:
        return part
    arguments = inspect.signature(class_.__init__).parameters
    return part | {
        "config": {
            name: value
            for name, value in part["config"].items()
            if name not in arguments or arguments[name].default != value
        }
    }


def _read_checked(folder: Path, entry: File) -> bytes:
    content = _read(folder / entry.file)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise InputError(f"{folder / entry.file}: not the record's file (its SHA-256 differs).")
    return content


def _read(path: Path) -> bytes:
    """Return a file's content; raise InputError when it is missing, or too large to be ours."""
    try:
        if path.stat().st_size > MOST_BYTES or not path.is_file():  # a pipe would never end
            raise InputError(f"{path}: no file, or larger than any file of a run.")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or 'cannot be read').lower()}.") from None


def first_fault(error: ValidationError) -> str:
    """Return the first fault that pydantic found, as "field: what is wrong"."""
    fault = error.errors(include_input=False, include_url=False)[0]
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


def code_sha256(notebook: "nbformat.NotebookNode") -> str:
    """Return the SHA-256 of the code cells that a run's numbers come from.

    Left out are the cells that hold the parameters (the record has their values), the one that
    fetches the helpers, and the one that shows what the reference runs reached.
    """
    not_code = {"parameters", "injected-parameters", "setup", "reached"}
    sources = [
        cell.source.strip()
        for cell in notebook.cells
        if cell.cell_type == "code" and not not_code.intersection(cell.metadata.get("tags", []))
    ]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def describe_architecture(model: "keras.Model") -> dict[str, Any]:
    """Read the comparison's columns, the cost and a digest off a built Keras model."""
    layers = _layers(model)
    convolutions = [layer for layer in layers if len(getattr(layer, "kernel_size", ())) == 2]
    kinds = {type(layer).__name__ for layer in layers}
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


def _layers(model: "keras.Model") -> list["keras.Layer"]:
    """Return the layers of a model, and in the place of a model among them its own."""
    several = (_layers(part) if hasattr(part, "layers") else [part] for part in model.layers)
    return list(chain.from_iterable(several))


def _multiply_adds(layer: "keras.Layer") -> int:
    """Return the multiply-adds of a convolution or dense layer for one image; 0 for any other.

    Each weight of its kernels is used once for each place of the output.
    """
    if not hasattr(layer, "kernel_size") and type(layer).__name__ != "Dense":
        return 0
    weights = sum(math.prod(kernel.shape) for kernel in layer.weights if len(kernel.shape) > 1)
    _, *places, _ = layer.output.shape
    return weights * math.prod(places)


# What tells the layers of this collection apart. Names, seeds and precision do not; keys that
# one Keras version knows and another does not must not change the digest.
_DIGEST_KEYS = (
    *("filters", "kernel_size", "strides", "padding", "activation", "use_bias", "units", "rate"),
    *("pool_size", "momentum", "epsilon"),
)


def architecture_digest(model: "keras.Model") -> str:
    """Return 16 hex digits that say which architecture a model has."""
    layers = []
    for layer in _layers(model):
        try:
            config = layer.get_config()
        except NotImplementedError:  # a reader's own layer that does not describe itself
            config = {}
        kept = {key: config[key] for key in _DIGEST_KEYS if key in config}
        layers.append([type(layer).__name__, kept])
    content = json.dumps([list(model.input_shape[1:]), layers], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


# The processor's flags for vector instructions, widest first, and what they are called.
VECTORS = {
    "amx_bf16": "AMX with bfloat16",
    "avx512_bf16": "AVX-512 with bfloat16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
# Variables of these libraries change how a run computes.
LIBRARIES = re.compile("^(TF|XLA|ONEDNN|DNNL|MKL|OMP|KMP|CUDA|CUDNN|NVIDIA|KERAS|OPENBLAS)_")
USUAL = {"TF_CPP_MIN_LOG_LEVEL", "TF2_BEHAVIOR", "TF_ENABLE_ONEDNN_OPTS=1", "KERAS_HOME"}
USUAL |= {"KERAS_BACKEND", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"}


def describe_environment() -> dict[str, str | int]:
    """Return versions, processor, device and what was set; never a path, a host or a user."""
    from mnist_utils.training import GPUS, keras, tf

    details = [tf.config.experimental.get_device_details(gpu) for gpu in GPUS]
    count_cores = getattr(os, "sched_getaffinity", None)
    cores = len(count_cores(0)) if count_cores else os.cpu_count() or 1
    # A path is somebody's own: of such a variable only the name is kept.
    variables = [
        name if re.search(r"[/\\]", value) else f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if LIBRARIES.match(name) and f"{name}={value}" not in USUAL and name not in USUAL
    ]
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "system": platform.system(),
        "processor": processor(),
        "cores": cores,
        # The headless runner shares the cores out by this variable of TensorFlow's.
        "threads": int(os.environ.get("TF_NUM_INTRAOP_THREADS") or cores),
        "device": details[0].get("device_name", "GPU") if GPUS else "CPU",
        "variables": " ".join(variables),
    }


def processor() -> str:
    """Return the processor's name, family, model and, where Linux tells, its widest vectors.

    The name alone can hide a factor of two: a virtual machine calls several generations the same.
    """
    with suppress(OSError):
        pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        facts = {name.strip(): value.strip() for name, _, value in pairs}
        if name := facts.get("model name"):
            numbers = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
            flags = facts.get("flags", "").split()
            vectors = [text for flag, text in VECTORS.items() if flag in flags]
            return ", ".join([name, numbers, *vectors[:1]])
    return platform.processor() or platform.machine()
