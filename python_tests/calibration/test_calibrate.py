"""Calibration: statistics that depend on the text alone, cost only what the router chose, and stay small."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_distributed import TESTS, torchrun
from tiny_models import CONFIGS, random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.checkpoint.streaming import load_streamed
from moeprune_ext.models.experts import PairOutputs
from moeprune_ext.models.moe import find_moe_layers

LENGTHS = [24, 9, 17, 24, 5]
RAGGED = [row[None, :length] for row, length in zip(random_tokens(5), LENGTHS, strict=True)]


def padded(sequences, left, width=30, blank_rows=()):
    """One batch [B, width]: `left` is the padding before each sequence, the rest comes after; blank rows hold none."""
    ids = torch.full((len(sequences) + len(blank_rows), width), 3)
    mask = torch.zeros_like(ids)
    rows = [row for row in range(len(ids)) if row not in blank_rows]
    for row, sequence, before in zip(rows, sequences, left, strict=True):
        inside = slice(before, before + sequence.shape[1])
        ids[row, inside], mask[row, inside] = sequence[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(stats, expected, tolerance):
    assert stats.tokens == expected.tokens and stats.moments.keys() == expected.moments.keys()
    for layer, table in expected.moments.items():
        torch.testing.assert_close(stats.moments[layer], table, rtol=tolerance, atol=0)
        torch.testing.assert_close(stats.max_norm[layer], expected.max_norm[layer], rtol=tolerance, atol=0)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def family(request):
    """A model and what its unpadded sequences give, each run alone."""
    model = tiny_model(request.param)
    return model, mp.calibrate(model, RAGGED)


LEFT = [30 - length for length in LENGTHS]


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param([padded(RAGGED, LEFT)], id="left"),
        pytest.param([padded(RAGGED, [0] * 5)], id="right"),
        pytest.param([padded(RAGGED, [6, 0, 7, 3, 25])], id="a side for every row"),
        pytest.param([padded(RAGGED, LEFT, blank_rows=(0, 4))], id="rows of padding"),
        pytest.param([padded(RAGGED[:2], [3, 0]), padded([], [], blank_rows=(0, 1)), *RAGGED[2:]], id="a blank batch"),
        pytest.param([padded(RAGGED[:2], [3, 0]), torch.zeros(0, 7).long(), *RAGGED[2:]], id="no rows"),
        pytest.param([padded(RAGGED[3:], [0, 8]), padded(RAGGED[:3], LEFT[:3])], id="another order"),
    ],
)
def test_padding_and_batching_leave_the_statistics_alone(family, batches):
    model, expected = family
    assert_same(mp.calibrate(model, batches), expected, 1e-5)


def test_every_attended_token_is_counted_for_top_k_experts(family):
    model, stats = family
    assert stats.tokens == sum(LENGTHS)
    for layer, seen in stats.tokens_per_expert.items():
        assert seen.dtype == torch.int64 and int(seen.sum()) == sum(LENGTHS) * stats.shapes[layer].top_k


def test_shards_add_up_to_the_whole(family):
    model, whole = family
    assert_same(mp.calibrate(model, RAGGED[:2]) + mp.calibrate(model, RAGGED[2:]), whole, 1e-12)


def test_label_masks_are_ignored():
    model = tiny_model("olmoe")
    unlabelled = [{"input_ids": ids, "labels_mask": torch.zeros_like(ids)} for ids in RAGGED]
    assert_same(mp.calibrate(model, unlabelled), mp.calibrate(model, RAGGED), 0)


def test_padding_is_no_obstacle_to_streaming_every_layer_once(family, tmp_path):
    """Not even more of it, before the first sequence, than there are tokens on which the replay is tried."""
    model, expected = family
    model.save_pretrained(tmp_path)
    streamed = load_streamed(tmp_path, source="host")
    batches = [padded(RAGGED[:3], [70, 0, 83], width=100), padded(RAGGED[3:4], [2]), padded(RAGGED[4:], [25])]
    assert_same(mp.calibrate(streamed, batches), expected, 1e-5)
    stream = streamed.moeprune_stream
    assert stream.bytes_streamed <= 4 * sum(stream.layer_bytes.values())  # three of them to try the replay


@pytest.mark.parametrize("direct", [True, False], ids=["products here", "the module's own"])
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "deepseek_v3"])
def test_only_routed_pairs_are_computed(name, direct, monkeypatch):
    """Counted where an expert's gate is applied, once a pair; both ways compute 8 pairs to be compared at the start."""
    model = tiny_model(name)
    if not direct:
        monkeypatch.setattr(PairOutputs, "direct", False)
    computed = dict.fromkeys(find_moe_layers(model), 0)

    def count(index, inner):
        computed[index] += len(inner)
        return plain(inner)

    for index, layer in find_moe_layers(model).items():
        plain = layer.experts._apply_gate
        monkeypatch.setattr(layer.experts, "_apply_gate", lambda inner, index=index: count(index, inner))
    stats = mp.calibrate(model, [padded(RAGGED[:1], [6], blank_rows=(1, 2))])
    for index, pairs in computed.items():
        assert pairs == LENGTHS[0] * stats.shapes[index].top_k + (16 if direct else 0)


