"""The field layouts of records: what is recognised, what text it becomes, which part is scored."""

import pytest

from moeprune_ext.data.batches import load_batches
from moeprune_ext.data.layouts import LAYOUTS, layout_of

TURNS = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]
END = "<|endoftext|>"

# A record, its layout, the whole row as text and what of it is scored.
WRITTEN = {
    "response": ({"prompt": "1+1=", "response": "2"}, "prompt/response", f"1+1=2{END}", f"2{END}"),
    "completion": ({"prompt": "1+1=", "completion": "2"}, "prompt/completion", f"1+1=2{END}", f"2{END}"),
    "question": ({"question": "1+1?", "answer": "2"}, "question/answer", f"1+1?\n\n2{END}", f"2{END}"),
    "alpaca": (
        {"instruction": "add", "input": "1 1", "output": "2"},
        "instruction/input/output",
        f"add\n\n1 1\n\n2{END}",
        f"2{END}",
    ),
    "alpaca, empty input": (
        {"instruction": "1+1", "input": "", "output": "2"},
        "instruction/input/output",
        f"1+1\n\n2{END}",
        f"2{END}",
    ),
    "alpaca without input": (
        {"instruction": "1+1", "output": "2"},
        "instruction/input/output",
        f"1+1\n\n2{END}",
        f"2{END}",
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "1+1=", "name": None}, {"role": "assistant", "content": "2"}]},
        "messages",
        "<user>1+1=</user><assistant>2</assistant>",
        "2</assistant>",
    ),
    "sharegpt": (
        {"conversations": TURNS},
        "conversations",
        "<system>be brief</system><user>1+1=</user><assistant>2</assistant>",
        "2</assistant>",
    ),
    "sharegpt in OpenAI's words": (
        {"conversations": [{"from": "user", "value": "1+1="}, {"from": "assistant", "value": "2"}]},
        "conversations",
        "<user>1+1=</user><assistant>2</assistant>",
        "2</assistant>",
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_response_is_scored_behind_its_prompt(chat_tokenizer, lines, case):
    record, layout, whole, scored = WRITTEN[case]
    said = []
    (batch,) = load_batches([lines("a.jsonl", [record])], chat_tokenizer, say=said.append)
    assert chat_tokenizer.decode(batch.input_ids[0]) == whole
    assert chat_tokenizer.decode(batch.input_ids[batch.scored]) == scored
    assert said[0].endswith(f"a.jsonl: {layout}, 1 record, 1 sequence")


@pytest.mark.parametrize("case", WRITTEN)
def test_without_labels_the_same_tokens_all_count(chat_tokenizer, lines, case):
    path = lines("a.jsonl", [WRITTEN[case][0]])
    (with_labels,), (without,) = (load_batches([path], chat_tokenizer, labels=labels) for labels in (True, False))
    assert with_labels.input_ids.tolist() == without.input_ids.tolist() and without.scored.all()


@pytest.mark.parametrize("field", ["text", "content"])
def test_texts_are_packed(tokenizer, lines, field):
    path = lines("a.jsonl", [{field: "x = 1\n" * n, "id": n} for n in (3, 4, 30)])
    rows = load_batches([path], tokenizer, sequence_length=8, sequences=4)
    stream = [token for row in rows for token in row.input_ids[0].tolist()]
    first, second = (tokenizer("x = 1\n" * n)["input_ids"] for n in (3, 4))
    joined = [*first, tokenizer.eos_token_id, *second, tokenizer.eos_token_id]
    assert len(stream) == 32 and stream[: len(joined)] == joined[:32]
    assert all(row.scored.all() for row in rows)


def test_the_first_layout_that_fits_is_taken():
    everything = {name: "a" if kind is str else [{}] for kind, names in LAYOUTS.values() for name in names}
    assert layout_of(everything, "here") == "text"
    assert layout_of(everything | {"text": None}, "here") == "prompt/response"
    assert layout_of({"messages": [{}], "prompt": "a", "content": "a"}, "here") == "messages"
    assert layout_of({"messages": [], "conversations": [{}]}, "here") == "conversations"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "title": "b"}, "a.jsonl:2 .*it has: prompt, title"),
        ({"text": 3}, "a.jsonl:2 .*it has: text"),
        ({"question": "a", "answer": ["b"]}, "a.jsonl:2 .*it has: question, answer"),
        ({"messages": []}, "a.jsonl:2 .*it has: messages"),
        ({"messages": [{"role": "user", "content": None}]}, 'a.jsonl:2: every message .* "content"'),
        ({"conversations": [{"from": "human", "text": "a"}]}, 'a.jsonl:2: every turn .* "value"'),
        ({"conversations": [{"from": "tool", "value": "a"}]}, 'a.jsonl:2: a turn is from "tool"'),
        ({"conversations": [TURNS[1]]}, "a.jsonl:2 has no assistant message"),
        ({"conversations": [TURNS[2], TURNS[1], TURNS[2]]}, "a.jsonl:2: the chat template refuses .*speaks first"),
    ],
)
def test_a_record_of_no_layout_is_refused_by_place_and_fields(chat_tokenizer, lines, record, message):
    path = lines("a.jsonl", [{"prompt": "a", "response": "b"}, record])
    with pytest.raises(ValueError, match=message):
        load_batches([path], chat_tokenizer)


def test_conversations_need_a_chat_template(tokenizer, lines):
    with pytest.raises(ValueError, match="a.jsonl:1 has chat messages, but the tokenizer has no chat template"):
        load_batches([lines("a.jsonl", [{"conversations": TURNS}])], tokenizer)


def test_prompts_that_fill_the_sequence_are_left_out_and_counted(tokenizer, lines):
    records = [{"prompt": "x = 1 " * n, "response": "2"} for n in (1, 40, 2, 50)]
    path, said = lines("a.jsonl", records), []
    rows = load_batches([path], tokenizer, sequence_length=32, say=said.append)
    assert len(rows) == 2 and said[0].endswith("a.jsonl: prompt/response, 2 of 4 records usable, 2 sequences")
    assert len(load_batches([path], tokenizer, sequence_length=32, labels=False)) == 4
    with pytest.raises(ValueError, match="b.jsonl holds no usable sequence: every prompt fills 32 tokens"):
        load_batches([lines("b.jsonl", records[1::2])], tokenizer, sequence_length=32)


def test_responses_come_before_the_texts_of_a_mixed_file(tokenizer, lines):
    texts = [{"text": "y = 2\n" * 40}] * 3
    path, said = lines("a.jsonl", [*texts, {"prompt": "1+1=", "response": "2"}]), []
    batches = load_batches([path], tokenizer, sequence_length=16, sequences=6, batch_size=4, say=said.append)
    assert [len(batch.input_ids) for batch in batches] == [1, 4, 1], "no batch has rows of both"
    assert tokenizer.decode(batches[0].input_ids[batches[0].scored]) == f"2{END}" and batches[1].scored.all()
    assert said[0].endswith("a.jsonl: text and prompt/response, 4 records, 6 sequences")
