"""The router: sums that tasks only add to, decisions with a way back, and answers of the task that was found."""

import copy
import itertools
import re

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import hft
from hft.router_hft import HFTRouter
from hft.trainers.calibration import calibrated_losses
from hft.trainers.routes import prompts_of, template_tokens

from .test_model import prompts
from .test_trainer import make
from .tiny import bits, grow, tiny_config


D = 16


def clusters(names, count=40, spread=0.6):
    """Features of prompts: each task around a centre of its own."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(1, D, generator=generator) * 2 + spread * torch.randn(count, D, generator=generator)
            for name in names}  # fmt: skip


def router_of(features, order):
    router = HFTRouter(hft.HFTRouterConfig(num_features=64), D, 8)
    for name in order:
        router.add(name, features[name][8:], features[name][:8])
    return router


def test_neither_the_order_nor_the_portions_matter():
    features = clusters("abcd")
    queries = torch.cat(list(clusters("wxyz").values()) + list(features.values()))
    tree = hft.Hierarchy({name: [] for name in "abcd"})
    expected = router_of(features, "abcd").route(queries, tree)
    for order in itertools.islice(itertools.permutations("abcd"), 1, 24, 5):
        for one, other in zip(expected, router_of(features, order).route(queries, tree), strict=True):
            assert one.task == other.task
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-9)
            assert one.novelty == pytest.approx(other.novelty, rel=1e-9)
    in_portions = HFTRouter(hft.HFTRouterConfig(num_features=64), D, 8)
    for name in "abcd":
        in_portions.add(name, features[name][8:20], features[name][:4])
        in_portions.add(name, features[name][20:], features[name][4:8])
    for one, other in zip(expected, in_portions.route(queries, tree), strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-9)


def test_the_sums_are_ridge_regression_on_all_prompts_at_once():
    features = clusters("abc")
    router = router_of(features, "cab")
    phi = torch.cat([router.expand(features[name][8:]) for name in "abc"])
    y = torch.nn.functional.one_hot(torch.arange(3).repeat_interleave(32), 3).double()
    gram = phi.T @ phi
    W = torch.linalg.solve(gram + router.config.ridge * gram.diagonal().mean() * torch.eye(64), phi.T @ y)
    torch.testing.assert_close(router._solve().scores(phi), phi @ W, rtol=0, atol=1e-8)


def test_known_prompts_find_their_task_and_strange_ones_the_backbone():
    features = clusters("abcd", count=80)
    tree = hft.Hierarchy({name: [] for name in "abcd"})
    router = router_of({name: its[:40] for name, its in features.items()}, "abcd")
    for name, its in features.items():
        routes = router.route(its[40:], tree)
        assert sum(route.task == name for route in routes) >= 30
        assert routes[0].names == ("a", "b", "c", "d")
    strange = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) * 2
    routes = router.route(strange, tree)
    assert sum(route.task == "backbone" for route in routes) >= 40
    assert any("unlike all prompts" in route.reason for route in routes)


def test_a_task_of_few_prompts_among_tasks_of_many_is_found():
    """Its prompts are farther from all that was seen than theirs are: they have a limit of their own."""
    features = clusters("abcde", count=400, spread=1.0)
    router = HFTRouter(hft.HFTRouterConfig(num_features=512), D, 8)
    for name in "abcd":
        router.add(name, features[name][:200], features[name][200:264])
    router.add("e", features["e"][:12], features["e"][12:16])
    tree = hft.Hierarchy({name: [] for name in "abcde"})
    found = router.route(features["e"][16:], tree)
    assert sum(route.task == "e" for route in found) > 0.8 * len(found)
    others = clusters("abcde" + "vwxyz", count=50, spread=1.0)
    strange = router.route(torch.cat([others[name] for name in "vwxyz"]), tree)
    assert sum(route.task == "backbone" for route in strange) > 0.9 * len(strange)


def test_in_doubt_it_backs_off_to_the_lowest_common_ancestor():
    features = clusters(["b", "e"])
    features["c"] = features["b"] + 0.01 * torch.randn(features["b"].shape, generator=torch.Generator().manual_seed(2))
    router = HFTRouter(hft.HFTRouterConfig(num_features=64, confidence=0.7), D, 8)
    for name, its in features.items():
        router.add(name, its[8:], its[:8])
    for parents, expected in (({"b": ["a"], "c": ["a"]}, "a"), ({"b": [], "c": []}, "backbone"), ({"c": ["b"]}, "b")):
        tree = hft.Hierarchy({"a": [], "b": [], "c": [], "e": [], **parents})
        (route,) = router.route(features["b"][10:11], tree)
        assert route.task == expected, parents
        assert re.fullmatch("not sure between [bc], [bc]", route.reason)
        assert router.route(features["e"][10:11], tree)[0].task == "e"


def test_of_tasks_that_are_as_likely_none_answers():
    features = clusters(["x", "e"])
    features["y"] = features["x"].clone()
    router = router_of(features, "xye")
    for parents, expected in ((["p"], "p"), ([], "backbone")):
        (route,) = router.route(features["x"][10:11], hft.Hierarchy({"p": [], "x": parents, "y": parents, "e": []}))
        assert route.probabilities[1:] == pytest.approx((0.5, 0.5), abs=1e-3)
        assert route.task == expected and re.fullmatch("not sure between [xy], [xy]", route.reason)
    router.config.confidence = 0.0  # whichever is likeliest
    tree = hft.Hierarchy({"x": [], "y": [], "e": []})
    assert [router.route(features[name][10:11], tree)[0].task for name in "ex"] == ["e", "backbone"]
    router.remove("y")  # it may be y's
    (route,) = router.route(features["x"][10:11], hft.Hierarchy({"p": [], "x": ["p"], "e": []}))
    assert route.task == "backbone" and re.fullmatch("not sure between [xy], [xy]", route.reason)


def test_what_is_not_finite_goes_to_the_backbone():
    features = clusters("ab")
    f_BD = features["a"][10:].clone()
    f_BD[0, 3], f_BD[1, 3], f_BD[2], f_BD[3, 0] = torch.inf, torch.nan, torch.nan, -torch.inf
    routes = router_of(features, "ab").route(f_BD, hft.Hierarchy({"a": [], "b": []}))
    broken = "the prompt's hidden states are not finite"
    assert [route.reason for route in routes[:4]] == [broken, broken, "the prompt is empty", broken]
    assert [route.task for route in routes[:6]] == ["backbone"] * 4 + ["a"] * 2


@pytest.fixture
def routed(backbones, tokenizer) -> hft.HFTForCausalLM:
    """sst -> yelp and nli, sealed; the router knows prompts of each, in which one byte prevails."""
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"sst": [], "yelp": ["sst"], "nli": []}, router_config={"num_features": 64}
    )
    grow(model)
    for i, task in enumerate(("sst", "yelp", "nli")):
        model.add_routes(task, [typical(i, seed)[0].tolist() for seed in range(24)])
    return model


def typical(kind: int, seed: int, length: int = 12) -> torch.Tensor:
    ids = prompts(1, length, seed=seed)
    ids[:, ::2] = 50 + 30 * kind
    return ids


def test_generate_asks_the_router_once_a_prompt(routed, monkeypatch):
    asked, ask = [], routed.hft_router.route
    monkeypatch.setattr(routed.hft_router, "route", lambda f_BD, *its: asked.append(len(f_BD)) or ask(f_BD, *its))
    x = torch.cat([typical(kind, seed=100 + kind) for kind in (2, 0, 1)])
    options = {"max_new_tokens": 4, "do_sample": False}
    answers, routes = routed.generate(x, return_route=True, **options)
    assert [route.task for route in routes] == ["nli", "sst", "yelp"] and asked == [3]
    assert answers.tolist() == routed.generate(x, task=["nli", "sst", "yelp"], **options).tolist()
    for i in range(3):
        alone, (route,) = routed.generate(x[i : i + 1], return_route=True, **options)
        assert route.task == routes[i].task
        assert alone[0].tolist() == answers[i].tolist()
    plain, routes = routed.generate(x, task="backbone", return_route=True, **options)
    assert [route.task for route in routes] == ["backbone"] * 3
    backbone = AutoModelForCausalLM.from_pretrained(routed.config.backbone)
    assert plain.tolist() == backbone.generate(x, **options).tolist()
    wide = {**options, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": None}
    beams = routed.generate(x, **wide)
    for i, task in enumerate(("nli", "sst", "yelp")):
        assert beams[2 * i : 2 * i + 2].tolist() == routed.generate(x[i : i + 1], task=task, **wide).tolist()
    with torch.no_grad():
        assert bits(routed(x).logits) == bits(backbone(x).logits)  # `forward` does not route


@pytest.mark.parametrize(
    "more",
    [
        {"cache_implementation": "static"},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "top_k": 0},
    ],
    ids=lambda its: next(iter(its)),
)
def test_each_way_to_generate_is_routed_as_if_the_task_were_named(routed, more):
    x, answers = typical(1, 101), []
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, **more}
    for task in (None, "yelp"):
        torch.manual_seed(4)
        answers.append(routed.generate(x, task=task, **options).tolist())
    assert routed.route(x)[0].task == "yelp" and answers[0] == answers[1]


def test_what_is_reckoned_on_the_cpu_is_whatever_the_default_device(routed):
    """As under `torch.set_default_device("cuda")`."""
    features, tree = clusters("abc"), hft.Hierarchy({"a": [], "b": [], "c": []})
    queries = torch.cat(list(features.values()))
    expected = router_of(features, "abc").route(queries, tree)
    losses = calibrated_losses([[1.0, 0.0], [0.0, 2.0]] * 6, [0, 1] * 6, [["a", "b"]] * 12)
    with torch.device("meta"):
        assert router_of(features, "abc").route(queries, tree) == expected
        assert calibrated_losses([[1.0, 0.0], [0.0, 2.0]] * 6, [0, 1] * 6, [["a", "b"]] * 12) == losses


def test_padding_does_not_change_the_route(routed):
    short, long = typical(0, 200, 6), typical(1, 201, 14)
    batch = torch.zeros(2, 14, dtype=torch.long)
    mask = torch.zeros(2, 14, dtype=torch.long)
    batch[0, 8:], mask[0, 8:] = short, 1
    batch[1], mask[1] = long, 1
    together = routed.route(batch, mask)
    for row, alone in zip(together, (routed.route(short)[0], routed.route(long)[0]), strict=True):
        assert row.task == alone.task
        assert row.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


def test_the_templates_tokens_do_not_count(routed):
    x = typical(1, 300)
    routed.config.router_config.prefix, routed.config.router_config.suffix = [5, 6, 7], [8]
    framed = torch.cat([torch.tensor([[5, 6, 7]]), x, torch.tensor([[8]])], 1)
    mask = torch.ones_like(framed)
    assert routed._own_tokens(framed, mask).tolist() == [[0] * 3 + [1] * 12 + [0]]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), framed], 1)
    its_mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), mask], 1)
    assert routed._own_tokens(padded, its_mask).tolist() == [[0] * 5 + [1] * 12 + [0]]
    assert routed._own_tokens(x, torch.ones_like(x)).all()  # another frame: all tokens count
    only_frame = torch.tensor([[5, 6, 7, 8]])
    assert routed._own_tokens(only_frame, torch.ones_like(only_frame)).all()


def test_only_the_first_layers_run(routed):
    ran = []
    for i, layer in enumerate(routed.base_model.layers):
        layer.register_forward_hook(lambda *args, i=i: ran.append(i))
    routed.route(typical(0, 1))
    assert ran == [0] and routed.hft_router.layer == 1


@pytest.mark.parametrize("slim", [True, False])
def test_the_router_is_saved_and_loaded(routed, tmp_path, slim):
    x = torch.cat([typical(kind, seed=100 + kind) for kind in (2, 0, 1)])
    before = routed.route(x)
    routed.save_pretrained(tmp_path, slim=slim)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.route(x) == before
    assert {name: bits(t) for name, t in loaded.hft_router.tensors().items()} == {
        name: bits(t) for name, t in routed.hft_router.tensors().items()
    }
    size = (tmp_path / "router.safetensors").stat().st_size
    for seed in range(30, 90):
        routed.add_routes("sst", [typical(0, seed + k)[0].tolist() for k in range(8)])
    routed.save_pretrained(tmp_path, slim=slim)
    assert (tmp_path / "router.safetensors").stat().st_size <= size + 64 * 32 * 2  # at most 64 held-out prompts


def test_adding_a_task_leaves_the_sums_of_the_others(routed):
    before = {name: bits(t) for name, t in routed.hft_router.tensors().items() if name.startswith(("cross", "held"))}
    routed.add_task("late")
    routed.add_routes("late", [typical(3, seed)[0].tolist() for seed in range(24)])
    after = {name: bits(t) for name, t in routed.hft_router.tensors().items()}
    assert before.items() <= after.items()
    assert routed.route(typical(3, 99))[0].task == "late"


@pytest.mark.parametrize("slim", [True, False])
def test_prompts_of_a_removed_task_go_to_the_backbone(routed, tmp_path, slim):
    """Not to another task; and what the router says of other tasks' prompts stays as it was."""
    x = torch.cat([typical(kind, seed=100 + kind) for kind in (2, 0, 1)])
    before, sums = routed.route(x), routed.hft_router.tensors()
    assert [route.task for route in before] == ["nli", "sst", "yelp"]
    routed.remove_task("nli")
    route, *others = routed.route(x)
    assert (route.task, route.reason) == ("backbone", "it belongs to nli, which was removed")
    assert others == before[1:] and routed.hft_router.tasks() == ("sst", "yelp")
    routed.save_pretrained(tmp_path, slim=slim)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.router_config.tasks == ["sst", "yelp"] and loaded.route(x) == [route, *others]
    if slim:
        assert AutoModelForCausalLM.from_pretrained(tmp_path, tasks=["sst"]).route(x)[0] == route
    loaded.add_task("nli")  # the router has yet to learn what it is
    assert loaded.route(x)[0] == route
    loaded.add_routes("nli", [typical(2, seed)[0].tolist() for seed in range(24)])
    (again, *others), (likely, *_) = loaded.route(x), before
    assert again.task == "nli" and [other.task for other in others] == ["sst", "yelp"]
    assert again.probabilities == pytest.approx(likely.probabilities, abs=0.02)  # not halved
    after = loaded.hft_router.tensors()
    assert {name: tensor.shape for name, tensor in sums.items()} == {name: t.shape for name, t in after.items()} | {
        "held_out.nli": sums["held_out.nli"].shape  # of these, up to 64
    }


