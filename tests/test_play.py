"""The playground's web page in a real browser, and its HTTP API. It needs gradio: `make test-play`."""

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # as train.playground sets it
pytest.importorskip("gradio", reason="gradio is not installed here; make test-play installs it")

import gradio_client
from browser import CHROMIUM, Browser
from test_playground import ODD_TEXTS, SCRIPT, TEXT, folders, shared, state_of  # noqa: F401

from train.playground import __main__ as command
from train.playground import app
from train.playground.page import describe
from train.playground.served import LONGEST_TEXT, Knobs

CONNECTED = []  # the addresses that this process has connected to


def _record(event, values):
    if event == "socket.connect":
        CONNECTED.append(values[1])


sys.addaudithook(_record)


@pytest.fixture(scope="module")
def page(shared):  # noqa: F811
    """The served model, and the host and port of its page."""
    demo, url = app.launch(shared)
    yield shared, url.removeprefix("http://").rstrip("/")
    demo.close(verbose=False)


def request(host, method, path, body=None, **headers):
    """The status and the body of an answer."""
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


# The values of those parameters that a test leaves out: scale, rank, layers.
DEFAULTS = {"predict": 2, "influence": 2, "accuracy": 2}


def call(host, function, *values):
    """The result of a function of the HTTP API, or the message of its error."""
    if function in DEFAULTS:
        values = (*values, *(1, None, None)[len(values) - DEFAULTS[function] :])
    status, body = request(host, "POST", f"/gradio_api/run/{function}", json.dumps({"data": values}))
    found = json.loads(body)
    return found["data"][0] if status == 200 else found["error"]


def test_the_api_gives_the_numbers_of_the_page(page):
    served, host = page
    run = served.runs["one"]
    on = list(run.layers)[:2]
    knobs = Knobs(-1, 1, tuple(on))
    assert call(host, "predict", "one", TEXT) == served.classify("one", TEXT, Knobs())
    assert call(host, "predict", "one", TEXT, -1, 1, on) == served.classify("one", TEXT, knobs)
    pieces, label = served.influence("one", TEXT, knobs)
    assert call(host, "influence", "one", TEXT, -1, 1, on) == {
        "label": label,
        "pieces": [list(piece) for piece in pieces],
    }
    for part in ("sample", "test"):
        *_, (rows, scores) = served.score("one", knobs, part)
        found = call(host, "accuracy", "one", part, -1, 1, on)
        assert (found["rows"], found["accuracy"]) == (rows, scores.accuracy)
        assert found["confusion_matrix"] == scores.confusion.tolist()
    assert call(host, "excitation", "one", TEXT)["norms"] == served.excitation("one", TEXT)[1]
    weights = {"one": 0.5, "two": -1.0}
    assert call(host, "mix", TEXT, weights) == served.mix(TEXT, weights)
    assert (
        call(host, "merge", "two", TEXT)["digest_after"]
        == served.merge_and_unmerge("two", TEXT)["digest_before"]
    )
    runs = call(host, "runs")
    assert list(runs) == list(served.runs)
    assert runs["one"]["singular_values"] == run.spectra
    client = gradio_client.Client(f"http://{host}", verbose=False, analytics_enabled=False)
    assert client.predict("one", TEXT, api_name="/predict") == served.classify("one", TEXT, Knobs())
    described = json.loads(request(host, "GET", "/gradio_api/info")[1])["named_endpoints"]
    assert set(described) == {
        f"/{name}" for name in ("runs", "predict", "influence", "accuracy", "excitation", "mix", "merge")
    }


def test_500_random_operations_of_four_clients_leave_the_model_unchanged(page):
    served, host = page
    before, outputs = state_of(served), served.classify("one", TEXT, Knobs())

    def visit(seed):
        rng = random.Random(seed)
        failed = 0
        for _ in range(125):
            name = rng.choice(["one", "two", "dora"])
            layers = list(served.runs[name].layers)
            on = rng.sample(layers, rng.randrange(len(layers) + 1))
            values = rng.choice([(), (rng.uniform(-1, 2), rng.randrange(-1, 4), on), (1, None, on), ("x", 2)])
            function = rng.choice(["predict", "predict", "predict", "influence", "accuracy", "mix", "merge"])
            start = {
                "mix": (TEXT, {name: rng.uniform(-1, 2)}),
                "merge": (name, TEXT),
                "accuracy": (name, "sample"),
            }
            arguments = start.get(function, (name, TEXT)) + (() if function in ("mix", "merge") else values)
            failed += isinstance(call(host, function, *arguments), str)
        return failed

    with ThreadPoolExecutor(4) as clients:
        failed = sum(clients.map(visit, range(4)))
    assert 25 < failed < 250  # some were meant to fail, and most were not
    assert state_of(served) == before
    assert served.classify("one", TEXT, Knobs()) == outputs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("one", ""), "the text is empty"),
        (("nowhere", TEXT), "run: 'nowhere' is not one of"),
        (("one", "x" * (LONGEST_TEXT + 1)), "the limit is 1,048,576"),
        (("one", TEXT, None), "scale: None"),
        (("one", TEXT, 1, None, "roberta"), "layers: not a list of names"),
        (("dora", TEXT, 0.5), "no scale and no rank"),
        (("one", {"path": "/etc/passwd"}), "the text is not a string"),
    ],
)
def test_the_api_says_what_is_wrong(page, values, message):
    assert message in call(page[1], "predict", *values)


