"""The command line: ``python -m mnist_utils run`` and ``python -m mnist_utils sweep``."""

import argparse
import sys

from mnist_utils.headless import SMALLEST_FIRST, run_all
from mnist_utils.parameters import SETTINGS, InputError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 when a notebook failed, 2 for bad input."""
    options = make_parser().parse_args(arguments)
    try:
        given = parse_parameters(options.parameters)
        if options.results_dir is not None:
            given["results_dir"] = [options.results_dir]
        if options.command == "sweep":
            return sweep(options, given)
        for name, values in given.items():
            if len(values) > 1:
                raise InputError(f"{name} has {len(values)} values; run takes one, sweep several.")
        return run_all(options.models, {name: value for name, (value,) in given.items()})
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. What is recorded is kept; the same command goes on from there.")
        return 130


def sweep(options, given: dict[str, list]) -> int:
    # Dask is needed for sweeps alone.
    from mnist_utils.sweep import make_tasks, parse_seeds, print_means, run_sweep

    tasks = make_tasks(options.models, parse_seeds(options.seeds), given)
    failed = {task.folder for task in run_sweep(tasks, options.scheduler)}
    print_means([task for task in tasks if task.folder not in failed])
    return 1 if failed else 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mnist_utils")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the notebooks by papermill, then the comparison")
    many = commands.add_parser("sweep", help="run models x seeds x parameter values on Dask")
    for command in (run, many):
        command.add_argument(
            "--models",
            nargs="+",
            default=SMALLEST_FIRST,
            metavar="MODEL",
            help=f"some of {', '.join(SETTINGS)} (default: all, smallest first)",
        )
        command.add_argument(
            "-p",
            dest="parameters",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="a parameter of the notebooks, such as epochs=2; may be given several times",
        )
        command.add_argument("--results-dir", help="where the runs are kept (default: runs/)")
    many.add_argument("--seeds", default="0", help="such as 0-4 or 0,2,7-9 (default: 0)")
    many.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a running Dask scheduler, such as tcp://host:8786 (default: this machine's cores)",
    )
    return parser


def parse_parameters(texts: list[str]) -> dict[str, list]:
    """Return the values of each parameter, in the order given: "batch_size=64" adds one."""
    given = {}
    for text in texts:
        name, value = parse_parameter(text)
        given.setdefault(name, []).append(value)
    return given


def parse_parameter(text: str) -> tuple[str, object]:
    """Return the name and value of "name=value": None, true, false, a number or a text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"-p is {text!r}; it must be NAME=VALUE, such as epochs=2.")
    words = {"None": None, "True": True, "False": False, "true": True, "false": False}
    if value in words:
        return name, words[value]
    for number in (int, float):
        try:
            return name, number(value)
        except ValueError:
            pass
    return name, value


if __name__ == "__main__":
    sys.exit(main())
