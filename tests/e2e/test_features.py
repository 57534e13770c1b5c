"""What people do with a transformers model, done with a streamed one: the same calls, the same results."""

from __future__ import annotations

import gc
import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
)

from helpers.families import tiny_model, write_tiny
from helpers.judge import minimum_of, plain_model, streamed_model
from helpers.tiny import BYTES, letters, write_llama
from lamina import (
    AutoModel,
    BudgetError,
    CheckpointError,
    ClosedError,
    LaminaError,
    MissingTensorError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
)

pytestmark = pytest.mark.usefixtures("steadily")

VOCABULARY = 320
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
IDS = torch.tensor([[5, 99, 23, 77, 5, 99, 23, 77, 5, 99]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a chat template."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = letters(["<pad>", "<s>", "</s>", *BYTES], chat_template=TEMPLATE, **special)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    folder = tmp_path_factory.mktemp("llama")
    return write_llama(folder, spread=0.2, tokenizer=tokenizer, vocab_size=VOCABULARY, **ends)


@pytest.fixture(scope="module")
def plain(folder: Path) -> PreTrainedModel:
    return plain_model(folder)


@pytest.fixture(scope="module", params=["minimum", "resident"])
def model(request: pytest.FixtureRequest, folder: Path) -> Iterator[PreTrainedModel]:
    minimum = minimum_of(folder)
    streamed = streamed_model(folder, minimum if request.param == "minimum" else 2 * minimum)
    assert streamed.lamina.plan.streams is (request.param == "minimum")
    with streamed.lamina:
        yield streamed


@pytest.fixture
def streamed(folder: Path) -> Iterator[PreTrainedModel]:
    """A fresh one that streams."""
    fresh = streamed_model(folder, minimum_of(folder))
    with fresh.lamina:
        yield fresh


@contextmanager
def _opened(path: Path, **options: Any) -> Iterator[PreTrainedModel]:
    model = AutoModel.from_pretrained(str(path), device="cpu", **options)
    with model.lamina:
        yield model


def _same(model: PreTrainedModel, plain: PreTrainedModel, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
    torch.manual_seed(7)
    wanted = plain.generate(ids, **options)
    torch.manual_seed(7)
    got = model.generate(ids, **options)
    assert torch.equal(got, wanted)
    return got


# -- the five lines


def test_code_written_for_airllm_runs_with_another_import(folder: Path, plain: PreTrainedModel) -> None:
    model = AutoModel.from_pretrained(str(folder))
    input_text = ["What is the capital of United States?"]
    input_tokens = model.tokenizer(
        input_text, return_tensors="pt", return_attention_mask=False, truncation=True, max_length=128, padding=False
    )
    generation_output = model.generate(
        input_tokens["input_ids"], max_new_tokens=20, use_cache=True, return_dict_in_generate=True
    )
    output = model.tokenizer.decode(generation_output.sequences[0])
    assert output.startswith("What is the capital of United States?")
    wanted = plain.generate(input_tokens["input_ids"], max_new_tokens=20)
    assert torch.equal(generation_output.sequences, wanted)


def test_airllms_arguments_are_taken(folder: Path) -> None:
    options = {"prefetching": False, "profiling_mode": True, "hf_token": "none"}
    with _opened(folder, **options) as model:
        assert model.lamina.stats.passes == 0


def test_max_seq_len_is_ignored_with_a_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match="max_seq_len has no meaning here and is ignored"):
        AutoModel.from_pretrained(str(folder), device="cpu", max_seq_len=512).lamina.close()


# -- generation


def test_greedy(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    _same(model, plain)


def test_text_streamer(model: PreTrainedModel, plain: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = model.generate(
        IDS, max_new_tokens=8, do_sample=False, pad_token_id=0, streamer=TextStreamer(model.tokenizer)
    )
    printed = capsys.readouterr().out
    assert printed.strip("\n") == model.tokenizer.decode(tokens[0]).strip("\n")


def test_sampling_with_a_seed(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    sampled = _same(model, plain, do_sample=True, temperature=1.5, top_k=50, top_p=0.95)
    assert not torch.equal(sampled, _same(model, plain))


def test_beams(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    _same(model, plain, num_beams=3, num_return_sequences=2)


def test_a_batch_with_left_padding(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    tokenizer = model.tokenizer
    tokenizer.padding_side = "left"
    batch = tokenizer(["one", "a longer line"], return_tensors="pt", padding=True)
    _same(model, plain, batch["input_ids"], attention_mask=batch["attention_mask"])


def test_a_plain_assistant(model: PreTrainedModel, plain: PreTrainedModel, folder: Path) -> None:
    _same(model, plain, assistant_model=plain_model(folder))


def test_prompt_lookup(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    _same(model, plain, prompt_lookup_num_tokens=3)


def test_a_static_cache(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    _same(model, plain, cache_implementation="static", disable_compile=True)


def test_stopping_criteria(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    class After(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= IDS.shape[1] + 3)

    assert _same(model, plain, stopping_criteria=StoppingCriteriaList([After()])).shape[1] == IDS.shape[1] + 3


def test_scores_and_hidden_states_of_generate(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    got, wanted = model.generate(IDS, **options), plain.generate(IDS, **options)
    for name in ("scores", "logits"):
        assert all(torch.equal(a, b) for a, b in zip(got[name], wanted[name], strict=True))
    for step, expected in zip(got.hidden_states, wanted.hidden_states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, expected, strict=True))


def test_continuous_batching(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    prompts = [[5, 99, 23, 77], [11, 12, 13], [200, 100, 50, 25, 12, 6]]
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1)
    room = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    before = model.lamina.stats.passes
    got, wanted = (
        {tuple(result.prompt_ids): result.generated_tokens for result in each.generate_batch(
            prompts, config, continuous_batching_config=room).values()}
        for each in (model, plain)
    )  # fmt: skip
    assert got == wanted
    assert len(got) == 3
    assert 0 < model.lamina.stats.passes - before < 15  # the prompts share passes


def test_pipeline(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    texts = []
    for each in (model, plain):
        generator = pipeline("text-generation", model=each, tokenizer=model.tokenizer)
        texts.append(generator("Hello", max_new_tokens=6, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1]
    assert texts[0].startswith("Hello")


def test_a_chat_template(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    ids = model.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    assert model.tokenizer.decode(ids[0]) == "<user>Hi\n<a>"
    _same(model, plain, ids)


# -- forward


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_forward_under_any_mode(mode: Any, model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with mode():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_forward_in_training_mode(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    model.train()
    try:
        assert model.training
        assert torch.equal(model(IDS).logits, plain(IDS).logits)  # a Llama has no dropout
    finally:
        assert not model.eval().training


def test_hidden_states_and_attentions(folder: Path, model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with torch.no_grad():
        got, wanted = model(IDS, output_hidden_states=True), plain(IDS, output_hidden_states=True)
    assert len(got.hidden_states) == 5
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True))


def test_attentions_with_eager_attention(folder: Path) -> None:
    plain = plain_model(folder, attn_implementation="eager")
    minimum = minimum_of(folder, attn_implementation="eager")
    with _opened(folder, memory=minimum, context=64, attn_implementation="eager") as model, torch.no_grad():
        got, wanted = model(IDS, output_attentions=True), plain(IDS, output_attentions=True)
    assert len(got.attentions) == 4
    assert all(torch.equal(a, b) for a, b in zip(got.attentions, wanted.attentions, strict=True))


def test_the_loss(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with torch.no_grad():
        assert torch.equal(model(IDS, labels=IDS).loss, plain(IDS, labels=IDS).loss)


# -- it is a transformers model


def test_it_is_the_models_own_class(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    assert isinstance(model, LlamaForCausalLM)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(model), name) == getattr(LlamaForCausalLM, name)
    assert type(model).config_class is LlamaForCausalLM.config_class
    assert inspect.signature(type(model).forward) == inspect.signature(LlamaForCausalLM.forward)
    assert (model.device, model.dtype) == (plain.device, plain.dtype)
    assert model.num_parameters() == plain.num_parameters()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert model.get_memory_footprint() == plain.get_memory_footprint()
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert str(model) == str(plain)


def test_every_weight_has_its_values_when_it_is_touched(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    wanted = plain.state_dict()
    got = model.state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name] + 0, tensor), name
    assert torch.equal(model.lm_head.weight[5], plain.lm_head.weight[5])
    assert torch.equal(model.lm_head.weight[-1], plain.lm_head.weight[-1])
    assert torch.equal(model.lm_head.weight[2:4, ::2], plain.lm_head.weight[2:4, ::2])
    assert torch.equal(model.get_input_embeddings().weight.mean(), plain.get_input_embeddings().weight.mean())
    assert torch.equal(model.get_input_embeddings()(IDS), plain.get_input_embeddings()(IDS))
    layer = model.model.layers[1].mlp
    x = torch.ones(1, 64)
    assert torch.equal(layer(x), plain.model.layers[1].mlp(x))
    with pytest.raises(IndexError):
        model.lm_head.weight[VOCABULARY]


# -- model.lamina


def test_what_lamina_tells(streamed: PreTrainedModel) -> None:
    with streamed.lamina as lamina:
        assert lamina is streamed.lamina
        assert lamina.model is streamed
        streamed.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
        stats, plan = lamina.stats, lamina.plan
        assert (stats.passes, stats.new_tokens, stats.tokens_per_pass) == (5, 5, 1.0)
        assert stats.bytes_read > 4 * plan.bytes_read_per_pass
        assert stats.seconds_per_token > 0
        assert stats.seconds_waiting_for_disk >= 0
        assert stats.peak_rss_bytes > 0
        assert stats.memory_budget_bytes == plan.budget.memory_bytes
        assert stats.resident_bytes == plan.resident_bytes < plan.model_bytes


def test_a_model_is_a_context_manager_that_closes_its_stream(folder: Path, plain: PreTrainedModel) -> None:
    with streamed_model(folder, minimum_of(folder)) as model:
        assert isinstance(model, LlamaForCausalLM) and model.lamina.plan.streams
        _same(model, plain)
    with pytest.raises(ClosedError):
        model(IDS)
    with pytest.raises(ZeroDivisionError), streamed_model(folder, minimum_of(folder)) as model:
        raise ZeroDivisionError
    assert "closed" in repr(model.lamina)
    assert not hasattr(LlamaForCausalLM, "__enter__"), "transformers' own class was changed"


def test_what_lamina_tells_is_read_at_a_glance(streamed: PreTrainedModel, folder: Path) -> None:
    streamed.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    lamina = streamed.lamina
    for told in (lamina.plan, lamina.stats, lamina):
        assert repr(told) == str(told) and len(repr(told).splitlines()) <= 8
        assert all(len(line) <= 200 for line in repr(told).splitlines())
    assert repr(lamina).startswith(f"LlamaForCausalLM from {folder}, on cpu, 3 passes so far\nPlan: memory budget ")
    assert (
        "resident" in repr(lamina) and "streamed: " in repr(lamina) and "3 passes, 3 new tokens" in repr(lamina.stats)
    )


def test_new_tokens_of_a_batch(streamed: PreTrainedModel) -> None:
    ids = IDS.repeat(3, 1)
    streamed.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert streamed.lamina.stats.new_tokens == 12
    assert streamed.lamina.stats.passes == 4


def test_what_a_batching_manager_gives_is_counted(folder: Path, plain: PreTrainedModel) -> None:
    """Requests that are given to transformers' manager directly, as a server does."""
    model = streamed_model(folder, minimum_of(folder), draft=None)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.lamina:
        manager = model.init_continuous_batching(config)
        manager.start()
        try:
            for i, prompt in enumerate(([5, 9, 23], [7, 8, 9, 10, 11], [3, 4])):
                manager.add_request(prompt, request_id=f"r{i}", max_new_tokens=5)
            answers = [manager.get_result(f"r{i}", timeout=60).generated_tokens for i in range(3)]
        finally:
            manager.stop(block=True)
        stats = model.lamina.stats
    assert [len(answer) for answer in answers] == [5, 5, 5]
    assert stats.new_tokens == 15
    assert stats.passes >= 5 and stats.tokens_per_pass == stats.new_tokens / stats.passes
    assert stats.bytes_read > stats.bytes_read_per_pass and stats.seconds_in_passes > 0


def test_the_model_under_the_head_makes_passes_too(folder: Path, plain: PreTrainedModel) -> None:
    model = streamed_model(folder, minimum_of(folder), draft=None)
    with model.lamina, torch.no_grad():
        ids = torch.arange(3, 9)[None]
        for passes in (1, 2):
            found = model.base_model(ids).last_hidden_state
            assert torch.equal(found, plain.base_model(ids).last_hidden_state)
            assert model.lamina.stats.passes == passes
        assert model.lamina.stats.seconds_in_passes > 0 and model.lamina.stats.seconds_waiting_for_disk >= 0
        model(ids)
        assert model.lamina.stats.passes == 3, "a pass of the whole model is one"


def test_a_closed_model_says_so(folder: Path) -> None:
    model = streamed_model(folder, minimum_of(folder))
    model.lamina.close()
    model.lamina.close()
    with pytest.raises(ClosedError):
        model.generate(IDS, max_new_tokens=2, pad_token_id=0)


def test_a_resident_model_outlives_its_stream(folder: Path, plain: PreTrainedModel) -> None:
    model = streamed_model(folder, 2 * minimum_of(folder))
    model.lamina.close()
    _same(model, plain)


def test_two_models_at_once(folder: Path, plain: PreTrainedModel, streamed: PreTrainedModel) -> None:
    with _opened(folder, memory=minimum_of(folder), context=64) as other:
        _same(streamed, plain)
        _same(other, plain)
        _same(streamed, plain)


# -- errors, each one line


def _error(kind: type[LaminaError], folder: Path | str, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        AutoModel.from_pretrained(str(folder), **{"device": "cpu", **options})
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_wrong_requests(folder: Path) -> None:
    assert "lots" in _error(RequestError, folder, memory="lots")
    assert "no_such_device" in _error(RequestError, folder, device="no_such_device")
    assert "needs at least" in _error(BudgetError, folder, memory="1MB")
    _error(RequestError, folder, memory=-1)
    with pytest.raises(RequestError, match="from_pretrained"):
        AutoModel()


def test_no_such_folder(tmp_path: Path) -> None:
    _error(ModelNotFoundError, tmp_path / "absent")


def test_a_config_and_no_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    _error(LaminaError, tmp_path)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def _configure(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_weights_and_no_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    _error(CheckpointError, copy)


def test_an_unknown_model_type(copy: Path) -> None:
    _configure(copy, model_type="not_a_model")
    assert "not_a_model" in _error(UnsupportedError, copy)


def test_a_quantised_checkpoint(copy: Path) -> None:
    _configure(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "gptq" in _error(CheckpointError, copy)
    _configure(copy, quantization_config={"quant_method": "spqr"})
    assert "spqr" in _error(UnsupportedError, copy)


def test_code_of_the_checkpoint_is_not_run(copy: Path) -> None:
    _configure(copy, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (copy / "own.py").write_text("raise SystemExit('ran')\n")
    assert "trust_remote_code=True" in _error(RequestError, copy)


def test_code_of_the_checkpoint_is_not_needed_for_a_known_model(copy: Path) -> None:
    _configure(copy, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    with _opened(copy) as model:
        assert isinstance(model, LlamaForCausalLM)


def test_a_model_of_another_kind(copy: Path) -> None:
    _configure(copy, model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert "or of another model" in _error(CheckpointError, copy)


def test_a_config_that_no_model_has(copy: Path) -> None:
    _configure(copy, model_type="timm_wrapper", architectures=["LlamaForCausalLM"])
    assert "\n" not in _error(UnsupportedError, copy)


def test_a_missing_tensor(copy: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "model.layers.2.mlp.up_proj.weight" in _error(MissingTensorError, copy)


def test_a_tensor_of_another_shape(copy: Path) -> None:
    _configure(copy, intermediate_size=128)
    assert "has shape" in _error(MissingTensorError, copy)


def test_no_tokenizer(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    with _opened(tmp_path) as model:
        with pytest.raises(RequestError, match=r"no (usable )?tokenizer"):
            model.tokenizer("text")
        assert model.generate(IDS, max_new_tokens=2, pad_token_id=0).shape[1] == IDS.shape[1] + 2


def test_a_single_file(folder: Path, plain: PreTrainedModel) -> None:
    with _opened(folder / "model.safetensors") as model:
        _same(model, plain)


def test_a_model_that_was_dropped_closes_its_stream(folder: Path) -> None:
    model = streamed_model(folder, minimum_of(folder))
    readers = model.lamina._engine.readers
    del model
    gc.collect()
    assert readers.closed


def test_bert_is_told_apart(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    with _opened(tmp_path) as model:
        assert type(model).__name__ == "BertLMHeadModel"


def test_the_handle_alone_keeps_its_model(folder: Path) -> None:
    with AutoModel.from_pretrained(str(folder), device="cpu", context=64).lamina as lamina:
        ids = torch.tensor([[3, 4, 5]])
        out = lamina.model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 3
