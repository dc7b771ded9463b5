"""Runs libraries for 64-bit ARM under qemu's user mode emulation.

A functional check, never a timing. Needs qemu-aarch64-static, the C library of the board under
/usr/aarch64-linux-gnu (Debian: qemu-user-static libc6-arm64-cross libstdc++6-arm64-cross), ziglang
or a cross compiler for the runner, and TVM's runtime for ARM, which the first test that wants it
downloads into build/arm/; ``python tests/targets/arm/arm_emulator.py`` does so ahead of the tests.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hone.errors import ToolchainError
from hone.targets.target import resolve
from hone.targets.toolchain import find_linker

HERE = Path(__file__).parent
SYSROOT = Path("/usr/aarch64-linux-gnu")
QEMU = "qemu-aarch64-static"
PACKAGES = "apt-get install qemu-user-static libc6-arm64-cross libstdc++6-arm64-cross"
TIMEOUT_S = 120
WHEELS = "manylinux_2_28_aarch64"
RUNTIME = {
    "apache-tvm": "tvm/lib/libtvm_runtime.so",
    "apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so",
}
BUILD = Path(__file__).parents[3] / "build" / "arm"

_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
_KINDS = {code: kind for kind, code in _CODES.items()}


class Unavailable(Exception):  # noqa: N818
    """Why ARM libraries cannot be run here."""


def _dtype(code: int, bits: int, lanes: int) -> np.dtype:
    if lanes != 1 or code not in _KINDS or bits % 8:
        raise ValueError(f"numpy has no type for DLPack code {code}, {bits} bits, {lanes} lanes")
    return np.dtype(f"{_KINDS[code]}{bits // 8}")


@dataclass(frozen=True)
class ArmEmulator:
    """A runner program and the libraries that it needs."""

    runner: Path
    libraries: Path

    def run(
        self, library: Path, inputs: Sequence[np.ndarray], *, cpu: str = "max", threads: int = 1
    ) -> list[np.ndarray]:
        """Outputs of ``main`` of a library made for 64-bit ARM.

        `cpu` is qemu's name of the core, such as "cortex-a72": an instruction that the core lacks
        ends the run with an illegal instruction.
        """
        with tempfile.TemporaryDirectory() as scratch:
            specs = []
            for index, array in enumerate(inputs):
                path = Path(scratch, f"in{index}.bin")
                path.write_bytes(np.ascontiguousarray(array).tobytes())
                dims = ",".join(map(str, array.shape))
                code, bits = _CODES[array.dtype.kind], 8 * array.dtype.itemsize
                specs.append(f"{code}:{bits}:1:{dims}:{path}")
            prefix = Path(scratch, "out")
            done = subprocess.run(
                [
                    *(QEMU, "-cpu", cpu, "-L", str(SYSROOT)),
                    *("-E", f"LD_LIBRARY_PATH={self.libraries}"),
                    *("-E", f"TVM_NUM_THREADS={threads}"),
                    *(str(self.runner), str(library.resolve()), str(prefix), *specs),
                ],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"status {done.returncode}: {done.stderr.strip()}")
            outputs = []
            for index, line in enumerate(done.stdout.splitlines()):
                code, bits, lanes, *shape = map(int, line.split())
                raw = Path(f"{prefix}{index}.bin").read_bytes()
                outputs.append(np.frombuffer(raw, _dtype(code, bits, lanes)).reshape(shape))
            return outputs


def fetch_runtime(into: Path = BUILD) -> Path:
    """Folder that holds TVM's runtime for ARM, of the version installed here; filled if need be.

    The wheels that it comes from (95 MB) are not kept. Raises subprocess.SubprocessError
    when pip cannot download them.
    """
    versions = {name: importlib.metadata.version(name) for name in RUNTIME}
    folder = into / "-".join(f"{name}-{version}" for name, version in versions.items())
    if folder.is_dir():
        return folder
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        wheels, libraries = Path(scratch, "wheels"), Path(scratch, "libraries")
        pins = [f"{name}=={version}" for name, version in versions.items()]
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--only-binary=:all:", "--platform", WHEELS, "--dest", str(wheels), *pins),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=600,
        )
        libraries.mkdir()
        for name, member in RUNTIME.items():
            (wheel,) = wheels.glob(f"{name.replace('-', '_')}-{versions[name]}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (libraries / Path(member).name).write_bytes(archive.read(member))
        try:
            os.rename(libraries, folder)
        except OSError:
            # Another worker of the same test run was faster.
            if not folder.is_dir():
                raise
    return folder


def build(folder: Path) -> ArmEmulator:
    """Emulator whose runner is compiled into `folder`; raises Unavailable with the reason."""
    if shutil.which(QEMU) is None or not (SYSROOT / "lib" / "libstdc++.so.6").exists():
        raise Unavailable(f"no emulator of 64-bit ARM; {PACKAGES}")
    try:
        compiler = find_linker(resolve("rpi4"))
    except ToolchainError as error:
        raise Unavailable(str(error)) from error
    try:
        libraries = fetch_runtime()
    except (subprocess.SubprocessError, OSError) as error:
        raise Unavailable(f"TVM's runtime for ARM could not be fetched: {error}") from error
    include = importlib.util.find_spec("tvm_ffi").submodule_search_locations[0]
    runner = folder / "runner"
    compiler.run(
        [
            *("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-I", f"{include}/include"),
            *("-o", runner, HERE / "runner.c", f"-L{libraries}", "-ltvm_ffi", "-ldl"),
            "-Wl,--allow-shlib-undefined",
        ]
    )
    return ArmEmulator(runner=runner, libraries=libraries)


if __name__ == "__main__":
    sys.stdout.write(f"{fetch_runtime()}\n")
