"""`qconv manual`: prints the pages that lie in `qconv/manual`.

The pages travel with the package, so that an installed user has the text of the same version, offline. A terminal gets
them rendered, anything else gets the Markdown itself.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from typing import TextIO

import click

from qconv.cli.options import HELP_WIDTH
from qconv.errors import QconvError

INDEX = "README"
"""The file that orders the pages. On the web it is the folder's front page."""
NEAR = 3
"""How many topics a hint names."""

_INDEX_LINK = re.compile(r"^- \[[^]]*\]\(([\w-]+)\.md\)", re.MULTILINE)
_COMMAND_ROW = re.compile(r"^\| `([\w-]+)` \| .*?\]\(([\w-]+)\.md", re.MULTILINE)


def topics() -> tuple[str, ...]:
    """Names of all pages, in the order of the index."""
    there = {file.name.removesuffix(".md") for file in _folder().iterdir() if file.name.endswith(".md")} - {INDEX}
    listed = dict.fromkeys(name for name in _INDEX_LINK.findall(page(INDEX)) if name in there)
    return (*listed, *sorted(there - listed.keys()))


def commands() -> dict[str, str]:
    """The page of each command that has one, by the index."""
    return dict(_COMMAND_ROW.findall(page(INDEX)))


def page(topic: str) -> str:
    """The Markdown of a page."""
    return _folder().joinpath(f"{topic}.md").read_text("utf-8")


def summary_line(text: str) -> str:
    """The first sentence of a page's first paragraph."""
    paragraph = text.split("\n\n")[1]
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]


def find(topic: str) -> str:
    """The page that a user means.

    Args:
        topic: a page's name, or a command's.

    Raises:
        QconvError: there is no such page. The hint names those whose names are near.
    """
    pages, of_command = topics(), commands()
    wanted = topic.lower().removesuffix(".md")
    if wanted in pages:
        return wanted
    if wanted in of_command:
        return of_command[wanted]
    near = difflib.get_close_matches(wanted, [*pages, *of_command], NEAR)
    hint = "`qconv manual` lists all topics"
    if near:
        names = dict.fromkeys(near)  # a page and a command may share their name
        hint = f"try {' or '.join(f'`qconv manual {name}`' for name in names)}; {hint}"
    raise QconvError(f"{topic or 'An empty name'} is no topic of the manual.", f"{hint}.")


def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """What the shell offers for TOPIC."""
    return [name for name in topics() if name.startswith(incomplete)]


@click.command(context_settings=HELP_WIDTH, short_help="Print a page of the manual, or list them.")
@click.argument("topic", required=False, shell_complete=complete)
@click.option("--all", "everything", is_flag=True, help="Print all pages, for a pager.")
def manual(topic: str | None, everything: bool) -> int:
    """Print the page of the manual on TOPIC, which may be a command; without TOPIC list all pages."""
    if topic is not None and everything:
        raise click.UsageError("pass a topic or --all.")
    if everything:
        _print([page(name) for name in topics()], sys.stdout)
    elif topic is not None:
        _print([page(find(topic))], sys.stdout)
    else:
        width = max(map(len, topics()))
        for name in topics():
            print(f"{name:<{width}}  {summary_line(page(name)).replace('`', '')}")
        print("\n`qconv manual TOPIC` prints a page, `qconv manual --all` prints all of them.")
    return 0


def _print(pages: Sequence[str], stream: TextIO | None) -> None:
    if stream is not None and stream.isatty():
        from qconv.report.manual_page import render  # rich is slow to import: --help must not wait for it

        render(pages, INDEX, stream)
    else:
        print("\n".join(pages), end="", file=stream)


def _folder() -> Traversable:
    return resources.files("qconv").joinpath("manual")
