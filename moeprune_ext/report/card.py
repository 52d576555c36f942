"""What a run's files say about an exported plan, for the checkpoint's model card."""

from __future__ import annotations

from pathlib import Path

from moeprune_ext.allocation.selection import HeldOut
from moeprune_ext.artifacts.about import read_about
from moeprune_ext.artifacts.measured import Measured
from moeprune_ext.checkpoint.card import add_measured, complete
from moeprune_ext.files import read_json
from moeprune_ext.intervals import wilson


def add_found(run: Path, out: Path) -> None:
    """Adds to an export's card what its run has measured; does nothing for a plan that comes from no run.

    Args:
        run: directory of the plan's file.
        out: directory of the checkpoint.
    """
    about, held = read_about(run), run / "held_out.json"
    if (file := run / "measured.json").exists():
        says = HeldOut.from_json(read_json(held)).says if held.exists() else ""
        add_measured(out, Measured.from_json(read_json(file)), says, about)
    elif held.exists():
        ranked = HeldOut.from_json(read_json(held))
        text = (
            f"On {ranked.sequences} sequences that were not searched on, the plan's {ranked.metric} is "
            f"{ranked.scores[ranked.winner]:.4f}, {ranked.gain.value:+.4f} against {ranked.baseline} (95 % interval "
            f"{ranked.gain.low:+.4f} to {ranked.gain.high:+.4f}). {ranked.says}"
        )
        complete(out, text, about)
    elif (file := run / "result.json").exists() and "accuracy" in (result := read_json(file)):
        count, right = result["examples"]["test"], result["accuracy"]
        full, best = (wilson(round(right[name]["test"] * count), count) for name in ("full", "best"))
        text = (
            f"Of {count} test examples, by which nothing was chosen, it answers {best.value:.1%} right (95 % interval "
            f"{best.low:.1%} to {best.high:.1%}), the full model {full.value:.1%} ({full.low:.1%} to {full.high:.1%})."
        )
        complete(out, text, about)
