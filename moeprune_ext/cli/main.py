"""The `moeprune` command: what its verbs take. What they do is in verbs.py and plan_verbs.py.

Results go to stdout (JSON with --json), progress to stderr. Exit status: 0, 2 for a bad request (one line, nothing
written), 1 for a failure. Under torchrun, `calibrate`, `score` and the verbs that make plans share their work between
the processes, of which the first writes and prints; any other verb is run by the first alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from moeprune_ext import distributed
from moeprune_ext.cli import plan_verbs, verbs

AddVerb = Callable[[str, Callable[[argparse.Namespace], Any], str, str], argparse.ArgumentParser]


SHARED = ("calibrate", "score", "search", "allocate", "grape", "eep")  # whose work several processes share


DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    options = _parser().parse_args(arguments)
    try:
        distributed.join()
        if not distributed.is_first() and options.name not in SHARED:
            distributed.leave()
            return
        result, text = options.verb(options)
    except ValueError as error:
        _end(options.name, error, 2)
    except (OSError, MemoryError) as error:
        _end(options.name, error, 1)
    except KeyboardInterrupt:
        _end(options.name, "interrupted", 130)
    if distributed.is_first():
        print(json.dumps(result) if options.json else text)
    distributed.leave()


def _end(verb: str, error: object, status: int) -> NoReturn:
    print(f"moeprune {verb}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _count_or_zero(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moeprune", description="Prune Mixture-of-Experts language models without gradients."
    )
    parsers = parser.add_subparsers(dest="name", metavar="VERB", required=True)

    def add(name: str, verb: Callable[[argparse.Namespace], Any], about: str, example: str) -> argparse.ArgumentParser:
        made = parsers.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example: {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        made.set_defaults(verb=verb)
        made.add_argument("--seed", type=int, default=0, help="seed of everything random")
        made.add_argument("--device", default="auto", help="where a model is run: auto, cpu, cuda, cuda:N")
        made.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype a model is run in; auto: as stored")
        made.add_argument("--json", action="store_true", help="print the result as JSON")
        return made

    _measuring_verbs(add)
    _plan_verbs(add)
    _task_verbs(add)
    _checkpoint_verbs(add)
    return parser


def _add_data(made: argparse.ArgumentParser, required: bool, sequences: int) -> None:
    made.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=required,
        default=[],
        help="text, .jsonl or .safetensors token files",
    )
    made.add_argument("--sequence-length", type=_count, default=2048, help="tokens per sequence")
    made.add_argument("--sequences", type=_count, default=sequences, help="most sequences to use")
    made.add_argument("--batch-size", type=_count, default=1, help="sequences per forward pass")


def _add_stream(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--stream",
        default="no",
        choices=("no", "host", "disk"),
        help="for models larger than the device: layers wait in host memory or in the shards, and visit it in turn",
    )


def _add_limits(made: argparse.ArgumentParser) -> None:
    made.add_argument("--min-kept", type=_count_or_zero, default=0, help="fewest experts any layer keeps")
    made.add_argument(
        "--min-kept-per-group", type=_count_or_zero, default=0, help="the same for each group of grouped routers"
    )
    made.add_argument(
        "--protect-super",
        action="store_true",
        help="never prune experts with extreme output norms (super experts, arXiv 2507.23279)",
    )


def _criteria() -> str:
    from moeprune_ext.calibration.criteria import CRITERIA, SELECTION_PRINCIPLE

    return f"{', '.join([*CRITERIA, 'random'])}, or alpha,beta,mean|sum. {SELECTION_PRINCIPLE}"


def _measuring_verbs(add: AddVerb) -> None:
    add(
        "demo", verbs.demo, "everything, on the embedded model, in about a minute on two cores", "moeprune demo"
    ).add_argument("-o", "--out", type=Path, help="keep statistics, plans and checkpoints in this directory")

    made = add(
        "info",
        verbs.info,
        "MoE layers, experts, router kind, memory by part, what pruning would save",
        "moeprune info MODEL",
    )
    made.add_argument("model", type=Path, help="model directory")

    example = "moeprune calibrate MODEL --data text.jsonl -o stats.safetensors"
    made = add(
        "calibrate", verbs.calibrate, "one pass over text: routing and activation statistics of every expert", example
    )
    made.add_argument("model", type=Path, help="model directory")
    _add_data(made, True, 128)
    _add_stream(made)
    made.add_argument("-o", "--out", type=Path, required=True, help="statistics file to write")

    example = "moeprune score stats.safetensors --criterion reap -o scores.json"
    made = add("score", verbs.score, "statistics to one score per expert, and how far the criteria agree", example)
    made.add_argument("stats", type=Path, help="statistics file")
    made.add_argument(
        "--criterion", nargs="+", default=["reap"], help=f"one or more of {_criteria()} And naee: see --model."
    )
    made.add_argument(
        "--model", type=Path, help="model directory, for naee: experts in the order in which a layer misses them least"
    )
    _add_data(made, False, 64)
    _add_stream(made)
    _add_limits(made)
    made.add_argument("-o", "--out", type=Path, help="scores file to write, of one criterion")


def _plan_verbs(add: AddVerb) -> None:
    from moeprune_ext.allocation.grape import SIMILARITIES, WHO
    from moeprune_ext.allocation.threshold import NORMALIZATIONS
    from moeprune_ext.models.routers import ROUTERS

    def add_plan(
        name: str, verb: Callable[[argparse.Namespace], Any], about: str, rest: str
    ) -> argparse.ArgumentParser:
        example = f"moeprune {name} MODEL --stats stats.safetensors --sparsity 0.5 {rest}"
        made = add(name, verb, about, example)
        made.add_argument("model", type=Path, help="model directory")
        made.add_argument("--stats", type=Path, help="statistics file of this model, to score by --criterion")
        made.add_argument("--criterion", default="reap", help=_criteria())
        made.add_argument("--scores", type=Path, help="a file that `score -o` wrote, in the place of --stats")
        made.add_argument("--sparsity", type=float, default=0.5, help="share of the experts to remove, 0 to below 1")
        _add_limits(made)
        return made

    made = add_plan(
        "search",
        plan_verbs.search,
        "EvoESAP: how many experts each layer should lose; resumes RUN_DIR if it exists",
        "--data text.jsonl -o RUN_DIR",
    )
    made.add_argument(
        "--init", type=Path, nargs="+", default=[], help="plan files whose counts join the first generation"
    )
    made.add_argument("--fitness", default="esap", help="esap, kl_qp, kl_pq, nll, accept or top1_agree")
    made.add_argument("--population", type=_count, default=32, help="plans per generation")
    made.add_argument("--generations", type=_count, default=50, help="generations")
    made.add_argument("--elites", type=_count, default=4, help="plans that survive a generation")
    made.add_argument(
        "--fidelity", default="full", choices=("full", "race"), help="race: drop clearly worse plans early"
    )
    made.add_argument("--race-level", type=float, default=0.05, help="chance of dropping a plan that is not worse")
    made.add_argument(
        "--router", default="auto", choices=ROUTERS, help="fused: the kernel for half-precision logits too"
    )
    made.add_argument("--memory-budget", type=_size, default=1.0, help="GiB on the device beside the model's weights")
    _add_data(made, True, 64)
    _add_stream(made)
    made.add_argument("-o", "--out", type=Path, required=True, help="directory for plan.json, history and settings")

    made = add_plan(
        "allocate",
        plan_verbs.allocate,
        "a plan without a search: uniform, a global threshold, the best additive split (dp), or naee's subsets",
        "--method dp --data text.jsonl -o plan.json",
    )
    made.add_argument(
        "--method", default="uniform", choices=("uniform", "global", "dp", "naee"), help="how to allocate"
    )
    made.add_argument(
        "--normalize", default="none", choices=NORMALIZATIONS, help="global: what makes scores of layers comparable"
    )
    made.add_argument("--fitness", default="esap", help="dp: what a layer's pruning is measured by, as in search")
    made.add_argument("--steps", type=_count, help="dp: most counts to measure per layer; all of them if left out")
    made.add_argument("--damages", type=Path, help="dp: file of what was measured, read if it exists, else written")
    made.add_argument("--memory-budget", type=_size, default=1.0, help="dp: GiB beside the model's weights")
    _add_data(made, False, 64)
    _add_stream(made)
    made.add_argument("-o", "--out", type=Path, required=True, help="plan file to write")

    made = add_plan(
        "grape",
        plan_verbs.grape,
        "GRAPE: prunes where experts are most alike, over all layers",
        "--data text.jsonl -o plan.json",
    )
    made.add_argument("--similarity", default="cka", choices=SIMILARITIES, help="of outputs on text, or of weights")
    made.add_argument("--tokens", type=_count, default=1024, help="tokens on which outputs are compared")
    made.add_argument(
        "--entropy", type=float, default=0.9, help="least evenness of removals over layers, 0 to 1; 0: off"
    )
    made.add_argument(
        "--who", default="groups", choices=WHO, help="leaves: all but a group's best, or the lowest scores"
    )
    made.add_argument("--merge", action="store_true", help="average similar experts' weights, by score")
    _add_data(made, False, 64)
    _add_stream(made)
    made.add_argument("-o", "--out", type=Path, required=True, help="plan file to write")


def _task_verbs(add: AddVerb) -> None:
    example = "moeprune eep MODEL --task task.jsonl --keep 4 -o RUN_DIR"
    about = "EEP: which experts a task needs, and how the others merge into them; resumes RUN_DIR if it exists"
    made = add("eep", plan_verbs.eep, about, example)
    searching = plan_verbs.SEARCHING
    made.add_argument("model", type=Path, help="model directory")
    made.add_argument(
        "--task", type=Path, required=True, help="JSONL of prompt, choices, answer; or prompt, answer: to search on"
    )
    made.add_argument("--valid", type=Path, help="task file to rank the best again; else a quarter of --task")
    made.add_argument("--test", type=Path, help="task file to measure what was found; else a quarter of --task")
    made.add_argument("--keep", type=_count, nargs="+", help="experts that stay in every layer; with --table several")
    made.add_argument(
        "--active", type=_count, help="experts per token; without --keep nothing is searched, this is measured"
    )
    made.add_argument(
        "--fitness",
        default=searching["fitness"],
        help="accuracy, or esap or nll of the right answers: what the search improves",
    )
    made.add_argument("--layer-groups", type=_count, help="so many neighbouring layers share what is searched")
    made.add_argument("--paper", action="store_true", help="the published search: random starts, no order of equals")
    made.add_argument(
        "--prune-iters", type=_count, default=searching["prune_iters"], help="candidates that prune, starts included"
    )
    made.add_argument(
        "--merge-iters",
        type=_count_or_zero,
        default=searching["merge_iters"],
        help="candidates that merge; 0: prune only",
    )
    made.add_argument("--length-normalized", action="store_true", help="compare choices by log-likelihood per token")
    made.add_argument(
        "--table", action="store_true", help="EEP, also the paper's, beside the full model and all baselines"
    )
    made.add_argument("--memory-budget", type=_size, default=1.0, help="GiB on the device beside the model's weights")
    _add_stream(made)
    made.add_argument("-o", "--out", type=Path, required=True, help="directory for plans, history, table")


def _checkpoint_verbs(add: AddVerb) -> None:
    made = add(
        "export",
        verbs.export,
        "write the pruned checkpoint",
        "moeprune export MODEL --plan RUN_DIR/plan.json -o OUT_DIR",
    )
    made.add_argument("model", type=Path, help="model directory")
    made.add_argument("--plan", type=Path, required=True, help="plan file of any verb: .json, or merges of eep")
    made.add_argument("-o", "--out", type=Path, required=True, help="new directory for the checkpoint")

    made = add(
        "eval", verbs.evaluate, "accuracy on task files, perplexity on text", "moeprune eval MODEL --task task.jsonl"
    )
    made.add_argument("model", type=Path, help="model directory or export")
    made.add_argument(
        "--task", type=Path, nargs="+", default=[], help="JSONL of prompt, choices, answer; or prompt, answer"
    )
    made.add_argument("--length-normalized", action="store_true", help="compare choices by log-likelihood per token")
    made.add_argument("--lm-eval", metavar="TASKS", help="lm-evaluation-harness tasks, a,b,c (extra: lm-eval)")
    _add_data(made, False, 64)


if __name__ == "__main__":
    main()
