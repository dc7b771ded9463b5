"""One model into one package: lowered, scheduled, linked, described; and the samples that prove it.

Every candidate of a build goes through `assemble`, and what is left out here (tuning, comparing
with onnxruntime) is `hone.driver`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hone.passes.quantize.match_qdq import is_qdq, match_qdq
from hone.passes.quantize.pack_weights import WeightPacking, pack_weights
from hone.passes.quantize.quantize_int8 import Quantization
from hone.targets import features
from hone.targets.target import Target, resolve

from . import parity, pipeline, runtime
from .activations import activation_bytes
from .database import Database
from .importing.boundary import unpackable
from .importing.graph import raise_problems
from .kernel_table import converting_kernels, kernel_table
from .model import Model
from .package import Package
from .packaging.golden import Golden
from .packaging.manifest import CostEntry, ProvenanceEntry, SlicesEntry, TargetEntry
from .profiling.kernel_costs import kernel_costs
from .slicing import Slicing, slice_batch
from .weights import weights_bytes

if TYPE_CHECKING:
    import tvm

# Largest relative error of a replayed golden output. fp32: sums of another machine are taken in
# another order, by a few units in the last place of the longest. int8: integer kernels are exact,
# but a float that lies on the border of two levels at a float-to-integer step may round to the
# other one on another machine; one level of 255 at the output, with room for two such steps.
# bf16, fp16: another machine's sums differ in their last places, so that a value may round to its
# other neighbour, and its kernels may round the points of Winograd's transform instead: as much as
# the precision itself is off. In bf16 that is 0.8% for ResNet-18 and 3% for MobileNetV2, both with
# random weights; fp16 is 8 times as fine.
GOLDEN_TOLERANCE = {"fp32": 1e-4, "fp16": 0.006, "bf16": 0.05, "int8": 0.02}
GOLDEN_SEED = 20261121
GOLDEN_SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A package and how it came about.

    Parameters
    ----------
    package : Package
        Ready to save or to run.
    lowered : IRModule
        The kernels before they were scheduled.
    scheduled : Scheduled
        The rule of each kernel, and which ones the tuning database covers.
    slicing : Slicing
        Whether a run is the module once, or a slice of its batch several times.
    quantization : Quantization or None
        What of a model that was quantized before its import became integer kernels.
    packing : WeightPacking or None
        Which of its other weights stay in their few bits.
    """

    package: Package
    lowered: tvm.IRModule
    scheduled: pipeline.Scheduled
    slicing: Slicing
    quantization: Quantization | None = None
    packing: WeightPacking | None = None


def runs_here(target: Target) -> bool:
    """Say whether this machine can run code for a target."""
    return features.machine() == target.arch and not features.missing(target.features, target.arch)


