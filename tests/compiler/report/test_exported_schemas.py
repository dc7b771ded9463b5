from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "docs" / "schema"
TEXTS = runpy.run_path(str(FOLDER / "export.py"))["texts"]()


@pytest.mark.parametrize("name", TEXTS)
def test_committed_schema_is_current(name):
    assert (FOLDER / name).read_text(encoding="utf-8") == TEXTS[name], (
        "run: python docs/schema/export.py"
    )


def test_no_other_schema_lies_there():
    assert {path.name for path in FOLDER.glob("*.json")} == set(TEXTS)
