"""Whether slicing a router masks it correctly; one that it does not is refused at the start, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moeprune_ext.modeling import MAPPED
from moeprune_ext.models.layers import OWN_SOFTMAX, MoeLayer, half_kept, masked
from moeprune_ext.models.routers import probe, router_answer


def check_slicing(layers: Mapping[int, MoeLayer]) -> None:
    """Refuses, by name, a router that slicing does not mask correctly.

    One layer of each router class is sliced and compared with the definition:

    - its logits must be the full router's at the kept experts (probabilities: those, divided by their sum);
    - its choice must be K distinct kept experts per row;
    - where the full router chooses kept experts only, the sliced one mostly chooses the same (a correction bias may
      weigh more against a softmax over fewer), with weights in the same proportions.

    Of routers with groups the last half of each group is kept; of others the experts that some rows choose, so that
    there are such rows.

    Args:
        layers: of a model, by decoder layer.

    Raises:
        ValueError: naming the router's class.
    """
    seen: set[type] = set()
    for layer in layers.values():
        if type(layer.router) in seen or layer.shape.capacity == 0:
            continue
        seen.add(type(layer.router))
        hidden = probe(layer, 64)
        full = router_answer(layer, hidden)
        kept = half_kept(layer) if full is None or layer.shape.n_group > 1 else _chosen_by_some(layer, full)
        with masked(layer, kept):
            sliced = router_answer(layer, hidden)
        if full is None or sliced is None or not _is_masked(layer, kept, full, sliced):
            raise ValueError(
                f"{type(layer.router).__name__} (layer {layer.index}) is a router that slicing does not mask "
                "correctly; this model is not supported yet"
            )


def _choice(layer: MoeLayer, answer: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Finds ids and weights [T, K] in a router's answer, where their shapes tell which they are."""
    shaped = [part.flatten(0, -2) for part in answer if part.ndim > 1 and part.shape[-1] == layer.active]
    ids = [part for part in shaped if not part.is_floating_point()]
    weights = [part for part in shaped if part.is_floating_point()]
    return ids[0] if ids else None, weights[0] if len(weights) == 1 else None


def _chosen_by_some(layer: MoeLayer, full: Sequence[Tensor]) -> list[int]:
    """Experts that the first rows choose, up to half of all, filled up to what the router needs."""
    ids, _ = _choice(layer, full)
    count = layer.shape.num_experts
    chosen: set[int] = set()
    for row in [] if ids is None else ids.tolist():
        more = chosen | {expert for expert in row if expert < count}
        if chosen and len(more) > max(count // 2, layer.shape.min_kept):
            break
        chosen = more
    missing = max(layer.shape.min_kept, 2) - len(chosen)
    return sorted([*chosen, *[e for e in range(count) if e not in chosen][: max(0, missing)]])


def _is_masked(layer: MoeLayer, kept: Sequence[int], full: Sequence[Tensor], sliced: Sequence[Tensor]) -> bool:
    """Tells whether the answers of a full router and of its slice agree, as `check_slicing` says."""
    rows, count = layer.with_trailing(kept), layer.shape.num_experts
    ids, weights = _choice(layer, sliced)
    full_ids, full_weights = _choice(layer, full)

    def agree(a: Tensor, b: Tensor) -> bool:
        if a.shape[-1] == count and b.shape[-1] == len(kept):
            a = a[..., list(kept)].float()
        elif layer.trailing and a.shape[-1] == layer.router_rows and b.shape[-1] == len(rows):
            a = a[..., rows].float()
        else:
            return False
        if hasattr(layer.router, MAPPED[0]):  # its logits are of shares of the experts that the kept rows refer to
            a, b = a.softmax(-1), b.softmax(-1)
        options = (a, a / a.sum(-1, keepdim=True))
        return any(torch.allclose(option, b.float(), rtol=1e-2, atol=1e-3) for option in options)

    if (
        ids is None
        or full_ids is None
        or not (int(ids.min()) >= 0 and int(ids.max()) < len(rows))
        or not bool((ids.sort(-1).values.diff(dim=-1) > 0).all())
        or not any(agree(a, b) for a, b in zip(full, sliced, strict=True))
    ):
        return False
    stored = torch.tensor(rows, device=ids.device)
    inside = torch.isin(full_ids, stored).all(-1)
    order, full_order = stored[ids].argsort(-1), full_ids.argsort(-1)
    same = inside & (stored[ids].gather(-1, order) == full_ids.gather(-1, full_order)).all(-1)
    if layer.shape.n_group > 1 or not bool(inside.any()):
        return True
    if int(same.sum()) * 2 < int(inside.sum()):
        return False
    own = type(layer.router).__name__ in OWN_SOFTMAX
    if own or weights is None or full_weights is None or weights.shape != full_weights.shape:
        return True
    shares, full_shares = (w.float().gather(-1, o)[same] for w, o in ((weights, order), (full_weights, full_order)))
    shares, full_shares = (w / w.sum(-1, keepdim=True) for w in (shares, full_shares))
    return torch.allclose(shares, full_shares, rtol=2e-2, atol=1e-3, equal_nan=True)
