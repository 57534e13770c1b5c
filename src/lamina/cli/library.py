"""The door from the command line to the model: everything heavy is imported here, and only when asked for.

`library` and `store_library` are the seams: tests put in-memory doubles in their place.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lamina.cli import interrupt
from lamina.cli.options import ModelOptions, SourceOptions
from lamina.errors import CheckpointError, RequestError
from lamina.progress import Progress


def library(options: SourceOptions) -> Any:
    """`lamina.api`, with the process set up as `options` say."""
    return _imported("lamina.api", options)


def store_library(options: SourceOptions) -> Any:
    """`lamina.store`, with the process set up as `options` say."""
    return _imported("lamina.store", options)


def _imported(name: str, options: SourceOptions) -> Any:
    # Read by their libraries once, at import. The user's own setting wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads spin for milliseconds after each matrix product, which the drive's own work then lacks
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes to stderr when it starts and stops
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    gc.disable()  # importing makes a million objects and no garbage: looking for some takes a third of the time
    try:
        module = importlib.import_module(name)
    finally:
        gc.enable()
    if options.threads is not None:
        importlib.import_module("torch").set_num_threads(options.threads)
    interrupt.raise_first()
    return module


@contextmanager
def opened(model: str, options: ModelOptions, report: Progress | None = None) -> Iterator[Any]:
    """The model, ready to generate; its stream is closed at the end, after an error too."""
    if options.verify:
        verify(model, report)
    loaded = library(options).AutoModel.from_pretrained(model, progress=report, **options.as_kwargs())
    with loaded.lamina:
        if not hasattr(loaded, "generate"):
            raise RequestError(
                f"{model} is a {type(loaded).__name__}, which gives no text: call it from Python, "
                f"lamina.AutoModel.from_pretrained({model!r}) loads it"
            )
        yield loaded


def verify(folder: str, report: Progress | None) -> dict[str, Any]:
    """What a look at every byte of a store found.

    Raises:
        CheckpointError: something is not what was written.
    """
    result = as_dict(store_library(SourceOptions()).verify(folder, progress=report))
    if faults := result["faults"]:
        raise CheckpointError(
            f"{len(faults)} of {result['files']} files in {result['folder']} {'is' if len(faults) == 1 else 'are'} "
            f"damaged ({faults[0]['file']} {faults[0]['what']}): see lamina verify"
        )
    return result


def plan(model: str, options: ModelOptions, report: Progress | None) -> dict[str, Any]:
    """What would live where, from the headers alone."""
    return as_dict(library(options).plan_model(model, progress=report, **options.as_kwargs()))


def bench(model: str, options: ModelOptions, report: Progress | None, **request: Any) -> dict[str, Any]:
    """What was measured while generating, with the disk's own ceiling beside it."""
    return as_dict(library(options).bench_model(model, progress=report, **options.as_kwargs(), **request))


def as_dict(record: Any) -> dict[str, Any]:
    """A frozen record of the library as a plain dict."""
    if isinstance(record, Mapping):
        return dict(record)
    if hasattr(record, "as_dict"):
        return dict(record.as_dict())
    return dataclasses.asdict(record)


def token_inputs(model: Any, ids: list[int]) -> dict[str, Any]:
    """Token ids as the inputs of `generate`: one row, all of it attended to."""
    torch = importlib.import_module("torch")
    row = torch.tensor([ids], device=model.device)
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def set_seed(seed: int) -> None:
    """Make the sampling that follows repeatable."""
    importlib.import_module("torch").manual_seed(seed)
