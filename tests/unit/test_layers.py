"""The house's layers: imports point only downwards, and what must load fast loads nothing heavy."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "simpo"
FILES = sorted(SOURCE.rglob("*.py"))

# A module may import its own layer and those with a smaller number. `recipe` is beside them: any of them but core may
# import it, and it imports the declarations of losses and optimizers alone. The package's __init__ only hands out names
# lazily.
LAYERS = {
    "environment": 1,
    "errors": 1,
    "hub": 1,
    "streams": 1,
    "core": 1,
    "parallel": 2,
    "model": 3,
    "data": 4,
    "display": 4,
    "evaluation": 5,
    "run": 5,
    "plan": 6,
    "report": 6,
    "trainer": 6,
    "hosts": 7,
    "onpolicy": 7,
    "judging": 7,
    "shipping": 7,
    "starting": 7,
    "tuning": 8,
    "cli": 9,
    "__main__": 10,
}
HEAVY = {"torch", "transformers", "datasets", "numpy", "pyarrow", "peft", "accelerate"}


def module_name(path: Path) -> str:
    parts = ("simpo", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def layer_of(module: str) -> str:
    """The part after "simpo.": "data" for simpo.data.loader, "recipe" for every recipe module, "" for the package."""
    part = [*module.split("."), ""][1]
    return "recipe" if part.startswith("recipe") else part


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk(node: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """Every node that runs: at import, or at all. Blocks for type checkers never run."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if not inside_functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from walk(child, inside_functions=inside_functions)


def imported_modules(path: Path, *, inside_functions: bool = True) -> set[str]:
    found: set[str] = set()
    for node in walk(ast.parse(path.read_text(encoding="utf-8")), inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            # What is imported may be a module, as in `from simpo.run import checkpoint`, or a name in one.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES or node.module == "simpo" else node.module for name in names}
    return found


def top_level(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def files_of(layer: str) -> list[Path]:
    return [path for path in FILES if layer_of(module_name(path)) == layer]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_only_downwards(path):
    layer = layer_of(module_name(path))
    if layer == "":
        return
    assert layer == "recipe" or layer in LAYERS, f"give {module_name(path)} a layer in this test and in the design"
    for module in imported_modules(path):
        if not module.startswith("simpo."):
            continue
        target = layer_of(module)
        if layer in ("recipe", "core"):
            declared = ("simpo.core.losses", "simpo.core.optimizers", "simpo.core.own_loss")
            shared = ("simpo.errors", *(declared if layer == "recipe" else ()))
            assert target == layer or module in shared, f"{module_name(path)} imports {module}"
        elif target != "recipe":
            assert target in LAYERS, f"{module_name(path)} imports {module}, which has no layer"
            assert LAYERS[target] <= LAYERS[layer], f"{module_name(path)} imports {module}, which is above it"


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions included."""
    graph = {name: imported_modules(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_core_imports_torch_and_the_standard_library_alone():
    for path in files_of("core"):
        assert top_level(imported_modules(path)) - set(sys.stdlib_module_names) <= {"torch", "simpo"}, path.name


def test_the_batch_plan_imports_no_torch():
    assert top_level(imported_modules(SOURCE / "core" / "packing.py")) <= set(sys.stdlib_module_names)


def test_the_recipe_imports_nothing_heavy_anywhere():
    assert files_of("recipe")
    for path in files_of("recipe"):
        assert not top_level(imported_modules(path)) & HEAVY, path.name


def test_nothing_heavy_is_imported_before_the_arguments_are_parsed():
    """At import the command line and the package reach only modules that reach nothing heavy."""
    pending = [name for name in ("simpo", "simpo.cli", "simpo.__main__", "simpo.recipe") if name in MODULES]
    reached: set[str] = set()
    while pending:
        name = pending.pop()
        if name in reached:
            continue
        reached.add(name)
        imports = imported_modules(MODULES[name], inside_functions=False)
        assert not top_level(imports) & HEAVY, f"{name} imports {sorted(top_level(imports) & HEAVY)} when imported"
        pending += [module for module in imports if module in MODULES]
