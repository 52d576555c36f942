"""Models larger than the device: a decoder layer's weights visit it while that layer is called.

Embeddings, final norm, head, rotary tables and every layer's router stay on the device, so masks, fingerprints and
router checks need nothing of this file. The rest of a decoder layer is meta tensors, except while the layer is
resident: its forward drops the layer before it and brings its own weights in from host memory or from the shards. On a
GPU the next layer is fetched meanwhile, so at most two layers are there; on a CPU, where fetching would take the cores
that compute, it is one. Stored tensors become parameters by transformers' own rules for the model, applied to one layer
at a time.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from moeprune_ext.checkpoint.buffers import TwoBuffers, page_locked
from moeprune_ext.checkpoint.quantised import (
    as_numbers,
    check_scales,
    is_dequantised,
    quantisation,
    with_exact_numbers,
)
from moeprune_ext.checkpoint.read import (
    Folder,
    find_shards,
    from_pretrained,
    read_config,
    read_hf_config,
    recorded,
    refuse,
    renaming,
    skeleton,
    stored_tensors,
)
from moeprune_ext.checkpoint.unread import Unread
from moeprune_ext.modeling import model_class
from moeprune_ext.models.layers import router_tensors
from moeprune_ext.models.moe import MoeModel, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SOURCES = ("host", "disk")


def load_streamed(
    folder: Folder,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    source: str = "host",
) -> PreTrainedModel:
    """Loads a model directory, or an export, as a model whose decoder layers visit `device` one after the other.

    The model is for inference only, and cannot be copied or pruned in place.

    Args:
        folder: with safetensors weights.
        device: "cpu" or a GPU.
        dtype: "auto" (as stored) or a floating torch dtype.
        source: where layers wait. "host": CPU memory, page-locked for a GPU; loading needs the model's size plus a
            layer. "disk": the directory itself, read again at every visit; the host needs about two layers beside what
            stays on the device.

    Returns:
        The model, whose LayerStream is its attribute `moeprune_stream`.

    Raises:
        ValueError: for bad arguments, a directory without safetensors weights, a shard that is missing or damaged,
            weights that are missing or do not fit, and weights quantised in a way that is not known.
    """
    device = _checked(device, dtype, source)
    folder = Path(folder)
    config = read_config(folder)
    quantised = quantisation(config)
    if quantised is not None and not is_dequantised(config):
        raise ValueError(
            f"{folder} holds weights quantised by {quantised.get('quant_method')}, which transformers cannot "
            "dequantise while they are read; load it unstreamed, or save a dequantised copy and stream that"
        )
    reader = _LayerReader(folder, config)
    base: Any = type(reader.skeleton)

    def _load_pretrained_model(model: Any, _: Any, files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        state_dict = reader.state_dict(with_exact_numbers(load_config.weight_mapping))
        return base._load_pretrained_model(model, state_dict, files, load_config, *args, **kwargs)

    loader = model_class(base, recorded(config), _load_pretrained_model=staticmethod(_load_pretrained_model))
    model, problems = from_pretrained(loader, folder, config=reader.hf_config, dtype=dtype)
    model.__class__ = base
    reader.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_meta}
    refuse(folder, problems + sorted(reader.dtypes.keys() - reader.streamed.keys()))
    reader.give_dtypes()
    model.requires_grad_(False)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    model.moeprune_stream = LayerStream(model, reader, device, source)
    return model


def _checked(device: str | torch.device, dtype: str | torch.dtype, source: str) -> torch.device:
    """Returns the device, a GPU with its number; raises ValueError for arguments of `load_streamed` that cannot be."""
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be 'auto' or a floating torch dtype such as torch.bfloat16, got {dtype!r}")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}") from None
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if device.type != "cuda" or (device.index or 0) >= count:
        raise ValueError(f"layers can be streamed to 'cpu' or one of the {count} GPUs that torch sees, not to {device}")
    # With its number, because which GPU is the current one differs between threads.
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


class _LayerReader:
    """Reads the parameters of one decoder layer from the shards, as transformers would load them.

    Attributes:
        skeleton: the model on the meta device.
        hf_config: the configuration to load the model with.
        is_quantised: whether stored tensors are to be dequantised.
        streamed: {parameter that may leave the device: its decoder layer}.
        dtypes: {parameter that does leave it: its dtype}; to be set when the model is loaded.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.dtypes: dict[str, torch.dtype] = {}
        # {layer: {parameter: (converter, [(its pattern, stored name)])}}; one that makes several is under the first
        self._recipes: dict[int, dict[str, tuple[Any, list[tuple[str | None, str]]]]] = {}
        self._folder, self._shards = folder, find_shards(folder)
        self.hf_config = read_hf_config(folder)
        self.skeleton = skeleton(self.hf_config, config)
        if type(self.skeleton.config) is not type(self.hf_config):  # of a model of text and more, the language model
            self.hf_config = self.hf_config.get_text_config()
        self.is_quantised = quantisation(config) is not None
        if self.is_quantised:
            self.hf_config = as_numbers(self.hf_config, config)
        moe = MoeModel.of(self.skeleton)
        path, _ = decoder_layers(moe)
        tied = self.skeleton.all_tied_weights_keys
        stay = {*tied.keys(), *tied.values()}
        for layer in moe.layers.values():
            stay |= {f"{layer.name}.{layer.router_name}.{name}" for name in layer.router.state_dict()}
            stay |= {f"{layer.name}.{tensor.path}" for tensor in router_tensors(layer)}
        numbers = {name: re.match(rf"{re.escape(path)}\.(\d+)\.", name) for name in self.skeleton.state_dict()}
        self.streamed = {name: int(match[1]) for name, match in numbers.items() if match and name not in stay}

    def state_dict(self, weight_mapping: list[Any] | None) -> dict[str, Any]:
        """Reads the stored tensors that stay on the device, and notes how the others become parameters.

        Args:
            weight_mapping: transformers' conversions for this model.

        Returns:
            {stored name: tensor, or Unread}.
        """
        from transformers.core_model_loading import dot_natural_key

        rename, parameters = renaming(self.skeleton, weight_mapping or []), self.skeleton.state_dict()
        stay, unread = set(), []
        for name in sorted((name for names in self._shards.values() for name in names), key=dot_natural_key):
            target, converted = rename(name)
            pattern, converter = converted or (None, None)
            if target in self.streamed:
                recipes = self._recipes.setdefault(self.streamed[target], {})
                recipes.setdefault(target, (converter, []))[1].append((pattern, name))
            elif target in parameters:
                stay.add(name)
            else:
                unread.append(name)
        check_scales(self._folder, unread, self.skeleton)
        state = {
            name: stored[...].clone() if name in stay else Unread(stored.get_shape())  # a copy: no shard stays mapped
            for name, stored in stored_tensors(self._shards)
            if name in stay or not self.is_quantised
        }
        if self.is_quantised:  # a tensor without numbers cannot be dequantised: what it becomes stands for it
            state |= {name: Unread(list(parameters[name].shape)) for name in self.streamed}
        return state

    def give_dtypes(self) -> None:
        """Gives the skeleton's parameters the loaded model's dtypes, which dequantising asks for."""
        for name, tensor in self.skeleton.state_dict(keep_vars=True).items():
            if name in self.dtypes:
                tensor.data = tensor.data.to(self.dtypes[name])

    def stored(self, layer: int) -> dict[str, Tensor]:
        """Reads what is stored of a layer's streamed parameters, {stored name: tensor}; it may be a map of the file."""
        wanted = {name for _, sources in self._recipes.get(layer, {}).values() for _, name in sources}
        return {name: tensor[...] for name, tensor in stored_tensors(self._shards, wanted)}

    def read(self, layer: int) -> dict[str, Tensor]:
        """Reads a layer's streamed parameters, {name: tensor}, into CPU memory of their own."""
        return self.parameters(layer, self.stored(layer))

    @torch.no_grad()
    def parameters(self, layer: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Makes a layer's streamed parameters, {name: tensor}, of what is stored of them."""
        stored = dict(stored)
        mapped = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
        parameters: dict[str, Tensor] = {}
        for target, (converter, sources) in self._recipes.get(layer, {}).items():
            dtype = self.dtypes[target]
            if converter is None:
                parameters[target] = stored.pop(sources[0][1]).to(dtype)
                continue
            converter = copy.deepcopy(converter)  # it collects tensors
            for pattern, name in sources:
                tensor = stored.pop(name)
                converter.add_tensor(target, name, pattern, tensor if self.is_quantised else tensor.to(dtype))
            try:
                results = converter.convert(target, model=self.skeleton, config=self.skeleton.config)
            except (KeyError, RuntimeError, ValueError) as error:
                raise ValueError(f"{self._folder}: {target} cannot be made of what is stored: {error}") from error
            made = {name: value[0] if isinstance(value, list) else value for name, value in results.items()}
            parameters |= made
        if self.is_quantised:  # which loading the model could not look into
            expected = {name: self.skeleton.state_dict()[name] for name in self.dtypes if self.streamed[name] == layer}
            made_shapes = {name: tensor.shape for name, tensor in parameters.items()}
            refuse(self._folder, [name for name, meta in expected.items() if made_shapes.get(name) != meta.shape])
        # What no rule has changed is still a map of its file: kernels that use it would read from the disk.
        for name, tensor in parameters.items():
            if tensor.untyped_storage().data_ptr() in mapped:
                parameters[name] = tensor.clone()
        return parameters


class LayerStream:
    """Keeps the decoder layer of a streamed model that was called last resident; on a GPU, also fetches the next.

    Attributes:
        device: where layers visit.
        layer_bytes: {layer: bytes of its streamed weights}.
        peak_bytes: the highest `resident_bytes` so far.
        bytes_streamed: of all visits.
    """

    def __init__(self, model: nn.Module, reader: _LayerReader, device: torch.device, source: str) -> None:
        self.device = device
        self.bytes_streamed = 0
        self.peak_bytes = 0
        _, layers = decoder_layers(MoeModel.of(model))
        # What modules hold while their layer is away: meta tensors, with the weights' shapes and dtypes.
        self._placeholders: list[dict[str, Tensor]] = [{} for _ in layers]
        self._owners: dict[str, nn.Module] = {}  # {streamed parameter: the module that holds it}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in reader.dtypes:
                self._placeholders[reader.streamed[name]][name] = tensor
                self._owners[name] = model.get_submodule(name.rpartition(".")[0])
        self.layer_bytes = {i: sum(t.nbytes for t in tensors.values()) for i, tensors in enumerate(self._placeholders)}
        self._gpu = TwoBuffers(device, self._placeholders) if device.type == "cuda" else None
        self._read: Callable[[int], Mapping[str, Any]] = reader.read
        if source == "host" and reader.is_quantised:  # as they are stored, which takes less
            stored = [{name: t.clone() for name, t in reader.stored(layer).items()} for layer in self.layer_bytes]
            self._read = lambda layer: reader.parameters(layer, stored[layer])
        elif source == "host":
            keep: Callable[[Tensor], Any] = page_locked if self._gpu is not None else lambda tensor: tensor
            host = [{name: keep(tensor) for name, tensor in reader.read(layer).items()} for layer in self.layer_bytes]
            self._read = host.__getitem__
        self._thread = None if self._gpu is None else ThreadPoolExecutor(1, "moeprune-stream")
        self._resident: int | None = None
        self._fetched: tuple[int, Callable[[], dict[str, Tensor]]] | None = None
        for index, module in enumerate(layers):
            # Not a hook: replay.py replaces the forward of a layer that it passes over, which must bring in nothing.
            # With a weak reference, or a layer would keep itself alive.
            module.forward = partial(self._visit, index, weakref.ref(module))

    def _visit(self, layer: int, reference: weakref.ref[nn.Module], *args: Any, **kwargs: Any) -> Any:
        """Runs a layer's forward; `reference` is to its module."""
        self.make_resident(layer)
        module: Any = reference()
        return type(module).forward(module, *args, **kwargs)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the layers on the device now, the one being fetched included."""
        layers = {self._resident, self._fetched[0] if self._fetched else None}
        return sum(self.layer_bytes[layer] for layer in layers if layer is not None)

    def make_resident(self, layer: int) -> None:
        """Brings a decoder layer's weights to the device, and drops the others.

        A layer's forward begins with this; it is public for touching weights outside of forward.

        Raises:
            ValueError: when a shard has gone, or when weights were replaced by others of another shape.
        """
        if layer == self._resident:
            return
        before, self._resident = self._resident, None
        if before is not None:
            if self._gpu is not None:
                self._gpu.release()
            self._install(self._placeholders[before])
        fetched, self._fetched = self._fetched, None
        if fetched is None or fetched[0] != layer:
            fetched = self._fetch(layer)  # on a GPU after what the thread may be fetching now, which is dropped
        tensors = fetched[1]()
        if self._gpu is not None:
            self._gpu.take()
        self._install(tensors)
        self._resident = layer
        if self._thread is not None and len(self._placeholders) > 1:
            # After the last layer the first, for another batch.
            self._fetched = self._fetch((layer + 1) % len(self._placeholders))
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def _fetch(self, layer: int) -> tuple[int, Callable[[], dict[str, Tensor]]]:
        """Begins to bring a layer in, where there is a thread; returns the layer, and what waits for its tensors."""
        self.bytes_streamed += self.layer_bytes[layer]
        if self._thread is None:
            return layer, partial(self._bring, layer)
        return layer, self._thread.submit(self._bring, layer).result

    def _bring(self, layer: int) -> dict[str, Tensor]:
        """Returns a layer's weights on the device, parameters and buffers."""
        tensors, placeholders = self._read(layer), self._placeholders[layer]
        if self._gpu is not None:
            tensors = self._gpu.fill(tensors, placeholders)
        return {
            name: nn.Parameter(tensor, requires_grad=False) if isinstance(placeholders[name], nn.Parameter) else tensor
            for name, tensor in tensors.items()
        }

    def _install(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes the modules hold these tensors."""
        for name, tensor in tensors.items():
            owner, leaf = self._owners[name], name.rpartition(".")[2]
            if (shape := getattr(owner, leaf).shape) != tensor.shape:
                raise ValueError(
                    f"{name} was loaded as {list(tensor.shape)} and is {list(shape)} now; a streamed model cannot be "
                    "pruned in place: export the plan and load the export"
                )
            setattr(owner, leaf, tensor)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise ValueError("a streamed model cannot be copied, because its weights come and go; load it again")
