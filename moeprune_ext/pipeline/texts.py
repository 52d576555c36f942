"""A run's text: one part gathers statistics, one is searched on, one chooses among few plans, one is only reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeprune_ext.allocation.selection import LEAST_HELD_OUT
from moeprune_ext.data.batches import TokenBatch, data_fingerprint, split_sequences
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
    each, and calibration also takes what is searched on. Parts are cut between sequences: of packed texts, one that
    lies across a cut is in two parts.

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
        needed = f"{LEAST_HELD_OUT} for each of calibration, search, choice and test, 4 of each source"
        raise ValueError(
            f"the data has {total} sequences ({', '.join(f'{name}: {len(its)}' for name, its in rows.items())}), but a "
            f"run needs {4 * LEAST_HELD_OUT} at least: {needed}; give more text, or a smaller --sequence-length"
        )
    scale, least = min(1.0, total / sizes.total), LEAST_HELD_OUT
    test = min(max(least, round(scale * sizes.test_sequences)), total - 3 * least)
    held_out = min(max(least, round(scale * sizes.sequences / 4)), total - test - 2 * least)
    search = min(max(least, round(scale * sizes.sequences) - held_out), total - test - held_out - least)
    left, dealt = counts, []
    for later, count in ((3, test), (2, held_out), (1, search)):  # parts that are still to come
        dealt.append(_dealt(left, counts, count, later))
        left = [n - part for n, part in zip(left, dealt[-1], strict=True)]
    parts: dict[str, dict[str, list[TokenBatch]]] = {name: {} for name in Texts.__dataclass_fields__}
    for (name, its), (tests, holds, searches) in zip(rows.items(), zip(*dealt, strict=True), strict=True):
        end = len(its) - tests
        parts["test"][name] = its[end:]
        parts["held_out"][name] = its[end - holds : end]
        parts["search"][name] = its[end - holds - searches : end - holds]
        rest = its[: end - holds - searches] if scale == 1 else its[: end - holds]
        parts["calibration"][name] = rest
    return Texts(**parts)


def _dealt(left: list[int], counts: list[int], count: int, later: int) -> list[int]:
    """Deals a part out to the sources in proportion: one each at least, `later` left of each.

    Args:
        left: sequences of each source that are not dealt out yet.
        counts: all sequences of each source.
        count: of the part.
        later: parts that are still to come.
    """
    part = [1] * len(left)
    for _ in range(count - len(left)):
        behind = [
            (count * n / sum(counts) - has, -i)
            for i, (n, has, there) in enumerate(zip(counts, part, left, strict=True))
            if there - has > later
        ]
        if behind:
            part[-max(behind)[1]] += 1
    return part