def test_moments_of_a_bfloat16_model_are_sums_over_what_it_computed(monkeypatch):
    """Against a brute force in float64 over the same outputs and gates, of magnitudes 1e-12 to 1e12."""
    model = tiny_model("qwen3_moe").bfloat16()
    layers = find_moe_layers(model)
    with torch.no_grad():
        for number, layer in enumerate(layers.values()):
            layer.experts.down_proj *= 10.0 ** (8 * number - 12)
    expected = {index: torch.zeros(8, 3, 3, dtype=torch.float64) for index in layers}
    outputs = {}
    call = PairOutputs.__call__

    def remember(self, original, hidden, rows, counts):
        outputs[id(self._experts)] = result = call(self, original, hidden, rows, counts)
        return result

    def brute_force(index, module, arguments, _):
        ids, gates = arguments[1], arguments[2]
        every = iter(outputs[id(module)].double())
        for expert in range(8):  # the pairs stand in order of expert, then of token
            for gate in gates[ids == expert].double():
                norm = next(every).square().sum().sqrt()
                powers = [gate**a * norm**b for a in range(3) for b in range(3)]
                expected[index][expert] += torch.stack(powers).view(3, 3)

    monkeypatch.setattr(PairOutputs, "__call__", remember)
    hooks = [
        layer.experts.register_forward_hook(lambda *call, index=index: brute_force(index, *call))
        for index, layer in layers.items()
    ]
    stats = mp.calibrate(model, RAGGED)
    for hook in hooks:
        hook.remove()
    largest = [float(norm.max()) for norm in stats.max_norm.values()]
    assert min(largest) < 1e-10 and max(largest) > 1e10
    for index, table in expected.items():
        torch.testing.assert_close(stats.moments[index], table, rtol=1e-6, atol=0)


def by_hand(seen, layers=1):
    """Statistics in which expert e of every layer saw seen[e] tokens."""
    moments = torch.zeros(len(seen), 3, 3, dtype=torch.float64)
    moments[:] = torch.tensor(seen, dtype=torch.float64)[:, None, None]
    return mp.RoutingStats(
        {layer: moments.clone() for layer in range(layers)},
        {layer: torch.ones(len(seen)) for layer in range(layers)},
        max(seen),
        {layer: LayerShape(len(seen), 1) for layer in range(layers)},
        "made by hand",
    )


def test_experts_that_saw_few_tokens_are_named():
    stats = by_hand([40, 31, 0, 32])
    assert stats.rarely_routed() == {0: [1, 2]}
    assert stats.rarely_routed(fewer_than=1) == {0: [2]}
    assert by_hand([40, 32]).rarely_routed() == {}, "layers without any are left out"
    assert (stats + stats).rarely_routed() == {0: [2]}


def test_statistics_of_a_30b_model_are_half_a_megabyte(tmp_path):
    stats = by_hand(list(range(128)), layers=48)
    stats.save(tmp_path / "stats.safetensors")
    assert (tmp_path / "stats.safetensors").stat().st_size < 2**19
    loaded = mp.RoutingStats.load(tmp_path / "stats.safetensors")
    assert_same(loaded, stats, 0)
    assert dataclasses.replace(loaded, moments={}, max_norm={}) == dataclasses.replace(stats, moments={}, max_norm={})


# Fewer batches that hold anything than some worlds have processes, of different sizes, padded on both sides.
CALIBRATE = f"""
import sys
sys.path[:0] = [{TESTS!r}, {str(Path(__file__).parent)!r}]
import moeprune_ext as mp
from moeprune_ext import distributed
from test_calibrate import UNEVEN
from tiny_models import tiny_model

distributed.join()
for name in sys.argv[2:]:
    stats = mp.calibrate(tiny_model(name), UNEVEN)
    if distributed.is_first():
        stats.save(f"{{sys.argv[1]}}/{{name}}.safetensors")
distributed.leave()
"""
UNEVEN = [padded(RAGGED[:3], LEFT[:3]), padded([], [], blank_rows=(0,)), padded(RAGGED[3:], [4, 25])]


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_statistics(tmp_path, threads, processes):
    threads(1)
    (tmp_path / "calibrate.py").write_text(CALIBRATE)
    names = ("gpt_oss", "mixtral")
    done = torchrun(processes, tmp_path / "calibrate.py", tmp_path, *names)
    assert done.returncode == 0, done.stderr
    for name in names:
        several = mp.RoutingStats.load(tmp_path / f"{name}.safetensors")
        assert_same(several, mp.calibrate(tiny_model(name), UNEVEN), 1e-12)
