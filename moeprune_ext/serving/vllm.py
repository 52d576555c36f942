"""vLLM serves exports whose layers differ: a plugin that it loads by itself where moeprune_ext is installed.

vLLM's models build every decoder layer from one configuration, through one function, `make_layers`. While the plugin
has a layer built, the configuration's expert counts are that layer's own, read from the record that the export keeps
under `moeprune` in config.json (modeling.py); afterwards they are the original ones again. So no model is known by
name, and each layer's parameters take the memory of the experts that it has. Behind a merged layer's router stands the
recorded map. Models without a record are built as before.

pyproject.toml names `register` as an entry point of `vllm.general_plugins`; vLLM calls it in every process. Without
remote code, stock vLLM fails on such exports with an AssertionError about the weights' sizes.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moeprune_ext.modeling import CONFIG_KEY, mapped_choice, register_map_
from moeprune_ext.models.layers import EXPERT_COUNT_NAMES
from moeprune_ext.serving.check import refusal

TRIED = ("0.32",)  # versions of vLLM that docs/serving.md's table was made with
WRAPPED = "moeprune_wrapped"

logger = logging.getLogger("vllm.moeprune_ext")  # under vLLM's name, so that its handlers print what is said


@dataclass
class _Layer:
    """The layer that is being built.

    Attributes:
        index: of the decoder layer.
        count: experts stored.
        rule: of a mapped router; None where the router has one row for each expert.
        router: the router, once the layer is there.
    """

    index: int
    count: int
    rule: Mapping[str, Any] | None
    router: Any = None


_building: ContextVar[_Layer | None] = ContextVar("moeprune_building", default=None)


def register() -> None:
    """Makes vLLM build each layer as its export records; called again it does nothing."""
    import vllm
    from vllm.model_executor.layers import fused_moe
    from vllm.model_executor.models import utils

    if getattr(utils.make_layers, WRAPPED, False):
        return
    if not vllm.__version__.startswith(tuple(f"{version}." for version in TRIED)):
        logger.warning(
            "moeprune_ext's plugin was tried with vLLM %s, this is %s: compare a few answers with transformers'",
            ", ".join(TRIED),
            vllm.__version__,
        )
    _replace(utils.make_layers, _own_layers(utils.make_layers))
    _replace(fused_moe.FusedMoEFactory, _own_experts(fused_moe.FusedMoEFactory))


def _replace(original: Any, wrapper: Any) -> None:
    """Puts a wrapper in a function's place in every module of vLLM that has imported it."""
    setattr(wrapper, WRAPPED, True)
    function: str = original.__name__
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and getattr(module, function, None) is original:
            setattr(module, function, wrapper)


