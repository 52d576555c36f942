"""JSON arrays and tables of comma or tab separated values as data."""

import json

import pytest

from moeprune_ext.data.batches import data_fingerprint, load_batches

PAIRS = [{"prompt": f'say "{i}", then\n{i}+1=', "response": str(i + 1)} for i in range(6)]


def fingerprint(path, tokenizer):
    return data_fingerprint(load_batches([path], tokenizer, sequence_length=32, sequences=8))


@pytest.fixture
def as_lines(lines, tokenizer):
    return fingerprint(lines("pairs.jsonl", PAIRS), tokenizer)


def test_an_array_of_records_is_read_as_its_lines_are(tmp_path, tokenizer, as_lines):
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS, indent=2))
    assert fingerprint(tmp_path / "pairs.json", tokenizer) == as_lines


def test_lines_in_a_json_file_are_read_as_lines(tmp_path, tokenizer, as_lines):
    (tmp_path / "pairs.json").write_text("\n".join(map(json.dumps, PAIRS)))
    assert fingerprint(tmp_path / "pairs.json", tokenizer) == as_lines


@pytest.mark.parametrize(("name", "delimiter"), [("pairs.csv", ","), ("pairs.tsv", "\t")])
def test_a_table_with_a_header_is_read_as_its_lines_are(tmp_path, tokenizer, as_lines, name, delimiter):
    import csv

    with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "response"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows({"id": number, **pair} for number, pair in enumerate(PAIRS))
    assert fingerprint(tmp_path / name, tokenizer) == as_lines


def test_a_cell_may_hold_a_long_text(tmp_path, tokenizer):
    (tmp_path / "texts.csv").write_text("text\n" + '"' + "word, " * 40_000 + '"\n')
    (batch,) = load_batches([tmp_path / "texts.csv"], tokenizer, sequence_length=1000, sequences=1)
    assert batch.input_ids.shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '["one", "two"]', "record 0 is a str.*give an array of records"),
        ("a.json", '{"title": "x"}', "no known layout"),
        ("a.json", "[1, 2", "is not JSON"),
        ("a.csv", "title,body\nx,y\n", "no known layout.*it has: title, body"),
        ("a.csv", "text\nx,y\n", "a.csv:2 has more cells than the first row"),
        ("a.csv", "text\n", "holds no usable sequence: it has no records"),
    ],
)
def test_what_is_no_records_is_refused_by_name(tmp_path, tokenizer, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_batches([tmp_path / name], tokenizer, sequence_length=8, sequences=1)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("open.csv", 'text\n"one\ntwo\nthree\n', "not a readable table"),
        ("quote.tsv", 'text\n"Hello" he said\nfine\n', "not a readable table"),
        ("twice.csv", "text,text\na,b\n", "two columns have one name"),
    ],
)
def test_a_stray_quote_or_a_name_given_twice_loses_nothing_silently(tmp_path, tokenizer, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        fingerprint(tmp_path / name, tokenizer)


def test_endings_may_be_large_letters_and_a_file_may_begin_with_a_mark(tmp_path, tokenizer, as_lines):
    (tmp_path / "pairs.JSON").write_text(json.dumps(PAIRS), encoding="utf-8-sig")
    assert fingerprint(tmp_path / "pairs.JSON", tokenizer) == as_lines
