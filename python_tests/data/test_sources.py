"""Data sources: what a word of --data means, what is read of each kind and how far, how sequences are shared out."""

import importlib
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeprune_ext.data.batches import data_fingerprint, load_batches, load_domains
from moeprune_ext.data.sources import Source, deal, domain_names, shares

PAIRS = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(6)]
USELESS = {"title": "of no layout"}


def rows_in(batches):
    return sum(len(batch.input_ids) for batch in batches)


def answers(tokenizer, batches):
    """The responses, as numbers."""
    scored = [tokenizer.decode(ids[mask]) for b in batches for ids, mask in zip(b.input_ids, b.scored, strict=True)]
    return [int(text.removesuffix("<|endoftext|>")) for text in scored]


# ---- words


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a.jsonl", ("jsonl", "a.jsonl", 1)),
        ("a.jsonl*2", ("jsonl", "a.jsonl", 2)),
        ("a.jsonl*0.5", ("jsonl", "a.jsonl", 0.5)),
        ("star*2", ("text", "star*2", 1)),
        ("star*2*3", ("text", "star*2", 3)),
        ("a:b.parquet*1e1", ("parquet", "a:b.parquet", 10)),
        ("hf:file.safetensors", ("tokens", "hf:file.safetensors", 1)),
        ("fold", ("folder", "fold", 1)),
        ("fold/*2", ("folder", "fold/", 2)),
        ("hf:fold", ("folder", "fold", 1)),
    ],
)
def test_what_exists_is_that_file_whatever_its_name(tmp_path, monkeypatch, word, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "star*2", "a:b.parquet", "hf:file.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "fold").mkdir()
    source = Source.parse(word)
    assert (source.kind, source.location, source.weight) == expected
    assert (source.config, source.split) == (None, None)


@pytest.mark.parametrize(
    ("word", "location", "config", "split", "weight"),
    [
        ("hf:org/name", "org/name", None, None, 1),
        ("hf:name:en", "name", "en", None, 1),
        ("hf:name:test", "name", None, "test", 1),
        ("hf:name:train_sft*0.5", "name", None, "train_sft", 0.5),
        ("hf:name:en:validation*2", "name", "en", "validation", 2),
        ("hf:name::odd", "name", None, "odd", 1),
    ],
)
def test_names_of_datasets_have_configs_and_splits(word, location, config, split, weight):
    assert Source.parse(word) == Source(word.split("*")[0], "hub", location, config, split, weight)


def test_a_saved_folder_has_splits_but_no_configs(tmp_path):
    folder = tmp_path / "odd:name"
    folder.mkdir()
    assert Source.parse(f"hf:{folder}:odd").split == "odd" and Source.parse(f"hf:{folder}*2").location == str(folder)
    with pytest.raises(ValueError, match="no configs"):
        Source.parse(f"hf:{folder}:en:train")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("missing.jsonl", "no data file missing.jsonl"),
        ("missing.jsonl*2", "no data file missing.jsonl"),
        ("*.jsonl", r"no data file \*.jsonl"),
        ("hf:", "hf:NAME"),
        ("hf:a:b:c:d", "hf:NAME"),
        ("hf:name*0", "positive number, got '0'"),
        ("hf:name*-1", "positive number"),
        ("hf:name*inf", "positive number"),
        ("hf:name*two", "positive number, got 'two'"),
        ("hf:name*", "positive number, got ''"),
    ],
)
def test_words_that_name_nothing_are_refused(word, message):
    with pytest.raises(ValueError, match=message):
        Source.parse(word)


def test_domains_have_names_of_their_own(tmp_path):
    for name in ("a.jsonl", "a.txt", "a-2.txt"):
        (tmp_path / name).touch()
    words = [tmp_path / "a.jsonl", tmp_path / "a-2.txt", tmp_path / "a.txt", "hf:org/a", "hf:org/a:test", tmp_path]
    names = domain_names([Source.parse(word) for word in words])
    assert names == ["a", "a-2", "a-3", "org/a", "org/a-2", tmp_path.name]


# ---- shares

weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(st.integers(0, 200), weights)
def test_shares_add_up_and_are_within_one_of_the_exact(count, weights):
    parts = shares(count, weights)
    assert sum(parts) == count
    assert all(abs(part - count * w / sum(weights)) < 1 + 1e-9 for part, w in zip(parts, weights, strict=True))


def test_the_largest_remainder_gets_what_is_left():
    assert shares(10, [2, 1, 1]) == [5, 3, 2]  # of equal remainders the earlier
    assert shares(7, [1, 2, 1]) == [2, 3, 2]
    assert shares(100, [0.1, 0.2]) == [33, 67]


