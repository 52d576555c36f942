"""Exports in the real server: vLLM on the CPU gives transformers' tokens, and holds no more than the export.

Not among the tests that run by default, because vLLM needs an environment of its own: `bench/serving.sh DIR` makes one,
runs these, and writes their table (`--write-serving`) to DIR/serving.md.
"""

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import pytest
import torch
from mtp_models import with_mtp
from safetensors.torch import load_file, save_file
from serving_models import FAMILIES, KINDS, NEW, PROMPTS, greedy, model_of, plan_of, prompts

import moeprune_ext as mp
from moeprune_ext.calibration.calibrate import calibrate
from moeprune_ext.checkpoint.mtp import load_mtp
from moeprune_ext.demo.run import demo_folder, load_demo

pytestmark = pytest.mark.vllm

BY_BACKEND = ("dots1", "flex_olmo")  # vLLM has no model of its own of them, and takes transformers'
ROWS = []  # of the table


def with_drafts(folder):
    """GLM-4.5 with a multi-token-prediction layer: {kind: (folder, transformers' tokens)}."""
    with_mtp(folder, model_of("glm4_moe"))
    model = mp.load(folder / "full")
    tokens = torch.randint(2, 256, (8, 32), generator=torch.Generator().manual_seed(1))
    scores = mp.score_experts(calibrate(model, [tokens], mtp=load_mtp(folder / "full", model)))
    plans = {
        "uniform": mp.uniform_plan(scores, 0.25),
        "uneven": mp.PruningPlan.from_pruned_counts(scores, {1: 4, 2: 2}),
    }
    outs = {"full": folder / "full"} | {kind: mp.export(folder / "full", p, folder / kind) for kind, p in plans.items()}
    return {kind: (out, greedy(mp.load(out, dtype=torch.float32).eval())) for kind, out in outs.items()}


