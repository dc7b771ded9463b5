from __future__ import annotations

import os
import shutil
import sys
from collections import namedtuple

import pytest

from hone import doctor
from hone.doctor import Check, Status, diagnose
from hone.errors import ToolchainError
from hone.targets import features


def only(checks, name: str) -> Check:
    (check,) = (check for check in checks if check.name == name)
    return check


@pytest.fixture
def versions(monkeypatch):
    """Installed versions, which a test may change."""
    found: dict[str, str | None] = {name: "1" for name, _, _ in doctor._requirements()}
    found.update({"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"})
    monkeypatch.setattr(doctor, "version", found.get)
    return found


def test_diagnose_finds_this_machine_fit():
    checks = diagnose()
    assert [c for c in checks if c.required and c.status is not Status.OK] == []
    assert len({check.name for check in checks}) == len(checks)
    assert only(checks, "apache-tvm-ffi").detail == "0.1.14.post1"
    assert only(checks, "code for aarch64").status is Status.OK
    for check in checks:
        assert check.detail
        assert (check.fix is None) == (check.status is Status.OK)


def test_dependency_is_missing_when_its_version_is_not_the_pin(versions):
    versions["apache-tvm-ffi"] = "0.1.15"
    assert only(doctor._dependencies(), "apache-tvm-ffi") == Check(
        name="apache-tvm-ffi",
        status=Status.MISSING,
        detail="0.1.15 is installed, and hone is built for 0.1.14.post1 alone",
        fix="pip install 'apache-tvm-ffi==0.1.14.post1'",
        required=True,
    )


def test_dependency_is_required_when_it_belongs_to_no_extra(versions):
    versions.update({"openvino": None, "xgboost": None})
    extra = only(doctor._dependencies(), "openvino")
    assert (extra.status, extra.required) == (Status.MISSING, False)
    assert extra.detail == "not installed (extra 'compare')"
    assert extra.fix == "pip install 'hone-compiler[compare]'"
    core = only(doctor._dependencies(), "xgboost")
    assert (core.status, core.required) == (Status.MISSING, True)
    assert core.fix.startswith("pip install 'xgboost")


def test_dependencies_leave_out_what_only_developers_need(versions):
    names = {check.name for check in doctor._dependencies()}
    assert {"numpy", "ziglang", "jinja2"} <= names
    assert not names & {"pytest", "mypy", "ruff"}


def test_compiler_is_missing_when_tvm_does_not_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm.target", None)
    (check,) = doctor._compiler()
    assert (check.status, check.required) == (Status.MISSING, True)
    assert "cannot be loaded" in check.detail
    assert check.fix == (
        "pip install --force-reinstall 'apache-tvm==0.27.0.post1' 'apache-tvm-ffi==0.1.14.post1'"
    )


def test_linker_is_missing_when_there_is_none(monkeypatch):
    def find_linker(target):
        raise ToolchainError("there is none.", hint="pip install it")

    monkeypatch.setattr(doctor, "find_linker", find_linker)
    host, boards = doctor._linkers()
    assert (host.status, host.required, host.fix) == (Status.MISSING, True, "pip install it")
    assert (boards.status, boards.required) == (Status.MISSING, False)


def test_emulator_is_missing_when_qemu_is(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    (check,) = doctor._emulator()
    assert check.status is Status.MISSING
    assert check.fix.startswith("apt-get install qemu-user-static")


def test_space_warns_when_the_disk_is_full(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 100, 3 << 20))
    monkeypatch.setattr(doctor, "memory_limit", lambda: 1 << 30)
    assert {check.name: check.status for check in doctor._space()} == {
        "disk": Status.WARNING,
        "scratch disk": Status.WARNING,
        "memory": Status.WARNING,
    }


def test_measuring_warns_when_the_machine_disturbs(monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0)) + 1))
    monkeypatch.setattr(doctor, "governor", lambda: "powersave")
    monkeypatch.setattr(doctor, "clock_source", lambda: "hpet")
    monkeypatch.setattr(os, "getloadavg", lambda: (64.0, 1.0, 1.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    checks = list(doctor._measuring())
    for name in ("TVM_NUM_THREADS", "frequency governor", "clock", "load"):
        assert only(checks, name).status is Status.WARNING
    assert only(checks, "TVM_NUM_THREADS").fix == "unset TVM_NUM_THREADS, and use --threads"


def test_measuring_is_content_when_the_machine_is_quiet(monkeypatch):
    for name in doctor.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # What `import hone` sets is no reason to warn.
    monkeypatch.setenv("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    monkeypatch.setattr(doctor, "governor", lambda: "performance")
    monkeypatch.setattr(doctor, "clock_source", lambda: "tsc")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.3, 0.0, 0.0))
    assert {check.status for check in doctor._measuring()} == {Status.OK}


@pytest.mark.skipif(features.machine() != "x86_64", reason="XCR0 and AMX are of x86")
def test_processor_warns_when_the_system_withholds_extensions(monkeypatch):
    monkeypatch.setattr(
        features, "parse_cpuinfo", lambda text: frozenset({"amx_tile", "amx_int8", "sse2"})
    )
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 0.5)
    checks = list(doctor._processor())
    if "amx-tile" not in features.available("x86_64"):
        assert only(checks, "operating system").detail == (
            "does not let processes use amx-int8, amx-tile, which the processor has"
        )
    assert only(checks, "container").status is Status.WARNING


def test_processor_is_missing_when_the_architecture_is_another(monkeypatch):
    def resolve(name):
        raise ToolchainError("this machine is 'riscv64'.", hint="name a target")

    monkeypatch.setattr(doctor, "resolve", resolve)
    (check,) = doctor._processor()
    assert (check.status, check.required, check.fix) == (Status.MISSING, True, "name a target")
