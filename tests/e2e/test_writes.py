"""Writing to a streamed model does what it does in plain transformers, or is one clear error; nothing is lost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune
from transformers import AutoConfig, PreTrainedModel

import lamina.store
from helpers.families import FAMILIES, input_ids, write_tiny
from helpers.judge import CONTEXT, minimum_of, plain_model, streamed_model
from helpers.tiny import write_llama
from lamina import AutoModel, BudgetError, LaminaError, UnsupportedError

pytestmark = pytest.mark.usefixtures("steadily")

ROOM = 24_000  # bytes beside the minimum, in float32: for a few written weights of the 315 kB of a tiny llama
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writes")
    write_tiny("llama", folder, dtype=request.param)
    return folder


def streamed(folder: Path, room: int = ROOM, **options: Any) -> PreTrainedModel:
    """At the minimum and `room` bytes more, or half as many where a number has two bytes instead of four."""
    share = 1 if plain_dtype(folder) == torch.float32 else 2
    model = streamed_model(folder, minimum_of(folder, **options) + room // share, draft=None, **options)
    assert model.lamina.plan.streams
    return model


def plain_dtype(folder: Path) -> torch.dtype:
    dtype: torch.dtype = AutoConfig.from_pretrained(folder).dtype
    return dtype


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(3, 12)[None]).logits
        return out


def attention(model: Any) -> nn.Module:
    found: nn.Module = model.model.layers[0].self_attn
    return found


def ungraded(write: Callable[[Any], Any]) -> Callable[[Any], None]:
    def do(model: Any) -> None:
        with torch.no_grad():
            write(model)

    return do


def _add_to_data(model: Any) -> None:
    attention(model).q_proj.weight.data += 1.0


def _set_data(model: Any) -> None:
    weight = attention(model).q_proj.weight
    weight.data = torch.zeros_like(weight.data)


def _set_parameter(model: Any) -> None:
    weight = attention(model).q_proj.weight
    attention(model).q_proj.weight = nn.Parameter(torch.zeros(weight.shape, dtype=weight.dtype))


def _set_module(model: Any) -> None:
    torch.manual_seed(0)
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = nn.Linear(old.in_features, old.out_features, False, dtype=old.weight.dtype)


def _load_some(model: Any) -> None:
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in model.state_dict().items() if "q_proj" in name}
    model.load_state_dict(state, strict=False)


def _assign_some(model: Any) -> None:
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in model.state_dict().items() if "k_proj" in name}
    model.load_state_dict(state, strict=False, assign=True)


def _set_rows(model: Any) -> None:
    attention(model).q_proj.weight[1:3] = 0.5
    attention(model).q_proj.weight[0].fill_(2.0)
    attention(model).q_proj.weight.t()[5].zero_()


def _untie(model: Any) -> None:
    head = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(head.detach().clone() * 2)


WRITES: dict[str, Callable[[Any], Any]] = {
    "mul_": ungraded(lambda m: attention(m).q_proj.weight.mul_(2)),
    "mul_ of many layers": ungraded(lambda m: [layer.mlp.down_proj.weight.mul_(1.5) for layer in m.model.layers]),
    "mul_ twice": ungraded(lambda m: attention(m).q_proj.weight.mul_(2).div_(3)),
    "add_": ungraded(lambda m: attention(m).q_proj.weight.add_(0.25)),
    "data.mul_": lambda m: attention(m).q_proj.weight.data.mul_(2),
    "data +=": _add_to_data,
    "data =": _set_data,
    "copy_": ungraded(lambda m: attention(m).q_proj.weight.copy_(torch.ones(attention(m).q_proj.weight.shape))),
    "out=": ungraded(lambda m: torch.mul(attention(m).k_proj.weight, 2, out=attention(m).k_proj.weight)),
    "rows": ungraded(_set_rows),
    "a parameter in its place": _set_parameter,
    "a module in its place": _set_module,
    "init": lambda m: nn.init.zeros_(attention(m).q_proj.weight),
    "load_state_dict": _load_some,
    "load_state_dict(assign=True)": _assign_some,
    "the head in another place": _untie,
    "layers pruned": lambda m: setattr(m.model, "layers", m.model.layers[:2]),
    "foreach": ungraded(lambda m: torch._foreach_mul_([attention(m).q_proj.weight, attention(m).v_proj.weight], 2)),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_what_it_is_in_plain_transformers(folder: Path, name: str) -> None:
    plain, model = plain_model(folder), streamed(folder, 90_000 if "head" in name or "load" in name else ROOM)
    before = logits(plain)
    for each in (plain, model):
        WRITES[name](each)
    with model.lamina:
        assert not torch.equal(logits(plain), before)
        assert torch.equal(logits(model), logits(plain))
        assert torch.equal(logits(model), logits(plain)), "the second pass"
        assert model.lamina.plan.streams, "what was not written to streams on"
        ids = torch.arange(3, 9)[None]
        asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **asked), plain.generate(ids, **asked))


def test_what_was_written_can_be_read(folder: Path) -> None:
    model = streamed(folder)
    held = attention(model).q_proj.weight  # from before
    with torch.no_grad():
        held[0].fill_(3.0)
        held.mul_(2)
    now = attention(model).q_proj.weight
    for weight in (held, now, model.state_dict()["model.layers.0.self_attn.q_proj.weight"]):
        assert (weight[0] == 6).all()
        assert weight.detach().float().numpy()[0, 0] == 6.0
    assert model.lamina.plan.budget.override_bytes == now.numel() * now.element_size()


def test_a_number_needs_no_memory(folder: Path) -> None:
    plain, model = plain_model(folder), streamed(folder, 0)
    for each in (plain, model):
        with torch.no_grad():
            for layer in each.model.layers:
                layer.mlp.down_proj.weight.div_(4)
    assert torch.equal(logits(model), logits(plain))
    assert model.lamina.plan.budget.override_bytes == 0


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many layers: what a pass holds at once is a small part of them."""
    return write_llama(
        tmp_path_factory.mktemp("deep"), hidden_size=128, intermediate_size=256, num_hidden_layers=16,
        num_key_value_heads=4,
    )  # fmt: skip


