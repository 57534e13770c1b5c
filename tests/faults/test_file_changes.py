"""A file that something happens to while it is read: its own bytes or an error, never those of another."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.families import input_ids, tiny_model, write_tiny
from helpers.judge import minimum_of, steady, streamed_model
from helpers.walker import watchdog
from lamina import atomic_files as store_files
from lamina.checkpoint import Extent, Fingerprint
from lamina.errors import ChangedError, CheckpointError, ReadError
from lamina.plan.layout import Read
from lamina.store.source import SourceFiles
from lamina.stream import direct_io
from lamina.stream.direct_io import Area, PosixFile
from lamina.stream.readers import Readers

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="files are read in another way here")
SIZE = 1_500_000


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    with watchdog(600):
        yield


def restore_time(path: Path, status: os.stat_result) -> None:
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rights(path: Path, chance: random.Random) -> None:
    path.chmod(chance.choice([0o600, 0o640, 0o644]))


def linked(path: Path, chance: random.Random) -> None:
    other = path.with_suffix(f".link{chance.randrange(1 << 30)}")
    os.link(path, other)
    if chance.random() < 0.5:
        other.unlink()


def touched_to_the_same_time(path: Path, chance: random.Random) -> None:
    restore_time(path, path.stat())


def renamed_and_back(path: Path, chance: random.Random) -> None:
    path.rename(path.with_suffix(".away"))
    path.with_suffix(".away").rename(path)


def copied_back(path: Path, chance: random.Random) -> None:
    """Another file with the same bytes and time, as `cp -p` and `rsync -t` leave it."""
    status, copy = path.stat(), path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    restore_time(copy, status)
    copy.replace(path)


def overwritten(path: Path, chance: random.Random) -> None:
    """As `rsync --inplace -t`, `cp -p` and `tar -x` do it: all of it, or half."""
    write_over(path, chance, chance.choice([SIZE, SIZE // 2]))


def overwritten_in_part(path: Path, chance: random.Random) -> None:
    """A twentieth: what is known only of a file that was read before."""
    write_over(path, chance, SIZE // 20)


def write_over(path: Path, chance: random.Random, length: int) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(chance.randrange(SIZE - length + 1))
        file.write(chance.randbytes(length))
    restore_time(path, status)


def cut_and_filled(path: Path, chance: random.Random) -> None:
    status = path.stat()
    os.truncate(path, SIZE // 2)
    os.truncate(path, SIZE)
    restore_time(path, status)


def written_to(path: Path, chance: random.Random) -> None:
    with path.open("r+b") as file:
        file.write(chance.randbytes(1))


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(SIZE))


HARMLESS = (rights, linked, touched_to_the_same_time, renamed_and_back, copied_back)
HARMFUL = (overwritten, cut_and_filled, written_to, cut)


def read_all(readers: Readers, path: Path, chance: random.Random) -> bytes:
    """The file in pieces, in some order."""
    bounds = [0, *sorted(chance.sample(range(1, SIZE), 6)), SIZE]
    pieces = [(begin, end - begin) for begin, end in itertools.pairwise(bounds)]
    area = Area(SIZE)
    readers.read([Read(str(path), at, size, at, size, False) for at, size in chance.sample(pieces, len(pieces))], area)
    return bytes(area.view[:SIZE])


@pytest.mark.parametrize("rounds", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_whatever_happens_to_a_file(tmp_path: Path, rounds: int) -> None:
    chance = random.Random(0)
    for number in range(rounds):
        path = tmp_path / f"weights{number}"
        content = chance.randbytes(SIZE)
        path.write_bytes(content)
        readers = Readers(3, 1 << 17, fingerprints={str(path): Fingerprint.of(path.stat())})
        readers.remember()
        seen = chance.random() < 0.8
        if seen:
            assert read_all(readers, path, chance) == content
        for _ in range(chance.randint(0, 3)):
            chance.choice(HARMLESS)(path, chance)
            if chance.random() < 0.3:
                with readers._shared.lock:  # as after a failed read: it is opened anew
                    readers._shared.forget_file(str(path))
            readers.verify()
            assert read_all(readers, path, chance) == content, "nothing was written to it"
            seen = True
        with readers._shared.lock:
            readers._shared.forget_file(str(path))  # what is open may be another one by now
        harm = chance.choice([*HARMFUL, overwritten_in_part] if seen else HARMFUL)
        harm(path, chance)
        with pytest.raises(CheckpointError, match=path.name):
            readers.verify()
            read_all(readers, path, chance)
        readers.close()
        for left in tmp_path.iterdir():
            left.unlink()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny("llama", folder, max_shard_size="200KB")
    with steady():
        yield folder


def test_a_model_whose_files_are_overwritten_or_only_touched(written: Path, tmp_path: Path) -> None:
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    plain = tiny_model("llama")
    ids = input_ids(plain.config)
    model = streamed_model(tmp_path, minimum_of(tmp_path, draft=None), draft=None)
    assert model.lamina.plan.streams
    with torch.no_grad(), model.lamina:
        wanted = plain(ids).logits
        chance = random.Random(0)
        for harmless in (rights, linked, touched_to_the_same_time, renamed_and_back):
            for shard in tmp_path.glob("*.safetensors"):
                harmless(shard, chance)
            assert torch.equal(model(ids).logits, wanted), harmless.__name__
        shard = sorted(tmp_path.glob("*.safetensors"))[1]
        status, content = shard.stat(), shard.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        with shard.open("r+b") as file:
            file.seek(header)
            file.write(bytes(byte ^ 0x80 for byte in content[header:]))
        restore_time(shard, status)
        with pytest.raises(ChangedError, match=shard.name):
            model(ids)
        shard.write_bytes(content)
        restore_time(shard, status)
        assert torch.equal(model(ids).logits, wanted), "it was put back"


def test_a_source_that_is_overwritten_while_it_is_split(tmp_path: Path) -> None:
    """There is no pass after it that would find out: whatever happened to the file ends the split."""
    path = tmp_path / "weights"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    source = SourceFiles({str(path): Fingerprint.of(path.stat())})
    assert bytes(source.read(Extent(str(path), 0, SIZE), 10, 20)) == path.read_bytes()[10:30]
    overwritten(path, random.Random(1))
    with pytest.raises(ChangedError, match="run lamina split again"):
        source.close()


def test_a_source_and_a_checksum_that_are_refused_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = tmp_path / "weights", random.Random(0).randbytes(SIZE)
    path.write_bytes(content)
    left = [0]

    class Hiccup(io.FileIO):
        def readinto(self, target: Any) -> int:
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readinto(target)

    monkeypatch.setattr(store_files, "open", lambda *_, **__: Hiccup(path), raising=False)
    monkeypatch.setattr(io, "FileIO", Hiccup)
    left[0] = 2
    assert bytes(SourceFiles({}).read(Extent(str(path), 0, SIZE), 0, SIZE)) == content
    left[0] = 2
    assert store_files.checksum(str(path)) == (SIZE, hashlib.sha256(content).hexdigest())


def refusing(code: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next reads end in this error."""
    real, left, lock = os.preadv, [times], threading.Lock()

    def preadv(*arguments: Any) -> int:
        with lock:
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(direct_io.os, "preadv", preadv)


