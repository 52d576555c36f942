"""Finished runs of a tiny model, for the tests of their reports."""

from safetensors.torch import save_file
from tiny_models import random_tokens, tiny_model
from tiny_tasks import make_task

import moeprune_ext as mp
from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.eep.settings import EepSettings
from moeprune_ext.eep.table import eep_table
from moeprune_ext.pipeline.prune import prune_checkpoint
from moeprune_ext.pipeline.settings import TextSizes

LENGTH = 24


def make_runs(folder):
    """Makes `pruned/25`, `pruned/50`, `search`, `eep` and `table`."""
    model = tiny_model("olmoe")
    model.save_pretrained(folder / "model")
    for number, name in enumerate(("first", "second")):
        save_file({"input_ids": random_tokens(20, LENGTH, seed=number)}, folder / f"{name}.safetensors")
    for sparsity in (0.25, 0.5):
        prune_checkpoint(
            folder / "model",
            folder / "pruned" / f"{100 * sparsity:g}",
            data=[folder / "first.safetensors", folder / "second.safetensors"],
            sparsity=sparsity,
            search=EvolveSettings(population=4, generations=3, elites=1, fidelity="race"),
            texts=TextSizes(calibration_sequences=16, sequences=16, test_sequences=8),
            sequence_length=LENGTH,
            dtype="float32",
        )
    tokens = random_tokens(8, LENGTH)
    evaluator = mp.CandidateEvaluator(model, [tokens])
    scores = mp.score_experts(mp.calibrate(model, [tokens]), "reap")
    mp.evolve(evaluator, scores, 0.5, fitness="kl_pq", population=4, generations=3, elites=1, out=folder / "search")
    task = make_task(model)
    mp.eep(model, task, keep=4, prune_iters=8, merge_iters=4, out=folder / "eep")
    eep_table(model, task, [4], EepSettings(prune_iters=6, merge_iters=2), out=folder / "table")
    return folder
