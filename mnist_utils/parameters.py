"""Check a notebook's parameters before anything is loaded or trained."""

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST_SEED = 2**32 - 1

# Set by the headless runner for the kernel that it starts: which code cells run, where the data
# set's file really lies, and where the run is really written.
CODE_VARIABLE = "MNIST_UTILS_CODE_SHA256"
DATASET_VARIABLE = "MNIST_UTILS_DATASET"
RESULTS_VARIABLE = "MNIST_UTILS_RESULTS"


class Setting(NamedTuple):
    """A row of the comparison: a notebook, and its own parameters where it has some.

    ``epochs`` are those of the reference run.
    """

    notebook: str
    title: str
    own: dict[str, int] = {}  # noqa: RUF012
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
    "c7": Setting("4_model_c", "CNN C, 7×7 first", {"first_kernel_size": 7}),
    "d": Setting("5_model_d", "CNN D", epochs=3),
    "e": Setting("6_model_e", "CNN E", epochs=7),
}
MODELS = tuple(dict.fromkeys(setting.model for setting in SETTINGS.values()))


def setting_of(model: str, run: Mapping[str, Any]) -> str | None:
    """Return the setting that a run's model and parameters belong to; None for any other."""
    for key, setting in SETTINGS.items():
        own = setting.own.items()
        if setting.model == model and all(run.get(name) == value for name, value in own):
            return key
    return None


def title_of(model: str, run: Mapping[str, Any]) -> str:
    """Return the name under which a run is shown; a model's own parameters tell it apart."""
    if setting := setting_of(model, run):
        return SETTINGS[setting].title
    titles = [setting.title for setting in SETTINGS.values() if setting.model == model]
    own = [f"{name} {run[name]}" for name in OWN if name in run]
    return ", ".join([*titles[:1], *own])


# The embedded data sets, with their numbers of training images.
EMBEDDED = {"mnist": 60_000, "mnist-small": 6_000}

ALLOWED = {
    "epochs": "a whole number of 1 or more",
    "batch_size": "a whole number from 1 to the number of training images",
    "seed": f"a whole number from 0 to {MOST_SEED}",
    "train_samples": "None (all images) or a whole number from 1 to the number of training images",
    "dataset": '"mnist", "mnist-small", or the path of an npz file or of a folder of IDX files',
    "precision": '"float32", "mixed_bfloat16" or, on a GPU, "mixed_float16"',
    "results_dir": "None (the folder runs/) or the path of a folder that can be written, as a text",
    "keep_model": "True or False",
    "first_kernel_size": "a whole number from 1 to 28",
}
OWN = ("first_kernel_size",)  # what only one model has


class InputError(ValueError):
    """Something a user gave is wrong; the message is one plain sentence that names it."""

    def _render_traceback_(self) -> list[str]:
        # IPython and Jupyter show these lines in the traceback's place.
        return [f"{type(self).__name__}: {self}"]


