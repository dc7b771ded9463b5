"""``hone verify``: a package proves itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from hone.cli import options, output
from hone.cli.command import verb


@verb("verify", example="hone verify net.hone")
@click.argument("package", type=options.PATH, metavar="PACKAGE")
@options.as_json
def verify(package: Path, as_json: bool) -> None:
    """Check every byte, the processor's features and the golden outputs of a package.

    Exits 8 when the package is corrupt or cannot run here, 4 when its outputs differ.
    """
    from hone import verify as verifier

    result = verifier.verify(package)
    if as_json:
        output.write_json({"path": str(package), "ok": True, **asdict(result)})
        return
    output.table(
        ("output", "error", "accepted"),
        [(check.name, f"{check.error:.3g}", f"{check.tolerance:.3g}") for check in result.outputs],
        right=" >>",
    )
    click.echo(f"{package}: verified on {result.samples} golden samples")
