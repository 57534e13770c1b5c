"""`lamina split` from the outside: one call that gives a whole store, or says why not."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lamina.checkpoint.choose import split_name
from lamina.checkpoint.manifest import PLAIN, Manifest, check_compression
from lamina.errors import LaminaError, UnsupportedError
from lamina.fallbacks import Fallbacks
from lamina.hub import metadata_folder
from lamina.progress import Progress
from lamina.store.original import IN_CACHE, Deletion, delete_original_files
from lamina.store.place import check_place, default_folder
from lamina.store.source import explain_age, local_root, open_source
from lamina.store.work import Announce, Splitter, finished_store, is_whole, made_from_another, tidy


@dataclass(frozen=True)
class SplitResult:
    """What a split made.

    Attributes:
        folder: of the store, absolute.
        compression: `plain`, `8bit`, `4bit` or `lossless`.
        source_bytes: of the weight files that it was made from.
        bytes: of the weight files in the folder.
        files: how many.
        files_kept: of these, how many were there from before.
        seconds: that it took.
        deleted: files of the original that are gone.
        kept: files of the original that were to be deleted and were not, with the reason.
    """

    folder: str
    compression: str
    source_bytes: int
    bytes: int
    files: int
    files_kept: int
    seconds: float
    deleted: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def split(
    model: str | os.PathLike[str],
    *,
    to: str | os.PathLike[str] | None = None,
    compression: str | None = None,
    layer_shards_saving_path: str | os.PathLike[str] | None = None,
    delete_original: bool = False,
    trust_remote_code: bool = False,
    variant: str | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
    **hub: Any,
) -> SplitResult:
    """Write a checkpoint again, unit by unit, as a folder that streams better or is smaller.

    A store that is there already and was made from this checkpoint is left as it is; one that is not finished is
    gone on with. No more than a block of rows of a tensor is in memory at a time. Two processes may ask for the same
    store: one writes it, the other waits.

    Args:
        model: local folder, `.safetensors` file, or hub id.
        to: the folder of the store. Default: `default_folder`.
        compression: None for the same numbers in another order, `8bit`, `4bit`, or `lossless`.
        layer_shards_saving_path: where `to` is not given, the folder that the store's own folder is made in.
        delete_original: delete the weight files that the store was made from, once it was read back and found right.
        trust_remote_code: build a model whose code comes with it.
        variant: as transformers has it.
        progress: called with the stage (`download`, `wait`, `check`, `split`, `verify`), bytes done, bytes in all.
        announce: called with the folder, the bytes and the estimated seconds before a byte is written; not called
            where the store is complete.
        hub: `revision`, `cache_dir`, `token`, `local_files_only`, `subfolder`; None where not given. A `gguf_file` is
            refused.

    Raises:
        RequestError: a wrong argument, or a folder that holds something else.
        WriteError: too little room, or a folder that cannot be written to.
        ChangedError: the source changed while it was split, or since.
        CheckpointError, UnsupportedError: the source cannot be used.
    """
    began = time.perf_counter()
    compression = check_compression(PLAIN if compression is None else compression)
    hub = {key: value for key, value in hub.items() if value is not None}
    model = _named(model, hub.pop("gguf_file", None))
    if local := os.path.exists(os.path.expanduser(model)):
        model = os.path.expanduser(model)
    if to is None:
        to = default_folder(model, compression, layer_shards_saving_path, trust_remote_code=trust_remote_code, **hub)
    folder = os.path.abspath(os.path.expanduser(os.fspath(to)))
    root = os.path.join(local_root(model), hub.get("subfolder") or "") if local else ""

    manifest = _found(folder, compression, model, root, hub, progress)
    if manifest is None:
        source = open_source(model, trust_remote_code=trust_remote_code, variant=variant, progress=progress, **hub)
        check_place(folder, source.checkpoint.root)
        Fallbacks().say(source.checkpoint.fallbacks)
        manifest, kept = Splitter(folder, compression, source, trust_remote_code, progress, announce).run()
    else:
        kept = len(manifest.files) - 1
    deletion = _delete(model, folder, root, manifest, progress) if delete_original else Deletion()
    return _result(folder, manifest, kept, began, deletion)


def _found(
    folder: str, compression: str, model: str, root: str, hub: Mapping[str, Any], progress: Progress | None
) -> Manifest | None:
    """The manifest of a whole store that is there already and was made from the model as it is now.

    Raises:
        ChangedError: it was made from another.
    """
    manifest = finished_store(folder, compression)
    if manifest is None:
        return None
    if age := explain_age(manifest.source, model, root, None if root else _commit(model, hub)):
        raise made_from_another(folder, age)
    tidy(folder, progress)
    return manifest if is_whole(folder) else None


def _named(model: str | os.PathLike[str], gguf_file: str | None) -> str:
    """The name of a model that is no GGUF file, whichever way one may be asked for."""
    name, chosen = split_name(model)
    if chosen := chosen or gguf_file:
        raise UnsupportedError(f"{chosen} of {name} is small already and streams as it is: a GGUF file needs no split")
    return name


def _delete(model: str, folder: str, root: str, manifest: Manifest, progress: Progress | None) -> Deletion:
    """Delete the files of a local model, in `root`, that the store in `folder` was made from; none of the hub's."""
    if not root:
        return Deletion((), {model: IN_CACHE})
    linked = os.path.islink(model.rstrip(os.sep))
    return delete_original_files(folder, root, manifest.source["files"], progress, linked=linked)


def _commit(model: str, hub: Mapping[str, Any]) -> str | None:
    """What a model of the hub is now, as far as the hub or its cache can tell."""
    try:
        return os.path.basename(metadata_folder(model, **hub))
    except LaminaError:
        return None


def _result(folder: str, manifest: Manifest, kept: int, began: float, deletion: Deletion) -> SplitResult:
    weights = [file.nbytes for name, file in manifest.files.items() if name.endswith(".safetensors")]
    return SplitResult(
        folder,
        manifest.compression,
        sum(file["bytes"] for file in manifest.source["files"].values()),
        sum(weights),
        len(weights),
        kept,
        time.perf_counter() - began,
        deletion.deleted,
        deletion.kept,
    )
