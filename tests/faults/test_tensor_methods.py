"""No method of a tensor may end the process, or give something else than torch gives, where a weight has no memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from helpers.families import write_tiny
from helpers.judge import CONTEXT, minimum_of, streamed_model
from lamina import AutoModel, LaminaError, StorageError

pytestmark = pytest.mark.usefixtures("steadily")

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny("llama", folder, tie=False)
    return folder


@pytest.fixture
def model(folder: Path) -> Iterator[PreTrainedModel]:
    streamed = streamed_model(folder, minimum_of(folder, draft=None), draft=None)
    with streamed.lamina:
        yield streamed


def calls(rounds: int, *kinds: str) -> None:
    found = subprocess.run(
        [sys.executable, str(TESTS / "faults/tensor_methods.py"), str(rounds), *kinds],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent / "src"), str(TESTS)))},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert found.returncode == 0, f"ended with {found.returncode} at {found.stderr.splitlines()[-1:]}"
    assert not found.stdout, found.stdout[:4000]


def test_every_method_of_a_tensor_on_weights_without_memory() -> None:
    calls(0, "disk", "blocks", "packed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["disk", "blocks", "packed"])
def test_every_method_with_many_arguments(kind: str) -> None:
    calls(40, kind)


def test_sharing_a_streamed_model_is_refused_in_one_line(model: PreTrainedModel, tmp_path: Path) -> None:
    weight = model.lm_head.weight
    for share in (
        model.share_memory,
        model.cpu().share_memory,
        model.model.layers[0].share_memory,
        weight.share_memory_,
        weight.data.share_memory_,
        weight.data_ptr,
        weight.untyped_storage,
        weight[3].storage,
        lambda: save_file(dict(model.state_dict()), tmp_path / "x"),
    ):
        with pytest.raises(StorageError) as caught:
            share()
        assert "\n" not in str(caught.value) and isinstance(caught.value, NotImplementedError)
    assert not weight.is_shared()
    assert torch.equal(torch.from_numpy(weight.detach().numpy()), weight.clone())


def test_a_model_that_is_all_in_memory_is_shared(folder: Path) -> None:
    model = AutoModel.from_pretrained(str(folder), device="cpu", context=CONTEXT, draft=None)
    with model.lamina, torch.no_grad():
        before = model(torch.tensor([[5, 6]])).logits
        assert model.share_memory() is model
        assert model.lm_head.weight.is_shared()
        assert torch.equal(model(torch.tensor([[5, 6]])).logits, before)


def test_sending_a_model_to_another_process_is_refused(model: PreTrainedModel) -> None:
    from multiprocessing.reduction import ForkingPickler

    for sent in (model, model.lm_head.weight, [model.state_dict()]):
        with pytest.raises(LaminaError):
            ForkingPickler.dumps(sent)