@pytest.mark.parametrize("text", ODD_TEXTS, ids=["control", "script", "1 MB", "emoji"])
def test_the_api_takes_any_text(page, text):
    served, host = page
    assert call(host, "predict", "one", text) == served.classify("one", text, Knobs())


def test_only_the_page_itself_is_served_and_only_here(page, tmp_path):
    _, host = page
    name, port = host.split(":")
    assert name == "127.0.0.1"
    assert request(host, "GET", "/")[0] == 200
    assert request(host, "GET", "/", Host="rebound.example")[0] == 403
    assert (
        request(host, "POST", "/gradio_api/run/runs", '{"data": []}', Origin="http://other.example")[0] == 403
    )
    (tmp_path / "secret").write_text("secret")
    for path in (
        f"/gradio_api/file={tmp_path / 'secret'}", "/gradio_api/file=train/config.py", "/file=/etc/passwd",
        "/gradio_api/proxy=http://other.example/", "/static/../../../../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2frequirements.txt", "/monitoring", "/docs", "/gradio_api/app_id",
    ):  # fmt: skip
        status, body = request(host, "GET", path)
        assert status in (403, 404), path
        assert "secret" not in body
        assert "root:" not in body
    assert request(host, "POST", "/gradio_api/upload", "x")[0] == 404
    assert request(host, "POST", "/gradio_api/run/predict", "x" * (14 * 2**20))[0] == 413
    chunked = request(
        host, "POST", "/gradio_api/run/predict", iter([b"x"]), **{"Transfer-Encoding": "chunked"}
    )
    assert chunked[0] == 413
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; it only chooses the address of this machine
        own = probe.getsockname()[0]
    with pytest.raises(OSError), socket.create_connection((own, int(port)), timeout=5):  # noqa: PT011
        pass
    others = [
        address for address in CONNECTED if address[0] not in ("127.0.0.1", "localhost", "192.0.2.1", own)
    ]
    assert not others


@pytest.mark.parametrize("busy", [False, True])
def test_ctrl_c_ends_the_server(page, folders, busy):  # noqa: F811
    script = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from train.playground import served; batch_logits = served.batch_logits;"
        "served.batch_logits = lambda *values: time.sleep(4) or batch_logits(*values);"
        "from train.playground.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )  # a test runner may have started this process with SIGINT ignored
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folders / "one")], stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("open http"):
            break
    host = lines[-1].split()[1].removeprefix("http://").rstrip("/")
    assert request(host, "GET", "/")[0] == 200
    with ThreadPoolExecutor(1) as visitor:  # who is waiting for a long answer
        if busy:
            visitor.submit(call, host, "accuracy", "one", "sample")
            time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert "Traceback" not in process.stderr.read()
    with pytest.raises(OSError):  # noqa: PT011
        request(host, "GET", "/")


def test_without_a_run_the_quickstart_is_trained_first(monkeypatch, capsys, tmp_path, folders):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    trained, served = [], []

    def train(arguments):
        trained.append(arguments)
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "quickstart").symlink_to(folders / "one")
        return 0

    started = []
    monkeypatch.setattr("train.cli.main", lambda arguments: started.append(arguments) or 130)
    assert command.main([]) == 130  # stopped while it trains
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "config.toml").touch()
    assert command.main([]) == 130
    assert started == [["--output", "runs/quickstart"], ["--output", "runs/quickstart", "--resume"]]
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr("train.cli.main", train)
    monkeypatch.setattr(app, "serve", lambda runs, report: served.append(runs))
    assert command.main([]) == 0
    assert trained == [["--output", "runs/quickstart"]]
    assert served == [[Path("runs/quickstart")]]
    assert "there is no finished run in runs/; training the quickstart first" in capsys.readouterr().err
    assert command.main([str(tmp_path / "runs" / "quickstart")]) == 0
    assert len(trained) == 1


