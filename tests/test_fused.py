"""The training pass of a path: the same bits as in evaluation, gradients of what trains, and no sums for anything else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import hft
from hft.fused_hft import _PathProduct, _runs
from hft.lora_io_hft import path_factors
from hft.path_hft import HFTConstants, HFTSources, HFTTaskPath

from .test_model import prompts
from .tiny import bits, fill, grow


def chain(backbones, dtype=torch.float32, **options) -> hft.HFTForCausalLM:
    """a -> b -> c, ranks 5, 5 and 2, of which a and b are sealed."""
    made = hft.HFTForCausalLM.from_backbone(backbones["llama"], {"a": [], "b": ["a"]}, rank=5, dtype=dtype, **options)
    made.add_task("c", ["b"], rank=2)
    for seed, task in enumerate("abc"):
        made.start_stage([task])
        fill(made, seed=seed, only_trainable=True)
        made.seal([task] if task != "c" else [])
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_gradients_on_a_path_computes_the_same_bits(backbones, dtype):
    model, x = chain(backbones, dtype, memory_config={"slots": 3}), prompts(2, 6)
    for task in "ac":
        with_gradients = model(x, task=task).logits
        with torch.no_grad():
            assert bits(model(x, task=task).logits) == bits(with_gradients)
        assert with_gradients.requires_grad == (task == "c")


@pytest.mark.parametrize("trains", [(2, 3), (0, 5), (), (0, 1, 2, 3, 4, 5)])
def test_gradients_are_autograds_own_and_nothing_else_is_summed(trains):
    """`trains`: which of the factors down, up, down, up, ... do; the input and the gates do as well."""
    ranks, inside, outside, tokens = (3, 2, 4), 7, 9, (2, 5)
    shapes = [shape for rank in ranks for shape in ((rank, inside), (outside, rank))]
    factors = [torch.randn(shape, dtype=torch.double, requires_grad=i in trains) for i, shape in enumerate(shapes)]
    x = torch.randn(*tokens, inside, dtype=torch.double, requires_grad=True)
    # of two layers; a closed gate learns, too, and the last one does not
    gates = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -2.0]], dtype=torch.double, requires_grad=True)
    weight = torch.randn(*tokens, outside, dtype=torch.double)
    columns = torch.tensor([i for i, rank in enumerate(ranks) for _ in range(rank)])
    learns_N = torch.tensor([True, True, False])

    def run(product):
        wanted = [x, gates, *(factors[i] for i in trains)]
        out = product(x, gates, *factors)
        with FlopCounterMode(display=False) as counter:
            found = torch.autograd.grad((out * weight).sum(), wanted)
        return out.detach(), found, counter.get_total_flops()

    def plain(x, gates, *factors):
        g_N = torch.where(learns_N, gates[1], gates[1].detach())
        return F.linear(F.linear(x, torch.cat(factors[::2])), torch.cat(factors[1::2], 1) * g_N[columns])

    sources = HFTSources(("a", "b", "c"), ())
    task = HFTTaskPath("c", sources, gates, columns, len(columns), learns_N=learns_N)

    def fused(x, gates, *factors):
        return _PathProduct.apply(x, gates, task, 1, True, *factors)

    ours, found, flops = run(fused)
    theirs, expected, _ = run(plain)
    assert bits(ours) == bits(theirs)
    for gradient, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-10, atol=1e-10)
    a_column = 2 * 2 * 5  # flops a column of one factor, over a feature
    through = sum(ranks) * (inside + outside)
    own = sum(ranks[i // 2] * (outside if i % 2 else inside) for i in trains)
    assert flops == a_column * (through + own)


def test_neighbours_share_a_product():
    same = [torch.float32] * 4
    assert _runs([True, True, False, True], [3, 2, 4, 1], same) == [([0, 1], slice(0, 5)), ([3], slice(9, 10))]
    assert _runs([True, True], [3, 2], [torch.float32, torch.bfloat16]) == [([0], slice(0, 3)), ([1], slice(3, 5))]
    assert _runs([False, False], [3, 2], same[:2]) == []


def test_a_sealed_ancestor_costs_no_gradients_in_the_whole_model(backbones):
    model, x = chain(backbones, memory_config={"read": "off"}), prompts(2, 6)

    def flops() -> int:
        loss = model(x, task="c").logits.square().mean()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    few = flops()
    assert {name[-1] for name, p in model.named_parameters() if p.grad is not None} == {"c"}
    model.requires_grad_(True)
    model.backbone.requires_grad_(False)
    features = sum(nodes.in_features + nodes.out_features for nodes in model.hft_nodes.values())
    assert flops() - few == 2 * 12 * (5 + 5) * features


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_too(backbones, dtype):
    """Under autocast the product's input is float32 and its output in 16 bit."""
    model, x = chain(backbones), prompts(2, 6)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = model(x, task="c").logits.float().square().mean()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == set(model.learning_parameters("c"))
    for name, exact in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(exact.flatten(), gradients[1][name].flatten(), 0) > 0.9, name


