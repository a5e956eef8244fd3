"""A table on the terminal."""

from collections.abc import Sequence

import click


def echo_columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of as many cells each, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
