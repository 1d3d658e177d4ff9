"""HFT models in the hands of people who use them as any model of transformers or PyTorch."""

import json
import shutil
import threading

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch.autograd import forward_ad
from transformers import AutoModelForCausalLM, DynamicCache

import hft
from hft.upload_hft import check_shareable

from .test_model import prompts
from .tiny import bits, fill, grow


@pytest.fixture
def grown(backbones) -> hft.HFTForCausalLM:
    """a -> b, sealed, with pages."""
    made = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": [], "b": ["a"]}, rank=3, memory_config={"slots": 2}, attn_implementation="eager"
    )
    grow(made)
    return made.eval()


def test_the_only_copy_of_a_backbone_is_not_overwritten(grown, backbones, tmp_path):
    shutil.copytree(backbones["llama"], tmp_path / "backbone")
    made = hft.HFTForCausalLM.from_backbone(tmp_path / "backbone", {"a": []})
    made.save_pretrained(tmp_path / "full", slim=False)
    shutil.rmtree(tmp_path / "backbone")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    loaded.add_task("b", ["a"])
    with pytest.raises(ValueError, match=r"holds a model in the full form, backbone included, and '.*', where"):
        loaded.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="a folder of this machine"):
        check_shareable(loaded.config)
    loaded.save_pretrained(tmp_path / "full", slim=False)
    x = prompts(2, 5)
    assert bits(AutoModelForCausalLM.from_pretrained(tmp_path / "full")(x, task="b").logits) == bits(
        loaded(x, task="b").logits
    )


def test_what_others_load_by_a_models_name_is_the_model(grown, tmp_path):
    """PEFT by `model.name_or_path`, TRL's DPO and GRPO by the config's: not the backbone."""
    assert grown.name_or_path == grown.config.name_or_path == ""  # saved nowhere yet
    grown.save_pretrained(tmp_path / "slim")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert loaded.name_or_path == loaded.config.name_or_path == str(tmp_path / "slim")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(loaded, lora)
    adapted.save_pretrained(tmp_path / "lora")
    again, x = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora"), prompts(2, 5)
    assert bits(again(x, task="b").logits) == bits(adapted(x, task="b").logits) != bits(grown(x, task="b").logits)


def test_the_attention_is_set_as_any_models_is(grown, caplog):
    for given, expected in (("sdpa", "sdpa"), ({"text_config": "eager"}, "eager"), ({"": "sdpa"}, "sdpa")):
        grown.set_attn_implementation(given)
        assert grown.config._attn_implementation == grown.backbone.config._attn_implementation == expected
    assert not caplog.text


def test_a_decoders_arguments_come_in_its_order(backbones):
    decoder = hft.HFTModel.from_backbone(backbones["llama"], {"a": []}).eval()
    x = prompts(2, 5)
    given = (x, torch.ones_like(x), torch.arange(1, 6).expand(2, -1))
    assert bits(decoder(*given).last_hidden_state) == bits(decoder.base_model(*given).last_hidden_state)


def test_a_task_is_traced_and_differentiated_forwards(grown):
    class Task(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = grown

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x, task="b", use_cache=False).logits

    traced = torch.jit.trace(Task(), (prompts(2, 5),), check_trace=False)
    assert bits(traced(prompts(2, 5, seed=1))) == bits(Task()(prompts(2, 5, seed=1)))
    embeddings = grown.get_input_embeddings()(prompts(1, 4)).detach()
    direction, step = torch.randn_like(embeddings), 1e-3
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(embeddings, direction)
        found = forward_ad.unpack_dual(grown(inputs_embeds=dual, task="b", use_cache=False).logits).tangent
    ends = [grown(inputs_embeds=embeddings + sign * step * direction, task="b").logits for sign in (1, -1)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=0.05, atol=0.05)


