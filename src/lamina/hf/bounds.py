"""What a config may ask for: no more modules and no more memory than its checkpoint can be the reason of.

A config comes from anywhere, and a number in it is a loop or an allocation in somebody's constructor. What is bounded
here is the same for every family: numbers that count something, against the number of tensors that are there; modules
while they are made; and memory for what no file holds, which transformers would make up.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from lamina.errors import CheckpointError, LaminaError
from lamina.hf.config import short
from lamina.sizes import format_size

MOST_COUNTED = 100_000  # of layers, experts, heads, labels, ..., where no checkpoint has more tensors
MODULES = 1_000  # that a model may have whatever its checkpoint is
MODULES_PER_TENSOR = 16
UNSTORED = 256_000_000  # bytes of tensors that no file holds, whatever the checkpoint is: tables of positions, masks

_COUNTS = re.compile(
    r"(^|_)(num|n)_([a-z0-9]+_)*(layer|label|expert|head|block|group|stage|level|codebook)s?($|_)"
    r"|(layers|labels|experts|heads|blocks|depth|depths)$|^n_?(layer|head)s?$"
)


def check_counts(
    fields: Mapping[str, Any], tensors: int, where: str, wrong: type[LaminaError] = CheckpointError
) -> None:
    """Refuse a number of layers, experts, labels, ... that no checkpoint of so many tensors has.

    Args:
        fields: of a config, as JSON has them.
        tensors: in the headers of the checkpoint.
        where: how an error names the fields' place.
        wrong: the error to raise.
    """
    most = max(MOST_COUNTED, tensors)
    for name, value in _walk(fields):
        if isinstance(value, int) and value > most and _COUNTS.search(name.rpartition(".")[2]):
            raise wrong(f"{where} says {name} = {short(value)}, the checkpoint has {tensors} tensors: that cannot be")


@contextmanager
def as_many_as(tensors: int, where: str) -> Iterator[None]:
    """Within this block this thread makes no more modules than a checkpoint of so many tensors can need.

    Raises:
        CheckpointError: it would.
    """
    most, made, mine = MODULES + MODULES_PER_TENSOR * tensors, 0, threading.get_ident()

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal made
        if threading.get_ident() != mine:
            return
        made += 1
        if made > most:
            raise CheckpointError(
                f"{where} asks for more than {most} modules, the checkpoint has {tensors} tensors: too many layers "
                "or experts, or belongs to another model"
            )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


class Unstored(TorchFunctionMode):
    """Within this block little memory is taken for what no file holds.

    transformers gives memory to buffers that follow from the config, and to parameters that it does not find, before
    anybody can say that they are missing. Such a parameter stays without memory where it is large.

    Args:
        stored_bytes: of the checkpoint.
        where: how an error names the config.

    Attributes:
        left_out: bytes of parameters that have no memory.
    """

    def __init__(self, stored_bytes: int, where: str) -> None:
        super().__init__()
        self.room, self.where, self.left_out = UNSTORED + stored_bytes, where, 0
        self._parameters = min(self.room, UNSTORED)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.empty_like or not args[0].is_meta or _on_meta(kwargs.get("device", "meta")):
            return func(*args, **kwargs)
        nbytes = args[0].numel() * args[0].element_size()
        if isinstance(args[0], nn.Parameter):
            self._parameters -= nbytes
            if self._parameters < 0:
                self.left_out += nbytes
                return func(*args, **{**kwargs, "device": "meta"})
            return func(*args, **kwargs)
        self.room -= nbytes
        if self.room < 0:
            raise CheckpointError(
                f"{self.where} asks for a buffer of shape {tuple(args[0].shape)} ({format_size(nbytes)}) that no file "
                "holds: a size in it is wrong, such as the longest context"
            )
        return func(*args, **kwargs)


def _on_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _walk(fields: Mapping[str, Any], before: str = "", depth: int = 8) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and depth:
            yield from _walk(value, f"{before}{name}.", depth - 1)
        else:
            yield f"{before}{name}", value
