"""What ends the answers of a task that does not say it."""

import warnings

import pytest

from moeprune_ext.data.tasks import load_task

SHOWN = [{"prompt": f"1+1=2\n2+3=5\n{a}+{a}=", "answer": str(2 * a)} for a in range(3)]
ALONE = [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(3)]
LABELLED = [{"prompt": f"Q: 7?\nA: 7\n\nQ: {a}?\nA: {a}\n\nQ: {a + 1}?\nA:", "answer": f" {a + 1}"} for a in range(3)]
IN_A_WORD = [{"prompt": "Thesis.\nParis x\nThe answer is", "answer": " no"}]
ONE_FORMAT = [{"prompt": "Use the format Answer: X\nWhat is 2+2?\nAnswer:", "answer": " 4"}]
SEVERAL_LINES = [{"prompt": "Q: a\nA: b\nQ: c\nA: d\nQ: e\nA:", "answer": " one\ntwo"}]
ZERO_SHOT = [{"prompt": f"Question: what is {a}?\nAnswer:", "answer": f" {a}"} for a in range(3)]


def ends(task):
    return {example.options[0][-1] for example in task.examples}


@pytest.mark.parametrize(
    ("records", "stop", "says"),
    [
        (SHOWN, "\n", "a newline is assumed"),
        (LABELLED, "\n\n", "a blank line is assumed"),
        (IN_A_WORD, None, "the end-of-text token is assumed"),
        (ONE_FORMAT, None, "the end-of-text token is assumed"),
        (SEVERAL_LINES, None, "the end-of-text token is assumed"),
        (ALONE, None, "the end-of-text token is assumed"),
        (ZERO_SHOT, None, "the end-of-text token is assumed"),
    ],
)
def test_the_prompts_say_what_ends_an_answer_and_the_assumption_is_said(lines, tokenizer, records, stop, says):
    with pytest.warns(UserWarning, match=says) as said:
        task = load_task(lines("task.jsonl", records), tokenizer)
    expected = tokenizer.eos_token_id if stop is None else tokenizer(stop)["input_ids"][0]
    assert ends(task) == {expected} and len(said) == 1 and "task.jsonl" in str(said[0].message)


@pytest.mark.parametrize("stop", [None, "<|endoftext|>", "\n"])
def test_a_stop_that_is_said_is_taken_without_a_word(lines, tokenizer, stop):
    records = [{**SHOWN[0], "stop": stop}, *SHOWN[1:]] if stop is None else [{**one, "stop": stop} for one in SHOWN]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = load_task(lines("task.jsonl", records), tokenizer)
    assert ends(task) == {tokenizer("\n")["input_ids"][0] if stop == "\n" else tokenizer.eos_token_id}


def test_choices_end_with_nothing_and_need_no_word(lines, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = load_task(lines("task.jsonl", [{"prompt": "a\nb", "choices": ["c", "d"], "answer": 0}]), tokenizer)
    assert task.examples[0].options == tuple(tuple(tokenizer(text)["input_ids"]) for text in ("c", "d"))


def test_an_answer_that_swallows_the_newline_ends_with_the_end_of_text(lines, tokenizer, monkeypatch):
    records = [{"prompt": "1+1=2\n1+2=3\n2+2=", "answer": "4\n"}]  # the newlines of answer and stop may be one token
    joined = type("Joined", (), {"eos_token_id": tokenizer.eos_token_id})
    joined.__call__ = lambda self, text, **options: {
        "input_ids": [7] if text == "4\n\n" else tokenizer(text)["input_ids"]
    }
    with pytest.warns(UserWarning, match="no token for a newline"):
        task = load_task(lines("task.jsonl", records), joined())
    assert ends(task) == {tokenizer.eos_token_id}
