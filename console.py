"""What the scripts share as command lines: one line for a user's mistake, exit codes, folders to write to."""

import argparse
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from device import is_out_of_memory, keep_freed_memory, limit_threads
from errors import InputError


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's `main`: exit code 2 and one line for the user's mistakes, 130 for Ctrl-C."""
    limit_threads()
    keep_freed_memory()
    warnings.filterwarnings("ignore", module="PIL")  # it refuses these images anyway, or reads them
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # notebooks have streams of their own
            stream.reconfigure(errors="replace")  # a terminal that can't show a bar or a name still shows the rest
    try:
        code = main() or 0
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "error: out of memory; lower --batch-size, or --image-size if it was raised (training can also split a "
            "batch: --grad-accum 4)",
            file=sys.stderr,
        )
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:  # gloo's threads may outlive the group, and abort a slower end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def number(kind: type, low: float, high: float = math.inf, *, below: bool = False):
    """An argparse type: a finite int or float from `low` to `high`, or with `below` strictly less than `high`."""

    def parse(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)) or (below and value == high):
            end = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
            raise argparse.ArgumentTypeError(f"must be at least {low:g}{end}, not {text}")
        return value

    parse.__name__ = "integer" if kind is int else "number"  # argparse's message for other text
    return parse


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults in --help, except None, False and suppressed ones."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_none = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return action.help if has_none or "default" in action.help else f"{action.help} (default: %(default)s)"


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, but a wrong flag gets one line instead of the whole usage, and flags can't be abbreviated."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, "formatter_class": _HelpFormatter, **options})

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def make_output_dir(path: str | Path, flag: str = "--output-dir") -> Path:
    """The folder that `flag` names, made where it is missing; InputError where nothing can be written to it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise InputError(f"can't write to {flag} {path}: {error.strerror}") from None


def check_writable(path: str | Path, flag: str = "--output") -> None:
    """InputError where the file that `flag` names could not be written, before the work is done for it."""
    try:
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
    except OSError as error:
        raise InputError(f"can't write {flag} {path}: {error.strerror}") from None