def test_the_default_dtype_is_the_backbones(grown):
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert hft.HFTForCausalLM(grown.config).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_gradient_may_be_differentiated_again(grown):
    """Folded, autograd does all of it."""
    grown.double()
    x = grown.get_input_embeddings()(prompts(2, 5)).detach()

    def twice(**which) -> tuple[torch.Tensor, torch.Tensor]:
        e = x.clone().requires_grad_()
        loss = grown(inputs_embeds=e, use_cache=False, **which).logits.pow(2).sum()
        (first,) = torch.autograd.grad(loss, e, create_graph=True)
        return first.detach(), torch.autograd.grad(first.pow(2).sum(), e)[0]

    ours = twice(task="b")
    grown.fold("b")
    for found, expected in zip(ours, twice(), strict=True):
        torch.testing.assert_close(found, expected)


def test_second_derivatives_reach_all_that_trains(backbones):
    made = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": [], "b": ["a"]}, memory_config={"slots": 2}, attn_implementation="eager"
    )
    made.start_stage(["a"])
    fill(made, only_trainable=True)
    made.seal(["a"])
    made.start_stage(["b"])
    fill(made, seed=5, only_trainable=True)
    made.double()
    own, x = made.learning_parameters("b"), prompts(2, 5)
    direction = {name: torch.randn_like(its) for name, its in own.items()}
    fixed = [column for column in range(len(made.sources("b"))) if column not in made.learning_gates("b")]
    direction["hft_gates.g_b"][:, fixed] = 0
    assert direction["hft_gates.g_b"].any()

    def move(step: float) -> None:
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.add_(direction[name], alpha=step)

    def slope(create_graph: bool = False) -> torch.Tensor:
        loss = made(x, labels=x, task="b").loss
        found = torch.autograd.grad(loss, list(own.values()), create_graph=create_graph)
        return sum((one * two).sum() for one, two in zip(found, direction.values(), strict=True))

    second = torch.autograd.grad(slope(create_graph=True), list(own.values()))
    along = sum((one * two).sum() for one, two in zip(second, direction.values(), strict=True))
    slopes = []
    for step in (1e-3, -2e-3):  # norms and losses are computed in float32
        move(step)
        slopes.append(slope())
    numeric = (slopes[0] - slopes[1]) / 2e-3
    assert along.item() == pytest.approx(numeric.item(), rel=1e-2)


