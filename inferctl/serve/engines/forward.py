"""The forward pass: token ids -> one vector, the outputs or the logits of each sequence. Packed or padded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.outputs import Form, attended_of, form_of
from inferctl.reading.outputs import pack as pack_outputs
from inferctl.reading.rows import Rows, Tokens, Vectors, join_rows
from inferctl.reading.task_config import TaskConfig
from inferctl.serve.engine_process.engine_protocol import PrecisionInfo
from inferctl.serve.engines import int8, onednn, packed, plain, weights
from inferctl.serve.engines.head import Head, MaskedLanguageHead
from inferctl.serve.engines.output_heads import OutputHeads
from inferctl.serve.engines.pooling import Layers, pool
from inferctl.serve.text.text_parts import Pair

Integers: TypeAlias = npt.NDArray[np.int64]

# The fewest tokens that sequences of a batch must have in common at their start, so that these are computed once.
_MIN_SHARED = 16
# The largest share of padding in a padded sub-batch.
_MAX_PADDING = 0.15


@dataclass(frozen=True)
class Sequences:
    """The token ids of sequences, and their marks (see `Batch`)."""

    ids: list[Tokens]
    marks: list[int] | None = None

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
        chosen, marks = list(indices), self.marks
        return Sequences([self.ids[i] for i in chosen], None if marks is None else [marks[i] for i in chosen])

    def token_type_ids(self) -> list[Integers]:
        """Return for each token of each pair the number of its segment, 0 or 1."""
        starts = [start or n for n, start in zip(self.lengths, self.marks or self.lengths, strict=True)]
        return [(np.arange(n) >= start).astype(np.int64) for n, start in zip(self.lengths, starts, strict=True)]


class Forward:
    """The model on its device. It starts with padded attention; `pack` changes that.

    It returns vectors with an `EmbeddingConfig`, or the outputs that the marks of sequences ask for; else logits.
    `batch_tokens` limits a padded sub-batch. `varlen`: packed attention uses the variable-length kernel of GPUs.
    `vocabulary_size`: rows of the input embeddings. `query_vocabulary_size`: stored weights of tokens in queries, None
    without them. `causal`: whether tokens attend only to those before them. `warning`: what makes this model slower
    than it should be, or None. `mark`: that of sequences without one; 0 for the dense vector. `shared_starts`: for each
    common start that was computed once, how often it was not computed, and its tokens. Their reader removes them.
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
        self.max_tokens, self.batch_tokens, self.packed, self.mark = config.max_tokens, batch_tokens, False, 0
        self.query_vocabulary_size: int | None = None
        self.shared_starts = deque[tuple[int, int]]()
        self._device, self._dtype, self._varlen = device, dtype, varlen
        head: Head | None = None
        self._outputs: OutputHeads | None = None
        if isinstance(config, EmbeddingConfig):
            model, self._pooling = plain.load_model(folder, dtype, config=config), config.pooling
        elif config.pooling:
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
        if isinstance(config, EmbeddingConfig):
            logits = MaskedLanguageHead(model) if config.has_logits else None
            if logits is not None and self._uses_onednn:
                onednn.pack(logits.module, int8=False)
            self._outputs = OutputHeads(folder, config, logits, device)
            self.query_vocabulary_size = self._outputs.query_vocabulary_size
            self.mark = 0 if config.checked == Form.DENSE else int(config.checked)
        self._model, self._encoder = model.to(device), encoder
        embeddings = getattr(encoder, "embeddings", None)
        # RoBERTa-like models number positions from the padding index + 1.
        offset = hasattr(embeddings, "create_position_ids_from_input_ids")
        self._first_position = int(embeddings.padding_idx) + 1 if offset and embeddings is not None else 0
        padding_id = int(model.config.pad_token_id or 0)
        self._padding_id = padding_id if 0 <= padding_id < self.vocabulary_size else 0  # LLaMA has -1
        self._takes_pairs = config.takes_pairs
        self._has_segments = config.takes_pairs and plain.has_segments(model)
        self._padded_attention = plain.attention(model)
        self.causal = getattr(model.config, "is_causal", True) is not False and any(
            getattr(module, "is_causal", False) is True for module in encoder.modules()
        )

    @torch.inference_mode()
    def sizes(self) -> tuple[int, int]:
        """Return how many numbers a dense vector has (0 without one, or with logits), and the vector of a token."""
        width = int(self._model.config.get_text_config().hidden_size)
        modes = torch.zeros(1, width * len(self._pooling), device=self._device)
        dense = self._layers(modes)[:, : self._dimensions].shape[1] if self._pooling and self._head is None else 0
        return dense, self._outputs.token_size(width) if self._outputs else 0

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
    def __call__(self, sequences: Sequences) -> Rows:
        """Return the rows of the sequences in the given order, computed on the calling thread.

        They are float32 [sequences, dimensions or labels], or the packed outputs that their marks ask for.
        """
        if self._outputs is not None:
            if sequences.marks is None and self.mark:
                sequences = Sequences(sequences.ids, [self.mark] * len(sequences))
            if sequences.marks is not None and any(sequences.marks):
                return self._run_outputs(self._outputs, sequences)
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

    def _run_outputs(self, heads: OutputHeads, sequences: Sequences) -> Rows:
        """Return the packed outputs of sequences. Those with tokens that none attends to are padded."""
        marks = sequences.marks
        assert marks is not None
        forms = [form_of(number) for number in marks]
        rows: list[Vectors] = [np.empty(0, np.float32)] * len(sequences)
        groups: tuple[list[int], list[int]] = [], []
        for index, (form, number, length) in enumerate(zip(forms, marks, sequences.lengths, strict=True)):
            if heads.is_looked_up(form):
                rows[index] = pack_outputs(form, heads.looked_up(sequences.ids[index]))
            else:
                groups[attended_of(number, length) < length].append(index)

        def dense(states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            vectors: torch.Tensor = self._layers(pool(states, counts, self._pooling))[:, : self._dimensions]
            return vectors

        for masked, group in enumerate(groups):
            ordered = sorted(group, key=lambda index: -sequences.lengths[index])
            parts: Iterable[Sequence[int]] = [ordered] if ordered else []
            if masked or not self.packed:
                lengths = [sequences.lengths[index] for index in ordered]
                parts = [[ordered[at] for at in part] for part in split(lengths, self.batch_tokens)] if group else []
            for part in parts:
                taken = sequences.take(part)
                states = self._padded_states(taken) if masked or not self.packed else self._packed_states(taken)
                found = heads.compute(states, taken.ids, [forms[index] for index in part], dense)
                for index, outputs in zip(part, found, strict=True):
                    rows[index] = pack_outputs(forms[index], outputs)
        return join_rows(rows)

    def _run_packed(self, sequences: Sequences) -> torch.Tensor:
        shared = self._shared(sequences)
        if shared:
            self.shared_starts.append((len(sequences) - 1, shared))
        lengths = [n - shared for n in sequences.lengths]
        counts = self._to_device(np.array([shared, *lengths] if shared else lengths))
        rows = pool(self._packed_states(sequences, shared), counts, self._pooling)[1 if shared else 0 :]
        return rows if self._head is None else self._head(rows)

    def _packed_states(self, sequences: Sequences, shared: int = 0) -> torch.Tensor:
        """Return the states of all tokens, concatenated: [tokens, width].

        The first `shared` tokens of all sequences are equal, and computed once: their states precede those of the rest.
        """
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
        if self._has_segments and sequences.marks is not None:
            inputs["token_type_ids"] = np.concatenate([*sequences.token_type_ids(), padding])
        layout = (
            packed.varlen_layout(lengths, self._device)
            if self._varlen
            else packed.layout(lengths, self._dtype, len(padding), shared=shared > 0)
        )
        on_device = {name: self._to_device(values)[None] for name, values in inputs.items()}
        hidden: torch.Tensor = self._encoder(**on_device, layout=layout).last_hidden_state[0, :total]
        return hidden

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
        if self._head is None:
            return pool(self._padded_states(sequences), self._to_device(np.array(sequences.lengths)), self._pooling)
        logits: torch.Tensor = self._model(**self._padded(sequences)[0]).logits.float()  # it has its own head
        return logits

    def _padded_states(self, sequences: Sequences) -> torch.Tensor:
        """Return what `_packed_states` returns, of sequences that are padded to the same length."""
        inputs, real = self._padded(sequences)
        hidden: torch.Tensor = self._encoder(**inputs).last_hidden_state.flatten(0, 1)
        return hidden.index_select(0, self._to_device(np.flatnonzero(real)))

    def _padded(self, sequences: Sequences) -> tuple[dict[str, Any], npt.NDArray[np.bool_]]:
        """Return the inputs of the model, and which places of [sequences, longest] have a token."""
        lengths = np.array(sequences.lengths)
        places = np.arange(lengths.max())
        real = places < lengths[:, None]
        inputs = {"input_ids": np.full(real.shape, self._padding_id), "attention_mask": real.astype(np.int64)}
        inputs["input_ids"][real] = np.concatenate(sequences.ids)
        if not self._takes_pairs and sequences.marks is not None:
            ends = [attended_of(number, n) for number, n in zip(sequences.marks, lengths.tolist(), strict=True)]
            inputs["attention_mask"] = (places < np.array(ends)[:, None]).astype(np.int64)
        if self._has_segments and sequences.marks is not None:
            inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
            inputs["token_type_ids"][real] = np.concatenate(sequences.token_type_ids())
        on_device: dict[str, Any] = {name: self._to_device(values) for name, values in inputs.items()}
        if self.packed:  # its attention takes the mask in another form
            on_device["layout"] = packed.padded_layout(on_device.pop("attention_mask").bool(), self._dtype)
        return on_device, real

    def _to_device(self, values: Integers) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


class StaticForward:
    """Static embeddings: rows of a table in fp32 -> one vector per sequence. Its attributes are those of `Forward`."""

    packed, causal, warning, mark = False, None, None, 0

    def __init__(self, folder: Path, config: EmbeddingConfig, device: torch.device, batch_tokens: int) -> None:
        self.max_tokens, self.batch_tokens = config.max_tokens, batch_tokens
        self.shared_starts = deque[tuple[int, int]]()
        assert config.static is not None
        self._table = weights.static_table(folder, config.static).to(device)
        self._layers, self._dimensions = Layers(folder, config.layers).to(device), config.truncate_dim
        self.vocabulary_size = len(self._table) - 1

    @torch.inference_mode()
    def sizes(self) -> tuple[int, int]:
        """Return how many numbers a vector has, and 0."""
        return self._layers(self._table[:1])[:, : self._dimensions].shape[1], 0

    @torch.inference_mode()
    def __call__(self, sequences: Sequences) -> Rows:
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
