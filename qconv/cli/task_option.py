"""Defines the option `--task`: a task for all outputs, or OUTPUT=TASK for single ones; it can be repeated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from qconv.config.tasks import TASKS, Tasks
from qconv.errors import QconvError

if TYPE_CHECKING:
    TextType = click.ParamType[str]
else:
    TextType = click.ParamType


class TaskType(TextType):
    """A task, or OUTPUT=TASK, with commas between several; those of a repeated option are joined."""

    name = "task"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """What --help shows for the value."""
        return f"[OUTPUT=][{'|'.join(TASKS)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The tasks with commas between them, or a usage error."""
        text = value if isinstance(value, str) else ",".join(value)
        try:
            return Tasks(text).task
        except QconvError as error:
            self.fail(f"{error.message} {error.hint[:1].upper()}{error.hint[1:]}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The tasks that begin so."""
        return [CompletionItem(task) for task in TASKS if task.startswith(incomplete)]


class JoinedOption(click.Option):
    """An option that can be repeated, and whose type makes one value of all that was typed."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Have the parser collect values, as for `multiple`, which would leave a value for each to the command."""
        self.multiple = True
        super().add_to_parser(parser, ctx)
        self.multiple = False
