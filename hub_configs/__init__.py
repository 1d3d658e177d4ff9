"""Recipes and templates: data, and which recipes there are."""

from importlib import resources
from pathlib import Path


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with the package: name -> file."""
    folder = Path(str(resources.files(__name__))) / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
