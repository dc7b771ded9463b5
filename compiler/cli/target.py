"""``hone target``: what hone can compile for."""

from __future__ import annotations

import click

from hone.cli import options, output
from hone.cli.command import verb


@click.group()
def target() -> None:
    """List targets and show their facts."""


@verb("list", example="hone target list")
@options.as_json
def list_targets(as_json: bool) -> None:
    """List every target by name."""
    from hone.targets.target import describe, names, resolve

    facts = [describe(resolve(name)) for name in names()]
    if as_json:
        output.write_json({"targets": facts})
        return
    output.table(
        ("name", "kind", "architecture", "cores", "vectors", "tensor instructions", "compiles"),
        [
            (
                fact["name"],
                fact["kind"],
                fact["arch"],
                str(fact["cores"]),
                f"{fact['vector_bits']} bits",
                ", ".join(fact["tensor_instructions"]) or "none",
                "yes" if fact["compiles"] else "not yet",
            )
            for fact in facts
        ],
        right="   >>",
    )


@verb("show", example="hone target show rpi4\nhone target show host --json")
@click.argument("name", default="host")
@options.as_json
def show(name: str, as_json: bool) -> None:
    """Show what is known about the target NAME (this machine when not given), with sources."""
    from hone.targets.target import describe, resolve

    facts = describe(resolve(name))
    if as_json:
        output.write_json(facts)
        return
    output.pairs(
        (key, " ".join(value) if isinstance(value, list) else value)
        for key, value in facts.items()
        if key != "sources" and value not in (None, [])
    )
    for source in facts["sources"]:
        click.echo(f"source: {source}")


target.add_command(list_targets)
target.add_command(show)
