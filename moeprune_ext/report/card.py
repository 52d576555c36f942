"""What a run's files say about an exported plan, for the checkpoint's model card."""

from __future__ import annotations

from pathlib import Path

from moeprune_ext.allocation.selection import HeldOut
from moeprune_ext.artifacts.about import read_about
from moeprune_ext.artifacts.measured import Measured
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.checkpoint.card import add_measured, complete
from moeprune_ext.files import read_json
from moeprune_ext.intervals import shares_right

EEP_PLANS = {"plan.json": "best", "pruned_plan.json": "pruned"}  # of a search for a task, and their names in its result


def add_found(file: Path, plan: PruningPlan, out: Path) -> None:
    """Adds to an export's card what its run has measured of the plan; does nothing for a plan of no finished run.

    Args:
        file: the plan's.
        plan: what it holds.
        out: directory of the checkpoint.
    """
    run = file.parent
    about, held = read_about(run), run / "held_out.json"
    if not about:
        return
    if (measured := run / "measured.json").exists():
        kept = {str(layer): len(ids) for layer, ids in plan.kept.items()}
        result = read_json(run / "result.json") if (run / "result.json").exists() else {}
        if file.name == "plan.json" and result.get("kept_per_layer") == kept:
            says = HeldOut.from_json(read_json(held)).says if held.exists() else ""
            add_measured(out, Measured.from_json(read_json(measured)), says, about)
    elif held.exists() and file.name == "plan.json":
        ranked = HeldOut.from_json(read_json(held))
        worst = " of the worst domain" if ranked.objective == "worst" else ""
        text = (
            f"On {ranked.sequences} sequences that were not searched on, the plan's {ranked.metric}{worst} is "
            f"{ranked.scores[ranked.winner]:.4f}. {ranked.says}"
        )
        complete(out, text, about)
    elif (found := run / "result.json").exists() and file.name in EEP_PLANS:
        result = read_json(found)
        tests = {name: right["test"] for name, right in result["accuracy"].items()}
        shares = shares_right(tests, dict.fromkeys(tests, result["examples"]["test"]))
        text = (
            f"Of {result['examples']['test']} test examples, by which nothing was chosen, it answers "
            f"{shares[EEP_PLANS[file.name]]:.1%} right, the full model {shares['full']:.1%} (95 % intervals)."
        )
        complete(out, text, about)
