from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hone import environment


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_fingerprint_is_json_and_names_no_machine(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    facts = environment.fingerprint(2)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["threads"] == 2
    assert facts["variables"]["OMP_NUM_THREADS"] == "3"
    assert facts["packages"]["apache-tvm"].startswith("0.27.")
    assert isinstance(facts["cpu"], str)
    assert facts["cpu"]
    assert 1 <= facts["cores"] <= facts["processors"]
    assert facts["memory_bytes"] > 1 << 28
    assert facts["python"] == platform.python_version()
    assert socket.gethostname() not in json.dumps(facts).split('"')


def test_fingerprint_imports_nothing_heavy():
    code = (
        "import sys; from hone.environment import fingerprint; fingerprint(1);"
        "print([m for m in ('tvm', 'onnx', 'onnxruntime', 'openvino') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_version_is_none_when_not_installed():
    assert environment.version("no-such-distribution") is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/cpuinfo": "model\t\t: 2\nmodel name\t: AMD EPYC\nstepping\t: 1\n"}, "AMD EPYC"),
        (
            {
                "proc/cpuinfo": "CPU implementer\t: 0x41\nCPU part\t: 0xd08\n",
                "sys/firmware/devicetree/base/model": "Raspberry Pi 4 Model B Rev 1.4\0",
            },
            "Raspberry Pi 4 Model B Rev 1.4",
        ),
        (
            {"proc/cpuinfo": "CPU implementer\t: 0x41\nCPU part\t: 0xd40\n"},
            "implementer 0x41 part 0xd40",
        ),
    ],
    ids=["x86", "board", "arm-server"],
)
def test_cpu_model_is_what_the_kernel_calls_it(tmp_path, files, expected):
    assert environment.cpu_model(write(tmp_path, files)) == expected


def test_cpu_model_is_the_architecture_when_nothing_is_known(tmp_path):
    assert environment.cpu_model(tmp_path) in ("x86_64", "aarch64")


def test_governor_joins_what_differs_and_is_none_when_hidden(tmp_path):
    assert environment.governor(tmp_path) is None
    base = "sys/devices/system/cpu"
    write(
        tmp_path,
        {
            f"{base}/online": "0-1\n",
            f"{base}/cpu0/cpufreq/scaling_governor": "powersave\n",
            f"{base}/cpu1/cpufreq/scaling_governor": "performance\n",
        },
    )
    assert environment.governor(tmp_path) == "performance,powersave"


def test_clock_source_is_none_when_hidden(tmp_path):
    assert environment.clock_source(tmp_path) is None


def test_features_digest_changes_when_the_features_do(monkeypatch):
    before = environment.features_digest()
    assert len(before) == 16
    assert before == environment.features_digest()
    monkeypatch.setattr(environment.features, "available", lambda arch: frozenset({"sse2"}))
    assert environment.features_digest() != before
