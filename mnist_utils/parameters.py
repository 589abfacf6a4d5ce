"""Check a notebook's parameters before anything is loaded or trained."""

import hashlib
import re
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MODELS = ("a1", "a2", "b", "c")
TRAIN_IMAGES = 60_000

# The rows of the comparison, and what `make run` runs: a notebook and, where a model has
# parameters of its own, their values.
SETTINGS = {
    "a1": ("1_model_a1", {}),
    "a2": ("2_model_a2", {}),
    "b": ("3_model_b", {}),
    "c": ("4_model_c", {"first_kernel_size": 2}),
    "c7": ("4_model_c", {"first_kernel_size": 7}),
}

ALLOWED = {
    "epochs": "a whole number of 1 or more",
    "batch_size": "a whole number from 1 to the number of training images",
    "seed": "a whole number from 0 to 4294967295",
    "train_samples": "None (all images) or a whole number from 1 to the number of training images",
    "dataset": '"mnist" or the path of an npz file',
    "precision": '"float32", "mixed_bfloat16" or, on a GPU, "mixed_float16"',
    "results_dir": "None (the folder runs/) or the path of a folder that can be written",
    "first_kernel_size": "a whole number from 1 to 28",
}


class InputError(ValueError):
    """Something a user gave is wrong; the message is one plain sentence that names it."""

    def _render_traceback_(self):
        # IPython and Jupyter show these lines in the traceback's place.
        return [f"{type(self).__name__}: {self}"]


class Parameters(BaseModel):
    """The checked parameters of one run.

    ``dataset_name`` stands for ``dataset`` in records: ``"mnist"``, or the file's stem and the
    first eight digits of its SHA-256, so that no path of a machine is ever recorded.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: Literal[MODELS]
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    train_samples: Annotated[int, Field(ge=1)] | None = None
    dataset: str = "mnist"
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    results_dir: str | None = None
    first_kernel_size: Annotated[int, Field(ge=1, le=28)] | None = None
    dataset_name: str = "mnist"

    def recorded(self) -> dict:
        """Return what a record keeps under ``run``; two runs are the same when it is equal."""
        run = self.model_dump(
            include={"epochs", "batch_size", "seed", "train_samples", "precision"}
        )
        run["dataset"] = self.dataset_name
        if self.first_kernel_size is not None:
            run["first_kernel_size"] = self.first_kernel_size
        return run


def check_parameters(model: str, **values) -> Parameters:
    """Return the checked parameters of a run of ``model``, one of ``MODELS``.

    Raises InputError, in one sentence that names the parameter, its value and what is allowed.
    """
    try:
        parameters = Parameters(model=model, **values)
    except ValidationError as error:
        # Name the parameter itself: inside a union, pydantic adds the branch to the place.
        name = error.errors()[0]["loc"][0]
        allowed = ALLOWED.get(name)
        if allowed is None:
            raise InputError(f"{name} is not a parameter of model {model!r}.") from None
        raise refusal(name, values.get(name), allowed) from None
    check_counts(parameters)
    writable_folder(results_folder(parameters.results_dir))
    return parameters.model_copy(update={"dataset_name": dataset_name(parameters.dataset)})


def refusal(name: str, value, allowed: str) -> InputError:
    """Return the error that names a parameter, the value found and what is allowed."""
    return InputError(f"{name} is {value!r}; it must be {allowed}.")


def check_counts(parameters: Parameters) -> None:
    """Refuse more samples, or a larger batch, than the embedded data set has images.

    Another data set's count is known, and checked, only when it has been loaded.
    """
    if parameters.dataset != "mnist":
        return
    samples = parameters.train_samples
    if samples is not None and samples > TRAIN_IMAGES:
        allowed = f"None (all images) or a whole number from 1 to {TRAIN_IMAGES}"
        raise refusal("train_samples", samples, allowed)
    check_batch_size(parameters.batch_size, samples or TRAIN_IMAGES)


def check_batch_size(batch_size: int, images: int) -> None:
    """Raise InputError for a batch larger than the number of training images."""
    if batch_size > images:
        allowed = f"a whole number from 1 to the number of training images, {images}"
        raise refusal("batch_size", batch_size, allowed)


def dataset_name(dataset: str) -> str:
    """Return the name under which records keep a data set; it tells files apart by content."""
    if dataset == "mnist":
        return dataset
    path = Path(dataset)
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise InputError(
            f"dataset is {dataset!r} ({reason}); it must be {ALLOWED['dataset']}."
        ) from None
    stem = re.sub(r"[^A-Za-z0-9_]+", "_", path.stem)
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}"


def project_folder() -> Path:
    """Return the checkout's root when working in it or in one of its folders, else this folder."""
    here = Path.cwd()
    for folder in (here, here.parent):
        if (folder / "mnist_utils").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return here


def results_folder(results_dir: str | None) -> Path:
    """Return the folder that holds a reader's records: ``results_dir``, or the project's runs/."""
    return project_folder() / "runs" if results_dir is None else Path(results_dir)


def writable_folder(folder: Path) -> None:
    """Make the folder where it is missing; raise InputError when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = (error.strerror or "not writable").lower()
        raise InputError(
            f"results_dir is {str(folder)!r} ({reason}); it must be {ALLOWED['results_dir']}."
        ) from None
