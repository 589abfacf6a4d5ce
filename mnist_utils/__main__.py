"""The command line: ``python -m mnist_utils run``."""

import argparse
import re
import signal
import sys
from typing import Any, NoReturn

from mnist_utils.parameters import MOST_SEED, SETTINGS, InputError, say


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 when a notebook failed, 2 for bad input."""
    options = make_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, interrupt)  # as schedulers send it
    try:
        from mnist_utils.headless import make_tasks, run_all  # slow to import

        values = parse_values(options)
        tasks = make_tasks(options.models, values)
        return run_all(tasks, options.results_dir, options.scheduler, options.workers)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        say("\nInterrupted. What is recorded is kept; the same command goes on from there.")
        return interruption.args[0] if interruption.args else 130


def interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt(128 + signum)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mnist_utils")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run", help="run the notebooks, then the comparison").add_argument
    models = f"some of {', '.join(SETTINGS)} (default: all)"
    add("--models", nargs="+", default=list(SETTINGS), metavar="MODEL", help=models)
    add("--seeds", default="", help="such as 0-4 or 0,2,7-9 (default: 0)")
    values = "a parameter of the notebooks, such as epochs=2; given twice, both values are run"
    add("-p", dest="values", action="append", default=[], metavar="NAME=VALUE", help=values)
    add("--results-dir", metavar="FOLDER", help="where the runs are kept (default: runs/)")
    scheduler = "of a running Dask scheduler, tcp://host:8786 (default: processes on this machine)"
    add("--scheduler", metavar="ADDRESS", help=scheduler)
    workers = "how many processes on this machine (default: one a core, but one on a GPU)"
    add("--workers", type=int, metavar="N", help=workers)
    return parser


def parse_values(options: argparse.Namespace) -> dict[str, list[Any]]:
    """Return the values of each parameter, in the order given: "batch_size=64" adds one."""
    values: dict[str, list[Any]] = {}
    for text in options.values:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"-p is {text!r}; it must be NAME=VALUE, such as epochs=2.")
        values.setdefault(name, []).append(parse_value(value))
    if "results_dir" in values:
        raise InputError("results_dir is given by --results-dir (make: RESULTS_DIR), as it is.")
    if options.results_dir is not None:
        values["results_dir"] = [options.results_dir]
    if options.seeds and "seed" in values:
        raise InputError("seed is given twice, by --seeds (make: SEEDS) and by -p.")
    if options.seeds:
        values["seed"] = parse_seeds(options.seeds)
    if options.workers is not None and options.workers < 1:
        raise InputError(f"workers is {options.workers}; it must be 1 or more.")
    return values


def parse_value(text: str) -> object:
    """Return None, True, False, a number, or the text itself."""
    words = {"None": None, "True": True, "False": False, "true": True, "false": False}
    if text in words:
        return words[text]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of "0-4" or "0,2,7-9"; raise InputError for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MOST_SEED:
            allowed = f"like 0-4 or 0,2,7-9, from 0 to {MOST_SEED}"
            raise InputError(f"seeds is {text!r}; it must be {allowed}.")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


if __name__ == "__main__":
    sys.exit(main())
