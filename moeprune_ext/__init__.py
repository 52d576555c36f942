"""moeprune_ext: prune Mixture-of-Experts language models without gradients.

model + text --calibrate--> RoutingStats --score_experts--> ExpertScores --uniform_plan | global_plan | dp_plan |
grape | evolve--> PruningPlan --export--> checkpoint --load--> model. For a task instead of text: model + task --eep-->
PruningPlan, or merges. One step, one module; every product is a file.

A name is imported when it is first used, so that `import moeprune_ext` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Loaded now, because loading them later would put packages in the place of the functions of the same names.
for _package in ("eep", "repair"):
    import_module(f"moeprune_ext.{_package}")
    del globals()[_package]

if TYPE_CHECKING:
    from moeprune_ext.allocation.budget import Kept as Kept
    from moeprune_ext.allocation.budget import uniform_plan as uniform_plan
    from moeprune_ext.allocation.damages import damages as damages
    from moeprune_ext.allocation.damages import dp_plan as dp_plan
    from moeprune_ext.allocation.evolve import SearchResult as SearchResult
    from moeprune_ext.allocation.evolve import evolve as evolve
    from moeprune_ext.allocation.grape import grape as grape
    from moeprune_ext.allocation.naee import naee_plan as naee_plan
    from moeprune_ext.allocation.settings import EvolveSettings as EvolveSettings
    from moeprune_ext.allocation.threshold import global_plan as global_plan
    from moeprune_ext.artifacts.plan import PruningPlan as PruningPlan
    from moeprune_ext.artifacts.scores import ExpertScores as ExpertScores
    from moeprune_ext.artifacts.stats import RoutingStats as RoutingStats
    from moeprune_ext.calibration.calibrate import calibrate as calibrate
    from moeprune_ext.calibration.criteria import score_experts as score_experts
    from moeprune_ext.calibration.criteria import super_experts as super_experts
    from moeprune_ext.candidates.evaluator import CandidateEvaluator as CandidateEvaluator
    from moeprune_ext.candidates.metrics import CandidateScore as CandidateScore
    from moeprune_ext.checkpoint.export import export as export
    from moeprune_ext.checkpoint.load import load as load
    from moeprune_ext.checkpoint.mtp import load_mtp as load_mtp
    from moeprune_ext.checkpoint.prune import prune_ as prune_
    from moeprune_ext.data.tasks import Example as Example
    from moeprune_ext.data.tasks import Task as Task
    from moeprune_ext.data.tasks import load_task as load_task
    from moeprune_ext.eep.eep import EepResult as EepResult
    from moeprune_ext.eep.eep import eep as eep
    from moeprune_ext.evaluate.compare import Comparison as Comparison
    from moeprune_ext.evaluate.compare import compare as compare
    from moeprune_ext.evaluate.quality import accuracy as accuracy
    from moeprune_ext.evaluate.quality import accuracy_interval as accuracy_interval
    from moeprune_ext.evaluate.quality import perplexity as perplexity
    from moeprune_ext.evaluate.quality import perplexity_interval as perplexity_interval
    from moeprune_ext.models.apply import applied as applied
    from moeprune_ext.models.moe import MoeModel as MoeModel
    from moeprune_ext.ops import reference as reference
    from moeprune_ext.ops.backend import build_info as build_info
    from moeprune_ext.ops.masked_router import masked_router as masked_router
    from moeprune_ext.ops.overlap import overlap as overlap
    from moeprune_ext.ops.overlap import overlap_from_hidden as overlap_from_hidden
    from moeprune_ext.ops.reference import RouterSpec as RouterSpec
    from moeprune_ext.ops.routing_moments import routing_moments_ as routing_moments_
    from moeprune_ext.pipeline.prune import PruneResult as PruneResult
    from moeprune_ext.pipeline.prune import prune_checkpoint as prune_checkpoint
    from moeprune_ext.pipeline.settings import PruneSettings as PruneSettings
    from moeprune_ext.pipeline.settings import TextSizes as TextSizes
    from moeprune_ext.repair.repair import RepairResult as RepairResult
    from moeprune_ext.repair.repair import repair as repair

    __version__: str

_MODULES = {
    "CandidateEvaluator": "candidates.evaluator",
    "CandidateScore": "candidates.metrics",
    "Comparison": "evaluate.compare",
    "EepResult": "eep.eep",
    "EvolveSettings": "allocation.settings",
    "Example": "data.tasks",
    "ExpertScores": "artifacts.scores",
    "Kept": "allocation.budget",
    "MoeModel": "models.moe",
    "PruneResult": "pipeline.prune",
    "PruneSettings": "pipeline.settings",
    "PruningPlan": "artifacts.plan",
    "RepairResult": "repair.repair",
    "RouterSpec": "ops.reference",
    "RoutingStats": "artifacts.stats",
    "SearchResult": "allocation.evolve",
    "Task": "data.tasks",
    "TextSizes": "pipeline.settings",
    "accuracy": "evaluate.quality",
    "accuracy_interval": "evaluate.quality",
    "applied": "models.apply",
    "build_info": "ops.backend",
    "calibrate": "calibration.calibrate",
    "compare": "evaluate.compare",
    "damages": "allocation.damages",
    "dp_plan": "allocation.damages",
    "eep": "eep.eep",
    "evolve": "allocation.evolve",
    "export": "checkpoint.export",
    "global_plan": "allocation.threshold",
    "grape": "allocation.grape",
    "load": "checkpoint.load",
    "load_mtp": "checkpoint.mtp",
    "load_task": "data.tasks",
    "masked_router": "ops.masked_router",
    "naee_plan": "allocation.naee",
    "overlap": "ops.overlap",
    "overlap_from_hidden": "ops.overlap",
    "perplexity": "evaluate.quality",
    "perplexity_interval": "evaluate.quality",
    "prune_": "checkpoint.prune",
    "prune_checkpoint": "pipeline.prune",
    "reference": "ops.reference",
    "repair": "repair.repair",
    "routing_moments_": "ops.routing_moments",
    "score_experts": "calibration.criteria",
    "super_experts": "calibration.criteria",
    "uniform_plan": "allocation.budget",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use (PEP 562)."""
    if name == "__version__":
        value = import_module("moeprune_ext.ops.backend").build_info()["version"]
    elif name in _MODULES:
        module = import_module(f"moeprune_ext.{_MODULES[name]}")
        value = getattr(module, name, module)  # `reference` is a module itself
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names; the folders' modules are there, too, and are named by their imports."""
    return sorted(__all__)
