"""Every MoE architecture of the installed transformers, each from calibration to the reloaded export.

All of them: `pytest python_tests/models/test_models.py`. The table docs/models.md is written from it, a section for
each version of transformers, by `pytest python_tests/models/test_models.py --write-models docs/models.md`.
"""

import copy
import re
import warnings
from dataclasses import dataclass, field

import every_model
import pytest
import torch
import transformers

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.models.moe import find_moe_layers
from moeprune_ext.models.routers import routed_layer

# The papers': OLMoE, ERNIE-4.5, Qwen1.5/2/3-MoE, Mixtral, DeepSeek-MoE/V2/V3, GPT-OSS.
PAPERS = {
    *every_model.VARIANTS,
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "gpt_oss",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
}
# What is not green, and is refused or cannot be built: whatever else fails is a defect.
NOT_GREEN = {
    "5.17": {"aria", "aria_text", "diffusion_gemma", "ernie4_5_vl_moe", "jamba", "jetmoe", "llama4", "llama4_text"}
    | {"dbrx", "longcat_flash", "qwen3_omni_moe"},
    "5.23": {"dbrx", "diffusion_gemma", "dots3_note", "ernie4_5_vl_moe", "inkling_mm_model", "jetmoe", "llama4"}
    | {"llama4_text", "nemo_speechlm", "qwen3_omni_moe"},
    "5.24": {"dbrx", "diffusion_gemma", "dots3_note", "ernie4_5_vl_moe", "hy_v4_vl", "jetmoe", "llama4", "llama4_text"}
    | {"nemo_speechlm", "qwen3_omni_moe"},
}
VERSION = ".".join(transformers.__version__.split(".")[:2])
STEPS = ("calibrate", "mask", "prune", "export uniform", "export uneven", "stream", "fewer active", "merge", "repair")
NEEDED = STEPS[:5]


@dataclass
class Row:
    """What came of one architecture. why: what it was refused with. refused: of steps that need not work, what each was
    refused with."""

    model_type: str
    model: str = ""
    router: str = ""
    passed: set[str] = field(default_factory=set)
    evaluated: str = ""
    why: str = ""
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def green(self) -> bool:
        return self.passed >= set(NEEDED)


ROWS: dict[str, Row] = {}


def logits_of(model, tokens):
    """One sequence at a time, as the evaluator runs them: a router's near-ties may fall otherwise in other shapes."""
    with torch.no_grad():
        return torch.cat([model(row, use_cache=False).logits for row in tokens.split(1)])