def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(deep: Path) -> None:
    model = streamed(deep, 0)
    before = logits(model)
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in model.state_dict().items() if "proj" in name}
    with pytest.raises(BudgetError, match="written to") as caught:
        model.load_state_dict(state, strict=False)
    assert caught.value.minimum_bytes > model.lamina.plan.budget.memory_bytes
    assert torch.equal(logits(model), before)
    plain = plain_model(deep)
    with pytest.raises(BudgetError, match="written to"):
        for layer in model.model.layers:
            nn.init.ones_(layer.mlp.up_proj.weight)
    written = [i for i, layer in enumerate(model.model.layers) if (layer.mlp.up_proj.weight.detach() == 1).all()]
    for i in written:
        nn.init.ones_(plain.model.layers[i].mlp.up_proj.weight)
    assert torch.equal(logits(model), logits(plain)), "what was written before the error stays written"


def test_a_resident_weight_that_was_written_to_is_never_given_up(folder: Path) -> None:
    """A longer context makes resident weights stream; one that differs from the disk must not."""
    plain = plain_model(folder)
    whole = sum(parameter.nbytes for parameter in plain.parameters())
    model = streamed_model(folder, minimum_of(folder) + whole + 50_000, draft=None)
    resident = sorted(model.lamina.plan.resident)
    for each in (plain, model):
        for name, parameter in each.named_parameters():
            if "q_proj" in name:
                parameter.data.mul_(1.5)  # torch does not count what is written through .data
    budget = model.lamina.plan.budget
    longer = budget.kv_cache_bytes + budget.memory_bytes - budget.reserved_bytes - whole * 7 // 10
    model.lamina.engine.replan(replace(budget, kv_cache_bytes=longer))
    assert len(model.lamina.plan.resident) < len(resident)
    assert torch.equal(logits(model), logits(plain))