def test_gradients_of_each_sample_by_torch_func(backbones):
    made = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, attn_implementation="eager")
    fill(made)
    own, x = made.learning_parameters("a"), prompts(3, 5)

    def loss(parameters: dict, row: torch.Tensor) -> torch.Tensor:
        given = ((row[None],), {"labels": row[None], "use_cache": False, "task": "a"})
        return torch.func.functional_call(made, parameters, *given).loss

    values = {name: parameter.detach() for name, parameter in own.items()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for i, row in enumerate(x):
        its = torch.autograd.grad(made(row[None], labels=row[None], task="a").loss, list(own.values()))
        for name, gradient in zip(own, its, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-4, atol=1e-6)


def test_to_go_on_from_a_cache_its_task_must_be_named(grown):
    x, options = prompts(1, 8), {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    for task in "ab":
        grown.add_routes(task, prompts(8, 6, seed=ord(task)).tolist())
    cache = DynamicCache()
    first = grown.generate(x, past_key_values=cache, **options)  # an empty one is everybody's
    more = torch.cat([first, prompts(1, 3, seed=9)], 1)
    with pytest.raises(ValueError, match="`past_key_values` holds 9 tokens as some task's path computed them"):
        grown.generate(more, attention_mask=torch.ones_like(more), past_key_values=cache, **options)
    grown.generate(more, attention_mask=torch.ones_like(more), past_key_values=cache, task="a", **options)


def test_another_threads_pass_meets_a_hook_that_is_gone(grown):
    """PyTorch calls hooks as they were when it looked, and asks for keyword arguments as they are now."""
    layer, found = grown.base_model.layers[grown.hft_router.layer], []

    def as_torch_does(module, args, kwargs):
        hooks = [hook for hook in layer._forward_pre_hooks.values() if hook is not as_torch_does]
        thread = threading.Thread(target=lambda: found.extend(hook(module, args) for hook in hooks))
        thread.start()
        thread.join()

    hook = layer.register_forward_pre_hook(as_torch_does, with_kwargs=True, prepend=True)
    grown.prompt_features(prompts(1, 5))
    hook.remove()
    assert found == [None]


def test_another_word_for_task_is_refused(grown):
    for model in (grown, hft.HFTModel(grown.config)):
        with pytest.raises(TypeError, match="`tasks` is no argument of a pass: name its task"):
            model(prompts(1, 4), tasks="a")


def test_settings_of_the_backbone_may_be_given(grown, tmp_path):
    grown.save_pretrained(tmp_path)
    for loader in (AutoModelForCausalLM, hft.HFTForCausalLM):
        loaded = loader.from_pretrained(tmp_path, max_position_embeddings=64)
        assert loaded.backbone.config.max_position_embeddings == 64
        torch.testing.assert_close(loaded(prompts(1, 4), task="b").logits, grown(prompts(1, 4), task="b").logits)


def test_arguments_for_files_of_other_forms_change_nothing(grown, tmp_path):
    grown.save_pretrained(tmp_path / "by-place", True, None, False, "1GB", distributed_checkpoint=False)
    assert json.loads((tmp_path / "by-place/config.json").read_text())["slim"] is True
    grown.save_pretrained(tmp_path, save_function=torch.save, save_original_format=True)
    assert hft.read_gates(tmp_path)[0].sealed_tasks() == ["a", "b"]


def test_files_that_changed_places_are_refused(backbones, tmp_path):
    made = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": ["a"], "c": ["a"]}, rank=3)
    grow(made)
    made.save_pretrained(tmp_path / "m")
    one, other = (tmp_path / "m" / "tasks" / f"{task}.safetensors" for task in "bc")
    held = one.read_bytes(), other.read_bytes()
    one.write_bytes(held[1])
    other.write_bytes(held[0])
    with pytest.raises(ValueError, match=r"is not what was sealed as task 'b' \(another SHA-256"):
        hft.HFTForCausalLM.from_pretrained(tmp_path / "m")
    one.write_bytes(held[0])
    other.write_bytes(held[1])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    next(task for task in config["tasks"] if task["name"] == "b")["parents"] = []
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not what was sealed as task 'b'"):
        hft.HFTForCausalLM.from_pretrained(tmp_path / "m", tasks=["b"])


TASK = {"name": "a", "sealed": True}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": [{"rank": 3}]}, "An entry of `tasks` lacks 'name'"),
        ({"pages": [{"id": 1}]}, "An entry of `pages` lacks 'slots'"),
        ({"tasks": [{**TASK, "dtype": "floaty"}]}, "`dtype` of 'a' is 'floaty'"),
        (
            {"tasks": [{**TASK, "pages": [1, 1]}], "pages": [{"id": 1, "slots": 2, "sealed": False, "writers": []}]},
            "reads 1 twice in `pages`",
        ),
        ({"tasks": [{**TASK, "borrows": ["a"]}]}, "Task 'a' borrows 'a', which is on its path already"),
        ({"tasks": [{"name": "b"}, {**TASK, "parents": ["b"]}]}, "Task 'a' is sealed, and its parent 'b' is not"),
    ],
)
def test_configs_that_were_edited_wrongly(values, message):
    with pytest.raises(ValueError, match=message):
        hft.HFTConfig(**values)


def test_what_hft_owns_is_not_offloaded_behind_its_back(grown):
    grown.hft_nodes.to("meta")
    grown.hft_gates.to("meta")
    with torch.no_grad(), pytest.raises(ValueError, match=r"What HFT owns .* was offloaded"):
        grown(prompts(1, 4), task="b")


def test_names_that_windows_cannot_have(grown):
    with pytest.raises(ValueError, match="'CON' cannot be a task's name: Windows"):
        grown.add_task("CON")
    assert hft.Hierarchy({"con": []}).names == ("con",)  # of a model that has one