def say(*text: object) -> None:
    """Print a line at once; end quietly when nobody reads any more, as with ``| head``."""
    try:
        print(*text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # as shells name an end by SIGPIPE


class Parameters(BaseModel):
    """The checked parameters of one run.

    ``dataset_name`` stands for ``dataset`` in records: ``"mnist"``, or the file's stem and the
    first eight digits of its SHA-256, so that no path of a machine is ever recorded.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: Literal[MODELS]  # type: ignore[valid-type]
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)]
    train_samples: Annotated[int, Field(ge=1)] | None
    dataset: str
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"]
    results_dir: str | None
    keep_model: bool
    first_kernel_size: Annotated[int, Field(ge=1, le=28)] | None = None
    dataset_name: str = "mnist"
    by_hand: bool = True

    def recorded(self) -> dict[str, Any]:
        """Return what a record keeps under ``run``; two runs are the same when it is equal."""
        names = {"epochs", "batch_size", "seed", "train_samples", "precision"}
        own = self.model_dump(include=set(OWN), exclude_none=True)
        return self.model_dump(include=names) | {"dataset": self.dataset_name} | own

    def run_folder(self) -> Path:
        """Return the folder of the run with these parameters, whether it is there or not."""
        name = run_name(self.recorded(), self.by_hand)
        return results_folder(self.results_dir) / self.model / name


def run_name(run: Mapping[str, Any], by_hand: bool) -> str:
    """Return the name of a run's folder, made of its parameters as records keep them.

    Runs with other parameters never share a folder, nor does one made by hand take the place of
    a headless one.
    """
    parts = [
        f"epochs{run['epochs']}",
        f"batch{run['batch_size']}",
        f"samples{run['train_samples'] or '-all'}",
        run["dataset"],
        run["precision"],
        *(f"{name}{run[name]}" for name in OWN if name in run),
        f"seed{run['seed']}",
    ]
    return "-".join([*parts, "by_hand"] if by_hand else parts)


def check_parameters(model: str, values: Mapping[str, Any], headless: bool = False) -> Parameters:
    """Return the checked parameters of a run of ``model``, one of ``MODELS``.

    ``values`` holds them by name, among others, as a notebook's ``globals()`` does; ``headless``
    is said by who starts a run elsewhere. Raises InputError, in one sentence that names the
    parameter, its value and what is allowed.
    """
    own = {name for setting in SETTINGS.values() if setting.model == model for name in setting.own}
    wanted = [name for name in ALLOWED if name not in OWN or name in own]
    for name in wanted:
        if name not in values or (name in OWN and values[name] is None):
            raise refusal(name, values.get(name), ALLOWED[name])
    given = {name: values[name] for name in wanted}
    try:
        parameters = Parameters(model=model, **given)
    except ValidationError as error:
        # Name the parameter itself: inside a union, pydantic adds the branch to the place.
        name = str(error.errors()[0]["loc"][0])
        if name == "model":
            raise refusal("model", model, f"one of {', '.join(MODELS)}") from None
        raise refusal(name, given[name], ALLOWED[name]) from None
    check_counts(parameters, EMBEDDED.get(parameters.dataset))
    by_hand = not headless and CODE_VARIABLE not in os.environ
    more = {"dataset_name": dataset_name(parameters.dataset), "by_hand": by_hand}
    parameters = parameters.model_copy(update=more)
    # The run's own folder: whatever lies in its way is better found now than after training.
    writable_folder(parameters.run_folder())
    return parameters


def refusal(name: str, value: object, allowed: str, reason: str = "") -> InputError:
    """Return the error that names a parameter, the value found, and what is allowed."""
    why = f" ({reason})" if reason else ""
    return InputError(f"{name} is {value!r}{why}; it must be {allowed}.")


def check_counts(parameters: Parameters, images: int | None) -> None:
    """Refuse more samples, or a larger batch, than there are training images.

    Another data set's count is None here, and checked when it has been loaded.
    """
    if images is None:
        return
    samples, least = parameters.train_samples, images - images_trained_on(parameters.model, images)
    least = min(2, 1 + least)  # a model that keeps images back needs one more
    if samples is not None and not least <= samples <= images:
        allowed = f"None (all images) or a whole number from {least} to {images}"
        raise refusal("train_samples", samples, allowed)
    count = images_trained_on(parameters.model, samples or images)
    if parameters.batch_size > count:
        allowed = f"a whole number from 1 to the number of images to train on, {count}"
        raise refusal("batch_size", parameters.batch_size, allowed)


def images_trained_on(model: str, images: int) -> int:
    """Return on how many images a model trains: D and E keep a sixtieth back to validate."""
    return images - max(1, images // 60) if model in ("d", "e") else images


def dataset_path(dataset: str) -> Path:
    """Return where a data set lies: from the working folder, else from the project's."""
    if DATASET_VARIABLE in os.environ:
        return Path(os.environ[DATASET_VARIABLE])
    path = Path(os.path.expanduser(dataset))  # Path's own raise errors for odd names
    return path if os.path.exists(path) else project_folder() / path


def dataset_name(dataset: str) -> str:
    """Return the name under which records keep a data set; it tells files apart by content."""
    if dataset in EMBEDDED:
        return dataset
    path = dataset_path(dataset)
    try:
        files = idx_files(path) if os.path.isdir(path) else [path]
        if any(os.path.exists(file) and not os.path.isfile(file) for file in files):
            raise OSError(0, "not a file")  # a pipe would wait for ever
        stamps = tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
        digest = _sha256_of(stamps)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = (getattr(error, "strerror", None) or "cannot be read").lower()
        raise refusal("dataset", dataset, ALLOWED["dataset"], reason) from None
    stem = re.sub(r"[^A-Za-z0-9_]+", "_", Path(dataset).stem)[:40]
    return f"{stem}-{digest[:8]}"


def idx_files(folder: Path) -> list[Path]:
    """Return what may be IDX files in a folder; some archives unpack into folders beside them."""
    return sorted(path for path in folder.glob("*idx*") if not path.is_dir())


@lru_cache  # a large file is read once for a thousand runs
def _sha256_of(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path, _, _ in stamps)).hexdigest()


def project_folder() -> Path:
    """Return the checkout above the working folder, else the package's, else this folder."""
    here, package = Path.cwd(), Path(__file__).parents[1]
    for folder in (here, *here.parents, package):
        if (folder / "mnist_utils").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return here


def results_folder(results_dir: str | None) -> Path:
    """Return the folder that holds a reader's records: ``results_dir``, or the project's runs/.

    A relative one is that of the working folder, if it is there or begins with "..", else of the
    project.
    """
    if RESULTS_VARIABLE in os.environ:
        return Path(os.environ[RESULTS_VARIABLE])
    if results_dir is None:
        return project_folder() / "runs"
    try:
        folder = Path(results_dir).expanduser()
    except RuntimeError:  # "~nobody"
        raise refusal("results_dir", results_dir, ALLOWED["results_dir"]) from None
    # In a checkout it counts from the root, wherever a notebook lies, so that all find the same.
    here, root = Path.cwd(), project_folder()
    inside = root in (here, *here.parents) and ".." not in folder.parts
    return root / folder if inside and not os.path.isdir(folder) else folder


def writable_folder(folder: Path) -> None:
    """Make the folder where it is missing; raise InputError when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = (getattr(error, "strerror", None) or "not writable").lower()
        raise refusal("results_dir", str(folder), ALLOWED["results_dir"], reason) from None
