"""Reads the arrays behind a data argument, one reader for each of its five forms.

A reader yields chunks: dicts of arrays as they are stored. What they must look like is the
business of `hone.data`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from .errors import UsageError
from .signature import Signature, TensorSpec

LABELS: Final = "labels"
"""The key of class indices."""

FORMS: Final = (
    "data are x.npz, x.npy, a folder of .npz or .npy files, a folder with test_data_set_*, "
    "file.py:function or random:N"
)


_PICKLE: Final = b"\x80"

_DAMAGED: Final = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for files that are not whole."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some samples, as they are stored.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        By key.
    where : str
        File, or file and function, for errors.
    outputs : mapping of str to ndarray
        Reference outputs of an ONNX test data set.
    exact : bool
        Whether each array is one sample of exactly the signature's shape.
    """

    arrays: Mapping[str, np.ndarray]
    where: str
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    exact: bool = False


def chunks(spec: str, signature: Signature) -> Iterator[Chunk]:
    """Yield what a data argument names, except for ``random:N``.

    Raises
    ------
    UsageError
        There is no such file, it cannot be read, or the argument has none of the known forms.
    """
    path = Path(spec)
    if path.is_dir():
        yield from _folder(path, signature)
    elif path.suffix == ".npz":
        yield _npz(_existing(path))
    elif path.suffix == ".npy":
        yield _single_npy(_existing(path), signature)
    elif ".py:" in spec:
        yield from _function(spec)
    elif path.exists():
        raise UsageError("this is not a data file", where=spec, hint=FORMS)
    else:
        raise UsageError("there is no such file or folder", where=spec, hint=FORMS)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UsageError("there is no such file", where=str(path), hint=FORMS)
    return path


def _load(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except _DAMAGED as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UsageError:
    with path.open("rb") as stream:
        head = stream.read(6)
    if head and not head.startswith((b"PK", b"\x93NUMPY", _PICKLE)):
        # numpy takes whatever it does not know for a pickle.
        return UsageError("this is neither an .npz nor a .npy file", where=str(path))
    if "allow_pickle" in str(error) or "pickled" in str(error):
        return UsageError(
            "it holds Python objects, which are never loaded: unpickling runs code",
            where=str(path),
            hint="save plain arrays: np.savez(path, x=np.asarray(x, dtype=np.float32))",
        )
    return UsageError(f"it cannot be read: {error}", where=str(path))


def _npz(path: Path) -> Chunk:
    loaded = _load(path)
    if isinstance(loaded, np.ndarray):
        raise UsageError("this is a .npy file under an .npz name", where=str(path))
    arrays = {}
    with loaded as archive:
        for key in archive.files:
            try:
                arrays[key] = archive[key]
            except _DAMAGED as error:
                raise _unreadable(path, error) from error
    return Chunk(arrays=arrays, where=str(path))


def _npy(path: Path) -> np.ndarray:
    loaded = _load(path)
    if not isinstance(loaded, np.ndarray):
        raise UsageError("this is an .npz file under a .npy name", where=str(path))
    return loaded


def _single_npy(path: Path, signature: Signature) -> Chunk:
    if len(signature.inputs) != 1:
        raise UsageError(
            f"an .npy file holds one input, the model has {len(signature.inputs)}: "
            + ", ".join(s.name for s in signature.inputs),
            where=str(path),
            hint="save them together: np.savez(path, **arrays)",
        )
    return Chunk(arrays={signature.inputs[0].name: _npy(path)}, where=str(path))


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]


def _folder(path: Path, signature: Signature) -> Iterator[Chunk]:
    entries = sorted((p for p in path.iterdir() if not p.name.startswith(".")), key=_natural)
    sets = [p for p in entries if p.is_dir() and p.name.startswith("test_data_set_")]
    if any(p.name.startswith("input_") and p.suffix == ".pb" for p in entries):
        sets = [path]
    archives = [p for p in entries if p.suffix == ".npz"]
    arrays = [p for p in entries if p.suffix == ".npy"]
    kinds = [kind for kind in (sets, archives, arrays) if kind]
    if len(kinds) != 1:
        found = ", ".join(p.name for p in entries[:5]) or "nothing"
        what = "none" if not kinds else "more than one kind"
        raise UsageError(
            "a data folder holds .npz files, .npy files or test_data_set_* folders; "
            f"this one has {what} of them: {found}",
            where=str(path),
        )
    if sets:
        for folder in sets:
            yield _test_data_set(folder, signature)
    elif archives:
        for file in archives:
            yield _npz(file)
    else:
        yield from _npy_files(path, arrays, signature)


