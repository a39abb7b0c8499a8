"""make soak: the long form of test_survival.py. Kills at random moments, and everything compared bit for bit.

Prints a line a kind, JSON last, and exits non-zero on any miss.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import content, write_csv_folder, write_hub_folder
from test_survival import finish, start

from train.checkpoint import list_checkpoints
from train.config import Recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        soak = Soak(Path(place), rng)
        results = {
            "kills": soak.kills(options.kills),
            "damaged checkpoints": soak.damage(6),
            "full disks": soak.full_disk(3),
            "ranks killed": soak.rank_killed(3),
        }
    for kind, (good, total) in results.items():
        print(f"{kind}: {good} of {total} resumed identical")
    print(json.dumps({"seed": options.seed, **{kind: list(counts) for kind, counts in results.items()}}))
    return int(any(good < total for good, total in results.values()))


class Soak:
    """One recipe, its undisturbed run, and ways to disturb another run of it."""

    def __init__(self, place: Path, rng: random.Random):
        self.place, self.rng, self.number = place, rng, 0
        write_hub_folder(place / "base")
        write_csv_folder(place / "news")
        recipe = Recipe(
            model=str(place / "base"), data=str(place / "news"), epochs=40, batch_size=4, learning_rate=3e-3,
            max_length_tokens=16, validation_fraction=0.25, precision="fp32", device="cpu", base_dropout=0.02,
            log_every_steps=3, checkpoint_every_steps=2,
        )  # fmt: skip
        (place / "tiny.toml").write_text(recipe.to_toml())
        self.recipe = (place / "tiny.toml", recipe)
        started = time.monotonic()
        process = start(self.recipe, place / "whole")
        while not list_checkpoints(place / "whole" / "checkpoint"):
            time.sleep(0.005)
        self.training_seconds = time.monotonic()
        code, _, err = finish(process)
        assert code == 0, err
        self.training_seconds = time.monotonic() - self.training_seconds
        self.seconds = time.monotonic() - started
        self.wanted = content(place / "whole")

    def folder(self) -> Path:
        self.number += 1
        return self.place / f"run{self.number}"

    def resumes_identical(self, folder: Path) -> bool:
        code, _, err = finish(start(self.recipe, folder, *(["--resume"] if folder.is_dir() else [])))
        same = code == 0 and content(folder) == self.wanted
        if not same:
            print(f"{folder}: exit code {code}\n{err}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        return same

    def kills(self, total: int) -> tuple[int, int]:
        """A third at any moment, a third while training, a third inside a checkpoint's write."""
        good = 0
        for number in range(total):
            folder = self.folder()
            process = start(self.recipe, folder)
            checkpoints = folder / "checkpoint"
            if number % 3 == 0:
                time.sleep(self.rng.uniform(0, self.seconds))
            else:
                while process.poll() is None and not list_checkpoints(checkpoints):
                    time.sleep(0.002)
                time.sleep(self.rng.uniform(0, 0.8 * self.training_seconds))
            if number % 3 == 2:
                while process.poll() is None and not list(checkpoints.glob(".*.safetensors.*")):
                    pass
            process.kill()
            finish(process)
            good += self.resumes_identical(folder)
            print(f"kills: {number + 1} of {total}, {good} identical", file=sys.stderr)
        return good, total

    def stopped(self) -> Path:
        """A run with two checkpoints at least, killed."""
        folder = self.folder()
        process = start(self.recipe, folder)
        while len(list_checkpoints(folder / "checkpoint")) < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.kill()
        finish(process)
        return folder

    def damage(self, total: int) -> tuple[int, int]:
        """The newest checkpoint cut, flipped or swapped with its elder: refused; without it, identical."""
        good = 0
        for number in range(total):
            folder = self.stopped()
            older, newest = list_checkpoints(folder / "checkpoint")[-2:]
            data = bytearray(newest.read_bytes())
            if number % 3 == 0:
                data = data[: self.rng.randrange(len(data))]
            elif number % 3 == 1:
                data[self.rng.randrange(8, len(data))] ^= 1 << self.rng.randrange(8)
            else:
                data = bytearray(older.read_bytes())
            newest.write_bytes(data)
            code, _, err = finish(start(self.recipe, folder, "--resume"))
            refused = code == 2 and newest.name in err and "Traceback" not in err
            newest.unlink()
            good += refused and self.resumes_identical(folder)
        return good, total

    def full_disk(self, total: int) -> tuple[int, int]:
        """A limit on file size that a checkpoint's write runs into."""
        good = 0
        for _ in range(total):
            folder = self.stopped()
            size = int(
                self.rng.uniform(0.1, 0.9) * list_checkpoints(folder / "checkpoint")[-1].stat().st_size
            )

            def starve(size: int = size) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

            code, _, err = finish(start(self.recipe, folder, "--resume", preexec_fn=starve))
            good += code == 2 and "Traceback" not in err and self.resumes_identical(folder)
        return good, total

    def rank_killed(self, total: int) -> tuple[int, int]:
        """One of two processes killed: the job ends within a minute, and two processes resume it.

        Identical to an undisturbed run on two processes, whose dropout differs from one process's.
        """
        whole = self.folder()
        code, _, err = finish(start(self.recipe, whole, processes=2))
        assert code == 0, err
        wanted, good = content(whole), 0
        for _ in range(total):
            folder = self.folder()
            process = start(self.recipe, folder, processes=2)
            while not list_checkpoints(folder / "checkpoint"):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.002)
            time.sleep(self.rng.uniform(0, 0.5 * self.training_seconds))
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            signal_at = time.monotonic()
            if children:
                os.kill(int(children[-1]), signal.SIGKILL)
            code, _, _ = finish(process)
            quick = time.monotonic() - signal_at < 60
            code, _, err = finish(start(self.recipe, folder, "--resume", processes=2))
            same = code == 0 and content(folder) == wanted
            if not same:
                print(err, file=sys.stderr)
            good += quick and same
        return good, total


if __name__ == "__main__":
    sys.exit(main())
