"""The study's page: what it is, how it was made, its tables, and its limits."""

from __future__ import annotations

from typing import Any

from study_numbers import Study
from study_tables import PARTS, tables_of

FORMAT = "moeprune.study/1"

ABOUT = {
    "a": """\
How much does it matter by which criterion experts are ranked, and how many each layer loses? EvoESAP (arXiv
2603.06003) searches the counts; `prune` chooses the criterion by measurement, searches, and repairs the experts that
stay (target hidden, without the sequential way). `prune` with each criterion named was not run: it takes too much
time. naee is the subset search of arXiv 2402.14800, as an order.""",
    "b": """\
The unified formulation (arXiv 2606.15716) says: for general use average over the routed tokens and leave the gate out
(man, msan); for one task frequency and gate weight may stay in (reap, seer, frequency). All plans are uniform.
Task-specific calibration sees arithmetic alone: documents of solved problems, or the prompts and right answers of
problems that are not tested.""",
    "c": """\
GRAPE (arXiv 2604.06542) removes experts that are similar to others, in whatever layer. It is compared with plans that
decide within each layer by a score and remove equally many everywhere. Where it needs scores, they are reap's.""",
    "d": """\
EEP (arXiv 2407.00945) searches for one task which experts stay, then how all merge into those that do. Beside it
stand the baselines of the paper; the row of random masks is the mean of five. Our search starts from the criteria's
masks and breaks ties by likelihood; the paper's settings start from random masks. The task is arithmetic. Both
searches score {eep_iterations[0]} masks and {eep_iterations[1]} merges.""",
    "e": """\
A search can only be as good as what it maximises. Each random plan has the order of a criterion drawn at random and
random shares of the budget for the layers.""",
    "f": """\
How much text does the repair of a pruned model need? Ridges are chosen on other text, the one
by which `prune` chooses.""",
}

LIMITS = """## Limits

- One small model, trained for this package, on text like its own training text. Nothing here says what a large model
  does: orders of criteria may well be others there.
- Seeds draw text, problems, questions, plans and searches, but from the same pools and for the same model: the
  intervals say how much a figure varies with that draw, not with the model.
- Intervals are not corrected for the number of comparisons: of twenty differences that are none, about one lies
  outside its interval. "The best other row" is chosen by the same numbers that it is compared by, which flatters it.
- With few seeds an interval is wide, and "not to be told from" does not mean "equal to".
- Shares near 0 % and 100 % have little room to differ, and t-intervals there may reach beyond them.
- Searches are the demo's short ones, of {population} plans and {generations} generations with screened
  children; the published search has {published[0]} plans and {published[1]} generations.
"""

INTRODUCTION = """# The study

The headline tables of the papers behind this package in miniature, on the embedded demo model. The numbers are in
docs/study.json. What is found is said by comparing them (bench/study_tables.py), so that a rerun with other numbers
says something else. Negative results stay.

- Model: {layers} layers of {experts} experts, {top_k} per token, {millions:.1f} M parameters, in float32.
- Text, for each seed, in sequences of {sequence_length} tokens of code, prose and arithmetic: {parts}.
- ESAP: the expected share of tokens that the full model accepts from the pruned one. KL: of the full model from the
  pruned one, in nats. Both are of test text that no choice has seen.
- generation: the share of arithmetic problems answered exactly, token by token. choice: the share of questions of which
  the right one of four word orders is the likeliest. The model was trained neither on these problems nor on that text.
- Better and worse: the 95 % interval of the difference, seed by seed, lies on one side of 0.
- Command: `{command}`. A killed run goes on.
- Machine: {machine}; {date}; Python {python}, {versions}.
- CPU time of all cells: {minutes:.0f} minutes.
"""


def render(content: dict[str, Any]) -> str:
    """Returns the page of study.json's content.

    Raises:
        ValueError: for content that is not a study's.
    """
    if content.get("format") != FORMAT:
        raise ValueError(f"this is not the content of study.json: its format must be {FORMAT!r}")
    about = content["about"]
    facts = about | about["model"]
    facts["millions"] = about["model"]["parameters"] / 1e6
    facts["minutes"] = Study(content).seconds / 60
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    facts["parts"] = ", ".join(
        f"{name.replace('held_out', 'choice among plans')} {count} sequences ({tokens:,} tokens)"
        for name, (count, tokens) in about["texts"].items()
    )
    lines = [INTRODUCTION.format(**facts)]
    for part, tables in tables_of(content).items():
        lines += [f"## {part}. {PARTS[part][0]}", "", ABOUT[part].format(**about["sizes"]), ""]
        lines += [table.as_markdown() for table in tables]
    return "\n".join(lines) + "\n" + LIMITS.format(**about["sizes"], published=about["published"])
