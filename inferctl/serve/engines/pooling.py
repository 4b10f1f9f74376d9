"""From the states of tokens to one vector per sequence: poolings, and the layers of sentence-transformers after them.

All of it runs in fp32: 8 bits of bf16 are too few for a long sum, and the layers are small.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch

from inferctl.core.errors import UsageError
from inferctl.reading.modules import Dense, Layer, LayerNorm, PoolingMode
from inferctl.serve.engines import weights


def pool(hidden: torch.Tensor, counts: torch.Tensor, modes: Sequence[PoolingMode]) -> torch.Tensor:
    """Return fp32 [sequences, modes x width]: the pooled vectors of each mode, concatenated.

    `hidden`: the states of all sequences, concatenated ([tokens, width]). `counts`: the tokens of each sequence.
    """
    pooled = [_pool(hidden, counts, mode) for mode in modes]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)


def _pool(hidden: torch.Tensor, counts: torch.Tensor, mode: PoolingMode) -> torch.Tensor:
    if mode in ("cls", "last"):
        return hidden[counts.cumsum(0) - (counts if mode == "cls" else 1)].float()
    states = hidden.float()
    if mode == "weightedmean":
        starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts, output_size=len(states))
        places = torch.arange(1, len(states) + 1, device=states.device) - starts
        total = torch.segment_reduce(states * places[:, None], "sum", lengths=counts, unsafe=True)
        return total / (counts * (counts + 1) / 2)[:, None]
    if mode == "mean_sqrt_len":
        return torch.segment_reduce(states, "sum", lengths=counts, unsafe=True) / counts.sqrt()[:, None]
    return torch.segment_reduce(states, mode, lengths=counts, unsafe=True)


class Layers(torch.nn.Sequential):
    """The layers of a model folder after its pooling, with their weights."""

    def __init__(self, folder: Path, layers: Sequence[Layer]) -> None:
        """Raises `UsageError` for weights that are missing or of other sizes."""
        super().__init__(*(_built(folder, layer) for layer in layers))
        self.eval()


class _Dense(torch.nn.Module):
    def __init__(self, layer: Dense) -> None:
        super().__init__()
        sizes = layer.in_features, layer.out_features
        self.linear = torch.nn.Linear(*sizes, bias=layer.bias)
        self.activation = getattr(torch.nn, layer.activation)()
        if layer.residual:
            projected = sizes[0] != sizes[1]
            self.residual = torch.nn.Linear(*sizes, bias=False) if projected else torch.nn.Identity()

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.activation(self.linear(vectors))
        return result + self.residual(vectors) if hasattr(self, "residual") else result


class _Normalize(torch.nn.Module):
    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors, dim=1)


def _built(folder: Path, layer: Layer) -> torch.nn.Module:
    if not isinstance(layer, Dense | LayerNorm):
        return _Normalize()
    module: torch.nn.Module
    if isinstance(layer, Dense):
        module = _Dense(layer)
    else:
        module = torch.nn.Sequential(OrderedDict(norm=torch.nn.LayerNorm(layer.dimension)))
    stored = weights.of_module(folder, layer.folder)
    if not layer.folder:  # the folder of the model, with its other weights
        stored = {name: values for name, values in stored.items() if name.startswith("linear.")}
    own = module.state_dict()
    if {name: tensor.shape for name, tensor in stored.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise UsageError(
            f"the weights in {folder / layer.folder} are {_listed(stored)}, not {_listed(own)}",
            "the files may be incomplete or of another model: download the model again",
        )
    module.load_state_dict(stored)
    return module


def _listed(tensors: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} ({'x'.join(map(str, tensor.shape))})" for name, tensor in sorted(tensors.items()))
