"""The house: who imports whom, what ships, and that nobody else's words slip in."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path for path in (ROOT / "modeling_hft").glob("*_hft.py") if path.name != "lora_io_hft.py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_ships_needs_only_the_core_and_is_flat(path):
    for name in imports(path):
        if name.startswith("."):
            assert (ROOT / "modeling_hft" / f"{name[1:]}.py").exists(), (
                f"remote code copies `from .x import y` only: {name}"
            )
        else:
            top = name.split(".")[0]
            assert top in {"torch", "transformers", "safetensors", "huggingface_hub", *sys.stdlib_module_names}, name


def test_what_ships_imports_no_more_than_what_ships():
    shipped = {f".{path.stem}" for path in SHIPPED}
    for path in SHIPPED:
        assert {name for name in imports(path) if name.startswith(".")} <= shipped, path


def test_imports_point_one_way():
    for folder, forbidden in (
        ("modeling_hft", ("hft.", "trainers", "hub_configs")),
        ("trainers", ("examples", "tests")),
    ):
        for path in (ROOT / folder).glob("*.py"):
            assert not [name for name in imports(path) if name.startswith(forbidden)], path
    assert not list((ROOT / "hub_configs").glob("[!_]*.py"))


def test_the_curriculum_and_the_hierarchy_need_no_torch():
    for module in ("trainers/curriculum.py", "modeling_hft/hierarchy_hft.py"):
        assert "torch" not in {name.split(".")[0] for name in imports(ROOT / module)}


def test_the_core_imports_without_the_trainers_packages():
    code = (
        "import sys\nfor name in ('trl', 'datasets', 'peft', 'bitsandbytes', 'accelerate'): sys.modules[name] = None\n"
        "import hft\nprint(hft.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]


def test_files_are_short():
    for folder in ("modeling_hft", "trainers"):
        for path in (ROOT / folder).glob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 390, f"{path} has {lines} lines; a file has one subject"


def test_the_readme_names_every_module_and_no_other():
    named: dict[str, set[str]] = {}
    for line in (ROOT / "README.md").read_text().split("## The code\n")[1].split("```")[1].splitlines():
        names = set(re.findall(r"\w+", line.strip().split("  ")[0]))
        if line.startswith("  "):
            named[list(named)[-1]] |= names
        elif line:
            named[names.pop()] = set()
    for folder in ("modeling_hft", "trainers"):
        modules = {path.stem.removesuffix("_hft") for path in (ROOT / folder).glob("[!_]*.py")}
        assert named[folder] == modules, folder


def test_the_space_asks_for_what_the_package_asks_for():
    declared = (ROOT / "pyproject.toml").read_text()
    for line in (ROOT / "examples/space/requirements.txt").read_text().splitlines():
        assert f'"{line}"' in declared, line
    assert "\napp_file: app.py\n" in (ROOT / "examples/space/README.md").read_text()
