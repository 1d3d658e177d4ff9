import re

import pytest

from hft import Hierarchy


DIAMOND = {"d": ["b", "c"], "b": ["a"], "a": [], "c": ["a"], "e": []}


def test_levels_paths_and_order():
    tree = Hierarchy(DIAMOND)
    assert tree.levels() == [("a", "e"), ("b", "c"), ("d",)]
    assert tree.path("d") == ("a", "b", "c", "d")  # `a` is reached twice and counted once
    assert tree.path("e") == ("e",)
    position = {name: i for i, name in enumerate(tree.names)}
    for child, parents in DIAMOND.items():
        assert all(position[parent] < position[child] for parent in parents)


def test_a_path_does_not_depend_on_what_is_added_later():
    before = Hierarchy(DIAMOND)
    after = Hierarchy({"z": ["e"], **DIAMOND, "y": ["d", "z"]})
    assert [before.path(task) for task in DIAMOND] == [after.path(task) for task in DIAMOND]


def test_drawing_names_every_task_once_and_further_parents():
    lines = Hierarchy(DIAMOND).draw({"e": "100 rows"}).splitlines()
    assert lines == ["backbone", "├─ a", "│  ├─ b", "│  │  └─ d (also on c)", "│  └─ c", "└─ e  100 rows"]


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ({"a": ["sst"], "sst2": []}, "Task 'a' names the unknown parent 'sst'. Did you mean 'sst2'?"),
        ({"a": ["b"], "b": ["a"]}, "The hierarchy has a cycle: "),
        ({"a": ["a"]}, "The hierarchy has a cycle: a -> a. Remove one of these parents."),
        ({"a": [], "A": []}, "The task names 'a' and 'A' are duplicates"),
        ({"a": [], "b": ["a", "a"]}, "names its parent 'a' twice"),
        ({"a": "b", "b": []}, "are the string 'b'; give a list: ['b']"),
        ({"a": None}, "The parents of task 'a' are None; give a list, [] for a root."),
        ({"../x": []}, "cannot be a task's name: use 1 to 64 letters"),
        ({"a.b": []}, "cannot be a task's name"),
        ({"Backbone": []}, "the word is reserved for the plain backbone"),
    ],
)
def test_what_is_no_hierarchy_is_refused(parents, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Hierarchy(parents)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=re.escape("Unknown task 'yep'. Did you mean 'yelp'?")):
        Hierarchy({"yelp": [], "mnli": []}).path("yep")


def test_the_lowest_common_ancestor():
    tree = Hierarchy({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": ["b", "c"], "x": []})
    for tasks, expected in [
        (["d", "e"], "b"),  # c is on both paths, too: the first in `names` counts
        (["b", "c"], "a"),
        (["b", "d"], "b"),
        (["d"], "d"),
        (["a", "x"], None),
        (["d", "e", "x"], None),
    ]:
        assert tree.lowest_common_ancestor(tasks) == expected, tasks


def test_an_edge_shows_how_much_flows():
    tree = Hierarchy({"a": [], "b": ["a"], "c": ["a"], "d": ["c"], "e": ["d"]})
    assert tree.draw(weights={"b": 0.9, "c": 0.1, "d": 0.0, "e": 0.5}).splitlines() == [
        "backbone",
        "└─ a",
        "   ├═ b",
        "   └╌ c",
        "      └· d",
        "         └─ e",
    ]


def test_a_deep_diamond_is_walked_once():
    """Two ways at each of sixty levels: 2^60 ways in all."""
    tree = {"a0": [], "b0": []} | {f"{x}{i}": [f"a{i - 1}", f"b{i - 1}"] for i in range(1, 60) for x in "ab"}
    assert len(Hierarchy(tree).path("a59")) == 119