def test_with_the_last_task_the_router_forgets_all(routed):
    for task in ("nli", "yelp", "sst"):
        routed.remove_task(task)
    assert routed.route(typical(0, 1))[0].reason == "the router knows no task"
    assert routed.hft_router.names() == () and not routed.hft_router.tensors()["gram"].any()


def test_a_config_alone_knows_no_prompts(routed, tmp_path):
    """A model that is made of it says so, and what it saves loads again."""
    made = AutoModelForCausalLM.from_config(routed.config)
    assert made.config.router_config.tasks == [] and made.hft_router.tasks() == ()
    assert routed.config.router_config.tasks == ["nli", "sst", "yelp"]
    made.save_pretrained(tmp_path, slim=False)
    assert made.route(typical(0, 1)) == AutoModelForCausalLM.from_pretrained(tmp_path).route(typical(0, 1))


def test_the_trainer_teaches_the_router_and_resumes_with_it(backbones, tokenizer, tmp_path):
    trainer = make(backbones, tokenizer, tmp_path)
    trainer.train()
    assert sorted(trainer.model.config.router_config.tasks) == ["a", "b", "d", "e", "x"]
    x = torch.tensor([tokenizer("t0t plus 3 is")["input_ids"]])
    expected = trainer.model.route(x)
    assert hft.HFTForCausalLM.from_pretrained(tmp_path).route(x) == expected
    resumed = make(backbones, tokenizer, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.route(x) == expected
    off = make(backbones, tokenizer, tmp_path / "off", route_samples=0)
    off.train()
    assert off.model.config.router_config.tasks == [] and not (tmp_path / "off/router.safetensors").exists()
    _answer, (route,) = off.model.generate(x, max_new_tokens=2, return_route=True)
    assert (route.task, route.reason) == ("backbone", "the router was not asked")


def test_prompts_of_all_forms(tokenizer):
    chat = [{"role": "user", "content": "hello"}]
    answer = [{"role": "assistant", "content": "you"}]
    framed = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    for rows, expected in [
        ([{"prompt": "hello", "completion": " you"}], tokenizer("hello")["input_ids"]),
        ([{"prompt": chat, "completion": answer}], framed),
        ([{"messages": chat + answer}], framed),
        ([{"conversations": [{"from": "user", "value": "hello"}, {"from": "assistant", "value": "you"}]}], framed),
        ([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}], [5, 6]),
    ]:
        assert prompts_of(Dataset.from_list(rows), tokenizer, 5) == [expected]
    assert prompts_of(Dataset.from_list([{"text": "hello"}]), tokenizer, 5) == []
    many = Dataset.from_list([{"input_ids": [i, 5], "labels": [-100, 5]} for i in range(9)])  # as if sorted
    assert prompts_of(many, tokenizer, 4) == [[0], [2], [4], [6]]
    before, after = template_tokens(tokenizer)
    silent = copy.deepcopy(tokenizer)
    silent.chat_template = "<|user|>"
    assert template_tokens(silent) == ([], [])
    assert framed == [*before, *tokenizer("hello", add_special_tokens=False)["input_ids"], *after]


