"""An MoE layer: what in it belongs to which expert, and the mask that slices its router.

transformers 5 gives nearly every MoE model the same two joints: a *router* module that holds every per-expert tensor of
the routing decision, and an *experts* module called as `experts(hidden [T, H], expert_ids [T, K], weights [T, K])`.
Nothing here knows a model by name but the adapter table, on routers and experts that are more than that.

A *mask* slices the router: each of its per-expert tensors (and of its parent block's) is indexed by the kept experts,
its expert count is set, and the ids it returns are translated on their way into the experts. No expert's weights are
touched or copied, and what is computed is what the pruned checkpoint computes. Source of the rule that a pruned expert
is absent from the softmax: EvoESAP, arXiv 2603.06003.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.modeling import MAPPED
from moeprune_ext.models.patches import ExpertsFunction, intercepted

# The names under which configurations and modules store the number of routed experts.
EXPERT_COUNT_NAMES = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)


# ... and of all the router's rows, where it has more than experts.
ROW_COUNT_NAMES = ("n_total_experts", "num_router_classes", "total_experts")


# The names under which routers and their blocks, and configurations, store the number of experts per token.
TOP_K_NAMES = ("top_k", "num_experts_per_tok")


TOP_K_CONFIG_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")


# The adapter table, by the router's class.
# Rows of the router beyond the experts', which every mask keeps: shared experts' gates, a skip class, identity experts.
TRAILING_ROWS: dict[str, Callable[[Any, int], int]] = {
    "InklingTopkRouter": lambda router, count: router.n_shared_experts,
    "LongcatFlashTopkRouter": lambda router, count: router.e_score_correction_bias.shape[0] - count,
    "ZayaRouter": lambda router, count: 1,
}


# The expert count is read from the router's configuration at every call.
READS_CONFIG = frozenset({"ZayaRouter"})


# The experts are looked up by token id, whatever the hidden state is: such a layer is never pruned.
FIXED_CHOICE = frozenset({"DeepseekV4HashRouter"})


# Experts whose forward fails when a row names one expert only; they have an identity expert, the first trailing row.
WANT_TWO = frozenset({"LongcatFlashExperts"})


# Each chosen expert's weight is a softmax of its own, over other experts: under a mask their proportions change.
OWN_SOFTMAX = frozenset({"PhimoeTopKRouter"})


# Select a number of experts that is written in the code, whatever the configuration says.
FIXED_TOP_K = frozenset({"PhimoeTopKRouter"})


@dataclass(frozen=True)
class MoeLayer:
    """One decoder layer's router and experts.

    Attributes:
        index: the decoder layer's number.
        name: path of `block` in the model.
        block: the parent of router and experts.
        router: the module that chooses.
        experts: the module that is called with hidden states, expert ids and weights.
        router_name: path of the router in the block.
        experts_name: path of the experts in the block.
        shape: what pruning must respect.
        trailing: rows of the router beyond its experts', whose ids follow theirs.
    """

    index: int
    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    router_name: str
    experts_name: str
    shape: LayerShape
    trailing: int = 0

    @property
    def active(self) -> int:
        """Experts that the router selects per token now; `shape.top_k` says how many when the layer was found."""
        now = _top_k(self.router, self.block)
        return self.shape.top_k if now is None else now

    @property
    def fewest_active(self) -> int:
        """Fewest experts per token that the router can be made to select."""
        if type(self.router).__name__ in FIXED_CHOICE | FIXED_TOP_K:
            return self.shape.top_k
        return 2 if type(self.experts).__name__ in WANT_TWO else 1

    def shape_with(self, active: int | None) -> LayerShape:
        """Returns what pruning must respect with `active` experts per token; None: as many as the router selected."""
        if active is None:
            return self.shape
        return layer_shape(self.block, self.router, self.experts, self.name, active)

    @property
    def router_rows(self) -> int:
        """The router's rows, trailing ones included; the ids that it answers lie below this."""
        return self.shape.num_experts + self.trailing

    def with_trailing(self, kept: Sequence[int]) -> list[int]:
        """Returns the router's rows that remain when it keeps these experts."""
        return [*kept, *range(self.shape.num_experts, self.router_rows)]


