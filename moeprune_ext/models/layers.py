"""Finds the Mixture-of-Experts layers of a Hugging Face model, and what in them belongs to which expert.

transformers 5 gives nearly every MoE model the same two joints: a *router* module that holds every per-expert tensor of
the routing decision, and an *experts* module called as `experts(hidden [T, H], expert_ids [T, K], weights [T, K])`.
Nothing here knows a model by name but the adapter table, on routers and experts that are more than that.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moeprune_ext.artifacts.stats import LayerShape
from moeprune_ext.modeling import MAPPED

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
        return _layer_shape(self.block, self.router, self.experts, self.name, active)

    @property
    def router_rows(self) -> int:
        """The router's rows, trailing ones included; the ids that it answers lie below this."""
        return self.shape.num_experts + self.trailing

    def with_trailing(self, kept: Sequence[int]) -> list[int]:
        """Returns the router's rows that remain when it keeps these experts."""
        return [*kept, *range(self.shape.num_experts, self.router_rows)]


def find_moe_layers(model: nn.Module) -> dict[int, MoeLayer]:
    """Finds a model's MoE layers, {decoder layer: MoeLayer}, in order; `MoeModel.of` is where it is called.

    Raises:
        ValueError: when there is none, when a layer's router cannot be told, or when a mask is applied.
    """
    layers: dict[int, MoeLayer] = {}
    for name, experts in model.named_modules():
        if not _is_experts(experts):
            continue
        parent_name, _, experts_name = name.rpartition(".")
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", parent_name)
        if not numbers:
            continue
        index = int(numbers[0])
        if index in layers:
            raise ValueError(
                f"decoder layer {index} has two experts modules ({layers[index].name} and {name}): with several stacks "
                "of experts behind one configuration this model is not supported; where one of them is a language "
                "model of its own, pass that"
            )
        if len(inspect.signature(type(experts).forward).parameters) < 4:  # self, hidden states, expert ids, weights
            raise ValueError(
                f"{name} ({type(experts).__name__}) is not called with hidden states, expert ids and gate weights, so "
                "what it computes for one expert cannot be asked for; this model is not supported"
            )
        block = model.get_submodule(parent_name)
        router_name, router = _find_router(block, experts, parent_name)
        shape = _layer_shape(block, router, experts, parent_name)
        trailing = _trailing(router, shape.num_experts)
        layers[index] = MoeLayer(index, parent_name, block, router, experts, router_name, experts_name, shape, trailing)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no Mixture-of-Experts layers: no module holds stacked expert weights behind a "
            "router; expert pruning needs an MoE model such as OLMoE, Qwen3-MoE, Mixtral or DeepSeek"
        )
    if len(paths := list_paths(layers)) > 1:
        raise ValueError(
            f"{type(model).__name__} has MoE layers in several stacks ({', '.join(paths)}), of which it cannot be told "
            "which is its language model's; where one of them is a model of its own, pass that"
        )
    return dict(sorted(layers.items()))


def list_paths(layers: Mapping[int, MoeLayer]) -> list[str]:
    """Returns the paths of the lists in which the layers stand."""
    return sorted({re.split(r"(?:^|\.)\d+(?=\.|$)", layer.name)[0] for layer in layers.values()})


def _is_experts(module: nn.Module) -> bool:
    count = _expert_count(module)
    return count is not None and any(p.ndim == 3 and p.shape[0] == count for p in module.parameters(recurse=False))


def _expert_count(experts: nn.Module) -> int | None:
    return _first_integer(("num_experts", "num_routed_experts"), experts)


def _trailing(router: nn.Module, count: int) -> int:
    rows = TRAILING_ROWS.get(type(router).__name__)
    return 0 if rows is None else rows(router, count)


def _find_router(block: nn.Module, experts: nn.Module, name: str) -> tuple[str, nn.Module]:
    count = _expert_count(experts)
    assert count is not None
    found = [
        (child_name, child)
        for child_name, child in block.named_children()
        if child is not experts
        and re.search(r"router|gate", type(child).__name__, re.IGNORECASE)
        and any(_expert_axis(t, count, _trailing(child, count)) is not None for t in child.parameters())
    ]
    if len(found) != 1:
        classes = sorted({type(child).__name__ for child in block.children()})
        raise ValueError(
            f"{name} has {len(found)} routers over its {count} experts (modules: {', '.join(classes)}); either this "
            "model's router is not supported, or a mask is applied to it now"
        )
    return found[0]


def _first_integer(names: Sequence[str], *modules: object) -> int | None:
    for module in modules:
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _layer_shape(
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
    count = _expert_count(experts)
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


def _expert_axis(tensor: Tensor, count: int, trailing: int = 0) -> int | None:
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
    found = _per_expert_tensors([(layer.experts_name, layer.experts)], layer)
    return [tensor for tensor in found if tensor.axis == 0]


def _per_expert_tensors(owners: list[tuple[str, nn.Module]], layer: MoeLayer) -> list[PerExpertTensor]:
    found = []
    count = layer.shape.num_experts
    for path, owner in owners:
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            axis = _expert_axis(tensor, count, layer.trailing)
            if axis is not None:
                full_path = f"{path}.{name}".lstrip(".")
                found.append(PerExpertTensor(owner, name, full_path, axis, tensor.shape[axis] - count))
    return found
