"""The checks of step 9."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.checks.models import HEAD, adapted_tiny_roberta
from learn.oracle import CheckError, expect_error, some
from lora.adapted import lora_layers


def _wanted_names(model: nn.Module) -> set[str]:
    adapters = {f"{name}.{key}" for name in lora_layers(model) for key in ("lora_A", "lora_B")}
    return adapters | {name for name in model.state_dict() if name.startswith(f"{HEAD}.")}


def check_names(step: ModuleType) -> None:
    """adapter_state holds the factors of every adapted layer and the whole head, and nothing of the base."""
    model = adapted_tiny_roberta()
    model.classifier.norm = nn.BatchNorm1d(3)  # a head may have buffers
    model.classifier_norm = nn.LayerNorm(3)  # beside the head, not inside it
    state, wanted = step.adapter_state(model, HEAD), _wanted_names(model)
    if not isinstance(state, dict):
        raise CheckError(f"adapter_state(model, {HEAD!r})", expected="a dict", got=f"{type(state).__name__}")
    missing, extra = wanted - state.keys(), state.keys() - wanted
    if not (missing or extra):
        return
    why = []
    if missing and not any(name.startswith(f"{HEAD}.") for name in state):
        why.append(
            "The head is not saved. It was trained from random values that a fresh model does not have: "
            "without it the adapter's features go into a head that knows nothing."
        )
    elif missing and missing <= {name for name, _ in model.named_buffers()}:
        why.append("Buffers are missing: the statistics of a normalisation. model.state_dict() has them.")
    if extra:
        why.append(
            "The base is saved too. Everybody has it already: an adapter's file stays small without it."
        )
    raise CheckError(
        f"the names in adapter_state(model, {HEAD!r})",
        expected=f"{len(wanted)}",
        got=f"{len(state)}; missing: {some(missing)}; superfluous: {some(extra)}",
        why="\n".join(why),
    )


def check_copies(step: ModuleType) -> None:
    """adapter_state holds copies: training on does not change a state that was taken before."""
    model = adapted_tiny_roberta()
    state = step.adapter_state(model, HEAD)
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for name, tensor in state.items():
        if not torch.equal(tensor, before[name]):
            raise CheckError(
                f"{name} in the state, after a step of training",
                expected="unchanged",
                got="changed",
                why="The state shares memory with the model. Copy: tensor.detach().clone().",
            )


def check_round_trip(step: ModuleType) -> str:
    """After training on a small task, a fresh model with the loaded state gives the same outputs."""
    model = adapted_tiny_roberta(seed=1)
    ids = torch.randint(5, 60, (24, 6))
    labels = ids[:, 1] % 3  # the class is the second token, modulo 3
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(25):
        F.cross_entropy(model(ids).logits, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    state = step.adapter_state(model, HEAD)
    fresh, headless = adapted_tiny_roberta(seed=2), adapted_tiny_roberta(seed=2)
    try:
        step.load_adapter_state(fresh, dict(sorted(state.items(), reverse=True)), HEAD)
    except ValueError as error:
        what = (
            "load_adapter_state(fresh, state, head), with the names in another order, as a file may have them"
        )
        raise CheckError(what, expected="the state is loaded", got=f"ValueError: {error}") from error
    headless.load_state_dict({k: v for k, v in state.items() if not k.startswith(f"{HEAD}.")}, strict=False)
    with torch.no_grad():
        wanted, got, without = (each(ids).logits for each in (model, fresh, headless))
    if not torch.equal(wanted, got):
        raise CheckError(
            "the logits of a fresh model after load_adapter_state",
            expected="those of the trained model",
            got=f"other values, by up to {(got - wanted).abs().max():.3g}",
        )

    def accuracy(logits: Tensor) -> float:
        return (logits.argmax(1) == labels).double().mean().item()

    return (
        f"Accuracy on the training rows: {accuracy(got):.0%} with adapter and head, "
        f"{accuracy(without):.0%} with the adapter and a new head; guessing gives 33%."
    )


def check_strict(step: ModuleType) -> None:
    """A tensor that is missing, superfluous or of another shape raises ValueError, before any write."""
    for change, what in (
        ("missing", "lacks the head's output layer"),
        ("extra", "has a tensor that the model does not have"),
        ("base", "has a weight of the base"),
        ("shape", "has a tensor of another shape"),
    ):
        state = {k: v.clone() for k, v in adapted_tiny_roberta(seed=1).state_dict().items()}
        model = adapted_tiny_roberta(seed=2)
        state = {name: state[name] for name in sorted(_wanted_names(model), reverse=True)}
        last = f"{HEAD}.out_proj.weight"
        tensor = state.pop(last)
        if change != "missing":
            state[last] = tensor
        if change == "extra":
            state["roberta.pooler.lora_A"] = torch.zeros(2, 2)
        if change == "base":
            state["roberta.encoder.layer.0.attention.self.query.weight"] = torch.zeros(32, 32)
        if change == "shape":
            state[f"{HEAD}.out_proj.weight"] = torch.zeros(5, 32)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        why = "Silence here means a model that runs with random weights where the adapter's should be."
        expect_error(
            f"load_adapter_state, the state {what}",
            ValueError,
            step.load_adapter_state,
            model,
            state,
            HEAD,
            why=why,
        )
        if any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()):
            raise CheckError(
                f"the model, after a state that {what}",
                expected="unchanged",
                got="partly overwritten",
                why="Compare names and shapes before the first write.",
            )


CHECKS = (check_names, check_copies, check_round_trip, check_strict)
