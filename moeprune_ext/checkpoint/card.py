"""The model card of an export: what it was made of and how, under which licence, how to load and serve it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune_ext.artifacts.about import command_line, versions
from moeprune_ext.artifacts.measured import Measured, format_table
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.charts import kept_per_layer
from moeprune_ext.checkpoint.read import Checkpoint
from moeprune_ext.files import replacing, write_text

SOURCE_CARD = "README.source.md"  # the source's own card, kept beside ours
PICTURE = "experts-per-layer.png"
# Between these is what a run adds when it has measured the checkpoint; empty in a plain export.
MEASURED, MEASURED_END = "<!-- measured -->", "<!-- /measured -->"
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
    before = {index: layers[index].shape.num_experts for index in kept}
    all_before = sum(layer.shape.num_experts for layer in layers.values())
    after = sum(kept.values())
    rows = "\n".join(f"| {i} | {before[i]} | {n} |" for i, n in kept.items())
    padded = (
        f" Every layer is stored with {max(counts.values())} experts; those beyond the ones kept are zeros, and a bias "
        "keeps them from being chosen."
        if kept != counts
        else ""
    )
    return (
        f"---\n{_metadata(checkpoint)}\n---\n\n# {name}, {after} of {all_before} experts\n\n"
        f"Made from `{name}` with moeprune_ext, {_how(plan)}, "
        f"{1 - after / all_before:.1%} of the routed experts removed; weights take {size / 1e6:,.1f} MB. "
        f"{_changed(plan)}{padded}{f' Its {mtp}.' if mtp else ''} The plan is in `pruning_plan.json`. "
        f"Its licence is that of `{name}`.\n\n"
        f"{MEASURED}\n{MEASURED_END}\n\n"
        f"## Loading\n\n{_loading(checkpoint, is_stock)}\n\n"
        f"## Experts per layer\n\n![Experts kept in each layer]({PICTURE})\n\n"
        f"| layer | experts before | kept |\n| --- | --- | --- |\n{rows}\n\n"
        f"## How it was made\n\n{_provenance(checkpoint, plan)}\n"
    )


def write_picture(folder: Path, checkpoint: Checkpoint, kept: Mapping[int, int]) -> None:
    """Writes the card's picture into an export's folder."""
    before = {index: checkpoint.layers[index].shape.num_experts for index in kept}
    with replacing(folder / PICTURE) as beside:
        beside.write_bytes(kept_per_layer(kept, before).png())


def add_measured(folder: Path, measured: Measured, says: str, about: Mapping[str, Any]) -> None:
    """Adds to a checkpoint's card what it is worth, on which text, and by which command it was made.

    Args:
        folder: of the checkpoint.
        measured: what its run ends with.
        says: how the plan was chosen, in sentences.
        about: see `complete`.
    """
    text = (
        f"{format_table(measured)}\n\n"
        "ESAP is the share of its tokens that the full model would accept in speculative decoding: the mean over "
        "positions of the sum of min(p, q). ESAP and perplexity are measured on "
        f"{measured.sequences} sequences that no choice depended on; intervals are of a bootstrap over sequences. "
        f"{measured.gained} {says}"
    )
    complete(folder, text, about)


def complete(folder: Path, text: str, about: Mapping[str, Any]) -> None:
    """Writes what a checkpoint is worth into its card, in the place of what stood there.

    Args:
        folder: of the checkpoint.
        text: Markdown.
        about: what `artifacts.about.record` wrote for the run; may be empty.
    """
    file = folder / "README.md"
    card = file.read_text(encoding="utf-8") if file.exists() else ""
    if MEASURED not in card or MEASURED_END not in card:
        return  # its owner has removed it or written it anew
    section = f"## What it is worth\n\n{text}"
    if about.get("commands"):
        commands = "\n".join(entry["command"] for entry in about["commands"])
        section += f"\n\nFound by:\n\n```bash\n{commands}\n```\n\nSeed {about.get('seed')}."
        prints = ", ".join(f"{part} `{value}`" for part, value in about.get("fingerprints", {}).items())
        section += f" Fingerprints: {prints}." if prints else ""
    start, end = card.index(MEASURED) + len(MEASURED), card.index(MEASURED_END)
    write_text(file, f"{card[:start]}\n{section}\n{card[end:]}")


def _provenance(checkpoint: Checkpoint, plan: PruningPlan) -> str:
    """Says by which command, of which model and with which versions an export was made."""
    lines = [
        ("command", f"`{command_line()}`"),
        ("criterion", str(plan.criterion or "not recorded")),
        ("budget", f"{plan.sparsity:.1%} of the routed experts removed"),
        ("fingerprint of the source", f"`{checkpoint.fingerprint}`"),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions().items())),
    ]
    cells = [(name, " ".join(value.split()).replace("|", "\\|")) for name, value in lines]
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in cells)


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