def test_wrong_routers(backbones, routed):
    for config, message in [
        ({"layer": 0}, "`layer` of the router is 0; it must be 1 or more."),
        ({"layer": 2}, "`layer` of the router is 2, of 2 that the backbone has; give 1 to 1."),
        ({"ridge": 0.0}, "its `ridge` 0.0 (above 0)"),
        ({"layers": 1}, "`router_config` has the unknown key 'layers'. Did you mean 'layer'?"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, router_config=config)
    with pytest.raises(ValueError, match="Unknown task 'yelb'"):
        routed.add_routes("yelb", [[5, 6], [7, 8]])
    with pytest.raises(ValueError, match=re.escape("The router got 1 prompts of task 'sst'; give two or more.")):
        routed.add_routes("sst", [[5, 6]])


def test_odd_prompts(routed, backbones):
    x = torch.cat([typical(0, 100), typical(1, 101)])
    mask = torch.tensor([[1] * 12, [0] * 12])
    first, second = routed.route(x, mask)
    assert first == routed.route(x[:1])[0]
    assert (second.task, second.reason) == ("backbone", "the prompt is empty")
    with torch.no_grad():
        routed.get_input_embeddings().weight[7] = torch.nan
    broken, alone = routed.route(torch.cat([torch.full((1, 12), 7), x[:1]]))
    assert (broken.task, broken.reason) == ("backbone", "the prompt's hidden states are not finite")
    assert alone.task == first.task
    with pytest.raises(
        ValueError, match=re.escape("`input_ids` has the shape [2, 0]: there are no tokens to route by.")
    ):
        routed.route(torch.empty(2, 0, dtype=torch.long))
    longer = torch.cat([prompts(1, 600), typical(2, 5, 512)], 1)  # the tiny backbone holds 512
    assert routed.route(longer) == routed.route(longer[:, -512:])
    padded = torch.cat([typical(2, 5), torch.zeros(1, 600, dtype=torch.long)], 1)  # on the right, beyond that
    its_mask = (torch.arange(612) < 12).long()[None]
    assert routed.route(padded, its_mask)[0].task == "nli"
    both = torch.cat([padded, longer[:, -612:]]), torch.cat([its_mask, torch.ones_like(its_mask)])
    alone = routed.route(padded, its_mask) + routed.route(longer)
    for one, other in zip(routed.route(*both), alone, strict=True):
        assert one.task == other.task and one.novelty == pytest.approx(other.novelty, abs=1e-5)
    nobody = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []})
    assert [route.reason for route in nobody.route(x)] == ["the router knows no task"] * 2
    with pytest.raises(ValueError, match="`task` names 3 tasks for 2 rows"):
        routed.generate(x, task=["sst", "sst", "nli"])


