"""The forward pass of an encoder: token ids -> one vector per sequence. Packed or padded, then pooled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from inferctl.serve.embedding_config import EmbeddingConfig
from inferctl.serve.engine_process.engine_protocol import PrecisionInfo, Tokens, Vectors
from inferctl.serve.engines import int8, onednn, packed, plain

# The largest share of padding in a padded sub-batch.
_MAX_PADDING = 0.15


class Forward:
    """The model on its device. It starts with padded attention; `pack` changes that.

    `batch_tokens` limits a padded sub-batch. `varlen`: packed attention uses the variable-length kernel of GPUs.
    `vocabulary_size`: rows of the input embeddings. `warning`: what makes this model slower than it should be, or None.
    """

    def __init__(
        self,
        folder: Path,
        embedding: EmbeddingConfig,
        device: torch.device,
        dtype: torch.dtype,
        precision: PrecisionInfo,
        batch_tokens: int,
        *,
        varlen: bool = False,
    ) -> None:
        model = plain.load_model(folder, dtype)
        self.embedding, self.batch_tokens, self.packed = embedding, batch_tokens, False
        self.vocabulary_size = int(model.get_input_embeddings().num_embeddings)
        self._device, self._dtype, self._varlen = device, dtype, varlen
        on_cpu, eight_bit = device.type == "cpu", precision.effective == "int8"
        native_bf16 = precision.effective == "bf16" and precision.level == "native"
        self._pad_rows = on_cpu and (eight_bit or native_bf16)
        if eight_bit and not on_cpu:
            int8.quantize(model)
        self.warning = onednn.pack(model, int8=eight_bit) if self._pad_rows else None
        self._model = model.to(device)
        embeddings = getattr(model, "embeddings", None)
        # RoBERTa-like models number positions from the padding index + 1.
        offset = hasattr(embeddings, "create_position_ids_from_input_ids")
        self._first_position = int(embeddings.padding_idx) + 1 if offset and embeddings is not None else 0
        self._padding_id = int(model.config.pad_token_id or 0)

    def pack(self, on: bool = True) -> None:
        """Use packed attention, or padded attention if not `on`."""
        packed.register()
        self._model.set_attn_implementation(packed.NAME if on else "sdpa")
        self.packed = on

    @torch.inference_mode()
    def __call__(self, sequences: list[Tokens]) -> Vectors:
        """Return float32 [sequences, dimensions], in the given order, computed on the calling thread."""
        order = np.argsort([-len(s) for s in sequences], kind="stable")
        ordered = [sequences[i] for i in order]
        if self.packed:
            rows = self._packed_rows(ordered)
        else:
            rows = torch.cat([self._padded_rows(part) for part in split(ordered, self.batch_tokens)])
        if self.embedding.normalize:
            rows = torch.nn.functional.normalize(rows, dim=1)
        out = np.empty(rows.shape, dtype=np.float32)
        out[order] = rows.cpu().numpy()
        return out

    def _packed_rows(self, sequences: list[Tokens]) -> torch.Tensor:
        lengths = [len(s) for s in sequences]
        total = sum(lengths)
        padding = np.zeros(onednn.padded_rows(total) - total if self._pad_rows else 0, dtype=np.int64)
        tokens = self._to_device(np.concatenate([*sequences, padding + self._padding_id], dtype=np.int64))
        within = np.concatenate([*(np.arange(n) for n in lengths), padding])
        layout = (
            packed.varlen_layout(lengths, self._device)
            if self._varlen
            else packed.layout(lengths, self._dtype, len(padding))
        )
        positions = self._to_device(within + self._first_position)
        states = self._model(input_ids=tokens[None], position_ids=positions[None], layout=layout).last_hidden_state
        hidden: torch.Tensor = states[0, :total]
        counts = self._to_device(np.array(lengths))
        if self.embedding.pooling == "mean":
            # Summed in fp32, because the 8 bits of bf16 are too few for a long sum.
            return torch.segment_reduce(hidden.float(), "mean", lengths=counts, unsafe=True)
        ends = counts.cumsum(0)
        return hidden[ends - counts if self.embedding.pooling == "cls" else ends - 1].float()

    def _padded_rows(self, sequences: list[Tokens]) -> torch.Tensor:
        lengths = np.array([len(s) for s in sequences])
        real = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(real.shape, self._padding_id, dtype=np.int64)
        ids[real] = np.concatenate(sequences)
        mask, counts = self._to_device(real.astype(np.int64)), self._to_device(lengths)
        states = self._model(input_ids=self._to_device(ids), attention_mask=mask).last_hidden_state
        hidden: torch.Tensor = states.float()
        if self.embedding.pooling == "mean":
            return (hidden * mask[..., None]).sum(dim=1) / counts[:, None]
        last = counts - 1
        return hidden[torch.arange(len(last)), torch.zeros_like(last) if self.embedding.pooling == "cls" else last]

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def split(ordered: list[Tokens], batch_tokens: int) -> Iterator[list[Tokens]]:
    """Split sequences, sorted by falling length, into parts of little padding.

    A part has at most `batch_tokens` tokens, padding included, or one sequence.
    """
    part: list[Tokens] = []
    used = 0
    for ids in ordered:
        area = (len(part) + 1) * (len(part[0]) if part else len(ids))
        if part and (area > batch_tokens or used + len(ids) < (1 - _MAX_PADDING) * area):
            yield part
            part, used = [], 0
        part.append(ids)
        used += len(ids)
    yield part
