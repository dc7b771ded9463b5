"""Runs code with AMX tiles on every x86 machine: with its own tiles, or with emulated ones.

The emulator is a handler of SIGILL in this process (``amx_emulator.c``), compiled when a test first
asks for it. A functional check, never a timing.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hone.targets import features

SOURCE = Path(__file__).parent / "amx_emulator.c"
FLAGS = ("-std=gnu11", "-O3", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
TILE_FEATURES = frozenset({"amx-tile", "amx-int8", "amx-bf16"})


class Unavailable(Exception):  # noqa: N818
    """Why there are no tiles here, not even emulated ones."""


@dataclass(frozen=True)
class Emulator:
    """The loaded emulator."""

    library: ctypes.CDLL
    path: Path

    def counts(self) -> dict[str, int]:
        """Instructions that were emulated so far, by name."""
        found: dict[str, int] = {}
        number = 0
        while name := self.library.amx_emulator_name(number):
            found[name.decode()] = int(self.library.amx_emulator_count(number))
            number += 1
        return found

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle illegal instructions while the block runs."""
        if self.library.amx_emulator_install():
            raise OSError(ctypes.get_errno(), "the handler of SIGILL cannot be installed")
        try:
            yield
        finally:
            self.library.amx_emulator_remove()


def build(folder: Path) -> Emulator:
    """Compile and load the emulator.

    Raises
    ------
    Unavailable
        On another architecture, or without a C compiler.
    """
    if features.machine() != "x86_64":
        raise Unavailable(f"tiles of x86 are emulated on x86 only, this is {features.machine()}")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("no AMX here, and no C compiler (cc, gcc, clang) to build its emulator")
    path = folder / "amx_emulator.so"
    command = [compiler, *FLAGS, "-o", str(path), str(SOURCE), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stderr}")
    library = ctypes.CDLL(str(path), use_errno=True)
    library.amx_emulator_name.restype = ctypes.c_char_p
    library.amx_emulator_count.restype = ctypes.c_ulong
    return Emulator(library, path)


@dataclass(frozen=True)
class Tiles:
    """Tiles that code of this process may use.

    Parameters
    ----------
    emulator : Emulator or None
        None where the processor's own tiles are used.
    """

    emulator: Emulator | None

    @property
    def native(self) -> bool:
        """Whether these are the processor's own."""
        return self.emulator is None

    def counts(self) -> dict[str, int] | None:
        """Emulated instructions so far; None where the processor runs them by itself."""
        return None if self.emulator is None else self.emulator.counts()

    def pretend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let hone believe, for one test, that this machine has tiles."""
        if self.emulator is None:
            return
        real = features.available

        def available(arch: str) -> frozenset[str]:
            return real(arch) | TILE_FEATURES if arch == "x86_64" else real(arch)

        monkeypatch.setattr(features, "available", available)
        monkeypatch.setattr(features, "request_tiles", lambda: True)


@contextmanager
def tiles(folder: Path) -> Iterator[Tiles]:
    """Make tiles usable in this process while the block runs.

    Raises
    ------
    Unavailable
        Where there are none and none can be emulated.
    """
    if {"amx-tile", "amx-int8"} <= features.available("x86_64") and features.request_tiles():
        yield Tiles(None)
        return
    emulator = build(folder)
    with emulator.installed():
        yield Tiles(emulator)
