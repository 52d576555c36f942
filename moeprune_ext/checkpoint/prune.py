"""A plan carried out on a model in memory for good."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from moeprune_ext.artifacts.plan import HasPlan, PruningPlan, plan_of
from moeprune_ext.checkpoint.read import skeleton
from moeprune_ext.checkpoint.record import (
    PER_LAYER,
    differences,
    experts_per_layer,
    mapped_parameters,
    router_rule,
)
from moeprune_ext.modeling import CONFIG_KEY, auto_map, map_router_, model_class
from moeprune_ext.models.active import lowered, set_active_
from moeprune_ext.models.apply import check_plan
from moeprune_ext.models.layers import (
    EXPERT_COUNT_NAMES,
    READS_CONFIG,
    TOP_K_CONFIG_NAMES,
    expert_counters,
    expert_tensors,
    own_config,
    router_tensors,
    slice_,
)
from moeprune_ext.models.merging import Replaced, mapped_layer, merge_rows_, undone_on_failure
from moeprune_ext.models.moe import MoeModel, text_config


def prune_(model: nn.Module | MoeModel, plan: PruningPlan | HasPlan) -> None:
    """Carries out a plan in place: experts and routers are sliced, merged experts get their weights, routers map.

    The configuration follows: its numbers where they can describe the result, else with a record of the differences.
    Then the model's class follows, too (modeling.model_class): what save_pretrained writes is such an export, and the
    load-balancing loss is that of unequal layers. Where merges cannot be made the model is left as it was.

    Args:
        model: a transformers model, or the MoeModel made of it, which describes the model no longer afterwards.
        plan: or the result of a search.

    Raises:
        ValueError: as `applied`, and for a model whose layers are streamed.
    """
    moe, plan = MoeModel.of(model), plan_of(plan)
    if moe.stream is not None:
        raise ValueError("a streamed model cannot be pruned in place; export the plan and load the export")
    map_router = functools.cache(mapped_layer)
    check_plan(plan, moe.layers, moe.fingerprint, map_router)
    routers = {index: map_router(moe.layers[index]) for index in plan.mapped_layers}
    before: Replaced = []
    with undone_on_failure(before):
        for index, merge in plan.merges.items():
            merge_rows_(moe.layers[index], plan.kept[index], merge, before)
    slice_layers_(moe, plan.kept, routers)
    for index, routed in routers.items():
        router, merge = moe.layers[index].router, plan.merges[index]
        map_router_(router, router_rule(routed, len(merge.experts)))
        for name, value in mapped_parameters(routed, merge).items():
            getattr(router, name).data.copy_(value)
    if plan.active is not None:
        _set_active_(moe, plan.active)
    _record_(moe.model)


def slice_layers_(moe: MoeModel, kept: Mapping[int, Sequence[int]], mapped: Collection[int] = ()) -> None:
    """Slices experts, and routers but those of the layers in `mapped`; sets every number that counts them."""
    for index, ids in kept.items():
        layer, keeps_router = moe.layers[index], index in mapped
        if len(ids) == layer.shape.num_experts:
            continue
        slice_(expert_tensors(layer) + ([] if keeps_router else router_tensors(layer)), ids)
        modules = [layer.experts] if keeps_router else [*layer.router.modules(), layer.block, layer.experts]
        for counter in expert_counters(layer, modules):
            setattr(counter.owner, counter.name, len(ids) + counter.trailing)
        if type(layer.router).__name__ in READS_CONFIG and not keeps_router:
            layer.router.config = own_config(layer.router, len(ids))
    counts = {len(kept.get(index, range(layer.shape.num_experts))) for index, layer in moe.layers.items()}
    if len(counts) == 1 and not mapped:
        before = {layer.shape.num_experts for layer in moe.layers.values()}
        if hasattr(moe.model.config, CONFIG_KEY):  # the numbers are those without it
            before |= {layer.shape.num_experts for layer in MoeModel.of(skeleton(moe.model.config, {})).layers.values()}
        for owner in (text_config(moe), moe.model):  # some models hold the number, too, for the load-balancing loss
            for name in EXPERT_COUNT_NAMES:
                if getattr(owner, name, None) in before:
                    setattr(owner, name, *counts)


def _set_active_(moe: MoeModel, active: int) -> None:
    """Makes all routers select `active` experts per token, and the configuration say so."""
    config = text_config(moe)
    for layer in moe.layers.values():
        set_active_(layer, active)
    for name in TOP_K_CONFIG_NAMES:
        if (value := lowered(getattr(config, name, None), active)) is not None:
            setattr(config, name, value)


def _record_(model: Any) -> None:
    """Makes the configuration say how the model differs from it, as an export does, and the class save it as such."""
    from transformers import PreTrainedModel

    config = model.config
    text = config.get_text_config()
    for owner, name in ((config, CONFIG_KEY), (config, "auto_map"), (text, PER_LAYER)):
        if hasattr(owner, name):
            delattr(owner, name)
    if isinstance(model, PreTrainedModel):
        model.__class__ = getattr(model, "moeprune_base", type(model))
    layers = MoeModel.of(model).layers
    counts = {index: layer.shape.num_experts for index, layer in layers.items()}
    rules = {index: getattr(layer.router, "moeprune_rule", None) for index, layer in layers.items()}
    mapped = {index: rule for index, rule in rules.items() if rule is not None}
    original = MoeModel.of(skeleton(config, {})).layers
    if mapped or counts != {index: layer.shape.num_experts for index, layer in original.items()}:
        record = differences(original, counts, mapped)
        setattr(config, CONFIG_KEY, record)
        config.auto_map = auto_map(config)
        if not mapped:
            setattr(text, PER_LAYER, experts_per_layer(original, counts, text))
        if isinstance(model, PreTrainedModel):
            model.__class__ = model_class(type(model), record)