def test_a_single_token_on_a_cpu_is_multiplied_in_float32(backbones):
    """While tokens are generated; it differs by rounding, and elsewhere nothing does."""
    model = chain(backbones, torch.bfloat16, memory_config={"slots": 3}).requires_grad_(False)
    fused = model._fused["layers.0.mlp.up_proj"]
    x_BTI = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1)).bfloat16()

    def added(rows, wide):
        with torch.no_grad():
            path = model._path("c", None, is_one_pass=True)
            path = path.with_wide_factors() if wide else path
            return fused.added(rows, path), path.tasks[0]

    exact = sum(
        gate * (x_BTI[:, -1:].double() @ down.double().mT) @ up.double().mT
        for (down, up), gate in zip(
            [*(fused.nodes.pair(n) for n in "abc"), *(fused.memory.pair(p) for p in "123")],
            model.hft_gates.of("c")[0].tolist(),
            strict=True,
        )
    )
    (plain, narrow), (token, wide) = added(x_BTI[:, -1:], False), added(x_BTI[:, -1:], True)
    assert token.dtype == plain.dtype == torch.bfloat16 and wide.wide.keys() == {fused.name} and narrow.wide is None
    assert all(factor.dtype == torch.float32 for pair in wide.wide.values() for factor in pair)
    assert (token - exact).norm() <= (plain - exact).norm()  # one rounding instead of three
    assert added(x_BTI, True)[1].wide == {} and bits(added(x_BTI, True)[0]) == bits(added(x_BTI, False)[0])


def test_so_are_the_tokens_of_a_mixed_batch_a_row_each(backbones):
    """Each row as when it is alone; a row of the backbone gets nothing; longer rows are as they were."""
    model = chain(backbones, torch.bfloat16, memory_config={"slots": 3}).requires_grad_(False)
    fused = model._fused["layers.0.mlp.up_proj"]
    x_BTI = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    tasks = ["c", "a", "backbone", "b"]

    def added(rows, which, wide):
        with torch.no_grad():
            path = model._path(which, len(rows), is_one_pass=True)
            return fused.added(rows, path.with_wide_factors() if wide else path)

    mixed = added(x_BTI[:, -1:], tasks, True)
    assert mixed.dtype == torch.bfloat16 and not mixed[2].any()
    for row, task in enumerate(tasks):
        if task != "backbone":
            alone = added(x_BTI[row : row + 1, -1:], task, True)
            torch.testing.assert_close(mixed[row], alone[0], rtol=2**-7, atol=0)  # a last bit of bfloat16
    assert fused._stack is None  # in float32 they live no longer than the tokens come
    narrow = added(x_BTI[:, -1:], tasks, False)
    assert bits(mixed) != bits(narrow)
    assert bits(added(x_BTI, tasks, True)) == bits(added(x_BTI, tasks, False))


def test_9_a_rows_tokens_do_not_depend_on_its_neighbours_tasks_in_16_bit(backbones):
    """A token a row is multiplied in float32, and so it is beside any number of others, of one task or of several."""
    model = hft.HFTForCausalLM.from_backbone(
        backbones["llama"], {"a": [], "b": []}, rank=3, dtype=torch.bfloat16, attn_implementation="eager"
    )
    grow(model)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for seed in range(6):
        x = prompts(8, 6, seed=seed)
        one = model.generate(x, task="a", **options)
        assert model.generate(x, task=["a"] * 7 + ["b"], **options)[:7].tolist() == one[:7].tolist()
        for active in ("a", ["a"] * 8, ["a"] * 7 + ["b"]):
            with model.activate(active):
                assert model.generate(x, **options)[:7].tolist() == one[:7].tolist()


def test_constants_are_made_once_and_are_right_wherever_they_are_asked_for():
    constants, cpu = HFTConstants(), torch.device("cpu")
    with torch.inference_mode():
        first = constants.of([1, 0, 2], cpu)
    assert not first.is_inference() and constants.of((1, 0, 2), cpu) is first
    assert constants.of([True, False], cpu).dtype == torch.bool and constants.of([1, 0], cpu).dtype == torch.long
    with FakeTensorMode():
        assert isinstance(constants.of([7], cpu), FakeTensor)
    assert type(constants.of([7], cpu)) is torch.Tensor  # no fake one is kept
    assert copy.deepcopy(constants).of([1, 0, 2], cpu) is not first
    for number in range(2 * HFTConstants.MOST):
        assert constants.of([number, 9], cpu).tolist() == [number, 9]
    assert len(constants._made) <= HFTConstants.MOST


def test_an_open_tasks_factors_are_those_that_are_exported(backbones):
    """In bfloat16, its node in float32: rounded first, then scaled by the gates."""
    model = chain(backbones, torch.bfloat16, memory_config={"slots": 3})
    with torch.no_grad():
        model.hft_gates.of("c").copy_(torch.rand_like(model.hft_gates.of("c")))
        path = model._path("c", None, is_one_pass=True).tasks[0]
    exported = path_factors(model, "c")
    assert model.config.open_tasks() == ["c"]
    for name, fused in model._fused.items():
        for ours, theirs in zip(
            fused.factors(path, torch.empty(0, dtype=torch.bfloat16)), exported[name], strict=True
        ):
            assert bits(ours) == bits(theirs)
