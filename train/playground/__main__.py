"""python -m train.playground: a local web page on which to try trained adapters and change them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from train.command import CommandParser, print_error, run_command
from train.runs import CONFIG, RUNS, SUMMARY, RunError, newest_run


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains, 130 stopped by Ctrl-C."""
    parser = CommandParser(
        "train.playground",
        "Serves a web page on 127.0.0.1 on which to try adapters and change them. Ctrl-C ends it.",
        "It needs gradio, which `make play` installs in an environment of its own.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="*", metavar="RUN",
        help="finished LoRA runs on one base (default: the newest in runs/; without one, trains it)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    # gradio and huggingface_hub read these when they are imported.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name in ("no_proxy", "NO_PROXY"):  # gradio asks its own server whether it is ready
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    return run_command(lambda: _play(options.runs))


def _play(runs: list[Path]) -> int:
    try:
        from train.playground import app
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        return print_error("gradio is not installed here; `make play` installs it and starts the page")
    if not runs:
        try:
            runs = [newest_run(RUNS)]
        except RunError:
            if code := _train():
                return code
            runs = [newest_run(RUNS)]
    app.serve(runs, lambda message: print(message, file=sys.stderr, flush=True))
    return 0


def _train() -> int:
    """Trains the quickstart, or continues it. Returns the exit code."""
    from train import cli

    folder = RUNS / "quickstart"
    if (folder / SUMMARY).is_file():
        return print_error(f"{folder}: not a LoRA run; name a run, or move this one")
    print(
        f"there is no finished run in {RUNS}/; training the quickstart first takes minutes", file=sys.stderr
    )
    return cli.main(["--output", str(folder), *(["--resume"] if (folder / CONFIG).is_file() else [])])


if __name__ == "__main__":
    sys.exit(main())
