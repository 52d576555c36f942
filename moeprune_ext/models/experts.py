"""Expert outputs of routed (row, expert) pairs, each computed once.

Several masks over the same hidden states choose overlapping experts: the pair's output f_e(x) is the same under all of
them, only its weight differs. So the distinct pairs are computed, grouped by expert over all states, and each row sums
its own, weighted. On the CPU this also beats the model's own experts function where nothing is shared: an expert's rows
stay in the caches from one product to the next.

The experts' weights are used in the layout that transformers' experts interface describes (gate and up stacked or
interleaved, transposed or not, with biases), after a comparison with the module's own forward; any other experts module
is called as it is, one pair a row with weight 1.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeprune_ext.models.layers import WANT_TWO, MoeLayer
from moeprune_ext.models.patches import ExpertsFunction
from moeprune_ext.models.scratch import Scratch
from moeprune_ext.ops.backend import row_chunks

CHUNK_BYTES = 64 * 2**20  # of weighted outputs on their way into a sum
DOWN = "down_proj"  # the last matrix of every expert in that layout


def inner_activations(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    """Computes what an expert's down projection is given: act(gate) * up, or act(up).

    Args:
        experts: a module in the layout of transformers' experts interface.
        expert: its number.
        hidden: [n, H].

    Returns:
        [n, I].
    """
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    up = getattr(experts, up_name)[expert]
    inner = hidden @ (up if experts.is_transposed else up.T)
    if experts.has_bias:
        inner += getattr(experts, f"{up_name}_bias")[expert]
    return experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)


class PairOutputs:
    """Computes outputs of one layer's experts for pairs sorted by expert.

    Args:
        layer: whose experts are asked.
        scratch: the caller's memory for the outputs, which each call overwrites; None: new memory for each call.
    """

    def __init__(self, layer: MoeLayer, scratch: Scratch | None = None) -> None:
        self._experts: Any = layer.experts
        self._num_experts, self._count = layer.shape.num_experts, layer.router_rows
        self._scratch = scratch

    @cached_property
    def direct(self) -> bool:
        """Whether outputs are computed here, on the CPU, rather than by the module itself.

        Computed lazily: a streamed layer's weights are absent until it runs.
        """
        return _on_cpu(self._experts) and self.is_standard

    @cached_property
    def is_standard(self) -> bool:
        """Whether the experts' weights have the known layout, by names and by a comparison of outputs."""
        return _has_known_names(self._experts) and self._agrees()

    def __call__(self, original: ExpertsFunction, hidden: Tensor, rows: Tensor, counts: list[int]) -> Tensor:
        """Runs the experts.

        Args:
            original: the experts' own forward.
            hidden: [R, H].
            rows: int64 [P], the row of each pair, in order of expert.
            counts: pairs of each expert.

        Returns:
            [P, H], in `scratch` if there is one.
        """
        if self.direct:
            return self._products(hidden, rows, counts)
        ids = torch.repeat_interleave(torch.tensor(counts, device=hidden.device))[:, None]
        weights = torch.ones(len(rows), 1, dtype=hidden.dtype, device=hidden.device)
        if type(self._experts).__name__ in WANT_TWO:
            ids, weights = F.pad(ids, (0, 1), value=self._num_experts), F.pad(weights, (0, 1))
        return original(hidden.index_select(0, rows), ids, weights)

    def _products(self, hidden: Tensor, rows: Tensor, counts: list[int]) -> Tensor:
        experts = self._experts
        shape = (len(rows), hidden.shape[1])
        outputs = hidden.new_empty(shape) if self._scratch is None else self._scratch.take("pairs", shape, hidden)
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            pairs = slice(start, start + count)
            down = experts.down_proj[expert] if experts.is_transposed else experts.down_proj[expert].T
            torch.mm(inner_activations(experts, expert, hidden.index_select(0, rows[pairs])), down, out=outputs[pairs])
            if experts.has_bias:
                outputs[pairs] += experts.down_proj_bias[expert]
            start += count
        return experts.post_expert_norm(outputs) if has_post_expert_norm(experts) else outputs

    def _agrees(self) -> bool:
        """Tells whether the products are what the module computes: two rows for each of its first experts."""
        experts = self._experts
        try:
            width = experts.down_proj.shape[2 if experts.is_transposed else 1]
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(8, width, generator=generator).to(experts.down_proj)
            ids = torch.arange(8, device=hidden.device)[:, None] // 2 % self._count
            counts = torch.bincount(ids[:, 0], minlength=self._count).tolist()
            rows = ids[:, 0].argsort(stable=True)
            with torch.no_grad():
                # The class's, since the instance's may be intercepted now.
                expected = type(experts).forward(experts, hidden, ids, hidden.new_ones(8, 1))
                got = torch.empty_like(expected)
                got[rows] = self._products(hidden, rows, counts)
        except (AttributeError, RuntimeError, TypeError, ValueError, LookupError):
            return False
        tolerance = 1e-5 if hidden.dtype == torch.float32 else 2e-2
        return bool(((got - expected).abs() <= tolerance * expected.abs().max()).all())


