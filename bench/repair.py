"""What repair is worth, and what it costs, on the embedded model or another one with its tokenizer.

    python bench/repair.py [--tables settings criteria tokens sequential cost] [--model DIR] [-o FILE]

The demo's data: calibration text to score and fit, other seeds of it to choose ridges, and evaluation text, which
nothing else has seen, to report: ESAP, KL(full, pruned) in nats, and arithmetic answered exactly.

- settings: targets, ridges and passes, at 50 %;
- criteria: each at 25, 50 and 75 %, before and after;
- tokens: how much text is fitted, at 50 %;
- sequential: each layer scored behind the pruned, and repaired, layers before it, at 50 %;
- cost: time and peak memory of one repair of a small copy of Qwen3-30B-A3B, against what it counts to.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from assess import all_batches
from measure import memory_of

import moeprune_ext as mp
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.demo.run import CALIBRATION_SEQUENCES, PROBLEMS, SEQUENCE_LENGTH, arithmetic_task, load_demo
from moeprune_ext.repair.repair import PASSES, RIDGES, RepairResult, repair
from moeprune_ext.tables import markdown_table

CRITERIA = ("reap", "seer", "naee", "weighted_ean", "man", "frequency")
SPARSITIES = (0.25, 0.5, 0.75)
FIT, CHOOSE, REPORT = 32, 8, 16  # sequences of a domain
TOKENS = (4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Size:
    """What repair's cost depends on.

    Attributes:
        layers: L.
        experts: E of a layer.
        kept: K' of them.
        hidden: H.
        inner: I.
        top_k: experts of a token.
        tokens: N, held-out ones included.
        dense: parameters that a token meets in all layers beside the experts.
    """

    layers: int
    experts: int
    kept: int
    hidden: int
    inner: int
    top_k: int
    tokens: int
    dense: int

    def flops(self, ridges: int, passes: int, forwards: int) -> dict[str, float]:
        """Returns what is computed, in all layers."""
        pairs = self.layers * self.tokens * self.top_k
        return {
            "forwards": forwards * 2.0 * (pairs * 3 * self.hidden * self.inner + self.tokens * self.dense),
            "activations": passes * 2 * pairs * 4.0 * self.hidden * self.inner,
            "H_e": passes * pairs * 2.0 * self.inner**2,
            "rounding": pairs * 6.0 * self.hidden * self.inner,
            "right-hand sides and residuals": passes * ridges * pairs * 4.0 * self.hidden * self.inner,
            "Cholesky and solves": passes
            * ridges
            * self.layers
            * self.kept
            * (self.inner**3 / 3 + 4.0 * self.inner**2 * self.hidden),
        }

    def bytes(self, ridges: int, element: int) -> dict[str, float]:
        """Returns what is alive at once on the device, besides the model's one or all layers."""
        rows = self.tokens * self.hidden
        return {
            "residuals": 4.0 * (1 + ridges) * rows,
            "experts' input": float(element * rows),
            "changes": 4.0 * ridges * self.kept * self.hidden * self.inner,
            "hidden states (host)": float(element * rows),
        }


@dataclass(frozen=True)
class Bench:
    """Repairs plans of one model and measures them.

    Attributes:
        model: in float32.
        tokenizer: of the demo.
        stats: of the calibration text.
        calibration: that text.
        judge: evaluator of the text to report.
        problems: arithmetic; None: not answered.
    """

    model: Any
    tokenizer: Any
    stats: mp.RoutingStats
    calibration: list[TokenBatch]
    judge: mp.CandidateEvaluator
    problems: mp.Task | None

    @classmethod
    def of(cls, model: Any, tokenizer: Any, problems: int) -> Bench:
        """Calibrates a model."""
        calibration = all_batches(tokenizer, "calibration", CALIBRATION_SEQUENCES, 0)
        judge = mp.CandidateEvaluator(model, all_batches(tokenizer, "evaluation", REPORT, 0))
        task = arithmetic_task(tokenizer, problems) if problems else None
        return cls(model, tokenizer, mp.calibrate(model, calibration), calibration, judge, task)

    def text(self, sequences: int, seed: int) -> list[TokenBatch]:
        """Returns calibration text, so many sequences of each domain."""
        return all_batches(self.tokenizer, "calibration", sequences, seed)

    def uniform(self, criterion: str, sparsity: float) -> PruningPlan:
        """Returns the uniform plan by a criterion."""
        naee = criterion == "naee"
        scores = naee_scores(self.model, self.calibration) if naee else mp.score_experts(self.stats, criterion)
        return mp.uniform_plan(scores, sparsity)

    def repaired(self, plan: PruningPlan, fit: Sequence[TokenBatch], **settings: Any) -> tuple[RepairResult, float]:
        """Repairs a plan; returns seconds, too."""
        start = time.perf_counter()
        result = repair(self.model, plan, fit, held_out=self.text(CHOOSE, 1), **settings)
        return result, time.perf_counter() - start

    def cells(self, plan: PruningPlan) -> list[str]:
        """Returns ESAP, KL and exact match of a plan."""
        score = self.judge.evaluate([plan], ("esap", "kl_pq"))[0]
        cells = [f"{score.esap:.4f}", f"{score.kl_pq:.4f}"]
        if self.problems is not None:
            pruned = copy.deepcopy(self.model)
            mp.prune_(pruned, plan)
            cells.append(f"{mp.accuracy(pruned, self.problems):.1%}")
        return cells

    @property
    def measures(self) -> list[str]:
        """Heads of `cells`."""
        return ["ESAP", "KL", *(["exact match"] if self.problems is not None else [])]


