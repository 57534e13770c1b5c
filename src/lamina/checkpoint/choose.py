"""Which files are meant: of a folder or hub repository those that make up its model, of several GGUF files the one.

Names only, nothing is opened. The order is that of transformers: `model.safetensors`, then
`model.safetensors.index.json` and its shards, then `pytorch_model.bin`, then `pytorch_model.bin.index.json` and its
shards. A GGUF file is named as `org/model:file.gguf` or `folder:Q4_K_M`, or is the only one there is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable

from lamina.caller import named_model
from lamina.checkpoint.header import parse_object, quote, refuse_other_content
from lamina.checkpoint.mistaken import ADAPTER_WEIGHTS, instead_of_weights, other_format
from lamina.errors import CheckpointError, LaminaError, MissingShardError, RequestError, UnsupportedError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
INDEX_ENDING = ".safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX_ENDING = ".bin.index.json"
_PICKLES = (PICKLED_FILE, f"{PICKLED_FILE}.index.json")  # go before any GGUF file beside them; safetensors as well
PICKLED_ENDINGS = (".bin", ".pt", ".pth")
_CONSOLIDATED = "consolidated"

# What trainers leave beside the weights, in the format of weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "trainer_state")
_SHARD_NUMBER = re.compile(r"(.*)-(\d{1,6})-of-(\d{1,6})(.*)(\.safetensors|\.bin)")
_VARIANT = re.compile(r"model(?:-\d+-of-\d+)?\.(\w+)(?:-\d+-of-\d+)?\.safetensors")
_SMALL_ENDINGS = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_TEMPLATE_FOLDER = "additional_chat_templates/"
_NEVER_CODE = ("original/", "examples/")

ENDING = ".gguf"
USUAL = "Q4_K_M"
"""What is proposed first, as llama.cpp and ollama take it first."""

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_TAG = re.compile(r"[\w.-]+")
_SHOWN = 6
_DEEPEST = 2  # folders in a local folder that are looked into


def add_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` of variant `fp16` as transformers writes it, `model.fp16.safetensors`."""
    stem, ending = name.rsplit(".", 1)
    return f"{stem}.{variant}.{ending}" if variant else name


def choose_weights(names: Collection[str], variant: str | None, where: str) -> list[str]:
    """The weight files of a folder, or the one index that names them (it ends with `.json`).

    Args:
        names: what the folder holds, without its own path.
        variant: as transformers has it, or None.
        where: how errors name the folder.

    Raises:
        RequestError: no such variant, or a choice of variants and none asked for.
        UnsupportedError: weights in another format only, or an adapter.
        MissingShardError: `-00002-of-00003` is there and another of the three is not.
        CheckpointError: no weights at all.
    """
    if named := _named_as_usual(names, SINGLE_FILE, variant):
        return named
    loose = _weights_among(names, ".safetensors")
    # Mistral repositories hold the same weights once more, in a layout that transformers does not read.
    if not _in_own_layout(loose):
        if pickled := _choose_pickled(names, variant, where):
            return pickled
        if not loose or "params.json" in names or "config.json" not in names:
            raise _no_weights(names, where)
    chosen = _of_variant(loose, variant, where)
    chosen = _in_own_layout(chosen) or chosen
    _check_numbering(chosen, where)
    return chosen


def is_pickled(name: str) -> bool:
    """Whether a file is one of torch's pickles, by the end of its name."""
    return name.endswith(PICKLED_ENDINGS)


def _named_as_usual(names: Collection[str], single: str, variant: str | None) -> list[str]:
    """The file that transformers calls so, or its index; empty where neither is there."""
    usual = (add_variant(single, variant), add_variant(f"{single}.index.json", variant))
    return [name for name in usual if name in names][:1]


def _weights_among(names: Collection[str], ending: str | tuple[str, ...], but: tuple[str, ...] = ()) -> list[str]:
    """Files of weights, by the ends of their names and not by their beginnings; hidden ones and adapters are none."""
    found = (name for name in names if name.endswith(ending) and not name.startswith((".", *but)))
    return sorted(name for name in found if name not in ADAPTER_WEIGHTS)


def _in_own_layout(names: Iterable[str]) -> list[str]:
    """Those that are not in Mistral's or Meta's."""
    return [name for name in names if not name.startswith(_CONSOLIDATED)]


def _choose_pickled(names: Collection[str], variant: str | None, where: str) -> list[str]:
    """The pickled weights of a folder, or their index; empty where there are none."""
    if named := _named_as_usual(names, PICKLED_FILE, variant):
        return named
    found = _weights_among(names, PICKLED_ENDINGS, (*_NO_WEIGHTS, _CONSOLIDATED))
    if variant or not found or any(other_format(name) for name in names):
        return []
    shards = [name for name in found if name.startswith("pytorch_model-")]
    if not shards and len(found) > 1:
        raise RequestError(f"{where} has the weights {', '.join(found[:4])}, and nothing says which: give one of them")
    _check_numbering(shards or found, where)
    return shards or found


