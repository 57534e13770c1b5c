"""Messages name options as whoever asked writes them, and advise only what the caller can give."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import lamina
from lamina.caller import Command, another_place, named_model, offers, option, speaking, token_ids_instead

SOURCES = Path(lamina.__file__).parent
RUN = Command("run", {"model": "./my model", "memory": "1MB", "draft": None, "compression": "8bit", "prompt_ids": None})


def test_an_option_is_a_keyword_in_python_and_a_flag_on_the_command_line() -> None:
    assert (option("memory"), option("memory", "4GB")) == ("memory=", "memory='4GB'")
    assert option("trust_remote_code", True) == "trust_remote_code=True"
    names = ("memory", "device_memory", "trust_remote_code")
    with speaking(Command("run", dict.fromkeys(names))):
        assert (option("memory"), option("memory", "4GB")) == ("--memory", "--memory 4GB")
        assert option("device_memory", "a b") == "--device-memory 'a b'"
        assert option("trust_remote_code", True) == "--trust-remote-code"
    with speaking(Command("run", {"offline": False})):
        assert option("local_files_only", True) == "--offline"
    assert option("memory") == "memory="


def test_an_option_that_the_command_lacks_is_named_as_python_has_it() -> None:
    with speaking(RUN):
        assert not offers("to") and offers("memory")
        assert option("experts_implementation", "eager") == "experts_implementation='eager' in Python"
    assert offers("to")


def test_advice_is_what_the_command_can_do() -> None:
    with speaking(RUN):
        line = another_place()
        assert "`lamina split './my model' --compression 8bit --to DIR`" in line and "DIR as the model" in line
        assert "--prompt-ids" in token_ids_instead()
    with speaking(Command("split", {"to": None})):
        assert another_place() == "choose another place with --to"
    with speaking(Command("chat", {"model": "m"})):
        assert token_ids_instead() == "`lamina run m --prompt-ids 1,2,3` takes ids"
    assert "layer_shards_saving_path=" in another_place()
    assert token_ids_instead() == "pass token ids instead"


def _keywords() -> set[str]:
    from lamina.api import AutoModel, plan_model
    from lamina.cli.options import ModelOptions, SourceOptions
    from lamina.measure.bench import bench_model
    from lamina.store import split

    faces = (AutoModel.from_pretrained, plan_model, bench_model, split, ModelOptions, SourceOptions)
    names = {name for face in faces for name in inspect.signature(face).parameters}
    return (names | {"dtype", "attn_implementation", "experts_implementation", "local_files_only"}) - {
        "model",
        "transformers_kwargs",
    }


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """The texts of a file that a user may meet: what is written out of strings, docstrings left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            inside.add(id(node.body[0].value))  # type: ignore[attr-defined]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside.add(id(node.value))
        if isinstance(node, ast.FunctionDef) and node.name == "__repr__":
            inside |= {id(each) for each in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def test_no_message_writes_an_option_out() -> None:
    """But in the command line itself, and of keywords that it has no option for: neither speaks another language."""
    keywords = "|".join(sorted(_keywords(), key=len, reverse=True))
    written_out = re.compile(rf"(?<![\w.(])(?:{keywords})=(?!=)|(?<![\w-])--[a-z][a-z-]+|on the command line")
    bare = re.compile(rf"(?<![\w.'/])(?:{'|'.join(name for name in _keywords() if '_' in name)})(?![\w(.'])")
    found = []
    for file in SOURCES.rglob("*.py"):
        if file.parent.name == "cli" or file.name in ("caller.py", "arguments.py"):
            continue
        for line, text in _texts(file):
            shown = re.sub(r"`[a-z-]+ [^`]*`", "", text)  # a command to copy is one everywhere
            if written_out.search(shown) or (" " in shown and bare.search(shown)):
                found.append(f"{file.relative_to(SOURCES)}:{line}: {text!r}")
    assert not found, "name the option with lamina.caller.option:\n" + "\n".join(found)


def test_a_model_is_named_more_exactly_as_the_caller_would_do_it() -> None:
    assert named_model("me/m", "me/m:a b.gguf") == "'me/m:a b.gguf'"
    with speaking(Command("plan", {"model": "me/m", "draft": "me/d"})):
        assert named_model("me/m", "me/m:a b.gguf") == "`lamina plan 'me/m:a b.gguf'`"
        assert named_model("me/d", "me/d:a.gguf") == "--draft me/d:a.gguf"
