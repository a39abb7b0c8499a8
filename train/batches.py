"""From texts to padded batches: tokenised once, grouped by length, in an order given by seed and epoch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POOL_BATCHES = 50  # the rows of this many batches are sorted by length: little padding, random batches


@dataclass(frozen=True)
class Encoded:
    """A tokenised split: row i is tokens[offsets[i]:offsets[i + 1]] (int32), its class labels[i] (int64)."""

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each row, (rows,) int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Batch:
    """Rows padded to the longest: input_ids and attention_mask (B, L) int64, labels (B,) int64.

    attention_mask is None if nothing is padded. A model could only find that out by waiting for the GPU.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`. The CPU does not wait for a copy to a GPU."""
        if device.type != "cuda":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        mask = None if self.attention_mask is None else move(self.attention_mask)
        return Batch(move(self.input_ids), mask, move(self.labels))


def encode(split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length_tokens: int) -> Encoded:
    """Tokenises a split, truncated to `max_length_tokens`. Cached in the user's datasets cache."""

    def tokenise(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(rows["text"], truncation=True, max_length=max_length_tokens)
        return {"input_ids": encoded["input_ids"]}

    texts = split.select_columns("text")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.update(truncation=max_length_tokens, padding=None)  # the tokenizer keeps those of its last call
    key = hashlib.sha256(json.dumps(rules).encode())
    for text in texts["text"]:
        key.update(f"{len(text)} {text}".encode())
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "lora-by-hand" / f"{key.hexdigest()[:32]}.arrow"
    cache.parent.mkdir(parents=True, exist_ok=True)
    was_on = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        rows = texts.map(
            tokenise,
            batched=True,
            remove_columns=["text"],
            features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
            cache_file_name=str(cache),
            new_fingerprint=key.hexdigest()[:16],
        )
    finally:
        if was_on:
            datasets.utils.logging.enable_progress_bar()
    column = rows.data.column("input_ids").combine_chunks()
    lengths = column.value_lengths().to_numpy()
    return Encoded(
        tokens=column.flatten().to_numpy(),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        labels=np.asarray(split["label"], dtype=np.int64),
    )


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The row numbers of each batch of an epoch. Rows of similar length share a batch.

    The rows are shuffled, divided into pools, sorted by length within a pool and divided into batches, which
    are shuffled. At most one batch has fewer than `batch_size` rows. The order depends only on the lengths,
    the seed and the epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    rows = rng.permutation(len(lengths))
    pool = batch_size * _POOL_BATCHES
    batches = []
    for start in range(0, len(rows), pool):
        members = rows[start : start + pool]
        members = members[np.argsort(lengths[members], kind="stable")]
        batches += [members[at : at + batch_size] for at in range(0, len(members), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batches_by_length(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The row numbers of each batch, longest rows first: the least padding, for evaluation."""
    rows = np.argsort(-lengths, kind="stable")
    return [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]


def collate(encoded: Encoded, rows: np.ndarray, pad_token_id: int) -> Batch:
    """The given rows, padded at the end to the longest of them."""
    lengths = encoded.offsets[rows + 1] - encoded.offsets[rows]
    input_ids = np.full((len(rows), int(lengths.max())), pad_token_id, dtype=np.int64)
    for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        start = encoded.offsets[row]
        input_ids[at, :length] = encoded.tokens[start : start + length]
    attended = np.arange(input_ids.shape[1]) < lengths[:, None]
    return Batch(
        torch.from_numpy(input_ids),
        None if attended.all() else torch.from_numpy(attended.astype(np.int64)),
        torch.from_numpy(encoded.labels[rows]),
    )
