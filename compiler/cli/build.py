"""``hone build``: a recipe from start to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hone.cli import options, output
from hone.cli.command import verb


@verb(
    "build", example="hone build hone.toml\nhone build hone.toml --target host --threads 4 --json"
)
@click.argument("recipe", type=options.PATH, default="hone.toml")
@click.option("-o", "--output", "directory", type=options.PATH, metavar="DIR", help="Results here.")
@click.option("--target", metavar="NAME", help="As `hone target list` prints it.")
@click.option("--threads", type=options.THREADS, metavar="N", help="Threads of one run.")
@click.option(
    "--goal",
    type=click.Choice(["latency", "size", "memory"]),
    help="What a step must improve.",
)
@click.option(
    "--max-accuracy-drop", type=options.percentage, metavar="SHARE", help="Such as 0.5% or 0.005."
)
@click.option("--tune", type=options.duration, metavar="TIME", help="Budget of tune steps.")
@options.database
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Of everything random.")
@options.as_json
def build(recipe: Path, as_json: bool, **flags: Any) -> None:
    """Run the steps of RECIPE (default: hone.toml), measure each, keep what is better.

    The smallest recipe says [model] path = "net.onnx"; docs/schema/recipe.schema.json has every
    key. Writes the package, report.json and report.html into the output folder. An option wins over
    its HONE_ variable, which wins over the recipe.
    """
    from hone import improve
    from hone.progress import console
    from hone.recipe import load

    loaded = load(recipe, _overrides(flags))
    report = improve.build(loaded, progress=console())
    if as_json:
        click.echo(report.to_json(), nl=False)
        return
    from hone.cli.report import show_table

    show_table(report)
    output.note(f"wrote {loaded.package_path}, with report.json and report.html beside it")


def _overrides(flags: dict[str, Any]) -> dict[str, Any]:
    keys = {
        "directory": "output.directory",
        "target": "target.name",
        "threads": "target.threads",
        "goal": "goal.goal",
        "max_accuracy_drop": "goal.max_accuracy_drop",
        "tune": "tune.seconds",
        "database": "tune.database",
        "seed": "seed",
    }
    # Paths of the command line start from the current folder, those of a recipe from its own.
    return {
        keys[flag]: str(value.absolute()) if isinstance(value, Path) else value
        for flag, value in flags.items()
        if value is not None
    }
