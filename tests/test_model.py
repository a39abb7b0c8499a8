"""load_base: the embedded encoder equals its BERT; folders and names give a model or a clear error."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import BertModel

from model import ModelError, load_base
from model.minilm import PACKAGE
from model.packages import package_folder


@torch.no_grad()
def test_minilm_equals_its_bert_at_every_attended_position():
    model, tokenizer = load_base("minilm")
    bert = BertModel.from_pretrained(package_folder(PACKAGE) / "model").eval()
    texts = ["Shares rose.", "The striker scored twice in the final, and the cup went north " * 30, "A phone"]
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] > 300
    assert (batch["attention_mask"] == 0).any()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    attended = batch["attention_mask"].bool()
    ours, theirs = model.roberta(**inputs).last_hidden_state, bert(**inputs).last_hidden_state
    assert torch.equal(ours[attended], theirs[attended])


def test_the_tokenizer_neither_pads_nor_cuts_by_itself():
    _, tokenizer = load_base("minilm")
    assert len(tokenizer("word " * 400)["input_ids"]) == 402
    assert tokenizer("Hello")["input_ids"] == tokenizer("hello")["input_ids"]


def test_the_head_and_random_weights_follow_from_the_seed_alone():
    first, _ = load_base("random:minilm", seed=3)
    torch.rand(7)
    state = torch.get_rng_state()
    again, _ = load_base("random:minilm", seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone
    other, _ = load_base("random:minilm", seed=4)
    weights = [m.roberta.encoder.layer[0].attention.self.query.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_labels_and_dropout_reach_the_model():
    model, _ = load_base("random:minilm", num_labels=2, labels=("no", "yes"), dropout=0.25)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.roberta.embeddings.dropout.p == 0.25
    assert not model.training


def test_a_tokenizer_in_python_is_a_clear_error(hub_folder, monkeypatch):
    class SlowTokenizer:
        is_fast = False

    monkeypatch.setattr("model.base.AutoTokenizer.from_pretrained", lambda folder: SlowTokenizer())
    with pytest.raises(ModelError, match=r"SlowTokenizer is not supported; it needs a tokenizer\.json"):
        load_base(str(hub_folder), num_labels=3)


def test_a_folder_loads_with_its_tokenizer_and_a_head_drawn_from_the_seed(hub_folder):
    model, tokenizer = load_base(str(hub_folder), num_labels=3, seed=1)
    again, _ = load_base(str(hub_folder), num_labels=3, seed=1)
    other, _ = load_base(str(hub_folder), num_labels=3, seed=2)
    assert tokenizer("the cup")["input_ids"][0] == 0
    assert torch.equal(model.classifier.dense.weight, again.classifier.dense.weight)
    assert not torch.equal(model.classifier.dense.weight, other.classifier.dense.weight)
    embeddings = [m.roberta.embeddings.word_embeddings.weight for m in (model, other)]
    assert torch.equal(*embeddings)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "a bert"),
        (lambda folder: _edit_config(folder, num_hidden_layers=3), "missing"),
        (lambda folder: _edit_config(folder, hidden_size=64), "does not have the shape"),
        (lambda folder: [(folder / name).unlink() for name in ("vocab.json", "merges.txt")], "no tokenizer"),
    ],
)
def test_a_folder_that_is_no_model_is_a_clear_error(hub_folder, tmp_path, damage, message):
    for file in hub_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_base(str(tmp_path))


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["roberta-base", "someone/some-roberta"])
def test_without_a_hub_the_error_says_what_was_tried_and_what_works(name):
    with pytest.raises(ModelError) as error:
        load_base(name)
    for words in (name, "cache", "--model FOLDER", "make train"):
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "random:gpt", "a/b/c", "no spaces allowed"])
def test_a_name_that_can_be_nothing_is_a_clear_error(name):
    with pytest.raises(ModelError, match=name):
        load_base(name)


def test_a_name_on_the_hub_is_fetched(hub_folder, tmp_path):
    """Against a stub of the hub on this machine, in a process of its own."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.split("?")[0].rsplit("/", 1)[-1]
            files = [{"rfilename": file.name} for file in hub_folder.iterdir()]
            if self.path.startswith("/api/models/team/tiny"):
                info = {"_id": "0", "id": "team/tiny", "sha": "0" * 40, "siblings": files, "private": False}
                if "/tree/" in self.path:
                    info = [
                        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                        for file in hub_folder.iterdir()
                    ]
                self._reply(json.dumps(info).encode(), "application/json")
            elif self.path.startswith("/team/tiny/resolve/") and (hub_folder / name).is_file():
                self._reply((hub_folder / name).read_bytes(), "application/octet-stream")
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def _reply(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = (
        "import transformers\n"
        "from model import load_base\n"
        "transformers.AutoModel.from_pretrained('team/tiny')\n"
        "for _ in range(2):\n"
        "    model, tokenizer = load_base('team/tiny', num_labels=3)\n"
        "    print(model.config.hidden_size, tokenizer('the cup')['input_ids'][0], flush=True)\n"
        "    input()\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
    }
    try:
        # The first time the cache has weights and no tokenizer, as AutoModel leaves it; the second time all
        # is in the cache, and the hub is gone.
        process = subprocess.Popen(
            [sys.executable, "-c", script], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout.readline().split() == ["32", "0"], process.stderr.read()[-2000:]
        server.shutdown()
        server.server_close()
        out, err = process.communicate("\n\n", timeout=120)
        assert (process.returncode, out.split()) == (0, ["32", "0"]), err[-2000:]
    finally:
        server.server_close()
