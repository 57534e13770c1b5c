"""What may go wrong while experts are read from real files, below a model and inside one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.families import input_ids, tiny_model, write_tiny
from helpers.judge import steady
from helpers.walker import watchdog
from lamina import AutoModel
from lamina.checkpoint import Fingerprint
from lamina.checkpoint.extent import Extent
from lamina.errors import BudgetError, CheckpointError, ClosedError
from lamina.plan.expert_slots import Experts
from lamina.plan.schedule import Cut, Piece, Weight
from lamina.stream.experts import ExpertStream
from lamina.stream.readers import Readers

COUNT, SIZE = 8, 50_000  # experts of a module, bytes of one


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    with watchdog(100), steady():
        yield


class Files:
    """Two modules whose experts lie in two files, and a stream over them.

    Every byte of expert e of module m is `10 * m + e + 1`.
    """

    def __init__(self, folder: Path, slots: int) -> None:
        self.paths = [folder / f"m{module}.bin" for module in range(2)]
        modules = []
        for module, path in enumerate(self.paths):
            path.write_bytes(b"head" + b"".join(bytes([10 * module + e + 1]) * SIZE for e in range(COUNT)))
            piece = Piece(Extent(str(path), 4, COUNT * SIZE), 0)
            weight = Weight(f"w{module}", (COUNT, SIZE), "uint8", 1, (piece,), 1, COUNT * SIZE, cut=Cut.EXPERTS,
                            experts=COUNT)  # fmt: skip
            modules.append(Experts(f"m{module}", (weight,), COUNT, 2))
        stats = {str(path): path.stat() for path in self.paths}
        known = {path: Fingerprint(stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}
        self.readers = Readers(3, chunk=8192, fingerprints=known)
        self.stream = ExpertStream(modules, slots, modules[0].slot_bytes, self.readers)

    def call(self, module: int, *experts: int) -> None:
        self.stream.route(f"m{module}", dict.fromkeys(experts, 1), 1)
        for expert in sorted(experts):
            self.right(module, expert)
        self.stream.leave()

    def right(self, module: int, expert: int) -> None:
        found = self.stream.acquire(f"m{module}", expert)
        (placed,) = found.layout.placed
        stored = found.memory[placed.stored_at : placed.stored_at + placed.stored_nbytes]
        assert len(stored) == SIZE and bool((stored == 10 * module + expert + 1).all())

    def all_right(self) -> None:
        for module in range(2):
            self.call(module, *range(COUNT))


@pytest.fixture(params=[1, 3, 2 * COUNT], ids="{} slots".format)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Files]:
    made = Files(tmp_path, request.param)
    yield made
    made.readers.close()


def test_a_file_that_was_cut_off_is_named_and_heals(files: Files) -> None:
    files.call(0, 0, 1)
    path = files.paths[1]
    whole, stat = path.read_bytes(), path.stat()
    os.truncate(path, 4 + 2 * SIZE + 100)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=path.name):
            files.call(1, 2, 7)
        files.call(0, 0, 5)
    path.write_bytes(whole)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    files.all_right()


def test_a_file_that_is_gone_is_an_error_until_it_is_back(files: Files) -> None:
    path = files.paths[1]
    path.rename(path.with_name("away"))
    with pytest.raises(CheckpointError, match=path.name):
        files.call(1, 2, 7)
    files.call(0, 3)
    path.with_name("away").rename(path)
    files.all_right()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("when", ["between calls", "in a call"])
def test_a_forked_child_reads_on_its_own_and_so_does_its_parent(files: Files, when: str) -> None:
    files.call(0, 0, 1, 2)
    if when == "in a call":
        files.stream.route("m1", dict.fromkeys(range(COUNT), 1), 1)
        files.right(1, 2)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if when == "in a call":
                files.right(1, 5)
            files.all_right()
            for area in files.stream._areas.values():
                area.view[:] = bytes(area.nbytes)  # the parent must not see it
            code = 0
        finally:
            os._exit(code)
    if when == "in a call":
        files.right(1, 5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    files.all_right()


def test_ctrl_c_at_any_moment_below_a_model(files: Files) -> None:
    def press(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    interrupted = 0
    try:
        for turn in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0003 + 0.00023 * turn)
                for _ in range(20):
                    files.all_right()
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            files.call(turn % 2, turn % COUNT, (turn + 3) % COUNT)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 20
    files.all_right()
    assert len(files.stream._kept) == files.stream.slots


def test_close_in_the_middle(files: Files) -> None:
    raised: list[BaseException] = []
    running = threading.Event()

    def model() -> None:
        with pytest.raises(ClosedError) as caught:
            while True:
                files.stream.shrink(1)
                files.all_right()
                running.set()
        raised.append(caught.value)

    thread = threading.Thread(target=model)
    thread.start()
    running.wait()
    files.readers.close()
    thread.join()
    assert len(raised) == 1
    with pytest.raises(ClosedError):
        files.all_right()


# -- inside a model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    write_tiny("mixtral", folder, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="module")
def plain() -> Any:
    model = tiny_model("mixtral")
    model.config._experts_implementation = "eager"
    return model


@pytest.fixture(scope="module")
def ids(plain: Any) -> torch.Tensor:
    return input_ids(plain.config)


_least = [1]


def load(folder: Path, more: int = 0) -> Any:
    """The model with the least memory that it takes, which the refusal of less says, and `more`."""
    for _ in range(3):
        try:
            model = AutoModel.from_pretrained(str(folder), memory=_least[0] + more, device="cpu", context=64)
        except BudgetError as error:
            _least[0] = error.minimum_bytes
        else:
            assert model.lamina.plan.expert_slots
            return model
    raise AssertionError("the memory that a refusal named is refused")


def tokens(model: Any, ids: torch.Tensor, **more: Any) -> list[int]:
    return model.generate(ids, max_new_tokens=6, do_sample=False, **more)[0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("more", [0, 400_000])
def test_a_damaged_shard_with_experts_is_one_clear_error_and_heals(
    written: Path, tmp_path: Path, plain: Any, ids: torch.Tensor, more: int
) -> None:
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = load(tmp_path, more)
    for shard in sorted(tmp_path.glob("*.safetensors"))[1:-1:3]:
        whole, stat = shard.read_bytes(), shard.stat()
        os.truncate(shard, stat.st_size // 2)
        with pytest.raises(CheckpointError, match=shard.name):
            tokens(model, ids)
        shard.write_bytes(whole)
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert tokens(model, ids) == tokens(plain, ids)
    model.lamina.close()


@pytest.mark.parametrize("more", [0, 400_000])
def test_ctrl_c_at_any_moment(written: Path, plain: Any, ids: torch.Tensor, more: int) -> None:
    model, wanted = load(written, more), tokens(plain, ids)

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    try:
        for turn in range(24):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.0019 * turn)
                tokens(model, ids)
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if turn % 4 == 3:
                assert tokens(model, ids) == wanted
    finally:
        signal.signal(signal.SIGALRM, before)
    assert tokens(model, ids) == wanted
    model.lamina.close()


def test_close_during_generate_is_a_closed_error(written: Path, ids: torch.Tensor) -> None:
    model = load(written)
    model.generation_config.eos_token_id = None
    running = threading.Event()
    raised: list[BaseException] = []

    class Running:
        def put(self, value: torch.Tensor) -> None:
            running.set()

        def end(self) -> None: ...

    def generate() -> None:
        with pytest.raises(ClosedError) as caught:
            while True:
                model.generate(ids, max_new_tokens=40, do_sample=False, streamer=Running())
        raised.append(caught.value)

    thread = threading.Thread(target=generate)
    thread.start()
    running.wait()
    model.lamina.close()
    thread.join()
    assert len(raised) == 1


def test_an_expert_s_weight_may_be_looked_at_from_outside(written: Path, plain: Any, ids: torch.Tensor) -> None:
    model = load(written, 400_000)
    wanted = tokens(plain, ids)
    for path in ("model.layers.1.mlp.experts", "model.layers.3.mlp.experts"):
        inside, outside = model.get_submodule(path), plain.get_submodule(path)
        assert torch.equal(inside.down_proj[2], outside.down_proj[2])
        assert torch.equal(inside.gate_up_proj[-1], outside.gate_up_proj[-1])
        assert torch.equal(inside.gate_up_proj[1:3], outside.gate_up_proj[1:3])
    assert tokens(model, ids) == wanted
    model.lamina.close()
