from __future__ import annotations

import re

import numpy as np
import pytest

import hone
import hone.models
from hone import driver, pipeline, runtime
from hone.targets import features
from hone.targets.target import resolve

LEVELS = ("generic", "x86-64-v2", "x86-64-v3", "x86-64-v4", "skylake-avx512", "zen4")
# Sums of up to 576 products in another order: sqrt(576) * eps of outputs of about 10, ten times.
TOLERANCE = 10 * 24 * np.finfo(np.float32).eps * 10

pytestmark = pytest.mark.skipif(features.machine() != "x86_64", reason="levels are of x86")


@pytest.fixture(scope="module")
def digits():
    model = hone.load(hone.models.build("digits-cnn"))
    (spec,) = model.signature.inputs
    inputs = {spec.name: np.random.default_rng(0).uniform(0, 1, spec.shape).astype(spec.dtype)}
    package = driver.assemble(model, target=resolve("host"), threads=1).package
    return model, inputs, runtime.load(package, threads=1).run(inputs)


@pytest.mark.parametrize("name", LEVELS)
def test_portable_package_agrees_with_the_host_when_it_can_run_here(digits, name):
    model, inputs, expected = digits
    target = resolve(name)
    if lacking := features.missing(target.features, target.arch):
        pytest.skip(f"this machine lacks {', '.join(lacking)}")
    package = driver.assemble(model, target=target, threads=1).package
    actual = runtime.load(package, threads=1).run(inputs)
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        ("generic", r"\bmulps\b.*xmm", r"[yz]mm\d|vfmadd|vpdpbusd"),
        ("zen3", r"vfmadd\w+ps.*ymm", r"zmm\d|vpdpbusd"),
        ("icelake-server", r"vfmadd\w+ps.*zmm", r"tdpb"),
    ],
)
def test_kernels_use_what_the_target_has_and_nothing_else(digits, name, present, absent):
    target = resolve(name)
    lowered = pipeline.lower(digits[0].module, target, threads=1)
    scheduled = pipeline.schedule(lowered, target, threads=1)
    executable = pipeline.build_executable(scheduled.module, target, threads=1)
    (library,) = (module for module in executable.mod.imports if module.kind == "llvm")
    assembly = library.inspect_source("asm")
    assert re.search(present, assembly) is not None
    assert re.search(absent, assembly) is None