def plans_of(scores):
    """A uniform plan where the layers allow one, and one that differs from layer to layer and takes the best experts,
    which matter."""
    try:
        uniform = mp.uniform_plan(scores, 0.5)
    except ValueError:  # a layer that cannot be pruned
        uniform = None
    unit = scores.n_group
    uneven = {i: min((0, 2, 4)[n % 3] // unit * unit, scores.shapes[i].capacity) for n, i in enumerate(scores)}
    if not any(uneven.values()):
        last = max(scores)
        uneven[last] = min(4, scores.shapes[last].capacity) // unit * unit
    best_first = mp.ExpertScores.wrap({i: -v for i, v in scores.items()}, shapes=scores.shapes, model=scores.model)
    return uniform, mp.PruningPlan.from_pruned_counts(best_first, uneven)


def try_everything(model, row, folder):
    """The whole flow; raises AssertionError where numbers differ, ValueError where the model is refused."""
    layers = find_moe_layers(model)
    first = next(iter(layers.values()))
    row.router = type(first.router).__name__
    tokens = every_model.tokens()
    full = logits_of(model, tokens)

    stats = mp.calibrate(model, [tokens])
    for index, counts in stats.tokens_per_expert.items():
        routed = int(counts.sum())
        assert routed <= tokens.numel() * layers[index].shape.top_k
        assert layers[index].trailing or routed == tokens.numel() * layers[index].shape.top_k
    assert torch.equal(logits_of(model, tokens), full)
    row.passed.add("calibrate")

    uniform, uneven = plans_of(mp.score_experts(stats, "reap"))
    plans = {"uniform": uniform, "uneven": uneven} if uniform is not None else {"uneven": uneven}
    with mp.applied(model, uneven):
        masked = logits_of(model, tokens)
    assert not torch.allclose(masked, full, atol=1e-4)
    assert torch.equal(logits_of(model, tokens), full), "the mask must come off"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        evaluator = mp.CandidateEvaluator(model, [tokens])
    scores = dict(zip(plans, evaluator.evaluate(list(plans.values())), strict=True))
    if evaluator.method.startswith("whole"):
        assert any("cannot be swept" in str(one.message) for one in told)
        row.evaluated = "whole forwards"
    else:
        row.evaluated = "sweep, " + routed_layer(list(layers.values())[-1]).way
    row.passed.add("mask")

    pruned = copy.deepcopy(model)
    mp.prune_(pruned, uneven)
    torch.testing.assert_close(logits_of(pruned, tokens), masked, rtol=1e-4, atol=1e-4)
    row.passed.add("prune")

    model.save_pretrained(folder / "full")
    for kind, plan in plans.items():
        mp.export(folder / "full", plan, folder / kind)
        reloaded = logits_of(mp.load(folder / kind), tokens)
        p, q = full.flatten(0, 1).double(), reloaded.flatten(0, 1).double()
        assert scores[kind].esap == pytest.approx(float(mp.reference.overlap(p, q)["esap"].mean()), abs=1e-5)
        row.passed.add(f"export {kind}")
    if uniform is None:
        row.passed.add("export uniform")  # there is none: its counts differ from layer to layer

    streamed = mp.load(folder / "full", stream="disk")
    torch.testing.assert_close(logits_of(streamed, tokens), full, rtol=1e-4, atol=1e-4)
    for index, table in mp.calibrate(streamed, [tokens]).moments.items():
        torch.testing.assert_close(table, stats.moments[index], rtol=1e-3, atol=1e-4)
    row.passed.add("stream")
    for step, make_plan in (
        ("fewer active", lambda: fewer_active(layers)),
        ("merge", lambda: merged(layers)),
        ("repair", lambda: repaired(model, uniform or uneven)),
    ):
        try:
            compare_with_export(model, make_plan(), evaluator, tokens, folder, step)
            row.passed.add(step)
        except ValueError as error:
            row.refused[step] = " ".join(str(error).split())


def fewer_active(layers):
    """Every expert stays, and each token is given to one fewer."""
    experts = {index: layer.shape.num_experts for index, layer in layers.items()}
    active = min(layer.shape.top_k for layer in layers.values()) - 1
    if active == 0:
        raise ValueError("its router selects one expert per token already")
    return mp.PruningPlan({index: list(range(count)) for index, count in experts.items()}, experts, active=active)


def merged(layers):
    """Four experts, mixtures of all, behind a mapped router."""
    generator = torch.Generator().manual_seed(3)
    merges = {}
    for index, layer in layers.items():
        count = layer.shape.num_experts
        keep = torch.eye(count)[:: max(1, count // 4)]
        noise = [0.2 * torch.rand(keep.shape, generator=generator) for _ in range(2)]
        merges[index] = Merge(keep + noise[0], keep + noise[1])
    return mp.PruningPlan.from_merges(merges)


def repaired(model, plan):
    """The plan with its down projections refitted; no layer's output misses more on the tokens that were fitted."""
    result = mp.repair(model, plan, [every_model.tokens(24, 24, seed=5)])
    assert list(result.layers) == [index for index, count in plan.pruned_counts.items() if count]
    for layer in result.layers.values():
        assert layer.fitted[1] <= layer.fitted[0] and layer.held_out[1] <= layer.held_out[0]
    assert result.plan.repaired_layers
    return result.plan


def compare_with_export(model, plan, evaluator, tokens, folder, name):
    """The score of a plan is that of its export, loaded again, and of the model pruned in place."""
    full = logits_of(model, tokens)
    score = evaluator.evaluate([plan])[0].esap
    mp.export(folder / "full", plan, folder / name)
    reloaded = logits_of(mp.load(folder / name), tokens)
    p, q = full.flatten(0, 1).double(), reloaded.flatten(0, 1).double()
    assert score == pytest.approx(float(mp.reference.overlap(p, q)["esap"].mean()), abs=1e-5)
    assert score < 0.999
    pruned = copy.deepcopy(model)
    mp.prune_(pruned, plan)
    torch.testing.assert_close(logits_of(pruned, tokens), reloaded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", every_model.model_types())
def test_from_calibration_to_the_reloaded_export(model_type, tmp_path):
    """Whatever does not work is refused with a ValueError that says why; nothing is computed wrongly."""
    row = ROWS[model_type] = Row(model_type)
    try:
        model = every_model.tiny(model_type)
    except Exception as error:  # transformers', on a configuration that this test made up
        row.why = f"no tiny model could be made: {' '.join(str(error).split())[:160]}"
        pytest.skip(row.why)
    row.model = type(model).__name__
    try:
        try_everything(model, row, tmp_path)
    except ValueError as error:
        row.why = " ".join(str(error).split())
    assert row.green or model_type not in PAPERS, row.why
    assert row.green or len(row.why) > 40
    assert row.green or VERSION not in NOT_GREEN or model_type in NOT_GREEN[VERSION], row.why


def test_fifty_architectures_are_green(request):
    if set(ROWS) != set(every_model.model_types()):
        pytest.skip("only some architectures were tried")
    green = sorted(row.model_type for row in ROWS.values() if row.green)
    assert len(green) >= 50, green
    if (path := request.config.getoption("--write-models")) is not None:
        write_models(path)


def write_models(path):
    """Replaces the section of the installed transformers in docs/models.md."""
    rows = sorted(ROWS.values(), key=lambda row: (not row.green, row.model_type))
    green = sum(row.green for row in rows)
    lines = [
        f"## transformers {transformers.__version__}: {green} green",
        "",
        "| model type | class | router | " + " | ".join(STEPS) + " | candidates evaluated by |",
        "| --- | --- | --- |" + " :-: |" * len(STEPS) + " --- |",
    ]
    for row in rows:
        if row.green:
            marks = " | ".join("yes" if step in row.passed else "no" for step in STEPS)
            lines.append(f"| {row.model_type} | {row.model} | {row.router} | {marks} | {row.evaluated} |")
    lines += ["", "Not green, and why:", ""]
    for row in rows:
        if not row.green:
            done = f" (after {', '.join(step for step in STEPS if step in row.passed)})" if row.passed else ""
            lines.append(f"- `{row.model_type}`{done}: {row.why}")
    for step in STEPS[6:]:
        whys = sorted((r.model_type, r.refused[step]) for r in rows if r.green and step in r.refused)
        lines += ["", f'Not "{step}", and why:', "", *[f"- `{name}`: {why}" for name, why in whys]] if whys else []
    not_streamed = [f"`{row.model_type}`: {row.why}" for row in rows if row.green and "stream" not in row.passed]
    lines += ["", "Not streamed, and why:", "", *[f"- {line}" for line in not_streamed]] if not_streamed else []
    path.parent.mkdir(exist_ok=True)
    text = path.read_text() if path.exists() else ""
    sections = {part.split(":")[0]: part.strip() for part in re.split(r"(?m)^(?=## )", text)[1:]}
    sections[lines[0].split(":")[0]] = "\n".join(lines)
    path.write_text(HEAD + "\n\n" + "\n\n".join(sections[key] for key in sorted(sections, reverse=True)) + "\n")


HEAD = """# Models

Every Mixture-of-Experts language model that transformers can make, as `python_tests/models/test_models.py` found them:
by their experts and router classes, each built small and random, then calibrated, scored, masked, pruned, exported and
loaded again. Generated; do not edit. To make it again:
`pytest python_tests/models/test_models.py --write-models docs/models.md`.

What transformers calls experts is looked for in configurations and modules; types whose configuration has no defaults
are left out. Green: the statistics count every routed pair; the masked model computes what the pruned one computes; a
candidate's score is the score of its reloaded export within 1e-5, uniform (a stock checkpoint) and uneven
(`moeprune_ext.load`). Candidates are evaluated by a sweep through the layers, in which many masks go through one router
at once (fused: by the kernel; sliced; block by block), or by one forward of the whole model each, where the model
cannot be taken apart. Streamed: its layers visit the device one by one, with the same logits and statistics. A layer
whose experts are looked up by token (DeepSeek-V4's first) is never pruned. Fewer active: a token is given to one expert
fewer than the model's router selects. Merge: experts become sums of experts and the router is mapped (EEP). Repair: the
kept experts' down projections are refitted, and no layer's output misses more than before on the tokens that were
fitted. All three are scored, exported and loaded again, with the same score."""
