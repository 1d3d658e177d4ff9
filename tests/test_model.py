"""What must always hold of the model: invariants 1 to 4 and 9 of the README."""

import copy
import re
import threading
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import hft
from hft.attention_hft import best_attention, goes_to_gpu
from hft.backbone_hft import without_weights
from hft.lora_io_hft import path_factors
from hft.path_hft import active_path, on_path

from .naive import naive_logits
from .tiny import BACKBONES, VOCABULARY, bits, fill, grow, snapshot, tiny_config


HIERARCHY = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


def prompts(rows: int, length: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_1_a_sealed_task_computes_the_same_bits_whatever_is_added(model, dtype):
    model.to(dtype)
    model.seal(model.hierarchy.names)
    x = prompts(3, 7)
    tasks = [*model.hierarchy.names, ["a", "d", None]]
    with torch.no_grad():
        before = [bits(model(x, task=task).logits) for task in tasks]
        for i, parents in enumerate([["d"], [], ["a", "f"], ["new0"]]):
            model.add_task(f"new{i}", parents, rank=i + 1)
        for stage in (["new0", "new1", "new2"], ["new3"]):
            model.start_stage(stage)
            assert {model._open_page(task) for task in stage} == {model.config.pages[-1]["id"]}
            fill(model, seed=11, only_trainable=True)
            model.seal(stage)
        model._kept.clear()  # what was fused before must not answer for what is there now
        after = [bits(model(x, task=task).logits) for task in tasks]
        assert bits(model(x, task="new0").logits) not in after  # the new ones do speak
    assert before == after


@pytest.mark.parametrize("family", BACKBONES)
def test_2_without_a_task_it_is_the_backbone_to_the_bit(backbones, family):
    model = hft.HFTForCausalLM.from_backbone(backbones[family], HIERARCHY, rank=3)
    grow(model)
    backbone = AutoModelForCausalLM.from_pretrained(backbones[family])
    x = prompts(2, 9)
    with torch.no_grad():
        expected = backbone(x).logits
        assert bits(model(x).logits) == bits(expected)
        assert bits(model(x, task="backbone").logits) == bits(expected)
        assert bits(model(x, task=[None, None]).logits) == bits(expected)
        assert (model(x, task="a").logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("parents", [["b", "c"], ["b", "e"], ["d", "f"]])
def test_3_a_child_of_several_adds_the_mean_of_what_they_add(model, parents):
    """At each linear; what both stand on counts once."""
    model.add_task("mix", parents)
    paths = {task: path_factors(model, task) for task in ("mix", *parents)}
    for name in paths["mix"]:
        mix, *theirs = (up_OR @ down_RI for down_RI, up_OR in (its[name] for its in paths.values()))
        torch.testing.assert_close(mix, sum(theirs) / len(parents), rtol=1e-5, atol=1e-5)


def test_3_a_child_starts_as_its_parents(model):
    x = prompts(2, 9)
    with torch.no_grad():
        model.add_task("child", ["d"])
        torch.testing.assert_close(model(x, task="child").logits, model(x, task="d").logits, rtol=1e-5, atol=1e-5)
        # of several parents it starts as the mean: of what they let in, each node once
        model.add_task("mix", ["b", "e"])
        assert model.hierarchy.path("mix") == ("a", "b", "e", "mix")
        gates = model.hft_gates
        torch.testing.assert_close(gates.of("mix")[:, 0], gates.of("b")[:, 0] / 2)
        torch.testing.assert_close(gates.of("mix")[:, 2], gates.of("e")[:, 0] / 2)
        assert (gates.of("mix")[:, 3] == 1).all()


def test_3_with_all_gates_at_zero_it_is_the_backbone(model):
    x = prompts(2, 9)
    with torch.no_grad():
        expected = model(x).logits
        model.hft_gates.of("d").zero_()
        assert bits(model(x, task="d").logits) == bits(expected)


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("rows", [["d", "d", "d"], ["d", None, "b"], ["c", "a", "d"]])
def test_4_the_fused_path_is_the_naive_loop_forward_and_gradient(backbones, family, rows):
    torch.manual_seed(0)
    memory = {"slots": 3, "target_modules": ["o_proj", "down_proj"]}
    model = hft.HFTForCausalLM.from_backbone(backbones[family], {"a": [], "b": ["a"]}, rank=3, memory_config=memory)
    model.add_task("c", ["a"], rank=1)
    model.add_task("d", ["b", "c"], rank=5)
    for level in model.hierarchy.levels():
        model.start_stage(level)
    model.set_trainable(model.hierarchy.names)
    model.double()
    fill(model)
    x = prompts(3, 5)
    weight = torch.randn(3, 5, VOCABULARY, dtype=torch.float64)
    own = {n: p for n, p in model.named_parameters() if n.startswith("hft_") and p.requires_grad}

    def run(logits):
        gradients = torch.autograd.grad((logits * weight).sum(), list(own.values()), allow_unused=True)
        return logits.detach(), dict(zip(own, gradients, strict=True))

    fused, fused_gradients = run(model(x, task=rows).logits)
    naive, naive_gradients = run(naive_logits(model, x, rows))
    torch.testing.assert_close(fused, naive, rtol=1e-9, atol=1e-9)
    nodes_used = {node for row in rows if row for node in model.hierarchy.path(row)}
    pages_used = {str(page) for row in rows if row for page in model.config.task(row)["pages"]}
    for name, gradient in naive_gradients.items():
        if gradient is None:  # the node of no row, or the gates of no row
            assert fused_gradients[name] is None, name
        else:
            torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-7, atol=1e-8, msg=name)
            assert gradient.abs().max() > 0, name
    for letter, used in (("A", nodes_used), ("V", pages_used)):
        seen = [name.rsplit("_", 1) for name, g in naive_gradients.items() if g is not None]
        assert {name for key, name in seen if key.endswith(f".{letter}")} == used


@pytest.mark.parametrize("family", BACKBONES)
def test_9_a_row_does_not_depend_on_its_neighbours(backbones, family):
    """Mixed tasks, left padding, cached decoding, beams: each row as if it were alone."""
    model = hft.HFTForCausalLM.from_backbone(backbones[family], HIERARCHY, rank=3)
    grow(model)
    rows, lengths = ["d", None, "a", "b"], [9, 4, 6, 1]
    alone = [prompts(1, length, seed=length) for length in lengths]
    batch = torch.zeros(4, 9, dtype=torch.long)
    mask = torch.zeros(4, 9, dtype=torch.long)
    for i, prompt in enumerate(alone):
        batch[i, 9 - prompt.shape[1] :] = prompt
        mask[i, 9 - prompt.shape[1] :] = 1
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        together = model(batch, attention_mask=mask, position_ids=positions, task=rows).logits
        for i, prompt in enumerate(alone):
            expected = model(prompt, task=rows[i] or "backbone").logits[0]
            torch.testing.assert_close(together[i, 9 - prompt.shape[1] :], expected, rtol=1e-4, atol=1e-4)

        for options in (
            {"do_sample": False},
            {"num_beams": 3, "do_sample": False},
            {"do_sample": False, "use_cache": False},
        ):
            options = {**options, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
            answers = model.generate(batch, attention_mask=mask, task=rows, **options)
            for i, prompt in enumerate(alone):
                single = model.generate(prompt, task=rows[i], **options)
                assert answers[i, 9:].tolist() == single[0, prompt.shape[1] :].tolist(), (family, options, i)


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_9_packed_rows_are_as_if_alone(backbones, family, attention):
    """As the trainer packs them: one row, positions that start again, no mask, no cache; longer than gemma's window."""
    parts = [prompts(1, length, seed=length) for length in (5, 1, 20)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    model = hft.HFTForCausalLM.from_backbone(backbones[family], HIERARCHY, rank=3, attn_implementation=attention)
    grow(model)
    with torch.no_grad():
        packed = model(torch.cat(parts, 1), position_ids=positions, task="d", use_cache=False).logits[0]
        expected = torch.cat([model(part, task="d", use_cache=False).logits[0] for part in parts])
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


def test_cached_decoding_is_the_full_pass(model):
    x = prompts(2, 12)
    with torch.no_grad():
        full = model(x, task=["d", "e"]).logits
        first = model(x[:, :7], task=["d", "e"], use_cache=True)
        second = model(x[:, 7:], task=["d", "e"], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [1, 3, 99])
def test_the_last_logits_are_those_of_the_full_pass(model, keep):
    """And the head gets them in one piece: of a slice, a CPU's matmul would copy its weights once a row."""
    ids = torch.randint(5, 200, (4, 7))
    whole = model(ids, task="b").logits
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert torch.equal(model(ids, task="b", logits_to_keep=keep).logits, whole[:, -keep:])
    handle.remove()
    assert seen[0].is_contiguous()


def test_kept_factors_are_used_and_never_stale(model, monkeypatch):
    """Each way to change a parameter is seen; and what is kept is what would be made."""
    from hft.fused_hft import HFTFused

    model.seal(model.hierarchy.names)
    made = []
    fuse = HFTFused._fuse
    monkeypatch.setattr(HFTFused, "_fuse", lambda self, task, *rest: made.append(task.task) or fuse(self, task, *rest))
    x = prompts(3, 6)
    rows = ["d", "f", None]

    def fresh(task):
        return bits(copy.deepcopy(model)(x, task=task).logits)  # with gradients: nothing is kept there

    with torch.no_grad():
        model(x, task="d")
        model(x, task=rows)
    assert sorted(set(made)) == ["d", "f"] and len(made) == 2 * 14
    before = len(made)
    A, B = model.hft_nodes["layers_1_mlp_up_proj"].pair("b")
    _, V = model.hft_memory["layers_0_mlp_down_proj"].pair("1")
    state = copy.deepcopy(model.state_dict())
    for change in (
        lambda: None,
        lambda: B.mul_(1.5),
        lambda: setattr(A, "data", A.data * 2),
        lambda: V.add_(0.1),
        lambda: model.hft_gates.of("d").mul_(0.9),
        lambda: torch.optim.SGD([B], lr=0.1).step() if setattr(B, "grad", torch.ones_like(B)) is None else None,
        lambda: model.load_state_dict(state),
    ):
        with torch.no_grad():
            change()
            kept = bits(model(x, task="d").logits), bits(model(x, task=rows).logits)
        assert kept == (fresh("d"), fresh(rows))
    with torch.no_grad():
        before = len(made)
        model(x, task="d")
        assert len(made) == before
    # A fused optimizer changes parameters without raising their versions; of an open task nothing is kept.
    model.add_task("new", ["d"])
    model.start_stage(["new"])
    own = list(model.learning_parameters("new").values())
    optimizer = torch.optim.AdamW(own, lr=0.1, fused=True)
    model(x, labels=x, task="new").loss.backward()
    model.requires_grad_(False)
    with torch.no_grad():
        before = bits(model(x, task="new").logits)
        optimizer.step()
        assert before != bits(model(x, task="new").logits) == fresh("new")
    with torch.inference_mode():  # a cache of the one mode serves in the other
        model(x, task="e")
    with torch.no_grad():
        assert bits(model(x, task="e").logits) == fresh("e")


@torch.no_grad()
def test_factors_of_the_last_tasks_are_kept_and_no_others(model, monkeypatch):
    """Else a server of many tasks would hold each task's ancestors once more."""
    monkeypatch.setattr("hft.kept_hft.MOST_TASKS", 2)
    model.seal(model.hierarchy.names)
    x = prompts(3, 6)
    for tasks, kept in (("a", "a"), ("b", "ab"), ("a", "ba"), ("c", "ac"), ("bcd", "bcd"), ("e", "de")):
        model(x[: len(tasks)], task=list(tasks))
        assert list(model._kept._entries) == list(kept)


@torch.no_grad()
def test_what_was_kept_of_earlier_passes_is_freed(model, tmp_path):
    """For a stage, which needs the memory; and where it may be of tasks that are no longer there, or not as they were."""
    model.seal(model.hierarchy.names)
    model.save_pretrained(tmp_path)
    x = prompts(2, 6)
    for change in (
        lambda: model.restore(tmp_path),
        lambda: model.remove_task("f"),
        lambda: (model.add_task("new"), model.start_stage(["new"])),
    ):
        model(x, task=["a", "b"])
        assert model._kept._entries and all(fused._stack for fused in model._fused.values())
        assert not any(fused._stack for fused in copy.deepcopy(model)._fused.values())
        change()
        assert not model._kept._entries and not any(fused._stack for fused in model._fused.values())


def test_blocks_that_overlap_are_told_of_and_leave_nothing_active(model):
    """As of two coroutines that share a thread; without it a dead block's task would stay active for good."""
    x = prompts(2, 6)
    plain = bits(model(x).logits)
    first, second = model.activate("d"), model.activate("e")
    first.__enter__(), second.__enter__()
    with pytest.raises(RuntimeError, match="Two blocks with an active task overlap"):
        first.__exit__(None, None, None)
    assert bits(model(x).logits) == bits(model(x, task="e").logits)
    second.__exit__(None, None, None)
    assert bits(model(x).logits) == plain


@pytest.mark.parametrize("is_open", [False, True], ids=["sealed", "open"])
def test_generating_fuses_once_and_the_next_call_sees_a_change(model, monkeypatch, is_open):
    """Open or sealed: tokens are those of passes that each look for themselves."""
    from hft.fused_hft import HFTFused

    model.eval()
    if not is_open:
        model.seal(model.hierarchy.names)
    looked = []
    read = type(model)._read_parameters
    monkeypatch.setattr(type(model), "_read_parameters", lambda self, task: looked.append(task) or read(self, task))
    fused, fuse = [], HFTFused._fuse
    monkeypatch.setattr(HFTFused, "_fuse", lambda self, task, *rest: fused.append(task) or fuse(self, task, *rest))
    x, rows = prompts(3, 6), ["d", "f", "backbone"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def one_by_one(task):
        """Greedy, a full pass a token."""
        ids = x
        for _ in range(5):
            with torch.no_grad():
                last = model(ids, task=task, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, last.argmax(-1)[:, None]], 1)
        return ids

    for scale in (1.0, -2.0):
        with torch.no_grad():
            model.hft_nodes["layers_1_mlp_up_proj"].pair("d")[1].mul_(scale)
        for task in ("d", rows):
            looked.clear(), fused.clear()
            found = model.generate(x, task=task, **options)
            num_tasks = len(set(task) - {"backbone"})
            assert len(looked) == (0 if is_open else num_tasks) and len(fused) <= 14 * num_tasks
            assert torch.equal(found, one_by_one(task))
        beams = model.generate(x, task=rows, num_beams=2, **options)
        with monkeypatch.context() as patch:
            patch.setattr("hft.generation_hft.generating", nullcontext)
            assert torch.equal(beams, model.generate(x, task=rows, num_beams=2, **options))


def test_generating_in_bfloat16_differs_from_passes_by_rounding_only(backbones):
    """A token's factors are multiplied in float32 then; a folded model, too, and a pass of its own stays what it was."""
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], HIERARCHY, rank=3, dtype=torch.bfloat16)
    grow(model)
    x = prompts(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    for fold in (False, True):
        with torch.no_grad():
            before = bits(model(x[:, :1], task="d").logits)
            if fold:
                model.fold("d")
            out = model.generate(x, task="d", **options)
            whole = model(out.sequences, task="d").logits[:, 5:-1]
            assert bits(model(x[:, :1], task="d").logits) == before
        assert (torch.stack(out.logits, 1) - whole).abs().max() <= 2**-5 * whole.abs().max()
    loss = model(inputs_embeds=model.get_input_embeddings()(x).detach().requires_grad_(), task="d").logits.sum()
    loss.backward()  # nothing that was kept came out of inference mode


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_on_the_path_of_its_own_pass(model, reentrant):
    """Two forwards with different tasks before one backward: the recompute must not take the other's path, or none."""
    model.set_trainable(["d", "f"])
    x = prompts(2, 6)

    def gradients():
        model.zero_grad()
        loss = model(x, labels=x, task="d").loss + 2 * model(x, labels=x, task="f").loss
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert {n.rsplit("_", 1)[1] for n in expected} == {"d", "f", "2", "3"}  # tasks, and the pages of their stages
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    with on_path(model._path("e", None)):  # whatever is active around the backward
        actual = gradients()
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_threads_do_not_share_the_active_path(model):
    x = prompts(2, 6)
    with torch.no_grad():
        expected = {task: bits(model(x, task=task).logits) for task in ("d", "f", "backbone")}
        wrong = []

        def run(task):
            for _ in range(30):
                with torch.no_grad():
                    if bits(model(x, task=task).logits) != expected[task]:
                        wrong.append(task)

        threads = [threading.Thread(target=run, args=(task,)) for task in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert active_path(model._owner) is None


def test_the_path_ends_with_the_pass_also_when_it_fails(model):
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]), task="d")
    assert active_path(model._owner) is None


