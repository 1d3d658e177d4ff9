"""Recipes for cards: the memory that each says it takes is what the estimate says, and fits the card in its name."""

import re
from pathlib import Path

import pytest
from transformers import AutoConfig

import hft
from hft.trainers.memory_estimate import estimate_recipe
from hft.trainers.recipes import read_recipe


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "hub_configs/recipes").glob("*gb.yaml"))
_QWEN3 = dict(model_type="qwen3", num_key_value_heads=8, head_dim=128, vocab_size=151936)
SHAPES = {  # of the backbones' own config.json
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": dict(
        model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=49152, tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-1.7B": dict(
        **_QWEN3, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-4B": dict(
        **_QWEN3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-8B": dict(
        **_QWEN3, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ),
}  # fmt: skip
ROOM = 0.9  # GiB, for CUDA's context, buffers of kernels, and what the allocator cannot use


LARGE = [path for path in RECIPES if not path.stem.endswith(("-8gb", "-12gb"))]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path in LARGE)) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_a_cards_recipe_says_what_it_takes_and_fits(path):
    recipe = read_recipe(path)
    estimate = estimate_recipe(recipe, AutoConfig.for_model(**SHAPES[recipe.backbone]))
    said = re.search(r"^# Predicted peak: ([\d.]+) GiB .*Measured: not yet\.$", path.read_text(), re.MULTILINE)
    peak = estimate.total / 2**30
    assert float(said[1]) == pytest.approx(peak, abs=0.051)
    card = int(re.search(r"-(\d+)gb$", path.stem)[1]) * 1e9 / 2**30
    assert 0.4 * card < peak < card - ROOM, f"{peak:.1f} of {card:.1f} GiB: {estimate}"
    assert recipe.training["output_dir"] == f"outputs/{path.stem}"


def test_the_readmes_table_names_each_of_them():
    readme = (ROOT / "README.md").read_text()
    for path in RECIPES:
        said = re.search(r"Predicted peak: ([\d.]+) GiB", path.read_text())[1]
        name, card = path.stem.rsplit("-", 1)
        assert f"[{path.stem}](hub_configs/recipes/{path.name}) | {said} GiB |" in readme, (name, card)


def test_a_larger_stage_is_what_counts(tmp_path):
    """One root and three children: the second stage trains more, and holds the first one's node besides."""
    recipe = read_recipe(RECIPES[0])
    config = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, vocab_size=100)  # fmt: skip
    recipe.hierarchy = {"a": [], **{name: ["a"] for name in "bcd"}}
    found = estimate_recipe(recipe, config)
    recipe.hierarchy = {"a": []}
    alone = estimate_recipe(recipe, config)
    node = alone.tasks + (alone.training // 4 - alone.training // 4 * 8 // 24)
    page = node // 2
    assert found.training // 4 == 3 * node + page and found.tasks == 2 * (node + page)
    assert found.activations > alone.activations  # a longer path


def test_tasks_that_join_a_model_cost_what_its_last_stage_would():
    recipe = read_recipe(RECIPES[0])
    config = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, vocab_size=100)  # fmt: skip
    recipe.hierarchy = {"a": [], "b": ["a"], "c": ["b"], "d": ["b"]}
    whole = estimate_recipe(recipe, config)
    own = {key: recipe.model[key] for key in ("rank", "target_modules") if key in recipe.model}
    learnt = hft.HFTConfig(
        text_config=config,
        tasks=[{"name": "a", "sealed": True}, {"name": "b", "parents": ["a"], "sealed": True}],
        pages=[{"id": i, "slots": 8, "sealed": True, "writers": [task]} for i, task in ((1, "a"), (2, "b"))],
        **own,
    )
    recipe.hierarchy, recipe.from_model = {"c": ["b"], "d": ["b"]}, "somewhere"
    assert estimate_recipe(recipe, config, onto=learnt) == whole
    learnt.tasks[1]["rank"] = 1  # as after a cut
    assert estimate_recipe(recipe, config, onto=learnt).tasks < whole.tasks
    with pytest.raises(ValueError, match="What 'somewhere' has learnt already takes memory, too; give"):
        estimate_recipe(recipe, config)
