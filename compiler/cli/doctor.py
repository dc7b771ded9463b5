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

    findings = diagnose()
    if as_json:
        output.write_json({"findings": [asdict(finding) for finding in findings]})
    else:
        output.table(
            ("what", "status", "found", "what to do"),
            [(f.name, f.status.value, f.detail, f.hint) for f in findings],
        )
    failed = [finding.name for finding in findings if finding.status is Status.FAILED]
    if failed:
        raise ToolchainError(f"hone cannot compile on this machine: {', '.join(failed)}")