def test_a_path_is_one_models_and_no_other_takes_it(model, backbones):
    x = prompts(2, 6)
    twin, other = copy.deepcopy(model), hft.HFTForCausalLM.from_backbone(backbones["llama"], {"z": []})
    fill(twin, std=0.4)
    with torch.no_grad():
        plain, expected = bits(model(x).logits), bits(twin(x, task="a").logits)
        answer = twin.generate(x, max_new_tokens=4, do_sample=False).tolist()
        for within in ({}, {"rank": 9}):
            with model.activate("a", **within):
                assert bits(twin(x).logits) == bits(other(x).logits) == plain
                assert bits(twin.base_model(x)[0]) == bits(other.base_model(x)[0])
                assert twin.generate(x, max_new_tokens=4, do_sample=False).tolist() == answer
                assert bits(twin(x, task="a").logits) == expected
                own = bits(model(x).logits)
                assert own != plain
                with twin.activate("a"):
                    assert bits(twin(x).logits) == expected and bits(model(x).logits) == own
                    with model.activate("backbone"):
                        assert bits(twin(x).logits) == expected and bits(model(x).logits) == plain
                assert bits(model(x).logits) == own and bits(twin(x).logits) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dtype_never_rounds_what_was_learnt(model, dtype):
    model.to(dtype)
    model.seal(model.hierarchy.names)
    before = {name: p.double() for name, p in model.named_parameters() if name.startswith("hft_")}
    for other in (torch.float16, torch.bfloat16, torch.float32, torch.float16):
        model.to(other)
        assert model.backbone.dtype == other
        for name, tensor in before.items():
            assert bits(model.get_parameter(name).double()) == bits(tensor), name


