"""python -m train.export: a run as a plain transformers folder, with the adapter merged."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora import eject
from lora.modules import has_adapter
from train.command import run_command
from train.runs import RunError
from train.trained import load_trained


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains."""
    parser = argparse.ArgumentParser(
        prog="python -m train.export",
        description="Writes merged weights, tokenizer and label names as a plain transformers folder, for "
        'transformers.pipeline("text-classification", FOLDER) and everything else that reads one.',
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run's folder, or an adapter's folder from here or from PEFT"
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    return run_command(lambda: export(options.run, options.folder))


def export(run: Path, folder: Path) -> None:
    """Writes the model of `run` to `folder`, which must be empty or new.

    Its logits equal the merged model's bit for bit, because layers and weights are the same.

    Raises RunError, OSError, and what loading raises.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: not an empty folder")
    trained = load_trained(run, text=True)
    if has_adapter(trained.model):
        try:
            eject(trained.model, merge=True)
        except ValueError as error:  # the merged weight is not finite
            raise RunError(f"{run}: {error}") from error
    trained.model.config.architectures = [type(trained.model).__name__]
    trained.tokenizer.model_max_length = trained.max_length_tokens  # as in training
    trained.model.save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)
    print(f"{folder}: weights, tokenizer and label names, for use with transformers alone")


if __name__ == "__main__":
    sys.exit(main())
