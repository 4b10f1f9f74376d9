"""The forward pass: token ids -> one vector or the logits of each sequence. Packed or padded, then pooled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from inferctl.serve.embedding_config import EmbeddingConfig
from inferctl.serve.engine_process.engine_protocol import PrecisionInfo, Tokens, Vectors
from inferctl.serve.engines import int8, onednn, packed, plain, weights
from inferctl.serve.engines.head import Head
from inferctl.serve.engines.pooling import Layers, pool
from inferctl.serve.task_config import TaskConfig
from inferctl.serve.tokenizer_pool import Pair

Integers: TypeAlias = npt.NDArray[np.int64]

# The fewest tokens that sequences of a batch must have in common at their start, so that these are computed once.
_MIN_SHARED = 16
# The largest share of padding in a padded sub-batch.
_MAX_PADDING = 0.15


@dataclass(frozen=True)
class Sequences:
    """The token ids of sequences, and for pairs of texts where their second segments start (see `Batch`)."""

    ids: list[Tokens]
    second_starts: list[int] | None = None

    @classmethod
    def of_pairs(cls, pairs: Iterable[Pair]) -> Sequences:
        """Return the pairs as sequences."""
        ids, starts = zip(*pairs, strict=True)
        return cls(list(ids), list(starts))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
        return [len(ids) for ids in self.ids]

    def take(self, indices: Iterable[int]) -> Sequences:
        """Return the sequences with these indices."""
        chosen, starts = list(indices), self.second_starts
        return Sequences([self.ids[i] for i in chosen], None if starts is None else [starts[i] for i in chosen])

    def token_type_ids(self) -> list[Integers]:
        """Return for each token of each sequence the number of its segment, 0 or 1."""
        starts = self.lengths if self.second_starts is None else self.second_starts
        return [(np.arange(n) >= start).astype(np.int64) for n, start in zip(self.lengths, starts, strict=True)]


class Forward:
    """The model on its device. It starts with padded attention; `pack` changes that.

    It returns vectors with an `EmbeddingConfig`, else logits.
    `batch_tokens` limits a padded sub-batch. `varlen`: packed attention uses the variable-length kernel of GPUs.
    `vocabulary_size`: rows of the input embeddings. `causal`: whether tokens attend only to those before them.
    `warning`: what makes this model slower than it should be, or None.
    """

    def __init__(
        self,
        folder: Path,
        config: TaskConfig,
        device: torch.device,
        dtype: torch.dtype,
        precision: PrecisionInfo,
        batch_tokens: int,
        *,
        varlen: bool = False,
    ) -> None:
        self.max_tokens, self.batch_tokens, self.packed = config.max_tokens, batch_tokens, False
        self._device, self._dtype, self._varlen = device, dtype, varlen
        head: Head | None = None
        if config.pooling:
            model, self._pooling = plain.load_model(folder, dtype), config.pooling
        else:  # the model of transformers has the head
            model = plain.load_model(folder, dtype, task=config.task)
            head = Head(model, device)
            self._pooling = (head.pooling,)
        self._head, self._layers = head, Layers(folder, config.layers).to(device)
        self._dimensions = config.truncate_dim if isinstance(config, EmbeddingConfig) else None
        encoder = model.base_model
        self.vocabulary_size = int(encoder.get_input_embeddings().num_embeddings)
        pooler, encoder.pooler = getattr(encoder, "pooler", None), None  # part of the head
        on_cpu, eight_bit = device.type == "cpu", precision.effective == "int8"
        native_bf16 = precision.effective == "bf16" and precision.level == "native"
        self._uses_onednn = on_cpu and (eight_bit or native_bf16)
        if eight_bit and not on_cpu:
            int8.quantize(encoder)
        self.warning = onednn.pack(encoder, int8=eight_bit) if self._uses_onednn else None
        encoder.pooler = pooler
        self._model, self._encoder = model.to(device), encoder
        embeddings = getattr(encoder, "embeddings", None)
        # RoBERTa-like models number positions from the padding index + 1.
        offset = hasattr(embeddings, "create_position_ids_from_input_ids")
        self._first_position = int(embeddings.padding_idx) + 1 if offset and embeddings is not None else 0
        padding_id = int(model.config.pad_token_id or 0)
        self._padding_id = padding_id if 0 <= padding_id < self.vocabulary_size else 0  # LLaMA has -1
        self._has_segments = plain.has_segments(model)
        self._padded_attention = plain.attention(model)
        self.causal = getattr(model.config, "is_causal", True) is not False and any(
            getattr(module, "is_causal", False) is True for module in encoder.modules()
        )

    def pack(self, on: bool = True) -> None:
        """Use packed attention, or padded attention if not `on`.

        Raises `ValueError` for what the texts of the check are too short to show: Llama 4 has chunks and PhiMoE has
        windows in the mask alone. ESM scales a text by its share of mask tokens, which moves vectors a little.
        """
        config = self._model.config.get_text_config()
        if on and (
            getattr(config, "attention_chunk_size", None)
            or getattr(config, "token_dropout", False)
            or (config.model_type == "phimoe" and config.sliding_window)
        ):
            raise ValueError(f"{config.model_type} depends on the mask or on the other texts of a row")
        packed.register()
        self._model.set_attn_implementation(packed.NAME if on else self._padded_attention)
        self.packed = on

    @torch.inference_mode()
    def __call__(self, sequences: Sequences) -> Vectors:
        """Return float32 [sequences, dimensions or labels], in the given order, computed on the calling thread."""
        order = np.argsort([-n for n in sequences.lengths], kind="stable")
        ordered = sequences.take(order)
        if self.packed:
            rows = self._run_packed(ordered)
        else:
            parts = split(ordered.lengths, self.batch_tokens)
            rows = torch.cat([self._run_padded(ordered.take(part)) for part in parts])
        rows = self._layers(rows)[:, : self._dimensions]
        out = np.empty(rows.shape, dtype=np.float32)
        out[order] = rows.cpu().numpy()
        return out

    def _run_packed(self, sequences: Sequences) -> torch.Tensor:
        shared = self._shared(sequences)
        lengths, parts = [n - shared for n in sequences.lengths], [ids[shared:] for ids in sequences.ids]
        places = [np.arange(shared, shared + n) for n in lengths]
        if shared:  # the common start is a sequence of its own
            lengths, parts, places = (
                [shared, *lengths],
                [sequences.ids[0][:shared], *parts],
                [np.arange(shared), *places],
            )
        total = sum(lengths)
        padding = np.zeros(onednn.round_up_rows(total) - total if self._uses_onednn else 0, dtype=np.int64)
        within = np.concatenate([*places, padding])
        ids = np.concatenate([*parts, padding + self._padding_id], dtype=np.int64)
        if self._first_position and (ids[:total] == self._first_position - 1).any():
            within = _places_without(ids == self._first_position - 1, within)
        inputs = {"input_ids": ids, "position_ids": within + self._first_position}
        if self._has_segments and sequences.second_starts is not None:
            inputs["token_type_ids"] = np.concatenate([*sequences.token_type_ids(), padding])
        layout = (
            packed.varlen_layout(lengths, self._device)
            if self._varlen
            else packed.layout(lengths, self._dtype, len(padding), shared=shared > 0)
        )
        on_device = {name: self._to_device(values)[None] for name, values in inputs.items()}
        hidden: torch.Tensor = self._encoder(**on_device, layout=layout).last_hidden_state[0, :total]
        rows = pool(hidden, self._to_device(np.array(lengths)), self._pooling)[1 if shared else 0 :]
        return rows if self._head is None else self._head(rows)

    def _shared(self, sequences: Sequences) -> int:
        """Return how many tokens at the start of all sequences are equal, if they can be computed once.

        No token may attend to those after it, and only the last one of each sequence may be used.
        """
        if not self.causal or self._pooling != ("last",) or self._varlen or self._has_segments or len(sequences) < 2:
            return 0
        count = min(sequences.lengths) - 1
        for ids in sequences.ids[1:]:
            differ = np.flatnonzero(ids[:count] != sequences.ids[0][:count])
            count = int(differ[0]) if len(differ) else count
        return count if count >= _MIN_SHARED else 0

    def _run_padded(self, sequences: Sequences) -> torch.Tensor:
        lengths = np.array(sequences.lengths)
        real = np.arange(lengths.max()) < lengths[:, None]
        inputs = {"input_ids": np.full(real.shape, self._padding_id), "attention_mask": real.astype(np.int64)}
        inputs["input_ids"][real] = np.concatenate(sequences.ids)
        if self._has_segments and sequences.second_starts is not None:
            inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
            inputs["token_type_ids"][real] = np.concatenate(sequences.token_type_ids())
        on_device = {name: self._to_device(values) for name, values in inputs.items()}
        outputs = self._model(**on_device)
        if self._head is not None:  # the whole model has its own head
            logits: torch.Tensor = outputs.logits.float()
            return logits
        tokens = self._to_device(np.flatnonzero(real))
        hidden: torch.Tensor = outputs.last_hidden_state.flatten(0, 1).index_select(0, tokens)
        return pool(hidden, self._to_device(lengths), self._pooling)

    def _to_device(self, values: Integers) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


class StaticForward:
    """Static embeddings: rows of a table in fp32 -> one vector per sequence. Its attributes are those of `Forward`."""

    packed, causal, warning = False, None, None

    def __init__(self, folder: Path, config: EmbeddingConfig, device: torch.device, batch_tokens: int) -> None:
        self.max_tokens, self.batch_tokens = config.max_tokens, batch_tokens
        assert config.static is not None
        self._table = weights.static_table(folder, config.static).to(device)
        self._layers, self._dimensions = Layers(folder, config.layers).to(device), config.truncate_dim
        self.vocabulary_size = len(self._table) - 1

    @torch.inference_mode()
    def __call__(self, sequences: Sequences) -> Vectors:
        """Return float32 [sequences, dimensions]."""
        ids = torch.from_numpy(np.concatenate(sequences.ids, dtype=np.int64)).to(self._table.device)
        rows = pool(self._table[ids], torch.tensor(sequences.lengths).to(ids.device), ("mean",))
        vectors: Vectors = self._layers(rows)[:, : self._dimensions].cpu().numpy()
        return vectors


AnyForward: TypeAlias = Forward | StaticForward


def _places_without(padding: npt.NDArray[np.bool_], within: Integers) -> Integers:
    """Return the places of tokens in their sequences (`within`), without padding tokens, whose place is -1.

    RoBERTa-like models number positions like this, so that a text with the padding token has it in the middle.
    """
    real = np.cumsum(~padding)
    before: Integers = (real - ~padding)[np.arange(len(within)) - within]  # of the sequence, counted at its first token
    return np.where(padding, -1, real - before - 1)


def split(lengths: list[int], batch_tokens: int) -> Iterator[range]:
    """Split sequences, sorted by falling length, into parts of little padding. Yield the indices of each part.

    A part has at most `batch_tokens` tokens, padding included, or one sequence.
    """
    first = used = 0
    for index, length in enumerate(lengths):
        area = (index + 1 - first) * lengths[first]
        if index > first and (area > batch_tokens or used + length < (1 - _MAX_PADDING) * area):
            yield range(first, index)
            first, used = index, 0
        used += length
    yield range(first, len(lengths))