# -- adapters


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options)
    return get_peft_model(model, config)


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter", "safe merge", "unmerged"])
def test_an_adapter_is_merged_as_in_plain_transformers(folder: Path, how: str) -> None:
    def answer(model: Any) -> torch.Tensor:
        with_adapter = adapted(model)
        if how == "merge_and_unload":
            return logits(with_adapter.merge_and_unload())
        if how == "safe merge":
            return logits(with_adapter.merge_and_unload(safe_merge=True))
        if how == "merge_adapter":
            with_adapter.merge_adapter()
            merged = logits(with_adapter)
            with_adapter.unmerge_adapter()
            return merged
        return logits(with_adapter)

    plain = plain_model(folder)
    before = logits(plain)
    wanted = answer(plain)
    assert not torch.equal(wanted, before)
    with streamed(folder, 160_000).lamina as lamina:
        assert torch.equal(answer(lamina.model), wanted)


@pytest.mark.parametrize("budget", ["minimum", "resident"])
def test_an_adapter_is_merged_into_packed_weights(folder: Path, tmp_path: Path, budget: str) -> None:
    """A store in 4 bits: what is merged into is unpacked and stays in memory, as exact as its dtype."""
    store = lamina.store.split(str(folder), to=str(tmp_path / "store"), compression="8bit").folder
    room = 160_000 if budget == "minimum" else 300_000_000
    model = streamed_model(Path(store), minimum_of(Path(store)) + room, draft=None)
    model.save_pretrained(tmp_path / "unpacked")
    plain = plain_model(tmp_path / "unpacked")
    with torch.no_grad():
        assert torch.equal(attention(model).q_proj.weight + 0, attention(plain).q_proj.weight)
    before = logits(model)
    merged = [adapted(each).merge_and_unload() for each in (model, plain)]
    written = [p for name, p in plain.named_parameters() if "q_proj" in name or "up_proj" in name]
    assert model.lamina.plan.budget.override_bytes == sum(each.nbytes for each in written)
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            ours, theirs = (getattr(attention(each), name).weight for each in merged)
            assert torch.equal(ours + 0, theirs), name
    assert not torch.equal(logits(merged[0]), before)
    ours, theirs = (logits(each).float() for each in merged)  # packed rows are multiplied in float32, rounded once
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_modules_to_save_are_copies_of_their_own(folder: Path) -> None:
    plain, model = (adapted(each, modules_to_save=["lm_head"]) for each in (plain_model(folder), streamed(folder)))
    for each in (plain, model):
        for name, parameter in each.named_parameters():
            if "modules_to_save" in name:
                assert parameter.requires_grad
                parameter.data.mul_(2)
    assert torch.equal(logits(model), logits(plain))
    assert isinstance(model, PeftModel)


# -- other sizes, other dtypes


def test_pruning_masks_what_is_read(folder: Path) -> None:
    """torch's pruning moves a parameter to another name and computes the weight anew in each call."""
    plain, model = plain_model(folder), streamed(folder)
    for each in (plain, model):
        mask = (torch.arange(64 * 64).view(64, 64) % 3 != 0).to(each.dtype)
        prune.custom_from_mask(attention(each).q_proj, "weight", mask)  # type: ignore[no-untyped-call]
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), logits(plain))
    assert set(attention(model).q_proj._parameters) == set(attention(plain).q_proj._parameters)


def test_tensors_lent_for_one_call_are_given_back(folder: Path) -> None:
    """torch.func puts tensors in the parameters' places, and the parameters back."""
    plain, model = plain_model(folder), streamed(folder)
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    lent = {name: torch.full_like(plain.get_parameter(name), 0.01).detach() for name in names}
    before, ids = logits(plain), torch.arange(3, 12)[None]
    for _ in range(2):
        with torch.no_grad():
            ours, theirs = (torch.func.functional_call(each, lent, (ids,)).logits for each in (model, plain))
        assert torch.equal(ours, theirs) and not torch.equal(ours, before)
        assert torch.equal(logits(model), before)
        assert torch.equal(model.get_parameter(names[0]) + 0, plain.get_parameter(names[0]) + 0)
        assert model.lamina.plan.budget.override_bytes == 0


