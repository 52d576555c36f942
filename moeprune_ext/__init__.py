"""moeprune_ext: prune Mixture-of-Experts language models without gradients.

model + text --calibrate--> RoutingStats --score_experts--> ExpertScores --uniform_plan | global_plan | dp_plan |
grape | evolve--> PruningPlan --export--> checkpoint --load--> model. For a task instead of text: model + task --eep-->
PruningPlan, or merges. One step, one module; every product is a file.
"""

from moeprune_ext import reference
from moeprune_ext.allocate import damages, dp_plan, global_plan
from moeprune_ext.apply import applied, prune_
from moeprune_ext.calibrate import RoutingStats, calibrate
from moeprune_ext.criteria import ExpertScores, score_experts, super_experts
from moeprune_ext.eep import EepResult, eep
from moeprune_ext.evaluate import accuracy, load_task, perplexity
from moeprune_ext.evaluator import CandidateEvaluator, CandidateScore
from moeprune_ext.evolve import SearchResult, evolve
from moeprune_ext.export import export, load
from moeprune_ext.grape import grape
from moeprune_ext.naee import naee_plan
from moeprune_ext.ops import (
    RouterSpec,
    build_info,
    masked_router,
    overlap,
    overlap_from_hidden,
    routing_moments_,
)
from moeprune_ext.plan import PruningPlan, uniform_plan

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
