"""What may go wrong while a model streams: one clear error each, and a model that works again afterwards."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.families import input_ids, tiny_model, write_tiny
from helpers.walker import watchdog
from lamina import AutoModel
from lamina.errors import BudgetError, ChangedError, CheckpointError, ClosedError, LaminaError

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    with watchdog(120):
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny("llama", folder, max_shard_size="200KB")
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A checkpoint of this test's own, to be damaged."""
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def ids(plain: Any) -> torch.Tensor:
    return input_ids(plain.config)


_least = [1]


def load(folder: Path) -> Any:
    """The model with the least memory that it takes, which the refusal of less says."""
    for _ in range(3):
        try:
            model = AutoModel.from_pretrained(str(folder), memory=_least[0], device="cpu", context=64)
        except BudgetError as error:
            _least[0] = error.minimum_bytes
        else:
            assert model.lamina.plan.streams
            return model
    raise AssertionError("the memory that a refusal named is refused")


def tokens(model: Any, ids: torch.Tensor, **more: Any) -> list[int]:
    return model.generate(ids, max_new_tokens=6, do_sample=False, **more)[0].tolist()  # type: ignore[no-any-return]


def reader_threads() -> int:
    return sum(thread.name.startswith("lamina-reader") for thread in threading.enumerate())


def open_files(folder: Path) -> int:
    links = (Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link).startswith(str(folder)) for link in links)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def empty(shard: Path) -> None:
    shard.write_bytes(b"")


def replace_by_less(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "how"),
    [(cut, "in place"), (cut, "another file"), (empty, "another file"), (replace_by_less, "in place")],
)
def test_a_damaged_shard_is_one_clear_error_and_heals(damage: Callable[[Path], None], how: str, folder: Path,
                                                      plain: Any, ids: torch.Tensor) -> None:  # fmt: skip
    model = load(folder)
    assert tokens(model, ids) == tokens(plain, ids)
    shard = shards(folder)[-2]
    whole, written = shard.read_bytes(), shard.stat().st_mtime_ns
    damage(shard)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=shard.name):
            tokens(model, ids)
    healed = shard if how == "in place" else folder / "healed"
    healed.write_bytes(whole)
    os.replace(healed, shard)
    with pytest.raises(ChangedError, match="was written to"):  # who knows with what
        tokens(model, ids)
    os.utime(shard, ns=(written, written))
    assert tokens(model, ids) == tokens(plain, ids)
    model.lamina.close()


def test_other_weights_of_the_same_length_are_never_mixed_in(folder: Path, ids: torch.Tensor) -> None:
    model = load(folder)
    tokens(model, ids)
    shard = shards(folder)[-1]
    with shard.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    with pytest.raises(ChangedError, match=shard.name):
        tokens(model, ids)
    model.lamina.close()


def test_a_part_of_the_model_may_be_called_on_its_own(written: Path, plain: Any, ids: torch.Tensor) -> None:
    model = load(written)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model.model(ids).last_hidden_state, plain.model(ids).last_hidden_state)
        assert torch.equal(model(ids).logits, plain(ids).logits)
    model.lamina.close()


def test_a_shard_that_is_deleted_or_replaced_is_still_read_as_it_was(folder: Path, plain: Any,
                                                                     ids: torch.Tensor) -> None:  # fmt: skip
    """The files are open: what happens to their names changes nothing."""
    model = load(folder)
    assert tokens(model, ids) == tokens(plain, ids)
    first, second = shards(folder)[:2]
    first.unlink()
    (folder / "other").write_bytes(bytes(second.stat().st_size))
    os.replace(folder / "other", second)
    assert tokens(model, ids) == tokens(plain, ids)
    model.lamina.close()


