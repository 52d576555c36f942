"""How a run's text is split."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_tokens

from moeprune_ext.data.batches import as_batches, data_fingerprint, split_sequences
from moeprune_ext.pipeline.settings import TextSizes
from moeprune_ext.pipeline.texts import split_texts


def domains_of(counts):
    tokens = random_tokens(sum(counts), 8).split(counts)
    return {f"d{i}": as_batches([rows]) for i, rows in enumerate(tokens)}


def keys(domains):
    return [data_fingerprint([batch]) for batches in domains.values() for batch in batches]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(4, 70), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(8, 60), st.integers(16, 60), st.integers(8, 64)),
)
def test_no_sequence_that_chooses_or_reports_is_fitted_or_searched_on(counts, sizes):
    if sum(counts) < 32:
        counts = [*counts, 32]
    domains = domains_of(counts)
    texts = split_texts(domains, TextSizes(*sizes))
    everything = [data_fingerprint([row]) for batches in domains.values() for row in split_sequences(batches)]
    fitted, chosen, reported = {*keys(texts.calibration), *keys(texts.search)}, keys(texts.held_out), keys(texts.test)
    assert len(set(chosen)) == len(chosen) >= 8 and len(set(reported)) == len(reported) >= 8
    assert not fitted & {*chosen, *reported} and not set(chosen) & set(reported)
    assert fitted | {*chosen, *reported} <= set(everything)
    assert set(texts.held_out) == set(texts.test) == set(domains)  # no source is left out where plans are judged
    assert len(keys(texts.search)) >= 8 and len(keys(texts.calibration)) >= 8
    assert sorted(data_fingerprint([batch]) for batch in texts.fitted) == sorted(fitted)


def test_parts_have_the_sizes_asked_for_where_there_is_enough_text():
    texts = split_texts(domains_of([80, 40]), TextSizes(60, 40, 20))
    assert [len(keys(part)) for part in (texts.calibration, texts.search, texts.held_out, texts.test)] == [
        60,
        30,
        10,
        20,
    ]
    assert {name: len(batches) for name, batches in texts.search.items()} == {"d0": 20, "d1": 10}


def test_little_text_is_shared_by_calibration_and_search():
    texts = split_texts(domains_of([40]), TextSizes(128, 64, 16))
    assert set(keys(texts.search)) < set(keys(texts.calibration)) and len(keys(texts.calibration)) == 40 - 8 - 8


def test_too_little_text_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="the data has 31 sequences"):
        split_texts(domains_of([31]), TextSizes())
    with pytest.raises(ValueError, match="d1: 3"):
        split_texts(domains_of([40, 3]), TextSizes())
