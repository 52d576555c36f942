"""GRAPE: similar experts are told apart from independent ones."""

import importlib

import pytest
import torch
from tiny_models import CONFIGS, random_tokens, rotation, tiny_model
from transformers import AutoModelForCausalLM, OlmoeConfig

import moeprune_ext as mp
from moeprune_ext.allocation.grape import expert_similarity, grape
from moeprune_ext.calibration.samples import sample_layers
from moeprune_ext.candidates.memory import peak_bytes
from moeprune_ext.checkpoint.streaming import load_streamed
from moeprune_ext.data.batches import as_batches
from moeprune_ext.models.moe import expert_tensors, find_moe_layers

module = importlib.import_module("moeprune_ext.allocation.grape")  # `moeprune_ext.grape` may be the function

FAMILIES = sorted(CONFIGS)
EVERY = 10**6  # tokens: all there are


@pytest.fixture(params=FAMILIES)
def family(request):
    return tiny_model(request.param).requires_grad_(False)


def outputs_of(layer, hidden):
    """[E, n, H], by the experts' own forward, one expert at a time."""
    ones = torch.ones(len(hidden), 1)
    experts = range(layer.shape.num_experts)
    return torch.stack([layer.experts(hidden, torch.full((len(hidden), 1), e), ones) for e in experts])


def unbiased_hsic(x, y):
    """Song et al. 2012, equation 5, of linear kernels."""
    n = len(x)
    k, m = (z @ z.T - torch.diag((z @ z.T).diagonal()) for z in (x, y))
    one = torch.ones(n, dtype=x.dtype)
    cross = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return ((k @ m).trace() + cross) / (n * (n - 3))


def direct_cka(x, y):
    x, y = x.double(), y.double()
    return unbiased_hsic(x, y) / (unbiased_hsic(x, x) * unbiased_hsic(y, y)).sqrt()


@pytest.fixture
def similarity_of(monkeypatch):
    """The similarity of experts whose outputs [8, 48, H] are given."""
    model = tiny_model("olmoe").requires_grad_(False)

    def similarity(outputs):
        monkeypatch.setattr(module, "expert_outputs", lambda layer, hidden: iter(outputs))
        return expert_similarity(model, [random_tokens(2, 24)], tokens=EVERY)[0]

    return similarity


# ---- samples


def test_a_sample_is_what_router_and_experts_are_given(family):
    layers = find_moe_layers(family)
    seen = {}
    hooks = [
        layer.experts.register_forward_hook(lambda _, given, __, i=i: seen.__setitem__(i, given[:3]))
        for i, layer in layers.items()
    ]
    family(random_tokens(), use_cache=False)
    for hook in hooks:
        hook.remove()
    samples = sample_layers(family, layers, as_batches([random_tokens()]), EVERY)
    some = sample_layers(family, layers, as_batches([random_tokens()]), 10, seed=3)
    for index, layer in layers.items():
        sample = samples[index]
        for found, expected in zip((sample.hidden, sample.expert_ids, sample.weights), seen[index], strict=True):
            assert torch.equal(found, expected)
        assert sample.router_input is sample.hidden
        rows = [int((sample.hidden == row).all(-1).nonzero()[0]) for row in some[index].hidden]
        assert len(set(rows)) == 10 and rows == sorted(rows)
        assert torch.equal(layer.router(some[index].router_input)[2], some[index].expert_ids)
    assert all(torch.equal(samples[i].hidden[rows], some[i].hidden) for i in layers), (
        "the same positions in every layer"
    )


def test_the_sample_does_not_depend_on_batching_or_padding(family):
    tokens = random_tokens(3, 20)
    padded = torch.zeros(3, 26, dtype=torch.int64)
    padded[:, 4:24] = tokens
    mask = torch.zeros(3, 26)
    mask[:, 4:24] = 1
    layers = find_moe_layers(family)
    ways = [[tokens], [tokens[:1], tokens[1:]], [{"input_ids": padded, "attention_mask": mask}]]
    found = [sample_layers(family, layers, as_batches(way), 16, seed=1) for way in ways]
    for other in found[1:]:
        for index, sample in found[0].items():
            assert len(sample.hidden) == 16
            torch.testing.assert_close(other[index].hidden, sample.hidden, rtol=1e-4, atol=1e-4)


# ---- similarity


def test_similarity_is_the_unbiased_cka_of_outputs(family):
    found = expert_similarity(family, [random_tokens()], tokens=EVERY)
    layers = find_moe_layers(family)
    assert list(found) == list(layers)
    samples = sample_layers(family, layers, as_batches([random_tokens()]), EVERY)
    for index, layer in layers.items():
        outputs, table = outputs_of(layer, samples[index].hidden), found[index]
        assert table.dtype == torch.float64 and torch.equal(table, table.T) and bool((table.diagonal() == 1).all())
        for i, j in ((0, 1), (2, 7), (5, 4)):
            assert float(table[i, j]) == pytest.approx(float(direct_cka(outputs[i], outputs[j])), abs=1e-5)