def _of_variant(loose: list[str], variant: str | None, where: str) -> list[str]:
    variants = {name: match[1] for name in loose if (match := _VARIANT.fullmatch(name))}
    if variant:
        chosen = [name for name in loose if variants.get(name) == variant]
        if not chosen:
            raise RequestError(f"{where} has no variant {quote(variant)}, only {', '.join(loose[:4])}")
        return chosen
    chosen = [name for name in loose if name not in variants] or loose
    if chosen is loose and len(set(variants.values())) > 1:
        raise RequestError(f"{where} has only the variants {', '.join(sorted(set(variants.values())))}: choose one")
    return chosen


def _check_numbering(names: list[str], where: str) -> None:
    """Without an index, only `-00001-of-00003` tells that a shard is missing."""
    matches = [match for name in names if (match := _SHARD_NUMBER.fullmatch(name))]
    for stem, digits, count, ending in {(each[1], len(each[2]), each[3], each[4] + each[5]) for each in matches}:
        shards = (f"{stem}-{number:0{digits}d}-of-{count}{ending}" for number in range(1, int(count) + 1))
        if missing := next((shard for shard in shards if shard not in names), None):
            raise MissingShardError(f"{where} lacks {missing}, which the names of the others call for: fetch it again")


def _no_weights(names: Collection[str], where: str) -> LaminaError:
    if any(name.lower().endswith(ENDING) for name in names):
        return gguf_alone(names, where)
    if (known := instead_of_weights(names, where)) is not None:
        return known
    return CheckpointError(f"there are no weights in {where}: it needs {SINGLE_FILE}, or {INDEX_FILE} and its shards")


def small_files(names: Collection[str], subfolder: str, trust_remote_code: bool) -> list[str]:
    """The files of a repository that a model needs besides its weights: config, tokenizer, chat templates.

    Args:
        names: every file of the repository.
        subfolder: where the model is; files beside it at the top are taken too.
        trust_remote_code: take Python files as well.
    """
    tops = {"", f"{subfolder}/" if subfolder else ""}
    chosen = []
    for name in names:
        folder = name[: name.rfind("/") + 1]
        if name.endswith(".py"):
            wanted = trust_remote_code and not name.startswith(_NEVER_CODE)
        elif folder in {top + _TEMPLATE_FOLDER for top in tops}:
            wanted = name.endswith(".jinja")
        else:
            wanted = folder in tops and name.endswith(_SMALL_ENDINGS) and ".index." not in name
        if wanted:
            chosen.append(name)
    return chosen


