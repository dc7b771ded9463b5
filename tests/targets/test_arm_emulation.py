from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.targets.target import resolve
from hone.targets.toolchain import find_linker


def _oracle(x: np.ndarray, kernel: np.ndarray, dense: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    hidden = np.maximum(np.einsum("nchwrs,kcrs->nkhw", windows, kernel), 0)
    return hidden.reshape(x.shape[0], -1) @ dense


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (1, 3, 6, 5)).astype("float32")
    kernel = rng.uniform(-1, 1, (4, 3, 3, 3)).astype("float32")
    dense = rng.uniform(-1, 1, (48, 7)).astype("float32")
    builder = relax.BlockBuilder()
    argument = relax.Var("x", relax.TensorType(x.shape, "float32"))
    with builder.function("main", [argument]):
        with builder.dataflow():
            hidden = builder.emit(relax.op.nn.conv2d(argument, relax.const(kernel)))
            hidden = builder.emit(relax.op.nn.relu(hidden))
            flat = builder.emit(relax.op.reshape(hidden, (1, 48)))
            result = builder.emit_output(relax.op.matmul(flat, relax.const(dense)))
        builder.emit_func_output(result)
    # Sums of 27 and of 48 products: |error| <= (27 + 48) * eps * sum of the terms' magnitudes
    # (Higham, Accuracy and Stability of Numerical Algorithms, 3.5).
    magnitude = _oracle(np.abs(x), np.abs(kernel), np.abs(dense)).max()
    tolerance = (27 + 48) * np.finfo(np.float32).eps * magnitude
    return builder.get(), x, _oracle(x, kernel, dense), tolerance


def _library(module: tvm.IRModule, name: str, folder: Path) -> Path:
    target = resolve(name)
    with target.tvm_target(1):
        lowered = relax.get_pipeline("zero")(module)
        executable = tvm.compile(lowered, target.tvm_target(1))
    library = folder / f"{name}.so"
    executable.export_library(str(library), fcompile=find_linker(target).fcompile)
    return library


@pytest.mark.parametrize(
    ("name", "core"), [("rpi4", "cortex-a72"), ("rpi3", "cortex-a53"), ("graviton2", "neoverse-n1")]
)
def test_network_computes_what_numpy_does_when_emulated(
    arm_emulator, network, tmp_path, name, core
):
    module, x, expected, tolerance = network
    library = _library(module, name, tmp_path)
    (actual,) = arm_emulator.run(library, [x], cpu=core)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_run_reports_status_and_reason_when_an_input_is_wrong(arm_emulator, network, tmp_path):
    module, x, *_ = network
    library = _library(module, "rpi4", tmp_path)
    with pytest.raises(RuntimeError, match=r"status 1: main failed: .*shape"):
        arm_emulator.run(library, [x[:, :, :-1]])


def test_library_needs_nothing_but_the_c_library_when_cross_linked(network, tmp_path):
    library = _library(network[0], "rpi4", tmp_path)
    header = library.read_bytes()[:20]
    # ELF, 64 bits, machine 183 (EM_AARCH64) at offset 18.
    assert header[:5] == b"\x7fELF\x02"
    assert int.from_bytes(header[18:20], "little") == 183
    assert b"libstdc++" not in library.read_bytes()


def test_emulator_stops_an_instruction_when_the_core_lacks_it(arm_emulator, tmp_path):
    # The comparison above means something: code for a newer core does not pass on an older one.
    source, program = tmp_path / "sdot.c", tmp_path / "sdot"
    # sdot v0.4s, v1.16b, v2.16b; Armv8.2 with FEAT_DotProd, which Cortex-A72 has not.
    source.write_text('int main(void) { __asm__ volatile(".inst 0x4e829420"); return 0; }\n')
    find_linker(resolve("rpi4")).run(["-o", program, source])
    emulate = ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"]
    statuses = {
        core: subprocess.run([*emulate, "-cpu", core, program], check=False).returncode
        for core in ("max", "cortex-a72")
    }
    assert statuses["max"] == 0
    assert statuses["cortex-a72"] != 0
