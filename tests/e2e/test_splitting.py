"""What a store is: which tensor gets which codec, where it lies, and that every number is in it."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import families
from helpers.fake_hub import FakeHub, connected
from helpers.families import write_tiny
from lamina import plan_model
from lamina.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from lamina.checkpoint.manifest import MANIFEST, PADDING, read_manifest
from lamina.codec import codec_for
from lamina.errors import CheckpointError, ModelNotFoundError, RequestError, UnsupportedError
from lamina.hub import remote_headers
from lamina.store import default_folder, encode, recipe, split, verify, work
from lamina.store import shards as layout
from lamina.store.shards import Run, Stored, make_files
from lamina.store.size import estimate
from lamina.store.source import SourceFiles

NUMBERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def source_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def unpacked(entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a store by its extent and encoding alone, as docs/store-format.md says."""
    raw = Path(entry.extent.file).read_bytes()[entry.extent.offset : entry.extent.offset + entry.extent.length]
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    if entry.encoding is None:
        return data.view(dtype).view(entry.shape)
    rows, columns = entry.shape[-2:]
    panels = data.view(-1, -(-rows // entry.encoding.panel_rows), entry.encoding.panel_bytes)
    out = torch.empty(len(panels), rows, columns, dtype=dtype)
    for matrix, own in zip(panels, out, strict=True):
        codec_for(entry.encoding.codec).unpack(matrix.contiguous(), rows, columns, own)
    return out.view(entry.shape)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(NUMBERS[one.dtype]), other.view(NUMBERS[other.dtype]))


def codecs_of(store: Checkpoint) -> dict[str, str]:
    return {name: entry.encoding.codec if entry.encoding else "plain" for name, entry in store.tensors.items()}


def fresh(tmp_path: Path, family: str, compression: str | None) -> tuple[Path, Checkpoint]:
    """A tiny checkpoint and a store of it."""
    source = tmp_path / family
    families.write_tiny(family, source, dtype=torch.bfloat16)
    split(source, to=tmp_path / "store", compression=compression)
    return source, open_checkpoint(tmp_path / "store")


Make = Callable[..., tuple[Path, Checkpoint]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A tiny checkpoint and a store of it, made once for all tests that only read them."""

    @functools.cache
    def source(family: str, dtype: torch.dtype, shards: str | None) -> Path:
        folder = tmp_path_factory.mktemp("source") / family
        families.write_tiny(family, folder, dtype=dtype, max_shard_size=shards)
        return folder

    @functools.cache
    def made(
        family: str, compression: str | None, dtype: torch.dtype = torch.bfloat16, shards: str | None = None
    ) -> tuple[Path, Checkpoint]:
        store = tmp_path_factory.mktemp("stores") / "store"
        split(source(family, dtype, shards), to=store, compression=compression)
        return source(family, dtype, shards), open_checkpoint(store)

    return made


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_plain_is_an_ordinary_checkpoint_with_the_same_numbers(make: Make, dtype: torch.dtype) -> None:
    source, store = make("mixtral", None, dtype, "200KB")
    assert set(codecs_of(store).values()) == {"plain"}
    written = source_of(Path(store.root))
    assert set(written) == set(source_of(source)), "no padding, nothing added"
    assert all(same_bits(written[name], tensor) for name, tensor in source_of(source).items())
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (store.root, source))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "llama4_text"])
def test_lossless_gives_every_bit_back(make: Make, family: str) -> None:
    source, store = make(family, "lossless")
    wanted = source_of(source)
    assert all(same_bits(unpacked(store.tensors[name], torch.bfloat16), wanted[name]) for name in wanted)


@pytest.mark.parametrize("compression", ["8bit", "4bit"])
def test_coded_tensors_are_what_their_codec_makes_of_them(make: Make, compression: str) -> None:
    source, store = make("mixtral", compression)
    for name, tensor in source_of(source).items():
        entry = store.tensors[name]
        if entry.encoding is None:
            assert same_bits(unpacked(entry, torch.bfloat16), tensor)
            continue
        own = codec_for(entry.encoding.codec)
        expected = torch.empty_like(tensor)
        own.unpack(own.encode(tensor), *tensor.shape, expected)  # type: ignore[attr-defined]
        assert same_bits(unpacked(entry, torch.bfloat16), expected)


def test_linears_experts_and_tables_are_coded_and_nothing_else(make: Make) -> None:
    _, store = make("mixtral", "8bit")
    found = codecs_of(store)
    coded = {name.removesuffix(".weight").split(".")[-1] for name, codec in found.items() if codec == "q8"}
    plain = {name.removesuffix(".weight").split(".")[-1] for name, codec in found.items() if codec == "plain"}
    assert coded == {"embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"}
    assert plain == {"norm", "input_layernorm", "post_attention_layernorm", "gate"}


def test_weights_that_are_not_used_as_linears_stay_plain(make: Make) -> None:
    _, store = make("gpt2", "8bit")
    found = codecs_of(store)
    assert found["transformer.h.0.attn.c_attn.weight"] == "plain", "a Conv1D multiplies the other way round"
    assert found["transformer.wte.weight"] == "q8" and found["transformer.wpe.weight"] == "q8"


def test_a_tensor_that_the_model_does_not_use_is_kept_as_it_is(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tmp_path / "source"
    families.write_tiny("llama", source, dtype=torch.bfloat16)
    tensors = source_of(source)
    extra = torch.randn(40, 64).bfloat16()
    save_file({**tensors, "model.mtp.0.weight": extra}, source / "model.safetensors", {"format": "pt"})
    split(source, to=tmp_path / "store", compression="4bit")
    entry = open_checkpoint(tmp_path / "store").tensors["model.mtp.0.weight"]
    assert entry.encoding is None and same_bits(unpacked(entry, torch.bfloat16), extra)


def test_a_file_is_a_layer_and_what_belongs_to_none_comes_last(make: Make) -> None:
    _, store = make("mixtral", "8bit")
    by_file: dict[str, set[str]] = {}
    for name, entry in store.tensors.items():
        by_file.setdefault(os.path.basename(entry.extent.file), set()).add(".".join(name.split(".")[:3]))
    layers = [{f"model.layers.{number}"} for number in range(families.LAYERS)]
    assert [by_file[name] for name in sorted(by_file)][:-1] == layers
    assert by_file[max(by_file)] == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_the_parts_of_a_merged_weight_lie_one_behind_the_other(make: Make) -> None:
    _, store = make("mixtral", "8bit")
    prefix = "model.layers.1.block_sparse_moe.experts"
    order = [f"{prefix}.{expert}.{part}.weight" for expert in range(families.EXPERTS) for part in ("w1", "w3")]
    extents = [store.tensors[name].extent for name in order]
    assert all(a.offset + a.length == b.offset for a, b in itertools.pairwise(extents))


def test_the_files_are_valid_for_safetensors_itself(make: Make) -> None:
    _, store = make("qwen3_moe", "4bit")
    manifest = read_manifest(store.root)
    index = json.loads((Path(store.root) / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(store.tensors)
    for file in store.files:
        with safe_open(file, "pt") as opened:
            described = json.loads(opened.metadata()["lamina"])
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                if name in described:
                    assert described[name]["codec"] == manifest.tensors[name].codec
                    assert tensor.dtype == torch.uint8 and tensor.dim() == 2
                assert name.startswith(PADDING) or index[name] == os.path.basename(file)


def test_a_layer_that_is_too_large_for_a_file_gets_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MOST_BYTES", 60_000)
    monkeypatch.setattr(layout, "OWN_FILE_BYTES", 20_000)
    source, store = fresh(tmp_path, "mixtral", None)
    assert len(store.files) > families.LAYERS + 1
    assert all(same_bits(unpacked(store.tensors[n], torch.bfloat16), t) for n, t in source_of(source).items())


@pytest.mark.parametrize("compression", ["8bit", "4bit", "lossless", None])
def test_blocks_of_rows_make_the_same_bytes_as_whole_tensors(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str | None
) -> None:
    source, store = make("llama", compression)
    longest = 0
    real = SourceFiles.read

    def watched(self: SourceFiles, extent: object, at: int, nbytes: int) -> memoryview:
        nonlocal longest
        longest = max(longest, nbytes)
        return real(self, extent, at, nbytes)  # type: ignore[arg-type]

    monkeypatch.setattr(encode, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(encode, "COPIED_BYTES", 1000)
    monkeypatch.setattr(SourceFiles, "read", watched)
    split(source, to=tmp_path / "blocks", compression=compression)
    panel = max(recipe.PANEL_ROWS) if compression == "lossless" else 1
    assert longest <= max(1000, panel * families.INTERMEDIATE * 2)
    for file in store.files:
        assert (tmp_path / "blocks" / os.path.basename(file)).read_bytes() == Path(file).read_bytes()


@pytest.mark.parametrize("compression", ["8bit", "lossless", None])
def test_the_room_that_is_needed_is_known_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str | None
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(work, "check_room", lambda folder, needed: asked.append(needed - work.SPARE_BYTES))
    _, store = fresh(tmp_path, "llama", compression)
    written = sum(os.path.getsize(file) for file in store.files)
    share = 0.06 if compression == "lossless" else 0
    assert abs(asked[0] - written) <= share * written


def test_a_lossless_panel_size_that_is_not_known_is_estimated(tmp_path: Path) -> None:
    source = tmp_path / "source"
    families.write_tiny("llama", source, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(source)
    entry = checkpoint.tensors["model.embed_tokens.weight"]
    files = make_files([Run("", (Stored(entry.name, "BF16", entry.shape, "bf16z", 64),))], padded=True)
    assert 0.5 * entry.extent.length < estimate(files, checkpoint) - layout.ALIGNMENT < entry.extent.length


def test_small_files_are_copied_and_foreign_weights_are_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    families.write_tiny("llama", source)
    for name in ("tokenizer.json", "chat_template.jinja", "pytorch_model.bin", "notes.md", MANIFEST + ".bak"):
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("t")
    split(source, to=tmp_path / "store")
    names = {str(path.relative_to(tmp_path / "store")) for path in (tmp_path / "store").rglob("*") if path.is_file()}
    small = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert {name for name in names if not name.startswith("model-")} == {
        *small, "additional_chat_templates/tool.jinja", MANIFEST, "model.safetensors.index.json"
    }  # fmt: skip


def test_a_plain_store_can_be_split_again_and_gives_the_same_files(make: Make, tmp_path: Path) -> None:
    source, plain = make("llama", None)
    split(source, to=tmp_path / "direct", compression="8bit")
    split(plain.root, to=tmp_path / "again", compression="8bit")
    for file in (tmp_path / "direct").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_store_that_is_there_is_not_written_again_even_without_its_source(tmp_path: Path) -> None:
    source, store = fresh(tmp_path, "llama", "8bit")
    before = {file: os.stat(file).st_mtime_ns for file in store.files}
    assert split(source, to=store.root, compression="8bit").files_kept == len(before)
    (source / "model.safetensors").unlink()
    assert split(source, to=store.root, compression="8bit").files_kept == len(before)
    assert {file: os.stat(file).st_mtime_ns for file in store.files} == before


def test_a_store_of_another_model_is_not_taken_for_this_one(make: Make, tmp_path: Path) -> None:
    _, store = make("llama", "8bit")
    families.write_tiny("llama", tmp_path / "other", dtype=torch.bfloat16, seed=1)
    with pytest.raises(CheckpointError, match="it was made from llama"):
        split(tmp_path / "other", to=store.root, compression="8bit")


def test_the_default_place_is_beside_the_model(tmp_path: Path) -> None:
    families.write_tiny("llama", tmp_path / "model")
    assert split(tmp_path / "model", compression="8bit").folder == str(tmp_path / "model-8bit")
    assert split(tmp_path / "model" / "model.safetensors").folder == str(tmp_path / "model-plain")
    elsewhere = split(tmp_path / "model", compression="8bit", layer_shards_saving_path=tmp_path / "stores")
    assert elsewhere.folder == str(tmp_path / "stores" / "model-8bit")
    assert default_folder(f"{tmp_path}/model/", "4bit") == str(tmp_path / "model-4bit")


def test_a_model_of_the_hub_gets_a_place_in_its_cache(tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    families.write_tiny("llama", snapshot)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)
    result = split("org/name", compression="8bit", cache_dir=str(tmp_path), local_files_only=True)
    assert result.folder == str(tmp_path / "lamina" / f"org--name-{commit[:12]}-8bit")
    manifest = read_manifest(result.folder)
    assert (manifest.source["model"], manifest.source["revision"]) == ("org/name", commit)
    (snapshot / "model.safetensors").unlink()
    again = split("org/name", compression="8bit", cache_dir=str(tmp_path), local_files_only=True, delete_original=True)
    assert again.files_kept == again.files and "hub's cache" in again.kept["org/name"]
    snapshot.rename(snapshot.parent / ("9" * 40))
    (tmp_path / "models--org--name" / "refs" / "main").write_text("9" * 40)
    with pytest.raises(CheckpointError, match=f"it was made from revision {commit}, which is not 9999"):
        split("org/name", to=result.folder, compression="8bit", cache_dir=str(tmp_path), local_files_only=True)


def test_numbers_that_cannot_be_coded_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tmp_path / "source"
    families.write_tiny("llama", source)
    tensors = source_of(source)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        split(source, to=tmp_path / "store", compression="8bit")


def test_wrong_requests(tmp_path: Path) -> None:
    families.write_tiny("llama", tmp_path / "model")
    with pytest.raises(RequestError, match="there is no compression '3bit': choose one of 8bit, 4bit, lossless"):
        split(tmp_path / "model", compression="3bit")
    with pytest.raises(ModelNotFoundError):
        split(tmp_path / "nothing")
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_progress_counts_the_bytes_of_the_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    families.write_tiny("llama", source, dtype=torch.bfloat16)
    for compression in ("8bit", "lossless"):
        said: list[tuple[str, int, int]] = []
        split(source, to=tmp_path / compression, compression=compression, progress=lambda *each: said.append(each))  # noqa: B023
        total = open_checkpoint(source).nbytes
        assert {each[0] for each in said} == {"split"}
        assert [each[1] for each in said] == sorted(each[1] for each in said)
        assert said[0][1:] == (0, total) and said[-1][1:] == (total, total)
    seen: list[tuple[str, int, int]] = []
    whole = verify(tmp_path / "8bit", progress=lambda *each: seen.append(each))
    assert not whole.faults and seen[-1] == ("verify", whole.bytes, whole.bytes)


def test_pickled_weights_are_written_as_safetensors(tmp_path: Path) -> None:
    families.write_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    tensors = source_of(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    store = open_checkpoint(split(tmp_path / "model").folder)
    assert all(same_bits(unpacked(store.tensors[name], torch.bfloat16), tensor) for name, tensor in tensors.items())


def test_a_tied_tensor_under_a_second_name_is_coded_like_the_first(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    families.write_tiny("llama", tmp_path / "model", dtype=torch.bfloat16, tie=True)
    tensors = source_of(tmp_path / "model")
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **copy}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    found = codecs_of(open_checkpoint(split(tmp_path / "model", compression="8bit").folder))
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"] == "q8"


def test_a_model_in_which_nothing_can_be_coded_is_refused(tmp_path: Path) -> None:
    families.write_tiny("llama", tmp_path / "model", dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=r"nothing in .* can be stored as lossless"):
        split(tmp_path / "model", compression="lossless")
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "model.gguf").write_bytes(b"GGUF")
    for model in (tmp_path / "blocks", tmp_path / "blocks" / "model.gguf"):
        with pytest.raises(UnsupportedError, match="needs no split"):
            split(model)
    assert sorted(os.listdir(tmp_path)) == ["blocks", "model"]


def test_the_headers_of_a_store_on_the_hub_say_what_is_in_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = make("mixtral", "4bit")
    with connected(FakeHub(), tmp_path, monkeypatch) as hub:
        hub.add("org/store", {path.name: path.read_bytes() for path in Path(store.root).iterdir()})
        remote = remote_headers("org/store")
    assert {name: (e.dtype, e.shape, e.encoding) for name, e in remote.tensors.items()} == {
        name: (e.dtype, e.shape, e.encoding) for name, e in store.tensors.items()
    }


@pytest.mark.parametrize("compression", ["8bit", "4bit", "lossless"])
def test_the_plan_of_a_store_that_is_not_there_yet_is_that_of_the_store(compression: str, tmp_path: Path) -> None:
    write_tiny("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    model = str(tmp_path / "model")
    before = plan_model(model, compression=compression, device="cpu", context=64)
    store = split(model, compression=compression).folder
    there, after = (plan_model(each, device="cpu", context=64) for each in (model, store))
    assert before.model_bytes < 0.8 * there.model_bytes
    assert before.model_bytes == pytest.approx(after.model_bytes, rel=0.1 if compression == "lossless" else 0)
    assert len(before.resident) == len(after.resident)
    assert plan_model(model, compression=compression, device="cpu", context=64).model_bytes == after.model_bytes
