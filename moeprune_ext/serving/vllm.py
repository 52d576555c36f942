"""vLLM serves exports whose layers differ: a plugin that it loads by itself where moeprune_ext is installed.

vLLM's models build their decoder layers from one configuration, through one function, `make_layers`. While the plugin
has a layer built, the configuration's expert counts are that layer's own, read from the record that the export keeps
under `moeprune` in config.json (modeling.py); afterwards they are the original ones again. So no model is known by
name, and each layer's parameters take the memory of the experts that it has. Behind a merged layer's router stands the
recorded map. Models without a record are built as before.

pyproject.toml names `register` as an entry point of `vllm.general_plugins`; vLLM calls it in every process. Without it
vLLM fails on such exports with an AssertionError about the weights' sizes.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from moeprune_ext.modeling import CONFIG_KEY, mapped_choice, register_map_
from moeprune_ext.serving.check import expert_parallel_sizes, refusal
from moeprune_ext.serving.layers import (
    Layer,
    building,
    counts_of,
    index_of,
    own_counts,
    recorded_layers,
    warn_of_version,
)

TRIED = ("0.32",)  # versions of vLLM that docs/serving.md's table was made with
WRAPPED = "moeprune_wrapped"

_copies: list[Any] = []  # weak references to copies of exports' configurations, for multimodal models' language parts

logger = logging.getLogger("vllm.moeprune_ext")  # under vLLM's name, so that its handlers print what is said


def register() -> None:
    """Makes vLLM build each layer as its export records; called again it does nothing."""
    try:
        from vllm.config import VllmConfig
        from vllm.model_executor.layers.fused_moe import FusedMoEFactory
        from vllm.model_executor.models.utils import make_layers

        with_hf_config = VllmConfig.with_hf_config
    except (AttributeError, ImportError) as error:
        logger.warning("moeprune_ext's plugin does not know this version of vLLM, and does nothing (%s)", error)
        return
    if getattr(make_layers, WRAPPED, False):
        return
    _replace(make_layers, _own_layers(make_layers))
    _replace(FusedMoEFactory, _own_experts(FusedMoEFactory))
    VllmConfig.with_hf_config = _own_copy(with_hf_config)


def _replace(original: Any, wrapper: Any) -> None:
    """Puts a wrapper in a function's place in every module of vLLM that has imported it."""
    setattr(wrapper, WRAPPED, True)
    function: str = original.__name__
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and vars(module).get(function) is original:
            setattr(module, function, wrapper)


def _own_layers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps vLLM's `make_layers`."""

    @functools.wraps(original)
    def make_layers(count: int, layer_fn: Callable[..., Any], prefix: str, *args: Any, **kwargs: Any) -> Any:
        layers = _current_layers()
        if not layers:
            return original(count, layer_fn, prefix, *args, **kwargs)

        def build(prefix: str) -> Any:
            layer = layers.get(index_of(prefix))
            if layer is None:
                return layer_fn(prefix=prefix)
            with own_counts(layer, [config for copied in _copies if (config := copied()) is not None]):
                module = layer_fn(prefix=prefix)
                if layer.rule is not None:
                    layer.router = _map_router(module, layer)
            return module

        return original(count, build, prefix, *args, **kwargs)

    return make_layers


def _own_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps vLLM's `FusedMoEFactory`, which makes a layer's experts."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        asked, layer = bound.arguments, building.get()
        if layer is None:
            # The Transformers backend has whole models built, whose routers are as recorded, and replaces experts then.
            if "routed_experts_cls" in asked and (ours := _current_layers().get(index_of(asked.get("prefix", "")))):
                asked["num_experts"] = ours.count
        else:
            asked["num_experts"] = layer.count
            if layer.rule is not None:
                # Where the runner scales the output, the weights are not scaled.
                rule = {**layer.rule, "scale": 1.0} if asked.get("apply_routed_scale_to_output") else layer.rule
                asked |= {"use_grouped_topk": False, "e_score_correction_bias": None}
                asked["custom_routing_function"] = functools.partial(_choose, layer, rule)
        return original(*bound.args, **bound.kwargs)

    return factory


def _own_copy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `VllmConfig.with_hf_config`, by which a multimodal model gives its language part a copy of its own.

    That one gets the record, too, and counts of layers are set in it.
    """

    @functools.wraps(original)
    def with_hf_config(self: Any, hf_config: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(self, hf_config, *args, **kwargs)
        record = getattr(self.model_config.hf_config, CONFIG_KEY, None)
        copied = made.model_config
        if record and counts_of(copied.hf_config):
            setattr(copied.hf_config, CONFIG_KEY, record)
            _copies[:] = [reference for reference in _copies if reference() is not None]
            _copies.extend(map(weakref.ref, (copied.hf_config, copied.hf_text_config)))  # one may be the other
        return made

    return with_hf_config


def _current_layers() -> dict[int, Layer]:
    """Returns what the export that is being built records of its layers; {} for other models.

    Raises:
        ValueError: for ways of serving that unequal layers do not allow.
    """
    import vllm
    from vllm.config import get_current_vllm_config

    whole = get_current_vllm_config()
    layers = recorded_layers(whole.model_config.hf_config, whole.model_config.hf_text_config)
    if layers:
        warn_of_version(logger, "vLLM", vllm.__version__, TRIED)
        check(whole.parallel_config, whole.model_config.hf_config.to_dict(), layers)
    return layers


def _choose(
    layer: Layer, rule: Mapping[str, Any], hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Routes behind a map; vLLM passes all but the first two by name or in this order."""
    _, weights, ids = mapped_choice(gating_output, layer.router, rule, topk)
    return weights, ids.int()


def _map_router(module: nn.Module, layer: Layer) -> nn.Module:
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


def check(parallel: Any, config: Mapping[str, Any], layers: Mapping[int, Layer]) -> None:
    """Refuses (ValueError) ways of serving that unequal layers do not allow.

    Args:
        parallel: vLLM's ParallelConfig.
        config: the export's configuration.
        layers: by decoder layer.
    """
    if reason := refusal(config):
        raise ValueError(reason)
    if parallel.enable_eplb:
        raise ValueError("EPLB moves experts between layers of equal numbers, which this export has not; leave it out")
    tensor = parallel.tensor_parallel_size
    if not parallel.enable_expert_parallel:
        if small := [layer for layer in layers.values() if layer.scored < tensor]:
            raise ValueError(
                f"tensor parallel size {tensor} is greater than the {small[0].scored} experts of layer "
                f"{small[0].index}, which many of vLLM's models refuse; use a smaller one"
            )
        return
    size = tensor * parallel.data_parallel_size * getattr(parallel, "prefill_context_parallel_size", 1)
    if size not in expert_parallel_sizes(config, [layer.count for layer in layers.values()], [size]):
        raise ValueError(
            f"expert parallelism over {size} devices wants multiples of {size} experts in every layer (and none of "
            f"GPT-OSS's): prune with --multiple-of {size}, or use tensor parallelism"
        )
    if getattr(parallel, "enable_ep_weight_filter", False):
        raise ValueError("the expert weight filter reads one number of experts for all layers; leave it out")