def parse_index(raw: bytes, name: str) -> dict[str, str]:
    """The weight map of an index: which file holds each tensor, both by name.

    Args:
        raw: the JSON text.
        name: how errors call the index.

    Raises:
        CheckpointError: not an index, or one that names files outside its folder.
    """
    refuse_other_content(raw[:32], name)
    weight_map = parse_object(raw, name, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{name} has no weight_map that says which file holds which tensor: fetch it again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{name} gives tensor {quote(tensor)} a file that is not text: fetch it again")
    for file in sorted(set(weight_map.values())):
        if not is_plain_name(file):
            raise CheckpointError(
                f"{name} names the file {quote(file)}, which is not a plain name in its own folder: "
                "do not trust this checkpoint"
            )
        if not file.endswith(".bin" if name.endswith(PICKLED_INDEX_ENDING) else ".safetensors"):
            kind = "pickle" if name.endswith(PICKLED_INDEX_ENDING) else "safetensors file"
            raise CheckpointError(f"{name} names the file {quote(file)}, which is no {kind}: fetch it again")
    return weight_map


def index_dtype(raw: bytes, name: str) -> str:
    """What the metadata of an index says the weights are, in torch's words; empty where it says nothing."""
    metadata = parse_object(raw, name, CheckpointError).get("metadata")
    stated = metadata.get("dtype") if isinstance(metadata, dict) else None
    return stated if isinstance(stated, str) else ""


def is_plain_name(name: str) -> bool:
    """Whether this can only be a file of the folder that names it."""
    return name.isprintable() and "/" not in name and "\\" not in name and name not in ("", ".", "..")


def check_subfolder(subfolder: str) -> str:
    """The subfolder without slashes at its end.

    Raises:
        RequestError: it leads out of the model's own folder.
    """
    if os.path.isabs(subfolder) or ".." in subfolder.split("/") or not subfolder.isprintable():
        raise RequestError(f"subfolder {quote(subfolder)} must be a folder inside the model's own")
    return subfolder.strip("/")


def split_name(model: str | os.PathLike[str]) -> tuple[str, str | None]:
    """A model and which GGUF file of it, as in `org/model:file.gguf` and `folder:Q4_K_M`; None where none is named.

    What exists is a path, even with colons in it; so is what begins like a drive of Windows, or like an address.
    """
    name = os.fspath(model)
    head, colon, choice = name.rpartition(":")
    if not colon or len(head) < 2 or os.path.lexists(os.path.expanduser(name)):
        return name, None
    if choice.lower().endswith(ENDING) and not choice.startswith(("/", "\\")):
        return head, choice
    return (head, choice) if _TAG.fullmatch(choice) else (name, None)


def part_names(name: str) -> list[str]:
    """The names of all parts of a split model, by that of one; the name alone where it is none of a part."""
    match = _SPLIT.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [name]
    return [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


def gguf_models(names: Iterable[str]) -> list[str]:
    """The models among file names, of a split one the first part that is there; projectors of images are left out."""
    models: dict[str, str] = {}
    for name in sorted(names):
        base = os.path.basename(name)
        if base.lower().endswith(ENDING) and not base.startswith((".", "mmproj")):
            models.setdefault(part_names(name)[0], name)
    return sorted(models.values())


def choose_gguf(names: Iterable[str], choice: str, where: str) -> str:
    """The file that a choice means: a name, its last part, or a tag such as `Q4_K_M` that one file has in its name.

    Args:
        names: of files, by their paths in the folder or repository.
        choice: what was asked for.
        where: that folder or repository, as a user names it.

    Raises:
        RequestError: none fits, or several do.
    """
    names = sorted(names)
    if choice in names:
        return choice
    models, is_file = gguf_models(names), choice.lower().endswith(ENDING)
    found = _with_last_part(names, choice) if is_file else _tagged(models, choice)
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(f"{where} has {len(found)} GGUF models for {quote(choice)}: {naming(found, where)}")
    others = f": {naming(models, where)}" if models else ", nor any GGUF"
    raise RequestError(f"{where} has no {'file' if is_file else 'GGUF file for'} {quote(choice)}{others}")


def _with_last_part(names: Iterable[str], last: str) -> list[str]:
    found = [name for name in names if os.path.basename(name) == last]
    return gguf_models(found) or found


def _tagged(models: Iterable[str], tag: str) -> list[str]:
    """The models with this word in their paths; of these the ones with it in their own names, if any has it there."""
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(tag)}(?![A-Za-z0-9_])", re.IGNORECASE)
    found = [name for name in models if word.search(name)]
    return [name for name in found if word.search(os.path.basename(name))] or found


def gguf_alone(names: Iterable[str], where: str) -> LaminaError:
    """The error for a place that has GGUF models only, where none is chosen."""
    models = gguf_models(names)
    if not models:
        return UnsupportedError(f"{where} holds a projector of images in GGUF and no model: give the model's own file")
    count = "one GGUF model" if len(models) == 1 else f"{len(models)} GGUF models"
    return UnsupportedError(f"{where} holds {count} and no other weights: {naming(models, where)}")


def naming(models: list[str], where: str) -> str:
    """How to name one of several, in words that can be copied."""
    first = next((name for name in models if USUAL.lower() in name.lower()), models[0])
    others = [name for name in models if name != first]
    more = f" and {len(others) - _SHOWN} others" if len(others) > _SHOWN else ""
    return f"name one, as in {named_model(where, f'{where}:{first}')}" + (
        f"; it also has {', '.join(others[:_SHOWN])}{more}" if others else ""
    )


def find_gguf(path: str | os.PathLike[str]) -> str | None:
    """The GGUF file that a path means: itself, or the one model of a folder that has no other weights.

    Raises:
        UnsupportedError: a folder with several.
    """
    root = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not os.path.isdir(root):
        return root if root.lower().endswith(ENDING) and os.path.lexists(root) else None
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return None  # opening the folder raises the reason
    if any(name.endswith((".safetensors", INDEX_ENDING)) or name in _PICKLES for name in names):
        return None
    models = gguf_models(names)
    if len(models) > 1:
        raise gguf_alone(names, os.fspath(path).rstrip(os.sep))
    return os.path.join(root, models[0]) if models else None


def local_names(root: str) -> list[str]:
    """The GGUF files of a local folder and of those in it, by their paths with slashes."""
    names = []
    for top, folders, found in os.walk(root):
        inside = os.path.relpath(top, root)
        depth = 0 if inside == "." else inside.count(os.sep) + 1
        folders[:] = [each for each in sorted(folders) if not each.startswith(".") and depth < _DEEPEST]
        paths = [os.path.normpath(os.path.join(inside, name)).replace(os.sep, "/") for name in found]
        names += [path for path in paths if path.lower().endswith(ENDING)]
    return sorted(names)