def test_the_router_looks_without_dropout(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("llama", attention_dropout=0.5)).save_pretrained(tmp_path)
    model = hft.HFTForCausalLM.from_backbone(tmp_path, {"a": []})
    x = [row.tolist() for row in prompts(3, 8)]
    expected = bits(model.features_of(x))
    model.train()
    assert bits(model.features_of(x)) == expected and all(module.training for module in model.modules())
    model.base_model.layers[1].eval()
    model.features_of(x)
    assert not model.base_model.layers[1].training and model.base_model.layers[0].training


def test_new_tokens_after_a_cache_need_a_task(routed):
    x = typical(2, 100)
    with torch.no_grad():
        cache = routed(x[:, :8], task="nli", use_cache=True).past_key_values
    more = {"past_key_values": cache, "attention_mask": torch.ones_like(x), "max_new_tokens": 2, "do_sample": False}
    with pytest.raises(
        ValueError, match=r"has the shape \[1, 12\] for \[1, 4\] tokens, and the router needs whole prompts"
    ):
        routed.generate(x[:, 8:], **more)
    whole = routed.generate(x, task="nli", max_new_tokens=2, do_sample=False)
    assert routed.generate(x[:, 8:], task="nli", **more)[:, 4:].tolist() == whole[:, 12:].tolist()


