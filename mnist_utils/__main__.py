"""The command line: ``python -m mnist_utils run``."""

import argparse
import sys

from mnist_utils.headless import SMALLEST_FIRST, run_all
from mnist_utils.parameters import SETTINGS, InputError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 when a notebook failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m mnist_utils")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the notebooks by papermill, then the comparison")
    run.add_argument(
        "--models",
        nargs="+",
        default=list(SMALLEST_FIRST),
        metavar="MODEL",
        help=f"some of {', '.join(SETTINGS)} (default: all, smallest first)",
    )
    run.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the notebooks, such as epochs=2; may be given several times",
    )
    run.add_argument("--results-dir", help="where the runs are kept (default: runs/)")
    options = parser.parse_args(arguments)
    try:
        given = dict(parse_parameter(text) for text in options.parameters)
        if options.results_dir is not None:
            given["results_dir"] = options.results_dir
        return run_all(options.models, given)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. What is recorded is kept; the same command goes on from there.")
        return 130


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
