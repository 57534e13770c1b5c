"""Configs, generation configs and tokenizers from strangers: each loads, or is refused in one line; none hangs."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import lamina
from helpers.families import tiny_config, write_tiny
from lamina import CheckpointError, LaminaError, RequestError
from lamina.checkpoint import open_checkpoint
from lamina.hf import config
from lamina.hf.building.build import Request, build
from lamina.hf.config import check_generation, read_json
from lamina.hf.tokenizer import load_tokenizer
from lamina.hf.trace import trace

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("config_worker.py")
FEW = ("llama", "mixtral", "phi3")
MANY = """llama qwen2 qwen3_moe mixtral gemma3_text phi3 mamba mamba2 deepseek_v2 deepseek_v3 gpt2 qwen3_next falcon
    gpt_oss jamba cohere bloom opt olmoe glm4 dbrx falcon_h1 minimax granitemoe stablelm llama4_text""".split()
DEADLINE = 180  # seconds for one case, which takes about one: only a hang ends there
MOST_BYTES = 1_000_000_000  # resident, of the whole process


# -- fuzzing, in another process, because what is looked for is a hang or an exit


def _cases(folder: Path, kind: str, seed: int, count: int, families: list[str]) -> Iterator[dict[str, Any]]:
    """What became of each case, by a worker that is started again where it ends too early."""
    end = seed + count
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    while seed < end:
        arguments = [str(WORKER), str(folder), kind, str(seed), str(end - seed), *families]
        worker = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_hand_on, args=(worker, lines), daemon=True).start()
        case: dict[str, Any] = {"seed": seed, "case": "the start"}
        try:
            while line := lines.get(timeout=DEADLINE):
                case |= json.loads(line)
                if "kind" in case:
                    yield case
                    case = {"seed": case["seed"] + 1, "case": "the next"}
            if case["seed"] < end:
                yield {**case, "kind": "died", "said": f"exit {worker.wait()}"}
        except queue.Empty:
            yield {**case, "kind": "hung", "said": f"nothing for {DEADLINE} s"}
        finally:
            worker.kill()
            worker.wait()
        seed = case["seed"] + 1


def _hand_on(worker: Any, lines: queue.Queue[str]) -> None:
    for line in worker.stdout:
        lines.put(line)
    lines.put("")


def _judge(cases: Iterator[dict[str, Any]], count: int, most_bytes: int = MOST_BYTES) -> None:
    found = list(cases)
    bad = [
        f"seed {case['seed']} ({case['case']}): {case['kind']} {case['said']}"
        for case in found
        if case["kind"] not in ("fine", "refused") or "\n" in case["said"]
    ]
    assert not bad, "\n".join(bad)
    assert len(found) == count
    assert Counter(case["kind"] for case in found)["refused"] > count / 5  # the mutations are worth something
    assert max(case["peak"] for case in found) < most_bytes


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for family in FEW:
        write_tiny(family, folder / family)
    return folder


def _write_tokenizer(folder: Path) -> None:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    text = ["hello world, a text for a little tokenizer", "the world says hello"]
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)


def test_mutated_configs(few: Path) -> None:
    _judge(_cases(few, "config", 0, 30, list(FEW)), 30)


def test_mutated_tokenizers(tmp_path: Path) -> None:
    _write_tokenizer(tmp_path / "bpe")
    _judge(_cases(tmp_path, "tokenizer", 0, 60, ["bpe"]), 60)


@pytest.mark.slow
def test_a_thousand_mutated_configs(tmp_path: Path) -> None:
    for family in MANY:
        write_tiny(family, tmp_path / family)
    _judge(_cases(tmp_path, "config", 10_000, 1000, MANY), 1000)


@pytest.mark.slow
def test_two_hundred_mutated_tokenizers(tmp_path: Path) -> None:
    _write_tokenizer(tmp_path / "bpe")
    _judge(_cases(tmp_path, "tokenizer", 10_000, 200, ["bpe"]), 200)


# -- the faults that were met, one by one


def _with(few: Path, folder: Path, family: str, changes: dict[str, Any] | str) -> Path:
    """A checkpoint of a family whose config says something else, or is another text."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").symlink_to(few / family / "model.safetensors")
    text = changes
    if not isinstance(text, str):
        text = json.dumps(json.loads((few / family / "config.json").read_text()) | text)
    (folder / "config.json").write_text(text)
    return folder


