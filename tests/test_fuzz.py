"""Damaged adapter files: each is caught, or changes no output. At least 500 of them, and the intact one."""

import random
import shutil

import pytest
import torch
from conftest import randomise_adapter, tiny_roberta

from lora import AdapterError, LoRALinear, inject, load_adapter, save_adapter
from lora.adapted import has_adapter
from lora.files import CONFIG_FILE, TENSOR_FILE

CASES = 520


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from lora import LoraConfig

    model = tiny_roberta()
    inject(model, LoraConfig(r=2, lora_alpha=4, modules_to_save=("classifier",)))
    randomise_adapter(model)
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    save_adapter(model, folder, base="tiny", metadata={"labels": ["a", "b", "c"]})
    return folder, model


def damage(data: bytes, rng: random.Random) -> bytes:
    """One of: a bit flipped, several, a byte set, a cut, a tail, a swap, a stretch copied or zeroed."""
    changed = bytearray(data)
    kind = rng.choice(["bit", "bits", "byte", "cut", "head", "tail", "swap", "copy", "zero"])
    # half the time in the first 2 KiB, where the header and the metadata are
    reach = len(data) if rng.random() < 0.5 else min(len(data), 2048)
    at, other = rng.randrange(reach), rng.randrange(len(data))
    if kind == "bit":
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == "bits":
        for _ in range(rng.randrange(2, 20)):
            changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        changed[at] = rng.randrange(256)
    elif kind == "cut":
        del changed[rng.randrange(len(data)) :]
    elif kind == "head":
        del changed[: rng.randrange(1, 64)]
    elif kind == "tail":
        changed += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 64)))
    elif kind == "swap":
        changed[at], changed[other] = changed[other], changed[at]
    elif kind == "copy":
        length = rng.randrange(1, 64)
        changed[at : at + length] = changed[other : other + length]
    else:
        length = rng.randrange(1, 64)
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    return bytes(changed)


def load_damaged(intact, folder, make_base, wanted, input_ids, times) -> int:
    """Loads damaged copies of an adapter's folder into a base: an error each, or the outputs `wanted`.

    Returns the number of errors.
    """
    rng, target, caught = random.Random(1), make_base(), 0
    for _ in range(times):
        shutil.copytree(intact, folder, dirs_exist_ok=True)
        name = CONFIG_FILE if rng.random() < 0.2 else TENSOR_FILE
        (folder / name).write_bytes(damage((intact / name).read_bytes(), rng))
        try:
            load_adapter(target, folder)
        except (AdapterError, FileNotFoundError):
            caught += 1
            assert not has_adapter(target)
        else:
            assert torch.equal(target(input_ids).logits, wanted)
            target = make_base()
    return caught


@torch.no_grad()
def test_damaged_files_are_caught_or_harmless(saved, tmp_path, input_ids, recwarn):
    intact, model = saved
    wanted = model(input_ids).logits
    rng = random.Random(0)
    target, folder = tiny_roberta(), tmp_path / "adapter"
    state = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    caught = harmless = 0
    for case in range(CASES):
        shutil.copytree(intact, folder, dirs_exist_ok=True)
        name = CONFIG_FILE if rng.random() < 0.2 else TENSOR_FILE
        original = (intact / name).read_bytes()
        changed = damage(original, rng)
        (folder / name).write_bytes(changed)
        try:
            load_adapter(target, folder)
        except (AdapterError, FileNotFoundError):
            caught += 1
            assert not any(isinstance(module, LoRALinear) for module in target.modules())
            if case % 20 == 0:
                assert all(torch.equal(tensor, state[key]) for key, tensor in target.state_dict().items())
        else:
            assert torch.equal(target(input_ids).logits, wanted), (case, name)
            harmless += 1
            target = tiny_roberta()
    assert caught + harmless == CASES
    assert caught > 0.7 * CASES  # the damage is real
    load_adapter(target, intact)
    assert torch.equal(target(input_ids).logits, wanted)