def _on_cpu(module: nn.Module) -> bool:
    return all(p.device.type == "cpu" for p in module.parameters())


def has_post_expert_norm(experts: Any) -> bool:
    """Whether a norm stands behind each expert; transformers 5.17 knows of none."""
    return bool(getattr(experts, "has_post_expert_norm", False))


def _has_known_names(experts: Any) -> bool:
    names = ("has_gate", "has_bias", "is_transposed", "down_proj")
    return all(hasattr(experts, name) for name in names) and not getattr(experts, "_is_expert_parallel", False)


def distinct_pairs(
    ids: Tensor, first_of: Tensor, node_of: Tensor, num_experts: int
) -> tuple[Tensor, list[int], Tensor]:
    """Finds the distinct (row, expert) pairs of M states that stand for N nodes' hidden states.

    Args:
        ids: [M * S, K], expert ids of every state's rows.
        first_of: [N], a state of each node.
        node_of: [M], each state's node.
        num_experts: ids lie below this.

    Returns:
        Rows [P], into the M * S and in order of expert; the number of pairs of each expert; and the pair of every entry
        of `ids`.
    """
    states, nodes = len(node_of), len(first_of)
    length = len(ids) // states
    row = torch.arange(length, device=ids.device)
    node_row = (node_of[:, None] * length + row).flatten()  # in [0, N * S)
    keys = ids * (nodes * length) + node_row[:, None]
    present = torch.zeros(num_experts * nodes * length, dtype=torch.bool, device=ids.device)
    present[keys.flatten()] = True
    pairs = present.nonzero()[:, 0]
    number = torch.empty(len(present), dtype=torch.int64, device=ids.device)
    number[pairs] = torch.arange(len(pairs), device=ids.device)
    rows = (first_of[:, None] * length + row).flatten()[pairs % (nodes * length)]
    return rows, present.view(num_experts, -1).sum(-1).tolist(), number[keys]


def weighted_sum(outputs: Tensor, pair_of: Tensor, weights: Tensor) -> Tensor:
    """Adds up every row's pairs, weighted.

    In half precision the arithmetic is that of transformers' experts functions, which round each product.

    Args:
        outputs: [P, H].
        pair_of: [R, K], numbers of pairs.
        weights: [R, K].

    Returns:
        [R, H].
    """
    if outputs.dtype == torch.float32:
        return F.embedding_bag(pair_of, outputs, mode="sum", per_sample_weights=weights.to(outputs.dtype))
    result = outputs.new_empty(len(pair_of), outputs.shape[1])
    for rows in row_chunks(len(pair_of), pair_of.shape[1] * outputs.shape[1] * 2 * outputs.element_size(), CHUNK_BYTES):
        result[rows] = (outputs[pair_of[rows]] * weights[rows].unsqueeze(-1)).sum(1)
    return result