def test_a_copy_is_a_model_of_its_own(model):
    x = prompts(1, 6)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x, task="d").logits
        assert bits(twin(x, task="d").logits) == bits(before)
        fill(twin, seed=8)
        assert (twin(x, task="d").logits - before).abs().max() > 1e-3
        assert bits(model(x, task="d").logits) == bits(before)


def test_the_decoder_alone_takes_the_path_too(model):
    """Trainers call `base_model` and the head's weight themselves, past `forward`."""
    x = prompts(2, 6)
    with torch.no_grad():
        with model.activate("d"):
            hidden = model.base_model(input_ids=x).last_hidden_state
        logits = hidden @ model.get_output_embeddings().weight.T
        torch.testing.assert_close(logits, model(x, task="d").logits)


def test_compiles_as_one_graph(model):
    x = prompts(2, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for task in (None, "d", "f"):
            torch.testing.assert_close(compiled(x, task=task, use_cache=False).logits, model(x, task=task).logits)


def test_only_what_is_open_can_train(model):
    with pytest.raises(ValueError, match=re.escape("Task 'e' still writes the memory page 1 together with a; seal")):
        model.seal(["a"])
    model.seal(["a", "e"])
    model.set_trainable(["b"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {*model.task_parameters("b"), *model.page_parameters(2)} == set(model.learning_parameters("b"))
    assert {name.rsplit("_", 1)[1] for name in trainable} == {"b", "2"}
    with pytest.raises(ValueError, match=re.escape("Task 'a' is sealed and cannot train again; add a task")):
        model.set_trainable(["a"])
    with pytest.raises(ValueError, match=re.escape("Task 'd' stands on 'b', which is not sealed; seal 'b' first.")):
        model.seal(["d"])


def test_untrained_gates_stay_fixed(backbones):
    for learns in (True, False):
        model = hft.HFTForCausalLM.from_backbone(
            backbones["llama"], {"a": [], "b": ["a"]}, gating_config={"trainable": learns}
        )
        assert model.hft_gates.of("b").requires_grad == learns and not model.hft_gates.of("a").requires_grad
        model.set_trainable(["a", "b"])
        assert model.hft_gates.of("b").requires_grad == learns and not model.hft_gates.of("a").requires_grad


@pytest.mark.parametrize("part", ["gating_config", "memory_config"])
def test_a_start_that_nothing_could_learn_behind_is_refused(backbones, part):
    with pytest.raises(ValueError, match=r"behind such a gate cannot learn; give another number\."):
        hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, **{part: {"init": 0.0}})


def test_target_modules_choose_the_linears(backbones):
    model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, target_modules=["q_proj", "v_proj"])
    assert sorted(model.hft_nodes) == [f"layers_{i}_self_attn_{p}_proj" for i in (0, 1) for p in "qv"]


def test_a_model_built_from_a_config_is_initialised():
    """`torch.empty` is NaN in these tests."""
    config = hft.HFTConfig(
        text_config=LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ),
        tasks=[{"name": "a", "parents": [], "rank": 2, "sealed": False}],
    )
    model = hft.HFTForCausalLM(config)
    assert all(p.isfinite().all() for p in model.parameters())
    x = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(x, task="a").logits, model(x).logits)


