"""What the scripts share as command lines: one line for a user's mistake, exit codes, folders to write to."""

import argparse
import contextlib
import math
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from device import is_out_of_memory, limit_threads, torchrun_ranks
from errors import InputError


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's `main`: exit code 2 and one line for the user's mistakes, 130 for Ctrl-C.

    A closed terminal and what `docker stop` sends are Ctrl-C too, except that torchrun ends its processes by itself.
    """
    limit_threads()
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP

    def interrupt(*_) -> None:
        for number in numbers:  # a terminal that is closed sends more than one
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers if torchrun_ranks() is None else ():
        signal.signal(number, interrupt)
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
    if torchrun_ranks():  # gloo's threads may outlive the group, and abort a slower end
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
        raise InputError(message)


def to_flags(config: dict) -> list[str]:
    """The command line that gives the settings in `config`."""
    flags = []
    for name, value in config.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is not None and value is not False:
            flags += [f"{flag}={part}" for part in (value if isinstance(value, list) else [value])]
    return flags


def make_output_dir(path: str | Path, flag: str = "--output-dir") -> Path:
    """The folder that `flag` names, made where it is missing; InputError where nothing can be written to it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise InputError(f"can't write to {flag} {path}: {error.strerror}") from None


@contextlib.contextmanager
def own_output_dir(path: str | Path) -> Iterator[Path]:
    """The folder of --output-dir, made if it is missing, and this process's own: others get an InputError.

    The system ends the lock with the process, however that ends. On a file system without locks nobody is kept out.
    """
    path, is_posix = make_output_dir(path), os.name == "posix"
    taken = BlockingIOError if is_posix else PermissionError
    with contextlib.ExitStack() as stack:
        try:
            if is_posix:
                import fcntl

                handle = os.open(path, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                import msvcrt

                handle = stack.enter_context(open(path / ".lock", "a")).fileno()
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except taken:
            raise InputError(f"another run writes to --output-dir {path}; choose another, or wait for it") from None
        except OSError:
            pass
        yield path


def check_writable(path: str | Path, flag: str = "--output") -> None:
    """InputError if the file that `flag` names can't be written, before the work is done for it."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".12345.rows.tmp", dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"can't write {flag} {path}: {error.strerror}") from None
