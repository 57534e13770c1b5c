"""One named test for each way in which a download can fail: one clear line, of the right class."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import constants

from helpers.fake_hub import FakeHub, connected
from helpers.make_safetensors import to_bytes, vector, with_prefix
from lamina.errors import (
    CheckpointError,
    HeaderError,
    LaminaError,
    MissingShardError,
    ModelNotFoundError,
    RequestError,
    TruncatedError,
    UnsupportedError,
)
from lamina.hub import locate, metadata_folder, remote_headers
from lamina.hub.repository import translate

CONFIG = {"config.json": b"{}"}
SINGLE = {**CONFIG, "model.safetensors": to_bytes({"a": vector(1, 2, 3)})}
SHARDED = {
    **CONFIG,
    "model-1.safetensors": to_bytes({"a": vector(1)}),
    "model-2.safetensors": to_bytes({"b": vector(2)}),
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ).encode(),
}
FACES: list[Callable[..., object]] = [locate, metadata_folder, remote_headers]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits between its tries
    with connected(FakeHub(), tmp_path / "cache", monkeypatch) as hub:
        yield hub


def refusal(call: Callable[..., object], error: type[LaminaError], model: str = "org/model", **options: object) -> str:
    with pytest.raises(error) as caught:
        call(model, **options)
    assert type(caught.value) is error
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("model", ["org/mo del", "org/-model", "a" * 200, "org/x!"])
def test_name_that_cannot_be_a_hub_id(hub: FakeHub, face: Callable[..., object], model: str) -> None:
    assert "neither a path that exists nor a hub id" in refusal(face, ModelNotFoundError, model)
    assert hub.served == []


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("token", [None, "hf_some"])
def test_repository_that_does_not_exist(hub: FakeHub, face: Callable[..., object], token: str | None) -> None:
    assert "there is no org/model on the hub" in refusal(face, ModelNotFoundError, token=token)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_gated_repository(hub: FakeHub, face: Callable[..., object], token: str | None) -> None:
    repository = hub.add("org/model", SINGLE)
    repository.gated, repository.token = True, "hf_of_a_friend"
    line = refusal(face, RequestError, token=token)
    assert "is gated: ask for access at https://huggingface.co/org/model" in line


@pytest.mark.parametrize("face", FACES)
def test_private_repository(hub: FakeHub, face: Callable[..., object]) -> None:
    hub.add("org/model", SINGLE).token = "hf_of_the_owner"
    assert "pass token= if it is private" in refusal(face, ModelNotFoundError)


@pytest.mark.parametrize("face", FACES)
def test_revision_that_does_not_exist(hub: FakeHub, face: Callable[..., object]) -> None:
    hub.add("org/model", SINGLE)
    assert "has no revision 'v9'" in refusal(face, RequestError, revision="v9")


@pytest.mark.parametrize("face", FACES)
def test_token_refused(hub: FakeHub, face: Callable[..., object]) -> None:
    hub.always_status = 403
    assert "refused the token" in refusal(face, RequestError, token="hf_old")


@pytest.mark.parametrize("face", FACES)
def test_no_token_saved(hub: FakeHub, face: Callable[..., object]) -> None:
    assert "hf auth login" in refusal(face, RequestError, token=True)


@pytest.mark.parametrize("face", FACES)
def test_too_many_requests(hub: FakeHub, face: Callable[..., object]) -> None:
    hub.always_status = 429
    assert "wait some minutes" in refusal(face, CheckpointError)


@pytest.mark.parametrize("face", [locate, metadata_folder])
@pytest.mark.parametrize("how", ["server gone", "server error", "offline", "local_files_only"])
def test_no_hub_and_no_cache(
    hub: FakeHub, face: Callable[..., object], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", SINGLE)
    why = {"server gone": "the hub cannot be reached", "server error": "the hub cannot be reached"}
    if how == "server gone":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif how == "server error":
        hub.always_status = 500
    elif how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refusal(face, ModelNotFoundError, local_files_only=how == "local_files_only")
    assert "is not in the cache" in line
    assert why.get(how, "may not use the network") in line


@pytest.mark.parametrize("how", ["server gone", "server error", "offline"])
def test_no_hub_and_remote_headers(hub: FakeHub, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "server gone":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif how == "server error":
        hub.always_status = 500
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the headers of org/model cannot be read" in refusal(remote_headers, CheckpointError)


def test_offline_with_another_revision_in_the_cache(hub: FakeHub) -> None:
    hub.add("org/model", SINGLE)
    locate("org/model")
    line = refusal(locate, ModelNotFoundError, revision="next", local_files_only=True)
    assert "at revision 'next' is not in the cache" in line


def test_offline_with_a_shard_missing(hub: FakeHub) -> None:
    hub.add("org/model", SHARDED)
    (Path(locate("org/model")) / "model-2.safetensors").unlink()
    line = refusal(locate, MissingShardError, local_files_only=True)
    assert "1 of 2 weight files of org/model are not in" in line and "the first is model-2.safetensors" in line


def test_offline_with_the_small_files_alone(hub: FakeHub) -> None:
    hub.add("org/model", SHARDED)
    metadata_folder("org/model")
    assert "there are no weights in" in refusal(locate, MissingShardError, local_files_only=True)


def test_offline_without_a_config(hub: FakeHub) -> None:
    hub.add("org/model", SINGLE)
    (Path(locate("org/model")) / "config.json").unlink()
    assert "has no config.json" in refusal(locate, MissingShardError, local_files_only=True)


@pytest.mark.parametrize("name", ["model.ckpt", "m.Q4_K_M.gguf"])
@pytest.mark.parametrize("face", [locate, remote_headers])
def test_repository_of_another_format_is_refused_before_the_download(
    hub: FakeHub, face: Callable[..., object], name: str
) -> None:
    hub.add("org/model", {**CONFIG, name: bytes(1000)})
    assert name in refusal(face, UnsupportedError)
    assert hub.files_served() == []


def test_pickles_have_no_headers_to_plan_from(hub: FakeHub) -> None:
    hub.add("org/model", {**CONFIG, "pytorch_model.bin": bytes(1000)})
    assert "pickled weights only (pytorch_model.bin)" in refusal(remote_headers, UnsupportedError)
    assert hub.files_served() == []


@pytest.mark.parametrize("face", [locate, remote_headers])
def test_repository_without_weights(hub: FakeHub, face: Callable[..., object]) -> None:
    hub.add("org/model", {**CONFIG, "README.md": b""})
    assert "there are no weights in org/model" in refusal(face, CheckpointError)


@pytest.mark.parametrize("face", [locate, remote_headers])
@pytest.mark.parametrize(
    ("files", "error", "line"),
    [
        ({"consolidated.safetensors": b""}, UnsupportedError, "org/model has Mistral's own layout alone"),
        ({"original/consolidated.00.pth": b"", "consolidated.00.pth": b""}, UnsupportedError, "Meta's own layout"),
        (
            {"fp16/model.safetensors": b"", "fp16/config.json": b"{}"},
            CheckpointError,
            "such as from_pretrained(..., subfolder='fp16')",
        ),
        ({"tf_model.h5": b""}, UnsupportedError, "holds no weights but tf_model.h5, which is TensorFlow weights"),
        (
            {"adapter_model.safetensors": b"", "adapter_config.json": b'{"base_model_name_or_path": "org/base"}'},
            UnsupportedError,
            "org/model holds an adapter for org/base, not a model: give the model that it belongs to, Auto",
        ),
    ],
)
def test_repository_of_something_else_says_what_to_do(
    hub: FakeHub, face: Callable[..., object], files: dict[str, bytes], error: type[LaminaError], line: str
) -> None:
    hub.add("org/model", files)
    assert line in refusal(face, error)
    assert not any(name.endswith((".safetensors", ".pth", ".h5")) for name in hub.fetched())


@pytest.mark.parametrize("face", [locate, remote_headers])
def test_variant_that_does_not_exist(hub: FakeHub, face: Callable[..., object]) -> None:
    hub.add("org/model", SINGLE)
    assert "org/model has no variant 'fp16'" in refusal(face, RequestError, variant="fp16")


@pytest.mark.parametrize("face", FACES)
def test_subfolder_that_leads_out(hub: FakeHub, face: Callable[..., object]) -> None:
    assert "inside the model's own" in refusal(face, RequestError, subfolder="../x")


@pytest.mark.parametrize("face", [locate, remote_headers])
def test_index_that_names_a_file_the_repository_lacks(hub: FakeHub, face: Callable[..., object]) -> None:
    hub.add("org/model", {name: data for name, data in SHARDED.items() if name != "model-2.safetensors"})
    assert "needs model-2.safetensors, which the repository does not have" in refusal(face, MissingShardError)


@pytest.mark.parametrize("face", [locate, remote_headers])
def test_hostile_index(hub: FakeHub, face: Callable[..., object]) -> None:
    index = json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()
    hub.add("org/model", {**SHARDED, "model.safetensors.index.json": index})
    assert "not a plain name" in refusal(face, CheckpointError)


def test_file_that_went_away_behind_the_listing(hub: FakeHub) -> None:
    hub.add("org/model", SINGLE)
    hub.status_of["model.safetensors"] = 404
    refusal(locate, CheckpointError)
    refusal(remote_headers, CheckpointError)


def test_not_enough_space(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    hub.add("org/model", SINGLE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(7))
    line = refusal(locate, CheckpointError)
    assert f"needs {len(SINGLE['model.safetensors'])} B more in" in line and "7 B are free" in line
    assert "model.safetensors" not in hub.fetched()


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_cached_weights_need_no_space(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    hub.add("org/model", SINGLE)
    locate("org/model")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0))
    hub.add("org/model", {**SINGLE, "config.json": b'{"new": 1}'})
    locate("org/model")


def test_disk_that_becomes_full(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add("org/model", SINGLE)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    assert "the disk became full while org/model was downloaded" in refusal(locate, CheckpointError)


def test_cache_that_may_not_be_written(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/cache/blobs")

    hub.add("org/model", SINGLE)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    assert "/cache/blobs may not be written by this user" in refusal(locate, CheckpointError)


def test_any_other_failure_is_one_line() -> None:
    line = str(translate(OSError("first\nsecond"), "org/model", None))
    assert line == "org/model could not be downloaded (OSError: first): try again, finished files are kept"


def test_remote_header_that_lies(hub: FakeHub) -> None:
    raw = bytearray(SINGLE["model.safetensors"])
    hub.add("org/model", {"model.safetensors": bytes(raw) + b"more"})
    refusal(remote_headers, HeaderError)
    hub.add("org/model", {"model.safetensors": bytes(raw[:-1])})
    refusal(remote_headers, TruncatedError)
    hub.add("org/model", {"model.safetensors": with_prefix(b"[" * 100_000)})
    refusal(remote_headers, HeaderError)


def test_remote_index_that_is_older_than_its_files_is_read_as_a_local_one(hub: FakeHub) -> None:
    hub.add("org/model", {**SHARDED, "model-2.safetensors": to_bytes({"other": vector(1)})})
    assert {"a", "other"} <= set(remote_headers("org/model").tensors)
    hub.add("org/model", {**SHARDED, "model-2.safetensors": to_bytes({"a": vector(1), "b": vector(2)})})
    (said,) = remote_headers("org/model").fallbacks
    assert "tensor 'a' is in two files (model-1.safetensors and model-2.safetensors): model-1.safetensors is us" in said


def test_remote_headers_speak_for_the_dtype_as_local_ones(hub: FakeHub) -> None:
    files = {"z": ("F32", [1], bytes(4)), "b": ("BF16", [1], bytes(2)), "a": ("I8", [1], bytes(1))}
    hub.add("org/model", {**CONFIG, "model.safetensors": to_bytes(files)})
    assert remote_headers("org/model").dtype == "BF16"
    index = {"metadata": {"dtype": "float16"}, "weight_map": dict.fromkeys(files, "one.safetensors")}
    sharded = {"one.safetensors": to_bytes(files), "model.safetensors.index.json": json.dumps(index).encode()}
    hub.add("org/model", {**CONFIG, **sharded})
    assert remote_headers("org/model").dtype == "F16"


def test_remote_header_cut_short_is_asked_for_again(hub: FakeHub) -> None:
    hub.knows_ranges = False
    hub.add("org/model", SINGLE)
    hub.cut_once["model.safetensors"] = 20
    assert remote_headers("org/model").nbytes == 3


def test_remote_header_cut_short_every_time(hub: FakeHub) -> None:
    hub.knows_ranges = False
    hub.add("org/model", SINGLE)
    hub.cut_always["model.safetensors"] = 20
    assert "the hub cannot be reached for org/model" in refusal(remote_headers, CheckpointError)


def test_answer_that_is_not_the_hubs(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.always_status = 204
    for face in FACES:
        refusal(face, CheckpointError)
