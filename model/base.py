"""Where the base model and its tokenizer come from: embedded, a folder, the hub, or random weights."""

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

from model.minilm import minilm_config, minilm_state, minilm_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

EMBEDDED = "minilm"
HEAD = ("classifier",)  # what RobertaForSequenceClassification initialises afresh
_HUB_FILES = [
    "config.json",
    "model*.safetensors*",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
]
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


class ModelError(RuntimeError):
    """A base model that cannot be had or used; the message says what was tried and what works instead."""


def load_base(
    name: str,
    num_labels: int = 4,
    *,
    labels: Sequence[str] | None = None,
    dropout: float = 0.1,
    seed: int = 0,
) -> tuple[RobertaForSequenceClassification, PreTrainedTokenizerBase | None]:
    """A RobertaForSequenceClassification in float32 and eval mode, with its tokenizer.

    name: "minilm" (embedded), "random:minilm" or "random:roberta-base" (the right shapes, weights drawn
    from `seed`; random:roberta-base has no tokenizer), a folder in the hub's layout, or a name on the hub.
    labels: names for the outputs, num_labels of them. dropout: RoBERTa's own, hidden and attention.
    seed: draws the classification head, where the source has none.

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
    }
    with _seeded(seed), _quiet_transformers():
        if name == EMBEDDED:
            model, tokenizer = _embedded(settings), minilm_tokenizer()
        elif name.startswith("random:"):
            model, tokenizer = _random(name, settings)
        else:
            folder = Path(name) if Path(name).is_dir() else _fetch(name)
            model, tokenizer = _from_folder(folder, settings, seed)
    model.config.name_or_path = name
    return model.eval(), tokenizer


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
        raise ModelError(f"{name}: there are random:minilm and random:roberta-base")
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


def _from_folder(folder: Path, settings: dict[str, Any], seed: int) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: there is no config.json, so this is no model in the hub's layout")
    if not list(folder.glob("model*.safetensors")):
        raise ModelError(f"{folder}: there is no model.safetensors (pickled weights are not read)")
    if not _has_tokenizer(folder):
        raise ModelError(f"{folder}: there is no tokenizer in it ({', '.join(_TOKENIZER_FILES)})")
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "roberta":
            raise ModelError(f"{folder}: a {config.model_type}, and this project adapts a roberta")
        config.update(settings)
        torch.manual_seed(seed)
        model, report = RobertaForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for other classes is replaced; others are refused below
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and tokenizers raise many kinds for a bad folder
        raise ModelError(f"{folder}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    misshapen = sorted(str(key) for key in report["mismatched_keys"] if "classifier." not in str(key))
    if misshapen:
        raise ModelError(f"{folder}: not of the shapes that config.json says: {misshapen[0]}")
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("classifier."))
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights of the encoder are missing, {missing[0]} among them"
        )
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}"
        )
    return model, tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _fetch(name: str) -> Path:
    """The hub's files for `name`, from the cache if they are there."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: there is no such folder")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True)
        )
        if list(folder.glob("model*.safetensors")) and _has_tokenizer(folder):
            return folder
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder nor a name that the hub could have") from error
    except Exception:  # not in the cache, or only in part: ask the hub
        pass
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)  # fails at once where the download would retry
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except RepositoryNotFoundError as error:
        reason = f"{endpoint} has no public model of that name"
        raise ModelError(_unavailable(name, reason)) from error
    except Exception as error:  # httpx, OSError and the hub's own, by what failed and when
        reason = f"{endpoint} cannot be reached ({str(error).strip().splitlines()[0]})"
        raise ModelError(_unavailable(name, reason)) from error


def _unavailable(name: str, reason: str) -> str:
    return (
        f"{name}: there is no folder of that name here, none whole in the hub's cache, and {reason}.\n"
        "What works without the hub:\n"
        "  a folder  --model FOLDER, with config.json, model.safetensors and the tokenizer's files\n"
        "  the quickstart  make train, with the embedded model and news"
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws inside come from `seed`; the caller's generator is left where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No notes on a new classification head, which is meant, and no bars for files already here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