def _own_layers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps vLLM's `make_layers`."""

    @functools.wraps(original)
    def make_layers(count: int, layer_fn: Callable[..., Any], prefix: str, *args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        whole = get_current_vllm_config()
        config = whole.model_config.hf_config
        record = getattr(config, CONFIG_KEY, None)
        if not record:
            return original(count, layer_fn, prefix, *args, **kwargs)
        _check(whole, record)
        layers = _layers(record)

        def build(prefix: str) -> Any:
            layer = layers.get(_index(prefix))
            if layer is None:
                return layer_fn(prefix=prefix)
            with _counts(whole.model_config.hf_text_config, layer):
                module = layer_fn(prefix=prefix)
                if layer.rule is not None:
                    layer.router = _map_router(module, layer)
            return module

        return original(count, build, prefix, *args, **kwargs)

    return make_layers


def _own_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps vLLM's `FusedMoEFactory`, which makes a layer's experts."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        layer = _building.get()
        if layer is None:  # its Transformers backend builds whole models, and puts its experts in afterwards
            record = getattr(get_current_vllm_config().model_config.hf_config, CONFIG_KEY, None)
            layer = _layers(record).get(_index(kwargs.get("prefix", ""))) if record else None
            if layer is None or layer.rule is not None:  # there the model's own router maps
                if layer is not None:
                    kwargs["num_experts"] = layer.count
                return original(*args, **kwargs)
        kwargs["num_experts"] = layer.count
        if layer.rule is not None:
            scaled = kwargs.get("apply_routed_scale_to_output", False)
            rule = {**layer.rule, "scale": 1.0} if scaled else dict(layer.rule)
            kwargs |= {"use_grouped_topk": False, "e_score_correction_bias": None}
            kwargs["custom_routing_function"] = functools.partial(_choose, layer, rule)
        return original(*args[1:] if args else (), **kwargs)

    return factory


def _choose(
    layer: _Layer, rule: Mapping[str, Any], hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Routes behind a map; vLLM passes all but the first two by name or in this order."""
    _, weights, ids = mapped_choice(gating_output, layer.router, rule, topk)
    return weights, ids.int()


def _layers(record: Mapping[str, Any]) -> dict[int, _Layer]:
    """Returns what an export records, by decoder layer."""
    rules = {_index(path): rule for path, rule in record.get("routers", {}).items()}
    return {int(i): _Layer(int(i), count, rules.get(int(i))) for i, count in record["kept_per_layer"].items()}


def _index(path: str) -> int:
    """Returns the number of the decoder layer in a module's path, -1 if there is none."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


@contextmanager
def _counts(config: Any, layer: _Layer) -> Iterator[None]:
    """Inside, the configuration says how many experts the layer's router scores."""
    before = {
        name: getattr(config, name) for name in EXPERT_COUNT_NAMES if isinstance(getattr(config, name, None), int)
    }
    scored = layer.count if layer.rule is None else layer.rule["experts"]
    token = _building.set(layer)
    try:
        for name in before:
            setattr(config, name, scored)
        yield
    finally:
        for name, count in before.items():
            setattr(config, name, count)
        _building.reset(token)


def _map_router(module: nn.Module, layer: _Layer) -> nn.Module:
    """Gives the layer's router its map; ValueError where none of its modules can be the router."""
    assert layer.rule is not None
    rows = layer.rule["experts"]
    matrices = [(part, getattr(part, "weight", None)) for part in module.modules()]
    routers = [(part, weight) for part, weight in matrices if isinstance(weight, Tensor) and _is_router(weight, rows)]
    if len(routers) != 1:
        raise ValueError(
            f"layer {layer.index}: {len(routers)} modules of vLLM's {type(module).__name__} could be its router, which "
            "has to map its scores; serve a plan without merged experts"
        )
    router, weight = routers[0]
    register_map_(router, layer.rule, weight.device)
    return router


def _is_router(weight: Tensor, rows: int) -> bool:
    return weight.ndim == 2 and weight.shape[0] == rows


def _check(whole: Any, record: Mapping[str, Any]) -> None:
    """Refuses (ValueError) ways of serving that unequal layers do not allow."""
    counts = {int(index): count for index, count in record["kept_per_layer"].items()}
    parallel = whole.parallel_config
    if parallel.enable_eplb:
        raise ValueError("EPLB moves experts between layers of equal numbers, which this export has not; leave it out")
    if parallel.enable_expert_parallel:
        size = parallel.tensor_parallel_size * parallel.data_parallel_size
        if odd := {index: count for index, count in counts.items() if count % size}:
            raise ValueError(
                f"expert parallelism over {size} devices needs multiples of {size} experts in every layer; layer "
                f"{next(iter(odd))} has {next(iter(odd.values()))}: prune with --multiple-of {size}, or use tensor "
                "parallelism"
            )
    elif parallel.tensor_parallel_size > min(counts.values()):
        raise ValueError(
            f"tensor parallel size {parallel.tensor_parallel_size} is greater than the {min(counts.values())} experts "
            "of the smallest layer, which vLLM refuses; use a smaller one"
        )
    if reason := refusal(whole.model_config.hf_config.to_dict(), list(counts.values())):
        raise ValueError(reason)
