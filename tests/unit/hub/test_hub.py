"""From a hub id to a folder: only what is needed is fetched, and once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from helpers.fake_hub import FakeHub, connected
from helpers.make_safetensors import to_bytes, vector
from lamina.checkpoint import open_checkpoint
from lamina.errors import CheckpointError, ModelNotFoundError
from lamina.hub import locate, metadata_folder, remote_headers

SMALL = {
    "config.json": b"{}",
    "generation_config.json": b"{ }",
    "tokenizer.json": b"[]",
    "tokenizer.model": b"spm",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
}
SHARDS = {
    "model-00001-of-00002.safetensors": to_bytes({"a": vector(*range(200))}),
    "model-00002-of-00002.safetensors": to_bytes({"b": vector(*range(100))}),
}
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SINGLE = {**SMALL, "model.safetensors": to_bytes({"a": vector(1, 2, 3)})}
SHARDED = {**SMALL, **SHARDS, "model.safetensors.index.json": INDEX.encode()}
CLUTTER = {
    ".gitattributes": b"x",
    "README.md": b"# A model",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "consolidated.safetensors": b"mistral",
    "consolidated-00001-of-00002.safetensors": b"mistral",
    "model.fp16.safetensors": b"other variant",
    "model.safetensors.index.fp16.json": b"{}",
    "m.Q4_K_M.gguf": b"GGUF",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "modeling_new.py": b"import os",
    "unlisted.safetensors": b"not in the index",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits between its tries
    with connected(FakeHub(), tmp_path / "cache", monkeypatch) as hub:
        yield hub


def held(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_path_that_exists_is_given_back_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("m") == "m"
    assert locate("./m") == "./m"
    assert locate("m.gguf") == "m.gguf"
    assert locate("~/m") == str(tmp_path / "m")
    assert locate(tmp_path / "m") == str(tmp_path / "m")
    assert metadata_folder("m") == "m"
    assert metadata_folder("m.gguf") == str(tmp_path)


@pytest.mark.parametrize(
    "name", ["./gone", "../gone", "/gone", "~/gone", "a/b/c", "gone.gguf", "x/gone.safetensors", ""]
)
def test_path_that_does_not_exist_is_not_looked_up_on_the_hub(hub: FakeHub, name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="there is nothing at the path"):
        locate(name)
    assert hub.served == []


def test_path_that_does_not_exist_brings_a_hint(tmp_path: Path) -> None:
    (tmp_path / "llama-3-8b").mkdir()
    with pytest.raises(ModelNotFoundError, match="but 'llama-3-8b' in that folder"):
        locate(str(tmp_path / "lama-3-8b"))


def test_single_file_model(hub: FakeHub) -> None:
    hub.add("org/model", SINGLE)
    folder = locate("org/model")
    assert held(folder) == set(SINGLE)
    assert list(open_checkpoint(folder).tensors) == ["a"]


def test_only_needed_files_of_a_cluttered_repository(hub: FakeHub) -> None:
    hub.add("org/model", {**SHARDED, **CLUTTER})
    folder = locate("org/model")
    assert held(folder) == set(SHARDED)
    assert sorted(hub.fetched()) == sorted(SHARDED)
    assert open_checkpoint(folder).nbytes == 300


def test_pickles_where_there_is_nothing_better(hub: FakeHub) -> None:
    left = {"training_args.bin": b"x", "optimizer.pt": b"x", "consolidated.safetensors": b"mistral"}
    hub.add("org/model", {**SMALL, **left, "pytorch_model.bin": b"pickle", "pytorch_model-00001-of-00001.bin": b"x"})
    folder = locate("org/model")
    assert held(folder) == {*SMALL, "pytorch_model.bin"}
    assert locate("org/model", local_files_only=True) == folder


def test_pickled_shards_of_an_index(hub: FakeHub) -> None:
    index = json.dumps({"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}})
    pickles = {"pytorch_model-1.bin": b"1", "pytorch_model-2.bin": b"2"}
    hub.add("org/model", {**SMALL, **pickles, "unlisted.bin": b"x", "pytorch_model.bin.index.json": index.encode()})
    folder = locate("org/model")
    assert held(folder) == {*SMALL, *pickles, "pytorch_model.bin.index.json"}
    assert locate("org/model", local_files_only=True) == folder


def test_code_is_fetched_only_where_it_is_trusted(hub: FakeHub) -> None:
    hub.add("org/model", {**SINGLE, **CLUTTER})
    assert "modeling_new.py" in held(locate("org/model", trust_remote_code=True))


def test_small_files_come_before_weights(hub: FakeHub) -> None:
    hub.add("org/model", SHARDED)
    locate("org/model")
    fetched = hub.fetched()
    assert set(fetched[: -len(SHARDS)]).isdisjoint(SHARDS)
    assert set(fetched[-len(SHARDS) :]) == set(SHARDS)


def test_second_time_nothing_is_fetched(hub: FakeHub) -> None:
    hub.add("org/model", SHARDED)
    folder = locate("org/model")
    hub.served.clear()
    assert locate("org/model") == folder
    assert hub.files_served("GET") == hub.files_served("HEAD") == []


def test_new_commit_fetches_only_what_changed(hub: FakeHub) -> None:
    hub.add("org/model", SHARDED)
    locate("org/model")
    hub.served.clear()
    hub.add("org/model", {**SHARDED, "config.json": b'{"new": 1}'})
    folder = locate("org/model")
    assert hub.fetched() == ["config.json"]
    assert held(folder) == set(SHARDED)


def test_variant(hub: FakeHub) -> None:
    hub.add("org/model", {**SINGLE, "model.fp16.safetensors": to_bytes({"a": vector(9)})})
    folder = locate("org/model", variant="fp16")
    assert held(folder) == {*SMALL, "model.fp16.safetensors"}
    assert open_checkpoint(folder, variant="fp16").nbytes == 1


def test_subfolder(hub: FakeHub) -> None:
    files = {f"text/{name}": data for name, data in SHARDED.items()}
    hub.add("org/model", {**files, "config.json": b"{}", "vision/config.json": b"{}"})
    folder = locate("org/model", subfolder="text")
    assert held(folder) == {*files, "config.json"}
    assert open_checkpoint(folder, subfolder="text").nbytes == 300


def test_odd_file_names_are_not_taken_for_patterns(hub: FakeHub) -> None:
    hub.add("org/model", {"config.json": b"{}", "w[1]*.safetensors": to_bytes({"a": vector(1)}), "w1x.bin": b""})
    assert held(locate("org/model")) == {"config.json", "w[1]*.safetensors"}


def test_revision_by_branch_and_by_commit(hub: FakeHub) -> None:
    hub.add("org/model", SINGLE)
    repository = hub.add("org/model", {**SINGLE, "model.safetensors": to_bytes({"b": vector(1)})}, branch="next")
    commit = repository.branches["next"]
    for revision in ("next", commit):
        folder = locate("org/model", revision=revision)
        assert os.path.basename(folder) == commit
        assert list(open_checkpoint(folder).tensors) == ["b"]


def test_cache_dir(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/model", SINGLE)
    assert locate("org/model", cache_dir=str(tmp_path / "other")).startswith(str(tmp_path / "other"))


def test_token_is_sent(hub: FakeHub) -> None:
    hub.add("org/model", SINGLE).token = "hf_secret"
    locate("org/model", token="hf_secret")
    assert {each.token for each in hub.served} == {"hf_secret"}


def test_no_token_is_sent_without_one(hub: FakeHub) -> None:
    hub.add("org/model", SINGLE)
    locate("org/model")
    assert {each.token for each in hub.served} == {None}


def test_progress_counts_bytes_up_to_the_whole(hub: FakeHub) -> None:
    hub.add("org/model", SHARDED)
    seen: list[tuple[str, int, int]] = []
    locate("org/model", progress=lambda *step: seen.append(step))
    total = sum(map(len, SHARDS.values()))
    assert seen[0] == ("download", 0, total) and seen[-1] == ("download", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert any(0 < done < total for _, done, _ in seen)


def test_progress_of_what_is_cached_is_whole_at_once(hub: FakeHub) -> None:
    hub.add("org/model", SHARDED)
    locate("org/model")
    seen: list[tuple[str, int, int]] = []
    locate("org/model", progress=lambda *step: seen.append(step))
    assert {done for _, done, _ in seen} == {sum(map(len, SHARDS.values()))}


def test_nothing_is_printed(hub: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.add("org/model", SHARDED)
    locate("org/model")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["argument", "environment", "server gone", "server error"])
def test_cache_alone_is_enough(hub: FakeHub, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", {**SHARDED, **CLUTTER})
    folder = locate("org/model")
    hub.served.clear()
    if how == "environment":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "server gone":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif how == "server error":
        hub.always_status = 503
    assert locate("org/model", local_files_only=how == "argument") == folder
    assert metadata_folder("org/model", local_files_only=how == "argument") == folder
    assert hub.files_served() == []


def test_interrupted_file_goes_on_where_it_was(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16)
    hub.add("org/model", SINGLE)
    hub.cut_once["model.safetensors"] = 20
    assert open_checkpoint(locate("org/model")).nbytes == 3
    first, second = (each for each in hub.files_served() if each.path.endswith("model.safetensors"))
    assert (first.range, first.nbytes) == (None, 20)
    assert (second.range, second.status) == ("bytes=16-", 206)


def test_interrupted_download_fetches_finished_files_once(hub: FakeHub) -> None:
    _, second = SHARDS
    hub.add("org/model", SHARDED)
    hub.status_of[second] = 500
    with pytest.raises(CheckpointError, match="finished files are kept"):
        locate("org/model")
    hub.served.clear()
    hub.status_of.clear()
    assert held(locate("org/model")) == set(SHARDED)
    assert hub.fetched() == [second]


def test_metadata_folder_fetches_no_weights(hub: FakeHub) -> None:
    hub.add("org/model", {**SHARDED, **CLUTTER})
    folder = metadata_folder("org/model")
    assert held(folder) == set(SMALL)
    assert set(hub.fetched()) == set(SMALL)


def test_metadata_folder_needs_no_safetensors(hub: FakeHub) -> None:
    hub.add("org/model", {"config.json": b"{}", "m.gguf": b"GGUF"})
    assert held(metadata_folder("org/model")) == {"config.json"}


def test_remote_headers_are_those_of_the_files(hub: FakeHub) -> None:
    repository = hub.add("org/model", {**SHARDED, **CLUTTER})
    far = remote_headers("org/model")
    near = open_checkpoint(locate("org/model"))
    root = f"hf://org/model@{repository.branches['main']}"
    assert far.root == root
    assert far.files == tuple(f"{root}/{name}" for name in SHARDS)
    assert far.nbytes == near.nbytes
    for name, entry in near.tensors.items():
        there = far.tensors[name]
        assert (there.dtype, there.shape) == (entry.dtype, entry.shape)
        assert (there.extent.offset, there.extent.length) == (entry.extent.offset, entry.extent.length)
        assert there.extent.file == f"{root}/{os.path.basename(entry.extent.file)}"
    far.verify_unchanged()


def test_remote_headers_fetch_little_of_big_files(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(
        "org/model", {"config.json": b"{}", "model.safetensors": to_bytes({"a": ("U8", [5_000_000], bytes(5_000_000))})}
    )
    assert remote_headers("org/model").nbytes == 5_000_000
    assert sum(each.nbytes for each in hub.files_served()) <= 100_000
    assert not (tmp_path / "cache").exists()


def test_remote_headers_longer_than_the_first_request(hub: FakeHub) -> None:
    tensors = {f"layers.{i}.weight": vector(i % 256) for i in range(3_000)}
    hub.add("org/model", {"model.safetensors": to_bytes(tensors)})
    assert remote_headers("org/model").tensors.keys() == tensors.keys()
    assert [each.range.split("-")[0] for each in hub.files_served() if each.range] == ["bytes=0", "bytes=100000"]


@pytest.mark.parametrize("count", [1, 3_000])
def test_remote_headers_from_a_server_without_ranges(hub: FakeHub, count: int) -> None:
    hub.knows_ranges = hub.knows_sizes = False
    tensors = {f"layers.{i}.weight": vector(i % 256) for i in range(count)}
    hub.add("org/model", {"model.safetensors": to_bytes(tensors)})
    assert remote_headers("org/model").tensors.keys() == tensors.keys()


def test_remote_headers_without_sizes_in_the_listing(hub: FakeHub) -> None:
    hub.knows_sizes = False
    hub.add("org/model", SHARDED)
    assert remote_headers("org/model").nbytes == 300


def test_remote_headers_of_a_revision_variant_and_subfolder(hub: FakeHub) -> None:
    hub.add("org/model", {"text/model.fp16.safetensors": to_bytes({"z": vector(1)})}, branch="next").token = "hf_t"
    far = remote_headers("org/model", revision="next", subfolder="text/", variant="fp16", token="hf_t")
    assert list(far.tensors) == ["z"]
    assert far.files[0].endswith("/text/model.fp16.safetensors")
    assert far.root.endswith("/text")
