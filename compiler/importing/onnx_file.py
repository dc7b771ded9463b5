"""Reads an ONNX model, its external data included, and says clearly why a file is not one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
from google.protobuf.message import DecodeError

from hone.errors import ModelError, UsageError

OLDEST_OPSET: Final = 9
"""Opset 9 is ONNX 1.4 of January 2019; older ones differ in too many operators."""

NEWEST_IR: Final = 13
"""That onnxruntime 1.31 opens. 14 adds types that hone refuses (6-bit floats, opaque ones), and
nothing to a model without them, which is therefore one of 13 as well."""

_MAGIC: Final = (
    (0, b"PK\x03\x04", "a zip archive (PyTorch's .pt, a Keras file or a hone package)"),
    (0, b"\x89HDF", "an HDF5 file (Keras)"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"\x80\x02", "a Python pickle"),
    (0, b"ORTM", "an onnxruntime .ort model"),
    (4, b"ORTM", "an onnxruntime .ort model"),
    (0, b"<?xml", "an XML file (OpenVINO's IR?)"),
    (0, b"version https://git-lfs", "a git LFS pointer, the file itself was not fetched"),
)


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """A model as it was read.

    Parameters
    ----------
    proto : onnx.ModelProto
        With all tensors inside it; its IR version is at most `NEWEST_IR`.
    path : str or None
        As given; None for a proto.
    sha256 : str
        Of the file's bytes, followed by those of its external files in the order of their names.
    opset : int
        Version of the default domain; 0 when the model imports none.
    """

    proto: onnx.ModelProto
    path: str | None
    sha256: str
    opset: int


def read(model: str | Path | onnx.ModelProto) -> OnnxFile:
    """Read a model from a file, or take one that is in memory.

    Parameters
    ----------
    model : str, Path or onnx.ModelProto
        A proto is copied, never changed. External data of a proto that was loaded without them
        cannot be found and is an error.

    Raises
    ------
    UsageError
        There is no such file, or it cannot be read (exit 2).
    ModelError
        It is not ONNX, it is truncated, its external data are missing or lie outside of its folder,
        or its opset is not between 9 and that of the installed onnx.
    """
    if isinstance(model, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
        where, digest = None, hashlib.sha256(_serialize(proto))
        if any(_is_external(t) for t in _tensors(proto)):
            raise ModelError(
                "the model's tensors lie in external files, a proto does not say where",
                hint="give the path of the file, or call onnx.load with its external data",
            )
    else:
        path = Path(model)
        where = str(model)
        data = _read_bytes(path)
        digest = hashlib.sha256(data)
        proto = _parse(data, where)
        _load_external(proto, path, digest)
    _check_text(proto, where)
    proto.ir_version = min(proto.ir_version, NEWEST_IR)
    return OnnxFile(
        proto=proto, path=where, sha256=digest.hexdigest(), opset=_check_opset(proto, where)
    )


def _read_bytes(path: Path) -> bytes:
    if path.is_fifo():  # it might be waited for without end
        raise UsageError("this is a pipe, required is an ONNX file", where=str(path))
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError("there is no such file", where=str(path)) from None
    except IsADirectoryError:
        found = sorted(p.name for p in path.glob("*.onnx"))
        raise UsageError(
            "this is a folder, required is an ONNX file",
            where=str(path),
            hint=f"it holds {', '.join(found[:5])}" if found else None,
        ) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _parse(data: bytes, where: str) -> onnx.ModelProto:
    if not data:
        raise ModelError("the file is empty", where=where)
    for offset, magic, what in _MAGIC:
        if data[offset : offset + len(magic)] == magic:
            raise ModelError(f"this is not ONNX but {what}", where=where)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ModelError(
            f"this is not an ONNX model, or one cut short: {len(data)} bytes do not parse as one",
            where=where,
            hint="compare its size with the original's, or export it again",
        ) from None
    if not proto.ir_version or not proto.HasField("graph"):
        raise ModelError(
            f"this is not an ONNX model: {len(data)} bytes parse, but hold no graph", where=where
        )
    return proto


def _load_external(proto: onnx.ModelProto, path: Path, digest: hashlib._Hash) -> None:
    external = [t for t in _tensors(proto) if _is_external(t)]
    if not external:
        return
    folder = path.parent.resolve()
    files = sorted({_location(t) for t in external})
    problems = []
    for name in files:
        target = (folder / name).resolve()
        if not name or not target.is_relative_to(folder):
            problems.append(f"external data {name!r} lie outside of the model's folder: refused")
        elif not target.is_file():
            users = [t.name for t in external if _location(t) == name]
            problems.append(
                f"external data {name!r} are missing; {len(users)} tensors lie there, "
                f"the first is {users[0]!r}"
            )
    if problems:
        raise ModelError(
            "the model's external data cannot be read",
            problems=problems,
            where=str(path),
            hint="keep the data files beside the model, under the names that it was saved with",
        )
    for name in files:
        with (folder / name).open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    try:
        onnx.load_external_data_for_model(proto, str(folder))
    except (ValueError, OSError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"the model's external data cannot be read: {str(error).splitlines()[0]}",
            where=str(path),
        ) from error


def _check_text(proto: onnx.ModelProto, where: str | None) -> None:
    """Protobuf parses names that are no UTF-8; nothing after it can handle them."""
    for node in proto.graph.node:
        attributes = [a.name for a in node.attribute]
        for text in (node.name, node.op_type, node.domain, *node.input, *node.output, *attributes):
            try:
                text.encode("utf-8")
            except (UnicodeError, AttributeError):
                raise ModelError(
                    f"the file is damaged: {text!r} is no valid name",
                    where=where,
                    hint="compare its checksum with the original's, or export it again",
                ) from None


def _check_opset(proto: onnx.ModelProto, where: str | None) -> int:
    versions = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    opset = versions[0] if versions else 0
    if proto.opset_import and not versions:
        return opset  # the graph uses other domains only: each node is reported on its own
    if not OLDEST_OPSET <= opset <= newest:
        raise ModelError(
            f"the model's opset is {opset}, required is {OLDEST_OPSET} to {newest}",
            where=where,
            hint="convert it with onnx.version_converter.convert_version(model, 17)"
            if 0 < opset < OLDEST_OPSET
            else None,
        )
    return opset


def _tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    found: list[onnx.TensorProto] = []

    def visit(nodes: list[onnx.NodeProto]) -> None:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    found.append(attribute.t)
                found.extend(attribute.tensors)
                for graph in ([attribute.g] if attribute.HasField("g") else []) + list(
                    attribute.graphs
                ):
                    found.extend(graph.initializer)
                    visit(list(graph.node))

    found.extend(proto.graph.initializer)
    visit(list(proto.graph.node))
    for function in proto.functions:
        visit(list(function.node))
    return found


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _location(tensor: onnx.TensorProto) -> str:
    return next((str(e.value) for e in tensor.external_data if e.key == "location"), "")


def _serialize(proto: onnx.ModelProto) -> bytes:
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except ValueError:
        raise ModelError(
            "a proto of 2 GiB or more cannot be serialized",
            hint="save it with external data and give the path",
        ) from None
