"""python -m train.export: a run as a plain transformers folder, with the adapter merged."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from lora import eject
from lora.adapted import has_adapter
from lora.quantised import dequantise
from train.command import CommandParser, run_command
from train.runs import RunError, refuse_used
from train.trained import load_trained


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains."""
    parser = CommandParser(
        "train.export",
        "Writes merged weights, tokenizer and label names as a plain transformers folder, for "
        'transformers.pipeline("text-classification", FOLDER) and everything else that reads one.',
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run's folder, or an adapter's folder from here or from PEFT"
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    return run_command(lambda: export(options.run, options.folder))


def export(run: Path, folder: Path) -> None:
    """Writes the model of `run` to `folder`, which must be empty or new. On an error nothing is left of it.

    Its logits equal the merged model's bit for bit, because layers and weights are the same.

    Raises RunError, OSError, and what loading raises.
    """
    refuse_used(folder)
    trained = load_trained(run, text=True)
    if has_adapter(trained.model):
        try:
            eject(trained.model, merge=True, dtype=torch.float32)
        except ValueError as error:  # the merged weight is not finite
            raise RunError(f"{run}: {error}") from error
    dequantise(trained.model)
    config = trained.model.config
    config.architectures = [type(trained.model).__name__]
    if config.num_labels > 1:  # a pipeline's scores are then probabilities, whatever the base was trained for
        config.problem_type = "single_label_classification"
    trained.tokenizer.model_max_length = trained.max_length_tokens  # as in training
    trained.tokenizer.padding_side = "right"  # because the head reads the first token
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        trained.model.save_pretrained(unfinished)
        trained.tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o777 & ~_umask())  # mkdtemp creates 0700
        unfinished.replace(folder)
    except Exception as error:  # safetensors and tokenizers raise types of their own on a full disk
        raise RunError(f"{folder}: not written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{folder}: weights, tokenizer and label names, for use with transformers alone")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


if __name__ == "__main__":
    sys.exit(main())
