from __future__ import annotations

import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from hone.package import Package
from hone.targets.toolchain import zig_version
from hone.verify import relative_error

DIGITS = files("hone.models") / "digits"


def compile_without_toolchain(folder: Path, *options: str) -> Package:
    """Package of ``hone compile`` on a machine whose PATH holds no program."""
    package = folder / "net.hone"
    environment = {**os.environ, "PATH": str(folder)}
    environment.pop("CXX", None)
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from hone.cli.main import main; main()"),
            *("compile", str(DIGITS / "digits.onnx"), *options, "--output", str(package)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return Package.read(package)


@pytest.mark.skipif(zig_version() is None, reason="ziglang is not installed")
@pytest.mark.parametrize(
    ("options", "core"),
    [
        pytest.param(("--target", "rpi4"), "cortex-a72", id="rpi4-fp32"),
        pytest.param(
            (
                "--target",
                "rpi5",
                "--precision",
                "int8",
                "--calibration",
                str(DIGITS / "calibration.npz"),
            ),
            "cortex-a76",
            id="rpi5-int8",
        ),
    ],
)
def test_package_for_a_board_gives_its_golden_outputs_when_emulated(
    arm_emulator, tmp_path, options, core
):
    package = compile_without_toolchain(tmp_path, *options)
    assert package.manifest.target.arch == "aarch64"
    library = tmp_path / "lib.so"
    library.write_bytes(package.library)
    signature = package.signature
    first, second = package.golden()
    for sample, other in ((first, second), (second, first)):
        inputs = [sample.inputs[spec.name] for spec in signature.inputs]
        actual = arm_emulator.run(library, inputs, cpu=core, threads=2)
        for spec, array in zip(signature.outputs, actual, strict=True):
            tolerance = package.manifest.golden.tolerance[spec.name]
            assert relative_error(array, sample.outputs[spec.name]) <= tolerance
            assert relative_error(array, other.outputs[spec.name]) > tolerance, "must tell apart"
