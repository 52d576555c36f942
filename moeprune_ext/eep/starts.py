"""Where EEP's search starts: what every criterion would keep, on the examples that candidates are scored on.

The published search starts from random masks. That masks of criteria join them is our choice: in a trial on a model of
32 experts a layer, 40 masks from random starts solved 26 % of the problems, the mask of the largest gate weights 77 %.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from moeprune_ext import distributed
from moeprune_ext.allocation.naee import naee_subsets
from moeprune_ext.artifacts.journal import SETTINGS
from moeprune_ext.calibration.calibrate import calibrate
from moeprune_ext.calibration.criteria import CRITERIA, score_experts
from moeprune_ext.data.batches import TokenBatch, data_fingerprint
from moeprune_ext.data.tasks import Task, answer_batches
from moeprune_ext.eep.operators import Layout, criterion_mask
from moeprune_ext.files import read_json, write_json
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.progress import View

STARTS = "starts.json"


Mask = dict[int, list[int]]  # {decoder layer: ids of the experts kept}


def starting_masks(
    model: nn.Module | MoeModel,
    task: Task,
    layout: Layout,
    *,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool | View = False,
) -> dict[str, Mask]:
    """Makes the masks that every criterion would keep on a task's prompts and right answers.

    Args:
        model: a transformers model, or the MoeModel made of it.
        task: the training split.
        layout: of the search.
        seed: of naee's sample.
        out: a directory that keeps them, so that a search that goes on does not calibrate again; into that of a search
            that has begun, which may be another, nothing is written.
        progress: whether to show progress on stderr, or the View to show it on.

    Returns:
        {criterion: {decoder layer: ids of the experts kept}}: naee's first, where layers share nothing and its router
        can be run alone, then those of criteria.CRITERIA.
    """
    moe = MoeModel.of(model)
    batches = answer_batches(task)
    about = {
        "model": moe.fingerprint,
        "data": data_fingerprint(batches),
        "layout": [layout.groups, layout.keep],
        "seed": seed,
    }
    file = Path(out) / STARTS if out is not None else None
    if (stored := distributed.from_first(lambda: _read_starts(file, about))) is not None:
        return stored
    progress = progress if distributed.is_first() else False
    stats = calibrate(moe, batches, progress=progress)
    masks = {name: criterion_mask(layout, score_experts(stats, name)) for name in CRITERIA}
    naee = _naee_mask(moe, batches, layout, seed, progress)
    masks = masks if naee is None else {"naee": naee, **masks}
    if file is not None and distributed.is_first() and not (file.parent / SETTINGS).exists():
        write_json(file, {"about": about, "masks": masks})
    return distributed.from_first(lambda: masks)


def _read_starts(file: Path | None, about: dict[str, Any]) -> dict[str, Mask] | None:
    """Reads the masks that a directory keeps; None where it keeps none of this search."""
    if file is None or not file.exists():
        return None
    content = read_json(file)
    try:
        if content["about"] != json.loads(json.dumps(about)):
            return None  # of another search: it left them before it began, or its directory will be refused
        return {name: {int(i): list(ids) for i, ids in mask.items()} for name, mask in content["masks"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it") from None


def _naee_mask(
    moe: MoeModel, batches: list[TokenBatch], layout: Layout, seed: int, progress: bool | View
) -> Mask | None:
    """Returns naee's mask.

    None where layers share a mask, keep fewer than the router selects, or the router cannot be run alone.
    """
    shapes, keep = moe.shapes, layout.by_layer(layout.keep)
    if len(layout.groups) < len(keep) or any(keep[i] < shapes[i].min_kept for i in keep):
        return None
    try:
        pruned = {i: shapes[i].num_experts - keep[i] for i in keep}
        plan = naee_subsets(moe, batches, pruned, seed=seed, progress=progress)
    except ValueError as reason:
        warnings.warn(f"the search starts without naee's mask: {reason}", stacklevel=3)
        return None
    return {i: plan.kept[i] for i in keep}