def expert_count(experts: nn.Module) -> int | None:
    return _first_integer(("num_experts", "num_routed_experts"), experts)


def trailing_rows(router: nn.Module, count: int) -> int:
    rows = TRAILING_ROWS.get(type(router).__name__)
    return 0 if rows is None else rows(router, count)


def _first_integer(names: Sequence[str], *modules: object) -> int | None:
    for module in modules:
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def layer_shape(
    block: nn.Module, router: nn.Module, experts: nn.Module, name: str, active: int | None = None
) -> LayerShape:
    """Returns what pruning must respect in a layer.

    Args:
        block: the parent of router and experts.
        router: its router.
        experts: its experts.
        name: the block's path, for errors.
        active: experts per token; None: as many as the router selects.
    """
    count = expert_count(experts)
    assert count is not None
    top_k = _top_k(router, block) if active is None else active
    if top_k is None:
        raise ValueError(
            f"{name}: the router {type(router).__name__} does not say how many experts it selects per token"
        )
    n_group = _first_integer(("num_group", "n_group"), router, block) or 1
    topk_group = _first_integer(("topk_group",), router, block) or n_group
    if getattr(router, "topk_method", None) == "greedy":  # DeepSeek-V2's ungrouped choice
        n_group = topk_group = 1
    per_group = -(-top_k // topk_group)
    if hasattr(router, "topk_group") and _has_correction_bias(router):
        per_group = max(per_group, 2)  # DeepSeek-V3 ranks groups, be it one, by the sum of their two best experts
    if top_k > count:
        raise ValueError(f"{name}: the configuration selects {top_k} experts per token, but there are {count}")
    if type(router).__name__ in FIXED_CHOICE:
        return LayerShape(count, top_k, min_kept=count, prunable=False)
    return LayerShape(count, top_k, n_group, min_kept=max(top_k, n_group * per_group))


def _top_k(router: nn.Module, block: nn.Module) -> int | None:
    own = _first_integer(TOP_K_NAMES, router, block)
    return _first_integer(("top_k_experts",), getattr(router, "config", None)) if own is None else own


def _has_correction_bias(router: nn.Module) -> bool:
    tensors = [*router.named_parameters(), *router.named_buffers()]
    return any("correction_bias" in name for name, _ in tensors)


def expert_axis(tensor: Tensor, count: int, trailing: int = 0) -> int | None:
    """Returns the axis that counts experts: the first of that size, which may be the last (of [1, E] biases)."""
    return next((axis for axis, size in enumerate(tensor.shape) if size in (count, count + trailing)), None)


@dataclass(frozen=True)
class PerExpertTensor:
    """A parameter or buffer with one slice per expert.

    Attributes:
        owner: the module that has it.
        name: its name there.
        path: its path inside the layer's block.
        axis: of the slices.
        trailing: slices beyond the experts'.
    """

    owner: nn.Module
    name: str
    path: str
    axis: int
    trailing: int = 0

    def slices(self, kept: Sequence[int], size: int) -> list[int]:
        """Returns which of `size` slices along the axis remain when these experts are kept."""
        return [*kept, *range(size - self.trailing, size)]


def router_tensors(layer: MoeLayer) -> list[PerExpertTensor]:
    """Finds every per-expert tensor of the routing decision: the router's, at any depth, and the block's direct ones.

    Of a mapped router (modeling.py) only its maps count: its other tensors are those of the experts that it scores.
    """
    if hasattr(layer.router, MAPPED[0]):
        own = [name for name in MAPPED if hasattr(layer.router, name)]
        return [PerExpertTensor(layer.router, name, f"{layer.router_name}.{name}", 0) for name in own]
    owners = [(f"{layer.router_name}.{path}".rstrip("."), m) for path, m in layer.router.named_modules()]
    return _per_expert_tensors([*owners, ("", layer.block)], layer)


def expert_tensors(layer: MoeLayer) -> list[PerExpertTensor]:
    """Finds every per-expert tensor of the experts module: weights, biases, scales, stacked along axis 0."""
    tensors = _per_expert_tensors([(layer.experts_name, layer.experts)], layer)
    return [tensor for tensor in tensors if tensor.axis == 0]


def _per_expert_tensors(owners: list[tuple[str, nn.Module]], layer: MoeLayer) -> list[PerExpertTensor]:
    tensors = []
    count = layer.shape.num_experts
    for path, owner in owners:
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            axis = expert_axis(tensor, count, layer.trailing)
            if axis is not None:
                full_path = f"{path}.{name}".lstrip(".")
                tensors.append(PerExpertTensor(owner, name, full_path, axis, tensor.shape[axis] - count))
    return tensors


# ---- a mask


def half_kept(layer: MoeLayer) -> list[int]:
    """Returns the ids of about half of a layer's experts, as many in every group as its router needs."""
    count, groups = layer.shape.num_experts, layer.shape.n_group
    size = count // groups
    keep = max(-(-layer.shape.min_kept // groups), (size + 1) // 2)
    return [g * size + i for g in range(groups) for i in range(size - keep, size)]


def slice_(tensors: list[PerExpertTensor], kept: Sequence[int]) -> None:
    """Replaces tensors by their slices of the kept experts and of what lies beyond the experts."""
    for tensor in tensors:
        old = getattr(tensor.owner, tensor.name)
        rows = tensor.slices(kept, old.shape[tensor.axis])
        new = old.detach().index_select(tensor.axis, torch.tensor(rows, device=old.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(tensor.owner, tensor.name, new)


@dataclass(frozen=True)
class Counter:
    """An attribute `owner.name` that counts experts and `trailing` further rows of the router."""

    owner: Any
    name: str
    trailing: int


def expert_counters(layer: MoeLayer, modules: list[nn.Module]) -> list[Counter]:
    """Finds the attributes of some of a layer's modules that count its experts or its router's rows."""
    names: dict[int, tuple[str, ...]] = {layer.shape.num_experts: EXPERT_COUNT_NAMES}
    if layer.trailing:
        names[layer.router_rows] = (*EXPERT_COUNT_NAMES, *ROW_COUNT_NAMES)
    return [
        Counter(module, name, total - layer.shape.num_experts)
        for module in modules
        for total, known in names.items()
        for name in known
        if getattr(module, name, None) == total
    ]


def own_config(router: nn.Module, kept: int) -> Any:
    """Returns a copy of the configuration that a router reads its expert count from, with another count."""
    config = copy.copy(router.config)
    for name in EXPERT_COUNT_NAMES:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, kept)
    return config


@contextmanager
def masked(layer: MoeLayer, kept: Sequence[int]) -> Iterator[None]:
    """Inside, the layer routes over the kept experts only; afterwards it is as before."""
    tensors = router_tensors(layer)
    before = [getattr(tensor.owner, tensor.name) for tensor in tensors]
    counters = expert_counters(layer, [*layer.router.modules(), layer.block])
    config: Any = getattr(layer.router, "config", None)
    kept_ids = torch.tensor(layer.with_trailing(kept), device=before[0].device)

    def to_stored_ids(original: ExpertsFunction, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return original(hidden, kept_ids.to(expert_ids.device)[expert_ids], weights)

    try:
        slice_(tensors, kept)
        for counter in counters:
            setattr(counter.owner, counter.name, len(kept) + counter.trailing)
        if type(layer.router).__name__ in READS_CONFIG:
            layer.router.config = own_config(layer.router, len(kept))
        with intercepted(layer.experts, to_stored_ids):
            yield
    finally:
        for counter in counters:
            setattr(counter.owner, counter.name, layer.shape.num_experts + counter.trailing)
        if type(layer.router).__name__ in READS_CONFIG:
            layer.router.config = config
        for tensor, old in zip(tensors, before, strict=True):
            setattr(tensor.owner, tensor.name, old)
