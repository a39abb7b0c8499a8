"""The anatomy command on tiny runs: what it writes, what it refuses, and the page in a real browser."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from browser import CHROMIUM, Browser

from train.anatomy import __main__ as command
from train.anatomy.run import Position, check_same_start, load_run, position
from train.anatomy.study import study
from train.job import run_job
from train.runs import RunError, newest_run

SCRIPT = "<script>fetch('http://example.invalid/')</script>"


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    return dataclasses.replace(tiny_recipe, r=3, epochs=2, batch_size=8, base_dropout=0.0, log_every_steps=2)


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    """The run to analyse, and others from the same start."""
    folder = tmp_path_factory.mktemp("anatomy")
    changes = {
        "run": {"epochs": 1, "learning_rate": 1e-3},  # makes mistakes
        "rank": {"r": 5},
        "seed": {"seed": 1},
        "which": {"target_modules": ("key",)},
        "full": {"method": "full"},
    }
    for name, change in changes.items():
        run_job(name, dataclasses.replace(recipe, **change), folder / name)
    return folder


@pytest.fixture(scope="module")
def report(runs):
    """The folder that the command writes with every option, and a text that contains markup."""
    arguments = [str(runs / "run"), "--against", *(str(runs / name) for name in ("rank", "seed", "which"))]
    before = {path: path.read_bytes() for path in (runs / "run").rglob("*") if path.is_file()}
    assert command.main([*arguments, "--full", str(runs / "full"), "--text", f"late goal {SCRIPT}"]) == 0
    assert {path: path.read_bytes() for path in before} == before  # the command only adds files
    return runs / "run" / "anatomy"


@pytest.fixture(scope="module")
def facts(report):
    return json.loads((report / "anatomy.json").read_text())


def test_the_numbers_are_those_of_numpy_on_the_files(runs, facts, hub_folder):
    """Computed from the saved adapter and the base model's file, to 1e-6 of the largest value."""
    weights = safetensors.torch.load_file(hub_folder / "model.safetensors")
    adapter = safetensors.torch.load_file(runs / "run" / "adapter" / "adapter_model.safetensors")
    assert len(facts["layers"]) == 4
    for name, layer in facts["layers"].items():
        W = weights[name.removeprefix("roberta.") + ".weight"].double().numpy()
        A, B = (adapter[f"base_model.model.{name}.lora_{X}.weight"].double().numpy() for X in "AB")
        delta = 16 / 3 * B @ A
        S = np.linalg.svd(delta, compute_uv=False)[:3]
        assert S[0] > 1e-4
        U, _, Vh = np.linalg.svd(delta)
        p = S / S.sum()
        base_U, base_S, _ = np.linalg.svd(W)
        tuned_U = np.linalg.svd(W + delta)[0]
        expected = {
            "singular_values": S,
            "delta_norm": np.linalg.norm(delta),
            "weight_norm": np.linalg.norm(W),
            "delta_over_weight": np.linalg.norm(delta) / np.linalg.norm(W),
            "norm_A": np.linalg.norm(A),
            "norm_B": np.linalg.norm(B),
            "effective_rank": np.exp(-(p * np.log(p)).sum()),
            "stable_rank": (S**2).sum() / S[0] ** 2,
            "projected_on_delta": np.linalg.norm(U[:, :3].T @ W @ Vh[:3].T),
            "projected_on_weight": np.linalg.norm(base_S[:3]),
            "projected_on_random": 3 * np.linalg.norm(W) / 32,
            "amplification": np.linalg.norm(delta) / np.linalg.norm(U[:, :3].T @ W @ Vh[:3].T),
            "nearest_cosines": np.abs(tuned_U[:, :10].T @ base_U).max(axis=1),
        }
        for key, value in expected.items():
            assert np.abs(np.asarray(layer[key]) - value).max() <= 1e-6 * np.abs(value).max(), (name, key)


