"""An index that no longer fits its files: the model loads while every tensor it needs is in some file of the index.

Plain transformers reads all files that an index names and never asks where in them a tensor was said to be.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.families import write_tiny
from lamina import AutoModel, FallbackWarning
from lamina.checkpoint import open_checkpoint
from lamina.errors import CheckpointError, MissingShardError, MissingTensorError
from lamina.hf.building.build import Request, build
from lamina.store import split

INDEX = "model.safetensors.index.json"
SHARDS = 3
Map = dict[str, str]


def _file(number: int) -> str:
    return f"model-0000{number + 1}-of-0000{SHARDS}.safetensors"


class Sharded:
    """A tiny llama in shards, whose index and files can be changed."""

    def __init__(self, root: Path) -> None:
        write_tiny("llama", root, dtype=torch.bfloat16)
        self.root = root
        self.tensors = load_file(root / "model.safetensors")
        (root / "model.safetensors").unlink()
        self.needed = set(self.tensors)
        self.held = {_file(i): set(sorted(self.tensors)[i::SHARDS]) for i in range(SHARDS)}
        for file in self.held:
            self.write(file)
        self.index = {name: file for file, names in self.held.items() for name in names}

    def write(self, file: str, factor: float = 1) -> None:
        save_file({n: factor * self.tensors.get(n, torch.ones(2)) for n in sorted(self.held[file])}, self.root / file)

    def save(self) -> Path:
        (self.root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.index}))
        return self.root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    return Sharded(tmp_path_factory.mktemp("whole"))


def _mutate(model: Sharded, chance: random.Random) -> None:
    """One thing that happens to published checkpoints."""
    name, file = chance.choice(sorted(model.needed)), _file(chance.randrange(SHARDS))
    what = chance.choice(["forget", "move", "invent", "gone", "drop", "copy", "odd"])
    if what == "forget":
        model.index.pop(name, None)
    elif what == "move":
        model.index[name] = file
    elif what == "invent":
        model.index[f"{name}.{chance.randrange(9)}"] = file
    elif what == "gone" and chance.random() < 0.3:
        model.index[chance.choice([name, "unneeded"])] = "model-00009-of-00009.safetensors"
    elif what == "drop" and chance.random() < 0.4:
        model.held[file].discard(name)
        model.write(file)
    elif what == "copy":
        model.held[file].add(name)
        model.write(file, chance.choice([1, 2]))
    elif what == "odd":
        model.held[file].add(chance.choice(["model.layers.0.self_attn.rotary_emb.inv_freq", "x", ""]))
        model.write(file)


def _check(model: Sharded) -> str:
    root, named = model.save(), set(model.index.values())
    there = set().union(*(model.held.get(file, ()) for file in named)) if named else set()
    wanted: type[CheckpointError] | None = None
    if not model.index:
        wanted = CheckpointError
    elif named - set(model.held):
        wanted = MissingShardError
    elif model.needed - there:
        wanted = MissingTensorError
    try:
        checkpoint = open_checkpoint(root)
        build(Request(str(root), {}), checkpoint)
    except CheckpointError as error:
        assert type(error) is wanted, error
        assert "\n" not in str(error)
        if wanted is MissingTensorError:
            assert any(name in str(error) for name in model.needed - there), error
        return wanted.__name__
    assert wanted is None, f"loaded, though it lacks {sorted(model.needed - there)[:3] or named - set(model.held)}"
    for name in model.needed:
        holders = [file for file in sorted(named) if name in model.held[file]]
        right = model.index.get(name) if model.index.get(name) in holders else holders[-1]
        assert Path(checkpoint.tensors[name].extent.file).name == right
    assert bool(checkpoint.fallbacks) == any(sum(n in model.held[f] for f in named) > 1 for n in there)
    return "loads"


def _fuzz(whole: Sharded, root: Path, seed: int, count: int) -> set[str]:
    chance, seen = random.Random(seed), set()
    for number in range(count):
        folder = root / str(number)
        shutil.copytree(whole.root, folder)
        model = Sharded.__new__(Sharded)
        model.root, model.tensors, model.needed = folder, whole.tensors, whole.needed
        model.held = {file: set(names) for file, names in whole.held.items()}
        model.index = dict(whole.index)
        for _ in range(chance.randrange(1, 5)):
            _mutate(model, chance)
        seen.add(_check(model))
        shutil.rmtree(folder)
    return seen


def test_an_index_that_is_changed_loads_or_misses_what_the_model_needs(whole: Sharded, tmp_path: Path) -> None:
    assert _fuzz(whole, tmp_path, 7, 30) == {"loads", "MissingShardError", "MissingTensorError"}


@pytest.mark.slow
def test_an_index_that_is_changed_in_many_ways(whole: Sharded, tmp_path: Path) -> None:
    assert _fuzz(whole, tmp_path, 8, 1500) == {"loads", "MissingShardError", "MissingTensorError"}


def test_what_a_stale_index_loads_is_what_plain_transformers_loads(tmp_path: Path) -> None:
    model = Sharded(tmp_path)
    first, other = sorted(model.needed)[0], sorted(model.needed)[1]
    model.index["nobody.needs.this"] = _file(0)  # and no file holds it
    model.index[first] = model.index[other]  # it is in another
    model.held[_file(2)].add(first)
    model.write(_file(2), 2)  # a copy with other numbers, in the file that the index names for neither
    model.index[first] = _file(2)
    folder = model.save()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.warns(FallbackWarning, match=r"is in two files .*: model-00003-of-00003.safetensors is used, as"):
        streamed = AutoModel.from_pretrained(str(folder), memory="3GB", device="cpu")
    with streamed.lamina, torch.no_grad():
        ids = torch.arange(3, 12)[None]
        assert torch.equal(streamed(ids).logits, plain(ids).logits)
        assert len(streamed.lamina.stats.fallbacks) == 1
    with pytest.warns(FallbackWarning, match="is in two files"):
        store = split(folder, to=tmp_path / "store").folder
    assert torch.equal(AutoModelForCausalLM.from_pretrained(store)(ids).logits, plain(ids).logits)


def test_a_needed_tensor_that_its_shard_lacks_is_named_with_the_shard(tmp_path: Path) -> None:
    model = Sharded(tmp_path)
    name = min(model.held[_file(1)])
    model.held[_file(1)].remove(name)
    model.write(_file(1))
    folder = model.save()
    line = (
        rf"the model wants tensor '{name}', which no file of .* holds: the index promises '{name}' in {_file(1)}, which"
    )
    with pytest.raises(MissingTensorError, match=line):
        build(Request(str(folder), {}), open_checkpoint(folder))


def test_a_shard_that_is_missing_is_missed_even_where_nobody_needs_it(tmp_path: Path) -> None:
    model = Sharded(tmp_path)
    model.index["nobody.needs.this"] = "model-00009-of-00009.safetensors"
    folder = model.save()
    with pytest.raises(FileNotFoundError):  # plain transformers reads every file of the index
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(MissingShardError, match=r"needs model-00009-of-00009\.safetensors: there is no file"):
        open_checkpoint(folder)


def test_a_stale_index_of_pickles_is_the_same(tmp_path: Path) -> None:
    model = Sharded(tmp_path)
    first, last = sorted(model.needed)[0], sorted(model.needed)[-1]
    files = {file: file.replace("model-", "pytorch_model-").replace(".safetensors", ".bin") for file in model.held}
    for file, names in model.held.items():
        tensors = {name: model.tensors[name] for name in sorted(names)}
        twice = {first: 2 * model.tensors[first]} if file == _file(2) else {}
        torch.save({**tensors, **twice}, tmp_path / files[file])
        (tmp_path / file).unlink()
    weight_map = {name: files[file] for name, file in model.index.items()}
    weight_map |= {last: weight_map[first], first: files[_file(2)], "nobody.needs.this": files[_file(1)]}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(FallbackWarning, match=rf"tensor '{first}' is in two files .*: {files[_file(2)]} is used, as"):
        streamed = AutoModel.from_pretrained(str(tmp_path), memory="3GB", device="cpu")
    with streamed.lamina, torch.no_grad():
        ids = torch.arange(3, 12)[None]
        assert torch.equal(streamed(ids).logits, plain(ids).logits)