# What a visitor does, in JavaScript.
SLIDE = """(selector, value) => {
  const slider = document.querySelector(selector + ' input[type=range]');
  slider.value = value;
  slider.dispatchEvent(new Event('input', {bubbles: true}));
  slider.dispatchEvent(new Event('change', {bubbles: true}));
}"""
TYPE = """(text) => {
  const box = document.querySelector('#text textarea');
  Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(box, text);
  box.dispatchEvent(new Event('input', {bubbles: true}));
}"""
CLICK = """(selector, words) => {
  const found = [...document.querySelectorAll(selector)].filter(e => !words || e.innerText.trim() === words);
  if (found.length !== 1) throw new Error(found.length + ' elements match ' + selector + ' ' + words);
  found[0].click();
}"""
PICK = """async (number) => {
  const input = document.querySelector('#example input');
  input.focus();
  await new Promise(done => setTimeout(done, 300));
  const options = document.querySelectorAll('#example ul li');
  options[number].dispatchEvent(new MouseEvent('mousedown', {bubbles: true, cancelable: true}));
  return options.length;
}"""
PROBABILITIES = """(selector) => [...document.querySelectorAll(selector + ' tbody tr')].map(
  row => [...row.querySelectorAll('[data-p]')].map(cell => Number(cell.dataset.p)))"""
CUT_OFF = """() => [...document.querySelectorAll('.gradio-container *')].filter(e => {
  const box = e.getBoundingClientRect(), style = getComputedStyle(e);
  if (!box.width || style.visibility === 'hidden') return false;
  if (e.closest('textarea, input, .scroll:has(.heat), .hide, svg')) return false;
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) return false;
  for (let outer = e; outer && !outer.matches('.gradio-container'); outer = outer.parentElement) {
    const around = outer.getBoundingClientRect(), clips = getComputedStyle(outer);
    if (clips.overflowX !== 'visible' && around.width && box.right > around.right + 1) return true;
    if (clips.overflowY !== 'visible' && around.height && box.bottom > around.bottom + 1) return true;
  }
  const wide = e.scrollWidth > e.clientWidth + 1 && style.display !== 'inline';
  return wide || box.left < 0 || box.right > innerWidth + 1;
}).map(e => e.tagName + ' ' + e.className + ': ' + e.innerText.slice(0, 60))"""


