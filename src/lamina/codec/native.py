"""The kernels in C: compiled by the system's compiler when first wanted, and kept in the user's cache folder.

No wheel has to be built for each processor that way, and the code uses all that this one can. A kept library has the
SHA-256 of its bytes in its name and is loaded only if it still has them: what a power cut or a bad disk left of one is
compiled again. Where nothing can be kept each process compiles for itself, in two seconds. Where there is no
compiler everything works in torch alone, slower and to the same bits; `missing` says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import secrets
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.c")
VERSION = 1  # of the functions' arguments: lamina_kernels_version() says the same
COMPILERS = ("cc", "gcc", "clang")
# Sums are one fused multiply-add after another in every variant of a loop, or in none: their bits must be the same.
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
# Apple's compiler has no OpenMP, older ones for ARM no -march=native.
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
RELEASE = Path("/etc/os-release")
INSTALL = {  # by the names that os-release has
    **dict.fromkeys(("debian", "ubuntu"), "apt install gcc libc6-dev"),
    **dict.fromkeys(("fedora", "rhel", "centos", "amzn"), "dnf install gcc"),
    **dict.fromkeys(("suse", "opensuse", "sles"), "zypper install gcc"),
    "arch": "pacman -S gcc",
    "alpine": "apk add gcc musl-dev",
}
SECONDS = 120  # a compiler that takes longer is taken for broken; the usual time is two seconds

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as in kernels.c


class _State:
    """What the one attempt to load came to."""

    def __init__(self) -> None:
        self.locks: dict[int, threading.Lock] = {}  # by process: a forked child must not wait for its parent's threads
        self.tried = False
        self.library: ctypes.CDLL | None = None
        self.reason = ""
        self.switched_off = False


_state = _State()


class _NotLoadedError(Exception):
    """Why there are no kernels; never leaves this file."""


def library() -> ctypes.CDLL | None:
    """The kernels, compiled and loaded by the first call; None where torch has to do."""
    if _state.switched_off:
        return None
    if not _state.tried:
        with _state.locks.setdefault(os.getpid(), threading.Lock()):
            if not _state.tried:
                _load_once()
    return _state.library


def available() -> bool:
    """Whether there are kernels; compiles and loads them at the first call."""
    return library() is not None


def missing() -> str:
    """Why there are no kernels, in one line; empty where there are."""
    if available():
        return ""
    return "switched off" if _state.switched_off else _state.reason


def kernels_for(tensor: torch.Tensor) -> ctypes.CDLL | None:
    """The kernels, where they take such a tensor: on the processor, of a dtype that they know."""
    return library() if tensor.device.type == "cpu" and tensor.dtype in _TYPES else None


def type_code(dtype: torch.dtype) -> int:
    """The number by which the kernels know a dtype."""
    return _TYPES[dtype]


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Torch alone, for tests and for comparing."""
    before, _state.switched_off = _state.switched_off, True
    try:
        yield
    finally:
        _state.switched_off = before


def _load_once() -> None:
    try:
        _state.library = _load()
    except (_NotLoadedError, OSError, subprocess.SubprocessError) as error:
        _state.reason = str(error).strip() or type(error).__name__
    _state.tried = True


def _load() -> ctypes.CDLL:
    if not hasattr(os, "geteuid"):
        raise _NotLoadedError(f"the kernels are not built on {platform.system()}")
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise _NotLoadedError(f"no C compiler: none of {', '.join(COMPILERS)} is installed ({how_to_install()})")
    fingerprint, folder = _fingerprint(compiler), _cache_folder()
    for kept in [] if folder is None else _kept(folder, fingerprint):
        if _is_whole(kept):
            with contextlib.suppress(OSError, _NotLoadedError):  # a folder from which nothing may be run, say
                return _open(kept)
        else:
            with contextlib.suppress(OSError):
                kept.unlink()
    try:
        return _build(compiler, None, folder, fingerprint)
    except OSError as error:  # no room for temporary files, or none may be run: the cache's disk may be another
        if folder is None:
            raise
        with contextlib.suppress(OSError):
            return _build(compiler, folder, folder, fingerprint)
        raise error


def _build(compiler: str, base: Path | None, folder: Path | None, fingerprint: str) -> ctypes.CDLL:
    """Compile in a private folder below `base`, load the result, and keep it in `folder` if that can be."""
    with tempfile.TemporaryDirectory(prefix="lamina-", dir=base) as private:  # what is loaded stays without its file
        built = Path(private) / "kernels.so"
        _compile(compiler, built)
        kernels = _open(built)
        if folder is not None:
            with contextlib.suppress(OSError):  # a full or read-only disk: then every process compiles for itself
                _keep(built, folder, fingerprint)
        return kernels


def _keep(built: Path, folder: Path, fingerprint: str) -> None:
    """Copy a library to the cache under the checksum of its bytes: they are on the disk before the name is."""
    content = built.read_bytes()
    target = folder / f"{fingerprint}-{hashlib.sha256(content).hexdigest()}.so"
    temporary = folder / f"{target.stem}.{secrets.token_hex(8)}.tmp"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    finally:
        temporary.unlink(missing_ok=True)


