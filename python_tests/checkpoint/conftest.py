"""Checkpoints of tiny models, for the tests of streaming."""

import pytest
from tiny_models import CONFIGS, tiny_model


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def family(request, tmp_path_factory):
    """A model, and its checkpoint: in one file, and in shards so small that every layer spans several."""
    model = tiny_model(request.param).requires_grad_(False)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "file")
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2 * model.config.num_hidden_layers
    return model, folder


@pytest.fixture
def olmoe(tmp_path):
    model = tiny_model("olmoe").requires_grad_(False)
    model.save_pretrained(tmp_path / "olmoe", max_shard_size="20KB")
    return model, tmp_path / "olmoe"
