"""What is measured: every operation at the shapes of three models, with what it competes with and what bounds it.

A contender's name says its role: `native`; `eager: ...`, spellings in plain PyTorch; others are times to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from measure import Contenders, copy, reads
from torch import Tensor

import moeprune_ext as mp
from moeprune_ext.ops.overlap import log_sum_exp
from moeprune_ext.ops.reference import METRICS, draw_uniforms

DTYPES = (torch.float32, torch.bfloat16)
CPU_BYTES = 512 * 2**20  # of logits in one call: well beyond the caches, small enough for any machine
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Model:
    name: str
    vocabulary: int
    experts: int
    top_k: int
    hidden: int


MODELS = (
    Model("OLMoE-1B-7B", 50_304, 64, 8, 2048),
    Model("Qwen3-30B-A3B", 151_936, 128, 8, 2048),
    Model("Mixtral-8x7B", 32_000, 8, 2, 4096),
)
OLMOE, QWEN3, _ = MODELS


@dataclass(frozen=True)
class Target:
    """A demand of the design on the time of others over native's, of the fastest (or pick=max, the slowest) of them.

    Either at least `faster`, or native's time within `within` times theirs.
    """

    text: str
    others: tuple[str, ...]  # prefixes of contenders' names
    faster: float = 0.0
    within: float = 0.0
    pick: Callable = min


@dataclass
class Work:
    """A case's inputs made and its contenders ready; each returns what `native` returns, as one or more tensors."""

    inputs: tuple[Tensor, ...]
    contenders: Contenders
    compiles: tuple | None = None  # a function and its arguments, for torch.compile
    yardsticks: Contenders = field(default_factory=dict)
    max_workspace: int | None = None  # bytes; without it, 1 % of inputs + outputs


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], Work]
    limit: str  # prefix of the yardsticks that bound it; the fastest counts
    targets: tuple[Target, ...] = ()
    rtol: float = 1e-4  # of eager against native; where eager computes in bfloat16, its accuracy


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- overlap


def overlap_eager(p: Tensor, q: Tensor) -> Tensor:
    return torch.minimum(p.float().softmax(-1), q.float().softmax(-1)).sum(-1)


def overlap_eager_loop(p: Tensor, q: Tensor) -> Tensor:
    p = p.float().softmax(-1)
    return torch.stack([torch.minimum(p, candidate.float().softmax(-1)).sum(-1) for candidate in q])