def test_ids_are_places_in_the_config(model):
    x = prompts(3, 5)
    names = model.config.task_names()
    with torch.no_grad():
        ids = [names.index("d"), -1, names.index("f")]
        for task in (torch.tensor(ids), ids, [ids[0], None, torch.tensor(ids).numpy()[2]]):
            assert bits(model(x, task=task).logits) == bits(model(x, task=["d", None, "f"]).logits)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("dd", "Unknown task 'dd'. Did you mean 'd'?"),
        (["a", "x1", "a"], "Unknown task 'x1'."),
        (["a", "b"], "`task` names 2 tasks for 3 rows; give one name, or one a row."),
        ([], "`task` names 0 tasks for 3 rows"),
        (3, "`task` is 3; give a name, a name a row, or ids."),
        (torch.tensor([0, -2, 1]), "`task` holds the id -2; ids go from -1 (the backbone) to 5."),
        (torch.tensor([0, 6, 1]), "`task` holds the id 6; ids go from -1"),
        (torch.tensor([0.0, -1.0, 1.0]), "`task` holds 0.0; give whole ids, or names."),
        (torch.tensor([True, False, True]), "`task` holds True; give whole ids, or names."),
        ([["a"], ["b"], ["a"]], "`task` holds ['a']; give a name, a name a row, or ids."),
    ],
)
def test_wrong_tasks(model, task, message):
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(prompts(3, 5), task=task)


