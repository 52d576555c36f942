"""Finds the Mixture-of-Experts layers of a Hugging Face model, and puts a pruning mask on them or prunes them for good.

transformers 5 gives nearly every MoE model the same two joints: a *router* module that holds every per-expert tensor of
the routing decision, and an *experts* module called as `experts(hidden [T, H], expert_ids [T, K], weights [T, K])`.
Nothing here knows a model by name:

- a *mask* slices the router: each of its per-expert tensors (and of its parent block's) is indexed by the kept experts,
  its expert count is set, and the ids it returns are mapped back on their way into the experts. No expert's weights are
  touched or copied, and what is computed is what the pruned checkpoint computes;
- *pruning* slices the router and the experts alike.

Source of the masking rule: EvoESAP, arXiv 2603.06003 (a pruned expert is absent from the softmax).
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from moeprune_ext.plan import PruningPlan

# The names under which configurations and modules store the number of routed experts.
EXPERT_COUNT_NAMES = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)

ExpertsFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LayerShape:
    """What pruning must respect in one layer.

    num_experts: routed experts stored, E. top_k: experts per token, K. n_group: groups of a group-limited router (every
    group must keep equally many), else 1. min_kept: fewest experts the router can work with.
    """

    num_experts: int
    top_k: int
    n_group: int = 1
    min_kept: int = 1

    @property
    def capacity(self) -> int:
        """Most experts that can be pruned, a multiple of n_group."""
        return (self.num_experts - self.min_kept) // self.n_group * self.n_group


@dataclass(frozen=True)
class MoeLayer:
    """One decoder layer's router and experts; `index` is the decoder layer's number, `name` the path of their
    parent."""

    index: int
    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    router_name: str
    experts_name: str
    shape: LayerShape


def find_moe_layers(model: nn.Module) -> dict[int, MoeLayer]:
    """The model's MoE layers by decoder-layer index, in order.

    Raises ValueError when there is none, when a layer's router cannot be told, or when a mask is applied.
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
                f"decoder layer {index} has two experts modules ({layers[index].name} and {name}); models with several "
                "MoE stacks need their language model passed on its own"
            )
        block = model.get_submodule(parent_name)
        router_name, router = _find_router(block, experts, parent_name)
        shape = _layer_shape(block, router, experts, parent_name)
        layers[index] = MoeLayer(index, parent_name, block, router, experts, router_name, experts_name, shape)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no Mixture-of-Experts layers: no module holds stacked expert weights behind a "
            "router; expert pruning needs an MoE model such as OLMoE, Qwen3-MoE, Mixtral or DeepSeek"
        )
    return dict(sorted(layers.items()))


def _is_experts(module: nn.Module) -> bool:
    count = getattr(module, "num_experts", None)
    return isinstance(count, int) and any(p.ndim == 3 and p.shape[0] == count for p in module.parameters(recurse=False))


def _find_router(block: nn.Module, experts: nn.Module, name: str) -> tuple[str, nn.Module]:
    count: int = experts.num_experts  # type: ignore[assignment]
    found = [
        (child_name, child)
        for child_name, child in block.named_children()
        if child is not experts
        and re.search(r"router|gate", type(child).__name__, re.IGNORECASE)
        and any(_expert_axis(t, count) is not None for t in child.parameters())
    ]
    if len(found) != 1:
        classes = sorted({type(child).__name__ for child in block.children()})
        raise ValueError(
            f"{name} has {len(found)} routers over its {count} experts (modules: {', '.join(classes)}); either this "
            "model's router is not supported, or a mask is applied to it now"
        )
    return found[0]


