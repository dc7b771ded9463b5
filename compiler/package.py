"""The deployable file: a library, what it needs and what proves it, in one canonical zip.

A package is read as a whole: the reader serializes what it found again and requires the file's own
bytes, and the comment of the archive is the SHA-256 of the manifest, which names the SHA-256 of
every other member. No bit of the file can change unseen.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from .errors import PackageError, UsageError
from .packaging.archive import pack, unpack
from .packaging.golden import FOLDER, Golden, from_members, member_names, to_members
from .packaging.manifest import (
    LIBRARY,
    MANIFEST,
    AccuracyEntry,
    CostEntry,
    FileEntry,
    GoldenEntry,
    Manifest,
    MemoryEntry,
    ProvenanceEntry,
    SlicesEntry,
    TargetEntry,
    Versions,
)
from .signature import Signature

_COPY_AGAIN = "copy or download it again, or rebuild it with `hone compile`."


@dataclass(frozen=True, kw_only=True)
class Package:
    """A compiled model.

    Parameters
    ----------
    manifest : Manifest
        What the package says about itself; immutable.
    members : mapping of str to bytes
        Every file but the manifest: ``lib.so``, ``golden/<k>/input_<i>.npy``,
        ``golden/<k>/output_<i>.npy``, and optionally ``tuning/*.json``.
    """

    manifest: Manifest
    members: Mapping[str, bytes]

    def __repr__(self) -> str:
        """Return one line: the members are a megabyte of code and weights."""
        target, precision = self.manifest.target, self.manifest.precision
        return (
            f"Package({precision} for {target.name}, {target.threads} threads, "
            f"{self.size_bytes} bytes)"
        )

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", MappingProxyType(dict(self.members)))
        _check_members(self.manifest, self.members)

    @classmethod
    def create(
        cls,
        *,
        library: bytes,
        signature: Signature,
        target: TargetEntry,
        precision: str,
        weights_bytes: int,
        kernels: Mapping[str, Sequence[str]],
        provenance: ProvenanceEntry,
        golden: Sequence[Golden],
        tolerance: Mapping[str, float],
        recipe: Mapping[str, object],
        accuracy: AccuracyEntry | None = None,
        needs_runtime_extra: bool = False,
        activations_bytes: int | None = None,
        costs: Mapping[str, CostEntry] | None = None,
        slices: SlicesEntry | None = None,
        tuning: Mapping[str, bytes] = MappingProxyType({}),
    ) -> Package:
        """Compute the checksums and put a package together.

        Parameters
        ----------
        library : bytes
            The shared library that ``export_library`` wrote.
        signature : Signature
            Inputs and outputs in the order of ``main``'s parameters and results.
        target : TargetEntry
            Where it runs.
        precision : {"fp32", "bf16", "fp16", "int8"}
            The lowest precision that kernels compute in.
        weights_bytes : int
            Bytes of the weights in the library.
        kernels : mapping of str to sequence of str
            Layer ids that each kernel computes.
        provenance : ProvenanceEntry
            Where the model came from.
        golden : sequence of Golden
            Samples that ``hone verify`` replays.
        tolerance : mapping of str to float
            Largest relative error for each floating-point output.
        recipe : mapping
            The decisions that were taken, as JSON data.
        accuracy : AccuracyEntry, optional
            What was measured.
        needs_runtime_extra : bool
            Whether the library calls into ``libtvm_runtime_extra.so``.
        activations_bytes : int, optional
            That the activations of a run share.
        costs : mapping of str to CostEntry, optional
            What each kernel does.
        slices : SlicesEntry, optional
            How a batch is cut, if it is.
        tuning : mapping of str to bytes
            Tuning records by file name, stored under ``tuning/``.

        Raises
        ------
        UsageError
            If a golden sample does not fit the signature.
        PackageError
            If a name is not path-safe.
        """
        members = {LIBRARY: bytes(library), **to_members(signature, golden)}
        members |= {f"tuning/{name}": bytes(content) for name, content in tuning.items()}
        known: dict[str, object] = {} if costs is None else {"costs": dict(costs)}
        if slices is not None:
            known["slices"] = slices
        if activations_bytes is not None:
            given = sum(tensor.size_bytes for tensor in signature.inputs)
            known["memory"] = MemoryEntry(
                activations_bytes=activations_bytes,
                peak_bytes=weights_bytes + activations_bytes + given,
            )
        manifest = Manifest.from_data(
            {
                **known,
                "versions": _versions(),
                "signature": signature.to_json(),
                "target": target,
                "precision": precision,
                "needs_runtime_extra": needs_runtime_extra,
                "weights_bytes": weights_bytes,
                "kernels": {name: tuple(layers) for name, layers in kernels.items()},
                "recipe": dict(recipe),
                "accuracy": accuracy,
                "provenance": provenance,
                "golden": GoldenEntry(samples=len(golden), tolerance=dict(tolerance)),
                "files": {
                    name: FileEntry(sha256=_sha256(content), bytes=len(content))
                    for name, content in members.items()
                },
            }
        )
        return cls(manifest=manifest, members=members)

    def with_evidence(
        self,
        *,
        golden: Sequence[Golden],
        recipe: Mapping[str, object],
        accuracy: AccuracyEntry | None = None,
        tuning: Mapping[str, bytes] = MappingProxyType({}),
    ) -> Package:
        """Return the same code with other golden samples, recipe, accuracy and tuning records.

        Parameters
        ----------
        golden, recipe, accuracy, tuning
            As for `create`; they replace what this package holds.
        """
        manifest, memory = self.manifest, self.manifest.memory
        return Package.create(
            library=self.library,
            signature=self.signature,
            target=manifest.target,
            precision=manifest.precision,
            weights_bytes=manifest.weights_bytes,
            kernels=manifest.kernels,
            provenance=manifest.provenance,
            golden=golden,
            tolerance=manifest.golden.tolerance,
            recipe=recipe,
            accuracy=accuracy,
            needs_runtime_extra=manifest.needs_runtime_extra,
            activations_bytes=None if memory is None else memory.activations_bytes,
            costs=manifest.costs if "costs" in manifest.model_fields_set else None,
            slices=manifest.slices,
            tuning=tuning,
        )

    @classmethod
    def read(cls, source: str | os.PathLike[str] | bytes) -> Package:
        """Read a package and check every bit of it.

        Parameters
        ----------
        source : path or bytes
            File name, or the whole file's contents.

        Raises
        ------
        UsageError
            If the file cannot be opened.
        PackageError
            If it is not a package, is damaged, or is of a schema that this hone does not read.
        """
        if isinstance(source, bytes):
            return cls._parse(source)
        path = Path(source)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"a package is required, but it cannot be read: {error.strerror}.", where=str(path)
            ) from error
        try:
            return cls._parse(data)
        except PackageError as error:
            where = f"{path}: {error.where}" if error.where else str(path)
            raise PackageError(error.message, where=where, hint=error.hint) from error

    @classmethod
    def _parse(cls, data: bytes) -> Package:
        members, comment = unpack(data)
        text = members.pop(MANIFEST, None)
        if text is None:
            raise PackageError(
                f"a hone package is required, but the archive holds no {MANIFEST}.",
                hint=_COPY_AGAIN,
            )
        if _sha256(text) != comment:
            raise PackageError(
                f"the package is damaged: {MANIFEST} does not have the checksum in the archive's "
                "comment.",
                hint=_COPY_AGAIN,
            )
        manifest = Manifest.from_json(text)
        if manifest.to_json() != text:
            raise PackageError(
                f"the package is not canonical: {MANIFEST} is not written as hone writes it.",
                hint=_COPY_AGAIN,
            )
        return cls(manifest=manifest, members=members)

    def to_bytes(self) -> bytes:
        """Return the file's contents; equal packages have equal contents."""
        text = self.manifest.to_json()
        return pack({MANIFEST: text, **self.members}, _sha256(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the package, so that at any moment the path holds the old file or the new one.

        Parameters
        ----------
        path : path
            Its folder must exist.

        Raises
        ------
        UsageError
            If the file cannot be written, or there is something there that is no file.
        """
        path = Path(path)
        if path.exists() and not path.is_file():
            raise UsageError(
                "the package cannot be written: "
                f"this is a {'folder' if path.is_dir() else 'device or pipe'}, not a file.",
                where=str(path),
            )
        try:
            _replace(path, self.to_bytes())
        except OSError as error:
            raise UsageError(
                f"the package cannot be written: {error.strerror}.", where=str(path)
            ) from error

    @property
    def library(self) -> bytes:
        """The shared library."""
        return self.members[LIBRARY]

    @cached_property
    def signature(self) -> Signature:
        """Inputs and outputs."""
        return self.manifest.signature.to_signature()

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights as the library stores them."""
        return self.manifest.weights_bytes

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.to_bytes())

    def golden(self) -> tuple[Golden, ...]:
        """Return the golden samples.

        Raises
        ------
        PackageError
            If an array does not fit the signature.
        """
        return from_members(self.signature, self.manifest.golden.samples, self.members)


def _check_members(manifest: Manifest, members: Mapping[str, bytes]) -> None:
    """Require exactly the members that the manifest names, with their checksums."""
    missing = sorted(manifest.files.keys() - members.keys())
    extra = sorted(members.keys() - manifest.files.keys())
    altered = [
        name
        for name, entry in manifest.files.items()
        if name in members
        and (len(members[name]) != entry.bytes or _sha256(members[name]) != entry.sha256)
    ]
    problems = [
        f"{what} {', '.join(names)}"
        for what, names in (
            ("missing:", missing),
            ("not in the manifest:", extra),
            ("checksum differs:", altered),
        )
        if names
    ]
    if problems:
        raise PackageError(f"the package is damaged: {'; '.join(problems)}.", hint=_COPY_AGAIN)
    samples = manifest.golden.samples
    arrays = frozenset(name for name in members if name.startswith(FOLDER))
    if arrays != member_names(manifest.signature.to_signature(), samples):
        raise PackageError(
            f"the package is damaged: its golden arrays are not those of {samples} samples.",
            hint=_COPY_AGAIN,
        )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _versions() -> Versions:
    from hone import __version__

    version = importlib.metadata.version
    return Versions(hone=__version__, tvm=version("apache-tvm"), tvm_ffi=version("apache-tvm-ffi"))


def _replace(path: Path, content: bytes) -> None:
    """Write beside the path, reach the disk, then rename over it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
