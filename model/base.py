"""Loads the base model and its tokenizer: embedded, from a folder, from the hub, or with random weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from transformers import AutoConfig, AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

from lora.errors import UserError, first_line
from model.minilm import minilm_config, minilm_state, minilm_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

EMBEDDED = "minilm"
_HUB_FILES = [
    "config.json",
    "model*.safetensors*",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
]
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


class ModelError(UserError, RuntimeError):
    """A base model that cannot be loaded or used. The message says what was tried and what to use instead."""


def load_base(
    name: str,
    num_labels: int = 4,
    *,
    labels: Sequence[str] | None = None,
    dropout: float = 0.1,
    seed: int = 0,
) -> tuple[RobertaForSequenceClassification, PreTrainedTokenizerBase | None]:
    """Loads a RobertaForSequenceClassification in float32 and eval mode, and its tokenizer.

    name: "minilm" (embedded), "random:minilm" or "random:roberta-base" (these shapes with weights drawn from
    `seed`; random:roberta-base has no tokenizer), a folder in the hub's layout, or a name on the hub.
    labels: num_labels names of the outputs. dropout: RoBERTa's own, hidden and attention. seed: for the
    classification head, unless the source has one.

    Raises ModelError.
    """
    names = list(labels) if labels is not None else [f"LABEL_{i}" for i in range(num_labels)]
    if len(names) != num_labels:
        raise ValueError(f"{len(names)} labels for num_labels={num_labels}")
    settings: dict[str, Any] = {
        "num_labels": num_labels,
        "id2label": dict(enumerate(names)),
        "label2id": {label: index for index, label in enumerate(names)},
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "return_dict": True,
        "chunk_size_feed_forward": 0,  # would round differently
    }
    with _seeded(seed), _quiet_transformers():
        if name == EMBEDDED:
            model, tokenizer = _embedded(settings), minilm_tokenizer()
        elif name.startswith("random:"):
            model, tokenizer = _random(name, settings)
        else:
            folder = Path(name) if Path(name).is_dir() else _fetch(name)
            model, tokenizer = _from_folder(folder, settings)
    model.config.name_or_path = name
    return model.eval(), tokenizer


def longest_text(config: RobertaConfig) -> int:
    """The number of tokens that the model reads at most: its first positions stand for padding."""
    return int(config.max_position_embeddings - config.pad_token_id - 1)


def _embedded(settings: dict[str, Any]) -> RobertaForSequenceClassification:
    config = minilm_config()
    config.update(settings)
    model = RobertaForSequenceClassification(config)
    model.roberta.load_state_dict(minilm_state())
    return model


def _random(name: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    shape = name.removeprefix("random:")
    if shape == "minilm":
        config, tokenizer = minilm_config(), minilm_tokenizer()
    elif shape == "roberta-base":
        config, tokenizer = _roberta_base_config(), None
    else:
        raise ModelError(f"{name}: unknown; use random:minilm or random:roberta-base")
    config.update(settings)
    return RobertaForSequenceClassification(config), tokenizer


def _roberta_base_config() -> RobertaConfig:
    return RobertaConfig(
        vocab_size=50265,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )


def _from_folder(folder: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: there is no config.json, so this is not a model in the hub's layout")
    if not list(folder.glob("model*.safetensors")):
        raise ModelError(f"{folder}: there is no model.safetensors (pickled weights are not read)")
    if not _has_tokenizer(folder):
        raise ModelError(f"{folder}: there is no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "roberta":
            raise ModelError(f"{folder}: a {config.model_type} model; only roberta is supported")
        config.update(settings)
        model, report = RobertaForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # replaces a head for other classes; others are refused below
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and tokenizers raise many types for a bad folder
        raise ModelError(f"{folder}: cannot be loaded: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{folder}: {type(tokenizer).__name__} is not supported; it needs a tokenizer.json")
    misshapen = sorted(str(key) for key in report["mismatched_keys"] if "classifier." not in str(key))
    if misshapen:
        raise ModelError(f"{folder}: {misshapen[0]} does not have the shape given by config.json")
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("classifier."))
    if missing:
        raise ModelError(f"{folder}: {len(missing)} weights of the encoder are missing, such as {missing[0]}")
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}"
        )
    return model, tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _fetch(name: str) -> Path:
    """The folder with the hub's files for `name`, from the cache if it has them all."""
    if Path(name).is_file():
        raise ModelError(f"{name}: this is a file; give the folder of a model in the hub's layout")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: there is no such folder")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True)
        )
        if list(folder.glob("model*.safetensors")) and _has_tokenizer(folder):
            return folder
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder nor a valid name on the hub") from error
    except Exception:  # not in the cache, or only in part: download
        pass
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)  # fails at once; the download would retry
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except RepositoryNotFoundError as error:
        reason = f"{endpoint} has no public model of that name"
        raise ModelError(_unavailable(name, reason)) from error
    except Exception as error:  # from httpx, OSError or huggingface_hub, depending on what failed
        reason = f"{endpoint} cannot be reached ({first_line(error)})"
        raise ModelError(_unavailable(name, reason)) from error


def _unavailable(name: str, reason: str) -> str:
    return (
        f"{name}: there is no such folder, no complete model in the hub's cache, and {reason}; "
        "without the hub, use --model FOLDER with config.json, model.safetensors and the tokenizer's files, "
        "or the embedded model, as `make train` does"
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Context in which random numbers are drawn from `seed`. The caller's generator is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Context without the warning about a new classification head and without progress bars."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
