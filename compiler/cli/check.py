"""``hone check``: whether a model can be compiled."""

from __future__ import annotations

from pathlib import Path

import click

from hone.cli import options, output
from hone.cli.command import verb
from hone.errors import ModelError


@verb("check", example="hone check net.onnx\nhone check net.onnx --shape 'x:[1,3,224,224]' --json")
@click.argument("model", type=options.PATH, metavar="MODEL.onnx")
@options.shape
@options.as_json
def check(model: Path, shapes: tuple[str, ...], as_json: bool) -> None:
    """Say whether a model can be compiled; list every problem at once and exit 3 if not."""
    from hone.importer import check as examine

    found = examine(model, options.read_shapes(shapes))
    if as_json:
        output.write_json(
            {
                "ok": found.ok,
                "problems": [
                    {"node": p.node, "op": p.op, "message": p.message, "fix": p.fix}
                    for p in found.problems
                ],
                "opset": found.opset,
                "nodes": found.nodes,
                "nodes_supported": found.nodes_supported,
                "macs": found.macs,
                "macs_supported": found.macs_supported,
                "weights_bytes": found.weights_bytes,
                "operators": dict(found.operators),
                "inputs": [output.tensor(spec) for spec in found.inputs],
                "outputs": [output.tensor(spec) for spec in found.outputs],
            }
        )
    else:
        output.pairs(
            [
                ("nodes", f"{found.nodes_supported} of {found.nodes} supported"),
                ("multiply-accumulates", f"{100 * found.coverage:.1f}% supported"),
            ]
        )
    if not found.ok:
        raise ModelError(
            "this model cannot be compiled:",
            problems=[str(problem) for problem in found.problems],
            where=str(model),
        )
    if not as_json:
        click.echo("this model can be compiled")
