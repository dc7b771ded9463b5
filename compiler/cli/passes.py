"""``hone passes``: what happens between a model and machine code."""

from __future__ import annotations

from hone.cli import options, output
from hone.cli.command import verb


@verb("passes", example="hone passes --target rpi4")
@options.target
@options.threads
@options.as_json
def passes(target: str, threads: int, as_json: bool) -> None:
    """List the passes in the order in which they run for a target."""
    from hone.pipeline import passes as stages
    from hone.targets.target import resolve

    rows = stages(resolve(target), threads=threads)
    if as_json:
        output.write_json(
            {"passes": [{"phase": p, "name": n, "summary": summary} for p, n, summary in rows]}
        )
        return
    output.table(("phase", "pass", "what it does"), rows)