def test_what_is_put_in_place_and_does_not_fit_stays_refused(deep: Path) -> None:
    model = streamed(deep, 0)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(layer.mlp.up_proj.weight.shape))
    for _ in range(2):
        with pytest.raises(BudgetError, match="written to"):
            logits(model)


def test_an_interrupt_leaves_nothing_bound_that_counts_as_written(deep: Path) -> None:
    """Wherever Ctrl-C cuts the unbinding of a weight, the next pass puts the placeholder back."""
    plain, model = plain_model(deep), streamed(deep, 600_000)
    engine = model.lamina.engine
    seen: list[torch.Tensor | None] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(module._parameters["weight"])

    cut = {each.module for each in engine.plan.items if each.block}
    name = next(each.module for each in engine.plan.items if each.module.endswith("proj") and each.module not in cut)
    module = model.get_submodule(name)
    handle = module.register_forward_hook(keep, prepend=True)
    wanted = logits(plain)
    assert torch.equal(logits(model), wanted)
    handle.remove()
    module._parameters["weight"] = seen[-1]  # as if `_unbind` had been cut off
    assert torch.equal(logits(model), wanted)
    assert model.lamina.plan.budget.override_bytes == 0


def test_a_state_dict_loaded_through_a_wrapper_fits_or_is_refused(deep: Path) -> None:
    wrapper = adapted(streamed(deep, 0))
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in wrapper.state_dict().items()}
    with pytest.raises(BudgetError, match="written to"):
        wrapper.load_state_dict(state)


def test_more_tokens(folder: Path) -> None:
    plain, model = plain_model(folder), streamed(folder, 200_000)
    for each in (plain, model):
        torch.manual_seed(0)
        each.resize_token_embeddings(264, mean_resizing=False)
    assert logits(model).shape[-1] == 264
    assert torch.equal(logits(model), logits(plain))


def test_too_many_more_tokens_are_refused(deep: Path) -> None:
    with streamed(deep, 0).lamina as lamina, pytest.raises(BudgetError, match="written to"):
        lamina.model.resize_token_embeddings(1 << 14, mean_resizing=False)


@pytest.mark.parametrize("cast", ["half", "double", "to(dtype)", "of a part"])
def test_another_dtype_is_refused_or_kept(folder: Path, cast: str) -> None:
    model = streamed(folder)
    if cast == "of a part":
        plain = plain_model(folder)
        for each in (plain, model):
            attention(each).q_proj.to(torch.float64).to(next(each.parameters()).dtype)
        assert torch.equal(logits(model), logits(plain))
        return
    change = {"half": model.half, "double": model.double, "to(dtype)": lambda: model.to(torch.float16)}[cast]
    with pytest.raises(UnsupportedError, match=r"load the model again with dtype='float(16|64)'"):
        change()


def test_what_changes_nothing_goes_through(folder: Path) -> None:
    plain, model = plain_model(folder), streamed(folder)
    for each in (plain, model):
        assert each.to("cpu") is each and each.to(each.dtype) is each and each.train().eval() is each
    assert torch.equal(logits(model), logits(plain))
    for each in (plain, model):
        each.requires_grad_(False).tie_weights()  # torch takes other kernels then, in both
    assert torch.equal(logits(model), logits(plain))


def test_a_model_that_is_all_in_memory_is_cast_within_its_budget(folder: Path) -> None:
    plain = plain_model(folder)
    model = streamed_model(folder, minimum_of(folder) + 300_000_000, draft=None)
    assert not model.lamina.plan.streams
    assert torch.equal(logits(model.double()), logits(plain.double()))
    nbytes = model.lamina.plan.resident_bytes
    tight = AutoModel.from_pretrained(str(folder), memory=minimum_of(folder) + nbytes, device="cpu", context=CONTEXT)
    if not tight.lamina.plan.streams:
        with pytest.raises(BudgetError):
            tight.double()


