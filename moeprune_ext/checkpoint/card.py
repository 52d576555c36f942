"""The model card of an export: what it was made of and how, under which licence, how to load and serve it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.checkpoint.read import Checkpoint

SOURCE_CARD = "README.source.md"  # the source's own card, kept beside ours
KEPT = ("license", "license_name", "license_link", "language")  # of the source's card


def model_card(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    kept: Mapping[int, int],
    counts: Mapping[int, int],
    *,
    is_stock: bool,
    size: int,
    mtp: str,
) -> str:
    """Makes the text of README.md.

    Args:
        checkpoint: the source.
        plan: what became of it.
        kept: {decoder layer: experts kept}.
        counts: {decoder layer: experts stored}: more in a padded export.
        is_stock: whether stock loaders read the result.
        size: of the weights, in bytes.
        mtp: what became of multi-token-prediction layers; empty where there are none.
    """
    layers, name = checkpoint.layers, _hub_name(checkpoint) or checkpoint.folder.resolve().name
    before = sum(layer.shape.num_experts for layer in layers.values())
    after = sum(kept.values())
    rows = "\n".join(f"| {i} | {layers[i].shape.num_experts} | {n} |" for i, n in kept.items())
    padded = (
        f" Every layer is stored with {max(counts.values())} experts; those beyond the ones kept are zeros, and a bias "
        "keeps them from being chosen."
        if kept != counts
        else ""
    )
    return (
        f"---\n{_metadata(checkpoint)}\n---\n\n# {name}, {after} of {before} experts\n\n"
        f"Made from `{name}` with moeprune_ext, {_how(plan)}, "
        f"{1 - after / before:.1%} of the routed experts removed; weights take {size / 1e6:,.1f} MB. {_changed(plan)}"
        f"{padded}{f' Its {mtp}.' if mtp else ''} The plan is in `pruning_plan.json`. "
        f"Its licence is that of `{name}`.\n\n"
        f"{_loading(checkpoint, is_stock)}\n\n"
        f"| layer | experts before | kept |\n| --- | --- | --- |\n{rows}\n"
    )


def _metadata(checkpoint: Checkpoint) -> str:
    """Makes the card's YAML, of which licence and languages are the source's."""
    from huggingface_hub import ModelCardData, metadata_load

    card = checkpoint.folder / "README.md"
    try:
        source: dict[str, Any] = (metadata_load(card) or {}) if card.is_file() else {}
    except Exception:  # a card that is no YAML fails in many ways, and is kept beside ours in any case
        source = {}
    ours = "moeprune" in (source.get("tags") or [])  # an export was pruned again
    base = source.get("base_model") if ours else _hub_name(checkpoint)
    text_alone = checkpoint.loader == "AutoModelForCausalLM"
    kept: Any = {key: source[key] for key in KEPT if key in source} | ({"base_model": base} if base else {})
    return ModelCardData(
        **kept,
        library_name="transformers",
        pipeline_tag="text-generation" if text_alone else source.get("pipeline_tag", "image-text-to-text"),
        tags=["moeprune", "expert-pruning"],
    ).to_yaml()


def _hub_name(checkpoint: Checkpoint) -> str | None:
    """Returns the source's name on the Hub, from its configuration or the Hub's cache; None if neither says it."""
    named = str(checkpoint.config.get("_name_or_path") or "")
    if named.count("/") == 1 and not Path(named).exists():
        return named
    cached = [part for part in checkpoint.folder.resolve().parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/", 1) if cached else None


def _how(plan: PruningPlan) -> str:
    if plan.mapped_layers:
        return "merged from it without gradients (EEP)"
    return f"criterion {plan.criterion or 'unknown'}"


def _changed(plan: PruningPlan) -> str:
    """Says what became of weights."""
    sentences = []
    if plan.mapped_layers:
        sentences.append("Experts are sums of the original ones, and routers map their scores to them.")
    elif merges := sum(merge.sums for merge in plan.merges.values()):
        sentences.append(f"{merges} experts are averages of merged ones.")
    if plan.repaired_layers:
        sentences.append(
            f"In {len(plan.repaired_layers)} layers the kept experts' down projections were refitted by ridge least "
            "squares, without gradients, so that the layers give again what they gave before; no other weight was "
            "changed."
        )
    if not sentences:
        sentences.append("No weight was retrained or changed.")
    if plan.active is not None:
        sentences.append(f"Every token is given to {plan.active} experts.")
    return " ".join(sentences)


def _loading(checkpoint: Checkpoint, is_stock: bool) -> str:
    """Says how to load and serve."""
    here = "<this directory>"
    if is_stock:
        return (
            f'```python\n{checkpoint.loader}.from_pretrained("{here}")\n```\n\nServe it as the original, for example '
            f"with `vllm serve {here}`."
        )
    return (
        "Its layers differ, so it needs its own `modeling.py`, which is here:\n\n```python\n"
        f'moeprune_ext.load("{here}")\n# or:\n{checkpoint.loader}.from_pretrained("{here}", trust_remote_code=True)'
        "\n```\n\nWithout `trust_remote_code=True` transformers refuses the weights and names this option. vLLM serves "
        "such models where moeprune_ext is installed beside it; what loads this one: "
        f"`moeprune serve-check {here}`."
    )
