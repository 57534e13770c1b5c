"""Which files of a folder or a hub repository make up its model: names only, nothing is opened.

The order is that of transformers: `model.safetensors`, then `model.safetensors.index.json` and its shards, then
`pytorch_model.bin`, then `pytorch_model.bin.index.json` and its shards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection

from lamina.checkpoint.gguf_name import ENDING, gguf_alone
from lamina.checkpoint.mistaken import ADAPTER_WEIGHTS, instead_of_weights, other_format
from lamina.checkpoint.strict import parse_object, quote, refuse_other_content
from lamina.errors import CheckpointError, LaminaError, MissingShardError, RequestError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
INDEX_ENDING = ".safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX_ENDING = ".bin.index.json"
PICKLED_ENDINGS = (".bin", ".pt", ".pth")

# What trainers leave beside the weights, in the format of weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "trainer_state")
_SHARD_NUMBER = re.compile(r"(.*)-(\d{1,6})-of-(\d{1,6})(.*)(\.safetensors|\.bin)")
_VARIANT = re.compile(r"model(?:-\d+-of-\d+)?\.(\w+)(?:-\d+-of-\d+)?\.safetensors")
_SMALL_ENDINGS = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_TEMPLATE_FOLDER = "additional_chat_templates/"
_NEVER_CODE = ("original/", "examples/")


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
    for wanted in (add_variant(SINGLE_FILE, variant), add_variant(INDEX_FILE, variant)):
        if wanted in names:
            return [wanted]
    loose = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("."))
    loose = [name for name in loose if name not in ADAPTER_WEIGHTS]
    # Mistral repositories hold the same weights once more, in a layout that transformers does not read.
    if all(name.startswith("consolidated") for name in loose):
        if pickled := _choose_pickled(names, variant, where):
            return pickled
        if not loose or "params.json" in names or "config.json" not in names:
            raise _no_weights(names, where)
    chosen = _of_variant(loose, variant, where)
    chosen = [name for name in chosen if not name.startswith("consolidated")] or chosen
    _check_numbering(chosen, where)
    return chosen


def is_pickled(name: str) -> bool:
    """Whether a file is one of torch's pickles, by the end of its name."""
    return name.endswith(PICKLED_ENDINGS)


def _choose_pickled(names: Collection[str], variant: str | None, where: str) -> list[str]:
    """The pickled weights of a folder, or their index; empty where there are none."""
    index = add_variant(f"{PICKLED_FILE}.index.json", variant)
    for wanted in (add_variant(PICKLED_FILE, variant), index):
        if wanted in names:
            return [wanted]
    found = sorted(n for n in names if is_pickled(n) and not n.startswith((*_NO_WEIGHTS, ".", "consolidated")))
    found = [name for name in found if name not in ADAPTER_WEIGHTS]
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