# -- copies and files


def test_copies_are_refused_in_one_line(folder: Path) -> None:
    model = streamed(folder)
    for copying in (copy.deepcopy, pickle.dumps, lambda m: copy.deepcopy(adapted(m))):
        with pytest.raises(LaminaError) as caught:
            copying(model)
        assert "\n" not in str(caught.value)


def test_a_part_is_copied_into_memory(folder: Path) -> None:
    plain, model = plain_model(folder), streamed(folder)
    copied = copy.deepcopy(model.model.layers[0].mlp)
    x = torch.ones(1, 3, 64, dtype=plain.dtype)
    with torch.no_grad():
        assert torch.equal(copied(x), plain.model.layers[0].mlp(x))
    assert all(isinstance(parameter, nn.Parameter) for parameter in copied.parameters())
    assert torch.equal(logits(model), logits(plain)), "the copy does not disturb the stream"


def test_torch_save_of_a_state_dict_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="save_pretrained"):
        torch.save(streamed(folder).state_dict(), tmp_path / "state.pt")


@pytest.mark.parametrize("size", ["50GB", "100KB"])
def test_a_model_is_saved_as_it_streams(folder: Path, tmp_path: Path, size: str) -> None:
    plain, model = plain_model(folder), streamed(folder)
    for each in (plain, model):
        with torch.no_grad():
            attention(each).q_proj.weight.add_(1)
            attention(each).o_proj.weight.mul_(2)
    plain.save_pretrained(tmp_path / "plain", max_shard_size=size)
    model.save_pretrained(tmp_path / "lamina", max_shard_size=size)
    assert _tensors(tmp_path / "lamina", tmp_path / "plain")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {path.name for path in (tmp_path / "lamina").iterdir()} == names
    assert torch.equal(logits(plain_model(tmp_path / "lamina")), logits(plain))


def _tensors(one: Path, other: Path) -> bool:
    found = [
        {n: t for f in sorted(each.glob("*.safetensors")) for n, t in load_file(f).items()} for each in (one, other)
    ]
    assert found[0].keys() == found[1].keys()
    return all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


MERGED = "mixtral qwen3_moe gpt_oss dbrx falcon gpt2 bamba qwen3_next granitemoe llama4_text gemma".split()


@pytest.mark.parametrize("family", MERGED)
def test_families_whose_weights_are_merged_are_taken_apart_again(family: str, tmp_path: Path) -> None:
    assert family in FAMILIES
    write_tiny(family, tmp_path / "tiny", dtype=torch.float32)
    plain_model(tmp_path / "tiny", family).save_pretrained(tmp_path / "plain")
    with streamed(tmp_path / "tiny").lamina as lamina:
        lamina.model.save_pretrained(tmp_path / "lamina")
    assert _tensors(tmp_path / "lamina", tmp_path / "plain")


def test_only_an_adapter_is_saved_by_peft(folder: Path, tmp_path: Path) -> None:
    adapted(streamed(folder)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(streamed(folder), str(tmp_path / "adapter"))
    assert torch.equal(logits(model), logits(adapted(plain_model(folder))))


# -- compiling


@pytest.mark.parametrize("how", ["torch.compile", "compile"])
def test_a_compiled_model_runs_as_it_is(folder: Path, how: str) -> None:
    plain, model = plain_model(folder), streamed(folder)
    compiled = torch.compile(model) if how == "torch.compile" else model
    if how == "compile":
        with pytest.warns(UserWarning, match=r"without torch\.compile"):
            model.compile()
    assert torch.equal(logits(compiled), logits(plain))
    ids = input_ids(plain.config)
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(compiled.generate(ids, **asked), plain.generate(ids, **asked))