def test_wrong_new_tasks(model):
    before = snapshot(model), copy.deepcopy(model.config.tasks)
    for arguments, message in [
        (("a",), "The task 'a' is a duplicate"),
        (("A",), "are duplicates"),
        (("new", ["zz"]), "names the unknown parent 'zz'"),
        (("new", ["a"], 0), "`rank` of task 'new' is 0"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            model.add_task(*arguments)
    assert (snapshot(model), model.config.tasks) == before


def test_a_task_may_have_any_name_that_a_file_may_have(backbones):
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"forward": [], "training": ["forward"], "of-rows_1": []}
    )
    assert model(prompts(1, 3), task="training").logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": 3}, "`target_modules` is 3; give 'all-linear', or a list of the last names of linears."),
        ({"dtype": "floaty"}, "`dtype` is 'floaty'; it must be a floating-point type of torch"),
        ({"dtype": torch.int8}, "`dtype` is torch.int8; it must be a floating-point type of torch"),
    ],
)
def test_wrong_ways_to_build(backbones, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, **options)


def test_backbones_without_linears_are_refused(tmp_path):
    from transformers import GPT2Config

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"GPT2Model has no nn.Linear in its layers \(only Conv1D, .*Choose a backbone such as"
    ):
        hft.HFTForCausalLM.from_backbone(tmp_path, {"a": []})


