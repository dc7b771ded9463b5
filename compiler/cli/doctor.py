"""``hone doctor``: whether everything is there."""

from __future__ import annotations

from dataclasses import asdict

from hone.cli import options, output
from hone.cli.command import verb
from hone.errors import ToolchainError


@verb("doctor", example="hone doctor")
@options.as_json
def doctor(as_json: bool) -> None:
    """Check versions, runtime, processor, linkers and extras; exit 6 when hone cannot compile."""
    from hone.doctor import Status, diagnose

    checks = diagnose()
    if as_json:
        output.write_json({"checks": [asdict(check) for check in checks]})
    else:
        output.table(
            ("what", "status", "found", "what to do"),
            [(c.name, c.status.value, c.detail, c.fix or "") for c in checks],
        )
    failed = [check.name for check in checks if check.required and check.status is Status.MISSING]
    if failed:
        raise ToolchainError(f"hone cannot compile on this machine without {', '.join(failed)}")
