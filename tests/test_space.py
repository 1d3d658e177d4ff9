"""The Space: what it asks the model, and (slow) one real exchange in a browser."""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import hft

from .tiny import free_port, grow


gr = pytest.importorskip("gradio")
APP = Path(__file__).parent.parent / "examples/space/app.py"
EXAMPLES = {"a": "aaaa {}", "b": "zz {} zzzz", "c": "0 {} 0 0"}
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("space_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(backbones, tokenizer, tmp_path_factory) -> Path:
    """A saved model whose router knows its three tasks from chats."""
    torch.manual_seed(0)
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": ["a"], "c": []}, rank=3)
    grow(model)
    for task, example in EXAMPLES.items():
        chats = [[{"role": "user", "content": example.format("x" * i)}] for i in range(12)]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        model.add_routes(task, [tokenizer.apply_chat_template(chat, **options) for chat in chats])
    folder = tmp_path_factory.mktemp("space") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(app, folder):
    return app.load(str(folder))


def expected(app, loaded, message: str, task: str) -> str:
    """What `generate` gives where the page streams."""
    model, tokenizer = loaded
    inputs = app.tokenize(model, tokenizer, message, "")
    out = model.generate(**inputs, task=task, max_new_tokens=app.MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_router_decides_unless_somebody_chose(app, loaded):
    model, tokenizer = loaded
    for task, example in EXAMPLES.items():
        inputs = app.tokenize(model, tokenizer, example.format("xxx"), "")
        who, why, likely = app.decide(model, inputs, app.ROUTER)
        assert who == task and why == f"probability {likely[task]:.2f}" and set(likely) == set(EXAMPLES)
        for chosen in ("backbone", "b"):
            who, why, _ = app.decide(model, inputs, chosen)
            assert who == chosen and why.startswith(f"your choice; the router says {task}: probability")
    strange = app.tokenize(model, tokenizer, "Q!~" * 40, "")
    assert app.decide(model, strange, app.ROUTER) == ("backbone", "unlike all prompts that the router has seen", {})


def test_a_system_message_comes_first(app, loaded):
    model, tokenizer = loaded
    (ids,) = app.tokenize(model, tokenizer, "hi", "be brief")["input_ids"]
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert ids.tolist() == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_without_a_chat_template_the_message_is_the_prompt(app, loaded, folder):
    plain = AutoTokenizer.from_pretrained(folder)
    plain.chat_template = None
    assert app.tokenize(loaded[0], plain, "hi", "")["input_ids"].tolist() == [plain("hi")["input_ids"]]


@pytest.mark.parametrize(("message", "complaint"), [(" \n", "The message is empty"), ("x" * 600, "takes up to 511")])
def test_messages_that_cannot_be_answered(app, loaded, message, complaint):
    with pytest.raises(gr.Error, match=complaint):
        app.tokenize(*loaded, message, "")


def test_what_is_streamed_is_what_generate_gives(app, loaded):
    model, tokenizer = loaded
    answers = {}
    for task in ("b", "backbone"):
        pieces = list(app.stream(model, tokenizer, app.tokenize(model, tokenizer, "zz x zzzz", ""), task))
        assert len(pieces) > 2 and all(later.startswith(earlier) for earlier, later in itertools.pairwise(pieces))
        answers[task] = pieces[-1]
        assert answers[task] == expected(app, loaded, "zz x zzzz", task)
    assert answers["b"] != answers["backbone"]


def test_a_prompt_near_the_models_end_leaves_room_for_little(app, loaded):
    model, tokenizer = loaded
    inputs = app.tokenize(model, tokenizer, "x" * 505, "")
    room = model.config.text_config.max_position_embeddings - inputs["input_ids"].shape[1]
    *_, answer = app.stream(model, tokenizer, inputs, "backbone")
    assert 0 < room < 9 and 0 < len(answer) <= room


def test_who_stops_listening_stops_the_writer(app, loaded, monkeypatch):
    model, tokenizer = loaded
    tokens = []
    hook = model.register_forward_pre_hook(lambda *_: tokens.append(0))
    monkeypatch.setattr(app, "MAX_NEW_TOKENS", 400)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    answer = app.stream(model, tokenizer, app.tokenize(model, tokenizer, "zz x zzzz", ""), "b")
    next(answer)
    answer.close()
    hook.remove()
    assert 0 < len(tokens) < 200


def test_an_error_while_writing_reaches_the_reader(app, loaded):
    with pytest.raises(ValueError, match="Unknown task 'nobody'"):
        list(app.stream(*loaded, app.tokenize(*loaded, "hi", ""), "nobody"))


def test_the_backbones_tokenizer_is_taken_where_the_model_has_none(app, loaded, tmp_path):
    model, tokenizer = loaded
    model.save_pretrained(tmp_path)
    assert app.load(str(tmp_path))[1].get_vocab() == tokenizer.get_vocab()


def test_a_plain_model_is_refused(app, backbones):
    with pytest.raises(ValueError, match="plain 'llama' without tasks"):
        app.load(str(backbones["llama"]))


def test_it_says_that_a_model_is_needed(app, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.delenv("HFT_MODEL", raising=False)
    with pytest.raises(SystemExit):
        app.main()
    assert "Give a folder or a Hub id, or set HFT_MODEL" in capsys.readouterr().err


@pytest.mark.slow
def test_it_loads_where_the_package_is_missing(folder, tmp_path):
    code = (
        "import runpy, sys\nsys.modules['hft'] = None\n"
        f"model, _ = runpy.run_path({str(APP)!r})['load']({str(folder)!r})\n"
        "print(type(model).__module__.split('.')[0], *model.hierarchy.names)"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")
    assert done.stdout.split() == ["transformers_modules", "a", "c", "b"], done.stderr[-2000:]


@pytest.fixture
def url(folder):
    """The app, started as anyone would, on a free port of loopback."""
    port = free_port()
    environment = {**os.environ, "HFT_MODEL": str(folder), "GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen([sys.executable, APP], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = next((line for line in server.stdout if "Running on local URL" in line), None)
        assert line is not None, "the app did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


def until(condition, what: str, seconds: float = 90):
    """What `condition` gives as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if got := condition():
            return got
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s: {what}")


def printable(text: str) -> str:
    """What a browser shows of a random model's bytes without change."""
    return re.sub(r"[^!-~]", "", text)


@pytest.mark.slow
def test_an_exchange_in_a_browser(app, loaded, url, browser):
    def find(selector):
        return browser.find_elements("css selector", selector)

    def ask(message, number):
        """Who answered, and what."""
        box = find("textarea")[-1]
        until(box.is_enabled, "the message box is ready")
        box.send_keys(message + "\n")
        until(lambda: len(find("#chat .bot .title")) == number, "somebody answers")
        text, since = "", time.monotonic()
        while time.monotonic() < since + (3 if text else 60):  # until the answer has stopped growing
            time.sleep(0.2)
            now = find("#chat .bot .message.thought")[-1].get_attribute("textContent")
            text, since = (now, time.monotonic()) if now != text else (text, since)
        return find("#chat .bot .title")[-1].text, text

    browser.get(url)
    until(lambda: find("#choice label"), "the page is there")
    assert [label.text.strip() for label in find("#choice label")] == [app.ROUTER, "backbone", "a", "c", "b"]
    who, routed = ask("zz xxx zzzz", 1)
    assert re.fullmatch(r"b \(probability [01]\.\d\d\)", who)
    assert printable(routed) == printable(expected(app, loaded, "zz xxx zzzz", "b"))
    assert find("[data-testid=b-confidence-set]")[0].text.split()[0] == "b"

    find("#choice label")[1].click()
    who, plain = ask("zz xxx zzzz", 2)
    assert who.startswith("backbone (your choice; the router says b: probability ")
    assert printable(plain) == printable(expected(app, loaded, "zz xxx zzzz", "backbone")) != printable(routed)
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert fetched and all(name.startswith(url) for name in fetched), "the page needs something from outside"
    ours = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and url in entry["message"]]
    assert not ours
