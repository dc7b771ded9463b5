"""The command line: finds the verb, and turns every error into one text and one exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn, TextIO

import click

import hone
from hone.cli.command import write_example
from hone.errors import HoneError, InterruptError, ToolchainError

VERBS = {
    "build": "Run a recipe: compress, measure, keep what is better, package.",
    "check": "Say whether a model can be compiled, with all problems at once.",
    "compile": "Compile an ONNX model into a package.",
    "tune": "Search for better schedules and keep them in a database.",
    "inspect": "Show what a model or a package holds.",
    "verify": "Prove a package: hashes, processor features, golden outputs.",
    "run": "Run a package on inputs.",
    "bench": "Measure models and packages, interleaved with other runtimes.",
    "profile": "Show where the time of a model goes, kernel by kernel.",
    "report": "Show a build report, convert it, or compare two.",
    "target": "List targets and show their facts.",
    "db": "Show what a tuning database holds.",
    "passes": "List the passes in the order in which they run.",
    "doctor": "Check what this machine can do, and say what is missing.",
}
"""Every verb, ``hone.cli.<name>`` with a command of that name, and its line in the help."""

EXAMPLE = """\
hone build hone.toml
hone compile net.onnx --target host --threads 2 -o net.hone
hone bench net.hone --vs onnxruntime"""


CLOSED_PIPE = 128 + 13
"""What a shell reports for a program that SIGPIPE ended, such as ``cat`` in ``cat x | head``."""


RETRY_S = 0.05
"""After which a Ctrl-C is heard that came while a library was loaded."""


class Hone(click.Group):
    """The group of verbs; imports only the one that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of their use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a verb."""
        if cmd_name not in VERBS:
            return None
        command = getattr(import_module(f"hone.cli.{cmd_name}"), cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"hone.cli.{cmd_name}.{cmd_name} is no command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples and what holds for every verb."""
        write_example(formatter, EXAMPLE)
        formatter.write_paragraph()
        formatter.write_text(
            "Each option can stand in the environment: --threads as HONE_THREADS. "
            "The result goes to stdout, progress to stderr."
        )


@click.command(cls=Hone, context_settings={"max_content_width": 100})
@click.version_option(hone.__version__, prog_name="hone", message="%(prog)s %(version)s")
def hone_command() -> None:
    """Make a trained ONNX model smaller and faster, and keep only what was measured better."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; ``sys.argv`` when not given.

    Returns
    -------
    int
        The exit code.
    """
    debug = os.environ.get("HONE_DEBUG", "") not in {"", "0"}
    with warnings.catch_warnings(), _interrupts() as interrupted:
        warnings.showwarning = _warn
        return _run(arguments, interrupted, debug=debug)


def _run(arguments: Sequence[str] | None, interrupted: threading.Event, *, debug: bool) -> int:
    try:
        code = hone_command.main(
            args=None if arguments is None else list(arguments),
            prog_name="hone",
            standalone_mode=False,
        )
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):
        # The reader of stdout has left (click itself makes a SystemExit of it). The interpreter
        # must not fail at its last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except (KeyboardInterrupt, click.Abort):
        return _say(debug, "interrupted", InterruptError.exit_code)
    except click.ClickException as error:
        if debug:
            traceback.print_exc()
        error.show()
        return error.exit_code
    except HoneError as error:
        if interrupted.is_set() and not isinstance(error, InterruptError):
            return _say(debug, "interrupted", InterruptError.exit_code)
        return _say(debug, str(error), error.exit_code)
    except Exception as error:  # noqa: BLE001  (the last resort: one line instead of a traceback)
        if interrupted.is_set():
            return _say(debug, "interrupted", InterruptError.exit_code)
        if isinstance(error, MemoryError) or "std::bad_alloc" in str(error):
            return _say(
                debug,
                f"there is not enough memory: {_first_line(error)}",
                ToolchainError.exit_code,
            )
        if isinstance(error, OSError) and error.errno is not None:
            # Full disks, missing rights and names of the wrong kind: where a file was at work that
            # no verb expects to fail.
            return _say(
                debug,
                f"{error.filename or 'input or output'}: {error.strerror}",
                ToolchainError.exit_code,
            )
        return _say(
            debug,
            f"internal: {type(error).__name__}: {_first_line(error)}\n"
            "  hint: this is a bug in hone; set HONE_DEBUG=1 for the traceback and report it",
            1,
        )
    return code if isinstance(code, int) else 0


def main() -> NoReturn:
    """Run the command line and exit: the console script ``hone``."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this, such as a daemon
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open to the end)
    code = run()
    # What there is to say has been said; a second Ctrl-C must not change how it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _is_loading(name: str) -> bool:
    """Say whether a module's import has begun and not ended."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Remember Ctrl-C: where it meets a callback of TVM's it comes back as another error."""
    interrupted = threading.Event()
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield interrupted  # somebody else owns the signal
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        if _is_loading("tvm"):
            # An exception between its C++ initializers crashes the process: try again after them.
            thread = threading.get_ident()
            threading.Timer(RETRY_S, signal.pthread_kill, [thread, number]).start()
        else:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning without the place in hone's source that Python adds."""
    click.echo(f"warning: {message}", err=True)


def _say(debug: bool, text: str, code: int) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"error: {text}", err=True)
    return code


def _first_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
