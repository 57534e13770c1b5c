"""A model built on tensors that are on disk, and the inside of transformers that this stands on."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, MixtralForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from helpers.families import tiny_config, write_tiny
from lamina import MissingTensorError, RequestError, UnsupportedError
from lamina.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from lamina.checkpoint.extent import DTYPE_BITS, Extent
from lamina.hf.building.build import Request, build
from lamina.tensors.disk import TORCH_DTYPES, DiskTensor, torch_dtype


def _built(folder: Path, **options: Any) -> PreTrainedModel:
    return build(Request(str(folder), options), open_checkpoint(str(folder)))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    write_tiny("mixtral", folder)
    return folder


def test_every_weight_is_on_disk_and_nothing_is_read(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(mixtral))
    (mixtral / "model.safetensors").rename(mixtral / "away")
    try:
        model = build(Request(str(mixtral), {}), checkpoint)
    finally:
        (mixtral / "away").rename(mixtral / "model.safetensors")
    assert type(model) is MixtralForCausalLM
    assert all(isinstance(parameter, DiskTensor) for parameter in model.parameters())
    assert not model.training


def test_merged_experts_know_their_boxes(mixtral: Path) -> None:
    merged = _built(mixtral).model.layers[0].mlp.experts.gate_up_proj
    assert isinstance(merged, DiskTensor)
    boxes = {box.source.split(".experts.")[1]: box.start for box in merged.boxes or ()}
    rows = {"w1": 0, "w3": 96}
    assert boxes == {f"{i}.{name}.weight": (i, row, 0) for i in range(4) for name, row in rows.items()}


def test_buffers_that_no_checkpoint_holds_are_real(mixtral: Path) -> None:
    buffers = dict(_built(mixtral).named_buffers())
    assert buffers
    assert not any(isinstance(buffer, DiskTensor) or buffer.is_meta for buffer in buffers.values())


def test_tied_weights_are_one(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, tie=True)
    model = _built(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_experts_are_taken_one_at_a_time_unless_somebody_chose(mixtral: Path) -> None:
    assert _built(mixtral).config._experts_implementation == "eager"
    assert _built(mixtral, experts_implementation="batched_mm").config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("word", [{"dtype": "auto"}, {"torch_dtype": "auto"}, {}, {"dtype": None}], ids=str)
def test_the_stored_dtype_is_the_default(word: dict[str, Any], tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, dtype=torch.bfloat16)
    assert _built(tmp_path, **word).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "word", [{"dtype": "float16"}, {"torch_dtype": torch.float16}, {"dtype": torch.float16}], ids=str
)
def test_a_dtype_may_be_asked_for(word: dict[str, Any], tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    model = _built(tmp_path, **word)
    assert model.dtype == torch.float16
    assert {parameter.cast_from for parameter in model.parameters()} == {torch.float32}


def test_the_config_takes_options(mixtral: Path) -> None:
    assert _built(mixtral, attn_implementation="eager").config._attn_implementation == "eager"
    assert _built(mixtral, num_experts_per_tok=1).config.num_experts_per_tok == 1


def test_an_option_that_nobody_knows_is_refused_in_one_line(mixtral: Path) -> None:
    with pytest.raises(RequestError, match=r"MixtralForCausalLM knows this option: .*no_such_option") as caught:
        _built(mixtral, no_such_option=1)
    assert "\n" not in str(caught.value)


def test_transformers_is_quiet_while_it_builds_and_as_before_after(
    mixtral: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers_logging.set_verbosity(logging.INFO)
    transformers_logging.enable_progress_bar()
    try:
        _built(mixtral)
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
    assert capsys.readouterr().out == ""


def test_a_layer_more_than_the_checkpoint_has(mixtral: Path) -> None:
    config = json.loads((mixtral / "config.json").read_text())
    with pytest.raises(RequestError, match=r"num_hidden_layers.*model\.layers\.4\.\S+ and \d+ more, which no file of"):
        _built(mixtral, num_hidden_layers=5)
    try:
        (mixtral / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
        with pytest.raises(MissingTensorError, match=r"model\.layers\.4\.\S+ and \d+ more, which no file of"):
            _built(mixtral)
    finally:
        (mixtral / "config.json").write_text(json.dumps(config))


def test_every_stored_dtype_has_torchs() -> None:
    assert {name for name in DTYPE_BITS if DTYPE_BITS[name] % 8 == 0} == set(TORCH_DTYPES)
    assert all(8 * dtype.itemsize == DTYPE_BITS[name] for name, dtype in TORCH_DTYPES.items())
    with pytest.raises(UnsupportedError, match="F4"):
        torch_dtype(TensorEntry("x", "F4", (2,), Extent("file", 0, 1)))


# -- what we stand on: when transformers moves one of these, the message says which


def test_transformers_from_pretrained_takes_a_state_dict_without_a_folder() -> None:
    wanted = {"pretrained_model_name_or_path", "config", "ignore_mismatched_sizes"}
    have = set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    assert wanted <= have, f"build() calls PreTrainedModel.from_pretrained with {wanted - have}, which is gone"
    config = tiny_config("llama")
    state = LlamaForCausalLM(config).state_dict()
    model, info = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert {"missing_keys", "mismatched_keys"} <= set(info), f"build() reads these of the loading info, got {set(info)}"


def test_transformers_lets_a_tensor_subclass_through_its_loader(mixtral: Path) -> None:
    kinds = {type(parameter).__name__ for parameter in _built(mixtral).parameters()}
    assert kinds == {"DiskTensor"}, f"from_pretrained(state_dict=DiskTensors) gave parameters of {kinds}"


def test_transformers_has_one_registry_of_experts_functions() -> None:
    moe = pytest.importorskip(
        "transformers.integrations.moe", reason="experts.py imports ALL_EXPERTS_FUNCTIONS from it"
    )
    assert hasattr(moe, "ALL_EXPERTS_FUNCTIONS"), "experts.py registers its stand-in in ALL_EXPERTS_FUNCTIONS"
    assert hasattr(moe.ALL_EXPERTS_FUNCTIONS, "register"), "ALL_EXPERTS_FUNCTIONS has no register()"
    for name in ("set_experts_implementation", "get_experts_implementation"):
        assert hasattr(PreTrainedModel, name), f"build() calls PreTrainedModel.{name}, which is gone"
    assert hasattr(tiny_config("mixtral"), "_experts_implementation"), (
        "standing_in() sets config._experts_implementation"
    )


def test_transformers_makes_a_cache_from_a_config() -> None:
    assert "config" in inspect.signature(DynamicCache).parameters, "trace() calls DynamicCache(config=...)"


def test_torch_makes_wrapper_subclasses_with_strides() -> None:
    tensor = DiskTensor(torch.empty(4, 6, device="meta").T, None, None)  # type: ignore[arg-type]
    assert (tensor.shape, tensor.stride()) == ((6, 4), (1, 6)), (
        "DiskTensor needs Tensor._make_wrapper_subclass(strides=)"
    )


def test_a_checkpoint_is_asked_for_names_only() -> None:
    assert {"tensors", "root"} <= set(Checkpoint.__dataclass_fields__)
