"""Check a notebook's parameters before anything is loaded or trained."""

import hashlib
import re
import tempfile
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

TRAIN_IMAGES = 60_000
MOST_SEED = 2**32 - 1


class Setting(NamedTuple):
    """A row of the comparison: a notebook, and its own parameters where it has some.

    ``epochs`` are those of the reference run.
    """

    notebook: str
    title: str
    own: dict[str, int | str] = {}  # noqa: RUF012
    epochs: int = 10

    @property
    def model(self) -> str:
        """The model's name in records: the notebook's last word."""
        return self.notebook.split("_")[-1]


SETTINGS = {
    "a1": Setting("1_model_a1", "CNN A.1"),
    "a2": Setting("2_model_a2", "CNN A.2"),
    "b": Setting("3_model_b", "CNN B"),
    "c": Setting("4_model_c", "CNN C", {"first_kernel_size": 2}),
    "c7": Setting("4_model_c", "CNN C, 7X7 first", {"first_kernel_size": 7}),
    "d-speed": Setting("5_model_d", "CNN D, speed", {"budget": "speed"}, 3),
    "d-accuracy": Setting("5_model_d", "CNN D, accuracy", {"budget": "accuracy"}, 7),
}
MODELS = tuple(dict.fromkeys(setting.model for setting in SETTINGS.values()))

ALLOWED = {
    "epochs": "a whole number of 1 or more",
    "batch_size": "a whole number from 1 to the number of training images",
    "seed": f"a whole number from 0 to {MOST_SEED}",
    "train_samples": "None (all images) or a whole number from 1 to the number of training images",
    "dataset": '"mnist" or the path of an npz file',
    "precision": '"float32", "mixed_bfloat16" or, on a GPU, "mixed_float16"',
    "results_dir": "None (the folder runs/) or the path of a folder that can be written",
    "first_kernel_size": "a whole number from 1 to 28",
    "budget": '"speed" or "accuracy"',
}
OWN = ("first_kernel_size", "budget")  # what only one model has


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
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)]
    train_samples: Annotated[int, Field(ge=1)] | None = None
    dataset: str = "mnist"
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    results_dir: str | None = None
    first_kernel_size: Annotated[int, Field(ge=1, le=28)] | None = None
    budget: Literal["speed", "accuracy"] | None = None
    dataset_name: str = "mnist"

    def recorded(self) -> dict:
        """Return what a record keeps under ``run``; two runs are the same when it is equal."""
        run = self.model_dump(
            include={"epochs", "batch_size", "seed", "train_samples", "precision"}
        )
        run["dataset"] = self.dataset_name
        return run | self.own()

    def own(self) -> dict[str, int | str]:
        """Return the parameters that only this model has."""
        return {name: getattr(self, name) for name in OWN if getattr(self, name) is not None}

    def run_folder(self) -> Path:
        """Return the folder of the run with these parameters, whether it is there or not.

        Its name holds the parameters, so that runs with other ones never share it.
        """
        parts = [
            f"epochs{self.epochs}",
            f"batch{self.batch_size}",
            f"samples{self.train_samples or '-all'}",
            self.dataset_name,
            self.precision,
        ]
        parts += [f"{name}{value}" for name, value in self.own().items()]
        name = "-".join([*parts, f"seed{self.seed}"])
        return results_folder(self.results_dir) / self.model / name


def check_parameters(model: str, **values) -> Parameters:
    """Return the checked parameters of a run of ``model``, one of ``MODELS``.

    For a model with budgets, ``epochs`` may be None: the budget's own. Raises InputError, in one
    sentence that names the parameter, its value and what is allowed.
    """
    given = values
    for name in OWN:
        if name in values and values[name] is None:
            raise refusal(name, None, ALLOWED[name])
    if "budget" in values and values.get("epochs") is None:
        values = values | {"epochs": _epochs_of(values["budget"])}
    try:
        parameters = Parameters(model=model, **values)
    except ValidationError as error:
        # Name the parameter itself: inside a union, pydantic adds the branch to the place.
        name = error.errors()[0]["loc"][0]
        if name == "model":
            raise refusal("model", model, f"one of {', '.join(MODELS)}") from None
        allowed = ALLOWED.get(name)
        if allowed is None:
            raise InputError(f"{name} is not a parameter of model {model!r}.") from None
        if "budget" in given and name == "epochs":
            allowed = f"None (as many as the budget takes) or {allowed}"
        raise refusal(name, given.get(name), allowed) from None
    check_counts(parameters)
    parameters = parameters.model_copy(update={"dataset_name": dataset_name(parameters.dataset)})
    # The run's own folder: whatever lies in its way is better found now than after training.
    writable_folder(parameters.run_folder())
    return parameters


def _epochs_of(budget: str) -> int:
    """Return the epochs that a budget takes. Raises InputError for an unknown one."""
    for setting in SETTINGS.values():
        if setting.own.get("budget", ...) == budget:
            return setting.epochs
    raise refusal("budget", budget, ALLOWED["budget"])


def refusal(name: str, value, allowed: str) -> InputError:
    """Return the error that names a parameter, the value found and what is allowed."""
    return InputError(f"{name} is {value!r}; it must be {allowed}.")


def check_counts(parameters: Parameters) -> None:
    """Refuse more samples, or a larger batch, than the embedded data set has images.

    Another data set's count is known, and checked, only when it has been loaded.
    """
    if parameters.dataset != "mnist":
        return
    samples, least = parameters.train_samples, 2 if parameters.model == "d" else 1
    if samples is not None and not least <= samples <= TRAIN_IMAGES:
        allowed = f"None (all images) or a whole number from {least} to {TRAIN_IMAGES}"
        raise refusal("train_samples", samples, allowed)
    check_batch_size(parameters.batch_size, trained_on(parameters.model, samples or TRAIN_IMAGES))


def trained_on(model: str, images: int) -> int:
    """Return on how many of the training images a model trains: D keeps some back to validate."""
    return images - max(1, images // 60) if model == "d" else images


def check_batch_size(batch_size: int, images: int) -> None:
    """Raise InputError for a batch larger than the number of images to train on."""
    if batch_size > images:
        allowed = f"a whole number from 1 to the number of images to train on, {images}"
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
    stem = re.sub(r"[^A-Za-z0-9_]+", "_", path.stem)[:40]
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