def test_similarity_full_update_and_experiments_equal_independent_computations(runs, facts, report):
    name = "roberta.encoder.layer.0.attention.self.query"
    key = f"base_model.model.{name}.lora_A.weight"
    ours, theirs = (
        np.linalg.svd(
            safetensors.torch.load_file(runs / run / "adapter" / "adapter_model.safetensors")[key]
            .double()
            .numpy(),
            full_matrices=False,
        )[2]
        for run in ("run", "rank")
    )
    similarity = {other["name"]: other for other in facts["similarity"]}
    assert list(similarity) == ["rank", "seed"]  # "which" adapts other weights
    phi = similarity["rank"]["layers"][name]["phi"]
    assert np.shape(phi) == (3, 5)
    assert phi[1][3] == pytest.approx(np.linalg.norm(ours[:2] @ theirs[:4].T) ** 2 / 2, rel=1e-6)
    # one seed draws A row by row: the three rows of r = 3 are the first three of r = 5
    assert similarity["rank"]["layers"][name]["phi_start"][-1][-1] == pytest.approx(1, rel=1e-6)
    assert similarity["seed"]["layers"][name]["phi_start"][-1][-1] < 0.5

    full = load_run(runs / "full", "full")
    update = full.trained.model.get_parameter(f"{name}.weight").detach().double()
    update = (update - load_run(runs / "run").layers[name].weight.double()).numpy()
    S = np.linalg.svd(update, compute_uv=False)
    energies = facts["full"]["layers"][name]["energy"]
    assert np.abs(energies - np.cumsum(S**2) / (S**2).sum()).max() <= 1e-6

    experiments = facts["experiments"]
    assert experiments["whole"]["accuracy"] == facts["run"]["test_accuracy"]
    assert [row["rank"] for row in experiments["truncated"]] == [0, 1, 2, 3]
    assert experiments["truncated"][0] == {"rank": 0, **experiments["off"]}
    assert [row["factor"] for row in experiments["scaled"]][:2] == [-1, 0]
    assert experiments["off"]["loss"] != experiments["whole"]["loss"]
    assert experiments["without_block"].keys() == experiments["only_block"].keys() == {"0", "1"}
    # with two blocks, one disabled means the other alone
    assert experiments["without_block"]["0"] == experiments["only_block"]["1"]
    last = facts["full"]["truncated"][-1]
    assert last["rank"] is None
    assert last["accuracy"] == json.loads((runs / "full" / "summary.json").read_text())["test_accuracy"]
    whole_rank = facts["full"]["truncated"][-2]  # 64, and no matrix here is larger than 32 x 64
    assert whole_rank["loss"] == pytest.approx(last["loss"], rel=1e-5)  # rounded to float32 once more
    assert facts["full"]["truncated"][0]["loss"] != pytest.approx(last["loss"], rel=1e-3)


@pytest.mark.parametrize("start", [True, "pissa", "eva"])
def test_the_change_of_a_is_measured_from_its_initial_value(recipe, tmp_path, start):
    """With a learning rate of almost zero, A keeps the value that seed, weights or data gave it."""
    still = dataclasses.replace(
        recipe, learning_rate=1e-30, weight_decay=0.0, epochs=1, seed=3, init_lora_weights=start
    )
    run_job("still", still, tmp_path / "still")
    for layer in load_run(tmp_path / "still").layers.values():
        assert torch.equal(layer.lora_A, layer.start_A)


def test_runs_on_a_base_in_another_precision_do_not_start_alike(runs):
    run, other = load_run(runs / "run"), load_run(runs / "rank")
    check_same_start(run, other, "--against")
    stored = dataclasses.replace(other, recipe=dataclasses.replace(other.recipe, base_precision="nf4"))
    with pytest.raises(RunError, match="rank: its base_precision is nf4 and that of .*run is fp32"):
        check_same_start(run, stored, "--against")


