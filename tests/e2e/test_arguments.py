"""Every keyword of transformers' `from_pretrained` has a meaning here, or is refused in a line of its own."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import lamina
import lamina.runtime.load
from helpers.families import tiny_config, write_tiny
from helpers.tiny import words
from lamina import LaminaError, RequestError, UnsupportedError
from lamina.checkpoint import open_checkpoint
from lamina.hf.building.build import Request, build
from lamina.runtime import rates

IDS = torch.tensor([[3, 5, 9, 7, 11]])
OBEYED, SAID = "obeyed", "has no meaning here"

# keyword -> (a value, what becomes of it: OBEYED, SAID, or the words of the refusal)
TABLE: dict[str, tuple[Any, str]] = {
    "config": (tiny_config("llama"), OBEYED),
    "cache_dir": ("/nowhere", OBEYED),
    "ignore_mismatched_sizes": (True, "pass the config="),
    "force_download": (True, "delete the model in the hub's cache"),
    "local_files_only": (True, OBEYED),
    "token": ("hf_x", OBEYED),
    "revision": ("main", OBEYED),
    "use_safetensors": (False, "is read from its safetensors"),
    "weights_only": (False, OBEYED),  # safetensors have no code
    "fusion_config": ({"patch_embeddings": True}, "transformers' own modules"),
    "disable_mmap": (True, SAID),
    "state_dict": ({"x": 1}, "load_state_dict"),
    "proxies": ({"http": "x"}, "HTTPS_PROXY"),
    "tqdm_class": (object, "progress="),
    "output_loading_info": (True, OBEYED),
    "_from_pipeline": ("text-generation", OBEYED),
    "_from_auto": (True, OBEYED),
    "_commit_hash": ("0" * 40, OBEYED),
    "dtype": ("float16", OBEYED),
    "torch_dtype": (torch.bfloat16, OBEYED),
    "device_map": ("cuda:99", "cannot be used here|names no device|device says"),
    "max_memory": ({"cpu": "1GB"}, "memory="),
    "offload_folder": ("x", SAID),
    "offload_buffers": (True, SAID),
    "offload_state_dict": (True, SAID),
    "quantization_config": ({"load_in_8bit": True}, "compression="),
    "load_in_8bit": (True, "compression='8bit'"),
    "load_in_4bit": (True, "compression='4bit'"),
    "subfolder": ("gone", "there is no folder"),
    "variant": ("fp16", "no variant"),
    "adapter_kwargs": ({"revision": "x"}, "load_adapter"),
    "adapter_name": ("x", "load_adapter"),
    "generation_config": (GenerationConfig(max_new_tokens=3), OBEYED),
    "gguf_file": ("gone.gguf", "has no file"),
    "distributed_config": (object(), "one process"),
    "device_mesh": (object(), "one process"),
    "tp_plan": ("auto", "one process"),
    "tp_size": (2, "one process"),
    "trust_remote_code": (True, OBEYED),
    "code_revision": ("main", OBEYED),
    "allow_all_kernels": (True, "leave it out"),
    "use_kernels": (True, "leave it out"),
    "kernel_config": ({"x": "y"}, "leave it out"),
    "key_mapping": ({"^nothing": "else"}, OBEYED),
    "attn_implementation": ("eager", OBEYED),
    "experts_implementation": ("eager", OBEYED),
    "mirror": ("x", SAID),
    "_fast_init": (True, SAID),
    "low_cpu_mem_usage": (True, SAID),
    "from_tf": (True, SAID),
    "from_flax": (True, SAID),
    "use_auth_token": ("x", "token="),
    "max_seq_len": (512, SAID),
    "num_hidden_layers": (9, "does not fit the model"),
    "rope_theta": ("x", "does not fit the model|knows this option"),
    "hidden_size": (-64, "does not fit the model"),
    "use_cache": (False, OBEYED),
    "no_such_option": (1, "knows this option"),
}


@pytest.fixture(autouse=True)
def no_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """How quick this machine is decides nothing here."""

    def none(engine: Any, *_: Any) -> Any:
        return rates._hardware(engine.weights.schedule, {}, None, engine.device)

    monkeypatch.setattr(lamina.runtime.load, "measure", none)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny("llama", folder)
    return folder


_open: list[Any] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """What a test loads is closed when it ends."""
    yield
    while _open:
        _open.pop().lamina.close()


def _loaded(folder: Path, memory: int | str = "2GB", **options: Any) -> Any:
    options = {"device": "cpu", "context": 32, "draft": None, **options}
    given = lamina.AutoModel.from_pretrained(str(folder), memory=memory, **options)
    _open.append(given[0] if isinstance(given, tuple) else given)
    return given


def _least(folder: Path, **options: Any) -> int:
    with pytest.raises(lamina.BudgetError) as caught:
        lamina.plan_model(str(folder), memory=1, device="cpu", context=32, draft=None, **options)
    return caught.value.minimum_bytes


@pytest.mark.compat
def test_the_table_has_every_keyword_of_transformers() -> None:
    known: set[str] = set()
    for function in (PreTrainedModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        source = inspect.getsource(function)
        known |= set(re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', source))
        known |= set(re.findall(r"^            (\w+) ?\([^\n]*\*optional\*", function.__doc__ or "", re.MULTILINE))
        for listed in re.findall(r"(?:hub_kwargs_names|for name in) (?:= )?\[([^\]]*)\]", source):
            known |= set(re.findall(r'"(\w+)"', listed))
    known |= set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    known -= {"pretrained_model_name_or_path", "model_args", "kwargs", "cls"}
    assert len(known) > 30
    assert known <= set(TABLE), f"say what becomes of {sorted(known - set(TABLE))} in lamina/hf/arguments.py"


@pytest.mark.compat
@pytest.mark.parametrize("name", TABLE)
def test_each_keyword_is_obeyed_or_said(name: str, llama: Path) -> None:
    value, wanted = TABLE[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            options = {"device": "auto" if name == "device_map" else "cpu", name: value}
            lamina.plan_model(str(llama), memory="2GB", context=32, draft=None, **options)
            outcome = OBEYED
        except RequestError as error:
            outcome = str(error)
    assert (wanted if wanted != SAID else OBEYED) == outcome or re.search(wanted, outcome), outcome
    assert "\n" not in outcome
    assert [str(each.message) for each in said if name in str(each.message)] == (
        [f"{name} {SAID} and is ignored"] if wanted == SAID else []
    )


def test_a_plan_takes_every_keyword_that_loading_takes(llama: Path) -> None:
    taken = set(inspect.signature(lamina.AutoModel.from_pretrained).parameters)
    assert taken == set(inspect.signature(lamina.plan_model).parameters)
    usual = lamina.plan_model(str(llama), memory="2GB", device="cpu", draft=None)
    same = lamina.plan_model(
        str(llama), memory="2GB", device="cpu", draft=None, hf_token="x", prefetching=False, delete_original=True,
        profiling_mode=True, layer_shards_saving_path="/no/such/folder", output_loading_info=True,
    )  # fmt: skip
    assert same.minimum_memory_bytes == usual.minimum_memory_bytes
    assert sorted(file.name for file in llama.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_bench_takes_loading_info(llama: Path) -> None:
    result = lamina.api.bench_model(
        str(llama), memory="2GB", device="cpu", prompt_ids=[1, 2], new_tokens=2, output_loading_info=True
    )
    assert len(result["tokens"]) == 2


def test_a_mapping_to_one_dtype_is_that_dtype(llama: Path) -> None:
    assert _loaded(llama, dtype={"": "float16"}).dtype == torch.float16
    with pytest.raises(RequestError, match=r"dtype must be one dtype for the whole model, got .*: give one of them"):
        _loaded(llama, dtype={"text_config": "float16", "": "float32"})


def test_keywords_that_ask_for_nothing_are_no_requests(llama: Path) -> None:
    of_the_config = ("num_hidden_layers", "rope_theta", "hidden_size", "no_such_option", "use_cache")
    nothing = {name: None for name in TABLE if name not in of_the_config}
    lamina.plan_model(str(llama), memory="2GB", device="cpu", context=32, draft=None, **nothing)


def test_a_config_is_taken_in_place_of_the_folders_own(llama: Path, tmp_path: Path) -> None:
    other = tiny_config("llama")
    other.rms_norm_eps = 0.5
    other.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(llama, config=other, dtype=torch.float32)
    wanted = plain(IDS).logits
    for config in (other, tmp_path):
        model = _loaded(llama, config=config, dtype=torch.float32)
        assert torch.equal(model(IDS).logits, wanted)
        assert model.config.rms_norm_eps == 0.5
    assert other.rms_norm_eps == 0.5 and model.config is not other


def test_a_generation_config_is_taken(llama: Path, tmp_path: Path) -> None:
    GenerationConfig(max_new_tokens=3, eos_token_id=None).save_pretrained(tmp_path)
    for given in (GenerationConfig(max_new_tokens=3), str(tmp_path / "generation_config.json")):
        model = _loaded(llama, generation_config=given)
        assert model.generation_config.max_new_tokens == 3
        assert model.generate(IDS).shape[1] == IDS.shape[1] + 3


def test_loading_info_is_what_transformers_gives(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "more")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "more" / "model.safetensors"
    save_file(load_file(file) | {"nobody.wants.this": torch.zeros(2)}, file, {"format": "pt"})
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "more", output_loading_info=True)[1]
    model, info = _loaded(tmp_path / "more", output_loading_info=True)
    assert info == wanted
    assert info["unexpected_keys"] == {"nobody.wants.this"}
    assert isinstance(model, PreTrainedModel)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"config": {}}, "config must be a transformers config"),
        ({"config": "/nowhere/x"}, "neither a config nor the path of one"),
        ({"config": tiny_config("gpt2")}, "does not fit the model"),
        ({"generation_config": {}}, "generation_config must be"),
        ({"generation_config": "/nowhere/x"}, "no generation config, nor the path of one"),
        ({"dtype": "int3x"}, "is no dtype of torch"),
        ({"dtype": torch.int8}, "is not what a model computes in"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, the checkpoint has"),
        ({"attn_implementation": "nonsense"}, "attn_implementation=.nonsense. is not known"),
        ({"device_map": {"a": "cpu", "b": "disk"}}, "what lives where follows from memory="),
        ({"device_map": "meta", "device": "auto"}, "computes nothing"),
        ({"device_map": "cpu", "device": "cuda"}, "device_map says cpu, device says cuda"),
        ({"revision": 3}, "revision must be"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_the_arguments_fault(options: dict[str, Any], wanted: str, llama: Path) -> None:
    with pytest.raises(RequestError, match=wanted) as caught:
        _loaded(llama, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "placed", ["cpu", {"": "cpu"}, torch.device("cpu"), {"model": "cpu", "lm_head": "cpu"}], ids=str
)
def test_a_device_map_of_one_device_is_the_device(placed: Any, llama: Path) -> None:
    assert _loaded(llama, device="auto", device_map=placed).device.type == "cpu"


def test_pickles_and_safetensors_are_what_was_asked_for(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"use_safetensors=False, but .* is read from its safetensors"):
        _loaded(llama, use_safetensors=False)
    shutil.copy(llama / "config.json", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(llama)
    torch.save(dict(model.state_dict()), tmp_path / "pytorch_model.bin")
    assert torch.equal(_loaded(tmp_path, use_safetensors=False)(IDS).logits, model(IDS).logits)
    with pytest.raises(RequestError, match="use_safetensors=True, but"):
        _loaded(tmp_path, use_safetensors=True)
    with pytest.raises(UnsupportedError, match="would run code of the pickle"):
        _loaded(tmp_path, weights_only=False)


@pytest.mark.parametrize("model", [None, 3, "", ["x"]], ids=str)
def test_a_model_that_is_no_name(model: Any) -> None:
    with pytest.raises(RequestError, match="model must be a hub id or a path"):
        lamina.AutoModel.from_pretrained(model)


# -- inside of torch's contexts


@contextlib.contextmanager
def _half_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("context", "streams"),
    [
        (torch.inference_mode, True),
        (torch.inference_mode, False),
        (torch.no_grad, True),
        (_half_by_default, True),
        (lambda: torch.device("cpu"), False),
    ],
    ids=["inference_mode-streaming", "inference_mode", "no_grad-streaming", "default_float16-streaming", "device_cpu"],
)
def test_loading_and_running_inside_of_a_context(context: Callable[[], Any], streams: bool, llama: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(llama)
    wanted, tokens = plain(IDS).logits.detach(), plain.generate(IDS, max_new_tokens=4, do_sample=False)
    with context():
        model = _loaded(llama, _least(llama) if streams else "2GB")
        inside = model(IDS).logits
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), tokens)
    assert bool(model.lamina.plan.streams) is streams
    assert torch.equal(inside, wanted)
    assert torch.equal(model(IDS).logits, wanted)


def test_packed_weights_inside_of_inference_mode(llama: Path, tmp_path: Path) -> None:
    packed: dict[str, Any] = {"compression": "8bit", "layer_shards_saving_path": str(tmp_path)}
    with torch.inference_mode():
        resident = _loaded(llama, **packed)
        streaming = _loaded(llama, _least(Path(resident.name_or_path)), **packed)
        inside = [model(IDS).logits for model in (resident, streaming)]
    assert streaming.lamina.plan.streams and not resident.lamina.plan.streams
    wanted = _loaded(llama, **packed)(IDS).logits
    assert all(torch.equal(logits, wanted) for logits in inside)


def test_the_meta_device_is_refused_in_one_line(llama: Path) -> None:
    with torch.device("meta"), pytest.raises(RequestError, match="meta device"):
        _loaded(llama)


# -- what came with the model is named where generate fails over it


def test_a_setting_that_came_with_the_model_is_named(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "hot")
    settings = {"do_sample": True, "temperature": -1.0}
    (tmp_path / "hot" / "generation_config.json").write_text(json.dumps(settings))
    model = _loaded(tmp_path / "hot")
    with pytest.raises(LaminaError, match=r"temperature = -1\.0, which the generation config of the model in .* says"):
        model.generate(IDS, max_new_tokens=2)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] == IDS.shape[1] + 2
    with pytest.raises(ValueError, match="temperature"):
        model.generate(IDS, max_new_tokens=2, temperature=-2.0)  # the caller's own


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": -1.1},
        {"do_sample": True, "min_p": float("nan")},
        {"no_repeat_ngram_size": True},
        {"forced_eos_token_id": 200_000},
        {"do_sample": True, "top_k": True},
        {"pad_token_id": 1e300},
    ],
    ids=str,
)
@pytest.mark.parametrize("draft", [None, "lookup"])
def test_a_setting_that_no_choice_can_be_made_with_is_named(
    llama: Path, tmp_path: Path, settings: dict[str, Any], draft: str | None
) -> None:
    shutil.copytree(llama, tmp_path / "odd")
    (tmp_path / "odd" / "generation_config.json").write_text(json.dumps({"top_p": 0.9, "max_length": 7, **settings}))
    model = _loaded(tmp_path / "odd", draft=draft)
    name, value = list(settings.items())[-1]
    with pytest.raises(LaminaError, match=rf"fails over {name} = .*, which the generation config of the model in"):
        model.generate(IDS, max_new_tokens=2)
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)) as caught:
        model.generate(IDS, max_new_tokens=2, **{"do_sample": True, name: value})  # the caller's own
    assert not isinstance(caught.value, LaminaError)


@pytest.mark.compat
def test_settings_in_an_old_config_are_those_of_transformers(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
    fields = json.loads((llama / "config.json").read_text()) | {"max_length": 9, "do_sample": True, "top_k": 3}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.to_dict()
    built = build(Request(str(tmp_path), {}), open_checkpoint(tmp_path))
    assert built.generation_config.to_dict() == wanted
    assert (wanted["max_length"], wanted["top_k"]) == (9, 3)


def test_a_subfolder_has_the_config_and_the_tokenizer(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "text")
    words(["<unk>", "hello", "</s>"], "<unk>").save_pretrained(tmp_path / "text")
    model = _loaded(tmp_path, subfolder="text")
    assert torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="text")(IDS).logits)
    assert model.tokenizer("hello")["input_ids"] == [1]