def test_unknown_target_modules_are_refused(backbones):
    with pytest.raises(
        ValueError, match=re.escape("names 'q_prj', which this backbone lacks. Did you mean 'q_proj'?")
    ):
        hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, target_modules=["q_prj"])


def test_flash_attention_that_is_absent_is_an_error(backbones):
    with pytest.raises(ImportError, match=r"(?i)flash"):
        hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, attn_implementation="flash_attention_2")


def test_a_familys_own_way_to_prepare_a_step_is_taken(tmp_path, tokenizer):
    """Phi-3 reads anew what it has cached when a text grows past its first window."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
            "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}  # fmt: skip
    config = tiny_config("phi3", original_max_position_embeddings=16, rope_parameters=rope)
    plain = AutoModelForCausalLM.from_config(config).eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    plain.save_pretrained(tmp_path)
    model = hft.HFTForCausalLM.from_backbone(tmp_path, {"a": []}, rank=3)
    grow(model)
    model.eval()
    x = prompts(1, 12)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True,
               "output_logits": True}  # fmt: skip
    theirs, ours = plain.generate(x, **options), model.generate(x, **options)
    assert [bits(step) for step in ours.logits] == [bits(step) for step in theirs.logits]
    ours = model.generate(x, task="a", **options)
    for i, step in enumerate(ours.logits):
        whole = model(ours.sequences[:, : 12 + i], task="a", use_cache=False).logits[:, -1]
        torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)


def test_flash_attention_is_taken_only_where_it_computes(backbones, monkeypatch):
    """Its kernels are for half precision on a GPU; a model that is loaded onto the CPU, or in float32, has PyTorch's own."""
    monkeypatch.setattr("hft.attention_hft.has_flash_attention", lambda: True)
    decoder = without_weights(AutoConfig.from_pretrained(backbones["llama"]))
    assert best_attention(decoder, True, torch.bfloat16) == best_attention(decoder, True, torch.float16)
    assert best_attention(decoder, True, torch.float16) == "flash_attention_2"
    assert best_attention(decoder, True, torch.float32) == best_attention(decoder, False, torch.float16) == "sdpa"
    assert goes_to_gpu(None, True) and goes_to_gpu("auto", False) and goes_to_gpu({"": 0}, False)
    assert goes_to_gpu({"model": "cpu", "lm_head": torch.device("cuda", 0)}, False)
    assert not goes_to_gpu(None, False) and not goes_to_gpu("cpu", True) and not goes_to_gpu({"": "cpu"}, True)
    for dtype in (torch.bfloat16, "bfloat16", None):  # on the CPU
        options = {} if dtype is None else {"dtype": dtype}
        model = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": []}, **options)
        assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["gemma2", "gpt_neo"])
