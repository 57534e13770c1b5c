"""Operations on tensors that are on disk are written down, replayed, and said in bytes where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers.homes import InMemory
from lamina.checkpoint import open_checkpoint
from lamina.tensors.disk import DiskTensor, recording
from lamina.tensors.expressions import replay, sources_of
from lamina.weights import addresses

Tensors = dict[str, torch.Tensor]


def _on_disk(tensors: Tensors) -> dict[str, DiskTensor]:
    return {name: DiskTensor.of(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {chr(97 + i): torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}


def _gathered(disk: DiskTensor, tensors: Tensors) -> torch.Tensor:
    """The tensor that the boxes describe, put together without torch's views."""
    assert disk.boxes is not None
    out = torch.empty(disk.shape, dtype=disk.cast_from or disk.dtype)
    for box in disk.boxes:
        flat = tensors[box.source].contiguous().view(-1)
        region = torch.as_strided(flat, box.view.shape, box.view.stride(), int(box.view.storage_offset()))
        out[tuple(slice(s, s + n) for s, n in zip(box.start, region.shape, strict=True))] = region
    return out.to(disk.dtype)


OPERATIONS: dict[str, Callable[[Tensors], Any]] = {
    "itself": lambda t: t["a"],
    "slice": lambda t: t["a"][1:3],
    "slice of columns": lambda t: t["a"][:, 2:5],
    "every second row": lambda t: t["a"][::2],
    "one row": lambda t: t["a"][2],
    "transpose": lambda t: t["a"].T,
    "transpose, contiguous": lambda t: t["a"].T.contiguous(),
    "view": lambda t: t["a"].view(2, 2, 6),
    "reshape": lambda t: t["a"].reshape(6, 4),
    "reshape of a transpose": lambda t: t["a"].view(2, 2, 6).transpose(1, 2).reshape(4, 6),
    "permute": lambda t: t["a"].view(2, 2, 6).permute(2, 0, 1),
    "unsqueeze": lambda t: t["a"].unsqueeze(1),
    "cat of rows": lambda t: torch.cat([t["a"], t["b"]]),
    "cat of columns": lambda t: torch.cat([t["a"], t["b"]], dim=1),
    "cat, last dimension": lambda t: torch.cat([t["a"], t["b"]], dim=-1),
    "stack": lambda t: torch.stack([t["a"], t["b"]]),
    "stack inside": lambda t: torch.stack([t["a"], t["b"]], dim=1),
    "stack of cats": lambda t: torch.stack([torch.cat([t["a"], t["b"]]), torch.cat([t["b"], t["a"]])]),
    "split": lambda t: t["a"].split(2)[1],
    "split of columns": lambda t: t["a"].split([2, 4], dim=1)[1],
    "chunk": lambda t: t["a"].chunk(2, dim=1)[0],
    "chunk of a cat": lambda t: torch.cat([t["a"], t["b"]]).chunk(2)[1],
    "unbind": lambda t: t["a"].unbind(0)[3],
    "cast": lambda t: t["a"].to(torch.bfloat16),
    "cast there and back": lambda t: t["a"].to(torch.bfloat16).to(torch.float32),
    "cast of a cat": lambda t: torch.cat([t["a"], t["b"]]).to(torch.float16),
    "cat of casts": lambda t: torch.cat([t["a"].half(), t["b"].half()]),
    "cat of dtypes": lambda t: torch.cat([t["a"].half(), t["b"]]),
    "transposed stack": lambda t: torch.stack([t["a"], t["b"]]).transpose(1, 2),
    "arithmetic": lambda t: t["a"] * 2 - t["b"],
    "a norm made centred": lambda t: t["a"] + 1,
    "flip": lambda t: t["a"].flip(0),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_replays_to_what_torch_gives(operation: str) -> None:
    tensors = _tensors((4, 6), (4, 6))
    function = OPERATIONS[operation]
    with recording():
        disk = function(_on_disk(tensors))  # type: ignore[arg-type]
    wanted = function(tensors)
    assert isinstance(disk, DiskTensor)
    assert (disk.shape, disk.dtype, disk.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    assert torch.equal(replay(disk.expression, tensors.__getitem__), wanted)
    if disk.boxes is not None:
        assert torch.equal(_gathered(disk, tensors), wanted)


@pytest.mark.parametrize("operation", ["itself", "slice", "stack of cats", "split of columns", "view", "cast of a cat"])
def test_what_transformers_loader_does_is_addresses(operation: str) -> None:
    with recording():
        assert OPERATIONS[operation](_on_disk(_tensors((4, 6), (4, 6)))).boxes is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("operation", ["arithmetic", "flip", "cast there and back", "cat of dtypes"])
def test_what_is_computed_has_no_addresses(operation: str) -> None:
    with recording():
        assert OPERATIONS[operation](_on_disk(_tensors((4, 6), (4, 6)))).boxes is None  # type: ignore[arg-type]


def test_sources_are_named_once_in_order_of_use() -> None:
    with recording():
        disk = _on_disk(_tensors((2, 2), (2, 2), (2, 2)))
        made = torch.cat([disk["c"], disk["a"], disk["c"]]) + 1
    assert sources_of(made.expression) == ["c", "a"]  # type: ignore[attr-defined]


def test_outside_a_recording_the_data_is_read() -> None:
    tensors = _tensors((4, 6))
    disk = _on_disk(tensors)["a"]
    with pytest.raises(RuntimeError, match="not attached"):
        disk + 1
    disk.home = InMemory(tensors["a"])
    assert torch.equal(disk * 2, tensors["a"] * 2)
    assert torch.equal(torch.nn.functional.linear(torch.ones(6), disk), tensors["a"] @ torch.ones(6))
    assert repr(disk) == "DiskTensor(shape=(4, 6), dtype=torch.float32)"


def test_rows_are_read_alone() -> None:
    tensors = _tensors((4, 6))
    disk = _on_disk(tensors)["a"]
    disk.home = InMemory(tensors["a"], whole=False)
    assert torch.equal(disk[2], tensors["a"][2])
    assert torch.equal(disk[-1, 3], tensors["a"][-1, 3])
    ids = torch.tensor([[3, 0]])
    assert torch.equal(torch.nn.functional.embedding(ids, disk), tensors["a"][ids])


# -- random chains of what a loader may do


@st.composite
def chains(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    names = st.sampled_from(["slice", "transpose", "reshape", "cat", "stack", "split", "cast", "contiguous", "select"])
    return draw(st.lists(st.tuples(names, st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=6))


def _apply(chain: list[tuple[str, int, int]], start: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A chain of operations; one that does not fit the shape that it meets is left out."""
    x = start
    for name, dim, n in chain:
        dim %= max(x.dim(), 1)
        if name == "slice":
            x = x.narrow(dim, 0, max(x.shape[dim] - n, 1))
        elif name == "transpose" and x.dim() > 1:
            x = x.transpose(dim, (dim + n) % x.dim())
        elif name == "reshape":
            x = x.reshape(-1, x.shape[-1])
        elif name == "cat":
            x = torch.cat([x] * n, dim=dim)
        elif name == "stack" and x.dim() < 4:
            x = torch.stack([x] * n, dim=dim)
        elif name == "split":
            x = x.split(max(x.shape[dim] // n, 1), dim)[-1]
        elif name == "cast":
            x = x.to((torch.float16, torch.bfloat16, torch.float32)[n - 1])
        elif name == "contiguous":
            x = x.contiguous()
        elif name == "select" and x.dim() > 2:
            x = x.select(dim, -1)
        if x.shape == other.shape and n == 2:
            x = torch.stack([x, other.to(x.dtype)], dim=dim)
    return x


@given(chain=chains())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_random_chains_replay_and_gather_to_what_torch_gives(chain: list[tuple[str, int, int]]) -> None:
    tensors = _tensors((6, 8), (6, 8))
    with recording():
        disk = _apply(chain, *_on_disk(tensors).values())
    wanted = _apply(chain, *tensors.values())
    assert isinstance(disk, DiskTensor)
    assert (disk.shape, disk.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(replay(disk.expression, tensors.__getitem__), wanted)
    if disk.boxes is not None:
        assert torch.equal(_gathered(disk, tensors), wanted)


@given(chain=chains())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_pieces_are_the_bytes_of_the_tensor(chain: list[tuple[str, int, int]], tmp_path_factory: Any) -> None:
    tensors = _tensors((6, 8), (6, 8))
    folder: Path = tmp_path_factory.mktemp("pieces")
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    with recording():
        disk = _apply(chain, *_on_disk(tensors).values())
    assert isinstance(disk, DiskTensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(addresses, "SHORTEST_RUN", 1)
        pieces = addresses.pieces_of(disk, checkpoint) if disk.boxes is not None else None
    if pieces is None:
        return
    file = np.fromfile(folder / "model.safetensors", dtype=np.uint8)
    stored = np.concatenate([file[p.extent.offset : p.extent.offset + p.extent.length] for p in pieces])
    assert [p.at for p in pieces] == list(np.cumsum([0, *(p.extent.length for p in pieces)]))[:-1]
    as_stored = [("as it is" if name == "cast" else name, dim, n) for name, dim, n in chain]
    wanted = _apply(as_stored, *tensors.values())
    assert stored.tobytes() == wanted.contiguous().numpy().tobytes()


def test_a_recording_reaches_other_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    disk = _on_disk(_tensors((4, 6)))["a"]
    with recording(), ThreadPoolExecutor(1) as pool:
        assert isinstance(pool.submit(lambda: disk[1:].contiguous()).result(), DiskTensor)
