"""The kernels: compiled once, by whatever compiler there is, and only ever loaded from where nobody else can write."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.kernel_stub import stub_source
from lamina.codec import AFFINE, native

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a new process, with a cache of its own."""
    monkeypatch.setattr(native, "_state", native._State())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_state", native._State())


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In place of the kernels: a source that compiles at once."""
    source = tmp_path_factory.mktemp("stub") / "kernels.c"
    source.write_text(stub_source())
    monkeypatch.setattr(native, "SOURCE", source)
    return source


def kept(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.so*"))


def put_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> Path:
    """A `cc` that is all there is on the path."""
    folder.mkdir(exist_ok=True)
    compiler = folder / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return compiler


def works() -> bool:
    """Whatever it is unpacked with."""
    out = torch.empty(3, 64)
    block = torch.randn(3, 64)
    AFFINE["q8"].unpack(AFFINE["q8"].encode(block), 3, 64, out)
    return torch.allclose(out, block, atol=0.02)


def test_importing_compiles_nothing() -> None:
    code = "import lamina, lamina.codec.native as n; assert not n._state.tried and n._state.library is None"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_compiler
def test_they_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert native.missing() == ""
    (first,) = kept(tmp_path)
    assert first.parent == tmp_path / "lamina" / "kernels"
    assert first.stat().st_mode & 0o077 == 0
    again(monkeypatch)
    put_compiler(monkeypatch, tmp_path / "bin", "exit 1")
    monkeypatch.setattr(native, "_fingerprint", lambda compiler: first.stem.partition("-")[0])
    assert native.library() is not None and works()


@needs_compiler
def test_another_compiler_or_source_makes_other_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or ""
    names = {native._fingerprint(compiler), native._fingerprint(sys.executable)}
    monkeypatch.setattr(native, "_processor", lambda: "another")
    names.add(native._fingerprint(compiler))
    source = tmp_path / "kernels.c"
    source.write_text("int x;")
    monkeypatch.setattr(native, "SOURCE", source)
    names.add(native._fingerprint(compiler))
    assert len(names) == 4


@needs_compiler
@pytest.mark.parametrize("where", ["lamina", "lamina/kernels"])
def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path, stub: Path, where: str) -> None:
    (tmp_path / "lamina" / "kernels").mkdir(parents=True, mode=0o700)
    (tmp_path / where).chmod(0o777)
    assert native.missing() == ""
    assert kept(tmp_path) == []


@needs_compiler
def test_a_file_that_others_can_write_to_is_replaced(tmp_path: Path, stub: Path) -> None:
    folder = tmp_path / "lamina" / "kernels"
    folder.mkdir(parents=True, mode=0o700)
    (tmp_path / "lamina").chmod(0o700)
    content = b"not what it says"
    name = f"{native._fingerprint(shutil.which('cc') or '')}-{hashlib.sha256(content).hexdigest()}.so"
    planted = folder / name
    planted.write_bytes(content)
    planted.chmod(0o666)
    assert native.missing() == ""
    (made,) = kept(tmp_path)
    assert made.name != name and made.stat().st_size > 1000


@needs_compiler
def test_without_a_cache_they_are_compiled_for_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stub: Path
) -> None:
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file"), "relative"):
        again(monkeypatch)
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        assert native.missing() == ""
    assert kept(tmp_path) == []


@needs_compiler
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_cache_that_takes_nothing_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stub: Path, error: int
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", refuse)
    assert native.missing() == ""
    assert list((tmp_path / "lamina" / "kernels").iterdir()) == []


@needs_compiler
@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_to_still_gives_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stub: Path
) -> None:
    assert native.missing() == ""
    (tmp_path / "lamina" / "kernels").chmod(0o500)
    again(monkeypatch)
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert native.missing() == ""


@needs_compiler
def test_without_room_for_temporary_files_the_cache_has_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stub: Path
) -> None:
    real = tempfile.TemporaryDirectory

    def folder(prefix: str, dir: Path | None) -> Any:
        if dir is None:
            raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")
        return real(prefix=prefix, dir=dir)

    monkeypatch.setattr(native.tempfile, "TemporaryDirectory", folder)
    assert native.missing() == ""
    assert [path.suffix for path in (tmp_path / "lamina" / "kernels").iterdir()] == [".so"]


@needs_compiler
def test_a_home_that_is_not_there_is_no_obstacle(monkeypatch: pytest.MonkeyPatch, stub: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    for home in ("", "/proc/nowhere", "relative"):
        again(monkeypatch)
        monkeypatch.setenv("HOME", home)
        assert native.missing() == ""


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = native.missing()
    assert said.startswith("no C compiler: none of cc, gcc, clang is installed (install one: ")
    assert works()


@pytest.mark.parametrize(
    ("release", "wanted"),
    [
        ("ID=ubuntu\nID_LIKE=debian\n", "apt install gcc libc6-dev"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "dnf install gcc"),
        ("NAME=Alpine\nID=alpine\n", "apk add gcc musl-dev"),
        ("ID=unheard-of\n", "the package is called gcc"),
    ],
)
def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, wanted: str) -> None:
    (tmp_path / "os-release").write_text(release)
    monkeypatch.setattr(native, "RELEASE", tmp_path / "os-release")
    monkeypatch.setattr(native.platform, "system", lambda: "Linux")
    assert native.how_to_install() == f"install one: {wanted}"
    monkeypatch.setattr(native.platform, "system", lambda: "Darwin")
    assert native.how_to_install() == "install one: `xcode-select --install`"


def test_a_compiler_without_headers_is_told_from_a_broken_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_compiler(
        monkeypatch, tmp_path / "bin", "echo 'x.c:1: fatal error: math.h: No such file or directory' >&2; exit 1"
    )
    assert "math.h: No such file or directory (install one: " in native.missing()


def test_a_compiler_that_fails_is_named_with_what_it_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = put_compiler(monkeypatch, tmp_path / "bin", "echo 'kernels.c:1: error: out of ink' >&2; exit 1")
    assert native.missing() == f"{compiler} could not compile the kernels: kernels.c:1: error: out of ink"
    assert works()
    assert [path.name for path in (tmp_path / "lamina" / "kernels").iterdir()] == []


def test_a_library_that_cannot_be_loaded_is_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = 'while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"'
    put_compiler(monkeypatch, tmp_path / "bin", write)
    assert "file too short" in native.missing() or "invalid ELF header" in native.missing()
    assert works()
    assert kept(tmp_path) == []  # the next process may have more luck


@needs_compiler
def test_what_a_compiler_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that knows no OpenMP still makes kernels, of one thread."""
    real = shutil.which("cc")
    path = f'PATH=/usr/bin:/bin exec "{real}" "$@"'
    put_compiler(monkeypatch, tmp_path / "bin", f'case "$*" in *openmp*) exit 1;; esac\n{path}')
    assert native.missing() == "" and works()


@needs_compiler
def test_switching_off_is_undone(stub: Path) -> None:
    with native.switched_off():
        assert native.library() is None
        assert native.missing() == "switched off"
    assert native.library() is not None