class Interrupting:
    """A streamer whose user presses Ctrl-C."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)

    def end(self) -> None: ...


def test_ctrl_c_between_two_passes(written: Path, plain: Any, ids: torch.Tensor) -> None:
    model = load(written)
    for after in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            tokens(model, ids, streamer=Interrupting(after))
        assert tokens(model, ids) == tokens(plain, ids)
    model.lamina.close()


@pytest.mark.parametrize(
    "where", ["model.layers.0", "model.layers.2.mlp", "model.layers.3.self_attn.o_proj", "lm_head"]
)
def test_ctrl_c_within_a_pass(where: str, written: Path, plain: Any, ids: torch.Tensor) -> None:
    model = load(written)
    gradients = torch.is_grad_enabled()
    for after in (1, 3):
        left = [after]

        def press(*_: object, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)

        handle = model.get_submodule(where).register_forward_pre_hook(press)
        with pytest.raises(KeyboardInterrupt):
            tokens(model, ids)
        handle.remove()
        assert torch.is_grad_enabled() == gradients
        other = threading.Thread(target=tokens, args=(model, ids))
        other.start()
        other.join()  # no lock was left behind
        assert tokens(model, ids) == tokens(plain, ids)
    model.lamina.close()


def test_ctrl_c_at_any_moment(written: Path, plain: Any, ids: torch.Tensor) -> None:
    model = load(written)
    wanted = tokens(plain, ids)

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    interrupted = 0
    try:
        for turn in range(32):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.0011 * turn)
                tokens(model, ids)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if turn % 4 == 3:
                assert tokens(model, ids) == wanted
    finally:
        signal.signal(signal.SIGALRM, before)
    assert tokens(model, ids) == wanted
    model.lamina.close()


def test_an_error_in_the_model_s_own_code_leaves_it_usable(written: Path, plain: Any, ids: torch.Tensor) -> None:
    model = load(written)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    handle = model.get_submodule("model.layers.1.mlp.up_proj").register_forward_hook(fail)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            tokens(model, ids)
    handle.remove()
    assert tokens(model, ids) == tokens(plain, ids)
    model.lamina.close()


def test_close_during_generate_is_a_closed_error(written: Path, ids: torch.Tensor) -> None:
    model = load(written)
    model.generation_config.eos_token_id = None
    raised: list[BaseException] = []
    running = threading.Event()

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
    assert [type(error) for error in raised] == [ClosedError]
    with pytest.raises(ClosedError):
        tokens(model, ids)
    assert reader_threads() == 0 and open_files(written) == 0


def test_a_model_that_is_dropped_stops_its_threads_and_closes_its_files(written: Path, ids: torch.Tensor) -> None:
    gc.collect()
    before = reader_threads()
    model = load(written)
    tokens(model, ids)
    assert reader_threads() > before and open_files(written)
    del model
    gc.collect()
    assert reader_threads() == before and open_files(written) == 0


def test_a_model_that_is_refused_leaves_nothing(folder: Path) -> None:
    cut(shards(folder)[0])
    gc.collect()
    before = reader_threads()
    with pytest.raises(LaminaError):
        AutoModel.from_pretrained(str(folder), device="cpu", context=64)
    assert reader_threads() == before and open_files(folder) == 0


def test_two_models_take_turns(written: Path, plain: Any, ids: torch.Tensor) -> None:
    one, two = load(written), load(written)
    for _ in range(3):
        assert tokens(one, ids) == tokens(two, ids) == tokens(plain, ids)
    one.lamina.close()
    assert tokens(two, ids) == tokens(plain, ids)
    two.lamina.close()


def test_two_threads_call_the_same_model(written: Path, plain: Any, ids: torch.Tensor) -> None:
    model = load(written)
    given: list[list[int]] = []

    def work() -> None:
        for _ in range(3):
            given.append(tokens(model, ids))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert given == [tokens(plain, ids)] * 6
    model.lamina.close()


def test_a_file_system_without_direct_reads(written: Path, plain: Any, ids: torch.Tensor,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    direct = getattr(os, "O_DIRECT", 0)
    opened = os.open

    def refuse(path: str, flags: int, *rest: int, **more: Any) -> int:
        if flags & direct:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    model = load(written)
    assert tokens(model, ids) == tokens(plain, ids)
    assert not any(file.direct for file in model.lamina._engine.readers._shared.files.values())
    model.lamina.close()


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python, in a process of its own, with a loaded model at hand."""
    head = f"""
import os, sys, torch
sys.path[:0] = [{str(SOURCE)!r}, {str(SOURCE.parent / "tests")!r}]
torch.set_num_threads(1)
from lamina import AutoModel
from lamina.errors import BudgetError
try:
    AutoModel.from_pretrained({str(folder)!r}, memory=1, device="cpu", context=64)
except BudgetError as error:
    least = error.minimum_bytes
model = AutoModel.from_pretrained({str(folder)!r}, memory=least, device="cpu", context=64)
assert model.lamina.plan.streams
ids = torch.tensor([[5, 9, 11, 7]])
def tokens():
    return model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "error::ResourceWarning"}
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", head + code], capture_output=True, text=True, timeout=100,
        env=environment, check=False,
    )  # fmt: skip


def test_the_interpreter_ends_cleanly_without_close(written: Path) -> None:
    done = run("tokens()", written)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_an_exit_in_the_middle_of_a_pass_is_clean(written: Path) -> None:
    done = run("model.model.layers[1].register_forward_pre_hook(lambda *_: sys.exit(3)); tokens()", written)
    assert (done.returncode, done.stderr, done.stdout) == (3, "", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_streams_on_its_own_and_so_does_its_parent(written: Path) -> None:
    done = run("""
