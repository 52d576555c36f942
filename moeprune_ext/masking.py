"""Puts a pruning mask on MoE layers and takes it off, or prunes them for good.

A *mask* slices the router: each of its per-expert tensors (and of its parent block's) is indexed by the kept experts,
its expert count is set, and the ids it returns are mapped back on their way into the experts. No expert's weights are
touched or copied, and what is computed is what the pruned checkpoint computes. *Pruning* slices the router and the
experts alike.

Source of the rule that a pruned expert is absent from the softmax: EvoESAP, arXiv 2603.06003.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.modeling import MAPPED, router_weight
from moeprune_ext.moe import (
    EXPERT_COUNT_NAMES,
    OWN_SOFTMAX,
    READS_CONFIG,
    ROW_COUNT_NAMES,
    ExpertsFunction,
    MoeLayer,
    PerExpertTensor,
    expert_tensors,
    fewer_active,
    find_moe_layers,
    intercepted,
    router_tensors,
)
from moeprune_ext.plan import PruningPlan


def _slice(tensors: list[PerExpertTensor], kept: Sequence[int]) -> None:
    for place in tensors:
        old = getattr(place.owner, place.name)
        rows = place.slices(kept, old.shape[place.axis])
        new = old.detach().index_select(place.axis, torch.tensor(rows, device=old.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(place.owner, place.name, new)


@dataclass(frozen=True)
class _Counter:
    """An attribute in which `owner` stores the number of experts, or (`trailing` > 0) of all the router's rows."""

    owner: Any
    name: str
    trailing: int


def expert_counters(layer: MoeLayer, modules: list[nn.Module]) -> list[_Counter]:
    names: dict[int, tuple[str, ...]] = {layer.shape.num_experts: EXPERT_COUNT_NAMES}
    if layer.trailing:
        names[layer.router_rows] = (*EXPERT_COUNT_NAMES, *ROW_COUNT_NAMES)
    return [
        _Counter(module, name, total - layer.shape.num_experts)
        for module in modules
        for total, known in names.items()
        for name in known
        if getattr(module, name, None) == total
    ]


def _own_config(router: nn.Module, kept: int) -> Any:
    """The configuration that a router reads its expert count from, for it alone."""
    config = copy.copy(router.config)
    for name in EXPERT_COUNT_NAMES:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, kept)
    return config


