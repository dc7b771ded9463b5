from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import hone
from hone import errors
from hone.cli import main

HEAVY = ("tvm", "tvm_ffi", "onnx", "onnxruntime", "numpy", "pydantic", "rich", "jinja2", "xgboost")
GROUPS = {"target", "db"}
COMMANDS = [(verb,) for verb in main.VERBS if verb not in GROUPS] + [
    ("report", "show"),
    ("report", "diff"),
    ("target", "list"),
    ("target", "show"),
    ("db", "stats"),
]


def python(code: str, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **settings
    )


def test_help_lists_every_verb_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom hone.cli.main import run\nassert run(['--help']) == 0\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    shown = python(code)
    assert shown.stderr == ""
    *_, last = shown.stdout.splitlines()
    assert last == "HEAVY []"
    for verb in main.VERBS:
        assert f"\n  {verb} " in shown.stdout


def test_help_of_no_verb_imports_anything_heavy():
    code = (
        "import sys\nfrom hone.cli.main import run\n"
        f"for command in {COMMANDS!r}: assert run([*command, '--help']) == 0\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert python(code).stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_verb_has_an_example_that_names_it(run, command):
    shown = run(*command, "--help")
    assert shown.code == 0
    _, example = shown.out.split("\nExample", 1)
    assert f"  hone {' '.join(command).replace(' show', '', command[0] == 'report')}" in example


def test_every_verb_that_returns_data_has_json(run):
    for command in COMMANDS:
        assert "--json" in run(*command, "--help").out, command


def test_version(run):
    shown = run("--version")
    assert (shown.code, shown.out) == (0, f"hone {hone.__version__}\n")


def test_no_verb_shows_the_help_and_exits_2(run):
    shown = run()
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("Usage: hone")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["buid"], "No such command 'buid'"),
        (["compile", "net.onnx"], "Missing option '-o' / '--output'"),
        (["tune", "net.onnx", "--budget", "soon"], "required is a time such as 60s, 10m or 1h"),
        (["compile", "n.onnx", "-o", "x", "--threads", "0"], "0 is not in the range 1<=x<=1024"),
        (["bench", "n.hone", "--vs", "ort"], "required are names of onnxruntime, openvino"),
        (["report", "show", "r.json", "-o", "x"], "-o needs one of --html, --md, --junit or"),
    ],
)
def test_wrong_usage_exits_2(run, arguments, message):
    shown = run(*arguments)
    assert (shown.code, shown.out) == (2, "")
    assert message in " ".join(shown.err.split())


def kinds_of_error() -> list[type[errors.HoneError]]:
    return [
        c for c in vars(errors).values() if isinstance(c, type) and c.__module__ == "hone.errors"
    ]


@pytest.mark.parametrize("kind", kinds_of_error(), ids=lambda kind: kind.__name__)
def test_errors_exit_with_their_code_and_their_text(run, replace_module, kind):
    def check(*_: object) -> None:
        raise kind("a model is required", where="net.onnx", hint="export it again")

    replace_module("importer", check=check, parse_shape=None)
    shown = run("check", "net.onnx")
    assert shown.code == kind.exit_code
    assert shown.out == ""
    assert shown.err == "error: net.onnx: a model is required\n  hint: export it again\n"


def raising(error: BaseException):
    def check(*_: object) -> None:
        raise error

    return {"check": check, "parse_shape": None}


def test_internal_errors_are_one_line_and_say_how_to_get_the_traceback(run, replace_module):
    replace_module("importer", **raising(ValueError("first line\nsecond line")))
    shown = run("check", "net.onnx")
    assert shown.code == 1
    assert shown.err == (
        "error: internal: ValueError: first line\n"
        "  hint: this is a bug in hone; set HONE_DEBUG=1 for the traceback and report it\n"
    )


def test_traceback_is_shown_when_debugging(run, replace_module, monkeypatch):
    monkeypatch.setenv("HONE_DEBUG", "1")
    replace_module("importer", **raising(errors.UsageError("wrong")))
    shown = run("check", "net.onnx")
    assert shown.code == 2
    assert "Traceback (most recent call last)" in shown.err
    assert shown.err.endswith("error: wrong\n")


