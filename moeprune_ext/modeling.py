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
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG_KEY = "moeprune"
MAPPED = ("router_map", "mapped_bias")  # a mapped router's own parameters, loaded as float32 whatever the model's dtype
SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "softmax_over_chosen": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


def reshape_(model: nn.Module, differences: Mapping[str, Any]) -> None:
    """Makes a model of the original sizes, on any device, one of the recorded sizes; weights are not filled in.

    Raises ValueError for differences that this model cannot have.
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
        for path, rule in differences.get("routers", {}).items():
            owner, name = _owner(model, path)
            map_router_(getattr(owner, name), rule)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the {CONFIG_KEY!r} entry of config.json does not fit {type(model).__name__}: {error}"
        ) from None
    if differences.get("routers"):
        strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        model._keep_in_fp32_modules_strict = {*strict, *MAPPED}  # type: ignore[assignment]


def _owner(model: nn.Module, path: str, own_config: bool = False) -> tuple[Any, str]:
    """The object that holds what a path names, and its name there. own_config: the router's configuration, where the
    path leads into one, becomes its own first.

    Paths are those of the language model alone; where a model has it inside, the one module whose path ends so is
    meant.
    """
    *parts, name = path.split(".")
    inside = parts.pop() if parts and parts[-1] == "config" else None
    names = dict(model.named_modules())
    if ".".join(parts) in names:
        owner: Any = names[".".join(parts)]
    else:
        ends = (f".{'.'.join(parts[cut:])}" for cut in range(1, len(parts)))
        found = next((m for end in ends if (m := [n for n in names if f".{n}".endswith(end)])), [])
        if len(found) != 1:
            raise ValueError(f"there is no {path}")
        owner = names[found[0]]
    if inside is not None:
        if own_config:
            owner.config = copy.copy(owner.config)
        owner = owner.config
    return owner, name


def map_router_(router: nn.Module, rule: Mapping[str, Any]) -> None:
    """Makes a router map its scores.

    rule: "rows", experts stored K'; "experts", those scored E; "score", a name of SCORES; "renormalize", "eps",
    "scale", of the chosen weights; "bias", whether a correction bias is added to what is chosen by; "places", where the
    router's answer, a tuple, holds logits [T, E], weights [T, K] and ids [T, K]; pi [T, K'] takes the logits' place.
    """
    score, rows, experts, places = SCORES[rule["score"]], rule["rows"], rule["experts"], rule["places"]
    if not all(isinstance(count, int) and count > 0 for count in (rows, experts)) or sorted(places) != [0, 1, 2]:
        raise ValueError(f"a router cannot be mapped by {dict(rule)}")
    scale, eps, renormalize = float(rule["scale"]), float(rule["eps"]), bool(rule["renormalize"])
    weight = router_weight(router)
    for name, shape in zip(MAPPED, ((rows, experts), (rows,)), strict=True):
        if name == "router_map" or rule["bias"]:
            empty = torch.empty(shape, dtype=torch.float32, device=weight.device)
            router.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    original: Any = type(router)

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        answer = list(original.forward(self, *args, **kwargs))
        logits, before = answer[places[0]].float(), answer[places[1]]
        map_ = self.router_map.float()
        referred = (map_ != 0).any(0)
        pi = choice = F.linear(score(logits.masked_fill(~referred, -torch.inf)), map_)
        if rule["bias"]:
            if rule["score"] == "softmax":  # the bias is made for the probabilities among all experts
                choice = F.linear(score(logits), map_)
            choice = choice + self.mapped_bias.float()
        ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : before.shape[-1]]
        weights = pi.gather(-1, ids)
        if renormalize or rule["score"] == "softmax_over_chosen":
            weights = weights / (weights.sum(-1, keepdim=True) + (eps if renormalize else 0.0))
        answer[places[0]], answer[places[1]], answer[places[2]] = pi, (weights * scale).to(before.dtype), ids
        return tuple(answer)

    router.moeprune_rule = dict(rule)  # type: ignore[assignment]
    router.__class__ = type(original.__name__, (original,), {"forward": forward, "__module__": original.__module__})


def router_weight(router: nn.Module) -> Tensor:
    """The matrix that makes a router's logits, [E, H]; ValueError where there is none."""
    for name, parameter in router.named_parameters():
        if parameter.dim() == 2 and name not in MAPPED:
            return parameter
    raise ValueError(f"{type(router).__name__} has no matrix of weights")


def freeze_maps_(model: nn.Module) -> None:
    """Maps are found by a search, not by gradients; loading makes every parameter trainable."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in MAPPED:
            parameter.requires_grad_(False)


def model_class(base: Any, differences: Mapping[str, Any], **methods: Any) -> Any:
    """A subclass of a transformers model class whose models differ as recorded before their weights arrive.

    It carries the base's name and module because transformers looks weight conversions up by them. Its save_pretrained
    leaves this file beside the weights.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        reshape_(self, differences)

    def save_pretrained(self: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.save_pretrained(self, folder, *args, **kwargs)
        if differences:
            shutil.copyfile(__file__, Path(folder) / "modeling.py")
        return result

    own = {"__init__": __init__, "save_pretrained": save_pretrained, "__module__": base.__module__}
    return type(base.__name__, (base,), {**own, **methods})


class MoepruneModel:
    """What `auto_map` names: loads such a checkpoint as a model of its original class."""

    auto = "AutoModelForCausalLM"

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing to register: a model's class is its original one."""

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As transformers' method of that name."""
        loader, config = cls._class_and_config(_read_config(folder) if config is None else config)
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

        base, own = base_class(getattr(transformers, cls.auto), config)
        return model_class(base, getattr(config, CONFIG_KEY)), own


class MoepruneForImageTextToText(MoepruneModel):
    """The same for the auto class of models that read images."""

    auto = "AutoModelForImageTextToText"


class MoepruneForMultimodalLM(MoepruneModel):
    """The same for the auto class of models that read more than text."""

    auto = "AutoModelForMultimodalLM"


CLASSES: dict[str, type[MoepruneModel]] = {
    one.auto: one for one in (MoepruneModel, MoepruneForImageTextToText, MoepruneForMultimodalLM)
}


def _read_config(folder: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def auto_map(config: Any) -> dict[str, str]:
    """config.json's entry for a configuration: each of transformers' auto classes that loads it, and our class then."""
    import transformers

    known = {auto: one for auto, one in CLASSES.items() if type(config) in getattr(transformers, auto)._model_mapping}
    return {auto: f"modeling.{one.__name__}" for auto, one in known.items()}


def auto_class(config: Any) -> Any:
    """The transformers class that loads models of this configuration: a causal language model where there is one, else
    the multimodal model around it."""
    # Here, because they double the time to import what uses this file.
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in auto._model_mapping:
            return auto
    raise ValueError(f"{config.model_type} is not a language model that transformers can load")


def base_class(auto: Any, config: Any) -> tuple[Any, Any]:
    """The class that an auto class loads a configuration with, and its configuration: of a model of text and more that
    is loaded as a language model alone, the language model's, with the whole one's record."""
    base = auto._model_mapping[type(config)]
    if base.config_class is type(config):
        return base, config
    own = copy.deepcopy(config.get_text_config())
    if hasattr(config, CONFIG_KEY):
        setattr(own, CONFIG_KEY, getattr(config, CONFIG_KEY))
        own.auto_map = auto_map(own)
    return base, own