def test_independent_outputs_have_no_similarity_where_the_biased_estimator_sees_much(similarity_of):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(8, 48, 512, generator=generator)
    found = similarity_of(outputs)
    off_diagonal = found[~torch.eye(8, dtype=torch.bool)]
    assert float(off_diagonal.abs().max()) < 0.1
    x, y = (outputs[e] - outputs[e].mean(0) for e in (0, 1))
    biased = (x @ x.T * (y @ y.T)).sum() / ((x @ x.T).norm() * (y @ y.T).norm())
    assert float(biased) > 0.8


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_offset_scale_and_rotation_do_not_matter(similarity_of, scale):
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(48, 32, generator=generator)
    other = torch.randn(48, 32, generator=generator)
    copies = [one, scale * one, one @ rotation(32), one + 1000, other, scale * other, other + one, one.flip(0)]
    found = similarity_of(torch.stack(copies))
    assert float(found[0, :4].min()) > 1 - 1e-4 and float(found[4, 5]) > 1 - 1e-6
    assert 0.2 < float(found[4, 6]) < 0.9 and abs(float(found[0, 7])) < 0.2
    assert float(found[0, 4]) == pytest.approx(float(direct_cka(one, other)), abs=1e-5)


def test_dead_experts_are_alike_and_like_no_other(similarity_of):
    outputs = torch.randn(8, 48, 32, generator=torch.Generator().manual_seed(0))
    outputs[[2, 5]] = 0
    outputs[7] = torch.randn(32)  # the same for every token
    found = similarity_of(outputs)
    for dead in (2, 5, 7):
        assert [float(found[dead, e]) for e in range(8)] == [1.0 if e in (2, 5, 7) else 0.0 for e in range(8)]
    assert bool(torch.isfinite(similarity_of(torch.zeros(8, 48, 32))).all())


def test_order_of_the_data_does_not_matter_when_all_of_it_is_taken(family):
    rows = random_tokens(4, 16)
    one = expert_similarity(family, [rows], tokens=EVERY)
    other = expert_similarity(family, [rows[2:], rows[1:2], rows[:1]], tokens=EVERY)
    for layer, table in one.items():
        torch.testing.assert_close(other[layer], table, rtol=0, atol=1e-5)


def test_similarity_of_weights_is_their_cosine(family):
    layers = find_moe_layers(family)
    found = expert_similarity(family, None, similarity="weights")
    for index, layer in layers.items():
        rows = torch.cat([getattr(p.owner, p.name).flatten(1) for p in expert_tensors(layer)], 1).double()
        rows = rows / rows.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found[index], rows @ rows.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("similarity", ["cka", "weights"])
def test_the_model_is_left_as_it_was(family, similarity):
    family.train()
    before = {name: tensor.clone() for name, tensor in family.state_dict().items()}
    grape(family, [random_tokens()], dict.fromkeys(find_moe_layers(family), torch.ones(8)), 0.25, similarity=similarity)
    assert all(module.training for module in family.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in family.state_dict().items())
    assert not any("forward" in module.__dict__ for module in family.modules())


@pytest.mark.parametrize("source", ["host", "disk"])
@pytest.mark.parametrize("similarity", ["cka", "weights"])
def test_streamed_models_have_the_same_similarity(family, similarity, source, tmp_path):
    family.save_pretrained(tmp_path)
    batches = [random_tokens(), random_tokens(2, 17, seed=4)]
    expected = expert_similarity(family, batches, similarity=similarity, tokens=32)
    streamed = load_streamed(tmp_path, source=source)
    for layer, table in expert_similarity(streamed, batches, similarity=similarity, tokens=32).items():
        torch.testing.assert_close(table, expected[layer], rtol=0, atol=1e-6)
    assert streamed.moeprune_stream.peak_bytes == max(streamed.moeprune_stream.layer_bytes.values())


def test_bfloat16_models_have_nearly_the_same_similarity(family, tmp_path):
    family.save_pretrained(tmp_path)
    model = mp.load(tmp_path, dtype=torch.bfloat16)
    expected = expert_similarity(family, [random_tokens()], tokens=EVERY)
    for layer, table in expert_similarity(model, [random_tokens()], tokens=EVERY).items():
        torch.testing.assert_close(table, expected[layer], rtol=0, atol=0.1)


def test_no_tensor_holds_the_outputs_of_all_experts():
    sizes = dict(hidden_size=256, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, vocab_size=97)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OlmoeConfig(**sizes, num_experts=64, num_experts_per_tok=2)).eval()
    tokens = random_tokens(1, 48)
    peak = peak_bytes(lambda: expert_similarity(model, [tokens], tokens=48), torch.device("cpu"))
    grams, outputs = 64 * 48 * 48 * 4, 64 * 48 * 256 * 4
    assert grams <= peak < grams + outputs / 4
