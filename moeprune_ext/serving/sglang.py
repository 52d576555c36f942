"""SGLang builds exports whose layers differ: a plugin that it loads by itself where moeprune_ext is installed.

As for vLLM (vllm.py): while SGLang's `make_layers` builds layer i, the configuration's expert counts are what the
export records of layer i. Uneven exports only. Never tried with a running SGLang, which needs a GPU: a warning says so
when it is used, and docs/serving.md what was tried.

pyproject.toml names `register` as an entry point of `sglang.srt.plugins`; SGLang calls it in every process.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from moeprune_ext.serving.check import sglang_refusal
from moeprune_ext.serving.layers import Layer, own_counts, recorded_layers

READ = "0.5.23"  # the version whose sources it was written for

logger = logging.getLogger("sglang.moeprune_ext")  # under SGLang's name, so that its handlers print what is said

_layers: ContextVar[Mapping[int, Layer] | None] = ContextVar("moeprune_sglang_layers", default=None)
_built: ContextVar[set[int] | None] = ContextVar("moeprune_sglang_built", default=None)


def register() -> None:
    """Asks SGLang to call `initialize_model` and `make_layers` around its functions of these names."""
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    except ImportError as error:
        logger.warning("moeprune_ext's plugin does not know this version of SGLang, and does nothing (%s)", error)
        return
    HookRegistry.register("sglang.srt.model_loader.loader._initialize_model", initialize_model, HookType.AROUND)
    HookRegistry.register("sglang.srt.utils.common.make_layers", make_layers, HookType.AROUND)


def initialize_model(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Builds a model without weights.

    Args:
        original: SGLang's function.
        model_config: SGLang's ModelConfig.
        *args: further ones of the function.
        **kwargs: as well.

    Raises:
        ValueError: for exports and ways of serving that SGLang cannot build.
    """
    layers = recorded_layers(model_config.hf_config, model_config.hf_text_config)
    if not layers:
        return original(model_config, *args, **kwargs)
    _warn()
    if reason := sglang_refusal(model_config.hf_config.to_dict()) or _refusal_of_options():
        raise ValueError(reason)
    built: set[int] = set()
    tokens = _layers.set(layers), _built.set(built)
    try:
        model = original(model_config, *args, **kwargs)
    finally:
        _layers.reset(tokens[0])
        _built.reset(tokens[1])
    if not built:
        raise ValueError(
            f"SGLang's {type(model).__name__} builds its layers by a function of its own, with one number of experts "
            "for all; export a uniform plan for it (where this model drafts tokens: serve without speculation)"
        )
    if any(getattr(module, "num_fused_shared_experts", 0) for module in model.modules()):
        raise ValueError(
            "SGLang counts fused shared experts after the configuration's number of experts, which is another in these "
            "layers; pass --disable-shared-experts-fusion"
        )
    return model


def make_layers(
    original: Callable[..., Any], num_hidden_layers: int, layer_fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Builds a stack of decoder layers, each under its own counts.

    Args:
        original: SGLang's function.
        num_hidden_layers: of the model.
        layer_fn: makes a layer of its `idx` and `prefix`.
        *args: further ones of the function.
        **kwargs: as well.
    """
    layers, built = _layers.get(), _built.get()
    if layers is None or built is None:
        return original(num_hidden_layers, layer_fn, *args, **kwargs)

    @functools.wraps(layer_fn)
    def build(idx: int, prefix: str) -> Any:
        layer = layers.get(idx)
        if layer is None:
            return layer_fn(idx=idx, prefix=prefix)
        built.add(idx)
        with own_counts(layer):
            return layer_fn(idx=idx, prefix=prefix)

    return original(num_hidden_layers, build, *args, **kwargs)


def _refusal_of_options() -> str | None:
    """Returns why the server's options do not go with unequal layers, None if they do."""
    from sglang.srt.runtime_context import get_server_args

    options = get_server_args()
    if options.ep_size > 1 or options.enable_eplb or options.ep_num_redundant_experts:
        return (
            "expert parallelism, EPLB and redundant experts read one number of experts for all layers; leave them out"
        )
    return None


@functools.cache  # once
def _warn() -> None:
    """Says that nobody has tried it."""
    import sglang

    logger.warning(
        "moeprune_ext's plugin was written for SGLang %s (this is %s) and never tried with a running one: compare a "
        "few answers with transformers'",
        READ,
        sglang.__version__,
    )
