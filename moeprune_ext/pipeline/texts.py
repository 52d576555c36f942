"""A run's text: one part gathers statistics, one is searched on, one chooses among few plans, one is only reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeprune_ext.allocation.selection import LEAST_HELD_OUT
from moeprune_ext.data.batches import TokenBatch, data_fingerprint, split_sequences
from moeprune_ext.data.sources import shares
from moeprune_ext.pipeline.settings import TextSizes

Domains = Mapping[str, Sequence[TokenBatch]]


@dataclass(frozen=True)
class Texts:
    """The parts of the text, {domain: batches} each.

    Attributes:
        calibration: gathers statistics.
        search: what plans are searched on.
        held_out: chooses among the last plans, and how they are repaired.
        test: no choice depends on it.
    """

    calibration: Domains
    search: Domains
    held_out: Domains
    test: Domains

    @property
    def fitted(self) -> list[TokenBatch]:
        """What repair fits: all text that no choice is held out on, each sequence once."""
        once = {}
        for domains in (self.calibration, self.search):
            for batch in flat(domains):
                once[data_fingerprint([batch])] = batch
        return list(once.values())

    def fingerprints(self) -> dict[str, str]:
        """Identifies the parts."""
        return {name: data_fingerprint(flat(domains)) for name, domains in vars(self).items()}


def flat(domains: Domains) -> list[TokenBatch]:
    """Returns the batches of all domains, one domain after the other."""
    return [batch for batches in domains.values() for batch in batches]


def split_texts(domains: Domains, sizes: TextSizes) -> Texts:
    """Splits every domain in the same proportions, its last sequences being the test part.

    Where there is less text than asked for, all parts shrink alike, but the held-out and the test part keep 8 sequences
    each, and calibration also takes what is searched on.

    Args:
        domains: {domain: batches}.
        sizes: in sequences over all domains.

    Raises:
        ValueError: for too little text, with the numbers.
    """
    rows = {name: split_sequences(batches) for name, batches in domains.items()}
    counts = [len(its) for its in rows.values()]
    total = sum(counts)
    if total < 4 * LEAST_HELD_OUT or min(counts) < 4:
        least = f"{LEAST_HELD_OUT} for each of calibration, search, choice and test, 4 of each source"
        raise ValueError(
            f"the data has {total} sequences ({', '.join(f'{name}: {len(its)}' for name, its in rows.items())}), but a "
            f"run needs {4 * LEAST_HELD_OUT} at least: {least}; give more text, or a smaller --sequence-length"
        )
    scale = min(1.0, total / sizes.total)
    test = max(LEAST_HELD_OUT, round(scale * sizes.test_sequences))
    held_out = max(LEAST_HELD_OUT, round(scale * sizes.sequences / 4))
    search = max(LEAST_HELD_OUT, round(scale * sizes.sequences) - held_out)
    parts: dict[str, dict[str, list[TokenBatch]]] = {name: {} for name in Texts.__dataclass_fields__}
    per_domain = zip(*(shares(count, counts) for count in (test, held_out, search)), strict=True)
    for (name, its), (tests, holds, searches) in zip(rows.items(), per_domain, strict=True):
        end = len(its) - tests
        parts["test"][name] = its[end:]
        parts["held_out"][name] = its[end - holds : end]
        parts["search"][name] = its[end - holds - searches : end - holds]
        rest = its[: end - holds - searches] if scale == 1 else its[: end - holds]
        parts["calibration"][name] = rest
    return Texts(**{name: _nonempty(domains) for name, domains in parts.items()})


def _nonempty(domains: dict[str, list[TokenBatch]]) -> dict[str, list[TokenBatch]]:
    return {name: batches for name, batches in domains.items() if batches}