@given(st.integers(0, 60), st.lists(st.tuples(st.integers(0, 30), st.floats(0.1, 10)), min_size=1, max_size=5))
def test_what_one_source_is_short_of_goes_to_the_others(count, sources):
    lengths, weights = zip(*sources, strict=True)
    dealt = deal([iter(range(n)) for n in lengths], weights, count)
    assert sum(map(len, dealt)) == min(count, sum(lengths))
    assert all(items == list(range(len(items))) for items in dealt)
    for items, n, first in zip(dealt, lengths, shares(count, weights), strict=True):
        assert len(items) >= min(n, first), "nobody gives up a share that can be filled"


def test_sequences_are_shared_out_by_weight(tokenizer, lines):
    a, b = lines("a.jsonl", PAIRS), lines("b.jsonl", [{"text": "x = 1\n" * 200}])
    domains = load_domains([a, f"{b}*3"], tokenizer, sequence_length=8, sequences=8, batch_size=4)
    assert {name: rows_in(batches) for name, batches in domains.items()} == {"a": 2, "b": 6}
    assert [len(batch.input_ids) for batch in domains["b"]] == [4, 2]
    assert answers(tokenizer, domains["a"]) == [1, 2]
    short = load_domains([f"{a}*3", b], tokenizer, sequence_length=8, sequences=16)
    assert {name: rows_in(batches) for name, batches in short.items()} == {"a": 6, "b": 10}
    joined = load_batches([f"{a}*3", b], tokenizer, sequence_length=8, sequences=16)
    assert data_fingerprint(joined) == data_fingerprint([*short["a"], *short["b"]])


def test_a_source_without_a_share_or_a_row_is_refused(tokenizer, lines):
    a, b = lines("a.jsonl", PAIRS), lines("b.jsonl", [])
    with pytest.raises(ValueError, match=r"1 sequences are too few .*b.jsonl"):
        load_domains([a, b], tokenizer, sequences=1)
    with pytest.raises(ValueError, match="b.jsonl holds no usable sequence: it has no records"):
        load_domains([a, b], tokenizer, sequences=8)
    with pytest.raises(ValueError, match="no data"):
        load_domains([], tokenizer)


# ---- kinds


def parquet(path, records, rows_per_group=2):
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), path, row_group_size=rows_per_group)
    return path


def saved(path, records):
    datasets.Dataset.from_list(records).save_to_disk(path)
    return path


@pytest.fixture
def every_kind(tmp_path, lines):
    """{kind: what makes a source of records}"""

    def folder(records):
        (tmp_path / "many").mkdir()
        parquet(tmp_path / "many" / "b.parquet", records[2:])
        shutil.move(lines("first.jsonl", records[:2]), tmp_path / "many" / "a.jsonl")
        (tmp_path / "many" / "README.md").write_text("not data")
        return tmp_path / "many"

    return {
        "jsonl": lambda records: lines("a.jsonl", records),
        "parquet": lambda records: parquet(tmp_path / "a.parquet", records),
        "folder of files": folder,
        "saved": lambda records: saved(tmp_path / "saved", records),
        "saved, as hf:": lambda records: f"hf:{saved(tmp_path / 'saved', records)}",
    }


KINDS = ["jsonl", "parquet", "folder of files", "saved", "saved, as hf:"]
CHAT = [{"messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]} for i in range(6)]


@pytest.mark.parametrize("records", [PAIRS, CHAT], ids=["pairs", "messages"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_rows_in_their_order(chat_tokenizer, lines, every_kind, kind, records):
    expected = load_batches([lines("same.jsonl", records)], chat_tokenizer, batch_size=4)
    batches = load_batches([every_kind[kind](records)], chat_tokenizer, batch_size=4)
    assert rows_in(batches) == 6 and data_fingerprint(batches) == data_fingerprint(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sources_are_read_only_as_far_as_needed(tokenizer, every_kind, kind):
    blank = dict.fromkeys(USELESS)
    source, said = every_kind[kind]([blank | pair for pair in PAIRS] + [USELESS]), []
    batches = load_batches([source], tokenizer, sequences=5, say=said.append)
    assert answers(tokenizer, batches) == [1, 2, 3, 4, 5] and "the first 5 records" in said[0]
    with pytest.raises(ValueError, match=r"(:7|:5|record 7) has the fields of no known layout .*title"):
        load_batches([source], tokenizer, sequences=7)


def test_later_row_groups_of_parquet_are_not_decoded(tokenizer, tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"text": f"{i} " * 50} for i in range(400)], rows_per_group=100)
    expected = load_batches([path], tokenizer, sequence_length=16, sequences=4)
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)
    again = load_batches([path], tokenizer, sequence_length=16, sequences=4)
    assert data_fingerprint(again) == data_fingerprint(expected)
    with pytest.raises(ValueError, match="a.parquet cannot be read: .*; is it a parquet file"):
        load_batches([path], tokenizer, sequence_length=16, sequences=10**6)


def test_splits_of_a_saved_dataset(tokenizer, tmp_path):
    train, odd = (datasets.Dataset.from_list(PAIRS[part]) for part in (slice(0, 2), slice(2, 5)))
    datasets.DatasetDict({"odd": odd, "train": train}).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"odd": odd}).save_to_disk(tmp_path / "one")
    both, one = tmp_path / "both", tmp_path / "one"
    for word, expected in ((both, [1, 2]), (f"hf:{both}:odd", [3, 4, 5]), (one, [3, 4, 5])):
        (name, batches), *none = load_domains([word], tokenizer).items()
        assert answers(tokenizer, batches) == expected and not none and name in ("both", "one")
    with pytest.raises(ValueError, match="no split 'test', but odd, train"):
        load_batches([f"hf:{both}:test"], tokenizer)
    with pytest.raises(ValueError, match="one split"):
        load_batches([f"hf:{both / 'odd'}:test"], tokenizer)


