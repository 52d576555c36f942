"""Batches: what is accepted, what is refused, and what files turn into."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.data.batches import TokenBatch, as_batches, data_fingerprint, load_batches, pack, without_padding


def test_tensors_and_mappings_are_batches():
    ids = random_tokens()
    plain, mapped = as_batches([ids, {"input_ids": ids, "labels_mask": torch.zeros_like(ids)}])
    assert plain.scored.all() and not mapped.scored.any() and mapped.attention_mask.all()
    assert data_fingerprint([plain]) == data_fingerprint(as_batches(ids)) != data_fingerprint([mapped])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no data"),
        ([torch.zeros(0, 4, dtype=torch.long)], "no data"),
        ([{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4)}], "no data"),
        ([torch.ones(4).long()], "batch 0"),
        ([torch.ones(1, 4)], "integer tensor"),
        ([{"tokens": torch.ones(1, 4)}], "input_ids"),
        ([{"input_ids": torch.ones(1, 4).long(), "labels_mask": torch.ones(1, 3)}], "labels_mask"),
        ([torch.full((1, 4), -1)], "vocabulary"),
    ],
)
def test_bad_batches_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        as_batches(batches, vocab_size=10)


def test_labels_are_the_next_attended_and_labelled_token():
    batch = as_batches(
        [
            {
                "input_ids": torch.tensor([[5, 6, 7, 8]]),
                "attention_mask": torch.tensor([[1, 1, 1, 0]]),
                "labels_mask": torch.tensor([[0, 0, 1, 1]]),
            }
        ]
    )[0]
    assert batch.next_token_labels.tolist() == [[-100, 7, -100, -100]]
    assert batch.scored.tolist() == [[False, False, True, False]]


def test_padding_on_either_side_changes_neither_statistics_nor_scores():
    model = tiny_model("qwen3_moe")
    ids = random_tokens(rows=2, length=12)
    blank = torch.zeros(2, 5, dtype=torch.long)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(blank)
    right = {"input_ids": torch.cat([ids, blank], 1), "attention_mask": torch.cat([ones, zeros], 1)}
    left = {"input_ids": torch.cat([blank, ids], 1), "attention_mask": torch.cat([zeros, ones], 1)}
    plain = mp.calibrate(model, [ids])
    plan = mp.uniform_plan(mp.score_experts(plain), 0.5)
    expected = mp.CandidateEvaluator(model, [ids]).evaluate([plan], ("esap", "nll"))[0]
    for padded in (right, left):
        stats = mp.calibrate(model, [padded])
        assert stats.tokens == plain.tokens
        for layer, table in plain.moments.items():
            torch.testing.assert_close(stats.moments[layer], table, rtol=1e-4, atol=1e-6)
        score = mp.CandidateEvaluator(model, [padded]).evaluate([plan], ("esap", "nll"))[0]
        assert score.esap == pytest.approx(expected.esap, abs=1e-5)
        assert score.nll == pytest.approx(expected.nll, abs=1e-5)


def test_statistics_and_scores_do_not_depend_on_batching():
    model = tiny_model("mixtral")
    ids = random_tokens(rows=4)
    whole, parts = mp.calibrate(model, [ids]), mp.calibrate(model, list(ids.split(1)))
    for layer in whole.moments:
        torch.testing.assert_close(whole.moments[layer], parts.moments[layer], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(whole.max_norm[layer], parts.max_norm[layer])
    shards = mp.calibrate(model, [ids[:2]]) + mp.calibrate(model, [ids[2:]])
    assert shards.tokens == whole.tokens
    plans = [mp.uniform_plan(mp.score_experts(whole), s) for s in (0.25, 0.5, 0.75)]
    one = mp.CandidateEvaluator(model, [ids]).evaluate(plans)
    split = mp.CandidateEvaluator(model, list(ids.split(1))).evaluate(plans)
    assert [s.esap for s in one] == pytest.approx([s.esap for s in split], abs=1e-6)


def test_packing_fills_rows_and_separates_documents(tokenizer):
    batches = pack(tokenizer, ["def f():\n    return 1\n"] * 50, sequence_length=16, sequences=5, batch_size=2)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 16), (2, 16), (1, 16)]
    stream = torch.cat([batch.input_ids for batch in batches]).flatten().tolist()
    document = tokenizer("def f():\n    return 1\n")["input_ids"]
    assert stream[: len(document) + 1] == [*document, tokenizer.eos_token_id]
    with pytest.raises(ValueError, match="less than one sequence"):
        pack(tokenizer, ["short"], sequence_length=64, sequences=1)


def test_files_of_every_kind(tokenizer, tmp_path):
    text = "for i in range(10):\n    print(i)\n" * 40
    (tmp_path / "a.txt").write_text(text)
    lines = [{"text": "x = 1\n" * 60}, {"prompt": "1+1=", "response": "2"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file({"input_ids": torch.arange(64).view(2, 32)}, tmp_path / "c.safetensors")
    paths = [tmp_path / name for name in ("c.safetensors", "b.jsonl", "a.txt")]
    batches = load_batches(paths, tokenizer, sequence_length=32, sequences=6)
    assert len(batches) == 6 and batches[5].input_ids[0].tolist() == tokenizer(text)["input_ids"][32:64]
    assert [batch.input_ids[0, 0] for batch in batches[:2]] == [0, 32]
    response = batches[2]
    assert response.labels_mask.sum() == 2, "the response's one digit and the end of text"
    assert tokenizer.decode(response.input_ids[response.scored]) == "2<|endoftext|>"


def chat_file(path, *conversations):
    """A file of conversations, each written as contents of user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [[{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)] for texts in conversations]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    return [path]


