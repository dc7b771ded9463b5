from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hone.errors import ToolchainError
from hone.targets import features, toolchain
from hone.targets.target import Target, resolve
from hone.targets.toolchain import Linker, find_linker

FOREIGN = {"x86_64": "rpi4", "aarch64": "x86-64-v3"}[features.machine()]
SOURCE = "#include <math.h>\nstatic int g; float f(float x) { return expf(x) + g++; }\n"
needs_zig = pytest.mark.skipif(toolchain.zig_version() is None, reason="ziglang is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no c++")


@pytest.fixture
def no_zig(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ziglang" else real(name)
    )


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine whose PATH holds no program at all."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def fake_compiler(folder: Path, name: str, version: str = "13.3.1") -> Path:
    program = folder / name
    program.write_text(f"#!/bin/sh\necho '{name} (Someone) {version}'\n")
    program.chmod(0o755)
    return program


def build(linker: Linker, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    source, compiled, library = folder / f"{name}.c", folder / f"{name}.o", folder / f"{name}.so"
    source.write_text(SOURCE)
    linker.run(["-c", "-O1", "-fPIC", "-o", compiled, source])
    linker.link([compiled], library)
    return library


def linkers() -> list:
    found = [pytest.param("host", toolchain._system, marks=needs_compiler, id="system")]
    for name in ("host", FOREIGN):
        found.append(pytest.param(name, toolchain._zig, marks=needs_zig, id=f"zig-{name}"))
    return found


@pytest.mark.parametrize(("name", "finder"), linkers())
def test_link_is_the_same_bytes_in_any_folder_and_process(tmp_path, name, finder):
    linker = finder(resolve(name))
    first = build(linker, tmp_path / "a", "one")
    second = build(linker, tmp_path / "b" / "deeper", "another")
    assert first.read_bytes() == second.read_bytes()
    again = tmp_path / "third.so"
    code = (
        "import sys; from pathlib import Path; from hone.targets.target import resolve;"
        "from hone.targets import toolchain;"
        f"toolchain.{finder.__name__}(resolve({name!r})).link([Path(sys.argv[1])], "
        "Path(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(first.with_suffix(".o")), str(again)],
        check=True,
        cwd=tmp_path,
    )
    assert (
        hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(first.read_bytes()).digest()
    )


@pytest.mark.parametrize(("name", "finder"), linkers())
def test_link_needs_only_the_c_library(tmp_path, name, finder):
    library = build(finder(resolve(name)), tmp_path / "a", "one").read_bytes()
    assert b"libm.so.6" in library
    assert b"libstdc++" not in library
    assert b"libc++" not in library


@needs_compiler
def test_host_is_linked_by_the_system_when_it_has_a_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    linker = find_linker(resolve("host"))
    assert linker.name == "c++"
    assert linker.version[0].isdigit()
    assert linker.command == (shutil.which("c++"),)


def test_cxx_decides_when_it_is_set(no_compiler, monkeypatch):
    program = fake_compiler(no_compiler, "my-c++")
    monkeypatch.setenv("CXX", "my-c++ -m64")
    linker = find_linker(resolve("host"))
    assert linker == Linker(
        name="my-c++",
        version="13.3.1",
        command=(str(program), "-m64"),
        triple=resolve("host").triple,
    )


def test_cxx_is_an_error_when_it_is_not_there(no_compiler, monkeypatch):
    monkeypatch.setenv("CXX", "icpx-9000")
    with pytest.raises(ToolchainError) as error:
        find_linker(resolve("host"))
    assert str(error.value) == (
        "the environment variable CXX names the compiler 'icpx-9000', which is not there or does "
        "not answer to --version.\n"
        "  hint: correct CXX, or unset it and hone looks for c++, g++ and clang++."
    )


@pytest.mark.usefixtures("no_compiler")
@needs_zig
@pytest.mark.parametrize("name", ["host", "rpi4", "generic"])
def test_zig_links_when_there_is_no_compiler(name):
    target = resolve(name)
    linker = find_linker(target)
    assert linker.name == "ziglang"
    assert linker.command[-2:] == ("-target", f"{target.triple}.2.28")


@pytest.mark.usefixtures("no_compiler")
@needs_zig
def test_zig_really_links_when_there_is_no_compiler(tmp_path):
    library = build(find_linker(resolve("host")), tmp_path / "lib", "one")
    assert library.read_bytes()[:4] == b"\x7fELF"


@needs_zig
def test_zig_comes_before_the_system_when_the_c_library_is_pinned():
    target = dataclasses.replace(resolve("host"), glibc="2.31")
    linker = find_linker(target)
    assert linker.command[-1] == f"{target.triple}.2.31"


@pytest.mark.usefixtures("no_zig")
def test_cross_compiler_serves_when_zig_is_missing(no_compiler):
    triple = resolve(FOREIGN).triple
    program = fake_compiler(no_compiler, f"{triple}-gcc", "12.2.0")
    linker = find_linker(resolve(FOREIGN))
    assert linker == Linker(
        name=f"{triple}-gcc", version="12.2.0", command=(str(program),), triple=triple
    )


@pytest.mark.usefixtures("no_zig")
def test_system_serves_a_pinned_target_of_this_architecture_when_zig_is_missing(no_compiler):
    fake_compiler(no_compiler, "g++")
    target: Target = dataclasses.replace(resolve("host"), glibc="2.28")
    assert find_linker(target).name == "g++"


@pytest.mark.usefixtures("no_zig", "no_compiler")
def test_find_linker_says_what_to_install_when_there_is_none():
    target = resolve("host")
    with pytest.raises(ToolchainError) as error:
        find_linker(target)
    assert str(error.value) == (
        f"linking a library for target 'host' ({target.triple}) needs a C or C++ compiler or the "
        "ziglang package, and there is neither (looked for c++, g++, clang++, cc, gcc, clang on "
        "PATH).\n"
        "  hint: pip install 'hone-compiler[cross]'"
    )
    assert error.value.exit_code == 6


@pytest.mark.usefixtures("no_zig", "no_compiler")
def test_find_linker_names_the_cross_compilers_when_there_is_none():
    with pytest.raises(ToolchainError) as error:
        find_linker(resolve(FOREIGN))
    triple = resolve(FOREIGN).triple
    assert str(error.value) == (
        f"linking a library for target '{FOREIGN}' ({triple}) needs a C or C++ compiler or the "
        f"ziglang package, and there is neither (looked for {triple}-g++, {triple}-gcc on PATH).\n"
        "  hint: pip install 'hone-compiler[cross]'"
    )


def test_compiler_is_passed_over_when_it_does_not_work(no_compiler):
    broken = fake_compiler(no_compiler, "c++")
    broken.write_text("#!/bin/sh\nexit 1\n")
    fake_compiler(no_compiler, "g++", "9.4.0")
    assert find_linker(resolve("host")).name == "g++"


@needs_compiler
def test_link_reports_what_the_linker_said_when_it_fails(tmp_path):
    linker = find_linker(resolve("host"))
    missing = tmp_path / "missing.o"
    with pytest.raises(ToolchainError) as error:
        linker.link([missing], tmp_path / "out.so")
    text = str(error.value)
    assert text.startswith(f"{linker.command[0]} -shared")
    assert "the linker failed with status 1:\n" in text
    assert "missing.o" in text
    assert text.endswith("hint: `hone doctor` shows which linker hone uses.")


@needs_zig
def test_link_says_where_the_cache_may_go_when_there_is_no_home(monkeypatch, tmp_path):
    for name in ("HOME", "XDG_CACHE_HOME", "ZIG_GLOBAL_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ToolchainError) as error:
        find_linker(resolve(FOREIGN)).link([tmp_path / "x.o"], tmp_path / "x.so")
    assert str(error.value).endswith(
        "hint: set ZIG_GLOBAL_CACHE_DIR to a folder that can be written (by default ~/.cache/zig)."
    )


def test_run_reports_when_the_program_is_gone(tmp_path):
    linker = Linker(name="x", version="1", command=(str(tmp_path / "gone"),), triple="t")
    with pytest.raises(ToolchainError, match=r"the linker could not be run: .*No such file"):
        linker.run(["--version"])


def test_fcompile_tells_tvm_its_formats():
    fcompile = find_linker(resolve("host")).fcompile
    assert (fcompile.output_format, fcompile.object_format) == ("so", "o")
    assert fcompile.get_target_triple() == resolve("host").triple


def test_install_line_names_the_extra_of_this_package():
    text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert 'name = "hone-compiler"' in text
    assert "\ncross = [" in text
    assert toolchain.INSTALL_ZIG == "pip install 'hone-compiler[cross]'"
