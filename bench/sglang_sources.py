"""Builds uneven exports with SGLang's own model classes and loads their weights, on a machine without a GPU.

    python bench/sglang_sources.py EXPORT [attention backend]

Nothing is computed. SGLang's kernels cannot be imported here, so modules of these names are stand-ins; the plugin's
hooks, `make_layers`, the model classes and the weight loaders are SGLang's own. Wanted: the sources of SGLang 0.5.23 on
PYTHONPATH, torch, transformers, moeprune_ext, and what these import besides (orjson, ipython, pybase64, requests,
pillow, starlette, msgspec, pyzmq, aiohttp, sentencepiece, triton, gguf, einops, openai, partial-json-parser, and
torchvision's metadata).
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path

NAMES = (
    *("torchvision", "torchaudio", "torchcodec", "decord", "soundfile", "av"),
    *("sgl_kernel", "sgl_deep_ep", "flashinfer", "deep_gemm", "flash_attn", "quack", "tilelang", "cutlass", "humming"),
    *("cuda", "tvm_ffi"),
)


class _Anything(type):
    """A class whose attributes and calls give further stand-ins; as a decorator it changes nothing."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()


class StandIn(metaclass=_Anything):
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()


class Module(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (StandIn,), {}) if name[:1].isupper() else StandIn()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        found = name.split(".")[0] in NAMES
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass


def build(folder, backend):
    """Returns SGLang's model of an export, with its weights."""
    import torch
    from sglang.srt import runtime_context
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.model_loader import loader
    from sglang.srt.server_args import ServerArgs

    fixed = dict(device="cpu", dtype="float32", skip_tokenizer_init=True, disable_cuda_graph=True)
    args = ServerArgs(model_path=str(folder), trust_remote_code=True, attention_backend=backend, **fixed)
    runtime_context.publish(args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0))
    config = ModelConfig.from_server_args(args)
    address = "tcp://127.0.0.1:29517"
    parallel_state.init_distributed_environment(1, 0, address, local_rank=0, backend="gloo")
    parallel_state.initialize_model_parallel(backend="gloo")
    initialize_dp_attention(args)
    torch.set_default_dtype(torch.float32)
    model = loader._initialize_model(config, LoadConfig())
    model.load_weights(loader.get_model_loader(LoadConfig(), config)._get_all_weights(config, model))
    return model


def compare(model, folder):
    """Asserts that every layer has exactly the export's experts; returns how many each has."""
    import torch
    from safetensors.torch import load_file

    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    counts = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(".w13_weight"):
            continue
        layer = int(name.split(".")[2])
        mine = {key: tensor for key, tensor in stored.items() if f"layers.{layer}." in key and ".experts." in key}
        whole = next((tensor for key, tensor in mine.items() if key.endswith("gate_up_proj")), None)
        if whole is not None:
            assert parameter.shape[0] == whole.shape[0], name  # rows are in another order
            counts[layer] = parameter.shape[0]
            continue
        gate = next(key for key in mine if ".experts.0." in key and ("gate_proj" in key or ".w1." in key))
        up = gate.replace("gate_proj", "up_proj").replace(".w1.", ".w3.")
        counts[layer] = len({key.split(".experts.")[1].split(".")[0] for key in mine})
        assert parameter.shape[0] == counts[layer], name
        for expert, weights in enumerate(parameter):
            both = [mine[key.replace(".experts.0.", f".experts.{expert}.")] for key in (gate, up)]
            assert torch.equal(weights, torch.cat(both)), (name, expert)
    return counts


def main():
    folder = Path(sys.argv[1])
    backend = sys.argv[2] if len(sys.argv) > 2 else "torch_native"
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    sys.meta_path.insert(0, Finder())
    from sglang.srt.plugins.hook_registry import HookRegistry

    from moeprune_ext.serving import sglang as plugin

    plugin.register()
    HookRegistry.apply_hooks()
    print(f"{folder.name}: experts of each layer as stored, {compare(build(folder, backend), folder)}")


if __name__ == "__main__":
    main()
