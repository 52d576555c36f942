"""Multiple choice, exact match and perplexity, against definitions and against real generation."""

import json
import math
import random

import pytest
import torch
from assess import all_batches
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.data.tasks import Example, Task, make_task
from moeprune_ext.demo import corpus
from moeprune_ext.demo.run import arithmetic_task, load_demo, word_order_task
from moeprune_ext.evaluate import correct, generated_matches


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def test_teacher_forced_exact_match_equals_greedy_generation(demo):
    model, tokenizer = demo
    task = arithmetic_task(tokenizer, 200, seed=3)
    scores = mp.score_experts(mp.calibrate(model, all_batches(tokenizer, "calibration", 8, 0)))
    with mp.applied(model, mp.uniform_plan(scores, 0.5)):
        forced, generated = correct(model, task), generated_matches(model, task)
    assert forced == generated
    assert 0.02 < sum(forced) / len(forced) < 0.98, "both outcomes must occur, or this shows nothing"


def test_exact_match_agrees_with_generation_on_answers_of_any_length():
    """A random model's own greedy answers, some of them spoilt, of different lengths and terminators."""
    model = tiny_model("olmoe")
    rng = random.Random(0)
    examples, expected = [], []
    for i in range(40):
        prompt = random_tokens(1, rng.randint(3, 9), seed=i)
        length = rng.randint(1, 5)
        new = model.generate(prompt, do_sample=False, max_new_tokens=length, eos_token_id=None, pad_token_id=0)
        answer = new[0, prompt.shape[1] :].tolist()
        if answer[-1] in answer[:-1]:
            continue  # its last token, the terminator, would have ended decoding earlier
        expected.append(i % 3 != 0)
        if not expected[-1]:
            answer[rng.randrange(length)] = 95
        examples.append(Example(tuple(prompt[0].tolist()), (tuple(answer),), None))
    task = Task("own answers", tuple(examples))
    assert expected.count(True) > 8 and expected.count(False) > 4
    assert correct(model, task) == generated_matches(model, task) == expected


def test_multiple_choice_picks_the_likeliest_option(demo):
    model, tokenizer = demo
    task = word_order_task(tokenizer, 12)
    for length_normalized in (False, True):
        results = correct(model, task, length_normalized=length_normalized)
        for example, result in zip(task.examples, results, strict=True):
            sums = []
            for option in example.options:
                ids = torch.tensor([example.prompt + option])
                with torch.no_grad():
                    logp = torch.log_softmax(model(ids).logits[0].double(), -1)
                each = [logp[len(example.prompt) + i - 1, token] for i, token in enumerate(option)]
                sums.append(float(sum(each)) / (len(option) if length_normalized else 1))
            assert result == (sums.index(max(sums)) == example.answer)
    assert mp.accuracy(model, task) == sum(correct(model, task)) / 12


def test_perplexity_is_exp_of_mean_cross_entropy():
    model = tiny_model("qwen3_moe")
    ids = random_tokens(rows=3)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert mp.perplexity(model, [ids]) == pytest.approx(math.exp(loss), rel=1e-5)


def test_task_files(demo, tmp_path):
    _, tokenizer = demo
    lines = [
        {"prompt": "2+2=", "answer": "4", "stop": "\n"},
        {"prompt": "2+2=", "answer": "4"},
        {"prompt": "2+2", "choices": ["=4", "=5", "=66"], "answer": 0},
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = mp.load_task(tmp_path / "sums.jsonl", tokenizer)
    assert task.name == "sums" and [len(e.options) for e in task.examples] == [1, 1, 3]
    newline, four = tokenizer("\n")["input_ids"], tokenizer("4")["input_ids"]
    assert task.examples[0].options[0] == tuple(four + newline)
    assert task.examples[1].options[0] == (*four, tokenizer.eos_token_id)
    assert task == make_task("sums", lines, tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"prompt": ""}', "no tokens"),
        ('{"prompt": "a", "answer": 3}', "at least one token"),
        ('{"prompt": "a", "answer": "b", "stop": "a long stop"}', "one token"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "at least two"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "index of a choice"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "at least one token"),
        ("", "no examples"),
    ],
)
def test_bad_task_files_are_refused_by_line(demo, tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        mp.load_task(tmp_path / "bad.jsonl", demo[1])


def test_no_text_or_problem_is_in_two_splits():
    pools = [set(corpus.code_documents(split)) for split in ("train", "calibration", "evaluation")]
    assert all(pools) and not pools[0] & pools[2] and not pools[1] & pools[2] and not pools[0] & pools[1]
    for operation in corpus.OPERATIONS:
        held_out = set(corpus.problems("held_out", operation))
        assert not held_out & set(corpus.problems("train", operation))
        assert 0.07 < len(held_out) / len(held_out | set(corpus.problems("train", operation))) < 0.13
    seen = "".join(corpus.arithmetic_document(random.Random(i)) for i in range(200)).splitlines()
    assert len(seen) == 8000
    shown = {line.split("=")[0] for line in seen}
    for operation in corpus.OPERATIONS:
        for a, _, b in corpus.problems("held_out", operation):
            assert f"{a}{operation}{b}" not in shown
    assert all(eval(line.split("=")[0]) == int(line.split("=")[1]) for line in seen)
