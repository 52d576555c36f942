"""Trains the embedded demo model from scratch: `python -m moeprune_ext.demo.train --out DIR`.

The model is a small Qwen3-MoE: 6 layers, 16 experts, top-4, hidden 128; about 3.5 M parameters, 7 MB in bfloat16. Its
text is the `train` split of corpus.py: the standard library's code and docstrings, and arithmetic. Nothing is
downloaded. The output is a stock checkpoint with its tokenizer, which `AutoModelForCausalLM.from_pretrained` reads, and
`training.json`: settings, machine, versions, loss curve, time. Training takes about an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeprune_ext.demo import corpus

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
MIXTURE = {"code": 0.40, "prose": 0.15, "arithmetic": 0.45}  # share of rows
ROWS, LENGTH = 16, 256
PEAK_LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 3e-3, 200, 0.1


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE in which every digit is a token, so that column arithmetic can be learnt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.code_documents("train") + corpus.prose_documents("train"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def demo_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """Returns the model's configuration."""
    sizes: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=80,
        intermediate_size=80,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        router_aux_loss_coef=0.01,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3MoeConfig(**sizes)


def training_rows(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[list[int]]:
    """Yields rows of LENGTH tokens of one domain each; text rows start anywhere, arithmetic rows at a line."""
    end = [tokenizer.eos_token_id]
    text = {
        domain: [token for ids in tokenizer(documents)["input_ids"] for token in ids + end]
        for domain, documents in (
            ("code", corpus.code_documents("train")),
            ("prose", corpus.prose_documents("train")),
        )
    }
    while True:
        domain = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
        if domain == "arithmetic":
            # Three-digit problems teach the carries that two-digit ones reuse; both keep the held-out pairs out.
            document = corpus.arithmetic_document(rng, lines=LENGTH // 5, largest=rng.choice((99, 999)))
            yield tokenizer(document)["input_ids"][:LENGTH]
        else:
            start = rng.randrange(len(text[domain]) - LENGTH)
            yield text[domain][start : start + LENGTH]


def learning_rate(step: int, steps: int) -> float:
    """Returns a step's learning rate: linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(out: Path, steps: int, seed: int) -> None:
    """Trains the model on `steps` batches of ROWS rows and writes it to `out`, every 500 steps and at the end."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = train_tokenizer()
    model = Qwen3MoeForCausalLM(demo_config(tokenizer))
    model.set_experts_implementation("grouped_mm")
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    rows = training_rows(tokenizer, rng)
    record: dict[str, object] = {
        "seed": seed,
        "steps": steps,
        "tokens": steps * ROWS * LENGTH,
        "rows": ROWS,
        "length": LENGTH,
        "mixture": MIXTURE,
        "peak_learning_rate": PEAK_LEARNING_RATE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
    curve: list[dict[str, float]] = []
    started, running = time.time(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = torch.tensor([next(rows) for _ in range(ROWS)])
        output = model(input_ids=batch, labels=batch, output_router_logits=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += output.loss.item()
        if (step + 1) % 50 == 0:
            curve.append({"step": step + 1, "loss": round(running / 50, 4), "seconds": round(time.time() - started, 1)})
            print(json.dumps(curve[-1]), flush=True)
            running = 0.0
        if (step + 1) % 500 == 0 or step + 1 == steps:
            _save(
                model,
                tokenizer,
                out,
                {**record, "seconds": round(time.time() - started), "loss_curve": curve},
            )


def _save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, record: dict) -> None:
    """Writes the model in bfloat16, its tokenizer and the record; the model itself stays in float32."""
    stored = Qwen3MoeForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=4500, help="batches of 16 x 256 tokens")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