def test_the_last_assistant_message_is_the_response(chat_tokenizer, tmp_path):
    paths = chat_file(tmp_path / "chat.jsonl", ["1+1=", "2", "2+2=", "4", "thanks"], ["3+4=", "7"])
    batch = load_batches(paths, chat_tokenizer, sequence_length=64, batch_size=2)[0]
    texts = [chat_tokenizer.decode(ids[scored]) for ids, scored in zip(batch.input_ids, batch.scored, strict=True)]
    assert texts == ["4</assistant>", "7</assistant>"]


def test_without_labels_conversations_are_whole(chat_tokenizer, tmp_path):
    """Calibration needs no response: none, a template that rewrites the past, a prompt longer than the sequence."""
    conversations = [["hello"], ["1+1=", "<think>2</think>2", "2+2=", "4", "thanks"], ["x = 1 " * 40, "yes"]]
    paths = chat_file(tmp_path / "chat.jsonl", *conversations)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "y = 2 " * 40, "response": "no"}) + "\n")
    paths.append(tmp_path / "pairs.jsonl")
    batches = load_batches(paths, chat_tokenizer, sequence_length=48, batch_size=4, labels=False)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(3, 48), (1, 48)]
    assert all(torch.equal(batch.scored, batch.attention_mask) for batch in batches)
    texts = [
        chat_tokenizer.decode(ids[attended])
        for batch in batches
        for ids, attended in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert texts[0] == "<user>hello</user>"
    assert texts[1].startswith("<user>1+1=</user><assistant>2</assistant>")
    assert texts[2].startswith("<user>x = 1 x = 1") and texts[3].startswith("y = 2 y = 2")
    with pytest.raises(ValueError, match="chat.jsonl:1 has no assistant message"):
        load_batches(paths, chat_tokenizer, sequence_length=48)


def test_without_padding_keeps_every_attended_token_and_its_masks():
    ids = random_tokens(rows=4, length=6)
    attended = torch.tensor([[0, 0, 1, 1, 0, 0], [0] * 6, [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]).bool()
    labelled = torch.tensor([0, 0, 0, 1, 1, 1]).bool().expand(4, 6)
    blank = TokenBatch(ids, torch.zeros_like(attended), labelled)
    (found,) = without_padding([blank, TokenBatch(ids, attended, labelled), blank])
    assert found.input_ids.tolist() == ids[[0, 2, 3], 1:5].tolist()
    assert found.attention_mask.tolist() == attended[[0, 2, 3], 1:5].tolist()
    assert found.labels_mask.tolist() == labelled[[0, 2, 3], 1:5].tolist()


def test_token_files_keep_their_masks_and_stop_at_the_sequences_asked_for(tokenizer, tmp_path):
    ids = random_tokens(rows=3, length=8).int()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [0] * 8])
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        save_file({"input_ids": ids, "attention_mask": mask}, path)
    batches = load_batches(paths, tokenizer, sequences=5, batch_size=2)
    assert [len(batch.input_ids) for batch in batches] == [2, 1, 2]
    assert torch.equal(batches[0].attention_mask, mask[:2].bool()) and batches[0].input_ids.dtype == torch.int64
    assert len(load_batches(paths[:1], tokenizer, sequences=3, batch_size=3)) == 1, "no batch without rows"
    save_file({"input_ids": ids.float()}, paths[1])
    with pytest.raises(ValueError, match="b.safetensors: .*integer tensor"):
        load_batches(paths, tokenizer)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", "not json\n", "x.jsonl:1 is not JSON"),
        ("x.jsonl", '{"foo": 1}\n', '"text"'),
        ("x.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n', "chat template"),
        ("x.safetensors", "garbage", "not a safetensors file"),
        ("x.txt", " \n", "x.txt is empty"),
        ("x.txt", "a", "less than one sequence"),
        ("x.jsonl", "[1]\n", "JSON object"),
        ("x.jsonl", "\n", "no usable sequence"),
    ],
)
def test_bad_files_are_refused_by_name(tokenizer, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_batches([tmp_path / name], tokenizer, sequence_length=8)
    with pytest.raises(ValueError, match="no data file"):
        load_batches([tmp_path / "missing.txt"], tokenizer)
