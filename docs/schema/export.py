"""Write the JSON Schemas of hone's files into this folder: ``python docs/schema/export.py``."""

from __future__ import annotations

import json
from pathlib import Path

from hone import recipe
from hone.packaging import manifest
from hone.report import bench, profile, schema

SCHEMAS = {
    "bench.schema.json": bench.json_schema,
    "package.schema.json": manifest.json_schema,
    "profile.schema.json": profile.json_schema,
    "recipe.schema.json": recipe.json_schema,
    "report.schema.json": schema.json_schema,
}


def texts() -> dict[str, str]:
    """Return the text of each file by its name."""
    return {
        name: json.dumps(make(), indent=2, ensure_ascii=False) + "\n"
        for name, make in SCHEMAS.items()
    }


if __name__ == "__main__":
    for name, text in texts().items():
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")