def test_a_family_without_pytorchs_kernel_takes_eager_attention(family, tmp_path):
    more = {"head_dim": 8, "query_pre_attn_scalar": 8} if family == "gemma2" else {
        "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16
    }  # fmt: skip
    AutoModelForCausalLM.from_config(tiny_config(family, **more)).save_pretrained(tmp_path)
    model = hft.HFTForCausalLM.from_backbone(tmp_path, {"a": []}, rank=3)
    assert model.config.text_config._attn_implementation == "eager"
    grow(model)
    assert model(prompts(2, 6), task="a").logits.isfinite().all()


def test_embeddings_keep_their_size(model):
    """What is saved holds none, so a model of another size could not be loaded."""
    size = model.get_input_embeddings().num_embeddings
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert model.resize_token_embeddings(size - 3, pad_to_multiple_of=9) is model.get_input_embeddings()
    for wanted, multiple, becomes in ((300, None, 300), (None, 7, -(-size // 7) * 7), (297, 4, 300)):
        message = f"has {size} embeddings and is frozen, so they cannot become {becomes}. Resize the plain"
        with pytest.raises(ValueError, match=message):
            model.resize_token_embeddings(wanted, multiple)


def test_an_active_list_fits_the_rows_of_the_pass(model):
    with model.activate(["a", "e"]), pytest.raises(ValueError, match="names tasks for 2 rows, and the pass has 4"):
        model(prompts(4, 5))


def test_a_change_of_dtype_rounds_nothing_that_was_learnt(model, tmp_path):
    """Factors are cast where they are used; an open node is still float32, and so is every gate."""
    model.seal(["a", "b", "c", "e", "f"])
    before = snapshot(model)
    model.to(torch.bfloat16)
    assert model(prompts(1, 5), task="d").logits.dtype == torch.bfloat16
    after = snapshot(model)
    assert {name for name in before if before[name] != after[name]} == {name for name in before if "backbone" in name}
    model.double()
    assert model.hft_gates.of("d").dtype == torch.float64  # wider is no loss


def test_sealing_again_changes_nothing(model):
    model.seal(model.hierarchy.names)
    before = snapshot(model)
    model.backbone.to(torch.bfloat16)
    model.add_task("new", ["d"])
    model.start_stage(["new"])
    model.seal(model.hierarchy.names)
    after = snapshot(model)
    assert all(before[name] == after[name] for name in before if name.startswith(("hft_nodes", "hft_memory")))
    assert model.hft_nodes["layers_0_mlp_up_proj"].pair("new")[0].dtype == torch.bfloat16


def test_a_later_root_begins_as_the_backbone(model):
    model.seal(model.hierarchy.names)
    model.add_task("new")
    model.start_stage(["new"])
    assert "page:1" in model.gates("new").mean()
    with torch.no_grad():
        assert torch.equal(model(prompts(2, 5), task="new").logits, model(prompts(2, 5)).logits)


def test_a_silent_linear_does_not_make_a_sealed_page_new(model):
    model.seal(model.hierarchy.names)
    with torch.no_grad():
        next(iter(model.hft_memory.values())).pair("1")[1].zero_()
    model.config.memory_config.root_init = model.hft_gates.root_page_start = 0.25
    model.add_task("new")
    model.start_stage(["new"])
    assert dict(model.gates("new").mean())["page:1"] == pytest.approx(0.25)


def test_a_model_is_planned_without_weights(model):
    with torch.device("meta"):
        empty = hft.HFTForCausalLM(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "E"}, "are duplicates"),
        ({"name": "q", "rank": 2.5}, "`rank` of task 'q' is 2.5; a node needs a whole rank"),
    ],
)
def test_a_task_that_is_refused_leaves_no_trace(model, arguments, message):
    before = copy.deepcopy(model.config.tasks)
    with pytest.raises(ValueError, match=message):
        model.add_task(**arguments)
    assert model.config.tasks == before and set(model.hierarchy.names) == {entry["name"] for entry in before}


def test_a_task_that_is_cut_off_while_it_is_added_leaves_no_trace(model, monkeypatch):
    before, names = copy.deepcopy(model.config.tasks), sorted(dict(model.named_parameters()))
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_make_gates", None)
        with pytest.raises(TypeError):
            model.add_task("new", ["d"])
    assert model.config.tasks == before and sorted(dict(model.named_parameters())) == names
    with torch.inference_mode():  # whose tensors could never learn
        model.add_task("new", ["d"])
    model.start_stage(["new"])
    model(prompts(2, 5), labels=prompts(2, 5), task="new").loss.backward()


