"""The rooms of Lamina and which of them import which, read from the sources and written into docs/architecture.md.

    python scripts/rooms.py            # writes what stands between the two markers
    python scripts/rooms.py --check    # changes nothing; exit code 1 where the page says something else

A room is a folder of src/lamina, and so is a folder in one (`hf.building`). Of the single modules beside them `api` is
a room too, and the others are one, `base`. An import counts wherever it stands: within a function, under TYPE_CHECKING,
and as a string that is the whole name of a module (the command line imports that way).
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "lamina"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms -->", "<!-- /rooms -->"
BASE = "base"
OWN = {"api"}  # single modules that are rooms of their own
NO_ROOM = {"__init__", "__main__"}  # the public names, and the program's start: they import from above and below

Graph = Mapping[str, frozenset[str]]


def modules(sources: Path) -> dict[str, Path]:
    """The file of each module, by its dotted name, packages by that of their folder."""
    found = {}
    for path in sorted(sources.rglob("*.py")):
        parts = path.relative_to(sources.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str, sources: Path) -> str | None:
    """The room of a module of Lamina; None for what is in none."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] in NO_ROOM:
        return None
    folders = [parts[1:end] for end in range(2, len(parts) + 1) if sources.joinpath(*parts[1:end]).is_dir()]
    return ".".join(folders[-1]) if folders else parts[1] if parts[1] in OWN else BASE


def imported(tree: ast.Module, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of Lamina that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        else:
            continue
        yield from (name for name in names if name in known)


def rooms(sources: Path = SOURCES) -> Graph:
    """Which rooms each room imports, itself left out.

    Raises:
        graphlib.CycleError: rooms import one another.
    """
    known = modules(sources)
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        room = room_of(module, sources)
        if room is None:
            continue
        others = {room_of(name, sources) for name in imported(ast.parse(path.read_text(encoding="utf-8")), known)}
        graph.setdefault(room, set()).update(other for other in others if other not in (None, room))
    graphlib.TopologicalSorter(graph).prepare()
    return {room: frozenset(others) for room, others in graph.items()}


def below(graph: Graph, room: str) -> frozenset[str]:
    """All rooms that a room reaches by its imports."""
    return graph[room].union(*(below(graph, other) for other in graph[room]))


def text(graph: Graph) -> str:
    """A mermaid graph, and one row for each room, from the top to the bottom.

    The graph leaves an arrow out where a longer way leads to the same room; the table has all.
    """
    order = sorted(graph, key=lambda room: (-len(below(graph, room)), room))
    lines = ["```mermaid", "graph TD"]
    for room in order:
        longer = frozenset[str]().union(*(below(graph, other) for other in graph[room]))
        lines += [f"    {room} --> {other}" for other in order if other in graph[room] - longer]
    lines += ["```", "", "| room | imports |", "|---|---|"]
    for room in order:
        lines.append(f"| {room} | {', '.join(other for other in order if other in graph[room]) or 'none'} |")
    return "\n".join(lines)


def filled(page: str, graph: Graph) -> str:
    """The page with the graph between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{BEGIN} and {END} do not both stand in {PAGE.relative_to(ROOT)}")
    return f"{before}{BEGIN}\n{text(graph)}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` compare it; the exit code."""
    page = PAGE.read_text(encoding="utf-8")
    wanted = filled(page, rooms())
    if arguments == ["--check"]:
        if page != wanted:
            print("docs/architecture.md shows other imports than the sources have: run python scripts/rooms.py")
        return int(page != wanted)
    if arguments:
        print(__doc__)
        return 2
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
