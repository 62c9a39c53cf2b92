"""Renders pages of the manual, which are Markdown, on a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown, TableElement
from rich.table import Table

MOST_COLUMNS = 120

_PAGE_LINK = re.compile(r"\[([^]]+)\]\((?:([\w-]+)\.md)?(?:#[\w-]+)?\)")
_COMMENT = re.compile(r"^<!--.*?-->\n+", re.MULTILINE | re.DOTALL)


class FoldingTable(TableElement):
    """Breaks words that are too long for their column, which rich would cut off."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table with columns that fold."""
        for table in super().__rich_console__(console, options):
            for column in table.columns if isinstance(table, Table) else ():
                column.overflow = "fold"
            yield table


class ManualPage(Markdown):
    """A page of the manual."""

    elements = {**Markdown.elements, "table_open": FoldingTable}  # noqa: RUF012


def render(pages: Sequence[str], index: str, stream: TextIO) -> None:
    """Print pages. index: the name of the page that lists the others."""
    console = Console(file=stream, highlight=False)
    console.width = min(console.width, MOST_COLUMNS)
    for text in pages:
        console.print(ManualPage(name_topics(text, index), hyperlinks=False))
        console.print()


def name_topics(text: str, index: str) -> str:
    """A page whose links name topics: a terminal has nothing to click on."""

    def spelt(link: re.Match[str]) -> str:
        words, name = link[1], link[2]
        return words if name is None else f"{words} (`qconv manual{'' if name == index else ' ' + name}`)"

    return _PAGE_LINK.sub(spelt, _COMMENT.sub("", text))
