"""The forward pass: token ids -> one vector, the outputs or the logits of each sequence. Packed or padded."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.outputs import Form, Outputs, attended_of, form_of
from inferctl.reading.outputs import pack as pack_outputs
from inferctl.reading.rows import Rows, Vectors, join_rows
from inferctl.reading.task_config import TaskConfig
from inferctl.serve.engine_process.engine_protocol import PrecisionInfo
from inferctl.serve.engines import fused, int8, onednn, packed, plain, transfer, weights
from inferctl.serve.engines.graphs import Graphs, shapes
from inferctl.serve.engines.head import Head, LanguageHead, TokenScore
from inferctl.serve.engines.output_heads import CapacityError, OutputHeads
from inferctl.serve.engines.pooling import Layers, pool
from inferctl.serve.engines.prepared import Inputs, Part, Prepared, Sequences, split
from inferctl.serve.engines.transfer import HostCopy

_OF_ENCODER = ("input_ids", "position_ids", "token_type_ids", "attention_mask")


@dataclass(frozen=True)
class Launched:
    """A batch that the device computes. `read` makes rows of its results."""

    results: HostCopy
    read: Callable[[list[npt.NDArray[Any]]], Rows]

    def rows(self) -> Rows:
        """Wait for the device and return the rows in the order of the batch: float32, on the host."""
        return self.read(self.results.wait())


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
        self._device, self._dtype = device, dtype
        self.shared_starts = deque[tuple[int, int]]()
        # A GPU computes one batch after the other, also if two threads launch them.
        self._launching = contextlib.nullcontext() if transfer.on_host(device) else threading.Lock()
        self._outputs: OutputHeads | None = None
        self._graphs: Graphs | None = None
        task, score = plain.loaded_task(config), plain.token_score(config)
        model = plain.load_model(folder, dtype, task=task, config=config)
        self._head = Head(model, device) if task in ("rerank", "classify") else None
        self._pooling = (self._head.pooling,) if self._head else config.pooling
        self._layers = TokenScore(model, score, device) if score else Layers(folder, config.layers).to(device)
        self._dimensions = config.truncate_dim if isinstance(config, EmbeddingConfig) else None
        encoder = model.base_model
        fused.apply(encoder)
        self.vocabulary_size = int(encoder.get_input_embeddings().num_embeddings)
        pooler, encoder.pooler = getattr(encoder, "pooler", None), None  # part of the head
        on_cpu, eight_bit = device.type == "cpu", precision.effective == "int8"
        native_bf16 = precision.effective == "bf16" and precision.level == "native"
        uses_onednn = on_cpu and (eight_bit or native_bf16)
        if eight_bit and not on_cpu:
            int8.quantize(encoder)
        self.warning = onednn.pack(encoder, int8=eight_bit) if uses_onednn else None
        encoder.pooler = pooler
        if isinstance(config, EmbeddingConfig):
            logits = LanguageHead(model) if config.has_logits else None
            if logits is not None and uses_onednn:
                onednn.pack(logits.module, int8=False)
            self._outputs = OutputHeads(folder, config, logits, device)
            self.query_vocabulary_size = self._outputs.query_vocabulary_size
            self.mark = 0 if config.checked == Form.DENSE else int(config.checked)
        self._model, self._encoder = model.to(device), encoder
        embeddings = getattr(encoder, "embeddings", None)
        # RoBERTa-like models number positions from the padding index + 1.
        offset = hasattr(embeddings, "create_position_ids_from_input_ids")
        first_position = int(embeddings.padding_idx) + 1 if offset and embeddings is not None else 0
        padding_id = int(model.config.pad_token_id or 0)
        has_segments = config.takes_pairs and plain.has_segments(model)
        self._padded_attention = plain.attention(model)
        self.causal = getattr(model.config, "is_causal", True) is not False and any(
            getattr(module, "is_causal", False) is True for module in encoder.modules()
        )
        self._inputs = Inputs(
            device,
            dtype,
            varlen,
            padding_id if 0 <= padding_id < self.vocabulary_size else 0,  # LLaMA has -1
            first_position,
            config.takes_pairs,
            has_segments,
            # No token may attend to those after it, and only the last one of each sequence may be used.
            shares=self.causal and self._pooling == ("last",) and not has_segments,
            rounded=uses_onednn,
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

    def capture_graphs(self) -> str:
        """Capture CUDA graphs of small batches. Return which there are, or why there is none."""
        if not self.packed:
            return "none: attention is padded"
        self._graphs = Graphs(self._inputs, self._encode, self.vocabulary_size)
        return self._graphs.capture(shapes(self.batch_tokens, self.max_tokens))

    def __call__(self, sequences: Sequences) -> Rows:
        """Return the rows of the sequences in the given order, computed on the calling thread.

        They are float32 [sequences, dimensions or labels], or the packed outputs that their marks ask for.
        """
        return self.launch(self.prepare(sequences)).rows()

    def prepare(self, sequences: Sequences) -> Prepared:
        """Return the inputs of the encoder for sequences: work of the host, which any thread may do."""
        heads, inputs = self._outputs, self._inputs
        if heads is not None and sequences.marks is None and self.mark:
            sequences = Sequences(sequences.ids, [self.mark] * len(sequences))
        lengths, marks = sequences.lengths, sequences.marks
        forms: list[Form] | None = None
        rows: dict[int, Vectors] = {}
        groups: tuple[list[int], list[int]] = (list(range(len(sequences))), [])
        if heads is not None and marks is not None and any(marks):
            forms, groups = [form_of(number) for number in marks], ([], [])
            for index, (form, number, length) in enumerate(zip(forms, marks, lengths, strict=True)):
                if heads.is_looked_up(form):
                    rows[index] = pack_outputs(form, heads.looked_up(sequences.ids[index]))
                else:  # those with tokens that none attends to are padded
                    groups[attended_of(number, length) < length].append(index)
        parts: list[Part] = []
        for masked, group in enumerate(groups):
            ordered = sorted(group, key=lambda index: -lengths[index])
            whole = [range(len(ordered))] if ordered else []
            packs = self.packed and not masked
            for each in whole if packs else split([lengths[index] for index in ordered], self.batch_tokens):
                chosen, wanted = [ordered[at] for at in each], []
                if heads is not None and forms is not None:
                    wanted = heads.wanted([sequences.ids[at] for at in chosen], [forms[at] for at in chosen])
                if packs:
                    shape = self._graphs.shape([lengths[at] for at in chosen]) if self._graphs else None
                    parts.append(inputs.packed(sequences, chosen, wanted, shape))
                else:
                    parts.append(inputs.padded(sequences, chosen, wanted))
        return Prepared(len(sequences), sum(lengths), parts, forms, rows)

    @torch.inference_mode()
    def launch(self, prepared: Prepared) -> Launched:
        """Compute a batch. A GPU computes it after the return: nothing here waits for it."""
        with self._launching:
            return self._launch(prepared)

    def _launch(self, prepared: Prepared) -> Launched:
        if prepared.forms is not None:
            found = [tensors for part in prepared.parts for tensors in self._run_outputs(part)]
            read = partial(self._read_outputs, prepared, [len(tensors) for tensors in found])
            return Launched(HostCopy([tensor for tensors in found for tensor in tensors]), read)
        rows = self._layers(torch.cat([self._run(part) for part in prepared.parts]))[:, : self._dimensions]
        return Launched(HostCopy([rows]), partial(_in_order, prepared))

    def _run(self, part: Part) -> torch.Tensor:
        """Return the pooled states of a part, or its logits."""
        inputs = part.staged.on_device()
        if part.shared:
            self.shared_starts.append((len(part.sequences) - 1, part.shared))
        if self._head is not None and part.layout is None:
            logits: torch.Tensor = self._model(**self._of_encoder(part, inputs)).logits.float()  # it has its own head
            return logits
        rows = pool(self._states(part, inputs), inputs["counts"], self._pooling)[1 if part.shared else 0 :]
        return rows if self._head is None else self._head(rows)

    def _run_outputs(self, part: Part) -> list[list[torch.Tensor]]:
        """Return what `OutputHeads.launch` returns of each output in the part."""
        assert self._outputs is not None

        def dense(states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            vectors: torch.Tensor = self._layers(pool(states, counts, self._pooling))[:, : self._dimensions]
            return vectors

        inputs = part.staged.on_device()
        states, found = self._states(part, inputs), []
        for number, wanted in enumerate(part.wanted):
            rows, counts = inputs[f"rows {number}"], inputs[f"counts {number}"]
            found.append(self._outputs.launch(states, wanted, rows, dense, counts))
        return found

    def _read_outputs(self, prepared: Prepared, sizes: list[int], arrays: list[npt.NDArray[Any]]) -> Rows:
        """Return the packed outputs of a batch. `sizes`: how many arrays each output of each part has."""
        assert self._outputs is not None
        assert prepared.forms is not None
        fields: list[dict[str, Any]] = [{} for _ in range(prepared.count)]
        each = [(part, wanted) for part in prepared.parts for wanted in part.wanted]
        at = 0
        try:
            for (part, wanted), size in zip(each, sizes, strict=True):
                found = self._outputs.read(wanted, part.sequences.ids, arrays[at : at + size])
                at += size
                for index, values in zip(wanted.sequences, found, strict=True):
                    fields[part.indices[index]] |= values
        except CapacityError:
            return self.launch(prepared).rows()
        rows = dict(prepared.rows)
        for index, (form, values) in enumerate(zip(prepared.forms, fields, strict=True)):
            if index not in rows:
                rows[index] = pack_outputs(form, Outputs(**values))
        return join_rows([rows[index] for index in range(prepared.count)])

    def _states(self, part: Part, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the states of all tokens of a part, concatenated: [tokens, width]."""
        hidden = self._graphs.run(part.shape, inputs) if self._graphs and part.shape else self._encode(part, inputs)
        return hidden[: part.tokens] if part.layout is not None else hidden.index_select(0, inputs["real"])

    def _encode(self, part: Part, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the states of all rows of a part, with padding: [rows, width]."""
        hidden: torch.Tensor = self._encoder(**self._of_encoder(part, inputs)).last_hidden_state.flatten(0, 1)
        return hidden

    def _of_encoder(self, part: Part, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the arguments of the encoder."""
        found: dict[str, Any] = {name: values for name, values in inputs.items() if name in _OF_ENCODER}
        if part.layout is not None:
            names = [name for name in packed.ON_DEVICE if name in inputs]
            read: dict[str, Any] = {name: inputs[name].to(getattr(part.layout, name).dtype) for name in names}
            found["layout"] = replace(part.layout, **read)
        elif self.packed:  # its attention takes the mask in another form
            found["layout"] = packed.padded_layout(found.pop("attention_mask").bool(), self._dtype)
        return found


def _in_order(prepared: Prepared, arrays: list[npt.NDArray[Any]]) -> Vectors:
    """Return the rows of a batch in its order, of those in the order of its parts."""
    out = np.empty(arrays[0].shape, dtype=np.float32)
    out[[index for part in prepared.parts for index in part.indices]] = arrays[0]
    return out


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
