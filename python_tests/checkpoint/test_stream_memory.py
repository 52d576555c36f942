"""Which weights of a streamed model are where, how often they are brought in, and the memory that this takes."""

import contextlib
import gc
import os
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONFIGS, logits_of, random_tokens
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3MoeForCausalLM

import moeprune_ext as mp
from moeprune_ext.checkpoint import streaming
from moeprune_ext.checkpoint.streaming import load_streamed
from moeprune_ext.models.layers import router_tensors
from moeprune_ext.models.moe import find_moe_layers

LAYERS = 4
SOURCES = ("host", "disk")


def weights_of_layer(model, layer):
    return dict(model.model.layers[layer].state_dict())


def on_device(model):
    """{layer: its tensors that are there}, without the routers', which always are."""
    present = {}
    routers = {id(getattr(t.owner, t.name)) for la in find_moe_layers(model).values() for t in router_tensors(la)}
    for index, layer in enumerate(model.model.layers):
        tensors = [t for t in layer.state_dict(keep_vars=True).values() if not t.is_meta and id(t) not in routers]
        if tensors:
            present[index] = tensors
    return present


@pytest.mark.parametrize("source", SOURCES)
def test_one_layer_is_resident_on_a_cpu(family, source):
    model, folder = family
    streamed = load_streamed(folder / "file", source=source)
    stream = streamed.moeprune_stream
    assert stream.resident_bytes == 0 and not on_device(streamed)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    for index in range(LAYERS):
        stream.make_resident(index)
        assert list(on_device(streamed)) == [index]
        assert stream.layer_bytes[index] == sum(tensor.nbytes for tensor in on_device(streamed)[index])
        assert {name: (t.shape, t.dtype) for name, t in streamed.state_dict().items()} == shapes
    logits_of(streamed)
    assert list(on_device(streamed)) == [LAYERS - 1]
    assert stream.peak_bytes == max(stream.layer_bytes.values())
    assert stream.resident_bytes == stream.layer_bytes[LAYERS - 1]
    assert stream.device == torch.device("cpu")


@pytest.mark.parametrize("source", SOURCES)
def test_a_dropped_layers_weights_are_freed(olmoe, source):
    streamed = load_streamed(olmoe[1], source=source)
    streamed.moeprune_stream.make_resident(1)
    held = [weakref.ref(tensor) for tensor in on_device(streamed)[1]]
    streamed.moeprune_stream.make_resident(2)
    gc.disable()  # freed by counting references, not when the collector happens to come by
    try:
        assert held and all(tensor() is None for tensor in held)
        parts = (streamed, streamed.lm_head, streamed.model.layers[0].mlp, streamed.moeprune_stream)
        alive = [weakref.ref(part) for part in parts]
        del streamed, parts
        assert [part() for part in alive] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize("source", SOURCES)
def test_layers_may_be_called_in_any_order_and_many_times(olmoe, source):
    model, folder = olmoe
    streamed = load_streamed(folder, source=source)
    stream = streamed.moeprune_stream
    for layer in (3, 3, 0, 2, 1, 2, 3, 0):
        stream.make_resident(layer)
        visits = stream.bytes_streamed
        stream.make_resident(layer)
        assert stream.bytes_streamed == visits
        for name, tensor in weights_of_layer(model, layer).items():
            assert torch.equal(weights_of_layer(streamed, layer)[name], tensor)
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    rotary = model.model.rotary_emb(hidden, torch.arange(5)[None])
    for layer in (1, 1, 2):
        with torch.no_grad():
            ours, theirs = (
                m.model.layers[layer](hidden, position_embeddings=rotary, attention_mask=None)
                for m in (streamed, model)
            )
        assert torch.equal(ours, theirs)


def test_bytes_are_counted_by_visit(olmoe):
    streamed = load_streamed(olmoe[1], source="disk")
    stream = streamed.moeprune_stream
    whole = sum(stream.layer_bytes.values())
    for forwards in (1, 2):
        logits_of(streamed)
        assert stream.bytes_streamed == forwards * whole


@pytest.mark.parametrize("source", SOURCES)
def test_calibration_and_search_visit_every_layer_once_a_pass(family, source):
    """Not once a batch, a sequence or a candidate; and what they find is what the ordinary model gives."""
    model, folder = family
    streamed = load_streamed(folder / "file", source=source)
    stream = streamed.moeprune_stream
    whole = sum(stream.layer_bytes.values())
    batches = [random_tokens(2, 20, seed) for seed in range(6)]
    stats = mp.calibrate(streamed, batches)
    assert stream.bytes_streamed <= 4 * whole  # one pass, after three over a few tokens that compare replay and forward
    expected = mp.calibrate(model, batches)
    for layer, table in stats.moments.items():
        assert torch.allclose(table, expected.moments[layer], rtol=1e-5)
    evaluator = mp.CandidateEvaluator(streamed, batches)
    assert evaluator.method.startswith("layer sweep")
    scores = mp.score_experts(stats)
    quantum = scores.n_group
    plans = [mp.PruningPlan.from_pruned_counts(scores, {list(scores)[-1]: quantum * n}) for n in range(1, 3)]
    before = stream.bytes_streamed
    found = evaluator.evaluate(plans)
    assert stream.bytes_streamed - before <= whole
    ordinary = mp.CandidateEvaluator(model, batches).evaluate(plans)
    assert [s.esap for s in found] == pytest.approx([s.esap for s in ordinary], abs=1e-6)
    assert stream.peak_bytes == max(stream.layer_bytes.values())


