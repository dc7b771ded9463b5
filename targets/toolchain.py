"""The one linker that compiling, tuning and the tests all use.

For this machine: the C++ compiler that ``CXX`` names or the system has, else ziglang. For another
architecture, or where a target names the oldest C library it must load on: ziglang, which brings
the libraries' stubs, else a cross compiler. Nothing is linked but object files, C sources of
ours and what they need of the C library, so a library comes out the same in any folder and process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone.errors import ToolchainError

from .features import machine
from .target import Target

INSTALL_ZIG = "pip install 'hone-compiler[cross]'"
# What apache-tvm's wheels need, so that a library loads wherever its runtime does.
_LEAST_GLIBC = "2.28"
_NATIVE = ("c++", "g++", "clang++", "cc", "gcc", "clang")
# -s and no build id: neither symbol tables nor identifiers depend on names of temporary files.
# --as-needed: a C++ driver would otherwise make every library need libstdc++.
_SHARED = ("-shared", "-fPIC", "-s", "-Wl,--build-id=none", "-Wl,--as-needed")
# Kernels call expf and its kin, the code around them starts threads; last, because they serve what
# stands before them.
_LIBRARIES = ("-lm", "-lpthread")
# C whatever the driver takes it for; optimized, since zig would check for undefined behaviour.
_SOURCE = ("-O2", "-std=gnu11", "-x", "c")
_TIMEOUT_S = 600
_ZIG_CACHE_HINT = (
    "set ZIG_GLOBAL_CACHE_DIR to a folder that can be written (by default ~/.cache/zig)."
)


@dataclass(frozen=True, kw_only=True)
class Linker:
    """A command that makes a shared library out of object files.

    Parameters
    ----------
    name : str
        ``"ziglang"`` or the compiler's own name.
    version : str
        Version that it reports, for provenance.
    command : tuple of str
        Program and the arguments that select the machine.
    triple : str
        LLVM triple of the libraries that it makes.
    """

    name: str
    version: str
    command: tuple[str, ...]
    triple: str

    def run(self, arguments: Sequence[str | Path]) -> None:
        """Run the compiler driver.

        Parameters
        ----------
        arguments : sequence of str or pathlib.Path
            What follows :attr:`command`.

        Raises
        ------
        ToolchainError
            If it fails; with what it printed.
        """
        line = [*self.command, *map(str, arguments)]
        try:
            done = subprocess.run(
                line, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ToolchainError(
                f"the linker could not be run: {error}.", where=shlex.join(line)
            ) from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise ToolchainError(
                f"the linker failed with status {done.returncode}:\n{said}",
                where=shlex.join(line),
                hint=_ZIG_CACHE_HINT
                if "cache directory" in said
                else "`hone doctor` shows which linker hone uses.",
            )

    def link(self, objects: Sequence[Path], output: Path) -> None:
        """Link object files into a shared library.

        Parameters
        ----------
        objects : sequence of pathlib.Path
            Object files (or C sources), in the order that decides the layout.
        output : pathlib.Path
            The library; its folder must exist.

        Raises
        ------
        ToolchainError
            If the linker fails; with what it printed.
        """
        # A soname would carry the output's name into its contents.
        self.run([*_SHARED, "-o", output, *objects, *_LIBRARIES])

    @property
    def fcompile(self) -> Callable[..., None]:
        """Function for ``export_library(fcompile=...)`` of TVM."""
        return self.fcompile_with()

    def fcompile_with(self, *sources: Path) -> Callable[..., None]:
        """Return such a function that compiles C sources into the library as well.

        Parameters
        ----------
        *sources : pathlib.Path
            Files in C; what they define is found by the objects, and theirs by them.
        """
        compiled = [*_SOURCE, *map(str, sources), "-x", "none"] if sources else []

        def link(
            output: str, objects: Sequence[str], options: Sequence[str] = (), **_: Any
        ) -> None:
            self.run([*_SHARED, *options, "-o", output, *compiled, *objects, *_LIBRARIES])

        link.output_format = "so"  # type: ignore[attr-defined]
        link.object_format = "o"  # type: ignore[attr-defined]
        link.get_target_triple = lambda: self.triple  # type: ignore[attr-defined]
        return link


def zig_version() -> str | None:
    """Version of the ziglang package.

    Returns
    -------
    str or None
        None where it is not installed.
    """
    if importlib.util.find_spec("ziglang") is None:
        return None
    return importlib.metadata.version("ziglang")


def _zig(target: Target) -> Linker | None:
    version = zig_version()
    if version is None:
        return None
    triple = f"{target.triple}.{target.glibc or _LEAST_GLIBC}"
    # As C, not C++: zig would first build its own libc++, for a minute, that nothing here needs.
    # The first link for a machine still builds stubs of its C library: 13 s, once per user.
    command = (sys.executable, "-m", "ziglang", "cc", "-target", triple)
    return Linker(name="ziglang", version=version, command=command, triple=target.triple)


def _compiler(program: str, triple: str) -> Linker | None:
    words = shlex.split(program)
    path = shutil.which(words[0]) if words else None
    if path is None:
        return None
    command = (path, *words[1:])
    answer = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    found = re.search(r"\d+\.\d+(\.\d+)?", answer.stdout)
    if answer.returncode or found is None:
        return None
    return Linker(name=Path(path).name, version=found[0], command=command, triple=triple)


def _system(target: Target) -> Linker | None:
    """Compiler of this machine: the one that ``CXX`` names, else the first that is there."""
    chosen = os.environ.get("CXX", "")
    if chosen:
        linker = _compiler(chosen, target.triple)
        if linker is None:
            raise ToolchainError(
                f"the environment variable CXX names the compiler {chosen!r}, "
                "which is not there or does not answer to --version.",
                hint="correct CXX, or unset it and hone looks for c++, g++ and clang++.",
            )
        return linker
    found = (_compiler(program, target.triple) for program in _NATIVE)
    return next((linker for linker in found if linker is not None), None)


def _cross(target: Target) -> Linker | None:
    found = (_compiler(f"{target.triple}-{driver}", target.triple) for driver in ("g++", "gcc"))
    return next((linker for linker in found if linker is not None), None)


def find_linker(target: Target) -> Linker:
    """Linker for the libraries of a target.

    Parameters
    ----------
    target : Target
        What the libraries run on.

    Returns
    -------
    Linker

    Raises
    ------
    ToolchainError
        If there is none, or ``CXX`` names a compiler that is not there.
    """
    here = target.arch == machine()
    if here and target.glibc is None:
        order = (_system, _zig)
    else:
        order = (_zig, _system if here else _cross)
    for choice in order:
        linker = choice(target)
        if linker is not None:
            return linker
    looked = ", ".join(_NATIVE) if here else f"{target.triple}-g++, {target.triple}-gcc"
    raise ToolchainError(
        f"linking a library for target {target.name!r} ({target.triple}) needs a C or C++ compiler "
        f"or the ziglang package, and there is neither (looked for {looked} on PATH).",
        hint=INSTALL_ZIG,
    )
