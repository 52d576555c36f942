"""moeprune_ext: prune Mixture-of-Experts language models without gradients.

model + text --calibrate--> RoutingStats --score_experts--> ExpertScores --uniform_plan | global_plan | dp_plan |
grape | evolve--> PruningPlan --export--> checkpoint --load--> model. For a task instead of text: model + task --eep-->
PruningPlan, or merges. One step, one module; every product is a file.
"""

from moeprune_ext.allocation.budget import uniform_plan
from moeprune_ext.allocation.damages import damages, dp_plan
from moeprune_ext.allocation.evolve import SearchResult, evolve
from moeprune_ext.allocation.grape import grape
from moeprune_ext.allocation.naee import naee_plan
from moeprune_ext.allocation.threshold import global_plan
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.calibration.calibrate import calibrate
from moeprune_ext.calibration.criteria import score_experts, super_experts
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.candidates.metrics import CandidateScore
from moeprune_ext.checkpoint.export import export
from moeprune_ext.checkpoint.load import load
from moeprune_ext.checkpoint.prune import prune_
from moeprune_ext.data.tasks import load_task
from moeprune_ext.eep.eep import EepResult, eep
from moeprune_ext.evaluate import accuracy, perplexity
from moeprune_ext.models.apply import applied
from moeprune_ext.ops import reference
from moeprune_ext.ops.backend import build_info
from moeprune_ext.ops.masked_router import masked_router
from moeprune_ext.ops.overlap import overlap, overlap_from_hidden
from moeprune_ext.ops.reference import RouterSpec
from moeprune_ext.ops.routing_moments import routing_moments_

__version__: str = build_info()["version"]

__all__ = [
    "CandidateEvaluator",
    "CandidateScore",
    "EepResult",
    "ExpertScores",
    "PruningPlan",
    "RouterSpec",
    "RoutingStats",
    "SearchResult",
    "__version__",
    "accuracy",
    "applied",
    "build_info",
    "calibrate",
    "damages",
    "dp_plan",
    "eep",
    "evolve",
    "export",
    "global_plan",
    "grape",
    "load",
    "load_task",
    "masked_router",
    "naee_plan",
    "overlap",
    "overlap_from_hidden",
    "perplexity",
    "prune_",
    "reference",
    "routing_moments_",
    "score_experts",
    "super_experts",
    "uniform_plan",
]
