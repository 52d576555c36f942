"""One pass over calibration text -> RoutingStats, the single table behind every criterion.

The experts module of each layer is called with one routed pair per row and weight 1, which yields the unweighted
outputs f_e(x_t) in the model's own arithmetic, whatever its experts look like; only routed pairs are computed. Per
pair the gate weight g (the coefficient the model really applies) and ||f_e(x_t)||_2 go into moments[e, a, b] += g^a
||f||^b.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from moeprune_ext.data import as_batches
from moeprune_ext.files import replacing
from moeprune_ext.moe import ExpertsFunction, LayerShape, find_moe_layers, intercepted, model_fingerprint
from moeprune_ext.ops import routing_moments_

FORMAT = "moeprune.stats/1"
PAIRS_AT_ONCE = 65_536  # routed pairs whose outputs [pairs, H] are alive at a time: 0.5 GB at H = 4096 in bfloat16


@dataclass(frozen=True)
class RoutingStats:
    """Streaming routing statistics.

    moments: {decoder layer: float64 [E, 3, 3]}, moments[e, a, b] = sum over tokens routed to e of g^a ||f_e||_2^b.
    max_norm: {decoder layer: float32 [E]}, the largest ||f_e||_2. tokens: attended positions seen. shapes: the routers.
    model: the model's fingerprint. Stats of two data shards add up (`a + b`) to the stats of both.
    """

    moments: dict[int, Tensor]
    max_norm: dict[int, Tensor]
    tokens: int
    shapes: dict[int, LayerShape]
    model: str

    def __add__(self, other: RoutingStats) -> RoutingStats:
        if self.model != other.model or self.shapes != other.shapes:
            raise ValueError(f"cannot add statistics of different models: {self.model} and {other.model}")
        return RoutingStats(
            {layer: table + other.moments[layer] for layer, table in self.moments.items()},
            {layer: torch.maximum(norm, other.max_norm[layer]) for layer, norm in self.max_norm.items()},
            self.tokens + other.tokens,
            self.shapes,
            self.model,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, beside the target and then renamed."""
        tensors = {f"moments.{layer}": table for layer, table in self.moments.items()}
        tensors |= {f"max_norm.{layer}": norm for layer, norm in self.max_norm.items()}
        shapes = {str(layer): vars(shape) for layer, shape in self.shapes.items()}
        about = {
            "format": FORMAT,
            "model": self.model,
            "tokens": str(self.tokens),
            "shapes": json.dumps(shapes),
        }
        with replacing(path) as beside:
            save_file(tensors, beside, metadata=about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingStats:
        """Reads statistics; raises ValueError for a file that is not one."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ValueError(f"{path} holds no routing statistics (safetensors with format {FORMAT!r})")
                shapes = {int(k): LayerShape(**v) for k, v in json.loads(about["shapes"]).items()}
                moments = {layer: file.get_tensor(f"moments.{layer}") for layer in shapes}
                max_norm = {layer: file.get_tensor(f"max_norm.{layer}") for layer in shapes}
                tokens, model = int(about["tokens"]), about["model"]
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a readable file of routing statistics: {error}") from None
        return cls(moments, max_norm, tokens, shapes, model)


def calibrate(model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> RoutingStats:
    """Runs the model over `batches` once and gathers RoutingStats for every MoE layer.

    batches: see data.as_batches; positions with attention_mask = 1 count, label masks are ignored. Memory beside the
    model's own: a table of 9 float64 per expert, and expert outputs of one block of routed pairs. The model is left
    as it was. Raises ValueError for a model without MoE layers, or for no data. Source: methods of arXiv 2606.15716
    and 2510.13999.
    """
    layers = find_moe_layers(model)
    batches = as_batches(batches, model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    device = next(model.parameters()).device
    moments: dict[int, Tensor] = {}
    max_norm: dict[int, Tensor] = {}
    attended = torch.empty(0, dtype=torch.bool)

    def observe(index: int) -> Callable[[ExpertsFunction, Tensor, Tensor, Tensor], Tensor]:
        def function(original: ExpertsFunction, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
            tokens, top_k = expert_ids.shape
            if tokens != attended.numel():
                raise ValueError(
                    f"layer {index}: the experts saw {tokens} rows for {attended.numel()} positions; this model "
                    "does not hand every position to its experts, so its statistics cannot be masked"
                )
            output = torch.empty_like(hidden)
            step = max(1, PAIRS_AT_ONCE // top_k)
            for start in range(0, tokens, step):
                rows = slice(start, start + step)
                ids, gates = expert_ids[rows].reshape(-1), weights[rows].reshape(-1)
                ones = torch.ones(len(ids), 1, dtype=weights.dtype, device=weights.device)
                outputs = original(hidden[rows].repeat_interleave(top_k, 0), ids[:, None], ones)
                valid = attended[rows].repeat_interleave(top_k).to(ids.device)
                routing_moments_(moments[index], max_norm[index], ids, gates, outputs, valid=valid)
                weighted = outputs.view(-1, top_k, outputs.shape[-1]) * weights[rows].unsqueeze(-1)
                output[rows] = weighted.sum(1).to(output.dtype)
            return output

        return function

    backbone = getattr(model, "base_model", model)  # no LM head: its logits are not needed
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), ExitStack() as stack:
            for index, layer in layers.items():
                where = next(layer.experts.parameters()).device
                count = layer.shape.num_experts
                moments[index] = torch.zeros(count, 3, 3, dtype=torch.float64, device=where)
                max_norm[index] = torch.zeros(count, dtype=torch.float32, device=where)
                stack.enter_context(intercepted(layer.experts, observe(index)))
            for batch in tqdm(batches, desc="calibrate", unit="batch", disable=not progress):
                attended = batch.attention_mask.reshape(-1)
                backbone(**batch.model_inputs(device), use_cache=False)
    finally:
        model.train(was_training)
    broken = [index for index, table in moments.items() if not bool(torch.isfinite(table).all())]
    if broken:
        raise ValueError(f"experts' outputs are NaN or infinite in layers {broken}: check the weights and the dtype")
    return RoutingStats(
        {index: table.cpu() for index, table in moments.items()},
        {index: norm.cpu() for index, norm in max_norm.items()},
        sum(int(batch.attention_mask.sum()) for batch in batches),
        {index: layer.shape for index, layer in layers.items()},
        model_fingerprint(model, layers),
    )