def assemble(
    model: Model,
    *,
    target: Target,
    threads: int,
    precision: str = "fp32",
    database: Database | None = None,
    compact: bool = False,
    slicing: Slicing | None = None,
) -> Assembled:
    """Compile a model's module as it is and put it into a package without golden samples.

    Parameters
    ----------
    model : Model
        Its module may have been compressed.
    target : Target
        What to compile for.
    threads : int
        Threads of one run.
    precision : {"fp32", "bf16", "fp16", "int8"}
        Lowest precision of the module's kernels; decides the tolerance of golden outputs. A model
        that was quantized before its import is int8, where any of its layers is.
    database : Database, optional
        Tuning records to use.
    compact : bool
        Prefer small weights to speed, where a kernel has the choice.
    slicing : Slicing, optional
        How the batch is cut; by the model of the machine, or as the database knows, when absent.

    Returns
    -------
    Assembled

    Raises
    ------
    ModelError
        An input or output has a type that numpy lacks (exit 3).
    ToolchainError
        No linker for the target (exit 6).
    """
    raise_problems(unpackable(model.signature), model.origin.path)
    integers, quantization, packing = in_integers(model)
    if quantization is not None and quantization.quantized:
        precision = "int8"
    if slicing is None:
        decided = None if database is None else database.lowerings()
        slicing = slice_batch(integers.module, target, threads=threads, decided=decided)
    if database is not None:
        database = database.of_threads(slicing.threads)
    integers = integers.with_module(slicing.module)
    lowered = pipeline.lower(
        integers.module,
        target,
        threads=slicing.threads,
        compact=compact,
        decided=None if database is None else database.lowerings(),
    )
    scheduled = pipeline.schedule(lowered, target, threads=slicing.threads, database=database)
    library = pipeline.link(
        scheduled.module,
        target,
        threads=slicing.threads,
        slices=slicing.count,
        parts=slicing.parts,
    )
    floats = [t.name for t in model.signature.outputs if t.dtype.startswith("float")]
    package = Package.create(
        library=library,
        signature=model.signature,
        target=TargetEntry(
            name=target.name,
            arch=target.arch,
            triple=target.triple,
            features=target.features,
            threads=threads,
            glibc=target.glibc,
        ),
        precision=precision,
        weights_bytes=weights_bytes(lowered),
        kernels=kernel_table(
            model, integers.module, lowered, {} if quantization is None else quantization.merged
        ),
        provenance=ProvenanceEntry(source_sha256=model.origin.sha256, opset=model.origin.opset),
        golden=(),
        tolerance=dict.fromkeys(floats, GOLDEN_TOLERANCE[precision]),
        recipe={},
        # Sorting, and top-k that is no kernel, are calls by name into the runtime's second library.
        needs_runtime_extra=b"tvm.contrib.sort" in library,
        activations_bytes=_activation_bytes(model, scheduled, slicing, target),
        slices=_slices_entry(slicing),
        costs=_costs(model, integers, lowered, scheduled),
    )
    return Assembled(
        package=package,
        lowered=lowered,
        scheduled=scheduled,
        slicing=slicing,
        quantization=quantization,
        packing=packing,
    )


def _slices_entry(slicing: Slicing) -> SlicesEntry | None:
    """Return what the manifest says of a batch in slices."""
    if slicing.count == 1:
        return None
    (images, *_), *_ = (tuple(param.ty.shape) for param in slicing.module["main"].params)
    return SlicesEntry(count=slicing.count, samples=int(images), parts=slicing.parts)


def _activation_bytes(
    model: Model, scheduled: pipeline.Scheduled, slicing: Slicing, target: Target
) -> int:
    """Return the bytes of a run's activations: those of each part, and the caller's outputs."""
    planned = activation_bytes(scheduled.module, target, threads=slicing.threads)
    outputs = sum(tensor.size_bytes for tensor in model.signature.outputs)
    return slicing.parts * planned + outputs - slicing.parts * outputs // slicing.count


def _costs(
    model: Model, computed: Model, lowered: tvm.IRModule, scheduled: pipeline.Scheduled
) -> dict[str, CostEntry]:
    """Return what each kernel does, for the manifest."""
    rules = {decision.kernel: decision.rule for decision in scheduled.decisions}
    converts = converting_kernels(model, computed.module, lowered)
    return {
        kernel: CostEntry(
            operations=cost.operations,
            touched_bytes=cost.touched_bytes,
            dtype=cost.dtype,
            rule=rules.get(kernel),
            converts=converts.get(kernel, ()),
        )
        for kernel, cost in kernel_costs(lowered, computed).items()
    }


def in_integers(model: Model) -> tuple[Model, Quantization | None, WeightPacking | None]:
    """Return a model that was quantized before its import with hone's operators for its levels.

    And what became of its layers; any other model comes back as it is, with None.
    """
    if not is_qdq(model.module):
        return model, None, None
    quantization = match_qdq(model.module)
    packing = pack_weights(quantization.module)
    return model.with_module(packing.module), quantization, packing


def reference_runner(
    model: Model, package: Package, *, target: Target, threads: int
) -> runtime.Runner:
    """Return something that computes what a package computes, on this machine.

    For a package of another machine that is its twin: the same module compiled for the host.
    """
    if runs_here(target):
        return runtime.load(package)
    host = replace(resolve("host"), separate_adders=target.separate_adders)
    return runtime.load(assemble(model, target=host, threads=threads).package)


def golden_samples(model: Model, runner: runtime.Runner) -> tuple[Golden, ...]:
    """Return seeded inputs and what a runner answers."""
    samples = []
    for number in range(GOLDEN_SAMPLES):
        inputs = parity.random_inputs(model, GOLDEN_SEED + number)
        samples.append(Golden(inputs=inputs, outputs=runner.run(inputs)))
    return tuple(samples)
