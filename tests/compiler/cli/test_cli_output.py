from __future__ import annotations

import json

import pytest

from hone.cli import output


def test_table_in_a_pipe_is_aligned_and_never_cut(capsys):
    output.table(("name", "ms"), [("x" * 300, "1.5"), ("[red]b[/red]", "10")], right=" >")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "ms"]
    assert lines[1] == "x" * 300 + "  1.5"
    assert lines[2].startswith("[red]b[/red]")
    assert lines[2].endswith("   10")


def test_pairs_are_aligned(capsys):
    output.pairs([("a", 1), ("long", None)])
    assert capsys.readouterr().out == "a     1\nlong  None\n"


def test_json_refuses_what_json_cannot_say():
    with pytest.raises(ValueError, match="JSON"):
        output.write_json({"x": float("nan")})


def test_json_is_one_document(capsys):
    output.write_json({"x": [1, "ü"]})
    assert json.loads(capsys.readouterr().out) == {"x": [1, "ü"]}


def test_notes_go_to_stderr(capsys):
    output.note("wrote x")
    assert capsys.readouterr() == ("", "wrote x\n")