def _npy_files(path: Path, files: list[Path], signature: Signature) -> Iterator[Chunk]:
    by_name = {f.stem: f for f in files}
    names = {s.name for s in signature.inputs}
    if names <= by_name.keys() or len(names) > 1:
        yield Chunk(arrays={stem: _npy(file) for stem, file in by_name.items()}, where=str(path))
        return
    (name,) = names
    labels = by_name.pop(LABELS, None)
    samples = [_npy(file) for file in by_name.values()]
    if labels is None:
        for file, array in zip(by_name.values(), samples, strict=True):
            yield Chunk(arrays={name: array}, where=str(file))
        return
    try:
        whole = np.concatenate(samples) if samples else np.empty(0)
    except ValueError as error:
        raise UsageError(f"its arrays do not stack: {error}", where=str(path)) from error
    yield Chunk(arrays={name: whole, LABELS: _npy(labels)}, where=str(path))


def _test_data_set(folder: Path, signature: Signature) -> Chunk:
    return Chunk(
        arrays=_tensors(folder, "input", signature.inputs),
        outputs=_tensors(folder, "output", signature.outputs),
        where=str(folder),
        exact=True,
    )


def _tensors(folder: Path, kind: str, specs: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    names = [s.name for s in specs]
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob(f"{kind}_*.pb"), key=_natural):
        index = file.stem.removeprefix(f"{kind}_")
        tensor = onnx.TensorProto()
        try:
            tensor.ParseFromString(file.read_bytes())
            array = numpy_helper.to_array(tensor)
        except (DecodeError, ValueError, TypeError, OSError) as error:
            raise UsageError(f"it is no ONNX tensor: {error}", where=str(file)) from error
        if tensor.name in names:
            found[tensor.name] = array
        elif index.isdigit() and int(index) < len(names):
            found[names[int(index)]] = array
        else:
            raise UsageError(
                f"the model has {len(names)} {kind}s, this would be number {index}",
                where=str(file),
            )
    return found


def _function(spec: str) -> Iterator[Chunk]:
    file, _, name = spec.rpartition(":")
    path = _existing(Path(file))
    given = _call(path, name, spec)
    while True:
        with redirect_stdout(sys.stderr):  # what a user's code prints is no result of hone's
            chunk = next(given, None)
        if chunk is None:
            return
        yield chunk


def _call(path: Path, name: str, spec: str) -> Iterator[Chunk]:
    function = _load_function(path, name)
    try:
        result = function()
        if isinstance(result, Mapping):
            result = [result]
        if not isinstance(result, Iterable):
            raise UsageError(
                f"it returned a {type(result).__name__}; it returns a dict of arrays, or yields "
                "such dicts",
                where=spec,
            )
        for item in result:
            if not isinstance(item, Mapping):
                raise UsageError(
                    f"it gave a {type(item).__name__}; required is a dict of arrays", where=spec
                )
            yield Chunk(arrays={str(k): np.asarray(v) for k, v in item.items()}, where=spec)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(_raised(error, path), where=spec) from error


def _load_function(path: Path, name: str) -> Callable[[], Any]:
    module_spec = importlib.util.spec_from_file_location(f"hone_data_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError("it cannot be imported", where=str(path))
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(_raised(error, path), where=str(path)) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise UsageError(
            f"it has no function {name!r}",
            where=str(path),
            hint=f"it has {', '.join(known)}" if known else None,
        )
    return function  # type: ignore[no-any-return]


def _raised(error: BaseException, path: Path) -> str:
    """Say what a user's code raised, and in which line of it."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    at = f" in line {line}" if line else ""
    return f"it raised {type(error).__name__}{at}: {error}"