def test_lora_fa_has_an_anatomy_without_the_gradient_of_a(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("train.anatomy.study.draw_figures", lambda *_: {})
    run_job("fa", dataclasses.replace(recipe, epochs=1, use_lora_fa=True), tmp_path / "fa")
    assert command.main([str(tmp_path / "fa"), "--matrix-only"]) == 0
    folder = tmp_path / "fa" / "anatomy"
    assert "gradient_norm_A" not in json.loads((folder / "anatomy.json").read_text())["telemetry"]["measured"]
    page = (folder / "report.html").read_text()
    assert "<th>‖∂L/∂B‖, step" in page
    assert "<th>‖∂L/∂A‖, step" not in page


def test_an_update_without_low_rank_is_refused(recipe, tmp_path):
    run_job("dora", dataclasses.replace(recipe, epochs=1, use_dora=True), tmp_path / "dora")
    with pytest.raises(RunError, match="the update of a DoRALinear is not scaling·B·A"):
        load_run(tmp_path / "dora")


def test_the_page_contains_everything_and_loads_nothing(report, facts):
    page = (report / "report.html").read_text()
    assert SCRIPT not in page
    assert "&lt;script&gt;fetch(" in page
    assert facts["mistakes"]
    for item in facts["mistakes"]:
        assert item["text"][:20] in page
        assert item["probability"] >= item["probability_of_true"]
    sure = [item["probability"] for item in facts["mistakes"]]
    assert sure == sorted(sure, reverse=True)
    names = {path.name for path in report.iterdir()}
    figures = [name for name in names if name.endswith(".png") and not name.endswith("-dark.png")]
    assert len(figures) >= 20
    assert all(name.replace(".png", "-dark.png") in names for name in figures)
    assert page.count("data:image/png;base64,") == 2 * len(figures)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_in_a_browser(report, tmp_path):
    """Every figure is visible in both schemes and at a phone's width, without errors or requests."""
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with Browser(tmp_path / "profile") as browser:
        for width, height, scheme in ((1200, 900, "light"), (390, 844, "dark")):
            browser.show(width, height, scheme)
            browser.open((report / "report.html").as_uri())
            images = browser.ask(
                "Promise.all([...document.images].map(image => image.decode().then(() => {"
                "const box = image.getBoundingClientRect();"
                "return [image.alt, image.naturalWidth, box.width, box.height, box.left, box.right,"
                " image.currentSrc === image.src]})))"
            )
            assert len(images) >= 20
            for alt, natural, wide, high, left, right, is_light in images:
                assert alt
                assert natural > 300
                assert wide > 200, alt
                assert high > 100, alt
                assert left >= 0, alt
                assert right <= width, alt
                assert is_light == (scheme == "light"), alt
            assert browser.ask("document.documentElement.scrollWidth") <= width  # no horizontal scrolling
            background = browser.ask("getComputedStyle(document.body).backgroundColor")
            assert background == {"light": "rgb(246, 248, 250)", "dark": "rgb(13, 17, 23)"}[scheme]
            browser.screenshot(shots / f"report-{width}-{scheme}.png")
    kinds = {event["method"] for event in browser.events}
    assert "Network.requestWillBeSent" in kinds  # the page itself, so requests are recorded
    asked = [
        e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"
    ]
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in asked) == 2
    assert not [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not [e for e in browser.events if e["method"] == "Runtime.consoleAPICalled"]


def test_without_data_the_matrix_parts_are_written(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.anatomy.study.draw_figures", lambda *_: {})
    shutil.copytree(runs / "run", tmp_path / "run", ignore=shutil.ignore_patterns("anatomy"))
    config = (tmp_path / "run" / "config.toml").read_text().splitlines()
    lost = "\n".join('data = "no/such/folder"' if line.startswith("data =") else line for line in config)
    (tmp_path / "run" / "config.toml").write_text(lost)
    assert command.main([str(tmp_path / "run")]) == 0
    assert "matrix parts only" in capsys.readouterr().err
    facts = json.loads((tmp_path / "run" / "anatomy" / "anatomy.json").read_text())
    assert facts["layers"]
    assert facts["experiments"] is facts["trace"] is None
    page = study(tmp_path / "run", matrix_only=True)
    assert "Which parts matter?" not in page.read_text()


def test_a_report_with_scores_is_not_replaced_by_one_without(runs, report, capsys):
    before = (report / "anatomy.json").read_bytes()
    assert command.main([str(runs / "run"), "--matrix-only"]) == 2
    assert f"{report}: it holds a report with scores" in capsys.readouterr().err
    assert (report / "anatomy.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["."], "not a run (there is no config.toml)"),
        (["full"], "full: its method is full; only a LoRA run has an adapter to analyse"),
        (["unfinished"], "python -m train --resume --output"),
        (["damaged"], "summary.json: damaged"),
        (["run", "--full", "seed"], "seed: its method is lora; --full takes a run with method=full"),
        (["run", "--against", "full"], "full: its method is full"),
        (["run", "--against", "run"], "this is the run itself"),
        (["run", "--against", "other"], "other: its model is"),
        (["run", "--text", " "], "--text must not be empty"),
    ],
)
def test_the_command_reports_what_is_wrong(runs, recipe, tmp_path, capsys, monkeypatch, arguments, message):
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder, ignore=shutil.ignore_patterns("anatomy"))
    shutil.copytree(folder / "run", folder / "unfinished")
    (folder / "unfinished" / "summary.json").unlink()
    shutil.copytree(folder / "run", folder / "damaged")
    (folder / "damaged" / "summary.json").write_text("{")
    shutil.copytree(folder / "run", folder / "other")
    shutil.copytree(recipe.model, tmp_path / "base")
    for name in ("config.toml", "adapter/adapter_config.json"):
        text = (folder / "other" / name).read_text()
        (folder / "other" / name).write_text(text.replace(recipe.model, str(tmp_path / "base")))
    monkeypatch.chdir(folder)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("value", [5, [1.0]])
