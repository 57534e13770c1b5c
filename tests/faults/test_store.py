"""What may go wrong with a store: kills, full disks, damage, changed sources, two writers, links."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from helpers import families
from helpers.store_worker import begin, contents, split_apart
from lamina.checkpoint import open_checkpoint
from lamina.checkpoint.manifest import JOURNAL, MANIFEST, manifest_text
from lamina.errors import (
    ChangedError,
    CheckpointError,
    LaminaError,
    MissingShardError,
    RequestError,
    TruncatedError,
    UnsupportedError,
    WriteError,
)
from lamina.store import split, verify
from lamina.store.lock import LOCK

KILLS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    families.write_tiny("llama", folder, dtype=torch.bfloat16)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was written in one go."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    split(model, to=folder, compression="8bit")
    return folder


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "store"))


def damage(file: Path, at: int = -100) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def test_a_split_that_is_killed_anywhere_goes_on_and_ends_with_the_same_bytes(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    once = split_apart(model, tmp_path / "counted", compression="8bit")
    assert once.code == 0 and once.calls > KILLS
    expected = contents(whole)
    resumed = 0
    for number, call in enumerate(random.Random(0).sample(range(1, once.calls + 1), KILLS)):
        folder = tmp_path / f"store{number}"
        assert split_apart(model, folder, compression="8bit", die_at=call).code == -signal.SIGKILL
        if folder.exists() and MANIFEST not in os.listdir(folder) and JOURNAL in os.listdir(folder):
            with pytest.raises(CheckpointError, match="run the same `lamina split` again"):
                open_checkpoint(folder)
        resumed += split(model, to=folder, compression="8bit").files_kept > 0
        assert contents(folder) == expected, f"killed at call {call}"
        shutil.rmtree(folder)
    assert resumed > KILLS // 3, "what was finished must be kept"


def test_a_split_that_is_killed_at_every_step_of_its_way_still_ends(model: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    for call in (5, 12, 20, 30):
        assert split_apart(model, folder, compression="8bit", die_at=call).code == -signal.SIGKILL
    assert split_apart(model, folder, compression="8bit").error == ""
    assert contents(folder) == contents(whole)


def test_what_was_damaged_meanwhile_is_written_again(model: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    assert split_apart(model, folder, compression="8bit", die_at=70).code == -signal.SIGKILL
    done = sorted(folder.glob("model-*.safetensors"))
    assert len(done) >= 2
    damage(done[0])
    with open(folder / JOURNAL, "a") as journal:
        journal.write('{"file": "model-00005-of-00005.safetensors", "byt')
    said: list[str] = []
    split(model, to=folder, compression="8bit", progress=lambda stage, *_: said.append(stage))
    assert said[0] == "check" and contents(folder) == contents(whole)


def test_ctrl_c_leaves_a_split_that_goes_on(model: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    stopped = split_apart(model, folder, compression="8bit", interrupt_at=70)
    assert stopped.error.startswith("KeyboardInterrupt")
    assert not [name for name in os.listdir(folder) if name.endswith(".part")] and LOCK not in os.listdir(folder)
    second = split_apart(model, folder, compression="8bit")
    assert second.result["files_kept"] > 0 and contents(folder) == contents(whole)


def test_ctrl_c_before_anything_is_written_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    assert split_apart(model, tmp_path / "store", interrupt_at=1).error.startswith("KeyboardInterrupt")
    assert not (tmp_path / "store").exists()


def test_a_file_that_cannot_grow_is_one_clear_line_and_the_rest_is_kept(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    sizes = [(whole / name).stat().st_size for name in sorted(os.listdir(whole)) if name.endswith(".safetensors")]
    limit = max(sizes) - 1
    stopped = split_apart(model, folder, compression="8bit", file_limit=limit)
    assert stopped.error.startswith("WriteError: cannot write ") and "File too large" in stopped.error
    assert "run it again" in stopped.error and "\n" not in stopped.error
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]
    assert split_apart(model, folder, compression="8bit").error == ""
    assert contents(folder) == contents(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    except OSError:
        pytest.skip("no mount here")
    if made.returncode:
        pytest.skip("this user may not mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_is_one_clear_line_and_the_rest_is_kept(
    model: Path, whole: Path, small_disk: Path
) -> None:
    folder, ballast = small_disk / "store", small_disk / "ballast"

    def fill(stage: str, done: int, total: int) -> None:
        if stage == "split" and done > total // 2 and not ballast.exists():
            status = os.statvfs(small_disk)
            ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - 8192))

    with pytest.raises(WriteError, match="No space left on device; what is finished is kept"):
        split(model, to=folder, compression="8bit", progress=fill)
    ballast.unlink()
    assert split(model, to=folder, compression="8bit").files_kept > 0
    assert contents(folder) == contents(whole)


def test_too_little_room_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: few)
    with pytest.raises(WriteError, match=r"needs .* more, .* are free there: make room, or choose another place"):
        split(model, to=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_flipped_bit_is_found_named_and_only_its_file_is_written_again(model: Path, store: Path, whole: Path) -> None:
    damage(store / "model-00002-of-00005.safetensors")
    open_checkpoint(store)
    (fault,) = verify(store).faults
    assert fault.file == "model-00002-of-00005.safetensors" and "SHA-256" in fault.what
    (store / fault.file).unlink()
    assert split(model, to=store, compression="8bit").files_kept == 4
    assert contents(store) == contents(whole) and not verify(store).faults


def test_a_shortened_file_is_found_when_it_is_opened(store: Path) -> None:
    file = store / "model-00003-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(TruncatedError, match="model-00003-of-00005"):
        open_checkpoint(store)
    assert [fault.file for fault in verify(store).faults] == [file.name]


def test_a_longer_and_a_missing_file_are_found(store: Path) -> None:
    with open(store / "model-00001-of-00005.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="model-00001-of-00005"):
        open_checkpoint(store)
    (store / "model-00004-of-00005.safetensors").unlink()
    assert [fault.file[6:11] for fault in verify(store).faults] == ["00001", "00004"]
    (store / "model-00001-of-00005.safetensors").unlink()
    with pytest.raises(MissingShardError, match="model-00001-of-00005"):
        open_checkpoint(store)


def test_files_of_two_stores_do_not_mix(model: Path, store: Path, tmp_path: Path) -> None:
    split(model, to=tmp_path / "other", compression="4bit")
    for name in ("lamina.json", "model-00002-of-00005.safetensors"):
        mixed = Path(shutil.copytree(store, tmp_path / f"mixed {name}"))
        shutil.copy(tmp_path / "other" / name, mixed / name)
        with pytest.raises(CheckpointError):
            open_checkpoint(mixed)


def test_a_source_that_changes_meanwhile_is_named(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))

    def touch(stage: str, done: int, total: int) -> None:
        if stage == "split" and done > total // 2:
            os.utime(source / "model.safetensors")

    with pytest.raises(ChangedError, match=r"model\.safetensors was written to"):
        split(source, to=tmp_path / "store", progress=touch)
    assert MANIFEST not in os.listdir(tmp_path / "store")
    with pytest.raises(ChangedError, match=r"another checkpoint \(model\.safetensors was written to since then\)"):
        split(source, to=tmp_path / "store")


def test_a_source_that_changed_since_is_named(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))
    split(source, to=tmp_path / "store")
    split(source, to=tmp_path / "store")
    os.utime(source / "model.safetensors")
    with pytest.raises(ChangedError, match=r"model\.safetensors was written to since then"):
        split(source, to=tmp_path / "store")


def test_a_source_that_is_replaced_is_read_no_further(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))
    copy = shutil.copy(source / "model.safetensors", tmp_path / "copy")

    def swap(stage: str, done: int, total: int) -> None:
        if stage == "split" and done and os.path.exists(copy):
            os.replace(copy, source / "model.safetensors")

    with pytest.raises(ChangedError, match=r"model\.safetensors"):
        split(source, to=tmp_path / "store", progress=swap)


def test_two_processes_with_one_folder_do_no_harm(model: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    ends = [begin(model, folder, compression="8bit", slow=0.02) for _ in range(3)]
    outcomes = [end() for end in ends]
    assert [each.error for each in outcomes] == ["", "", ""]
    assert sorted(each.result["files_kept"] for each in outcomes) == [0, 5, 5]
    assert sum("wait" in each.stages for each in outcomes) == 2
    assert contents(folder) == contents(whole)


def test_a_lock_that_a_killed_process_left_is_free(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    assert split_apart(model, folder, die_at=10).code == -signal.SIGKILL
    assert LOCK in os.listdir(folder)
    assert split_apart(model, folder).stages.count("wait") == 0


def test_delete_original_deletes_weights_and_nothing_else(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))
    (source / "pytorch_model.bin").write_bytes(b"not what was split")
    result = split(source, to=tmp_path / "store", compression="8bit", delete_original=True)
    assert result.deleted == (str(source / "model.safetensors"),) and not result.kept
    left = {"config.json", "generation_config.json", "tokenizer.json", "pytorch_model.bin"}
    assert {path.name for path in source.iterdir()} == left
    again = split(source, to=tmp_path / "store", compression="8bit", delete_original=True)
    assert again.files_kept == again.files and not again.deleted


def test_delete_original_deletes_nothing_where_the_store_is_damaged(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))

    def spoil(stage: str, done: int, total: int) -> None:
        if stage == "verify" and not done:
            damage(tmp_path / "store" / "model-00002-of-00005.safetensors")

    with pytest.raises(CheckpointError, match=r"00002-of-00005.*nothing of the original was deleted"):
        split(source, to=tmp_path / "store", delete_original=True, progress=spoil)
    assert (source / "model.safetensors").exists()


def test_delete_original_spares_a_file_that_changed_while_the_store_was_verified(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))

    def touch(stage: str, done: int, total: int) -> None:
        if stage == "verify":
            os.utime(source / "model.safetensors")

    with pytest.raises(ChangedError, match="not the file that was split"):
        split(source, to=tmp_path / "store", delete_original=True, progress=touch)
    assert (source / "model.safetensors").exists()


def test_delete_original_keeps_what_the_hub_cache_shares(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    snapshot, blob = cache / "snapshots" / ("0" * 40), cache / "blobs" / "abc"
    shutil.copytree(model, snapshot)
    blob.parent.mkdir()
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    result = split(snapshot, to=tmp_path / "store", delete_original=True)
    assert blob.exists() and (snapshot / "model.safetensors").exists() and not result.deleted
    ((path, why),) = result.kept.items()
    assert path == str(snapshot / "model.safetensors") and "hub's cache" in why


def test_delete_original_follows_no_link(model: Path, tmp_path: Path) -> None:
    shared = Path(shutil.copytree(model, tmp_path / "shared"))
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in shared.iterdir():
        (linked / file.name).symlink_to(file)
    assert "is a link to" in min(split(linked, to=tmp_path / "one", delete_original=True).kept.values())
    (tmp_path / "folder").symlink_to(shared)
    kept = split(tmp_path / "folder", to=tmp_path / "two", delete_original=True).kept
    assert "through a link" in min(kept.values()) and (shared / "model.safetensors").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(RequestError, match=r"cat\.jpg is in it"):
        split(model, to=tmp_path / "photos")
    with pytest.raises(RequestError, match="the model's own folder"):
        split(model, to=model)
    with pytest.raises(RequestError, match="no folder"):
        split(model, to=tmp_path / "photos" / "cat.jpg")
    assert contents(tmp_path / "photos") == {"cat.jpg": b"cat"}


def test_another_compression_in_the_same_folder_is_refused(model: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds a store with compression 8bit, not 4bit"):
        split(model, to=store, compression="4bit")
    assert split_apart(model, tmp_path / "begun", compression="8bit", die_at=20).code == -signal.SIGKILL
    with pytest.raises(RequestError, match="the beginning of a split with compression 8bit, not plain"):
        split(model, to=tmp_path / "begun")


def test_a_store_of_panels_cannot_be_split_again(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is stored as q8 already"):
        split(store, to=tmp_path / "again", compression="4bit")


def test_a_folder_that_may_not_be_written_to(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"):
        split(model, to=tmp_path / "file" / "store")


def _change(change: Callable[[dict], None]) -> Callable[[dict], dict]:
    def changed(content: dict) -> dict:
        change(content)
        return content

    return changed


def _first(content: dict, key: str) -> dict:
    return content[key][next(name for name in content[key] if "q_proj" in name or key == "files")]


HOSTILE = {
    "another format": _change(lambda c: c.update(format="x")),
    "a later version": _change(lambda c: c.update(version=2)),
    "a version that is text": _change(lambda c: c.update(version="1")),
    "no files": _change(lambda c: c.update(files={})),
    "files as a list": _change(lambda c: c.update(files=[])),
    "a path outside": _change(lambda c: c["files"].update({"../x.safetensors": _first(c, "files")})),
    "an absolute path": _change(lambda c: c["files"].update({"/etc/x.safetensors": _first(c, "files")})),
    "a file of another kind": _change(lambda c: c["files"].update({"passwd": _first(c, "files")})),
    "a small file outside": _change(lambda c: c["small_files"].update({"a/../../x": _first(c, "files")})),
    "a small file at the root": _change(lambda c: c["small_files"].update({"/etc/passwd": _first(c, "files")})),
    "a small file without a length": _change(lambda c: c["small_files"]["config.json"].pop("bytes")),
    "small files as a list": _change(lambda c: c.update(small_files=["config.json"])),
    "a negative length": _change(lambda c: _first(c, "files").update(bytes=-1)),
    "a length that is true": _change(lambda c: _first(c, "files").update(bytes=True)),
    "a length that does not fit": _change(lambda c: _first(c, "files").update(bytes=5)),
    "a checksum that is none": _change(lambda c: _first(c, "files").update(sha256="xyz")),
    "a tensor that is text": _change(lambda c: c["tensors"].update(x="y")),
    "a tensor in no file": _change(lambda c: c["tensors"].update(x=_first(c, "tensors"))),
    "a tensor left out": _change(lambda c: c["tensors"].pop("model.norm.weight")),
    "an unknown dtype": _change(lambda c: _first(c, "tensors").update(dtype="BF17")),
    "another shape": _change(lambda c: _first(c, "tensors").update(shape=[65, 64])),
    "a huge shape": _change(lambda c: _first(c, "tensors").update(shape=[2**62, 2**62])),
    "a negative shape": _change(lambda c: _first(c, "tensors").update(shape=[-64, -64])),
    "a shape without rows": _change(lambda c: _first(c, "tensors").update(shape=[64])),
    "a shape that is text": _change(lambda c: _first(c, "tensors").update(shape="64")),
    "no codec": _change(lambda c: _first(c, "tensors").pop("codec")),
    "plain after all": _change(lambda c: _first(c, "tensors").update(codec="plain", panel_rows=0)),
    "no rows in a panel": _change(lambda c: _first(c, "tensors").update(panel_rows=0)),
    "more rows in a panel": _change(lambda c: _first(c, "tensors").update(panel_rows=2)),
    "no source": _change(lambda c: c.pop("source")),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_manifest_that_cannot_be_true_is_refused_in_one_line(store: Path, case: str) -> None:
    content = json.loads((store / MANIFEST).read_text())
    content.pop("sha256")
    (store / MANIFEST).write_text(manifest_text(HOSTILE[case](content)))
    with pytest.raises(LaminaError) as refused:
        open_checkpoint(store)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    assert isinstance(refused.value, CheckpointError | UnsupportedError)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "lamina store"}', "\xff", "{" * 100_000])
def test_a_manifest_that_is_none_is_refused(store: Path, text: str) -> None:
    (store / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError):
        open_checkpoint(store)


def test_a_manifest_that_was_edited_is_refused(store: Path) -> None:
    text = (store / MANIFEST).read_text()
    (store / MANIFEST).write_text(text.replace('"q8"', '"q9"', 1))
    with pytest.raises(CheckpointError, match="its checksum differs"):
        open_checkpoint(store)


def test_a_part_of_a_store_is_not_opened_alone(store: Path) -> None:
    with pytest.raises(RequestError, match="give its folder"):
        open_checkpoint(store / "model-00001-of-00005.safetensors")
    with pytest.raises(RequestError, match="has no variant"):
        open_checkpoint(store, variant="fp16")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_verify_compares_config_and_tokenizer_too(model: Path, store: Path, name: str) -> None:
    assert verify(store).small_files == 3
    good = (store / name).read_bytes()
    (store / name).write_bytes(good.replace(b"{", b"{ ", 1))
    (fault,) = verify(store).faults
    assert fault.file == name and "bytes, " in fault.what
    (store / name).write_bytes(good.replace(b"}", b"]"))
    (fault,) = verify(store).faults
    assert fault.file == name and "SHA-256 differs" in fault.what
    (store / name).unlink()
    (fault,) = verify(store).faults
    assert fault.file == name and "cannot be read" in fault.what
    split(model, to=store, compression="8bit")
    assert (store / name).read_bytes() == good and not verify(store).faults


def test_a_store_that_lists_no_small_files_is_a_store_still(store: Path, whole: Path) -> None:
    """Written before they were listed: it opens and verifies, and says what was not compared."""
    content = json.loads((store / MANIFEST).read_text())
    del content["sha256"], content["small_files"]
    (store / MANIFEST).write_text(manifest_text(content))
    (store / "config.json").write_text("{}")
    assert open_checkpoint(store).tensors.keys() == open_checkpoint(whole).tensors.keys()
    checked = verify(store)
    assert checked.faults == () and checked.small_files is None
    assert verify(whole).files == checked.files + 3


def test_verify_says_what_is_no_store(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no store"):
        verify(model)
    with pytest.raises(RequestError, match="cannot be listed"):
        verify(tmp_path / "nothing")