def ridges_of(result: RepairResult) -> str:
    """Returns the ridge of every layer."""
    return " ".join("-" if layer.ridge is None else f"{layer.ridge:g}" for layer in result.layers.values())


def missed(result: RepairResult, which: str) -> str:
    """Returns the share of the squared error that remains, over all layers: the geometric mean."""
    shares = [getattr(layer, which)[1] / getattr(layer, which)[0] for layer in result.layers.values()]
    return f"{torch.tensor(shares).log().mean().exp():.3f}"


# ---- tables


def settings_table(bench: Bench, criteria: Sequence[str], fit: Sequence[TokenBatch]) -> str:
    """Targets, ridges and passes at 50 %."""
    trials: list[dict[str, Any]] = [
        dict(target=target, ridge=ridge, passes=PASSES)
        for target in ("layer", "hidden")
        for ridge in (0.001, 0.01, 0.1, 1.0, "auto")
    ]
    trials += [dict(target="hidden", ridge="auto", passes=n) for n in (1, 2, 6)]
    rows = []
    for criterion in criteria:
        plan = bench.uniform(criterion, 0.5)
        rows.append([criterion, "-", "-", "-", *bench.cells(plan), "", "", "", ""])
        for trial in trials:
            result, seconds = bench.repaired(plan, fit, **trial)
            say(f"{criterion} {trial} {bench.judge.evaluate([result.plan])[0].esap:.4f}", progress=True)
            names = [trial["target"], str(trial["ridge"]), str(trial["passes"])]
            errors = [missed(result, "fitted"), missed(result, "held_out"), f"{seconds:.0f}", ridges_of(result)]
            rows.append([criterion, *names, *bench.cells(result.plan), *errors])
    heads = ["criterion", "target", "ridge", "passes", *bench.measures]
    return markdown_table([*heads, "error fitted", "error held out", "seconds", "ridges chosen"], rows)


def criteria_table(bench: Bench, criteria: Sequence[str], fit: Sequence[TokenBatch]) -> str:
    """Before and after, by criterion and sparsity, with the defaults."""
    rows = []
    for sparsity in SPARSITIES:
        for criterion in criteria:
            plan = bench.uniform(criterion, sparsity)
            result, _ = bench.repaired(plan, fit)
            pairs = zip(bench.cells(plan), bench.cells(result.plan), strict=True)
            rows.append([f"{sparsity:.0%}", criterion, *(f"{before} -> {after}" for before, after in pairs)])
            say(" ".join(rows[-1]), progress=True)
    return markdown_table(["pruned", "criterion", *bench.measures], rows)


def tokens_table(bench: Bench, criteria: Sequence[str], fit: Sequence[TokenBatch]) -> str:
    """By the text that is fitted, each the beginning of the next, at 50 %."""
    rows = []
    domains = len(bench.text(1, 0))
    most = bench.text(max(TOKENS) // SEQUENCE_LENGTH // domains, 0)
    for criterion in criteria:
        plan = bench.uniform(criterion, 0.5)
        rows.append([criterion, "-", "0", *bench.cells(plan), ""])
        for target in ("layer", "hidden"):
            for tokens in TOKENS:
                sequences = tokens // SEQUENCE_LENGTH // domains
                part = [batch.part(slice(0, sequences)) for batch in most]
                result, _ = bench.repaired(plan, part, target=target)
                count = sum(batch.input_ids.numel() for batch in part)
                rows.append([criterion, target, f"{count:,}", *bench.cells(result.plan), ridges_of(result)])
                say(" ".join(rows[-1]), progress=True)
    return markdown_table(["criterion", "target", "tokens", *bench.measures, "ridges chosen"], rows)


def sequential_table(bench: Bench, criteria: Sequence[str], fit: Sequence[TokenBatch]) -> str:
    """One-shot and sequential choice, each repaired, at 50 %."""
    rows = []
    for criterion in criteria:
        plan = bench.uniform(criterion, 0.5)
        one, _ = bench.repaired(plan, fit)
        behind, _ = bench.repaired(plan, fit, sequential=True, criterion=criterion)
        for name, its in (
            ("one-shot", plan),
            ("one-shot, repaired", one.plan),
            ("sequential, its repair taken off", behind.plan.unrepaired),
            ("sequential, repaired", behind.plan),
        ):
            rows.append([criterion, name, *bench.cells(its)])
            say(" ".join(rows[-1]), progress=True)
    return markdown_table(["criterion", "choice", *bench.measures], rows)


QWEN3_30B = Size(48, 128, 64, 2048, 768, 8, 262_144, 48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 2048 * 128))
SMALL = Size(2, 32, 16, 512, 192, 4, 8192, 2 * (4 * 512 * 512 + 512 * 32))