def test_what_is_not_finite_teaches_nothing(routed):
    before = routed.hft_router.tensors()
    with pytest.raises(ValueError, match=r"Prompt 1 of task 'sst' has no tokens \(1 such\); leave it out."):
        routed.add_routes("sst", [[5, 6], [], [7, 8]])
    bad = torch.randn(4, 32)
    bad[2, 3] = torch.nan
    for some, others in ((bad, bad[:2]), (bad[:2], bad)):
        with pytest.raises(ValueError, match="Hidden states of prompts of task 'sst' are not finite"):
            routed.hft_router.add("sst", some, others)
    after = routed.hft_router.tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_large_hidden_states_do_not_overflow():
    """Some decoders' residual streams leave the range of float16, in which held-out features are kept."""
    router, small = (hft.HFTRouter(hft.HFTRouterConfig(num_features=64), 32, 8) for _ in range(2))
    f_ND = torch.randn(32, 32)
    f_ND[:, 0] += 3
    small.add("a", f_ND[:24], f_ND[24:])
    router.add("a", 3e4 * f_ND[:24], 3e4 * f_ND[24:])
    solved = router._solve()
    torch.testing.assert_close(solved.most_leverage_K, small._solve().most_leverage_K, rtol=1e-3, atol=0)


def test_pads_do_not_count_where_no_mask_is_given(routed):
    """As in transformers, which infers the mask of the very same call."""
    x = typical(0, 100)[:1]
    padded = torch.cat([torch.full((1, 7), routed.config.get_text_config().pad_token_id), x], 1)
    answers = [routed.generate(ids, max_new_tokens=3, return_route=True) for ids in (x, padded)]
    (one,), (other,) = (routes for _, routes in answers)
    assert one.task == other.task == "sst" and one.novelty == pytest.approx(other.novelty)
    assert torch.equal(answers[0][0][:, -3:], answers[1][0][:, -3:])


