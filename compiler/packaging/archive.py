"""The canonical zip file that a package is: one byte sequence for one set of members.

Members are stored uncompressed in sorted order with fixed times and attributes, and the comment of
the archive is 64 characters of the caller's. Everything is written here and not by the standard
library's ``zipfile``, whose output differs between Python versions; any zip tool can read it.

The layout is that of PKWARE's APPNOTE 6.3.10: sections 4.3.7 (local file header), 4.3.12 (central
directory) and 4.3.16 (end of central directory). No ZIP64, so a package ends at 4 GiB.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Mapping

from hone.errors import PackageError

COMMENT_CHARS = 64
_LIMIT_BYTES = 2**32 - 1
_LIMIT_MEMBERS = 2**16 - 1

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCAL_SIGNATURE, _CENTRAL_SIGNATURE, _END_SIGNATURE = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"

_VERSION = 20
_MADE_BY_UNIX = 3 << 8 | _VERSION
_NO_FLAGS = _STORED = 0
_MIDNIGHT, _DAY_ONE = 0, 1 << 5 | 1  # 1980-01-01 00:00:00, the first date that a zip can hold
_REGULAR_FILE_0644 = 0o100644 << 16

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*", re.ASCII)

_COPY_AGAIN = "copy or download it again, or rebuild it with `hone compile`."


def is_safe_name(name: str) -> bool:
    """Whether a member name stays inside the folder that an archive is unpacked in.

    Parameters
    ----------
    name : str
        Path with forward slashes. Every part begins with a letter, a digit or an underscore, so
        that neither ``..`` nor an absolute path nor a hidden file can be written.
    """
    return len(name) <= 255 and _SAFE_NAME.fullmatch(name) is not None


def pack(members: Mapping[str, bytes], comment: str) -> bytes:
    """Write an archive.

    Parameters
    ----------
    members : mapping of str to bytes
        Contents by safe name; their order does not matter.
    comment : str
        64 ASCII characters.

    Returns
    -------
    bytes
        The zip file.

    Raises
    ------
    PackageError
        If a name is unsafe, or the archive would exceed 65535 members or 4 GiB.
    """
    return b"".join(_parts(members, comment))


def unpack(data: bytes) -> tuple[dict[str, bytes], str]:
    """Read an archive that `pack` wrote, and refuse every other byte sequence.

    Parameters
    ----------
    data : bytes
        The whole file.

    Returns
    -------
    members : dict of str to bytes
        Contents by name, sorted.
    comment : str
        The archive's comment.

    Raises
    ------
    PackageError
        If the file is empty, truncated, extended, not a zip, or differs in any bit from what
        `pack` writes for the members it holds.
    """
    if not data:
        raise PackageError("a package is required, but the file is empty.", hint=_COPY_AGAIN)
    if not data.startswith(_LOCAL_SIGNATURE):
        raise PackageError(
            "a hone package is required, but the file does not begin like one.", hint=_COPY_AGAIN
        )
    end = len(data) - COMMENT_CHARS - _END.size
    if end < 0 or data[end : end + 4] != _END_SIGNATURE:
        raise PackageError(
            f"the package is damaged: its {len(data)} bytes do not close with an end record; "
            "it was truncated, extended or altered.",
            hint=_COPY_AGAIN,
        )
    comment = data[-COMMENT_CHARS:].decode("ascii", "replace")
    members = _local_members(data, end)
    _require_equal(data, _parts(members, comment))
    return members, comment


def _local_members(data: bytes, end: int) -> dict[str, bytes]:
    """Follow the local headers from the start; sizes that run out of the file end the walk."""
    members: dict[str, bytes] = {}
    offset = 0
    while data[offset : offset + 4] == _LOCAL_SIGNATURE and offset + _LOCAL.size <= end:
        fields = _LOCAL.unpack_from(data, offset)
        size, name_size = fields[8], fields[9]
        start = offset + _LOCAL.size + name_size
        name = data[offset + _LOCAL.size : start].decode("ascii", "replace")
        if start + size > end or not is_safe_name(name) or name in members:
            raise PackageError(
                f"the package is damaged: the header of a member at byte {offset} is invalid.",
                hint=_COPY_AGAIN,
            )
        members[name] = data[start : start + size]
        offset = start + size
    return members


def _require_equal(data: bytes, parts: Iterator[bytes]) -> None:
    offset = 0
    for part in parts:
        found = data[offset : offset + len(part)]
        if found != part:
            same = next(
                (i for i, (a, b) in enumerate(zip(found, part, strict=False)) if a != b), len(found)
            )
            raise PackageError(
                f"the package is damaged: byte {offset + same} of {len(data)} is not what its "
                "contents require.",
                hint=_COPY_AGAIN,
            )
        offset += len(part)
    if offset != len(data):
        raise PackageError(
            f"the package is damaged: {len(data) - offset} bytes follow its contents.",
            hint=_COPY_AGAIN,
        )


def _parts(members: Mapping[str, bytes], comment: str) -> Iterator[bytes]:
    """Yield the file piece by piece, so that a reader compares without a second copy."""
    if len(members) > _LIMIT_MEMBERS:
        raise PackageError(f"a package holds at most {_LIMIT_MEMBERS} members, not {len(members)}.")
    directory: list[bytes] = []
    offset = 0
    for name in sorted(members):
        if not is_safe_name(name):
            raise PackageError(f"{name!r} cannot be the name of a package's member.")
        content, encoded = members[name], name.encode("ascii")
        crc, size = zlib.crc32(content), len(content)
        if offset + size + _LOCAL.size + len(encoded) > _LIMIT_BYTES:
            raise PackageError("a package holds at most 4 GiB.")
        common = (_NO_FLAGS, _STORED, _MIDNIGHT, _DAY_ONE, crc, size, size, len(encoded), 0)
        header = _LOCAL.pack(_LOCAL_SIGNATURE, _VERSION, *common) + encoded
        tail = (0, 0, 0, _REGULAR_FILE_0644, offset)
        entry = _CENTRAL.pack(_CENTRAL_SIGNATURE, _MADE_BY_UNIX, _VERSION, *common, *tail)
        directory.append(entry + encoded)
        yield header
        yield content
        offset += len(header) + size
    entries = b"".join(directory)
    count = len(directory)
    yield entries
    if offset + len(entries) > _LIMIT_BYTES:
        raise PackageError("a package holds at most 4 GiB.")
    closing = (_END_SIGNATURE, 0, 0, count, count, len(entries), offset, len(comment))
    yield _END.pack(*closing) + comment.encode("ascii", "replace")
