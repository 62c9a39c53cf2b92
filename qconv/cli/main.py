"""This module is the entry point of the command line: it runs the named command and exits with its status.

stdout carries the result, stderr the conversation. Exit status: 0 done, 1 an error, 2 usage, 3 a gate fell short.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import warnings
from importlib import import_module
from typing import NoReturn

import click

import qconv
from qconv.cli.options import HELP_WIDTH
from qconv.errors import QconvError, printable
from qconv.signals import exit_at_once_on_signals

COMMANDS = (
    "quantize",
    "inspect",
    "evaluate",
    "compare",
    "diagnose",
    "audit",
    "benchmark",
    "study-samples",
    "merge-stats",
    "finetune",
    "synthesize",
    "manual",
)
"""Each is defined under its name, with `_` for `-`, in the module of this name beside this one."""


class CommandGroup(click.Group):
    """The commands. Only that which is named is imported: all together take as long as the libraries of one."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, None where there is none."""
        return self._load(cmd_name) if cmd_name in COMMANDS else None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, for help."""
        return sorted(COMMANDS)

    def load_all(self) -> dict[str, click.Command]:
        """All commands, by their names."""
        return {name: self._load(name) for name in COMMANDS}

    def _load(self, name: str) -> click.Command:
        word = name.replace("-", "_")
        command = getattr(import_module(f"qconv.cli.{word}"), word)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=CommandGroup, context_settings=HELP_WIDTH)
@click.version_option(qconv.__version__, prog_name="qconv")
def cli() -> None:
    """Turn a float ONNX convolutional network into a quantized one, checked and explained."""


def run() -> NoReturn:
    """Entry point of the console script: `main`, and no more.

    Taking a runtime and a dozen libraries apart again would be a tenth of the whole command. Everything is flushed, and
    temporary files are gone by now. Only whoever watches the run has something left to write: then it ends as usual.
    Garbage is looked for once all is imported (`command.run_command`).
    """
    gc.disable()
    status: object = 0
    try:
        main()
    except SystemExit as leaving:
        status = leaving.code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, or not there at all
            stream.flush()
    number = status if isinstance(status, int) else 0 if status is None else 1
    if _watched():
        sys.exit(number)
    os._exit(number)


def _watched() -> bool:
    """Whether a debugger, a profiler or a measurement of coverage is on, which writes what it saw at the very end."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    tools = monitoring is not None and any(monitoring.get_tool(number) is not None for number in range(6))
    return tools or sys.gettrace() is not None or sys.getprofile() is not None


def main() -> None:
    """Run the command that sys.argv names and exit with its status."""
    exit_at_once_on_signals()
    if sys.stderr is None:  # print would take standard output instead, which may be carrying the model
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    # a picture that is too large is told of by name; the libraries' own words on it lead nowhere
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be anything
    try:
        status = cli.main(standalone_mode=False)
        if len(sys.argv) < 2:  # click before 8.2 takes that for a wish to read the help
            status = 2
        if sys.stdout is not None:
            sys.stdout.flush()
    except QconvError as error:
        _exit_with_error(error.message, error.hint)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is not None:
            _exit_with_error(
                f"{error.filename} cannot be used: {error.strerror}.", "check the path, its rights and the disk."
            )
        # whoever read our output has gone, or its disk is full; nothing more may be written to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        _exit_with_error(f"standard output cannot be written: {error.strerror}.", "send it somewhere else.")
    except MemoryError:
        _exit_with_error("out of memory.", "use fewer --samples, --batch 1, or a machine with more.")
    sys.exit(status if isinstance(status, int) else 0)


def _exit_with_error(message: str, hint: str) -> NoReturn:
    print(f"Error: {printable(message)}", file=sys.stderr)
    print(f"Hint:  {printable(hint)}", file=sys.stderr)
    sys.exit(1)
