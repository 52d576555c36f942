"""Multi-token-prediction layers: decoder layers past the last, which guess the token after next from a hidden state.

transformers does not build them, and no logits of the model depend on them, so that no search can score them. Serving
runtimes draft tokens with them. Their experts are scored by the same statistics as all others: each is run on the
hidden states that calibration passes by, as such a runtime runs it (DeepSeek-V3, arXiv 2412.19437, section 2.2):

    h' = layer(project([norm(embedding of the next token), norm(h)])),  h of the final norm, at the same position
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.moe import MoeModel, decoder_layers, plain_model


@dataclass(frozen=True)
class MtpLayer:
    """A multi-token-prediction layer.

    Attributes:
        layer: router and experts, numbered on from the last decoder layer.
        block: its decoder layer.
        embedding_norm: of the next token's embedding.
        hidden_norm: of the hidden state.
        project: [H, 2 H], of both, the embedding first.
        norm: after which its own hidden state is the next such layer's input.
    """

    layer: MoeLayer
    block: nn.Module
    embedding_norm: nn.Module
    hidden_norm: nn.Module
    project: Tensor
    norm: nn.Module


def can_run(moe: MoeModel) -> bool:
    """Whether the model has the parts that its multi-token-prediction layers need: decoder layers and a final norm."""
    try:
        return isinstance(final_norm(moe), nn.Module)
    except (AttributeError, ValueError):
        return False


def final_norm(moe: MoeModel) -> Any:
    """Returns the norm behind the decoder layers."""
    path, _ = decoder_layers(moe)
    return moe.model.get_submodule(path.rpartition(".")[0]).norm


@contextmanager
def running(
    moe: MoeModel, layers: Sequence[MtpLayer], batch: Callable[[], TokenBatch], seen: Callable[[Tensor], None]
) -> Iterator[None]:
    """Inside, whenever the model's last decoder layer has run, the multi-token-prediction layers run behind it.

    Args:
        moe: the model.
        layers: in order.
        batch: returns the batch that runs now.
        seen: called ahead of each layer with the positions that have a next token, bool [B x S].
    """
    norm, embeddings = final_norm(moe), plain_model(moe).get_input_embeddings()

    def run(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not layers:
            return
        hidden = norm(output if isinstance(output, Tensor) else output[0])
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        tokens, attended = batch().input_ids, batch().attention_mask.bool()
        for number, mtp in enumerate(layers, 1):
            following = tokens.roll(-number, 1).to(hidden.device)
            valid = attended & attended.roll(-number, 1)
            valid[:, -number:] = False
            seen(valid.reshape(-1))
            states = [mtp.embedding_norm(embeddings(following)).to(hidden.dtype), mtp.hidden_norm(hidden)]
            joined = torch.cat(states, dim=-1) @ mtp.project.T
            made = mtp.block(joined, *args[1:], **rest)
            hidden = mtp.norm(made if isinstance(made, Tensor) else made[0])

    handle = decoder_layers(moe)[1][-1].register_forward_hook(run, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
