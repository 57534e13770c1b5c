"""Every method and attribute of a tensor, called on weights that have no memory: run as a program of its own.

Prints one line for each call that was not refused and gave something else than torch gives for a tensor in memory; what
it is at is written to stderr before, so that a crash has a name.

    python tensor_methods.py ROUNDS KIND...
"""

from __future__ import annotations

import copy
import io
import pickle
import random
import sys
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch.multiprocessing.reductions import reduce_tensor

from helpers.homes import InMemory
from lamina.codec import Codec, register
from lamina.errors import LaminaError, StorageError
from lamina.plan.schedule import PanelSpan
from lamina.tensors.disk import DiskTensor
from lamina.tensors.packed import PackedTensor, Scratch
from lamina.tensors.row_blocks import Blocks

DATA = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
POINTERS = "data_ptr const_data_ptr storage untyped_storage _typed_storage share_memory_ apply_ set_".split()
SHAPES = "resize_ resize_as_ unsqueeze_ squeeze_ t_ transpose_ swapaxes_ as_strided_".split()
OTHERS = frozenset(
    "__class__ __init_subclass__ __subclasshook__ __new__ __init__ __getattribute__ __setattr__ __delattr__ __dict__ "
    "__weakref__ __module__ __doc__ __annotations__ __torch_function__ __torch_dispatch__ __dir__ __hash__ __repr__ "
    "__str__ __format__ __sizeof__ __getstate__ __setstate__ __dlpack_c_exchange_api__ "
    "_cdata _python_dispatch _is_view _base _version "
    "_reduce_ex_internal type retain_grad backward register_hook register_post_accumulate_grad_hook".split()
)  # what is not about data, or is another for another object
RANDOM = (
    "rand",
    "normal",
    "log_normal",
    "new_empty",
    "uniform",
    "bernoulli",
    "exponential",
    "cauchy",
    "geometric",
    "multinomial",
    "empty",
)
FEW: list[tuple[Any, ...]] = [
    (), (0,), (abs,), (torch.ones(4, 4),), (0, 1), (0, torch.tensor([[0, 1]])), (torch.ones(4, 4), abs),
]  # fmt: skip
BYTES = io.BytesIO
DOORS: dict[str, Callable[[Any], Any]] = {
    "np.asarray": lambda w: torch.from_numpy(np.array(w)),
    "memoryview": memoryview,
    "bytes": bytes,
    "list": lambda w: torch.stack(list(w)),
    "torch.from_dlpack": torch.from_dlpack,
    "np.from_dlpack": lambda w: np.from_dlpack(w.detach()),
    "to_dlpack": lambda w: torch.from_dlpack(torch.utils.dlpack.to_dlpack(w)),
    "torch.frombuffer": lambda w: torch.frombuffer(w, dtype=torch.float32),
    "torch.tensor": torch.tensor,
    "torch.as_tensor": lambda w: torch.as_tensor(w).clone(),
    "torch.asarray": lambda w: torch.asarray(w, copy=True),
    "torch.save": lambda w: torch.save(w, BYTES()),
    "safetensors": lambda w: save({"w": w}),
    "pickle": pickle.dumps,
    "multiprocessing": ForkingPickler.dumps,
    "reduce_tensor": reduce_tensor,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "Parameter": lambda w: torch.nn.Parameter(w).clone().detach(),
    "is_shared": lambda w: w.is_shared(),
    "numpy of a part": lambda w: torch.from_numpy(w[1:3].numpy()),
}


class Raw(Codec):
    """Elements as they are."""

    name = "raw"

    def unpack(self, panels: torch.Tensor, rows: int, columns: int, out: torch.Tensor) -> None:
        out.copy_(panels.reshape(-1).clone().view(torch.float32).view(rows, columns))


def on_disk() -> DiskTensor:
    made = DiskTensor.of("w", DATA.shape, DATA.dtype)
    made.home = InMemory(DATA.clone())
    return made


