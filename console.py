"""What the scripts share as command lines: one line for a user's mistake, exit codes, folders to write to."""

import argparse
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from device import is_out_of_memory, keep_freed_memory, limit_threads
from errors import InputError


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's `main`: exit code 2 and one line for the user's mistakes, 130 for Ctrl-C."""
    limit_threads()
    keep_freed_memory()
    warnings.filterwarnings("ignore", module="PIL")  # of pictures that it then refuses, or reads all the same
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # notebooks have streams of their own
            stream.reconfigure(errors="replace")  # a terminal that can't show a bar or a name still shows the rest
    try:
        code = main()
        if "TORCHELASTIC_RUN_ID" in os.environ:  # gloo's threads may outlive the group, and abort a slower end
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
        sys.exit(code)
    except InputError as error:
        _let_the_first_speak()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "error: out of memory; lower --batch-size, or --image-size where that was raised (training can also "
            "split a batch: --grad-accum 4)",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _let_the_first_speak() -> None:
    """Of torchrun's processes the first one says what is wrong with all, and torchrun then ends the others."""
    if int(os.environ.get("RANK", 0)) > 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(30)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but a wrong flag gets one line instead of the whole usage, and a part of a flag is a wrong one."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str):
        _let_the_first_speak()
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