def small_copy(size: Size) -> Any:
    """Makes a random model of Qwen3's layout."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=size.hidden,
        moe_intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=size.hidden // 8,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        max_position_embeddings=2048,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def cost_text(device: str) -> str:
    """Counts, and the small copy's time and memory."""
    model = small_copy(SMALL).to(device)
    moe = mp.MoeModel.of(model)
    kept = {index: list(range(SMALL.kept)) for index in moe.layers}
    plan = PruningPlan(kept, dict.fromkeys(kept, SMALL.experts), moe.fingerprint)
    tokens = torch.randint(2, 512, (SMALL.tokens // 512, 512), generator=torch.Generator().manual_seed(0))
    fit, held_out = tokens[: -len(tokens) // 4], tokens[-len(tokens) // 4 :]

    def once() -> RepairResult:
        return repair(moe, plan, [fit], held_out=[held_out])

    start = time.perf_counter()
    once()
    seconds = time.perf_counter() - start
    peak, result = memory_of(once, device)
    a, b = torch.randn(2, 2048, 2048, device=device).unbind()
    start = time.perf_counter()
    for _ in range(8):
        a = (a @ b).clamp(-1, 1)
    rate = 8 * 2 * 2048**3 / (time.perf_counter() - start + float(a[0, 0]) * 0)
    rows = []
    for name, size, element in (("the small copy", SMALL, 4), ("Qwen3-30B-A3B", QWEN3_30B, 2)):
        flops, held = size.flops(len(RIDGES), PASSES, 3), size.bytes(len(RIDGES), element)
        rows += [[name, what, f"{value:.3g} FLOP"] for what, value in {**flops, "in all": sum(flops.values())}.items()]
        rows += [[name, what, f"{value / 2**20:,.0f} MiB"] for what, value in held.items()]
    counted = sum(SMALL.flops(len(RIDGES), PASSES, 3).values())
    return (
        f"{markdown_table(['model', 'what', 'counted'], rows)}\n\n"
        f"Measured on the small copy ({device}): {seconds:.1f} s, "
        f"{counted / seconds / 1e9:.1f} GFLOP/s of the count, where a product of two 2,048 x 2,048 matrices reaches "
        f"{rate / 1e9:.1f}; at its peak {peak / 2**20:,.0f} MiB beside the model and the result of "
        f"{result / 2**20:,.0f} MiB."
    )


TABLES: dict[str, Callable[[Bench, Sequence[str], Sequence[TokenBatch]], str]] = {
    "settings": settings_table,
    "criteria": criteria_table,
    "tokens": tokens_table,
    "sequential": sequential_table,
}
FEW = {"criteria": CRITERIA, "sequential": ("reap", "seer", "naee")}

texts: list[str] = []
out: Path | None = None


def say(text: str, progress: bool = False) -> None:
    """Prints, and writes all but progress to the file asked for."""
    print(text, flush=True)
    if not progress:
        texts.append(text)
        if out is not None:
            out.write_text("\n".join(texts) + "\n")


def main() -> None:
    global out
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=[*TABLES, "cost"], default=[*TABLES, "cost"])
    parser.add_argument("--criteria", nargs="+", help="in the place of each table's own")
    parser.add_argument("--model", type=Path, help="another model, whose tokenizer is the demo's")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="of arithmetic; 0: none")
    parser.add_argument("--device", default="cpu", help="of the cost")
    parser.add_argument("-o", "--out", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    out = arguments.out
    model, tokenizer = load_demo()
    if arguments.model is not None:
        model = mp.load(arguments.model, dtype=torch.float32)
    say(
        f"{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, moeprune_ext {mp.__version__}; `python {' '.join(sys.argv)}`"
    )
    tables = [name for name in arguments.tables if name != "cost"]
    if tables:
        bench = Bench.of(model, tokenizer, arguments.problems)
        fit = bench.text(FIT, 0)
        say(f"\nFitted: {sum(b.input_ids.numel() for b in fit):,} tokens, where a table does not say otherwise.")
    for name in tables:
        criteria = arguments.criteria or FEW.get(name, ("reap", "seer"))
        summary = str(TABLES[name].__doc__).strip()
        say(f"\n## {name}\n\n{summary}\n\n{TABLES[name](bench, criteria, fit)}")
    if "cost" in arguments.tables:
        say(f"\n## cost\n\n{cost_text(arguments.device)}")


if __name__ == "__main__":
    main()