before = tokens()
child = os.fork()
if child == 0:
    code = 7
    try:
        code = 0 if tokens() == before else 1
    finally:
        os._exit(code)
assert tokens() == before
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert tokens() == before
""", written)  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_another_thread_is_in_a_pass_says_so_and_ends(written: Path) -> None:
    """It never hangs; its parent's pass goes on; it may load the model itself, close it and exit as usual."""
    done = run("""
import faulthandler, gc, threading
from lamina.errors import UnsupportedError

def load(memory):
    return AutoModel.from_pretrained(model.config._name_or_path, memory=memory, device="cpu", context=64)

def tokens_of(some):
    return some.generate(ids, max_new_tokens=4, do_sample=False).tolist()

for some in (model, load("2GB")):  # one that streams, one that does not
    before = tokens_of(some)
    inside, go_on = threading.Event(), threading.Event()

    def stop(*_):
        inside.set()
        go_on.wait()

    handle = some.model.layers[2].mlp.register_forward_pre_hook(stop)
    found = []
    thread = threading.Thread(target=lambda: found.append(tokens_of(some)))
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(90, exit=True)
        handle.remove()
        uses = tokens_of, lambda some: some(ids), lambda some: some.model(ids), lambda some: some.lamina.check_room(1)
        for use in uses:
            try:
                use(some)
            except UnsupportedError as error:
                assert "forked while another thread" in str(error) and "\\n" not in str(error)
            else:
                raise AssertionError("it was used")
        own = load(least)
        assert tokens_of(own) == before
        some.lamina.close()
        del model, some, own
        gc.collect()
        sys.exit(5)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    handle.remove()
    go_on.set()
    thread.join()
    assert ended == 5, ended
    assert found == [before] and tokens_of(some) == before
""", written)  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_leaves_the_model_alone_is_no_concern_of_it(written: Path) -> None:
    """Workers of a data loader and of a pool, forked while a thread generates."""
    done = run("""
import multiprocessing, threading
from torch.utils.data import DataLoader
before = tokens()
running = True
def generate():
    while running:
        assert tokens() == before
thread = threading.Thread(target=generate)
thread.start()
for _ in range(2):
    loader = DataLoader(list(range(8)), num_workers=2, multiprocessing_context="fork", timeout=60)
    assert sorted(int(each) for each in loader) == list(range(8))
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(abs, range(-4, 0)).get(60) == [4, 3, 2, 1]
running = False
thread.join()
assert tokens() == before
""", written)  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
