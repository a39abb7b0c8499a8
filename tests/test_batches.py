"""Batches: every row once, little padding, an order that seed and epoch decide alone."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from model.minilm import minilm_tokenizer
from train.batches import Encoded, batches_by_length, collate, encode, epoch_batches


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (7, 4), (1000, 16), (1003, 16), (64, 64)])
def test_every_row_comes_once_and_all_but_one_batch_are_full(rows, batch_size):
    lengths = np.random.default_rng(0).integers(5, 100, rows)
    for batches in (
        epoch_batches(lengths, batch_size, seed=0, epoch=0),
        batches_by_length(lengths, batch_size),
    ):
        assert sorted(np.concatenate(batches)) == list(range(rows))
        assert sum(len(batch) != batch_size for batch in batches) <= 1


def test_the_order_follows_from_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(5, 100, 500)

    def order(seed, epoch):
        return np.concatenate(epoch_batches(lengths, 8, seed, epoch)).tolist()

    first = order(0, 0)
    np.random.rand(3)
    torch.rand(3)
    assert order(0, 0) == first
    assert order(0, 1) != first
    assert order(1, 0) != first


def test_bucketing_pads_far_less_than_random_batches():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 128, 5000)

    def padded(batches):
        return sum(len(batch) * lengths[batch].max() for batch in batches) / lengths.sum() - 1

    at_random = [rng.permutation(5000)[i : i + 32] for i in range(0, 5000, 32)]
    bucketed = epoch_batches(lengths, 32, 0, 0)
    assert padded(bucketed) < 0.1 < 0.5 < padded(at_random)
    # and still mixes: a batch's rows come from all over the data, and batches are not in length order
    assert np.ptp(bucketed[0]) > 1000
    assert abs(np.corrcoef(range(len(bucketed)), [lengths[b].mean() for b in bucketed])[0, 1]) < 0.3


def test_collate_pads_to_the_longest_of_the_batch():
    encoded = Encoded(
        tokens=np.arange(10, 20, dtype=np.int32), offsets=np.array([0, 3, 4, 10]), labels=np.array([0, 1, 2])
    )
    batch = collate(encoded, np.array([1, 0]), pad_token_id=7)
    assert batch.input_ids.tolist() == [[13, 7, 7], [10, 11, 12]]
    assert batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [1, 0]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_tokens_are_those_of_the_tokenizer_and_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    tokenizer = minilm_tokenizer()
    texts = ["A short one.", "a much longer text, about nothing in particular, " * 5, "émigré £5"]
    split = Dataset.from_dict({"text": texts, "label": [0, 1, 0]})
    encoded = encode(split, tokenizer, 16)
    for row, text in enumerate(texts):
        tokens = encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]].tolist()
        assert tokens == tokenizer(text, truncation=True, max_length=16)["input_ids"]
    assert encoded.lengths.max() == 16
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(files) == 1
    again = encode(split, tokenizer, 16)
    assert np.array_equal(again.tokens, encoded.tokens)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files
    assert encode(split, tokenizer, 8).lengths.max() == 8  # another length is another entry
