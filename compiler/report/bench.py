"""The document of ``hone bench --json``: everything that ran in one interleaved measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, JsonValue

from hone.report.schema import Comparison, Latency, Ratio, Row

if TYPE_CHECKING:
    from hone.bench import Bench

SCHEMA_ID = "hone.bench/1"


class BenchRow(Row):
    """One contender."""

    name: str = Field(description="file name of the package or model, or name of the runtime")
    precision: str
    latency_ms: Latency
    ratio: dict[str, Ratio] = Field(
        description="speed-up over each runtime: above 1 is faster than it; empty for a runtime"
    )
    ratio_ci95: dict[str, tuple[Ratio, Ratio]]
    outcome: dict[str, Literal["faster", "slower", "noise", "not shown"]] = Field(
        description="not shown: the interval is too wide to say anything"
    )

    def comparison(self, peer: str) -> Comparison | None:
        """Return how this compares with a runtime; None for a runtime."""
        if peer not in self.ratio:
            return None
        return Comparison(
            ratio=self.ratio[peer], ci95=self.ratio_ci95[peer], outcome=self.outcome[peer]
        )


class BenchResult(Row):
    """The whole document."""

    schema_id: Literal["hone.bench/1"] = Field(default="hone.bench/1", alias="schema")
    threads: Annotated[int, Field(ge=1)]
    results: Annotated[list[BenchRow], Field(min_length=1)]
    environment: dict[str, JsonValue]

    @classmethod
    def of(cls, bench: Bench) -> Self:
        """Take over what `hone.bench.bench` returned."""
        rows = [
            BenchRow(
                name=result.name,
                precision=result.precision,
                latency_ms=Latency.of(result.latency),
                ratio={peer: speedup.ratio for peer, speedup in result.ratio.items()},
                ratio_ci95={peer: speedup.ci95 for peer, speedup in result.ratio.items()},
                outcome={peer: speedup.outcome.value for peer, speedup in result.ratio.items()},
            )
            for result in bench.results
        ]
        return cls.model_validate(
            {"threads": bench.threads, "results": rows, "environment": bench.environment}
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return self.model_dump(mode="json", by_alias=True)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the document."""
    schema = BenchResult.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": SCHEMA_ID}