def _first_integer(names: Sequence[str], *modules: nn.Module) -> int | None:
    for module in modules:
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _layer_shape(block: nn.Module, router: nn.Module, experts: nn.Module, name: str) -> LayerShape:
    count: int = experts.num_experts  # type: ignore[assignment]
    top_k = _first_integer(("top_k", "num_experts_per_tok"), router, block)
    if top_k is None:
        raise ValueError(
            f"{name}: the router {type(router).__name__} does not say how many experts it selects per token"
        )
    n_group = _first_integer(("num_group", "n_group"), router, block) or 1
    topk_group = _first_integer(("topk_group",), router, block) or n_group
    if getattr(router, "topk_method", None) == "greedy":  # DeepSeek-V2's ungrouped choice
        n_group = topk_group = 1
    per_group = -(-top_k // topk_group)
    if n_group > 1 and _has_correction_bias(router):
        per_group = max(per_group, 2)  # DeepSeek-V3 ranks groups by the sum of their two best experts
    return LayerShape(count, top_k, n_group, n_group * per_group if n_group > 1 else top_k)


def _has_correction_bias(router: nn.Module) -> bool:
    tensors = [*router.named_parameters(), *router.named_buffers()]
    return any("correction_bias" in name for name, _ in tensors)


def _expert_axis(tensor: Tensor, count: int) -> int | None:
    """The axis that counts experts: the first of size `count` ([E, H] weights), which may be the last ([1, E]
    biases)."""
    return next((axis for axis, size in enumerate(tensor.shape) if size == count), None)


@dataclass(frozen=True)
class PerExpertTensor:
    """A parameter or buffer with one slice per expert: `owner.name`, its path inside the block, and that axis."""

    owner: nn.Module
    name: str
    path: str
    axis: int


def router_tensors(layer: MoeLayer) -> list[PerExpertTensor]:
    """Every per-expert tensor of the routing decision: the router's own, at any depth, and the parent block's direct
    ones."""
    owners = [(f"{layer.router_name}.{path}".rstrip("."), m) for path, m in layer.router.named_modules()]
    return _per_expert_tensors([*owners, ("", layer.block)], layer.shape.num_experts)


def expert_tensors(layer: MoeLayer) -> list[PerExpertTensor]:
    """Every per-expert tensor of the experts module: weights, biases, scales, stacked along axis 0."""
    found = _per_expert_tensors([(layer.experts_name, layer.experts)], layer.shape.num_experts)
    return [tensor for tensor in found if tensor.axis == 0]


def _per_expert_tensors(owners: list[tuple[str, nn.Module]], count: int) -> list[PerExpertTensor]:
    found = []
    for path, owner in owners:
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            axis = _expert_axis(tensor, count)
            if axis is not None:
                found.append(PerExpertTensor(owner, name, f"{path}.{name}".lstrip("."), axis))
    return found


def _slice(tensors: list[PerExpertTensor], kept: Sequence[int]) -> None:
    for place in tensors:
        old = getattr(place.owner, place.name)
        new = old.detach().index_select(place.axis, torch.tensor(kept, device=old.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(place.owner, place.name, new)


def _set_expert_count(modules: list[nn.Module], old: int, new: int) -> None:
    for module in modules:
        for name in EXPERT_COUNT_NAMES:
            if isinstance(getattr(module, name, None), int) and getattr(module, name) == old:
                setattr(module, name, new)


@contextmanager
def intercepted(
    experts: nn.Module, function: Callable[[ExpertsFunction, Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Routes calls of one experts module through `function(original, hidden, expert_ids, weights)` for a while."""
    original = experts.forward
    signature = inspect.signature(original)
    shadowed = "forward" in experts.__dict__

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        hidden, expert_ids, weights = list(signature.bind(*args, **kwargs).arguments.values())[:3]
        return function(original, hidden, expert_ids, weights)

    experts.forward = forward
    try:
        yield
    finally:
        if shadowed:
            experts.forward = original
        else:
            del experts.forward


@contextmanager
def masked(layer: MoeLayer, kept: Sequence[int]) -> Iterator[None]:
    """Inside, the layer routes over the kept experts only; afterwards it is as before."""
    count = layer.shape.num_experts
    tensors = router_tensors(layer)
    before = [getattr(place.owner, place.name) for place in tensors]
    modules = [*layer.router.modules(), layer.block]
    kept_ids = torch.tensor(kept, device=before[0].device)

    def to_stored_ids(original: ExpertsFunction, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return original(hidden, kept_ids.to(expert_ids.device)[expert_ids], weights)

    try:
        _slice(tensors, kept)
        _set_expert_count(modules, count, len(kept))
        with intercepted(layer.experts, to_stored_ids):
            yield
    finally:
        _set_expert_count(modules, len(kept), count)
        for place, tensor in zip(tensors, before, strict=True):
            setattr(place.owner, place.name, tensor)


@contextmanager
def applied(model: nn.Module, plan: PruningPlan) -> Iterator[nn.Module]:
    """The model under a plan's mask: inside it computes what the pruned checkpoint computes; afterwards it is
    untouched.

    Raises ValueError when the plan belongs to another model or keeps too few experts.
    """
    layers = find_moe_layers(model)
    check_plan(plan, layers, model_fingerprint(model, layers))
    with masks(layers, plan):
        yield model


@contextmanager
def masks(layers: Mapping[int, MoeLayer], plan: PruningPlan) -> Iterator[None]:
    """`applied` for layers already found and a plan already checked."""
    with ExitStack() as stack:
        for index, kept in plan.kept.items():
            if len(kept) < layers[index].shape.num_experts:
                stack.enter_context(masked(layers[index], kept))
        yield


def prune_(model: nn.Module, plan: PruningPlan) -> None:
    """Removes the experts a plan does not keep, in place: router and expert tensors are sliced, counts are set.

    The configuration's expert count follows when every layer keeps equally many. Raises ValueError as `applied`.
    """
    layers = find_moe_layers(model)
    check_plan(plan, layers, model_fingerprint(model, layers))
    resize_(model, plan.kept)


def resize_(model: nn.Module, kept: Mapping[int, Sequence[int]]) -> None:
    """Slices router and experts of the named layers, with no check; works on meta tensors too (see export.load)."""
    layers = find_moe_layers(model)
    for index, ids in kept.items():
        layer = layers[index]
        if len(ids) < layer.shape.num_experts:
            _slice(router_tensors(layer) + expert_tensors(layer), ids)
            modules = [*layer.router.modules(), layer.block, layer.experts]
            _set_expert_count(modules, layer.shape.num_experts, len(ids))
    counts = {len(kept.get(index, range(layer.shape.num_experts))) for index, layer in layers.items()}
    if len(counts) == 1:
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        for old in {layer.shape.num_experts for layer in layers.values()}:
            _set_config_count(config, old, counts.copy().pop())


def _set_config_count(config: Any, old: int, new: int) -> None:
    for name in EXPERT_COUNT_NAMES:
        if getattr(config, name, None) == old:
            setattr(config, name, new)


def check_plan(plan: PruningPlan, layers: Mapping[int, MoeLayer], fingerprint: str | None) -> None:
    """Refuses a plan that this model cannot carry out, and says why (ValueError)."""
    if plan.model is not None and fingerprint is not None and plan.model != fingerprint:
        raise ValueError(
            f"this plan was made for another model: its fingerprint is {plan.model}, the model's is {fingerprint}; "
            "make the plan again from this model's own calibration"
        )
    if unknown := sorted(set(plan.kept) - set(layers)):
        raise ValueError(f"the plan names layers {unknown}, but the model's MoE layers are {sorted(layers)}")
    for index, kept in plan.kept.items():
        shape = layers[index].shape
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


def model_fingerprint(model: nn.Module, layers: Mapping[int, MoeLayer] | None = None) -> str:
    """Identifies a model by its type and its routers' weights, whatever dtype or device they are loaded in.

    The sign bits of all router weights are hashed: a conversion between float32, bfloat16 and float16 keeps them.
    """
    layers = find_moe_layers(model) if layers is None else layers
    digest = hashlib.sha256()
    for index, layer in layers.items():
        for place in router_tensors(layer):
            update_fingerprint(digest, index, getattr(place.owner, place.name))
    return fingerprint_text(model.config.get_text_config().model_type, digest)  # type: ignore[union-attr, operator]


def update_fingerprint(digest: Any, index: int, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError("the model's weights are not loaded (meta device)")
    signs = torch.signbit(tensor.detach()).to("cpu", torch.uint8)
    digest.update(f"{index}:{tuple(tensor.shape)}".encode() + signs.numpy().tobytes())


def fingerprint_text(model_type: str, digest: Any) -> str:
    return f"{model_type}:{digest.hexdigest()[:16]}"


def check_slicing(layers: Mapping[int, MoeLayer]) -> None:
    """Refuses, by name, a router that slicing does not mask correctly.

    One layer of each router class is sliced to a spread of its experts and compared with the definition: its logits
    must be the full router's at the kept experts, and its choice K distinct kept experts per row.
    """
    seen: set[type] = set()
    for layer in layers.values():
        if type(layer.router) in seen:
            continue
        seen.add(type(layer.router))
        weight = next(p for p in layer.router.parameters() if p.ndim == 2)
        hidden_size = int(weight.shape[1])
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(32, hidden_size, generator=generator).to(weight.device, weight.dtype)
        count, groups = layer.shape.num_experts, layer.shape.n_group
        keep_per_group = max(-(-layer.shape.min_kept // groups), (count // groups + 1) // 2)
        size = count // groups
        kept = [g * size + i for g in range(groups) for i in range(size - keep_per_group, size)]
        with torch.no_grad():
            full = _router_output(layer, hidden)
            with masked(layer, kept):
                sliced = _router_output(layer, hidden)
        ids = next((t for t in sliced if not t.is_floating_point()), None)
        logits_agree = any(
            a.shape[-1] == count
            and b.shape[-1] == len(kept)
            and torch.allclose(a[..., kept].float(), b.float(), rtol=1e-2, atol=1e-3)
            for a, b in zip(full, sliced, strict=True)
        )
        ids_valid = (
            ids is not None
            and ids.shape[-1] == layer.shape.top_k
            and int(ids.min()) >= 0
            and int(ids.max()) < len(kept)
            and bool((ids.sort(-1).values.diff(dim=-1) > 0).all())
        )
        if not (logits_agree and ids_valid):
            raise ValueError(
                f"{type(layer.router).__name__} (layer {layer.index}) is a router that slicing does not mask "
                "correctly; this model is not supported yet"
            )


def _router_output(layer: MoeLayer, hidden: Tensor) -> list[Tensor]:
    output = layer.router(hidden)
    return [t for t in (output if isinstance(output, tuple | list) else [output]) if isinstance(t, Tensor)]