def packed() -> PackedTensor:
    made = PackedTensor(
        DATA.shape,
        DATA.dtype,
        DATA.clone().view(torch.uint8).view(-1),
        (PanelSpan("raw", 0, 2, 2, 32, 4, 0, 4),),
        Scratch(),
    )
    made.home = InMemory(DATA.clone())
    return made


KINDS: dict[str, Callable[[], Any]] = {"disk": on_disk, "blocks": lambda: Blocks(on_disk()), "packed": packed}


def plainly(value: Any) -> Any:
    """What can be compared."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            return "elsewhere"
        return value.dtype, tuple(value.shape), np.array(value.detach().clone()).tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, list | tuple):
        return [plainly(each) for each in value]
    if type(value).__name__ == "PyCapsule":
        return "a capsule"
    return value if isinstance(value, int | float | str | torch.Size | torch.dtype | torch.device) else type(value)


def outcome(call: Callable[[Any], Any], weight: Any) -> tuple[Any, Exception | None]:
    try:
        return plainly(call(weight)), None
    except Exception as error:  # what torch refuses is refused
        return None, error


def named(name: str, args: tuple[Any, ...]) -> Callable[[Any], Any]:
    def call(weight: Any) -> Any:
        found = getattr(weight, name)
        return found(*args) if callable(found) else found

    return call


def weight_is_written(name: str) -> bool:
    return name.endswith("_") if not name.endswith("__") else name.startswith("__i")


def wrong(kind: str, name: str, call: Callable[[Any], Any]) -> str | None:
    plain, weight = DATA.clone(), KINDS[kind]()
    wanted, refused = outcome(call, plain)
    got, error = outcome(call, weight)
    if isinstance(error, LaminaError) and "\n" not in str(error):
        return None
    if error is not None and name == "to_dlpack" and "Cannot access data pointer" in str(error):
        return None  # a function of C that nobody can stand in for
    if error is not None:
        return None if refused is not None else f"{type(error).__name__}: {error}"
    if name in POINTERS or (name in SHAPES and refused is None):
        return "was not refused"
    if refused is not None or name == "new" or name.startswith(RANDOM) or name.endswith("_like"):
        return None
    if kind == "packed" and weight_is_written(name):  # to what its home gives
        return None
    if got != wanted:
        return f"gives {str(got)[:80]} for {str(wanted)[:80]}"
    if name != "module_load" and plainly(weight.home.data) != plainly(plain):
        return "leaves other data behind"
    return None


def arguments(rng: random.Random) -> tuple[Any, ...]:
    some = [0, 1, -1, 3, 2.5, True, None, "cpu", DATA, torch.tensor([0, 1]), torch.float16, slice(1, 3), (4, 4), [0]]
    return tuple(rng.choice(some) for _ in range(rng.randint(0, 4)))


def main(kind: str, rounds: int) -> None:
    warnings.simplefilter("ignore")
    rng = random.Random(0)
    names = [name for name in dir(torch.Tensor) if name not in OTHERS]
    for name in names:
        some = FEW if rounds else FEW[: 4 if kind == "disk" else 3]
        for args in [*some, *(arguments(rng) for _ in range(rounds))]:
            print(f"{kind}: {name}{args}".replace("\n", " "), file=sys.stderr, flush=True)
            if (what := wrong(kind, name, named(name, args))) is not None:
                print(f"{kind}: {name} {what}".replace("\n", " "), flush=True)
    for name, door in DOORS.items():
        if kind == "blocks" and name == "Parameter":  # torch wants a parameter of the same class
            continue
        print(f"{kind}: {name}", file=sys.stderr, flush=True)
        if (what := wrong(kind, name, door)) is not None:
            print(f"{kind}: {name} {what}".replace("\n", " "), flush=True)
    for name in POINTERS:
        if isinstance(getattr(torch.Tensor, name, None), Callable):  # type: ignore[arg-type]
            error = outcome(named(name, (abs,) if name == "apply_" else ()), KINDS[kind]())[1]
            assert isinstance(error, StorageError), (name, error)


if __name__ == "__main__":
    register(Raw())
    for each in sys.argv[2:]:
        main(each, int(sys.argv[1]))
