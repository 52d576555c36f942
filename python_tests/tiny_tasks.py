"""Tasks of which a tiny random model has some answers right: its own."""

import torch

from moeprune_ext.data.tasks import Example, Task


def greedy(model, prompt, count):
    tokens = torch.tensor([prompt])
    for _ in range(count):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tuple(tokens[0, len(prompt) :].tolist())


def make_task(model, count=16, seed=5):
    """Answers of the full model's to reproduce, and choices among which its own is one."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return tuple(torch.randint(2, 90, (length,), generator=generator).tolist())

    examples = []
    for number in range(count):
        prompt = ids(4 + number % 3)
        right = greedy(model, prompt, 1 + number % 2)
        options = (ids(2), right, ids(3))
        examples.append(Example(prompt, options, 1) if number % 2 else Example(prompt, (right,), None))
    return Task("own answers", tuple(examples))
