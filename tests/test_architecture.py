"""The layout: one-way imports, no ``kernels/__init__.py``, files of readable size."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each layer may import from the package besides its own folder.
BOTTOM = {"_types", "_checks", "_counters", "_select"}
CACHES = {"kv_cache", "recurrent_state"}
ALLOWED = {
    "reference": BOTTOM | CACHES,
    "eager": BOTTOM | CACHES,
    "kernels": set(),
    "ops": BOTTOM | CACHES | {"reference", "eager", "kernels", "_C"},
    "modules": BOTTOM | CACHES | {"ops"},
}


def _sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("layer", ALLOWED)
def test_imports_run_one_way(layer: str) -> None:
    folder = "kernels" if layer == "kernels" else f"attnvariants/{layer}"
    for path in _sources(folder):
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "attnvariants" or len(parts) < 2:
                continue
            assert parts[1] in ALLOWED[layer] | {layer}, f"{path.name} imports {name}"


def test_only_kernels_import_triton() -> None:
    for path in [*_sources("attnvariants"), *_sources("bench")]:
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for node in top:
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            assert not any(name.split(".")[0] == "triton" for name in names), path


def test_kernels_is_not_a_top_level_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    import attnvariants.kernels

    assert [Path(entry).name for entry in attnvariants.kernels.__path__] == ["kernels"]


def test_public_names_exist_and_are_listed() -> None:
    import attnvariants

    for name in attnvariants.__all__:
        assert getattr(attnvariants, name) is not None
    assert set(attnvariants.__all__) <= set(dir(attnvariants))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = attnvariants.no_such_name


def test_import_is_light() -> None:
    """Importing the package loads neither Triton nor a plotting library, and no device."""
    code = (
        "import sys, attnvariants, torch; "
        "assert not torch.cuda.is_initialized(); "
        "loaded = {'triton', 'matplotlib', 'rich'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_function_has_a_definition_and_a_public_home() -> None:
    from attnvariants._select import FUNCTIONS

    for function in FUNCTIONS:
        assert (ROOT / "attnvariants" / "ops" / f"{function}.py").is_file()
        assert (ROOT / "attnvariants" / "reference" / f"{function}.py").is_file()


def test_nothing_is_left_open() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
    for folder in ("attnvariants", "bench", "kernels", "csrc", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp"):
                text = path.read_text()
                assert not any(mark in text for mark in marks), path
