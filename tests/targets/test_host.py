from __future__ import annotations

import os
from pathlib import Path

import pytest

from hone.errors import ToolchainError
from hone.targets import features, host
from hone.targets.target import resolve


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cpu(number: int, **files: str) -> dict[str, str]:
    base = f"sys/devices/system/cpu/cpu{number}"
    return {f"{base}/{name.replace('__', '/')}": text for name, text in files.items()}


def cache(number: int, index: int, level: int, kind: str, size: str, shared: str) -> dict[str, str]:
    base = f"sys/devices/system/cpu/cpu{number}/cache/index{index}"
    return {
        f"{base}/level": f"{level}\n",
        f"{base}/type": f"{kind}\n",
        f"{base}/size": f"{size}\n",
        f"{base}/shared_cpu_list": f"{shared}\n",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("\n", set()), ("0,2-3", {0, 2, 3})],
)
def test_parse_cpu_list_reads_ranges(text, expected):
    assert host.parse_cpu_list(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("48K\n", 49152), ("2M", 2 * 1024**2), ("512", 512), ("1G", 1024**3)]
)
def test_parse_size_reads_units(text, expected):
    assert host.parse_size(text) == expected


def test_physical_cores_count_hardware_threads_once(tmp_path):
    root = write(
        tmp_path,
        {
            **cpu(0, topology__core_cpus_list="0,2\n"),
            **cpu(2, topology__core_cpus_list="0,2\n"),
            **cpu(1, topology__thread_siblings_list="1,3\n"),  # before Linux 5.5
            **cpu(3, topology__thread_siblings_list="1,3\n"),
        },
    )
    assert host.physical_cores({0, 1, 2, 3}, root) == 2
    assert host.physical_cores({0, 1}, root) == 2
    assert host.physical_cores({0, 2}, root) == 1


def test_physical_cores_are_processors_when_sysfs_is_hidden(tmp_path):
    assert host.physical_cores({0, 1, 5}, tmp_path) == 3


def test_caches_share_the_second_level_among_cores(tmp_path):
    # A Raspberry Pi 4: 1 MiB for four cores; no third level.
    root = write(
        tmp_path,
        {
            **cache(0, 0, 1, "Data", "32K", "0"),
            **cache(0, 1, 1, "Instruction", "48K", "0"),
            **cache(0, 2, 2, "Unified", "1024K", "0-3"),
        },
    )
    assert host.caches(0, root) == host.Caches(l1d_bytes=32768, l2_bytes=262144, l3_bytes=0)


def test_caches_do_not_share_among_threads_of_one_core(tmp_path):
    root = write(
        tmp_path,
        {
            **cache(0, 0, 1, "Data", "48K", "0,2"),
            **cache(0, 2, 2, "Unified", "2048K", "0,2"),
            **cache(0, 3, 3, "Unified", "105M", "0-3"),
            **cpu(0, topology__core_cpus_list="0,2"),
            **cpu(2, topology__core_cpus_list="0,2"),
        },
    )
    found = host.caches(0, root)
    assert (found.l2_bytes, found.l3_bytes) == (2 * 1024**2, 105 * 1024**2)


def test_caches_are_zero_when_sysfs_reports_none(tmp_path):
    assert host.caches(0, tmp_path) == host.Caches()


def test_usable_cores_obey_affinity_and_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert host.usable_cores(tmp_path) == 4
    limit = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}
    assert host.usable_cores(write(tmp_path, limit)) == 2


def test_arm_core_is_generic_unless_all_cores_are_of_one_known_kind():
    def info(*parts: str) -> str:
        return "".join(f"CPU implementer\t: 0x41\nCPU part\t: {part}\n\n" for part in parts)

    assert host.arm_core(info("0xd0b", "0xd0b")) == "cortex-a76"
    assert host.arm_core(info("0xd05", "0xd0b")) == "generic"
    assert host.arm_core(info("0xfff")) == "generic"
    assert host.arm_core("") == "generic"


def test_host_uses_only_what_is_available():
    target = resolve("host")
    assert target.name == "host"
    assert target.arch == features.machine()
    assert features.missing(target.features, target.arch) == ()
    assert 1 <= target.cores <= len(os.sched_getaffinity(0))
    assert target.l1d_bytes >= 16 * 1024
    assert target.l2_bytes >= target.l1d_bytes


def test_host_is_refused_when_the_architecture_is_neither(monkeypatch):
    monkeypatch.setattr(host, "machine", lambda: "riscv64")
    with pytest.raises(ToolchainError) as error:
        resolve("host")
    assert str(error.value) == (
        "hone generates code for x86_64 and aarch64, and this machine is 'riscv64'.\n"
        "  hint: compile for a named target instead; `hone target list` shows them all."
    )


def test_host_switches_off_what_an_arm_core_lacks(monkeypatch):
    usable = frozenset({"fp-armv8", "neon", "crc", "dotprod"})
    monkeypatch.setattr(host, "machine", lambda: "aarch64")
    monkeypatch.setattr(host, "available", lambda arch: usable)
    monkeypatch.setattr(host, "_read", lambda path: "CPU implementer : 0x41\nCPU part : 0xd0b\n")
    monkeypatch.setattr(host, "caches", lambda processor: host.Caches())
    monkeypatch.setattr(host, "usable_cores", lambda: 4)
    target = host.detect()
    assert (target.mcpu, target.tensor_instructions) == ("cortex-a76", ("dotprod",))
    assert set(target.disabled) == features.known("aarch64") - usable
    attributes = target.llvm(4)["mattr"]
    assert {"+dotprod", "-aes", "-lse", "-fullfp16"} <= set(attributes)
    assert "caches: not reported by sysfs, the least that such cores have" in target.sources


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", False),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 26\n", False),
        ("", False),
    ],
    ids=["Zen 5", "Zen 4", "another vendor", "nothing said"],
)
def test_separate_adders_are_known_by_family(cpuinfo, expected):
    assert host.has_separate_adders(cpuinfo) is expected