@contextmanager
def masked(layer: MoeLayer, kept: Sequence[int]) -> Iterator[None]:
    """Inside, the layer routes over the kept experts only; afterwards it is as before."""
    tensors = router_tensors(layer)
    before = [getattr(place.owner, place.name) for place in tensors]
    counters = expert_counters(layer, [*layer.router.modules(), layer.block])
    config: Any = getattr(layer.router, "config", None)
    kept_ids = torch.tensor(layer.with_trailing(kept), device=before[0].device)

    def to_stored_ids(original: ExpertsFunction, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return original(hidden, kept_ids.to(expert_ids.device)[expert_ids], weights)

    try:
        _slice(tensors, kept)
        for counter in counters:
            setattr(counter.owner, counter.name, len(kept) + counter.trailing)
        if type(layer.router).__name__ in READS_CONFIG:
            layer.router.config = _own_config(layer.router, len(kept))
        with intercepted(layer.experts, to_stored_ids):
            yield
    finally:
        for counter in counters:
            setattr(counter.owner, counter.name, layer.shape.num_experts + counter.trailing)
        if type(layer.router).__name__ in READS_CONFIG:
            layer.router.config = config
        for place, tensor in zip(tensors, before, strict=True):
            setattr(place.owner, place.name, tensor)


@contextmanager
def masks(layers: Mapping[int, MoeLayer], plan: PruningPlan) -> Iterator[None]:
    """apply.applied for layers already found and a plan already checked.

    Merged experts take the places of kept ones, whose own weights are held meanwhile.
    """
    with ExitStack() as stack:
        stack.enter_context(fewer_active(layers, plan.active))
        for index, sums in plan.merged.items():
            stack.enter_context(_merged(layers[index], sums))
        for index, kept in plan.kept.items():
            if len(kept) < layers[index].shape.num_experts:
                stack.enter_context(masked(layers[index], kept))
        yield


def weighted_average(weights: Mapping[int, Tensor], shares: Mapping[int, float]) -> Tensor:
    """sum over e of shares[e] * weights[e], in float32 or better, in the dtype of the weights."""
    dtype = next(iter(weights.values())).dtype
    wide = torch.promote_types(dtype, torch.float32)
    return torch.stack([weights[expert].to(wide) * share for expert, share in shares.items()]).sum(0).to(dtype)


Replaced = list[tuple[Tensor, dict[int, Tensor]]]  # tensors, and the slices of experts that stood there


def merge_sums_(layer: MoeLayer, sums: Mapping[int, Mapping[int, float]], before: Replaced) -> None:
    """Replaces kept experts' weights by sums of experts'; what stood there is added to `before` first."""
    for place in expert_tensors(layer):
        tensor = getattr(place.owner, place.name).detach()
        new = {expert: weighted_average({e: tensor[e] for e in shares}, shares) for expert, shares in sums.items()}
        before.append((tensor, {expert: tensor[expert].clone() for expert in sums}))
        for expert, weight in new.items():
            tensor[expert] = weight


@contextmanager
def restored(before: Replaced, always: bool) -> Iterator[None]:
    """Puts back what `before` holds at the end: always, or after an exception only."""
    done = False
    try:
        yield
        done = True
    finally:
        for tensor, slices in before if always or not done else ():
            for expert, weight in slices.items():
                tensor[expert] = weight


@contextmanager
def _merged(layer: MoeLayer, sums: Mapping[int, Mapping[int, float]]) -> Iterator[None]:
    before: Replaced = []
    with restored(before, always=True):
        merge_sums_(layer, sums, before)
        yield


def resize_(model: nn.Module, kept: Mapping[int, Sequence[int]]) -> None:
    """Slices router and experts of the named layers, with no check; works on meta tensors too (see export.load)."""
    layers = find_moe_layers(model)
    for index, ids in kept.items():
        layer = layers[index]
        if len(ids) < layer.shape.num_experts:
            _slice(router_tensors(layer) + expert_tensors(layer), ids)
            for counter in expert_counters(layer, [*layer.router.modules(), layer.block, layer.experts]):
                setattr(counter.owner, counter.name, len(ids) + counter.trailing)
            if type(layer.router).__name__ in READS_CONFIG:
                layer.router.config = _own_config(layer.router, len(ids))
    counts = {len(kept.get(index, range(layer.shape.num_experts))) for index, layer in layers.items()}
    if len(counts) == 1:
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        before = {layer.shape.num_experts for layer in layers.values()}
        for owner in (config, model):  # some models hold the number themselves, for the load-balancing loss
            for name in EXPERT_COUNT_NAMES:
                if getattr(owner, name, None) in before:
                    setattr(owner, name, *counts)


def check_plan(plan: PruningPlan, layers: Mapping[int, MoeLayer], fingerprint: str | None) -> None:
    """Refuses a plan that this model cannot carry out, and says why (ValueError)."""
    if plan.model is not None and fingerprint is not None and plan.model != fingerprint:
        raise ValueError(
            f"this plan was made for another model: its fingerprint is {plan.model}, the model's is {fingerprint}; "
            "make the plan again from this model's own calibration"
        )
    if unknown := sorted(set(plan.kept) - set(layers)):
        raise ValueError(f"the plan names layers {unknown}, but the model's MoE layers are {sorted(layers)}")
    check_active(plan.active, layers)
    for index, kept in plan.kept.items():
        shape = layers[index].shape_with(plan.active)
        if plan.num_experts[index] != shape.num_experts:
            made_for = plan.num_experts[index]
            raise ValueError(
                f"layer {index}: the plan was made for {made_for} experts, the model has {shape.num_experts}"
            )
        if len(set(kept)) != len(kept) or not all(0 <= e < shape.num_experts for e in kept):
            raise ValueError(
                f"layer {index}: kept ids must be distinct and in [0, {shape.num_experts}), got {list(kept)}"
            )
        if len(kept) < shape.min_kept:
            raise ValueError(
                f"layer {index} keeps {len(kept)} experts, but its router needs at least {shape.min_kept} "
                f"(it selects {shape.top_k} per token); lower the sparsity"
            )
        if shape.n_group > 1 and len(kept) < shape.num_experts:
            size = shape.num_experts // shape.n_group
            per_group = [sum(1 for e in kept if e // size == g) for g in range(shape.n_group)]
            if len(set(per_group)) != 1:
                raise ValueError(
                    f"layer {index}: its router chooses among {shape.n_group} groups, which must keep equally many "
                    f"experts, but the plan keeps {per_group}"
                )


def check_active(active: int | None, layers: Mapping[int, MoeLayer]) -> None:
    """Refuses (ValueError) a number of experts per token that the routers of these layers cannot select."""
    for index, layer in layers.items():
        if active is not None and not layer.fewest_active <= active <= layer.shape.top_k:
            raise ValueError(
                f"layer {index}: {active} experts active per token; its router selects {layer.shape.top_k} and can be "
                f"made to select {layer.fewest_active} or more"
            )


def half_kept(layer: MoeLayer) -> list[int]:
    """About half of a layer's experts, as many in every group as its router needs."""
    count, groups = layer.shape.num_experts, layer.shape.n_group
    size = count // groups
    keep = max(-(-layer.shape.min_kept // groups), (size + 1) // 2)
    return [g * size + i for g in range(groups) for i in range(size - keep, size)]


def check_slicing(layers: Mapping[int, MoeLayer]) -> None:
    """Refuses, by name, a router that slicing does not mask correctly.

    One layer of each router class is sliced and compared with the definition: its logits must be the full router's at
    the kept experts (probabilities: those, divided by their sum), its choice K distinct kept experts per row; and where
    the full router chooses kept experts only, the sliced one mostly chooses the same (a correction bias may weigh more
    against a softmax over fewer), with weights in the same proportions. Of routers with groups the last half of each is
    kept, of others the experts that some rows choose, so that there are such rows.
    """
    seen: set[type] = set()
    for layer in layers.values():
        if type(layer.router) in seen or layer.shape.capacity == 0:
            continue
        seen.add(type(layer.router))
        hidden = probe(layer, 64)
        full = router_answer(layer, hidden)
        kept = half_kept(layer) if full is None or layer.shape.n_group > 1 else _chosen_by_some(layer, full)
        with masked(layer, kept):
            sliced = router_answer(layer, hidden)
        if full is None or sliced is None or not _is_masked(layer, kept, full, sliced):
            raise ValueError(
                f"{type(layer.router).__name__} (layer {layer.index}) is a router that slicing does not mask "
                "correctly; this model is not supported yet"
            )


def _choice(layer: MoeLayer, answer: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """ids and weights [T, K] of a router's answer, where they can be told by their shapes."""
    shaped = [part.flatten(0, -2) for part in answer if part.ndim > 1 and part.shape[-1] == layer.active]
    ids = [part for part in shaped if not part.is_floating_point()]
    weights = [part for part in shaped if part.is_floating_point()]
    return ids[0] if ids else None, weights[0] if len(weights) == 1 else None


def _chosen_by_some(layer: MoeLayer, full: Sequence[Tensor]) -> list[int]:
    """Experts that the first rows choose, up to half of all, filled up to what the router needs."""
    ids, _ = _choice(layer, full)
    count = layer.shape.num_experts
    chosen: set[int] = set()
    for row in [] if ids is None else ids.tolist():
        more = chosen | {expert for expert in row if expert < count}
        if chosen and len(more) > max(count // 2, layer.shape.min_kept):
            break
        chosen = more
    missing = max(layer.shape.min_kept, 2) - len(chosen)
    return sorted([*chosen, *[e for e in range(count) if e not in chosen][: max(0, missing)]])


def _is_masked(layer: MoeLayer, kept: Sequence[int], full: Sequence[Tensor], sliced: Sequence[Tensor]) -> bool:
    rows, count = layer.with_trailing(kept), layer.shape.num_experts
    ids, weights = _choice(layer, sliced)
    full_ids, full_weights = _choice(layer, full)

    def agree(a: Tensor, b: Tensor) -> bool:
        if a.shape[-1] == count and b.shape[-1] == len(kept):
            a = a[..., list(kept)].float()
        elif layer.trailing and a.shape[-1] == layer.router_rows and b.shape[-1] == len(rows):
            a = a[..., rows].float()
        else:
            return False
        if hasattr(layer.router, MAPPED[0]):  # its scores are shares of the experts that the kept rows refer to
            a, b = (part / part.sum(-1, keepdim=True) for part in (a, b))
        options = (a, a / a.sum(-1, keepdim=True))
        return any(torch.allclose(option, b.float(), rtol=1e-2, atol=1e-3) for option in options)

    if (
        ids is None
        or full_ids is None
        or not (int(ids.min()) >= 0 and int(ids.max()) < len(rows))
        or not bool((ids.sort(-1).values.diff(dim=-1) > 0).all())
        or not any(agree(a, b) for a, b in zip(full, sliced, strict=True))
    ):
        return False
    stored = torch.tensor(rows, device=ids.device)
    inside = torch.isin(full_ids, stored).all(-1)
    order, full_order = stored[ids].argsort(-1), full_ids.argsort(-1)
    same = inside & (stored[ids].gather(-1, order) == full_ids.gather(-1, full_order)).all(-1)
    if layer.shape.n_group > 1 or not bool(inside.any()):
        return True
    if int(same.sum()) * 2 < int(inside.sum()):
        return False
    own = type(layer.router).__name__ in OWN_SOFTMAX
    if own or weights is None or full_weights is None or weights.shape != full_weights.shape:
        return True
    shares, full_shares = (w.float().gather(-1, o)[same] for w, o in ((weights, order), (full_weights, full_order)))
    shares, full_shares = (w / w.sum(-1, keepdim=True) for w in (shares, full_shares))
    return torch.allclose(shares, full_shares, rtol=2e-2, atol=1e-3, equal_nan=True)


def probe(layer: MoeLayer, rows: int) -> Tensor:
    """Random hidden states [rows, H] on which a router can be tried."""
    weight = router_weight(layer.router)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, weight.shape[1], generator=generator).to(weight.device, weight.dtype)


def router_answer(layer: MoeLayer, hidden: Tensor) -> tuple[Tensor, ...] | None:
    """The tensors that a layer's router answers for hidden [T, H]; None where they cannot be had.

    A router that wants more than hidden states (its parent's correction bias, another shape) is called by its parent.
    """
    answers: list[Any] = []

    def no_experts(original: ExpertsFunction, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros_like(hidden)

    with torch.no_grad():
        try:
            answers.append(layer.router(hidden))
        except (TypeError, RuntimeError, IndexError, ValueError):
            hook = layer.router.register_forward_hook(lambda module, inputs, output: answers.append(output))
            try:
                with intercepted(layer.experts, no_experts):
                    layer.block(hidden[None])
            except (TypeError, RuntimeError, IndexError, ValueError, AttributeError):
                return None
            finally:
                hook.remove()
    answer = answers[0] if answers else None
    parts = answer if isinstance(answer, tuple | list) else [answer]
    return tuple(part for part in parts if isinstance(part, Tensor)) or None
