"""Uneven exports in the real mlx-lm, on the CPU: transformers' tokens, and no more memory than the export.

Not among the tests that run by default: `bench/serving_other.sh DIR` makes an environment, runs these, and writes their
table (`--write-serving`).
"""

import itertools
import json
import shutil

import pytest
import torch
from serving_models import FAMILIES, MORE, NEW, PROMPTS, greedy, model_of, plan_of, prompts, save_published

import moeprune_ext as mp
from moeprune_ext.demo.run import demo_folder, load_demo

pytestmark = pytest.mark.mlx

# mlx-lm reads GPT-OSS in MXFP4 alone, and has no FlexOLMo.
ALL = [family for family in (*FAMILIES, *MORE) if family not in ("gpt_oss", "flex_olmo")]
ROWS = []  # of the table


@pytest.fixture(scope="module")
def mlx():
    core = pytest.importorskip("mlx.core")
    core.set_default_device(core.cpu)
    return core


@pytest.fixture(scope="module", autouse=True)
def table(request):
    yield
    file = request.config.getoption("--write-serving")
    if file and ROWS:
        from importlib.metadata import version

        with file.open("a") as out:
            out.write(
                f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}, CPU, float32, {PROMPTS} prompts, {NEW} tokens "
            )
            out.write(
                "each.\n\n| architecture | export | tokens equal transformers' | parameters, bytes | export, bytes |"
            )
            out.write("\n| --- | --- | ---: | ---: | ---: |\n" + "".join(f"| {' | '.join(row)} |\n" for row in ROWS))
            out.write("\n")


def source(family, folder):
    model = model_of(family)
    if family == "deepseek_v3":  # where a score and its bias are below zero, mlx-lm chooses from groups that are out
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.abs_()
    return model, save_published(model, folder)


def served(folder):
    """Tokens that mlx-lm gives, and the bytes of its parameters."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder, trust_remote_code=True)
    steps = (generate_step(mx.array(ids), model, max_tokens=NEW) for ids in prompts())
    tokens = [[int(token) for token, _ in itertools.islice(step, NEW)] for step in steps]
    return tokens, sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize("kind", ["uniform", "uneven"])
@pytest.mark.parametrize("family", ALL)
def test_it_gives_the_tokens_of_transformers(family, kind, mlx, tmp_path):
    model, folder = source(family, tmp_path / "full")
    out = mp.export(folder, plan_of(kind, model), tmp_path / "out")
    assert ("model_file" in json.loads((out / "config.json").read_text())) == (kind == "uneven")
    expected = greedy(mp.load(out, dtype=torch.float32).eval())
    tokens, size = served(out)
    equal = sum(ours == theirs for ours, theirs in zip(tokens, expected, strict=True))
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    ROWS.append([family, kind, f"{equal} of {PROMPTS}", f"{size:,}", f"{stored:,}"])
    assert equal == PROMPTS and size <= stored


@pytest.fixture(scope="module")
def uneven_demo(tmp_path_factory):
    """An uneven export of the embedded model, which has a tokenizer."""
    model, _ = load_demo()
    tokens = torch.randint(2, 2000, (8, 64), generator=torch.Generator().manual_seed(1))
    scores = mp.score_experts(mp.calibrate(model, [tokens]), "reap")
    plan = mp.PruningPlan.from_pruned_counts(scores, {0: 2, 1: 8, 2: 4, 3: 10, 4: 6, 5: 3})
    folder = shutil.copytree(demo_folder(), tmp_path_factory.mktemp("demo") / "full")
    save_published(model.float(), folder)  # MLX multiplies matrices of experts on the CPU in float32 alone
    return mp.export(folder, plan, folder.parent / "out")


def test_its_command_line_says_what_transformers_says(uneven_demo, mlx):
    from mlx_lm import generate, load

    problem = "12+34=46\n50-8=42\n7*8=56\n37+48="
    _, tokenizer = load_demo()
    ids = tokenizer(problem, return_tensors="pt")["input_ids"]
    pruned = mp.load(uneven_demo, dtype=torch.float32).eval()
    said = pruned.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    model, theirs = load(str(uneven_demo), trust_remote_code=True)
    assert generate(model, theirs, problem, max_tokens=5) == tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("options", [{}, {"quantize": True, "q_bits": 8, "q_group_size": 32}])
def test_its_conversion_keeps_the_code_and_quantises_unequal_layers(options, uneven_demo, mlx, tmp_path):
    import numpy as np
    from mlx_lm import convert, load

    convert(str(uneven_demo), str(tmp_path / "converted"), trust_remote_code=True, dtype="float32", **options)
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert (tmp_path / "converted" / config["model_file"]).read_text() == (uneven_demo / "mlx_model.py").read_text()
    assert ("quantization" in config) == bool(options)
    tokens = mlx.array([[5, 6, 7, 8, 9, 10]])
    before, after = (
        np.array(load(str(folder), trust_remote_code=True)[0](tokens))
        for folder in (uneven_demo, tmp_path / "converted")
    )
    difference = np.abs(before - after).max()
    assert difference < (0.05 * np.abs(before).max() if options else 1e-6)


def test_without_trust_and_without_the_architecture_it_says_so(uneven_demo, mlx, tmp_path):
    from mlx_lm.utils import load_model

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_model(uneven_demo)
    model = model_of("flex_olmo")
    out = mp.export(save_published(model, tmp_path / "full"), plan_of("uneven", model), tmp_path / "out")
    with pytest.raises(ValueError, match="flex_olmo not supported"):
        load_model(out, trust_remote_code=True)


def test_experts_that_are_not_there_take_no_memory(mlx, tmp_path):
    import gc

    from mlx_lm.utils import load_model

    model = model_of("olmoe")
    out = mp.export(save_published(model, tmp_path / "full"), plan_of("uneven", model), tmp_path / "out")
    gc.collect()
    before = mlx.get_active_memory()
    model, _ = load_model(out, trust_remote_code=True)
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert mlx.get_active_memory() - before < 1.05 * stored
