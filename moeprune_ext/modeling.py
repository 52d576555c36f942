"""Models whose layers differ from what their configuration can say, written by moeprune_ext.

Copied beside such a checkpoint, where transformers finds it through `auto_map` when trust_remote_code is given, and
used by moeprune_ext itself. It needs torch and transformers only. The architecture is the original one; under the key
`moeprune`, config.json says what is different:

    kept_per_layer  {decoder layer: experts stored}
    tensors         {path: shape} of parameters and buffers of another shape
    integers        {path: value} of the counts that modules hold
    routers         {path: rule} of routers that score the original experts and map the scores to those stored:
                    pi = scores @ router_map^T, chosen by pi (+ mapped_bias). Source: EEP, arXiv 2407.00945.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG_KEY = "moeprune"
# Stock classes would fail with a table of sizes. They refuse this name of a weight file first, and show it.
WEIGHTS_KEY = "transformers_weights"
HINT = (
    "layers differ: pass trust_remote_code=True to the model's auto class (modeling.py here), or use moeprune_ext.load"
)
LOSS, LOSS_ARGUMENTS = "load_balancing_loss_func", ["gate_logits", "num_experts", "top_k", "attention_mask"]
MAPPED = ("router_map", "mapped_bias")  # a mapped router's own parameters, loaded as float32 whatever the model's dtype
SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "softmax_over_chosen": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


def reshape_(model: nn.Module, differences: Mapping[str, Any]) -> None:
    """Gives a model of the original sizes the recorded sizes and mapped routers; weights are not filled in.

    Args:
        model: of the original class.
        differences: what config.json holds under CONFIG_KEY; may be empty.

    Raises:
        ValueError: for differences that this model cannot have.
    """
    try:
        for path, shape in differences.get("tensors", {}).items():
            owner, name = _owner(model, path)
            old = getattr(owner, name)
            if len(shape) != old.dim() or not all(0 < new <= size for new, size in zip(shape, old.shape, strict=True)):
                raise ValueError(f"{path} is {list(old.shape)} and cannot become {shape}")
            new = old.new_empty(shape)
            setattr(owner, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        for path, value in differences.get("integers", {}).items():
            owner, name = _owner(model, path, own_config=True)
            if not isinstance(getattr(owner, name), int) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{path} is no count that can become {value!r}")
            setattr(owner, name, value)
            if path.endswith(".experts.num_experts") and getattr(model.config, "quantization_config", None):
                owner.config = copy.copy(owner.config)  # of which FP8 experts are made that take its place
                for count in filter(functools.partial(hasattr, owner.config), ("num_experts", "num_local_experts")):
                    setattr(owner.config, count, value)
        for path, rule in differences.get("routers", {}).items():
            owner, name = _owner(model, path)
            map_router_(getattr(owner, name), rule)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the {CONFIG_KEY!r} entry of config.json does not fit the model: {error}") from None
    if differences.get("routers"):
        strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        model._keep_in_fp32_modules_strict = {*strict, *MAPPED}  # type: ignore[assignment]


def _owner(model: nn.Module, path: str, own_config: bool = False) -> tuple[Any, str]:
    """Finds the object that holds a parameter, buffer, module or number; returns it, and the name there.

    Paths are those of the language model alone; in a larger model the one module whose path ends so is meant.

    Args:
        model: of the original architecture.
        path: may lead into a router's configuration.
        own_config: whether that configuration, which modules share, becomes the router's own first.

    Raises:
        ValueError: where there is no such object, or more than one.
    """
    *parts, name = path.split(".")
    in_config = parts[-1:] == ["config"]
    parts = parts[:-1] if in_config else parts
    modules = dict(model.named_modules())
    if ".".join(parts) in modules:
        owner: Any = modules[".".join(parts)]
    else:
        endings = (f".{'.'.join(parts[start:])}" for start in range(1, len(parts)))
        matches = ([module for module in modules if f".{module}".endswith(ending)] for ending in endings)
        candidates = next((names for names in matches if names), [])
        if len(candidates) != 1:
            raise ValueError(f"there is no {path}")
        owner = modules[candidates[0]]
    if in_config:
        if own_config:
            owner.config = copy.copy(owner.config)
        owner = owner.config
    return owner, name


def map_router_(router: nn.Module, rule: Mapping[str, Any]) -> None:
    """Makes a router map its scores to stored experts; the map itself is a parameter that is not filled in.

    Args:
        router: its forward returns a tuple of logits [T, E], weights [T, K] and ids [T, K], in any order.
        rule: what it computes.
            "rows": experts stored, K'.
            "experts": experts scored, E.
            "score": a name of SCORES.
            "renormalize", "eps", "scale": what becomes of the chosen weights.
            "bias": whether a correction bias [K'] is added to what experts are chosen by.
            "places": indices of logits, weights and ids in the tuple; log pi [T, K'] takes the logits' place.

    Raises:
        ValueError: for a rule that cannot be.
    """
    rows, experts, places = rule["rows"], rule["experts"], rule["places"]
    if not all(isinstance(count, int) and count > 0 for count in (rows, experts)) or sorted(places) != [0, 1, 2]:
        raise ValueError(f"a router cannot be mapped by {dict(rule)}")
    logits_index, weights_index, ids_index = places
    register_map_(router, rule, router_weight(router).device)
    original: Any = type(router)

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        answer = list(original.forward(self, *args, **kwargs))
        before = answer[weights_index]
        pi, weights, ids = mapped_choice(answer[logits_index], self, rule, before.shape[-1])
        answer[weights_index], answer[ids_index] = weights.to(before.dtype), ids
        answer[logits_index] = pi.clamp(min=torch.finfo(pi.dtype).tiny).log()  # their softmax is pi's shares
        return tuple(answer)

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Moves the router; its map stays float32 whatever dtype the model is given."""
        maps = {name: parameter.data for name, parameter in self.named_parameters(recurse=False) if name in MAPPED}
        result = original._apply(self, *args, **kwargs)
        for name, data in maps.items():
            now = getattr(self, name)
            if now.dtype != torch.float32 and not data.is_meta:
                now.data = data.to(now.device)
        return result

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _unpickled_router, (original, self.moeprune_rule), self.__dict__

    router.moeprune_rule = dict(rule)  # type: ignore[assignment]
    methods = {"forward": forward, "_apply": _apply, "__reduce_ex__": __reduce_ex__, "__module__": original.__module__}
    router.__class__ = type(original.__name__, (original,), methods)


def _unpickled_router(original: Any, rule: Mapping[str, Any]) -> Any:
    """Makes a mapped router without content, which pickle fills in."""
    router = original.__new__(original)
    nn.Module.__init__(router)
    router.weight = nn.Parameter(torch.empty(rule["experts"], 1))  # for `map_router_`, which looks for its device
    map_router_(router, rule)
    return router


def register_map_(router: nn.Module, rule: Mapping[str, Any], device: torch.device) -> None:
    """Gives a router the map that a rule needs, as float32 parameters that are not filled in."""
    for name, shape in zip(MAPPED, ((rule["rows"], rule["experts"]), (rule["rows"],)), strict=True):
        if name == "router_map" or rule["bias"]:
            empty = torch.empty(shape, dtype=torch.float32, device=device)
            router.register_parameter(name, nn.Parameter(empty, requires_grad=False))


def mapped_choice(logits: Tensor, router: Any, rule: Mapping[str, Any], top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses among stored experts by the mapped scores of the original ones.

    Args:
        logits: [T, E].
        router: has the map, see `register_map_`.
        rule: see `map_router_`.
        top_k: experts per token, K.

    Returns:
        float32 pi [T, K'], float32 weights [T, K], int64 ids [T, K].
    """
    score, logits, map_ = SCORES[rule["score"]], logits.float(), router.router_map.float()
    referred = (map_ != 0).any(0)
    pi = choice = F.linear(score(logits.masked_fill(~referred, -torch.inf)), map_)
    if rule["bias"]:
        if rule["score"] == "softmax":  # the bias is made for the probabilities among all experts
            choice = F.linear(score(logits), map_)
        choice = choice + router.mapped_bias.float()
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = pi.gather(-1, ids)
    if rule["renormalize"] or rule["score"] == "softmax_over_chosen":
        weights = weights / (weights.sum(-1, keepdim=True) + (float(rule["eps"]) if rule["renormalize"] else 0.0))
    return pi, weights * float(rule["scale"]), ids


def router_weight(router: nn.Module) -> Tensor:
    """Returns the matrix that makes a router's logits, [E, H]; raises ValueError where there is none."""
    for name, parameter in router.named_parameters():
        if parameter.dim() == 2 and name not in MAPPED:
            return parameter
    raise ValueError(f"{type(router).__name__} has no matrix of weights")


def freeze_maps_(model: nn.Module) -> None:
    """Makes routers' maps untrainable again after loading: they are found by a search, not by gradients."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in MAPPED:
            parameter.requires_grad_(False)


def balanced_loss(
    original: Any, gate_logits: Any, num_experts: Any = None, top_k: int = 2, attention_mask: Any = None
) -> Any:
    """Computes the load-balancing loss of layers with different numbers of experts.

    Layers with equal numbers are a group, whose loss is that of transformers' function (`original`, which has the other
    arguments) with the group's number. The groups' losses are averaged, weighted by their layers.
    """
    groups: dict[int, list[Tensor]] = {}
    for logits in gate_logits or ():
        groups.setdefault(logits.shape[-1], []).append(logits)
    losses = [original(tuple(group), size, top_k, attention_mask) for size, group in groups.items()]
    shares = [len(group) / len(gate_logits) for group in groups.values()]
    return sum(share * loss.to(losses[0].device) for share, loss in zip(shares, losses, strict=True))


def with_global(function: Any, name: str, value: Any) -> Any:
    """Copies a function and its decorators, so that a global name has another value there and nowhere else."""
    inner = getattr(function, "__wrapped__", None)
    scope, closure, attributes = function.__globals__, function.__closure__, dict(vars(function))
    if inner is None:
        scope = {**scope, name: value}
        del scope["__name__"]  # torch.compile would look names up in the module of that name
    else:
        attributes["__wrapped__"] = made = with_global(inner, name, value)
        closure = tuple(CellType(made) if cell.cell_contents is inner else cell for cell in closure)
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    for attribute in (*functools.WRAPPER_ASSIGNMENTS, "__kwdefaults__"):
        setattr(made, attribute, getattr(function, attribute))
    vars(made).update(attributes)
    return made


def model_class(base: Any, differences: Mapping[str, Any], **methods: Any) -> Any:
    """Makes a subclass of a transformers model class whose models differ as recorded before their weights arrive.

    It has the base's name and module because transformers looks weight conversions up by them. Its load-balancing loss
    is `balanced_loss`. Its save_pretrained leaves this file beside the weights, where there are differences.

    Args:
        base: the transformers class.
        differences: as for `reshape_`.
        **methods: further ones of the subclass.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        reshape_(self, differences)

    def save_pretrained(self: Any, folder: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
        if differences and kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained would upload before modeling.py is there: use model.push_to_hub(name)")
        result = base.save_pretrained(self, folder, is_main_process, *args, **kwargs)
        if differences and getattr(self, "should_save_on_this_rank", bool)(is_main_process):
            code = Path(folder) / "modeling.py"
            if not code.exists() or not code.samefile(__file__):
                shutil.copyfile(__file__, code)
            file, mlx = code.with_name("config.json"), code.with_name("mlx_model.py").exists()
            said = {key: value for key, value in json.loads(file.read_text()).items() if mlx or key != "model_file"}
            Path(f"{file}.partial").write_text(json.dumps(said | {WEIGHTS_KEY: HINT}, indent=2) + "\n")
            Path(f"{file}.partial").replace(file)
        return result

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _unpickled_model, (base, differences, methods), self.__dict__

    attributes = {"__init__": __init__, "save_pretrained": save_pretrained, "__reduce_ex__": __reduce_ex__}
    innermost = inspect.unwrap(base.forward)
    original = innermost.__globals__[LOSS] if LOSS in innermost.__code__.co_names else None
    if original is not None and [*inspect.signature(original).parameters] == LOSS_ARGUMENTS:
        attributes["forward"] = with_global(base.forward, LOSS, functools.partial(balanced_loss, original))
    attributes |= {"moeprune_base": base, "__module__": base.__module__}
    return type(base.__name__, (base,), {**attributes, **methods})


def _unpickled_model(base: Any, differences: Mapping[str, Any], methods: Mapping[str, Any]) -> Any:
    """Makes a model without content, which pickle fills in."""
    made = model_class(base, differences, **methods)
    return made.__new__(made)


class MoepruneModel:
    """Loads such a checkpoint as a model of its original class; `auto_map` names it.

    Attributes:
        auto: the transformers auto class in whose place it stands.
    """

    auto = "AutoModelForCausalLM"

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Does nothing: a model's class is its original one, which is registered."""

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Loads a model, as transformers' method of that name."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False) if config is None else config
        loader, config = cls._class_and_config(config)
        loaded = loader.from_pretrained(folder, *args, config=config, **kwargs)
        freeze_maps_(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        loader, config = cls._class_and_config(config)
        return loader._from_config(config, **kwargs)

    @classmethod
    def _class_and_config(cls, config: Any) -> tuple[Any, Any]:
        import transformers

        base, base_config = base_class(getattr(transformers, cls.auto), config)
        return model_class(base, getattr(config, CONFIG_KEY)), base_config


class MoepruneForImageTextToText(MoepruneModel):  # models that read images
    auto = "AutoModelForImageTextToText"


class MoepruneForMultimodalLM(MoepruneModel):  # ... or more
    auto = "AutoModelForMultimodalLM"


class MoepruneBase(MoepruneModel):  # models without a head, to which other runtimes give their own
    auto = "AutoModel"


WITH_HEAD = (MoepruneModel, MoepruneForImageTextToText, MoepruneForMultimodalLM)
CLASSES: dict[str, type[MoepruneModel]] = {loader.auto: loader for loader in (*WITH_HEAD, MoepruneBase)}


def auto_map(config: Any) -> dict[str, str]:
    """Makes config.json's entry `auto_map`: {auto class that loads the configuration: the class here in its place}."""
    import transformers

    return {
        auto: f"modeling.{loader.__name__}"
        for auto, loader in CLASSES.items()
        if type(config) in getattr(transformers, auto)._model_mapping
    }


def auto_class(config: Any) -> Any:
    """Returns the transformers auto class that loads models of this configuration.

    A causal language model comes first, then the multimodal model around one.

    Raises:
        ValueError: where there is none.
    """
    import transformers  # here, because it doubles the time to import what uses this file

    for name in (loader.auto for loader in WITH_HEAD):
        if type(config) in getattr(transformers, name)._model_mapping:
            return getattr(transformers, name)
    raise ValueError(f"{config.model_type} is not a language model that transformers can load")


def base_class(auto: Any, config: Any) -> tuple[Any, Any]:
    """Returns the class with which an auto class loads a configuration, and that class's configuration.

    It does not say which file to read (WEIGHTS_KEY). Where a model of text and more is loaded as a language model
    alone, it is the language model's, with the record of the whole one.
    """
    base = auto._model_mapping[type(config)]
    if base.config_class is type(config):
        config = copy.copy(config)
        vars(config).pop(WEIGHTS_KEY, None)
        return base, config
    text_config = copy.deepcopy(config.get_text_config())
    if hasattr(config, CONFIG_KEY):
        setattr(text_config, CONFIG_KEY, getattr(config, CONFIG_KEY))
        text_config.auto_map = auto_map(text_config)
    return base, text_config