def _kept(folder: Path, fingerprint: str) -> list[Path]:
    """What the cache has under this fingerprint: one file, unless it was tampered with."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if name.startswith(f"{fingerprint}-") and name.endswith(".so")]


def _is_whole(path: Path) -> bool:
    """No other user can write to it, and it has the bytes that its name says: loading half a library is a crash."""
    try:
        return _is_mine(path) and path.stem.endswith(f"-{hashlib.sha256(path.read_bytes()).hexdigest()}")
    except OSError:
        return False


def how_to_install() -> str:
    """How a C compiler with its headers is installed here."""
    if platform.system() == "Darwin":
        return "install one: `xcode-select --install`"
    known = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = RELEASE.read_text().splitlines()
        known = " ".join(line.partition("=")[2].strip('"') for line in lines if line.startswith(("ID=", "ID_LIKE=")))
    command = next((INSTALL[name] for name in known.split() if name in INSTALL), "")
    return f"install one: {command}" if command else "install one: the package is called gcc"


def _fingerprint(compiler: str) -> str:
    """Of everything that the compiled code depends on: `-march=native` is another one on another processor."""
    real = os.path.realpath(compiler)
    known = os.stat(real)
    parts = [VERSION, VARIANTS, FLAGS, real, known.st_size, known.st_mtime_ns, _processor()]
    sources = b"".join(path.read_bytes() for path in [SOURCE, *sorted(SOURCE.parent.glob("*_kernels.c"))])
    return hashlib.sha256(sources + repr(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    with contextlib.suppress(OSError):
        wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return f"{platform.machine()} {platform.processor()}"


def _cache_folder() -> Path | None:
    """The folder to keep the kernels in; None where there is none that only this user can write to.

    It may be one that cannot be written to at all: what it holds is used all the same.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if not base.is_absolute():
            return None
        folder = base / "lamina" / "kernels"
        base.mkdir(parents=True, exist_ok=True)
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    trusted = all(_is_mine(each) for each in (folder.parent, folder)) and _is_mine(base, or_root=True)
    return folder if trusted else None


def _is_mine(path: Path, or_root: bool = False) -> bool:
    """It is there, belongs to this user, and no other user can write to it: its code will be run."""
    try:
        known = os.stat(path) if or_root else os.lstat(path)
    except OSError:
        return False
    owners = (os.geteuid(), 0) if or_root else (os.geteuid(),)
    return not stat.S_ISLNK(known.st_mode) and known.st_uid in owners and not known.st_mode & 0o022


def _compile(compiler: str, target: Path) -> None:
    """Compile to `target`; what a compiler writes on the way goes to the same folder."""
    said = ""
    for variant in VARIANTS:
        command = [compiler, *FLAGS, *variant, "-o", str(target), str(SOURCE), "-lm"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(target.parent)},
        )
        if done.returncode == 0:
            target.chmod(0o700)
            return
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target.parent))
        said = said or next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
    lacking = "No such file" in said or "not found" in said  # a compiler without the headers of the C library
    advice = f" ({how_to_install()})" if lacking else ""
    raise _NotLoadedError(f"{compiler} could not compile the kernels: {said}{advice}")


def _open(path: Path) -> ctypes.CDLL:
    kernels = ctypes.CDLL(str(path))
    try:
        version = kernels.lamina_kernels_version()
    except AttributeError:
        raise _NotLoadedError(f"{path} holds no kernels: what compiled it is no C compiler") from None
    if version != VERSION:
        raise _NotLoadedError(f"{path} holds other kernels than this version of lamina wants: delete it")
    pointer, long, short = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    kernels.lamina_affine_decode.argtypes = [pointer, long, long, short, short, pointer, short]
    kernels.lamina_affine_decode.restype = None
    kernels.lamina_affine_linear.argtypes = [
        *(pointer, long, pointer, long, long, short, short),
        *(pointer, long, short),
    ]
    kernels.lamina_affine_linear.restype = short
    kernels.lamina_affine_quick.argtypes = kernels.lamina_affine_linear.argtypes
    kernels.lamina_affine_quick.restype = short
    kernels.lamina_affine_encode.argtypes = [
        *(pointer, long, long, short, short),
        *(pointer, short, pointer, short),
    ]
    kernels.lamina_affine_encode.restype = long
    kernels.lamina_bf16z_decode.argtypes = [pointer, long, long, long, long, pointer, short]
    kernels.lamina_bf16z_decode.restype = long
    kernels.lamina_bf16z_encode.argtypes = [pointer, long, long, ctypes.c_uint32, long, pointer, short]
    kernels.lamina_bf16z_encode.restype = long
    kernels.lamina_gguf_decode.argtypes = kernels.lamina_affine_decode.argtypes
    kernels.lamina_gguf_decode.restype = short
    kernels.lamina_gguf_linear.argtypes = kernels.lamina_affine_linear.argtypes
    kernels.lamina_gguf_linear.restype = short
    kernels.lamina_gguf_book.argtypes = [short, pointer, long]
    kernels.lamina_gguf_book.restype = short
    kernels.lamina_rows_linear.argtypes = [
        *(pointer, long, pointer, long, long, pointer),
        *(short, pointer, long, short),
    ]
    kernels.lamina_rows_linear.restype = None
    kernels.lamina_rows_quick.argtypes = [short]
    kernels.lamina_rows_quick.restype = short
    return kernels