def test_an_active_task_is_not_asked_for(routed):
    x = torch.cat([typical(0, 100)[:1], prompts(1, 12)])  # of the second the router knows nothing
    named = routed.generate(x, task="nli", max_new_tokens=3)
    rows = routed.generate(x, task=["nli", None], max_new_tokens=3, num_beams=2)
    with routed.activate("nli"):
        answer, routes = routed.generate(x, max_new_tokens=3, return_route=True)
        plain = routed.generate(x, task="backbone", max_new_tokens=3)
    assert torch.equal(answer, named) and [route.task for route in routes] == ["nli", "nli"]
    assert torch.equal(plain, routed.generate(x, task="backbone", max_new_tokens=3))
    with routed.activate(["nli", None]):
        answer, routes = routed.generate(x, max_new_tokens=3, num_beams=2, return_route=True)
    assert torch.equal(answer, rows) and [route.task for route in routes] == ["nli", "backbone"]


def test_the_backbone_may_be_active_and_is_not_asked_for_either(routed):
    x = typical(1, 3)
    options = {"max_new_tokens": 4, "do_sample": False, "return_route": True}
    expected, _ = routed.generate(x, task="backbone", **options)
    with routed.activate("backbone"):
        answer, (route,) = routed.generate(x, **options)
    assert route.task == "backbone" and route.reason == "active around the call"
    assert answer.tolist() == expected.tolist()


def test_threads_that_ask_at_once_see_whole_solutions(monkeypatch):
    """A solution is there for others only once it is calibrated."""
    router = router_of(clusters("abcd"), "abcd")
    calibrate = HFTRouter._calibrate

    def slowly(self, solved, held_out):
        assert self._solved is None
        calibrate(self, solved, held_out)

    monkeypatch.setattr(HFTRouter, "_calibrate", slowly)
    router.route(clusters("a")["a"], hft.Hierarchy({name: [] for name in "abcd"}))
    assert router._solved.temperature < 1 and bool((router._solved.most_leverage_K < 1e9).all())


def test_texts_and_single_rows_are_no_prompts(routed):
    with pytest.raises(ValueError, match=re.escape("are texts; give token ids: tokenizer(texts)['input_ids'].")):
        routed.add_routes("nli", ["hello", "there"])
    with pytest.raises(ValueError, match=re.escape("has the shape [3]; the router reads rows of tokens, [B, T].")):
        routed.route(torch.tensor([5, 6, 7]))
    config = hft.HFTRouterConfig(confidence=1)
    assert config.confidence == 1
