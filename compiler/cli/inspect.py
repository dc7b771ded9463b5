"""``hone inspect``: what is inside a model or a package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hone.cli import options, output
from hone.cli.command import verb

if TYPE_CHECKING:
    from hone.package import Package


@verb("inspect", example="hone inspect net.onnx --shape 'x:[1,3,224,224]'\nhone inspect net.hone")
@click.argument("file", type=options.PATH, metavar="MODEL|PACKAGE")
@options.shape
@options.as_json
def inspect(file: Path, shapes: tuple[str, ...], as_json: bool) -> None:
    """Show the inputs, outputs, layers and sizes of a model, or what a package says of itself.

    A package needs no compiler for this.
    """
    if options.is_package(file):
        if shapes:
            raise click.UsageError("--shape is for models: the shapes of a package are fixed.")
        _inspect_package(file, as_json)
    else:
        _inspect_model(file, shapes, as_json)


def _inspect_package(file: Path, as_json: bool) -> None:
    from hone.package import Package

    package = Package.read(file)
    manifest = package.manifest
    if as_json:
        sizes = {"package_bytes": package.size_bytes}
        data = manifest.model_dump(mode="json", by_alias=True)
        output.write_json({"kind": "package", "path": str(file), **sizes, "manifest": data})
        return
    target = manifest.target
    output.pairs(
        [
            ("package", file),
            ("target", f"{target.name} ({target.triple})"),
            ("threads", target.threads),
            ("precision", manifest.precision),
            ("weights", output.size(manifest.weights_bytes)),
            ("package size", output.size(package.size_bytes)),
            ("accuracy", _accuracy(package)),
            ("golden samples", manifest.golden.samples),
            ("processor features", " ".join(target.features)),
            ("written by", f"hone {manifest.versions.hone}, tvm {manifest.versions.tvm}"),
            ("model sha256", manifest.provenance.source_sha256),
            *_tensors(package.signature),
        ]
    )
    click.echo()
    rows = [(kernel, " ".join(layers)) for kernel, layers in manifest.kernels.items()]
    output.table(("kernel", "layers"), rows)


def _accuracy(package: Package) -> str:
    accuracy = package.manifest.accuracy
    if accuracy is None:
        return "not measured"
    return f"{accuracy.metric} {accuracy.value:.4f} on {accuracy.samples} samples"


def _inspect_model(file: Path, shapes: tuple[str, ...], as_json: bool) -> None:
    from hone.importer import load

    model = load(file, options.read_shapes(shapes))
    origin = model.origin
    if as_json:
        output.write_json(
            {
                "kind": "model",
                "path": str(file),
                "sha256": origin.sha256,
                "opset": origin.opset,
                "weights_bytes": origin.weights_bytes,
                **model.signature.to_json(),
                "layers": [{"id": layer.id, "op_type": layer.op_type} for layer in model.layers],
            }
        )
        return
    output.pairs(
        [
            ("model", file),
            ("opset", origin.opset),
            ("weights", output.size(origin.weights_bytes)),
            ("sha256", origin.sha256),
            *_tensors(model.signature),
        ]
    )
    click.echo()
    output.table(("layer", "operator"), [(layer.id, layer.op_type) for layer in model.layers])


def _tensors(signature: Any) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("input", spec) for spec in signature.inputs]
    return rows + [("output", spec) for spec in signature.outputs]
