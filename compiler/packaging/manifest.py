"""What ``manifest.json`` of a package says, as a schema that reader and writer share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from hone.errors import PackageError
from hone.signature import Signature, TensorSpec

from .archive import is_safe_name

SCHEMA: Final = "hone.package/1"
MANIFEST = "manifest.json"
LIBRARY = "lib.so"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DType = Literal[
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Versions(_Entry):
    """What wrote the package.

    Parameters
    ----------
    hone, tvm, tvm_ffi : str
        Versions of the distributions; the runtime requires the same TVM.
    """

    hone: str
    tvm: str
    tvm_ffi: str


class TensorEntry(_Entry):
    """One input or output: exact ONNX name, dtype, static shape."""

    name: Annotated[str, Field(min_length=1)]
    dtype: DType
    shape: tuple[NonNegativeInt, ...]


class SignatureEntry(_Entry):
    """Inputs and outputs in the order of the ONNX graph."""

    inputs: tuple[TensorEntry, ...]
    outputs: Annotated[tuple[TensorEntry, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        for tensors in (self.inputs, self.outputs):
            names = [tensor.name for tensor in tensors]
            if len(set(names)) != len(names):
                raise ValueError("names of inputs and of outputs must be unique")
        return self

    def to_signature(self) -> Signature:
        """Return the signature that this entry describes."""

        def specs(tensors: tuple[TensorEntry, ...]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in tensors)

        return Signature(inputs=specs(self.inputs), outputs=specs(self.outputs))


class TargetEntry(_Entry):
    """Where the code runs.

    Parameters
    ----------
    name : str
        Target as hone knows it, such as ``host`` or ``rpi4``.
    arch : {"x86_64", "aarch64"}
        Instruction set; what ``uname -m`` prints.
    triple : str
        LLVM triple.
    features : tuple of str
        LLVM names of the instruction set extensions that the code may use.
    threads : int
        Threads that the kernels were scheduled for; the runtime's default.
    glibc : str or None
        Oldest C library that the code loads on, where it was cross-linked for one.
    """

    name: str
    arch: Literal["x86_64", "aarch64"]
    triple: str
    features: tuple[str, ...]
    threads: PositiveInt
    glibc: Annotated[str, Field(pattern=r"^\d+\.\d+$")] | None = None


class FileEntry(_Entry):
    """Checksum and size of one member.

    Parameters
    ----------
    sha256 : str
        64 hexadecimal digits.
    bytes : int
        Size.
    """

    sha256: Sha256
    bytes: NonNegativeInt


class AccuracyEntry(_Entry):
    """Accuracy that was measured when the package was built.

    Parameters
    ----------
    metric : str
        Such as ``top-1``.
    value : float
        A fraction in [0, 1] for an accuracy.
    samples : int
        On how many samples.
    """

    metric: str
    value: float
    samples: PositiveInt


class ProvenanceEntry(_Entry):
    """Where the model came from; no clock, host or path, so that builds are reproducible.

    Parameters
    ----------
    source_sha256 : str
        Of the serialized ONNX model, external data included.
    opset : int
        Version of the default ONNX domain.
    """

    source_sha256: Sha256
    opset: PositiveInt


class GoldenEntry(_Entry):
    """The samples that a package carries to prove itself.

    Parameters
    ----------
    samples : int
        Folders ``golden/0`` to ``golden/<samples - 1>``.
    tolerance : dict of str to float
        For each floating-point output the largest relative error accepted, see
        :func:`hone.verify.relative_error`. Integer and boolean outputs must be equal.
    """

    samples: NonNegativeInt
    tolerance: dict[str, NonNegativeFloat]


class CostEntry(_Entry):
    """What one call of a kernel does.

    Parameters
    ----------
    operations : float
        On elements, a multiply-add being two; see ``hone.profiling.operations``.
    touched_bytes : tuple of int
        For each argument the bytes that are read or written at most.
    dtype : str or None
        What most of the operations work on; None where there are none.
    rule : str or None
        What scheduled it; ``record`` for a tuning record.
    converts : tuple of str
        Conversions between precisions that it does, such as ``quantize image``.
    """

    operations: NonNegativeFloat
    touched_bytes: tuple[NonNegativeInt, ...]
    dtype: str | None = None
    rule: str | None = None
    converts: tuple[str, ...] = ()


class MemoryEntry(_Entry):
    """The memory of one run, as planned at compile time.

    Parameters
    ----------
    activations_bytes : int
        That the activations share, outputs included. What a kernel needs for itself is not in it.
    peak_bytes : int
        Weights, activations and inputs together.
    """

    activations_bytes: NonNegativeInt
    peak_bytes: NonNegativeInt


class SlicesEntry(_Entry):
    """How a batch is run that threads share by its samples, not kernel by kernel.

    Parameters
    ----------
    count : int
        Slices of a run; each passes all layers before the same thread takes another one.
    samples : int
        Of one slice.
    parts : int
        Slices that are on their way at once, one on each thread.
    """

    count: PositiveInt
    samples: PositiveInt
    parts: PositiveInt


class Manifest(_Entry):
    """The contents of ``manifest.json``.

    Parameters
    ----------
    schema_id : str
        ``hone.package/1``; the key in the file is ``schema``.
    versions : Versions
        What wrote it.
    signature : SignatureEntry
        Inputs and outputs.
    target : TargetEntry
        Where it runs.
    precision : {"fp32", "bf16", "fp16", "int8"}
        The lowest precision that kernels compute in.
    needs_runtime_extra : bool
        Whether the code calls into ``libtvm_runtime_extra.so`` (sorting; top-k
        of other types than float32 or of more than 1024).
    weights_bytes : int
        Bytes of the weights as the library stores them, packing and padding included.
    memory : MemoryEntry or None
        Of one run; None in a package of an older hone.
    slices : SlicesEntry or None
        None where all threads share the kernels of the whole batch.
    kernels : dict of str to tuple of str
        Layer ids that each kernel computes.
    costs : dict of str to CostEntry
        What each kernel does; empty in a package of an older hone.
    recipe : dict
        The decisions that were taken.
    accuracy : AccuracyEntry or None
        None when it was not measured.
    provenance : ProvenanceEntry
        Where the model came from.
    golden : GoldenEntry
        The samples that prove it.
    files : dict of str to FileEntry
        Every member but the manifest itself.
    """

    schema_id: Literal["hone.package/1"] = Field(default=SCHEMA, alias="schema")
    versions: Versions
    signature: SignatureEntry
    target: TargetEntry
    precision: Literal["fp32", "bf16", "fp16", "int8"]
    needs_runtime_extra: bool
    weights_bytes: NonNegativeInt
    memory: MemoryEntry | None = None
    slices: SlicesEntry | None = None
    kernels: dict[str, tuple[str, ...]]
    costs: dict[str, CostEntry] = {}
    recipe: dict[str, JsonValue]
    accuracy: AccuracyEntry | None
    provenance: ProvenanceEntry
    golden: GoldenEntry
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        unsafe = [name for name in self.files if not is_safe_name(name) or name == MANIFEST]
        if unsafe:
            raise ValueError(f"not allowed as names of members: {', '.join(map(repr, unsafe))}")
        if LIBRARY not in self.files:
            raise ValueError(f"{LIBRARY} is missing among the files")
        floats = {t.name for t in self.signature.outputs if t.dtype.startswith("float")}
        if set(self.golden.tolerance) != floats:
            raise ValueError(
                "golden tolerances are required for exactly the floating-point outputs "
                f"{sorted(floats)}, given for {sorted(self.golden.tolerance)}"
            )
        return self

    def to_json(self) -> bytes:
        """Return the canonical text: sorted keys, two spaces, ASCII, one final newline."""
        data = self.model_dump(mode="json", by_alias=True)
        for name in ("memory", "slices", "costs"):
            if name not in self.model_fields_set:
                del data[name]  # written by a hone that knew nothing of it
        text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False)
        return text.encode("ascii") + b"\n"

    def sha256(self) -> str:
        """Return the hexadecimal SHA-256 of `to_json`."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Read a manifest.

        Raises
        ------
        PackageError
            If the schema is another version's, or the text does not follow the schema.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PackageError(f"the manifest is not JSON: {error}.", where=MANIFEST) from error
        _require_schema(data)
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Mapping[str, object]) -> Manifest:
        """Check plain data, or data that holds entries, against the schema.

        Raises
        ------
        PackageError
            Lists every difference at once.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'manifest'}: {item['msg']}"
                for item in error.errors()
            )
            raise PackageError(
                f"the manifest does not follow schema {SCHEMA}: {problems}.",
                where=MANIFEST,
                hint="rebuild the package with `hone compile`.",
            ) from error


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``manifest.json``."""
    schema = Manifest.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **schema}


def _require_schema(data: Any) -> None:
    found = data.get("schema") if isinstance(data, dict) else None
    if found == SCHEMA:
        return
    from hone import __version__

    versions = data.get("versions") if isinstance(data, dict) else None
    writer = versions.get("hone") if isinstance(versions, dict) else None
    own, _, number = str(found).partition("/")
    newer = own == "hone.package" and number.isdigit() and int(number) > int(SCHEMA.split("/")[1])
    if newer:
        hint = f'pip install "hone-compiler>={writer}" reads it.' if writer else "upgrade hone."
    else:
        hint = "rebuild the package from its model with `hone compile`."
        if writer:
            hint += f" hone-compiler {writer} wrote it and reads it."
    raise PackageError(
        f"hone {__version__} reads packages of schema {SCHEMA}, this one has {found!r}.",
        where=MANIFEST,
        hint=hint,
    )
