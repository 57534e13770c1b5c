"""What people have in place of a checkpoint, and what to do: another layout, parts of a file, an archive, an adapter.

Each function gives the one line for it, or None where it is something else. Names and first bytes only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Sequence

from lamina.checkpoint.header import NOT_JSON, NOT_THE_FILE
from lamina.errors import CheckpointError, LaminaError, MissingShardError, UnsupportedError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = frozenset(("adapter_model.safetensors", "adapter_model.bin"))
MARKS = frozenset(("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"))

_OF_TRANSFORMERS_4 = (
    "transformers 4 reads it and writes one that is taken: from_pretrained(FOLDER, from_{}=True).save_pretrained(NEW)"
)
_OTHER_FORMATS = {
    ".ckpt": ("a PyTorch pickle under another ending", "give it the ending .bin"),
    ".h5": ("TensorFlow weights", _OF_TRANSFORMERS_4.format("tf")),
    ".msgpack": ("Flax weights", _OF_TRANSFORMERS_4.format("flax")),
    ".onnx": ("an ONNX graph", "take the safetensors or GGUF of the same model"),
    ".npz": ("NumPy or MLX weights", "take the safetensors or GGUF of the same model"),
    ".nemo": ("a NeMo archive", "convert it with NeMo's export to Hugging Face"),
}
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst", ".7z", ".rar", ".gz", ".xz", ".bz2", ".zst")
_UNFINISHED = (".incomplete", ".aria2", ".crdownload", ".download", ".part", ".partial", ".tmp", "!qb")
_WEIGHTS = r"\.(?:safetensors|gguf|bin|pth|pt)"
_PART = re.compile(
    rf"(?P<whole>.+{_WEIGHTS})[._-](?:(?:part|split)[._-]?)?(?P<number>\d{{1,4}}|[a-z]{{1,2}})(?:-?of-?(?P<count>\d{{1,4}}))?"
)
_PIECE = re.compile(r"x[a-z]{2}")  # what `split` calls them
_MOST_SHOWN = 4
_MOST_FOLDERS = 200
_DEEPEST = 3  # models--org--name/snapshots/<commit>


def other_format(name: str) -> str | None:
    """What a weight file of another format is, and what to do; None for any other file."""
    found = _OTHER_FORMATS.get(os.path.splitext(name)[1].lower())
    return f"{found[0]}: {found[1]}" if found else None


def instead_of_weights(names: Collection[str], where: str) -> LaminaError | None:
    """What a folder without weights holds in their place.

    Args:
        names: of its files.
        where: how errors name the folder.
    """
    if adapter_alone(names):
        return lone_adapter(where, None)
    if any(name.startswith("consolidated") and name.endswith(".pth") for name in names):
        return UnsupportedError(
            f"{where} has Meta's own layout (consolidated.00.pth), which transformers does not read: take the "
            "model's repository for transformers, or convert it with transformers' convert_llama_weights_to_hf.py"
        )
    if any(name.startswith("consolidated") and name.endswith(".safetensors") for name in names):
        return UnsupportedError(
            f"{where} has Mistral's own layout alone (consolidated.safetensors, params.json), which transformers does "
            "not read: fetch the model.safetensors files and config.json as well, or convert it with transformers' "
            "convert_mistral_weights_to_hf.py"
        )
    return in_parts(names, where) or _of_other_kinds(names, where)


def in_parts(names: Collection[str], where: str) -> LaminaError | None:
    """A weight file that was cut into parts, or whose download has not ended."""
    return _numbered_parts(names, where) or _pieces(names, where) or _unfinished(names, where)


def _numbered_parts(names: Collection[str], where: str) -> LaminaError | None:
    found = {name: match for name in names if (match := _PART.fullmatch(name)) and not is_archive(name)}
    if not found:
        return None
    whole = min(match["whole"] for match in found.values())
    parts = {name: match for name, match in found.items() if match["whole"] == whole}
    if lacking := _lacking(list(parts.values())):
        return MissingShardError(f"{where} holds {whole} {lacking}: fetch it, then join them")
    if len(parts) == 1 and not any(match["count"] for match in parts.values()):
        return MissingShardError(
            f"{where} holds {next(iter(parts))}, one part of {whole}: fetch the others, then join them in order"
        )
    return _to_be_joined(sorted(parts, key=_in_order), whole, where)


def _lacking(parts: Sequence[re.Match[str]]) -> str:
    """Which of how many parts is missing, where their names say how many there are; empty where none is known to be."""
    counts = {int(part["count"]) for part in parts if part["count"]}
    if not counts or not all(part["number"].isdigit() for part in parts):
        return ""
    there, count = {int(part["number"]) for part in parts}, max(counts)
    missing = next((each for each in range(1, count + 1) if each not in there), None)
    return "" if missing is None else f"in {count} parts, of which part {missing} is missing"


def _pieces(names: Collection[str], where: str) -> LaminaError | None:
    pieces = sorted(name for name in names if _PIECE.fullmatch(name))
    return _to_be_joined(pieces, "model.safetensors", where) if len(pieces) > 1 else None


def _unfinished(names: Collection[str], where: str) -> LaminaError | None:
    for name in sorted(names):
        if name.lower().endswith(_UNFINISHED) and re.search(_WEIGHTS, name):
            return CheckpointError(
                f"{where} holds {name}, a download that has not ended: let it end, or start it again"
            )
    return None


def _to_be_joined(parts: list[str], whole: str, where: str) -> LaminaError:
    shown = " ".join(parts) if len(parts) <= _MOST_SHOWN else f"{parts[0]} {parts[1]} ... {parts[-1]}"
    return UnsupportedError(
        f"{where} holds {whole} in {len(parts)} parts: join them in order, `cat {shown} > {whole}`, and move them away"
    )


def _in_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _of_other_kinds(names: Collection[str], where: str) -> LaminaError | None:
    for name in sorted(names):
        if form := other_format(name):
            return UnsupportedError(f"{where} holds no weights but {name}, which is {form}")
    for name in sorted(names):
        if is_archive(name):
            return UnsupportedError(f"{where} holds {name} alone: unpack it, and give the folder that comes out")
    return None


def is_archive(name: str) -> bool:
    """Whether a file is an archive of others, by the end of its name."""
    return name.lower().endswith(_ARCHIVES)


def folder_inside(root: str) -> str | None:
    """Where the model is that was looked for in a local folder which has none itself: the end of a line, or None."""
    found = _model_folders(root)
    if not found:
        return None
    if len(found) == 1:
        return f"the model is in a folder of it, give {found[0]}"
    return f"there are models in folders of it, give one, such as {found[0]}"


def _model_folders(root: str) -> list[str]:
    """The folders with a model in a local folder and those in it, as far as a look at some of them tells."""
    found: list[str] = []
    for seen, (top, folders, names) in enumerate(os.walk(root)):
        depth = 0 if top == root else os.path.relpath(top, root).count(os.sep) + 1
        folders[:] = [each for each in sorted(folders) if not each.startswith(".") and depth < _DEEPEST]
        if top != root and (not MARKS.isdisjoint(names) or any(name.endswith(".gguf") for name in names)):
            found.append(top)
            folders[:] = []
        if seen > _MOST_FOLDERS:
            break
    return found


def adapter_alone(names: Collection[str]) -> bool:
    """Whether a folder holds an adapter and no model."""
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json"))]
    adapters = [name for name in weights if name in ADAPTER_WEIGHTS]
    others = [name for name in weights if name not in adapters and not name.startswith(("training_args", "optimizer"))]
    return bool(adapters) and all(name.startswith(("scheduler", "scaler", "rng_state")) for name in others)


def lone_adapter(where: str, config: bytes | None) -> UnsupportedError:
    """The error for an adapter without its model.

    Args:
        where: the folder or repository.
        config: its `adapter_config.json`, as far as it can be had.
    """
    base = base_of(config)
    named, load = (f"an adapter for {base}", f"{base!r}") if base else ("an adapter", "that")
    return UnsupportedError(
        f"{where} holds {named}, not a model: give the model that it belongs to"
        + (
            f", AutoModel.from_pretrained({load}), then model.load_adapter({where!r})"
            if base
            else ", then load_adapter"
        )
    )


def base_of(config: bytes | None) -> str | None:
    """The model that an adapter says it belongs to."""
    try:
        content = json.loads(config or b"")
    except ValueError:
        return None
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return base if isinstance(base, str) and base and base.isprintable() and len(base) < 200 else None


def why_unreadable(path: str) -> str | None:
    """What is wrong with a small file that transformers could not read (JSON, a vocabulary), as far as bytes tell."""
    try:
        with open(path, "rb") as handle:
            start = handle.read(64)
            rest = handle.read() if path.endswith(".json") else b""
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    if not start:
        return f"{path} is empty: fetch it again"
    for magic, what in (*NOT_THE_FILE, *(NOT_JSON if path.endswith(".json") else ())):
        if start.startswith(magic):
            return f"{path} {what}"
    if not path.endswith(".json"):
        return None
    try:
        json.loads(start + rest)
    except UnicodeDecodeError as error:
        return f"{path} is not UTF-8 (byte {error.start}): fetch it again"
    except ValueError as error:
        return f"{path} is not JSON ({error}): fetch it again"
    except RecursionError:
        return f"{path} is nested too deeply: fetch it again"
    return None


def unreadable_in(folder: str, names: Collection[str]) -> str | None:
    """The first of some files of a folder that cannot be read, and why."""
    paths = [path for name in names if os.path.isfile(path := os.path.join(folder, name))]
    return next((why for path in paths if (why := why_unreadable(path))), None)