def test_damaged_telemetry_is_an_error(runs, tmp_path, capsys, value):
    run = tmp_path / "run"
    shutil.copytree(runs / "run", run, ignore=shutil.ignore_patterns("anatomy"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**line, "delta_over_weight": value}) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)
    assert command.main([str(run), "--matrix-only"]) == 2
    assert "metrics.jsonl: damaged: delta_over_weight is not one number" in capsys.readouterr().err


def test_data_with_other_classes_than_the_models_is_not_analysed(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.anatomy.study.draw_figures", lambda *_: {})
    run = tmp_path / "run"
    shutil.copytree(runs / "run", run, ignore=shutil.ignore_patterns("anatomy"))
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub("^data = .*$", 'data = "bbc"', text, flags=re.MULTILINE))
    assert command.main([str(run)]) == 0
    assert "bbc: its classes are business, entertainment" in capsys.readouterr().err


def test_the_newest_run_is_the_one_that_finished_last(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([]) == 2
    assert "it holds no finished LoRA run" in capsys.readouterr().err
    shutil.copytree(runs, tmp_path / "runs")
    for age, name in enumerate(("full", "seed", "run", "rank", "which")):
        os.utime(tmp_path / "runs" / name / "summary.json", (1e9 - age, 1e9 - age))
    assert newest_run(Path("runs")) == Path("runs/seed")  # a full run has no adapter


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("roberta.encoder.layer.3.attention.self.query", Position(3, "query")),
        ("roberta.encoder.layer.11.attention.output.dense", Position(11, "attention output")),
        ("roberta.encoder.layer.0.intermediate.dense", Position(0, "intermediate")),
        ("model.layers.2.q_proj", Position(2, "q_proj")),
        ("pooler", Position(-1, "pooler")),
    ],
)
def test_position_of_a_layer_from_its_name(name, expected):
    assert position(name) == expected
