"""Every shell and Python block of the README and the guide runs, in order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/RESULTS.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNABLE = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
# What a page may show without running it: data, output, a network of boxes.
SHOWN = {"", "toml", "json", "text"}


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(kind, code) for kind, code in BLOCK.findall(page.read_text())]


def test_blocks_are_found_in_every_page_that_has_fences() -> None:
    for page in PAGES:
        assert len(blocks(page)) * 2 == page.read_text().count("\n```"), page.name


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_page_run(page: Path, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "models", ".venv", "benchmarks", "docs"):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = dict(os.environ, PATH=path)
    # The demo in short: the same steps, but a few seconds for each search, and its own folder.
    short = dict(environment, HONE_TUNE="8s", HONE_OUTPUT=str(tmp_path / "demo"))
    for kind, code in blocks(page):
        assert kind in {*RUNNABLE, *SHOWN}, f"{page.name}: no test runs a {kind!r} block"
        if kind in SHOWN:
            continue
        # This very suite is what `make test` runs.
        code = re.sub(r"^make test\b.*$", "", code, flags=re.MULTILINE)
        done = subprocess.run(
            [*RUNNABLE[kind], code],
            cwd=tmp_path,
            env=short if "make demo" in code else environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
