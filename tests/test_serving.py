"""How people use a model: pipelines, streaming, sampling, static caches, each with tasks and with the router."""

import json
import subprocess
import sys
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, TextIteratorStreamer, pipeline

import hft
from hft.trainers.cli import main

from .test_model import prompts
from .test_router import routed, typical  # noqa: F401 (a fixture)
from .tiny import free_port, grow, tiny_config


@pytest.fixture
def mixed(backbones):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": ["a"], "c": []}, rank=3)
    grow(model)
    return model.eval()


def test_pipeline_with_a_task_routed_and_plain(mixed, tokenizer):
    pipe = pipeline("text-generation", model=mixed, tokenizer=tokenizer)
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    text = "hello there"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    for task in (None, "b", "backbone"):
        named = {} if task is None else {"task": task}
        (answer,) = pipe(text, **named, **options)
        new = mixed.generate(ids, task=task, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert answer["generated_text"] == tokenizer.decode(new, skip_special_tokens=True)
    examples = {"a": "aaaa {}", "b": "zz {} zzzz", "c": "0 {} 0 0"}
    for task, example in examples.items():
        mixed.add_routes(task, [tokenizer(example.format("x" * i))["input_ids"] for i in range(12)])
    for task, example in examples.items():
        ids = tokenizer(example.format("xxx"), return_tensors="pt")["input_ids"]
        assert mixed.route(ids)[0].task == task
        assert pipe(example.format("xxx"), **options) == pipe(example.format("xxx"), task=task, **options)


def test_streaming(routed, tokenizer):  # noqa: F811
    x = typical(1, 3)
    for task in (None, "nli"):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        options = {"max_new_tokens": 6, "do_sample": False, "task": task}
        thread = threading.Thread(target=routed.generate, args=(x,), kwargs={**options, "streamer": streamer})
        thread.start()
        streamed = "".join(streamer)
        thread.join()
        assert streamed == tokenizer.decode(routed.generate(x, **options)[0, x.shape[1] :])


def test_a_generation_config_may_name_the_task(mixed):
    """As a request to a server does, whose only way in is the generation config."""
    x = prompts(2, 6)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None, task="b")
    expected = mixed.generate(x, task="b", max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert mixed.generate(x, generation_config=config).tolist() == expected.tolist()
    assert config.task == "b"
    other = mixed.generate(x, task="c", generation_config=config)
    assert other.tolist() != expected.tolist()
    with pytest.raises(ValueError, match="Unknown task 'bb'"):
        mixed.generate(x, generation_config=GenerationConfig(task="bb"))


def test_sampling_in_a_mixed_batch_is_as_among_its_own(mixed):
    """With the same seed, a row draws the same whatever tasks its neighbours have."""
    x = prompts(3, 6)

    def sample(task):
        torch.manual_seed(4)
        return mixed.generate(x, task=task, max_new_tokens=6, do_sample=True, top_k=0, eos_token_id=None)

    together = sample(["a", "b", None])
    for row, task in enumerate(["a", "b", "backbone"]):
        assert together[row].tolist() == sample(task)[row].tolist()
    assert len({tuple(row[6:]) for row in together.tolist()}) == 3


def test_a_static_cache_compiles_nothing_by_itself_but_for_a_folded_task(mixed):
    """On a GPU; each task would be compiled anew."""

    def disabled(**options) -> bool | None:
        return mixed._prepare_generation_config(None, cache_implementation="static", **options)[0].disable_compile

    assert disabled() and disabled(task="a")
    assert not disabled(disable_compile=False) and not disabled(compile_config=CompileConfig())
    mixed.fold("a")
    assert not disabled()


@pytest.mark.parametrize("implementation", ["static", "offloaded"])
def test_other_caches_give_the_same_answers(mixed, implementation):
    if implementation == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloading a cache needs a GPU")
    x = prompts(3, 6)
    options = {"task": ["a", None, "b"], "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = mixed.generate(x, **options)
    assert mixed.generate(x, cache_implementation=implementation, **options).tolist() == expected.tolist()


def test_prompt_lookup_gives_the_same_answer(mixed):
    x = prompts(1, 3).repeat(1, 4)
    options = {"task": "b", "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = mixed.generate(x, **options)
    assert mixed.generate(x, prompt_lookup_num_tokens=3, **options).tolist() == expected.tolist()


def test_continuous_batching_is_for_a_folded_task(mixed):
    """Its thread asks no router and sees no path: without a folded task the plain backbone would answer."""
    with pytest.raises(ValueError, match="`generate_batch` serves one task: fold it first"):
        mixed.generate_batch([[5, 6, 7]], task="b")
    assert not hasattr(mixed, "init_continuous_batching")  # by which a server falls back to `generate`
    mixed.fold("b")
    assert mixed.init_continuous_batching is not None
    with pytest.raises(ValueError, match="folded for task 'b'"):
        mixed.generate_batch([[5, 6, 7]], task="a")


def test_prompts_may_be_embeddings(mixed):
    x = prompts(2, 6)
    embeds = mixed.get_input_embeddings()(x)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    for task in ("b", "backbone"):
        expected = mixed.generate(x, task=task, **options)[:, 6:]
        assert mixed.generate(inputs_embeds=embeds, task=task, **options).tolist() == expected.tolist()


def test_an_assistant_drafts_for_a_task_that_is_named_or_found(mixed, backbones):
    """Assisted decoding is greedy decoding, whatever the assistant says."""
    assistant = AutoModelForCausalLM.from_pretrained(backbones["llama"]).eval()
    x = prompts(1, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for task in ("b", "backbone"):
        expected = mixed.generate(x, task=task, **options)
        assert mixed.generate(x, task=task, assistant_model=assistant, **options).tolist() == expected.tolist()
        by_place = (None, None, None, None, None, assistant)
        assert mixed.generate(x, *by_place, task=task, **options).tolist() == expected.tolist()
    mixed.add_routes("a", [[5 + i, 6, 7, 8, 9] for i in range(12)])
    mixed.add_routes("b", [row[:6].tolist() for row in [*x, *(prompts(12, 6))]])
    with_route = mixed.generate(x, assistant_model=assistant, return_route=True, **options)
    (route,) = with_route[1]
    assert with_route[0].tolist() == mixed.generate(x, task=route.task, **options).tolist()
    with pytest.raises(ValueError, match="`assistant_model` is an HFT model, too"):
        mixed.generate(x, task="b", assistant_model=mixed, **options)
    with pytest.raises(TypeError, match="multiple values for argument 'assistant_model'"):
        mixed.generate(x, *by_place, assistant_model=assistant)


@pytest.mark.parametrize("task", ["b", "backbone", None])
def test_a_model_that_drafts_by_early_exit_asks_the_router_once(mixed, monkeypatch, task):
    """And makes its path once. Its own first layers draft, on the same task, or the backbone's where that answers."""
    for other, low in (("a", 5), ("c", 130)):
        mixed.add_routes(other, [[low + i, low + 2, low + 3] for i in range(12)])
    asked, ask, made, make = [], mixed.hft_router.route, [], mixed._path
    monkeypatch.setattr(mixed.hft_router, "route", lambda *args: asked.append(1) or ask(*args))
    monkeypatch.setattr(mixed, "_path", lambda *args, **options: made.append(1) or make(*args, **options))
    mixed.remove_task("c")
    x = torch.tensor([[133, 132, 133]])  # so that the backbone answers it
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_route": True, "task": task}
    expected, (route,) = mixed.generate(x, **options)
    assert route.task == (task or "backbone")
    asked.clear()
    made.clear()
    for early in ({"assistant_early_exit": 1}, {"generation_config": GenerationConfig(assistant_early_exit=1)}):
        assert mixed.generate(x, **early, **options)[0].tolist() == expected.tolist()
    assert len(asked) == (2 if task is None else 0) and len(made) == 2  # once for each of the two answers
    assert mixed.config.text_config.num_hidden_layers == 2


def test_a_thread_may_route_while_another_drafts_by_early_exit(tmp_path):
    """transformers lowers the number of layers in the configuration meanwhile, and leaves it so after an error."""
    AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=3)).save_pretrained(tmp_path)
    model = hft.HFTForCausalLM.from_backbone(tmp_path, {"a": []})
    model.add_routes("a", [[5 + i, 7, 8] for i in range(12)])
    expected = model.route(prompts(1, 6))
    model.config.text_config.num_hidden_layers = 2
    assert model.route(prompts(1, 6)) == expected


def test_one_thread_routes_while_another_generates(mixed):
    """The router stops a pass after the first layers: its own thread's only."""
    for task, low in (("a", 5), ("c", 130)):
        mixed.add_routes(task, [[low + i, low + 2, low + 3] for i in range(12)])
    x, failed, ended = prompts(1, 6), [], threading.Event()
    expected = mixed.generate(x, task="b", max_new_tokens=30, do_sample=False, eos_token_id=None).tolist()

    def keep_routing():
        try:
            while not ended.is_set():
                mixed.route(x)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=keep_routing)
    thread.start()
    try:
        for _ in range(3):
            answer = mixed.generate(x, task="b", max_new_tokens=30, do_sample=False, eos_token_id=None)
            assert answer.tolist() == expected
    finally:
        ended.set()
        thread.join()
    assert not failed


def test_the_models_own_generation_config_may_name_the_task(mixed):
    x = prompts(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = {task: mixed.generate(x, task=task, **options).tolist() for task in ("a", "b", "backbone")}
    assert expected["a"] != expected["b"] != expected["backbone"]
    mixed.generation_config.task = "b"
    assert mixed.generate(x, **options).tolist() == expected["b"]
    assert mixed.generate(x, generation_config=GenerationConfig(**options)).tolist() == expected["b"]
    for task in ("a", "backbone"):
        assert mixed.generate(x, task=task, **options).tolist() == expected[task]
        config = GenerationConfig(**options, task=task)
        assert mixed.generate(x, generation_config=config).tolist() == expected[task]
    with mixed.activate("a"):
        assert mixed.generate(x, **options).tolist() == expected["a"]
    mixed.fold("a")
    assert mixed.generate(x, **options).tolist() == expected["a"]
    mixed.unfold()
    rows = mixed.generate(x, task=["a", "b"], num_beams=1, **options).tolist()
    assert rows == [expected["a"][0], expected["b"][1]]


@pytest.mark.parametrize("slim", [True, False])
def test_the_task_that_the_generation_config_names_is_saved(mixed, tmp_path, slim):
    """Also where that configuration was made of a backbone's config.json, as is noted in it."""
    mixed.generation_config._from_model_config = True
    mixed.generation_config.task = "b"
    mixed.save_pretrained(tmp_path, slim=slim)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.task == "b" and mixed.generation_config._from_model_config
    (route,) = loaded.generate(prompts(1, 6), max_new_tokens=1, return_route=True)[1]
    assert (route.task, route.reason) == ("b", "named by the caller")


def test_guidance_guides_a_task_by_itself(mixed):
    """Both passes of classifier-free guidance are on the task's path, as when it is folded."""
    x = prompts(1, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "guidance_scale": 3.0, "eos_token_id": None}
    answers = [mixed.generate(x, task="b", **options).tolist()]
    answers += [mixed.generate(x, task="b", generation_config=GenerationConfig(**options)).tolist()]
    mixed.fold("b")
    expected = mixed.generate(x, **options).tolist()
    mixed.unfold()
    assert answers == [expected] * 2
    with pytest.raises(ValueError, match=r"`guidance_scale` needs one task for all prompts, and these have a, b; gen"):
        mixed.generate(prompts(2, 6), task=["a", "b"], **options)


def test_pads_do_not_count_with_a_configuration_that_names_none(routed):  # noqa: F811
    """transformers takes ids that a configuration lacks from the model's own."""
    x = typical(1, 3)
    padded = torch.cat([torch.zeros(1, 20, dtype=torch.long), x], 1)
    config = GenerationConfig(max_new_tokens=2)
    (expected,) = routed.generate(padded, max_new_tokens=2, return_route=True)[1]
    (route,) = routed.generate(padded, generation_config=config, return_route=True)[1]
    assert route.probabilities == expected.probabilities
    assert route.probabilities == pytest.approx(routed.route(x)[0].probabilities, abs=1e-4)


def test_the_server_answers_with_tasks_and_says_what_a_request_has_wrong(mixed, tokenizer, tmp_path):
    openai = pytest.importorskip("openai")
    folder, port = str(tmp_path / "model"), free_port()
    mixed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = [sys.executable, "-m", "hft.trainers.cli", "serve", folder, "--port", str(port)]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            chat = [{"role": "user", "content": "hello there"}]

            def ask(task: str) -> str:
                options = json.dumps({"task": task, "max_new_tokens": 5, "do_sample": False})
                made = client.chat.completions.create(
                    model=folder, messages=chat, extra_body={"generation_config": options}
                )
                return made.choices[0].message.content

            while True:
                try:
                    answer = ask("b")
                    break
                except openai.APIConnectionError:
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.5)
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            for task in ("a", "b", "backbone"):
                new = mixed.generate(ids, task=task, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
                assert ask(task) == tokenizer.decode(new, skip_special_tokens=True)
            assert answer == ask("b") != ask("backbone")
            with pytest.raises(openai.BadRequestError, match=r"Unknown task 'bb'. Did you mean 'b'\?"):
                ask("bb")
        finally:
            server.terminate()


def test_without_the_servers_packages_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers.cli.transformers", None)
    assert main(["serve", "M"]) == 1 and "transformers[serving]" in capsys.readouterr().err