def test_only_tasks_of_a_stage_write_its_page(model):
    model.seal(model.hierarchy.names)
    model.add_task("new", ["d"])
    with pytest.raises(ValueError, match="`writers` names 'd', which is not of this stage: new"):
        model.start_stage(["new"], writers=["d"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rank": 0}, "`rank` of task 'a' is 0; a node needs a whole rank"),
        ({"rank": True}, "`rank` of task 'a' is True; a node needs a whole rank"),
        ({"rank": "4"}, "`rank` of task 'a' is '4'; a node needs a whole rank"),
        ({"rnk": 4}, "Task 'a' has the unknown key 'rnk'. Did you mean 'rank'?"),
    ],
)
def test_wrong_entries_of_a_config(entry, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hft.HFTConfig(tasks=[{"name": "a", **entry}])


def test_a_config_leaves_the_decoders_own_as_it_is(backbones):
    """A model that stands on that config goes on with its attention, and so sees no later tokens."""
    plain = AutoModelForCausalLM.from_pretrained(backbones["llama"], attn_implementation="sdpa").eval()
    before = plain.config.to_dict()
    config = hft.HFTConfig(text_config=plain.config, backbone=str(backbones["llama"]))
    assert plain.config._attn_implementation == "sdpa" and plain.config.to_dict() == before
    assert config.text_config is not plain.config
    x = torch.arange(8)[None]
    other = torch.cat([x[:, :-1], x[:, -1:] + 1], dim=1)
    assert torch.equal(plain(x).logits[:, :-1], plain(other).logits[:, :-1])


def test_a_folded_model_neither_gives_nor_takes_weights_that_are_not_its_own(model):
    model.eval().seal(model.hierarchy.names)
    state = copy.deepcopy(model.state_dict())
    for merge in (False, True):
        model.fold("d", merge=merge)
        with pytest.raises(ValueError, match="folded for task 'd'; call unfold"):
            model.load_state_dict(state)
        if merge:
            with pytest.raises(ValueError, match="merged into the backbone's weights; call unfold"):
                model.state_dict()
        model.unfold()
    model.load_state_dict(state)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mamba", {"state_size": 4}),
        ("mamba2", {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}),
        ("jamba", {"mamba_d_state": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}),
    ],
)
def test_no_node_stands_where_a_family_takes_weights_without_their_linear(family, more):
    """Such a node would never speak, nor learn; of a mixer's linears it is seen where its kernels run, on a GPU."""
    config = hft.HFTConfig(text_config=tiny_config(family, **more), rank=2)
    model = hft.HFTForCausalLM(config)
    model.add_task("a")
    fill(model)
    model.start_stage(["a"])
    model(prompts(2, 6), labels=prompts(2, 6), task="a").loss.backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent
    mixers = [name for name in model.hft_nodes if "mixer" in name or "mamba" in name]
    assert mixers and all(name.endswith("in_proj") for name in mixers)


def test_a_family_with_a_cache_of_its_own_generates(tmp_path, tokenizer):
    config = tiny_config("minimax", num_local_experts=2, layer_types=["linear_attention", "full_attention"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = hft.HFTForCausalLM.from_backbone(tmp_path, {"a": []}, rank=2)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert model.generate(prompts(1, 5), **options).tolist() == plain.generate(prompts(1, 5), **options).tolist()


def test_a_target_is_a_whole_name(backbones):
    """Not a part of one: "up_proj" is no "p_proj"."""
    one, other = (
        hft.HFTForCausalLM.from_backbone(
            backbones["llama"], {"a": []}, target_modules=target, memory_config={"read": "off"}
        )
        for target in ("up_proj", ["up_proj"])
    )
    assert list(one.hft_nodes) == list(other.hft_nodes) == ["layers_0_mlp_up_proj", "layers_1_mlp_up_proj"]
    with pytest.raises(
        ValueError, match=r"The memory's `target_modules` \(\['v_proj'\]\) are none of those that carry"
    ):
        hft.HFTForCausalLM.from_backbone(
            backbones["llama"], {"a": []}, target_modules=["q_proj"], memory_config={"target_modules": ["v_proj"]}
        )


def test_a_thread_started_within_a_block_takes_no_part_in_it(model):
    x, found = prompts(2, 6), []
    plain = bits(model(x).logits)
    with model.activate("d"):
        thread = threading.Thread(target=lambda: found.append(bits(model(x).logits)))
        thread.start()
        thread.join()
        assert bits(model(x).logits) != plain
    assert found == [plain]
