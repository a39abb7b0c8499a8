"""From texts to padded batches: tokenised once, grouped by length, in an order given by seed and epoch."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
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

from lora.storage import DamagedFileError, read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENTRY = "tokens"
_TEXTS_AT_ONCE = 1000
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

    attention_mask is None if nothing is padded. To find this out from a mask on a GPU, a model would have to
    synchronise with it.
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
    """Tokenises a split, truncated to `max_length_tokens`.

    The tokens are cached in a verified file in the user's datasets cache. A damaged file is made again, and
    without space for it the tokens are not cached.
    """
    texts, labels = list(split["text"]), np.asarray(split["label"], dtype=np.int64)
    key = hashlib.sha256(f"{max_length_tokens} {tokenizer_digest(tokenizer)}".encode())
    for text in texts:
        key.update(f"{len(text)} {text}".encode())
    name = key.hexdigest()
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "lora-by-hand" / f"{name[:32]}.safetensors"
    try:
        tensors, note = read_tensors(cache, _ENTRY)
        if note.get("key") == name:
            return Encoded(tensors["tokens"].numpy(), tensors["offsets"].numpy(), labels)
    except (DamagedFileError, OSError, KeyError):
        pass
    lengths, parts = [0], []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        some = texts[start : start + _TEXTS_AT_ONCE]
        rows = tokenizer(some, truncation=True, max_length=max_length_tokens)["input_ids"]
        lengths += map(len, rows)
        parts.append(np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32))
    encoded = Encoded(np.concatenate(parts), np.cumsum(lengths, dtype=np.int64), labels)
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        tokens, offsets = torch.from_numpy(encoded.tokens), torch.from_numpy(encoded.offsets)
        write_tensors(cache, {"tokens": tokens, "offsets": offsets}, _ENTRY, {"key": name})
    return encoded


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The SHA-256 of everything that determines how the tokenizer divides and numbers a text."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.update(truncation=None, padding=None)  # the tokenizer keeps those of its last call
    defaults = {"truncation_side": "right", "split_special_tokens": False}  # not among the backend's rules
    rules |= {key: side for key, usual in defaults.items() if (side := getattr(tokenizer, key)) != usual}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


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