def test_folders_without_data_are_refused(tokenizer, tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match="neither a dataset .* it has: notes.md"):
        load_batches([tmp_path], tokenizer)
    parquet(tmp_path / "a.parquet", PAIRS)
    with pytest.raises(ValueError, match="no split 'train'"):
        load_batches([f"hf:{tmp_path}:train"], tokenizer)
    (tmp_path / "a.parquet").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="a.parquet cannot be read: .*; is it a parquet file"):
        load_batches([tmp_path], tokenizer)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read.*save_to_disk"):
        load_batches([tmp_path], tokenizer)


# ---- the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub of one dataset, whose streams say how far they were read."""
    read = []

    def stream(numbers):
        for number in numbers:
            read.append(number)
            yield PAIRS[number % 6] | {"more": number}

    def load_dataset(name, config, streaming):
        assert (name, config, streaming) == ("org/sums", "plus", True)
        splits = {"test": range(10**9), "train": range(3, 10**9)}
        return {
            split: datasets.IterableDataset.from_generator(stream, gen_kwargs={"numbers": numbers})
            for split, numbers in splits.items()
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return read


def test_datasets_of_the_hub_are_streams(tokenizer, hub):
    domains = load_domains(["hf:org/sums:plus", "hf:org/sums:plus:test"], tokenizer, sequences=4)
    assert [answers(tokenizer, batches) for batches in domains.values()] == [[4, 5], [1, 2]]
    assert list(domains) == ["org/sums", "org/sums-2"] and len(hub) < 10
    with pytest.raises(ValueError, match="hf:org/sums:plus:dev has no split 'dev', but test, train"):
        load_batches(["hf:org/sums:plus:dev"], tokenizer)


def test_without_network_a_dataset_is_refused_in_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="hf:nobody/nothing cannot be read: .*; without network give a file"
    ) as refusal:
        load_batches(["hf:nobody/nothing"], tokenizer)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["parquet", "saved", "hub"])
def test_a_missing_extra_is_named(tokenizer, every_kind, monkeypatch, kind):
    source = "hf:nobody/nothing" if kind == "hub" else every_kind[kind](PAIRS)
    real = importlib.import_module

    def import_module(name, *rest):
        if name.split(".")[0] in ("datasets", "pyarrow"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ValueError, match=r'needs `pip install "moeprune_ext\[data\]"`'):
        load_batches([source], tokenizer)


# ---- tokenizers


def test_token_files_need_no_tokenizer(tokenizer, lines, tmp_path):
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": torch.arange(48).view(3, 16)}, tokens)
    said = []
    for none in (None, lambda: pytest.fail("the tokenizer was loaded")):
        domains = load_domains([tokens], none, sequences=2, say=said.append)
        assert domains["tokens"][1].input_ids.tolist() == [list(range(16, 32))]
    assert said[0].endswith("tokens.safetensors: tokens, 3 records, 2 sequences")
    text, loads = lines("a.jsonl", PAIRS), []
    with pytest.raises(ValueError, match="a.jsonl needs the model's tokenizer"):
        load_domains([tokens, text], None)
    both = load_domains([tokens, text, text], lambda: loads.append(1) or tokenizer)
    assert list(both) == ["tokens", "a", "a-2"] and loads == [1]
    assert data_fingerprint(both["a"]) == data_fingerprint(load_batches([text], tokenizer))
