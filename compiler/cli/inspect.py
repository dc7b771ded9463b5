"""``hone inspect``: what is inside a model or a package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hone.cli import options, output
from hone.cli.command import verb

if TYPE_CHECKING:
    from hone.package import Package
    from hone.profiling.layer_costs import LayerCost


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
            *_slices(package),
            ("precision", manifest.precision),
            ("weights", output.size(manifest.weights_bytes)),
            *_memory(package),
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


def _slices(package: Package) -> list[tuple[str, object]]:
    slices = package.manifest.slices
    if slices is None:
        return []
    return [
        (
            "batch",
            f"{slices.count} slices of {slices.samples}, {slices.parts} threads take one each",
        )
    ]


def _memory(package: Package) -> list[tuple[str, object]]:
    memory = package.manifest.memory
    if memory is None:
        return []
    activations, peak = output.size(memory.activations_bytes), output.size(memory.peak_bytes)
    return [
        ("activations", f"{activations}, as planned"),
        ("memory of a run", f"{peak}: weights, activations and inputs"),
    ]


def _accuracy(package: Package) -> str:
    accuracy = package.manifest.accuracy
    if accuracy is None:
        return "not measured"
    return f"{accuracy.metric} {accuracy.value:.4f} on {accuracy.samples} samples"


def _inspect_model(file: Path, shapes: tuple[str, ...], as_json: bool) -> None:
    from hone.activations import lowered_activation_bytes
    from hone.importer import load
    from hone.profiling.layer_costs import layer_costs
    from hone.targets.target import resolve

    model = load(file, options.read_shapes(shapes))
    origin = model.origin
    costs = layer_costs(model)
    macs = sum(cost.macs for cost in costs)
    parameters = sum(cost.parameters for cost in costs)
    activations = lowered_activation_bytes(
        model.module, resolve("host"), threads=options.default_threads()
    )
    if as_json:
        output.write_json(
            {
                "kind": "model",
                "path": str(file),
                "sha256": origin.sha256,
                "opset": origin.opset,
                "weights_bytes": origin.weights_bytes,
                "activation_bytes": activations,
                "macs": macs,
                "parameters": parameters,
                **model.signature.to_json(),
                "layers": [_layer(cost) for cost in costs],
            }
        )
        return
    output.pairs(
        [
            ("model", file),
            ("opset", origin.opset),
            ("weights", output.size(origin.weights_bytes)),
            ("parameters", output.count(parameters)),
            ("multiply-adds", output.count(macs)),
            ("activations", f"{output.size(activations)}, as planned for this machine"),
            ("sha256", origin.sha256),
            *_tensors(model.signature),
        ]
    )
    click.echo()
    rows = [
        (
            cost.id,
            cost.op_type,
            _shape(cost),
            output.count(cost.macs),
            output.count(cost.parameters),
            _share(cost.macs, macs),
        )
        for cost in costs
    ]
    output.table(
        ("layer", "operator", "result", "multiply-adds", "parameters", "share"),
        rows,
        right="   >>>",
    )
    click.echo()
    _show_operators(costs, macs)


def _show_operators(costs: tuple[LayerCost, ...], macs: int) -> None:
    """Print what each kind of operator costs, the largest first."""
    groups: dict[str, list[LayerCost]] = {}
    for cost in costs:
        groups.setdefault(cost.op_type, []).append(cost)
    rows = [
        (operator, len(group), sum(c.macs for c in group), sum(c.parameters for c in group))
        for operator, group in groups.items()
    ]
    rows.sort(key=lambda row: (row[2], row[3], row[1]), reverse=True)
    output.table(
        ("operator", "layers", "multiply-adds", "parameters", "share"),
        [
            (operator, str(layers), output.count(work), output.count(held), _share(work, macs))
            for operator, layers, work, held in rows
        ],
        right=" >>>>",
    )


def _layer(cost: LayerCost) -> dict[str, Any]:
    return {
        "id": cost.id,
        "op_type": cost.op_type,
        "dtype": cost.dtype,
        "shape": None if cost.shape is None else list(cost.shape),
        "macs": cost.macs,
        "parameters": cost.parameters,
    }


def _shape(cost: LayerCost) -> str:
    if cost.shape is None:
        return "-"
    return f"{cost.dtype}[{', '.join(map(str, cost.shape))}]"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if part else "-"


def _tensors(signature: Any) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("input", spec) for spec in signature.inputs]
    return rows + [("output", spec) for spec in signature.outputs]
