"""python -m train.export: a run as a plain transformers folder, with the adapter folded in."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora import eject
from lora.tree import has_adapter
from model import ModelError
from model.minilm import DataPackageMissingError
from train.runs import RunError, load_trained


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 an error that the message explains."""
    parser = argparse.ArgumentParser(
        prog="python -m train.export",
        description="Writes merged weights, tokenizer and label names as a plain transformers folder, for "
        'transformers.pipeline("text-classification", FOLDER) and everything else that reads one.',
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run's folder, or an adapter's from here or PEFT"
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        export(options.run, options.folder)
    except (ValueError, DataPackageMissingError, ModelError, RunError, OSError) as error:
        # ValueError: AdapterError, or a merged weight that is not finite.
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.folder}: weights, tokenizer and label names, for transformers alone")
    return 0


def export(run: Path, folder: Path) -> None:
    """Writes the model of `run` to `folder`, which must be empty or new.

    Its logits equal the merged model's bit for bit: the same plain layers, with the same weights.
    Raises RunError, OSError, and what loading raises.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: not an empty folder")
    trained = load_trained(run)
    if trained.tokenizer is None:
        raise RunError(f"{run}: its base model comes with no tokenizer, so there is no using it on text")
    if has_adapter(trained.model):
        eject(trained.model, merge=True)
    trained.model.config.architectures = [type(trained.model).__name__]
    trained.tokenizer.model_max_length = trained.max_length_tokens  # what it was trained with
    trained.model.save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