class Visitor:
    """A browser on the page."""

    def __init__(self, browser, served):
        self.browser, self.served = browser, served

    def do(self, function, *values):
        return self.browser.ask(f"({function})({', '.join(map(json.dumps, values))})")

    def text(self, selector):
        return self.browser.ask(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def until(self, condition, what):
        """Waits until the condition holds; the limit only ends a test that would never end."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.05)

    def shows(self, name, text, knobs):
        """Waits for the probabilities of a text, to the six digits of the page."""
        found = self.served.classify(name, text, knobs)
        columns = [found[key] for key in ("base", "adapter", "knobs")]
        rows = [[round(p, 6) for p in row] for row in zip(*columns, strict=True)]
        self.until(lambda: self.do(PROBABILITIES, "#probabilities") == rows, (name, knobs, rows))

    def scores(self, name, knobs):
        """Waits for the accuracy on the sample."""
        *_, (rows, scores) = self.served.score(name, knobs)
        words = describe(self.served.runs[name], knobs)
        wanted = f"{100 * scores.accuracy:.2f}% of {rows} validation articles correct {words} 95% interval "
        self.until(lambda: " ".join(self.text("#accuracy").split()).startswith(wanted), (wanted, name, knobs))


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_every_control_in_a_browser(page, tmp_path, width, scheme):
    served, host = page
    before = state_of(served)
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with Browser(tmp_path / "profile") as browser:
        visitor = Visitor(browser, served)
        browser.show(width, 900, scheme)
        browser.open(f"http://{host}/")
        drive(visitor)
        assert visitor.browser.ask("document.querySelectorAll('.toast-body').length") == 0
        dark = browser.ask("document.body.classList.contains('dark')")
        assert dark == (scheme == "dark")
        for name in ("one", "dora"):
            visitor.do(CLICK, "#run label", name)
            visitor.shows(name, TEXT, Knobs())
            visitor.scores(name, Knobs())
            assert browser.ask("document.documentElement.scrollWidth") <= width
            height = browser.ask("document.documentElement.scrollHeight")
            browser.show(width, height, scheme)
            assert visitor.do(CUT_OFF) == []
            browser.screenshot(shots / f"playground-{name}-{width}-{scheme}.png")
            browser.show(width, 900, scheme)
    asked = [
        e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"
    ]
    assert any(url.startswith(f"http://{host}/gradio_api/queue/join") for url in asked)
    assert not [url for url in asked if not url.startswith((f"http://{host}/", "data:", "blob:"))]
    assert not [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not [e for e in browser.events if e["method"] == "Runtime.consoleAPICalled"]
    assert state_of(served) == before


def drive(visitor):
    """Uses every control of the page and compares what it shows with what the model computes."""
    served, do = visitor.served, visitor.do
    run = served.runs["one"]
    layers = list(run.layers)
    visitor.shows("one", run.examples[0].text, Knobs())
    visitor.scores("one", Knobs())

    # try
    do(TYPE, TEXT)
    visitor.shows("one", TEXT, Knobs())
    wrong = next(number for number, each in enumerate(run.examples) if each.wrong)
    assert do(PICK, wrong) == len(run.examples)
    visitor.shows("one", run.examples[wrong].text, Knobs())
    do(TYPE, "")
    visitor.until(lambda: "the text is empty" in visitor.text("#probabilities"), "empty")
    for odd in (SCRIPT, "\x07bell \u202eesrever"):
        do(TYPE, odd)
        visitor.shows("one", odd, Knobs())
        written = odd.replace("\x07", "[U+0007]").replace("\u202e", "[U+202E]")
        visitor.until(lambda written=written: visitor.text("#tokens .tokens") == written, written)
    assert visitor.browser.ask("window.hit === undefined")
    do(TYPE, TEXT)
    visitor.until(lambda: visitor.text("#tokens .tokens") == TEXT, "tokens")

    # turn the knobs
    do(SLIDE, "#scale", -1)
    visitor.shows("one", TEXT, Knobs(-1))
    visitor.scores("one", Knobs(-1))
    do(SLIDE, "#rank", 1)
    visitor.shows("one", TEXT, Knobs(-1, 1))
    visitor.until(
        lambda: visitor.browser.ask("document.querySelectorAll('#spectra .cut').length") == 8, "cut"
    )
    do(CLICK, "#layers label", "0 query")
    visitor.shows("one", TEXT, Knobs(-1, 1, tuple(layers[1:])))
    visitor.scores("one", Knobs(-1, 1, tuple(layers[1:])))
    visitor.until(lambda: "one, scale -1, rank 1, without 0 query" in visitor.text("#curve"), "curve")
    assert visitor.browser.ask("document.querySelectorAll('#curve circle').length") >= 3
    for preset, knobs in {
        "rank 1": Knobs(rank=1), "only the top block": Knobs(layers=tuple(layers[2:])), "opposite": Knobs(-1),
        "base": Knobs(layers=()), "the adapter": Knobs(),
    }.items():  # fmt: skip
        do(CLICK, "#presets button", preset)
        visitor.shows("one", TEXT, knobs)
    do(CLICK, "#test", None)
    *_, (rows, scores) = served.score("one", Knobs(), "test")
    wanted = f"{100 * scores.accuracy:.2f}% of {rows} test articles correct"
    visitor.until(lambda: wanted in " ".join(visitor.text("#test-score").split()), wanted)
    assert f"macro F1 {scores.macro_f1:.4f}" in visitor.text("#test-score")

    # see inside
    sizes = visitor.browser.ask(
        "[...document.querySelectorAll('[data-size]')].map(e => Number(e.dataset.size))"
    )
    assert sizes == list(run.sizes.values())
    visitor.until(
        lambda: visitor.browser.ask("document.querySelectorAll('#heat td').length") == 4 * 16, "16 tokens"
    )

    # compare and mix
    do(SLIDE, ".weight:nth-child(1)", 2)
    do(SLIDE, ".weight:nth-child(2)", -0.5)
    found = served.mix(TEXT, {"one": 2, "two": -0.5})
    columns = [*found["runs"].values(), found["sum"]]
    mixed = [[round(p, 6) for p in row] for row in zip(*columns, strict=True)]
    visitor.until(lambda: do(PROBABILITIES, "#mixed") == mixed, "mixed")
    assert visitor.browser.ask("document.querySelector('.weight:nth-child(3) input').disabled")

    # merge
    do(CLICK, "#merge", None)
    visitor.until(lambda: "The weights came back bit for bit." in visitor.text("#merged"), "merged")
    assert served.merge_and_unmerge("one", TEXT)["digest_before"] in visitor.text("#merged")

    # another run, with other controls
    visitor.scores("one", Knobs())
    tried = visitor.browser.ask("document.querySelectorAll('#curve circle').length")
    do(CLICK, "#run label", "dora")
    visitor.shows("dora", TEXT, Knobs())
    visitor.until(lambda: "off: the update of a DoRALinear" in visitor.text("#rank"), "off")
    assert visitor.browser.ask("document.querySelector('#rank input').disabled")
    assert "Not shown: the update of a DoRALinear" in visitor.text("#spectra")
    assert visitor.browser.ask("document.querySelector('#scale input').disabled")
    visitor.until(lambda: visitor.text("#curve td").startswith("dora, scale 1"), "curve")
    assert visitor.browser.ask("document.querySelectorAll('#curve circle').length") == tried + 1
    do(CLICK, "#layers label", "0 value")  # which dora does not adapt
    do(CLICK, "#layers label", "1 key")
    visitor.shows("dora", TEXT, Knobs(layers=tuple(served.runs["dora"].layers)[:3]))
