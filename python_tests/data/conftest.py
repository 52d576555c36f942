import json

import pytest

CHAT_TEMPLATE = (  # like Qwen3's, it drops what the assistant thought from all but the last message
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user speaks first') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}</{{ m.role }}>"
    "{% if m.name is defined %}#{{ m.name }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    from moeprune_ext.demo.run import demo_folder

    return AutoTokenizer.from_pretrained(demo_folder(), local_files_only=True)


@pytest.fixture
def chat_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE)
    return tokenizer


@pytest.fixture
def lines(tmp_path):
    """lines(name, records): a .jsonl file."""

    def write(name, records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write
