"""What a run's plans are worth on text that nothing was fitted to, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moeprune_ext.intervals import Interval
from moeprune_ext.tables import markdown_table


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model: what is measured.
        esap: on the test text, with its interval.
        perplexity: on the test text, with its interval.
        ratio: of the perplexity to the full model's, on the same sequences, with its interval.
        domains: {domain: ESAP, with its interval}.
        experts: routed experts stored.
        disk: bytes of the weights' files.
        memory: bytes when served: weights, and the KV cache of models.costs.CONTEXT tokens.
        active: parameters that a token passes.
    """

    model: str
    esap: Interval
    perplexity: Interval
    ratio: Interval
    domains: dict[str, Interval]
    experts: int
    disk: int
    memory: int
    active: int


@dataclass(frozen=True)
class Measured:
    """What a run ends with.

    Attributes:
        rows: full, uniform by the default criterion, the plan before repair, and after.
        gain: ESAP of the last row over the uniform plan's, or over the plan's before repair if there is none.
        sequences: of the test text.
    """

    rows: list[Row]
    gain: Interval
    sequences: int

    @property
    def against(self) -> str:
        """What the gain is over; empty where the last row has nothing to be compared with."""
        if len(self.rows) < 3:
            return ""
        return "uniform pruning by REAP" if self.rows[1].model.startswith("uniform") else "the plan before repair"

    @property
    def gained(self) -> str:
        """Says in a sentence what was gained; empty where there is nothing to compare with."""
        if not self.against:
            return ""
        gain = self.gain
        known = "more than chance" if gain.above_zero else "a loss beyond chance" if gain.below_zero else "maybe chance"
        return (
            f"Against {self.against} the checkpoint gains {gain.value:+.4f} ESAP (95 % interval {gain.low:+.4f} to "
            f"{gain.high:+.4f}, the same sequences for both): {known}."
        )

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        rows = [
            {
                **asdict(row),
                "esap": row.esap.as_json(),
                "perplexity": row.perplexity.as_json(),
                "ratio": row.ratio.as_json(),
                "domains": {domain: esap.as_json() for domain, esap in row.domains.items()},
            }
            for row in self.rows
        ]
        return {"rows": rows, "gain": self.gain.as_json(), "sequences": self.sequences}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Measured:
        """Reads what `as_json` returned.

        Raises:
            ValueError: for figures without intervals, which an earlier version wrote.
        """
        rows = []
        for row in content["rows"]:
            if "ratio" not in row:
                raise ValueError(
                    "the figures are of an earlier version of this package; remove measured.json and result.json from "
                    "the run's directory, and the same prune command measures again"
                )
            domains = {domain: Interval.from_json(esap) for domain, esap in row["domains"].items()}
            read = {name: Interval.from_json(row[name]) for name in ("esap", "perplexity", "ratio")}
            rows.append(Row(**{**row, **read, "domains": domains}))
        return cls(rows, Interval.from_json(content["gain"]), int(content["sequences"]))


QUALITY = ["held-out ESAP (95 %)", "perplexity (95 %)", "of the full model's (95 %)"]
HEADER = ["model", *QUALITY, "on disk", "served", "active"]


def cells(row: Row) -> list[str]:
    """Returns a row's cells under HEADER."""
    return [
        row.model,
        f"{row.esap:.4f}",
        f"{row.perplexity:.2f}",
        f"{row.ratio:.3f}",
        size_text(row.disk),
        size_text(row.memory),
        count_text(row.active),
    ]


def format_table(measured: Measured) -> str:
    """Returns the rows as a Markdown table."""
    return markdown_table(HEADER, [cells(row) for row in measured.rows])


def size_text(count: int) -> str:
    """Returns bytes as GB (10^9) or MB (10^6)."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def count_text(count: int) -> str:
    """Returns a number of parameters in millions or billions."""
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:,.2f} B"