def test_warnings_are_one_line_on_stderr(run, replace_module):
    def passes(target: object, threads: int) -> list[tuple[str, str, str]]:
        warnings.warn("3 rows are dropped", stacklevel=2)
        return []

    replace_module("pipeline", passes=passes)
    shown = run("passes", "--json")
    assert (shown.code, shown.data) == (0, {"passes": []})
    assert shown.err == "warning: 3 rows are dropped\n"


def test_interrupt_exits_130(run, replace_module):
    replace_module("importer", **raising(KeyboardInterrupt()))
    shown = run("check", "net.onnx")
    assert (shown.code, shown.out, shown.err) == (130, "", "\nerror: interrupted\n")


@pytest.mark.parametrize(
    "turned_into", [RuntimeError(""), errors.ModelError("cannot be converted")]
)
def test_interrupt_exits_130_when_a_library_makes_another_error_of_it(
    run, replace_module, turned_into
):
    def check(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise turned_into from None

    replace_module("importer", check=check, parse_shape=None)
    shown = run("check", "net.onnx")
    assert (shown.code, shown.out, shown.err) == (130, "", "error: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_waits_until_tvm_is_loaded(run, replace_module, monkeypatch):
    loading = SimpleNamespace(__spec__=SimpleNamespace(_initializing=True))
    steps = []

    def check(*_: object) -> None:
        monkeypatch.setitem(sys.modules, "tvm", loading)
        signal.raise_signal(signal.SIGINT)
        steps.append("loaded")
        loading.__spec__._initializing = False
        time.sleep(30)
        steps.append("not interrupted")

    replace_module("importer", check=check, parse_shape=None)
    assert run("check", "net.onnx").code == 130
    assert steps == ["loaded"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 4.00 TiB"), "Unable to allocate 4.00 TiB"),
        (RuntimeError("std::bad_alloc"), "std::bad_alloc"),
    ],
)
def test_want_of_memory_is_one_of_the_environment(run, replace_module, error, said):
    replace_module("importer", **raising(error))
    shown = run("check", "net.onnx")
    assert (shown.code, shown.err) == (6, f"error: there is not enough memory: {said}\n")


def test_what_the_file_system_refuses_is_one_of_the_environment(run, replace_module):
    replace_module("importer", **raising(NotADirectoryError(20, "Not a directory", "net/records")))
    shown = run("check", "net.onnx")
    assert (shown.code, shown.err) == (6, "error: net/records: Not a directory\n")


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_stdout_that_takes_nothing_is_no_bug(redirection):
    code = "import sys; from hone.cli.main import main; sys.argv[1:] = ['target', 'list']; main()"
    shown = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, code],
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert "internal" not in shown.stderr
    assert "Traceback" not in shown.stderr


def test_closed_pipe_is_quiet(tmp_path):
    code = "import sys; from hone.cli.main import main; sys.argv[1:] = ['target', 'list']; main()"
    reader, writer = os.pipe()
    os.close(reader)
    shown = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert shown.stderr == ""
    assert shown.returncode == 128 + signal.SIGPIPE


def test_option_comes_from_the_environment_and_a_flag_wins(
    run, replace_module, monkeypatch, tmp_path
):
    seen = []

    def passes(target: object, threads: int) -> list[tuple[str, str, str]]:
        seen.append(threads)
        return []

    replace_module("pipeline", passes=passes)
    monkeypatch.setenv("HONE_THREADS", "3")
    assert run("passes", "--json").code == 0
    assert run("passes", "--json", "--threads", "4").code == 0
    assert seen == [3, 4]


def test_every_option_has_a_variable_of_its_own_name(run, replace_module, monkeypatch):
    replace_module("pipeline", passes=lambda *_, **__: [])
    monkeypatch.setenv("HONE_JSON", "1")
    assert run("passes").data == {"passes": []}


def test_wrong_value_in_the_environment_exits_2(run, monkeypatch):
    monkeypatch.setenv("HONE_THREADS", "many")
    shown = run("passes")
    assert shown.code == 2
    assert "'many' is not a valid integer range" in shown.err


def test_verbs_are_one_file_each():
    folder = Path(main.__file__).parent
    for verb in main.VERBS:
        assert (folder / f"{verb}.py").is_file()
