"""Every public name of the package says what it is, and a class name stands for one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "lamina"
TREES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes and functions of a module, and those in public classes, by their dotted names."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


def untold(trees: dict[str, ast.Module]) -> set[str]:
    """Modules with something in them, and public names, that have no docstring."""
    modules = {place for place, tree in trees.items() if tree.body and ast.get_docstring(tree) is None}
    names = ((f"{place}: {name}", node) for place, tree in trees.items() for name, node in public(tree.body))
    return modules | {name for name, node in names if ast.get_docstring(node) is None}


def test_every_public_name_has_a_docstring() -> None:
    assert not untold(TREES)


def test_a_name_without_docstring_is_found() -> None:
    text = """'A module.'
class A:
    '.'
    def b(self): ...
    def _c(self): ...
def d(): ...
class _E: ...
"""
    assert untold({"here.py": ast.parse(text)}) == {"here.py: A.b", "here.py: d"}
    assert untold({"here.py": ast.parse("a = 1")}) == {"here.py"}


def ambiguous(trees: dict[str, ast.Module]) -> set[str]:
    """Names of classes and of types that more than one module, or one module twice, gives."""
    places: dict[str, list[str]] = defaultdict(list)
    for place, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(place)
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name[0].isupper() and not name.isupper():  # a type; a constant is all capitals
                    places[name].append(place)
    return {name for name, given in places.items() if len(given) > 1}


def test_a_class_name_stands_for_one_thing() -> None:
    assert not ambiguous(TREES)


def test_a_class_name_with_two_meanings_is_found() -> None:
    first = ast.parse("class One: ...\nclass _Two: ...\nclass Once: ...\nType = int\nROOM = 1")
    second = ast.parse("One = int\ndef f():\n    class _Two: ...\nclass Type: ...\nROOM = 2")
    assert ambiguous({"first.py": first, "second.py": second}) == {"One", "_Two", "Type"}
