"""The kernels in C: compiled by the system's compiler when first wanted, and kept in the user's cache folder.

No wheel has to be built for each processor that way, and the code uses all that this one can. Where there is no
compiler everything works in torch alone, slower and to the same bits; `missing` says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
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
SECONDS = 120  # a compiler that takes longer is taken for broken; the usual time is two seconds

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as in kernels.c


class _State:
    """What the one attempt to load came to."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
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
        with _state.lock:
            if not _state.tried:
                _load_once()
    return _state.library


def available() -> bool:
    """Whether there are kernels; compiles and loads them where nobody has yet."""
    return library() is not None


def missing() -> str:
    """Why there are no kernels, in one line; empty where there are."""
    if available():
        return ""
    return "switched off" if _state.switched_off else _state.reason


def type_code(dtype: torch.dtype) -> int | None:
    """The number by which the kernels know a dtype; None where they do not."""
    return _TYPES.get(dtype)


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
        raise _NotLoadedError(f"no C compiler: none of {', '.join(COMPILERS)} is installed")
    name = f"{_fingerprint(compiler)}.so"
    folder = _cache_folder()
    if folder is not None:
        if not _is_mine(folder / name):
            _compile(compiler, folder / name)
        try:
            return _open(folder / name)
        except OSError:
            (folder / name).unlink(missing_ok=True)  # half a file of a full disk, say: the next process makes another
            raise
    with tempfile.TemporaryDirectory(prefix="lamina-") as private:  # what is loaded stays loaded without its file
        _compile(compiler, Path(private) / name)
        return _open(Path(private) / name)


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
    """The folder to keep the kernels in; None where there is none that only this user can write to."""
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
    return folder if trusted and os.access(folder, os.W_OK | os.X_OK) else None


def _is_mine(path: Path, or_root: bool = False) -> bool:
    """It is there, belongs to this user, and nobody else can write to it: its code will be run."""
    try:
        known = os.stat(path) if or_root else os.lstat(path)
    except OSError:
        return False
    owners = (os.geteuid(), 0) if or_root else (os.geteuid(),)
    return not stat.S_ISLNK(known.st_mode) and known.st_uid in owners and not known.st_mode & 0o022


def _compile(compiler: str, target: Path) -> None:
    """Compile beside the target and rename, so that nobody loads half a file."""
    beside = target.with_name(f"{target.stem}.{os.getpid()}.{threading.get_ident()}.tmp")
    said = ""
    try:
        for variant in VARIANTS:
            command = [compiler, *FLAGS, *variant, "-o", str(beside), str(SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
            if done.returncode == 0:
                beside.chmod(0o700)
                beside.replace(target)
                return
            said = said or next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
    finally:
        beside.unlink(missing_ok=True)
    raise _NotLoadedError(f"{compiler} could not compile the kernels: {said}")


def _open(path: Path) -> ctypes.CDLL:
    kernels = ctypes.CDLL(str(path))
    if kernels.lamina_kernels_version() != VERSION:
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
    return kernels
