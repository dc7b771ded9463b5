"""How every verb is declared: with an example, and with its options in the environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

ENVIRONMENT_PREFIX = "HONE"
"""``--threads`` is ``HONE_THREADS`` for every verb that has it."""


class Verb(click.Command):
    """A command with an example in its help.

    Parameters
    ----------
    example : str
        One command per line.
    """

    def __init__(self, *args: Any, example: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.example = example
        for option in self.params:
            if isinstance(option, click.Option) and option.envvar is None:
                option.envvar = environment_name(option)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example below the options."""
        write_example(formatter, self.example)


def environment_name(option: click.Option) -> str:
    """Return the variable of an option: ``HONE_FAIL_SLOWER`` of ``--fail-slower``."""
    name = max(option.opts, key=len).lstrip("-")
    return f"{ENVIRONMENT_PREFIX}_{name.replace('-', '_').upper()}"


def write_example(formatter: click.HelpFormatter, example: str) -> None:
    """Write commands as they are: a wrapped command line cannot be copied."""
    with formatter.section("Example" if "\n" not in example else "Examples"):
        for line in example.splitlines():
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def verb(name: str, *, example: str) -> Callable[[Callable[..., object]], click.Command]:
    """Declare a verb.

    Parameters
    ----------
    name : str
        What the user types.
    example : str
        One command per line, shown by ``--help``.
    """
    return click.command(name, cls=Verb, example=example)
