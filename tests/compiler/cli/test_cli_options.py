from __future__ import annotations

from pathlib import Path

import click
import pytest

from hone.cli import options
from hone.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("60s", 60), ("10m", 600), ("1h", 3600), ("1.5h", 5400), ("2 min", 120)],
)
def test_duration_reads_what_people_write(text, seconds):
    assert options.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-3", "10x", "m", "1h30", "nan", "inf"])
def test_duration_refuses_anything_else(text):
    with pytest.raises(click.BadParameter, match="required is a time such as 60s, 10m or 1h"):
        options.duration(text)


@pytest.mark.parametrize(
    ("text", "share"), [("3%", 0.03), ("0.03", 0.03), ("0", 0), ("2.5 %", 0.025)]
)
def test_percentage_reads_both_ways(text, share):
    assert options.percentage(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "-3%", "three"])
def test_percentage_refuses_anything_else(text):
    with pytest.raises(click.BadParameter, match=r"required is a share such as 3% or 0\.03"):
        options.percentage(text)


def test_names_are_taken_once_and_in_order():
    assert options.names("a", "b")("b, a,b") == ("b", "a")
    assert options.names("a")("") == ()


def test_names_refuses_unknown_ones():
    with pytest.raises(click.BadParameter, match="required are names of a, b, given is 'c'"):
        options.names("a", "b")("a,c")


def test_default_threads_are_at_most_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert options.default_threads() == 1
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert options.default_threads() == 2


def test_read_shapes_keeps_colons_in_names():
    assert options.read_shapes(["a:0:[1,3]", "b:[2]"]) == {"a:0": (1, 3), "b": (2,)}


def test_read_shapes_refuses_two_shapes_of_one_input():
    with pytest.raises(UsageError, match=r"input 'a' is given two shapes, \[1, 3\] and \[2, 3\]"):
        options.read_shapes(["a:[1,3]", "a:[2,3]"])
    assert options.read_shapes(["a:[1,3]", "a:[1,3]"]) == {"a": (1, 3)}


def test_writable_refuses_folders_and_what_the_verb_reads(tmp_path):
    model = tmp_path / "net.onnx"
    model.write_text("model")
    options.writable(tmp_path / "net.hone", model)
    for to, message in {
        tmp_path: "this is a folder, required is the name of a file",
        tmp_path / "no" / "net.hone": f"the folder {tmp_path}/no does not exist",
        tmp_path / "." / "net.onnx": "the result would take the place of what is read",
        Path("/proc/net.hone"): "cannot write: No such file or directory",
    }.items():
        with pytest.raises(UsageError) as info:
            options.writable(to, model)
        assert str(info.value) == f"-o {to}: {message}"
