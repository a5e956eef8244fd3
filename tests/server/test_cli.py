"""The command line as it shows itself."""

import click
import pytest

from expertgate.server.cli import cli

COLUMNS = 78
"""That click uses of a terminal that nobody has widened, which has 80."""


def groups(group, *way):
    """Every group of commands, by the words that lead there."""
    yield pytest.param(group, id=" ".join(way) or "expertgate")
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from groups(command, *way, name)


@pytest.mark.parametrize("group", list(groups(cli)))
def test_what_a_command_does_is_said_whole_where_commands_are_listed(group):
    """Click cuts a first sentence that is too long, and puts dots behind."""
    context = click.Context(group, terminal_width=COLUMNS)
    listed = group.get_help(context).partition("Commands:\n")[2].splitlines()
    assert len(listed) == len(group.commands)
    assert [line for line in listed if line.endswith("...")] == []
