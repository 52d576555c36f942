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
from moeprune_ext.evaluate.compare import compare_answers
from moeprune_ext.evaluate.hopeless import hopeless_reason
from moeprune_ext.evaluate.quality import chance_level, correct, generated_matches
from moeprune_ext.evaluate.speed import SpeedSettings, measure_speed, speed_ratio


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


def test_perplexity_has_an_interval_over_sequences_whatever_their_batches():
    model = tiny_model("qwen3_moe")
    ids = random_tokens(rows=6)
    together, alone = mp.perplexity_interval(model, [ids]), mp.perplexity_interval(model, list(ids.split(1)))
    assert together.low < together.value == mp.perplexity(model, [ids]) < together.high and together.standard_error > 0
    assert (alone.value, alone.low, alone.high) == pytest.approx(
        (together.value, together.low, together.high), rel=1e-5
    )


def test_accuracy_has_wilsons_interval_and_a_chance_level(demo):
    model, tokenizer = demo
    task = word_order_task(tokenizer, 12)
    interval = mp.accuracy_interval(model, task)
    assert interval.low < interval.value == mp.accuracy(model, task) < interval.high
    assert chance_level(task) == 0.25 and chance_level(arithmetic_task(tokenizer, 3)) == 0


# ---- two models


def test_a_model_compared_with_itself_differs_in_nothing(demo):
    model, tokenizer = demo
    comparison = mp.compare(model, model, task=arithmetic_task(tokenizer, 20), batches=[random_tokens(4)])
    answers, text = comparison.answers, comparison.text
    assert (answers.difference.value, answers.difference.low, answers.difference.high) == (0, 0, 0)
    assert answers.p_value == 1 and "the same 20 examples" in answers.verdict
    assert (text.ratio.value, text.ratio.low, text.ratio.high) == (1, 1, 1)
    assert text.esap.value == pytest.approx(1, abs=1e-6) and text.top1_agree.value == 1
    assert text.kl_pq.value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_agreement_on_padded_text_is_the_evaluators(family):
    model, pruned = tiny_model(family), tiny_model(family)
    attended = torch.ones(5, 24, dtype=torch.int64)
    attended[1, 15:], attended[3, :4] = 0, 0
    batches = [{"input_ids": random_tokens(5), "attention_mask": attended}]
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(model, batches), "reap"), 0.5)
    expected = mp.CandidateEvaluator(model, batches).evaluate([plan], ("esap", "kl_pq", "top1_agree", "nll"))[0]
    mp.prune_(pruned, plan)
    text = mp.compare(pruned, model, batches=batches).text
    for name in ("esap", "kl_pq", "top1_agree"):
        assert getattr(text, name).value == pytest.approx(getattr(expected, name), abs=1e-5)
        assert getattr(text, name).low < getattr(text, name).high
    assert math.log(text.perplexity.value) == pytest.approx(expected.nll, abs=1e-5)
    assert text.perplexity.value == pytest.approx(mp.perplexity(pruned, batches), rel=1e-5)
    assert text.reference.value == pytest.approx(mp.perplexity(model, batches), rel=1e-5)
    assert text == mp.compare(pruned, model, batches=batches).text, "the draws are seeded"


def test_mcnemar_looks_at_the_examples_that_one_model_alone_answers_right():
    both = [True] * 50 + [False] * 30
    compared = compare_answers(both + [False] * 8 + [True], both + [True] * 8 + [False])
    assert (compared.only_model, compared.only_reference, compared.examples) == (1, 8, 89)
    assert compared.p_value == pytest.approx(2 * (1 + 9) / 2**9)  # P(at most 1 of 9 heads), both sides
    assert compared.difference.value == pytest.approx(-7 / 89) and "fewer" in compared.verdict
    unclear = compare_answers(both + [False] * 3, both + [True, False, True])
    assert unclear.p_value == 0.5 and "no difference" in unclear.verdict


def test_what_cannot_be_compared_is_refused(demo):
    model = tiny_model("olmoe")
    with pytest.raises(ValueError, match="nothing to compare"):
        mp.compare(model, model)
    with pytest.raises(ValueError, match="vocabular"):
        mp.compare(model, demo[0], batches=[random_tokens()])
    with pytest.raises(ValueError, match="same examples"):
        compare_answers([True], [True, False])


def test_speed_has_a_figure_for_every_round_and_refuses_too_long_prompts():
    models = [tiny_model("olmoe"), tiny_model("mixtral")]
    speeds = measure_speed(models, SpeedSettings(batch=2, prompt=8, new=2, rounds=3))
    for speed, model in zip(speeds, models, strict=True):
        assert len(speed.prefill) == len(speed.decode) == 3 and min(speed.prefill + speed.decode) > 0
        assert speed.weights >= sum(tensor.nbytes for tensor in model.parameters())
    with pytest.raises(ValueError, match="128 positions"):
        measure_speed(models, SpeedSettings(prompt=128, new=1))
    ratio = speed_ratio([2.0, 8.0], [1.0, 2.0])
    assert ratio.value == pytest.approx(math.sqrt(8)) and (ratio.low, ratio.high) == pytest.approx((2, 4))


# ---- tasks that tell nothing


def test_a_task_that_a_model_fails_at_has_a_reason():
    model = tiny_model("olmoe")
    prompts = random_tokens(rows=12, length=6)
    new = model.generate(prompts, do_sample=False, max_new_tokens=2, eos_token_id=None, pad_token_id=0)[:, 6:]
    own = [Example(tuple(p), (tuple(a),), None) for p, a in zip(prompts.tolist(), new.tolist(), strict=True)]
    spoilt = [Example(e.prompt, ((e.options[0][0], (e.options[0][1] + 1) % 97),), None) for e in own]
    wrong = [Example(e.prompt, (tuple((token + 1) % 97 for token in e.options[0]),), None) for e in own]
    guesses = [Example(e.prompt, ((1,), (2,)), 0) for e in own]
    assert hopeless_reason(model, Task("own", tuple(own)), 1.0) is None
    assert hopeless_reason(model, Task("guesses", tuple(guesses)), 0.6) is None
    assert "100.0% if the token behind the answer" in hopeless_reason(model, Task("spoilt", tuple(spoilt)), 0.0)
    assert "prompt's format" in hopeless_reason(model, Task("wrong", tuple(wrong)), 0.0)
    assert "no more than guessing (50.0%)" in hopeless_reason(model, Task("guesses", tuple(guesses)), 0.5)


# ---- task files


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
