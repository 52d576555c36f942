"""`moeprune grape`: GRAPE prunes where experts are most alike, over all layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.allocation.grape import SIMILARITIES, WHO, check_request, grape
from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import Budgeted, Data, Scored, Streaming, flag, force_flag

EXAMPLE = "moeprune grape MODEL --stats stats.safetensors --sparsity 0.5 --data text.jsonl -o plan.json"


@dataclass(frozen=True, kw_only=True)
class Options(Streaming, Data, Budgeted, Scored):
    similarity: str = flag("of outputs on text, or of weights", "cka", choices=SIMILARITIES)
    tokens: int = flag("tokens on which outputs are compared", 1024, least=1)
    entropy: float = flag("least evenness of removals over layers, 0 to 1; 0: off", 0.9)
    who: str = flag("leaves: all but a group's best, or the lowest scores", "groups", choices=WHO)
    merge: bool = flag("average similar experts' weights, by score", False)
    out: Path = flag("plan file to write", short="-o")
    force: bool = force_flag()


def run(options: Options) -> tuple[Any, str]:
    """Writes the plan and returns how many experts each layer keeps."""
    io.check_new_file(options.out, options.force)
    scores = io.load_scores(options)
    budget = io.budget(options, options.model, scores.shapes)
    # Refuses before the weights are loaded.
    check_request(scores, budget, options.tokens, options.entropy, options.who, options.merge)
    batches = None
    if options.similarity == "cka":
        if not options.data:
            raise ValueError("cka compares experts' outputs on text: give --data, or --similarity weights")
        batches = io.load_data(options, io.tokenizer_of(options.model), labels=False, model=options.model)
    plan = grape(
        io.load_model(options.model, options),
        batches,
        scores,
        budget,
        similarity=options.similarity,
        tokens=options.tokens,
        entropy=options.entropy,
        who=options.who,
        merge=options.merge,
        seed=options.seed,
        progress=distributed.is_first(),
    )
    return io.write_plan(plan, options.out, options.model, merged=sum(merge.sums for merge in plan.merges.values()))
