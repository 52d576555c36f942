"""Models whose layers differ in their experts, for mlx-lm: copied beside exports, and named in config.json.

mlx-lm loads it where config.json has a `model_file` and trust_remote_code is given. It needs mlx and mlx-lm only. The
architecture is mlx-lm's own: it is built once for each number of experts, and every layer is taken from the model that
has this layer's number (`kept_per_layer` under `moeprune` in config.json). MLX makes arrays when they are needed, so
that the layers left over take no memory. Nothing here knows an architecture by name.
"""

import copy
import re
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
EXPERT = re.compile(r"(?P<before>.*\blayers\.(?P<layer>\d+)\..*\bexperts\.)0(?P<after>\..+)")


class ModelArgs:
    """The whole content of config.json, which mlx-lm hands on to `Model`."""

    @staticmethod
    def from_dict(config: dict[str, Any]) -> dict[str, Any]:
        """Returns the configuration as it is."""
        return config


def Model(config: dict[str, Any]) -> Any:
    """Builds mlx-lm's model of this architecture, each layer with its own number of experts.

    Raises:
        ValueError: where mlx-lm has no such architecture, or its layers do not follow the configuration's number.
    """
    record = config["moeprune"]
    if record.get("routers"):
        raise ValueError("mlx-lm has no routers that map their scores; export a plan without merged experts for it")
    counts = {int(layer): int(count) for layer, count in record["kept_per_layer"].items()}
    models = {count: _built(config, count) for count in sorted(set(counts.values()))}
    most = max(models)
    model = models[most]
    layers = _layers(model)
    for layer, count in counts.items():
        if count == most:
            continue
        own = _layers(models[count])[layer]
        if _shapes(own) == _shapes(layers[layer]):
            raise ValueError(f"mlx-lm's {config['model_type']} does not take its number of experts from config.json")
        layers[layer] = own
    _sanitize_by_layer(model, counts, most)
    return model


def _built(config: dict[str, Any], count: int) -> Any:
    """Builds the architecture with one number of experts in all layers; no array is made."""
    config = copy.deepcopy(config)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.update({name: count for name in COUNTS if isinstance(part.get(name), int)})
    model_class, args_class = _get_classes(config)
    return model_class(args_class.from_dict(config))


def _layers(model: Any) -> list[Any]:
    """Returns the list, inside of the model, of its decoder layers."""
    first = model.layers[0]
    lists = [part["layers"] for _, part in model.named_modules() if isinstance(part.get("layers"), list)]
    return next(layers for layers in lists if any(layer is first for layer in layers))


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tree_flatten(module.parameters())}


def _sanitize_by_layer(model: Any, counts: dict[int, int], most: int) -> None:
    """Makes `sanitize`, which renames tensors and stacks those of experts, work where layers have fewer than others.

    mlx-lm's own asks for `most` experts in every layer: those that a layer has not are its first one again, and are cut
    off afterwards, before anything is computed.
    """
    original = getattr(model, "sanitize", None)
    if original is None:
        return
    shapes = _shapes(model)

    def sanitize(weights: dict[str, Any]) -> dict[str, Any]:
        filled = dict(weights)
        layers = {}  # with experts stored one by one
        for name in weights:
            if (match := EXPERT.fullmatch(name)) and int(match["layer"]) in counts:
                count = counts[int(match["layer"])]
                layers[match["layer"]] = count
                filled |= {f"{match['before']}{i}{match['after']}": weights[name] for i in range(count, most)}
        result = original(filled)
        for name, array in result.items():
            count = next((count for layer, count in layers.items() if f".layers.{layer}." in name), most)
            # Scales of quantised weights have their weights' experts.
            shape = shapes.get(name) or shapes.get(f"{name.rpartition('.')[0]}.weight") or ()
            if count < most and array.shape[:1] == (most,) and shape[:1] == (count,):
                result[name] = mx.contiguous(array[:count])
        return result

    model.sanitize = sanitize
