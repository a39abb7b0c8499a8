"""The checks of step 5."""

from types import ModuleType

from torch import nn

from learn.checks.models import HEAD, adapted_tiny_roberta, roberta_base_shapes
from learn.oracle import CheckError, expect_value, some


def check_freeze(step: ModuleType) -> None:
    """After train_only, the adapters and the head train, and nothing else, as after the library's inject."""
    model = adapted_tiny_roberta()
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for before in (True, False):
        model.requires_grad_(before)
        step.train_only(model, HEAD)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if trained == wanted:
            continue
        missing, extra = sorted(wanted - trained), sorted(trained - wanted)
        why = []
        if missing and all(name.startswith(f"{HEAD}.") for name in missing):
            why.append("The head does not train. It is new and random, so it would stay random.")
        if extra:
            why.append("The base trains too: that is full fine-tuning of these parameters.")
        raise CheckError(
            f"train_only(model, {HEAD!r}), when requires_grad was {before} everywhere",
            expected=f"{len(wanted)} parameters train: those of the adapters and of the head",
            got=f"{len(trained)}; not trained: {some(missing)}; trained: {some(extra)}",
            why="\n".join(why),
        )


def check_sibling(step: ModuleType) -> None:
    """A module beside the head whose name only begins like the head's, classifier_norm, is not the head."""
    model = adapted_tiny_roberta()
    model.classifier_norm = nn.LayerNorm(10)
    model.requires_grad_(False)
    step.train_only(model, HEAD)
    why = f"classifier_norm is not inside {HEAD}: compare with the head's name and a dot."
    if model.classifier_norm.weight.requires_grad:
        what = f"train_only(model, {HEAD!r}), when the model has classifier_norm beside {HEAD}"
        raise CheckError(what, expected="classifier_norm is frozen", got="it trains", why=why)
    model.pre_classifier = nn.Linear(2, 2)  # DistilBERT has one beside its classifier
    model.pre_classifier.requires_grad_(False)
    step.train_only(model, HEAD)
    if model.pre_classifier.weight.requires_grad:
        what = f"train_only(model, {HEAD!r}), when the model has pre_classifier beside {HEAD}"
        raise CheckError(what, expected="pre_classifier is frozen", got="it trains")
    model.requires_grad_(True)
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    what = f"count(…)['head'], when classifier_norm beside {HEAD} trains too"
    expect_value(what, step.count(model, HEAD)["head"], head, {why: head + 20})


def check_roberta_base(step: ModuleType) -> None:
    """The counts of roberta-base, rank 8 on query and value, 4 classes, follow from its shapes."""
    model = roberta_base_shapes()
    total = sum(parameter.numel() for parameter in model.parameters())
    # 12 blocks with two layers of 768 x 768; a dense layer 768 x 768 and an output layer 768 x 4, with biases
    lora, head = 12 * 2 * 8 * (768 + 768), 768 * 768 + 768 + 4 * 768 + 4
    wanted = {"lora": lora, "head": head, "frozen": total - lora - head}
    _expect_counts("count(roberta-base)", step.count(model, HEAD), wanted)


def check_frozen_copy(step: ModuleType) -> None:
    """A frozen copy of the head, which PEFT keeps beside it, and a frozen lora_A count as frozen."""
    model = adapted_tiny_roberta()
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    wanted = _counted(model)
    model.classifier.original_module = nn.Linear(40, 20).requires_grad_(False)
    wanted["frozen"] += 40 * 20 + 20
    _expect_counts(
        f"count, when {HEAD}.original_module is a frozen copy", step.count(model, HEAD), wanted,
        {"The frozen copy is counted as trained. Look at requires_grad, not only at the name.": head + 820},
    )  # fmt: skip
    lora_A = next(p for name, p in model.named_parameters() if name.endswith(".lora_A"))
    lora_A.requires_grad_(False)  # as in the variant LoRA-FA
    wanted["lora"] -= lora_A.numel()
    wanted["frozen"] += lora_A.numel()
    why = "The frozen lora_A is counted as trained. Look at requires_grad, not only at the name."
    mistakes = {why: wanted["lora"] + lora_A.numel()}
    _expect_counts("count, when one lora_A is frozen", step.count(model, HEAD), wanted, mistakes)


def check_shared(step: ModuleType) -> None:
    """A Parameter that two modules share, as tied embeddings are, counts once."""
    model = adapted_tiny_roberta()
    wanted = _counted(model)
    model.tied = nn.Embedding(60, 32)
    model.tied.weight = model.roberta.embeddings.word_embeddings.weight
    got = step.count(model, HEAD)
    twice = wanted["frozen"] + model.tied.weight.numel()
    why = {"The shared Parameter is counted twice. model.named_parameters() returns each one once.": twice}
    _expect_counts("count, when two embeddings share one weight", got, wanted, why)


def _counted(model: nn.Module) -> dict[str, int]:
    """The counts of adapted_tiny_roberta: four layers of 32 x 32, rank 4."""
    head = sum(p.numel() for p in model.get_submodule(HEAD).parameters())
    lora = 4 * 4 * (32 + 32)
    return {"lora": lora, "head": head, "frozen": sum(p.numel() for p in model.parameters()) - lora - head}


def _expect_counts(
    what: str, got: object, wanted: dict[str, int], mistakes: dict[str, int] | None = None
) -> None:
    if not (isinstance(got, dict) and got.keys() == wanted.keys()):
        expect_value(what, got, wanted)
    assert isinstance(got, dict)
    for role, number in wanted.items():
        known = {
            **(mistakes or {}),
            "The head is missing.": number - wanted["head"] if role != "frozen" else -1,
            "The head is counted as frozen.": number + wanted["head"] if role == "frozen" else -1,
        }
        expect_value(f"{what}[{role!r}]", got[role], number, known)


CHECKS = (check_freeze, check_roberta_base, check_frozen_copy, check_shared, check_sibling)