def file_of(tmp_path: Path) -> tuple[Path, bytes, Readers]:
    path, content = tmp_path / "weights", random.Random(0).randbytes(SIZE)
    path.write_bytes(content)
    readers = Readers(2, 1 << 18, lambda name: PosixFile(name, direct=False))
    return path, content, readers


@pytest.mark.parametrize("code", [errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE], ids=errno.errorcode.get)
def test_a_read_that_is_refused_for_a_moment_is_tried_again(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content, readers = file_of(tmp_path)
    refusing(code, 2, monkeypatch)
    assert read_all(readers, path, random.Random(1)) == content
    assert readers.retries == 2
    readers.close()


def test_a_read_that_is_refused_for_good_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content, readers = file_of(tmp_path)
    refusing(errno.EIO, 1 << 30, monkeypatch)
    with pytest.raises(ReadError, match=f"reading .* of {path} failed: Input/output error") as caught:
        read_all(readers, path, random.Random(1))
    assert "\n" not in str(caught.value)
    readers.settle()
    monkeypatch.undo()
    assert read_all(readers, path, random.Random(1)) == content, "and it works again when the drive does"
    readers.close()


def test_an_error_that_will_not_go_away_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, readers = file_of(tmp_path)
    refusing(errno.EBADF, 1 << 30, monkeypatch)
    with pytest.raises(ReadError):
        read_all(readers, path, random.Random(1))
    assert readers.retries == 0
    readers.close()


def test_closing_does_not_wait_for_a_drive_to_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, readers = file_of(tmp_path)
    monkeypatch.setattr("lamina.stream.readers.PAUSES", (3600.0,))
    refusing(errno.EIO, 1 << 30, monkeypatch)
    readers.submit([Read(str(path), 0, SIZE, 0, SIZE, False)], Area(SIZE))
    while not readers._shared.reading:
        time.sleep(0.001)
    readers.close()


def test_a_model_says_how_often_reads_were_tried_again(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_model("llama")
    ids = input_ids(plain.config)
    model = streamed_model(written, minimum_of(written, draft=None), draft=None)
    with torch.no_grad(), model.lamina:
        assert model.lamina.stats.read_retries == 0
        model.lamina.engine.stream.rewind()  # else everything may have been read ahead
        refusing(errno.EIO, 2, monkeypatch)
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert model.lamina.stats.read_retries == 2