def _build(folder: Path) -> Any:
    return build(Request(str(folder), {}), open_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("family", "changes", "wanted"),
    [
        ("llama", {"rms_norm_eps": "x"}, "rms_norm_eps"),
        ("llama", {"num_hidden_layers": "4"}, "num_hidden_layers"),
        ("llama", {"vocab_size": -1}, "vocab_size = -1"),
        ("llama", {"hidden_size": -64}, "hidden_size = -64"),
        ("llama", {"text_config": []}, "fails"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder = True, but LlamaForCausalLM has no encoder"),
        ("llama", {"num_hidden_layers": 200_000}, "num_hidden_layers = 200000, the checkpoint has"),
        ("llama", {"num_hidden_layers": 50_000}, "modules, the checkpoint has"),
        ("llama", {"num_labels": 10**9}, "num_labels = 1000000000, the checkpoint has"),
        ("llama", {"num_attention_heads": 7}, "fails"),
        ("llama", {"quantization_config": "x"}, "quantization_config"),
        ("mixtral", {"num_local_experts": 10**8}, "num_local_experts"),
        ("mixtral", {"hidden_size": 2**62}, "hidden_size"),
        ("mixtral", {"pad_token_id": 384}, "Padding_idx must be within"),
        ("mixtral", {"vocab_size": 10**9}, "config and weights are of different models"),
        ("phi3", {"num_key_value_heads": 0}, "num_key_value_heads = 0"),
        ("phi3", {"intermediate_size": 10**8}, "config and weights are of different models"),
        ("llama", "[" * 200_000, "nested too deeply"),
        ("llama", '{"model_type": "llama"', "is not JSON"),
        ("llama", "[]", "holds a JSON list"),
        ("llama", "", "is empty"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_cannot_be_is_refused_and_named(
    family: str, changes: Any, wanted: str, few: Path, tmp_path: Path
) -> None:
    folder = _with(few, tmp_path / "m", family, changes)
    with pytest.raises(CheckpointError, match=wanted) as caught:
        lamina.plan_model(str(folder), memory="2GB", device="cpu", context=16, draft=None)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_the_first_exception_is_kept(few: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        _build(_with(few, tmp_path / "m", "llama", {"hidden_size": -64}))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_is_no_fault_of_a_config_passes_through(
    error: type[BaseException], few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("lamina.hf.building.build.model_class", fail)
    with pytest.raises(error):
        _build(few / "llama")


def test_nan_and_infinity_are_numbers_and_the_last_of_two_keys_counts(few: Path, tmp_path: Path) -> None:
    text = (few / "llama" / "config.json").read_text().rstrip().removesuffix("}")
    text += ', "attention_dropout": NaN, "unknown": Infinity, "rms_norm_eps": 1.0, "rms_norm_eps": 0.5}'
    model = _build(_with(few, tmp_path / "m", "llama", text))
    assert model.config.rms_norm_eps == 0.5
    assert read_json(str(tmp_path / "m" / "config.json"))["unknown"] == float("inf")


def test_a_table_that_no_file_holds_is_bounded(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(CheckpointError, match=r"a buffer of shape \(1000000000, 2\).*that no file holds"),
        torch.device("cpu"),
    ):
        unstored = config.Unstored(0, "config.json")
        with unstored:
            torch.empty_like(torch.empty(10**9, 2, device="meta"), device="cpu")


def test_weights_that_no_file_holds_get_no_memory_before_they_are_refused(few: Path, tmp_path: Path) -> None:
    folder = _with(few, tmp_path / "m", "llama", {"vocab_size": 10**9})  # 256 GB, if transformers made them up
    with pytest.raises(CheckpointError, match="of different models"):
        _build(folder)


def test_modules_of_other_threads_do_not_count() -> None:
    made: list[Any] = []

    def build_many() -> None:
        made.append(torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(2000))))

    with config.as_many_as(0, "config.json"):
        other = threading.Thread(target=build_many)
        other.start()
        other.join()
        torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(900)))
        with pytest.raises(CheckpointError, match="asks for more than 1000 modules"):
            torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(200)))
    assert made
    torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(2000)))  # nobody counts any more


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt2", "mamba2", "qwen3_moe", "dbrx", "gemma3_text"])
def test_ordinary_configs_are_far_from_the_bounds(family: str) -> None:
    fields = json.loads(tiny_config(family).to_json_string())
    config.check_counts(fields, 0, "config.json")
    large = {"vocab_size": 262_144, "max_position_embeddings": 10_485_760, "block_size": 131_072, "rope_theta": 10**9}
    config.check_counts(fields | large, 0, "config.json")
    config.check_counts({"num_hidden_layers": 200_000}, 300_000, "config.json")


def test_a_pass_that_cannot_be_is_the_configs_fault(few: Path) -> None:
    model = _build(few / "llama")
    model.model.layers[0].self_attn.head_dim = 7
    with pytest.raises(RuntimeError, match="shape"):
        trace(model)


# -- generation configs


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "hot"},
        {"max_length": [3]},
        {"eos_token_id": ["x"]},
        {"num_beams": 10**9},
        {"do_sample": "yes"},
        {"stop_strings": 3},
        {"stop_strings": [1, 2]},
        {"prompt_lookup_num_tokens": 0},
        {"prompt_lookup_num_tokens": 10**40},
    ],
    ids=str,
)
def test_a_generation_config_of_wrong_kinds_is_refused_and_named(
    fields: dict[str, Any], few: Path, tmp_path: Path
) -> None:
    folder = _with(few, tmp_path / "m", "llama", {})
    (folder / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=f"generation_config.json: {next(iter(fields))} must be"):
        _build(folder)


@pytest.mark.compat
def test_the_generation_configs_of_transformers_are_of_right_kinds() -> None:
    from transformers import GenerationConfig

    check_generation(GenerationConfig().to_dict(), "it")
    check_generation({"eos_token_id": [1, 2], "temperature": 1, "top_k": 50.0, "early_stopping": "never"}, "it")


# -- tokenizers


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("tokenizer.json", {"version": True}, "tokenizer.json is damaged"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, "tokenizer.json is damaged"),
        ("tokenizer_config.json", {"model_max_length": []}, "tokenizer_config.json is damaged"),
        ("tokenizer_config.json", "[" * 200_000, "tokenizer_config.json is nested too deeply"),
    ],
)
def test_a_damaged_tokenizer_names_its_file(file: str, change: Any, named: str, tmp_path: Path) -> None:
    _write_tokenizer(tmp_path)
    path = tmp_path / file
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RequestError, match=named) as caught:
        load_tokenizer(str(tmp_path), False)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, LaminaError)