def test_weights_that_layers_share_stay_on_the_device(tmp_path, monkeypatch):
    first, second = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 2))
    tied = {"lm_head.weight": "model.embed_tokens.weight", second: first}
    monkeypatch.setattr(Qwen3MoeForCausalLM, "_tied_weights_keys", tied)
    config = CONFIGS["qwen3_moe"]()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    assert second not in load_file(tmp_path / "model.safetensors")
    streamed = load_streamed(tmp_path, source="disk")
    assert streamed.get_parameter(first) is streamed.get_parameter(second)
    assert torch.equal(logits_of(streamed), logits_of(model))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("source", SOURCES)
def test_no_shard_stays_mapped(family, source):
    _, folder = family
    streamed = load_streamed(folder / "shards", source=source)
    logits_of(streamed)
    assert str(folder / "shards") not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("source", SOURCES)
def test_two_layers_are_in_a_gpus_buffers(family, source, monkeypatch, threads):
    """The way over page-locked pieces, a thread and two buffers, with CUDA's own calls left out."""
    threads(1)  # two OpenMP teams on the same cores wait for each other
    model, folder = family
    stand_in = types.SimpleNamespace(
        record=lambda *_: None, synchronize=lambda: None, wait_event=lambda _: None, type="cuda"
    )
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stand_in)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr("moeprune_ext.checkpoint.buffers.PIECE", 1024)
    buffers, layer_stream = streaming.TwoBuffers, streaming.LayerStream
    monkeypatch.setattr(streaming, "TwoBuffers", lambda _, layers: buffers(torch.device("cpu"), layers))
    monkeypatch.setattr(streaming, "LayerStream", lambda m, reader, _, where: layer_stream(m, reader, stand_in, where))
    streamed = load_streamed(folder / "shards", source=source)
    stream = streamed.moeprune_stream
    sizes = list(stream.layer_bytes.values())
    logits_of(streamed)
    assert stream.bytes_streamed == sum(sizes) + sizes[0]  # the first layer again, for another batch
    assert stream.resident_bytes == sizes[-1] + sizes[0]
    for layer in (None, 2, 0, 3, 1, 1):
        if layer is not None:
            stream.make_resident(layer)
            assert list(on_device(streamed)) == [layer]
        torch.testing.assert_close(logits_of(streamed), logits_of(model), rtol=0, atol=1e-5)
    assert stream.peak_bytes == max(sizes[i] + sizes[(i + 1) % LAYERS] for i in range(LAYERS))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("source", SOURCES)
def test_a_gpu_holds_two_layers_and_computes_the_same(source, tmp_path):
    config = CONFIGS["qwen3_moe"]()
    config.update(dict(hidden_size=512, moe_intermediate_size=1024, num_hidden_layers=12))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokens = random_tokens(1, 4).cuda()  # few: some kernels gather the weights of every routed pair
    expected = logits_of(mp.load(tmp_path).cuda(), tokens)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    streamed = load_streamed(tmp_path, device="cuda", source=source)
    for _ in range(5):  # the host runs ahead of the GPU
        torch.testing.assert_close(logits_of(streamed, tokens), expected, rtol=1e-4, atol=1e-4)
    layer = max(streamed.moeprune_stream.layer_bytes.values())
    assert torch.cuda.max_memory_allocated() - before < 4 * layer


SEARCHED = """
import torch
import moeprune_ext as mp

def searched(model):
    batches = [torch.arange(2, 42)[None] * seed % 90 for seed in (1, 3, 7)]
    scores = mp.score_experts(mp.calibrate(model, batches))
    evaluator = mp.CandidateEvaluator(model, batches, memory_budget=24 << 20)
    result = mp.evolve(evaluator, scores, 0.5, population=6, generations=2, elites=2)
    return result.score, sum(result.plan.kept[0])
"""
exec(SEARCHED)
searched = globals()["searched"]

UNDER_A_LIMIT = (
    SEARCHED
    + """
import resource, sys, torch
from transformers import AutoModelForCausalLM, OlmoeForCausalLM
import moeprune_ext.checkpoint.streaming
how, folder, spare = sys.argv[1], sys.argv[2], int(sys.argv[3])
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + spare, used + spare))
try:
    torch.empty(2 * spare, dtype=torch.uint8)
    sys.exit("no limit")
except RuntimeError:
    pass
if how == "plain":
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (MemoryError, RuntimeError) as error:
        print("failed:", error)
else:
    model = moeprune_ext.checkpoint.streaming.load_streamed(folder, source="disk")
    with torch.no_grad():
        print("norm", model(torch.arange(2, 8)[None], use_cache=False).logits.double().norm().item())
    print("found", *searched(model))
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
def test_a_model_larger_than_memory_runs_from_disk(tmp_path):
    config = OlmoeConfig(
        **(CONFIGS["olmoe"]().to_dict() | dict(hidden_size=512, intermediate_size=512, num_hidden_layers=14))
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    size = sum(p.nbytes for p in model.parameters())
    assert size > 350e6
    model.save_pretrained(tmp_path / "model", max_shard_size="20MB")
    expected = logits_of(model, torch.arange(2, 8)[None]).double().norm().item()
    plan = searched(model)

    def run(how):
        command = [sys.executable, "-c", UNDER_A_LIMIT, how, str(tmp_path / "model"), str(200 << 20)]
        # freed memory goes back at once, whatever glibc has learnt from the sizes before
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    plain = run("plain")
    if "no limit" in plain.stderr:
        pytest.skip("this system does not enforce RLIMIT_DATA")
    assert plain.returncode == 0 and "failed:" in plain.stdout, plain.stderr[-500:]
    streamed = run("streamed")
    assert streamed.returncode == 0, streamed.stderr[-500:]
    _, norm, _, score, kept = streamed.stdout.split()
    assert float(norm) == pytest.approx(expected, rel=1e-4)
    assert (float(score), int(kept)) == (pytest.approx(plan[0], abs=1e-5), plan[1])