def served(folder, **options):
    """Tokens that vLLM gives, and the bytes of its parameters."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    fixed = dict(dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=16, skip_tokenizer_init=True)
    llm = None
    try:
        llm = LLM(str(folder), **fixed, **options)
        sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts()], sampling, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        (size,) = llm.apply_model(_size)
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    return tokens, size


def _size(model):
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.fixture(scope="module", autouse=True)
def in_one_process():
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for apply_model
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module")
def table(request):
    """Writes the table where --write-serving says."""
    yield ROWS
    file = request.config.getoption("--write-serving")
    if file is not None and ROWS:
        import vllm

        lines = [f"| {' | '.join(map(str, row))} |" for row in ROWS]
        header = "| architecture | export | tokens equal transformers' | parameters, bytes | export, bytes |"
        file.write_text(
            f"vLLM {vllm.__version__}, CPU, float32, {PROMPTS} prompts, {NEW} tokens each.\n\n{header}\n"
            f"| --- | --- | ---: | ---: | ---: |\n" + "\n".join(lines) + "\n"
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """{(family, kind): (model's folder, plan, export's folder, transformers' tokens)}, "full" among the kinds.

    All are made before anything is served: vLLM's Transformers backend changes transformers' classes in place.
    """
    root, made = tmp_path_factory.mktemp("models"), {}
    for family in (*FAMILIES, "deepseek_v3"):
        model, folder = model_of(family), root / family
        model.save_pretrained(folder)
        made[family, "full"] = folder, None, folder, greedy(model)
        for kind in KINDS if family in FAMILIES else KINDS[:2]:
            plan, out = plan_of(kind, model), root / f"{family}-{kind}"
            try:
                mp.export(folder, plan, out)
            except ValueError as refusal:
                made[family, kind] = folder, plan, None, str(refusal)
            else:
                made[family, kind] = folder, plan, out, greedy(mp.load(out, dtype=torch.float32).eval())
    made["drafts"] = with_drafts(root)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_server_gives_the_tokens_of_transformers(family, kind, prepared, table):
    if kind == "merged" and family == "granitemoe":
        pytest.xfail("vLLM renames this router's tensors one by one, and knows none of the map")
    _, _, out, expected = prepared[family, kind]
    if out is None:
        pytest.skip(expected)
    backend = family in BY_BACKEND and kind != "uniform"
    tokens, size = served(out, trust_remote_code=backend)
    equal = sum(ours == theirs for ours, theirs in zip(tokens, expected, strict=True))
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    named = f"{family} (by its Transformers backend)" if family in BY_BACKEND else family
    table.append([named, kind, f"{equal} of {PROMPTS}", f"{size:,}", f"{stored:,}"])
    assert equal == PROMPTS
    assert size < 1.02 * stored + 2**16


@pytest.mark.parametrize("kind", ["uniform", "uneven"])
def test_deepseek_as_the_server_has_it_with_the_experts_masked(kind, prepared, table, tmp_path):
    """On a CPU this server's DeepSeek differs from transformers' without any pruning, so it is compared with itself:
    the unpruned model, whose removed experts a bias keeps from being chosen."""
    folder, plan, out, _ = prepared["deepseek_v3", kind]
    shutil.copytree(folder, tmp_path / "masked")
    tensors = load_file(folder / "model.safetensors")
    for index, kept in plan.kept.items():
        bias = tensors[f"model.layers.{index}.mlp.gate.e_score_correction_bias"]
        bias[[expert for expert in range(len(bias)) if expert not in kept]] = -1e4
    save_file(tensors, tmp_path / "masked" / "model.safetensors", metadata={"format": "pt"})
    expected, whole = served(tmp_path / "masked")
    tokens, size = served(out)
    assert tokens == expected and size < whole
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    table.append(["deepseek_v3", kind, f"{PROMPTS} of {PROMPTS} (the masked model's)", f"{size:,}", f"{stored:,}"])


def test_its_transformers_backend_serves_uneven_exports_too(prepared):
    _, _, out, expected = prepared["qwen3_moe", "uneven"]
    tokens, size = served(out, model_impl="transformers", trust_remote_code=True)
    assert tokens == expected
    assert size < 1.02 * sum(file.stat().st_size for file in out.glob("*.safetensors")) + 2**16


@pytest.mark.parametrize("kind", ["full", *KINDS[:2]])
def test_multi_token_prediction_layers_draft(kind, prepared, table):
    """The server builds them from the configuration's one number of experts, and loads what the export holds."""
    out, expected = prepared["drafts"][kind]
    tokens, _ = served(out, speculative_config={"method": "mtp", "num_speculative_tokens": 1})
    equal = sum(ours == theirs for ours, theirs in zip(tokens, expected, strict=True))
    if kind != "full":
        table.append(["glm4_moe, drafting by its MTP layer", kind, f"{equal} of {PROMPTS}", "", ""])
    assert equal == PROMPTS


def test_a_model_that_is_not_ours_is_built_as_before(prepared, monkeypatch):
    from moeprune_ext.serving import vllm as plugin

    monkeypatch.setattr(plugin, "own_counts", lambda *args: pytest.fail("the plugin has changed counts"))
    folder, _, _, expected = prepared["qwen3_moe", "full"]
    assert served(folder)[0] == expected


# ---- the server


def answers(folder, *flags, environment=()):
    """What an OpenAI-compatible server in its own processes says to PROBLEMS."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    fixed = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "8"]
    variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **dict(environment)}
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the function
    server = subprocess.Popen([*command, *fixed, *flags], env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(300):
            if server.poll() is not None:
                log.seek(0)
                raise RuntimeError(log.read()[-4000:])
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(1)
        body = {"model": str(folder), "prompt": PROBLEMS, "max_tokens": 5, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            choices = sorted(json.load(response)["choices"], key=lambda choice: choice["index"])
        return [choice["text"] for choice in choices]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


PROBLEMS = ["12+34=46\n50-8=42\n7*8=56\n37+48=", "9*9=81\n60-21=39\n83-5=", "import os\nimport sys\n\ndef "]


@pytest.fixture(scope="module")
def uneven_demo(tmp_path_factory):
    """An uneven export of the embedded model, and what transformers says to PROBLEMS."""
    model, tokenizer = load_demo()
    tokens = torch.randint(2, 2000, (8, 64), generator=torch.Generator().manual_seed(1))
    scores = mp.score_experts(mp.calibrate(model, [tokens]), "reap")
    plan = mp.PruningPlan.from_pruned_counts(scores, {0: 2, 1: 8, 2: 4, 3: 10, 4: 6, 5: 3})
    out = mp.export(demo_folder(), plan, tmp_path_factory.mktemp("demo") / "out")
    pruned = mp.load(out, dtype=torch.float32).eval()
    said = []
    for problem in PROBLEMS:
        ids = tokenizer(problem, return_tensors="pt")["input_ids"]
        new = pruned.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        said.append(tokenizer.decode(new, skip_special_tokens=True))
    return out, said


def test_the_openai_server_answers_with_the_entry_point_alone(uneven_demo):
    out, said = uneven_demo
    assert answers(out) == said


@pytest.mark.parametrize("flags", [("--tensor-parallel-size", "2"), ("--no-enforce-eager",)])
def test_the_openai_server_answers_over_two_devices_and_compiled(uneven_demo, flags):
    """Two processes on two cores stand for two devices; the second one has no eager mode, so torch.compile runs."""
    out, said = uneven_demo
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1" if "--tensor-parallel-size" in flags else "0", "OMP_NUM_THREADS": "1"}
    assert answers(out, *flags, environment=cores.items()) == said


def test_without_the_plugin_its_transformers_backend_serves_uneven_exports(uneven_demo):
    out, said = uneven_demo
    without = {"VLLM_PLUGINS": "none"}.items()
    assert answers(out, "--model-impl", "transformers", "--trust-remote-code", environment=without) == said
    with pytest.raises(RuntimeError):
        answers(out, environment=without)