def metrics_eager(p_logits: Tensor, q_logits: Tensor, labels: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
    log_p, log_q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    difference = log_p - log_q
    token = torch.searchsorted(q.cumsum(-1), uniform[:, None].float(), right=True).clamp(max=q.shape[-1] - 1)
    return (
        torch.minimum(p, q).sum(-1),
        (p * difference).sum(-1),
        -(q * difference).sum(-1),
        (p_logits.argmax(-1) == q_logits.argmax(-1)).float(),
        -log_q.gather(-1, labels[:, None])[:, 0],
        difference.gather(-1, token)[:, 0].exp().clamp(max=1),
    )


def overlap_rows(model: Model, candidates: int, device: str) -> int:
    if device == "cuda":
        return 1024
    rows = 1024
    while (1 + candidates) * rows * model.vocabulary * 4 > CPU_BYTES:
        rows //= 2
    return rows


def logits_pair(rows: int, candidates: int, vocabulary: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    p = (torch.randn(rows, vocabulary, device=device) * 3).to(dtype)
    q = torch.empty(candidates, rows, vocabulary, dtype=dtype, device=device)
    for candidate in q:  # one at a time: float32 copies of all would not fit a small GPU
        candidate.copy_(p.float() + torch.randn(rows, vocabulary, device=device))
    return p, q


def overlap_case(model: Model, candidates: int, dtype: torch.dtype, device: str, shrink: int) -> Case:
    rows = max(2, overlap_rows(model, candidates, device) // shrink)

    def build() -> Work:
        p, q = logits_pair(rows, candidates, model.vocabulary, dtype, device)
        p_lse = log_sum_exp(p)
        contenders: Contenders = {
            "native": lambda: mp.overlap(p, q, p_lse=p_lse, backend="native")["esap"],
            "eager: broadcast": lambda: overlap_eager(p, q),
        }
        if candidates > 1:
            contenders["eager: loop"] = lambda: overlap_eager_loop(p, q)
        return Work((p, q, p_lse), contenders, (overlap_eager, p, q), reads(p, q))

    on_cpu = (
        Target("12x eager", ("eager",), faster=12),
        Target("1.8x compile", ("compile",), faster=1.8),
        Target("1.6x read", ("read",), within=1.6),
        Target("1.6x sum", ("sum",), within=1.6),
    )
    on_gpu = (Target("0.8 copy", ("read",), faster=0.8),) if model == QWEN3 and dtype == torch.bfloat16 else ()
    name = f"overlap, {model.name}, T={rows}, C={candidates}, {name_of(dtype)}"
    return Case(name, build, "read", on_cpu if device == "cpu" else on_gpu)


def metrics_case(model: Model, dtype: torch.dtype, device: str, shrink: int) -> Case:
    rows = max(2, overlap_rows(model, 1, device) // shrink)

    def build() -> Work:
        p, q = logits_pair(rows, 1, model.vocabulary, dtype, device)
        p_lse, labels = log_sum_exp(p), torch.randint(model.vocabulary, (rows,), device=device)
        uniform = draw_uniforms(0, rows, device)

        def native() -> tuple[Tensor, ...]:
            results = mp.overlap(p, q, p_lse=p_lse, labels=labels, metrics=METRICS, backend="native")
            return tuple(results[metric][0] for metric in METRICS)

        contenders: Contenders = {"native": native, "eager": lambda: metrics_eager(p, q[0], labels, uniform)}
        return Work((p, q, p_lse, labels), contenders, (metrics_eager, p, q[0], labels, uniform), reads(p, q))

    return Case(f"overlap, all metrics, {model.name}, T={rows}, C=1, {name_of(dtype)}", build, "read")


def from_hidden_case(model: Model, dtype: torch.dtype, device: str, shrink: int) -> Case:
    rows = max(2, (4096 if device == "cuda" else 256) // shrink)

    def build() -> Work:
        head = (torch.randn(model.vocabulary, model.hidden, device=device) * model.hidden**-0.5).to(dtype)
        p = torch.randn(rows, model.hidden, device=device).to(dtype)
        q = (p.float() + 0.3 * torch.randn(rows, model.hidden, device=device)).to(dtype)
        contenders: Contenders = {
            "native": lambda: mp.overlap_from_hidden(p, q, head, chunk_bytes=CHUNK_BYTES, backend="native")["esap"],
            "eager": lambda: overlap_eager(F.linear(p, head), F.linear(q, head)[None]),
        }
        products: Contenders = {"products": lambda: (F.linear(p, head), F.linear(q, head))}
        return Work((p, q, head), contenders, None, products, max_workspace=CHUNK_BYTES)

    name = f"overlap_from_hidden, {model.name}, T={rows}, C=1, {name_of(dtype)}"
    return Case(name, build, "products")


# ---- masked_router


def routed(masked: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(masked.softmax(-1), top_k)
    return ids, weights


def router_eager_loop(logits: Tensor, keep: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    answers = [routed(logits.masked_fill(~mask, -torch.inf), top_k) for mask in keep]
    return torch.stack([ids for ids, _ in answers]), torch.stack([weights for _, weights in answers])


def router_eager_broadcast(logits: Tensor, keep: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return routed(logits.masked_fill(~keep[:, None, :], -torch.inf), top_k)


def router_eager_assigned(logits: Tensor, keep: Tensor, assigned: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return routed(logits.masked_fill(~keep[assigned], -torch.inf), top_k)


def router_masks(model: Model, form: str, rows: int, device: str) -> tuple[dict, dict | None, Tensor]:
    """The masks as arguments of masked_router, the same for a single mask, and as keep [C, E]."""
    n_experts = model.experts
    if form == "nested":
        counts = list(range(max(model.top_k, n_experts - 63), n_experts + 1))
        order = torch.randperm(n_experts, device=device)
        rank = order.argsort()
        keep = rank[None, :] < torch.tensor(counts, device=device)[:, None]
        return dict(order=order, counts=counts), dict(order=order, counts=counts[-1:]), keep
    rank = torch.rand(16, n_experts, device=device).argsort(-1).argsort(-1)
    keep = rank < n_experts // 2
    if form == "shared":
        return dict(keep=keep), dict(keep=keep[:1]), keep
    return dict(keep=keep, assigned=torch.randint(16, (rows,), device=device)), None, keep


def router_case(model: Model, form: str, device: str, shrink: int) -> Case:
    rows = max(2, (65_536 if device == "cuda" else 4096) // shrink)
    n_masks = min(64, model.experts - model.top_k + 1) if form == "nested" else 16

    def build() -> Work:
        logits = torch.randn(rows, model.experts, device=device) * 2
        masks, one_mask, keep = router_masks(model, form, rows, device)
        k = model.top_k

        def native(masks: dict = masks) -> tuple[Tensor, Tensor]:
            return mp.masked_router(logits, top_k=k, **masks, backend="native")

        ids, weights = (torch.empty_like(answer) for answer in native())
        yardsticks: Contenders = {
            "write: into new memory": lambda: (torch.empty_like(ids).fill_(1), torch.empty_like(weights).fill_(1)),
            "write: into memory in use": lambda: (ids.fill_(1), weights.fill_(1)),
            "copy": copy(logits.nbytes + ids.nbytes + weights.nbytes, device),
        }
        if one_mask is None:
            assigned = masks["assigned"]
            contenders: Contenders = {
                "native": native,
                "eager": lambda: router_eager_assigned(logits, keep, assigned, k),
            }
            return Work(
                (logits, keep, assigned), contenders, (router_eager_assigned, logits, keep, assigned, k), yardsticks
            )
        yardsticks["C = 1"] = lambda: native(one_mask)
        contenders = {
            "native": native,
            "eager: loop": lambda: router_eager_loop(logits, keep, k),
            "eager: broadcast": lambda: router_eager_broadcast(logits, keep, k),
        }
        return Work((logits, keep), contenders, (router_eager_broadcast, logits, keep, k), yardsticks)

    on_cpu = (
        Target("20x loop", ("eager: loop",), faster=20),
        Target("1.5x max(C = 1, writing)", ("C = 1", "write: into new memory"), within=1.5, pick=max),
    )
    targets = () if form != "nested" else on_cpu if device == "cpu" else (Target("2x copy", ("copy",), within=2),)
    if device == "cpu" and model != QWEN3:
        targets = ()  # they are stated for E = 128, K = 8, C = 64
    name = f"masked_router, {form}, {model.name}, N={rows}, C={n_masks}, float32"
    return Case(name, build, "copy" if device == "cuda" else "write: into new", targets)


def map_eager_loop(logits: Tensor, maps: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1)
    answers = [torch.topk(F.linear(scores, router_map), top_k) for router_map in maps]
    weights = torch.stack([weights for weights, _ in answers])
    return torch.stack([ids for _, ids in answers]), weights / weights.sum(-1, keepdim=True)


def map_eager_broadcast(logits: Tensor, maps: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(logits.softmax(-1) @ maps.mT, top_k)
    return ids, weights / weights.sum(-1, keepdim=True)


def router_map_case(model: Model, device: str, shrink: int) -> Case:
    rows, n_maps, n_kept = max(2, (65_536 if device == "cuda" else 4096) // shrink), 16, model.experts // 2

    def build() -> Work:
        logits = torch.randn(rows, model.experts, device=device) * 2
        # Maps of the merge phase: one-hot rows, then a quarter of all entries changed.
        kept = torch.rand(n_maps, model.experts, device=device).argsort(-1)[:, :n_kept]
        maps = torch.eye(model.experts, device=device)[kept]
        maps += 0.065 * torch.randn_like(maps) * (torch.rand_like(maps) < 0.25)
        k, spec = model.top_k, mp.RouterSpec(renormalize=True)

        def native() -> tuple[Tensor, Tensor]:
            return mp.masked_router(logits, top_k=k, router_map=maps, spec=spec, backend="native")

        contenders: Contenders = {
            "native": native,
            "eager: loop": lambda: map_eager_loop(logits, maps, k),
            "eager: broadcast": lambda: map_eager_broadcast(logits, maps, k),
        }
        ids, weights = (torch.empty_like(answer) for answer in native())
        yardsticks: Contenders = {
            "products": lambda: logits @ maps.mT,
            "write": lambda: (torch.empty_like(ids).fill_(1), torch.empty_like(weights).fill_(1)),
        }
        return Work((logits, maps), contenders, (map_eager_broadcast, logits, maps, k), yardsticks)

    name = f"masked_router, router maps, {model.name}, N={rows}, K'={n_kept}, C={n_maps}, float32"
    return Case(name, build, "products")


# ---- routing_moments_

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "in float32": lambda x: torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32),
    "after float()": lambda x: x.float().norm(dim=-1),
}


def moments_eager(table: Tensor, ids: Tensor, gates: Tensor, norms: Tensor) -> Tensor:
    norms, gates = norms.double(), gates.double()
    gate_powers = torch.stack([torch.ones_like(gates), gates, gates * gates], -1)[:, :, None]
    norm_powers = torch.stack([torch.ones_like(norms), norms, norms * norms], -1)[:, None, :]
    return table.index_add_(0, ids, (gate_powers * norm_powers).flatten(1))


def moments_eager_whole(table: Tensor, ids: Tensor, gates: Tensor, outputs: Tensor) -> Tensor:
    return moments_eager(table, ids, gates, NORMS["after float()"](outputs))


def moments_case(model: Model, dtype: torch.dtype, device: str, shrink: int) -> Case:
    elements = (2**29 if device == "cuda" else 2**27) // shrink  # 1 GiB and more on a GPU
    pairs = max(2, elements // model.hidden)

    def build() -> Work:
        outputs = torch.randn(pairs, model.hidden, device=device).to(dtype)
        ids = torch.randint(model.experts, (pairs,), device=device)
        gates = torch.rand(pairs, device=device)
        moments = torch.zeros(model.experts, 3, 3, dtype=torch.float64, device=device)
        max_norm = torch.zeros(model.experts, device=device)
        tables = {
            name: torch.zeros(model.experts, 9, dtype=torch.float64, device=device) for name in (*NORMS, "compile")
        }

        def native() -> Tensor:
            mp.routing_moments_(moments, max_norm, ids, gates, outputs, backend="native")
            return moments.flatten(1)

        def eager(name: str) -> Callable[[], Tensor]:
            return lambda: moments_eager(tables[name], ids, gates, NORMS[name](outputs))

        contenders: Contenders = {"native": native, **{f"eager: {name}": eager(name) for name in NORMS}}
        compiles = (moments_eager_whole, tables["compile"], ids, gates, outputs)
        return Work((outputs, ids, gates, moments, max_norm), contenders, compiles, reads(outputs))

    factor = 1.6 if dtype == torch.float32 else 4.0
    on_cpu = (Target("0.7 read", ("read",), faster=0.7), Target(f"{factor:g}x eager", ("eager",), faster=factor))
    targets = on_cpu if device == "cpu" else (Target("0.85 copy", ("read",), faster=0.85),)
    name = f"routing_moments_, {model.name}, S={pairs}, H={model.hidden}, {name_of(dtype)}"
    return Case(name, build, "read", targets, rtol=1e-4 if dtype == torch.float32 else 1e-2)


def all_cases(device: str, shrink: int = 1, models: Sequence[Model] = MODELS) -> list[Case]:
    """shrink divides the rows of every case."""
    size = (device, shrink)
    overlaps = [overlap_case(model, c, dtype, *size) for model in models for c in (1, 8) for dtype in DTYPES]
    metrics = [metrics_case(OLMOE, dtype, *size) for dtype in DTYPES]
    hidden = from_hidden_case(OLMOE, torch.float32 if device == "cpu" else torch.bfloat16, *size)
    routers = [router_case(model, form, *size) for model in models for form in ("nested", "shared", "assigned")]
    maps = [router_map_case(model, *size) for model in models]
    moments = [moments_case(model, dtype, *size) for model in models for dtype in DTYPES]
    return [*overlaps, *metrics, hidden, *routers, *maps, *moments]
