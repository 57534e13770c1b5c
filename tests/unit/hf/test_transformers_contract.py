"""What Lamina takes from inside transformers is still there, and taken in one place.

When a new version of transformers moves one of these, the test that names it fails: lamina/hf/internals.py is the file
to mend, docs/compatibility.md says how the range is moved.
"""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import RequestState
from transformers.integrations import moe
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import AttentionInterface

from helpers.families import tiny_config
from lamina.hf import internals
from lamina.hf.internals import CACHE

pytestmark = pytest.mark.compat
ROOT = Path(__file__).parents[3]
SOURCES = sorted((ROOT / "src" / "lamina").rglob("*.py"))
EDGE = ROOT / "src" / "lamina" / "hf" / "internals.py"
IDS = torch.tensor([[5, 9, 23, 17]])

# Functions that are called or replaced, with the parameters that are relied on.
FUNCTIONS: dict[str, tuple[Callable[..., Any] | None, str]] = {
    "GenerationMixin._prefill": (
        getattr(GenerationMixin, "_prefill", None),
        "input_ids generation_config model_kwargs is_first_iteration",
    ),
    "GenerationMixin._sample": (
        getattr(GenerationMixin, "_sample", None),
        "input_ids logits_processor stopping_criteria generation_config streamer model_kwargs",
    ),
    "GenerationMixin._update_model_kwargs_for_generation": (
        getattr(GenerationMixin, "_update_model_kwargs_for_generation", None),
        "outputs model_kwargs is_encoder_decoder num_new_tokens",
    ),
    "GenerationMixin._prepare_generation_config": (
        getattr(GenerationMixin, "_prepare_generation_config", None),
        "generation_config kwargs",
    ),
    "GenerationMixin.prepare_inputs_for_generation": (
        GenerationMixin.prepare_inputs_for_generation,
        f"input_ids next_sequence_length {CACHE} kwargs",
    ),
    "GenerationMixin.generate": (
        GenerationMixin.generate,
        "inputs generation_config stopping_criteria streamer custom_generate kwargs",
    ),
    "GenerationConfig.get_generation_mode": (GenerationConfig.get_generation_mode, "assistant_model"),
    "Cache.crop": (getattr(Cache, "crop", None), "tokens_to_remove"),
    "Cache.activate_past_recording": (getattr(Cache, "activate_past_recording", None), ""),
    "GenerateDecoderOnlyOutput": (GenerateDecoderOnlyOutput, f"sequences scores logits {CACHE}"),
    "sdpa_attention_forward": (sdpa_attention_forward, "module query key value attention_mask kwargs"),
    "sdpa_mask": (sdpa_mask, "kwargs"),
    "PreTrainedModel.from_pretrained": (
        PreTrainedModel.from_pretrained,
        "config kwargs",
    ),
    "PreTrainedModel.save_pretrained": (
        PreTrainedModel.save_pretrained,
        "save_directory is_main_process state_dict push_to_hub max_shard_size variant save_original_format kwargs",
    ),
    "init_continuous_batching": (
        getattr(LlamaForCausalLM, "init_continuous_batching", None),
        "generation_config continuous_batching_config",
    ),
    "infer_max_single_request_tokens": (infer_max_single_request_tokens, "cache"),
    "ContinuousBatchingManager.stop": (ContinuousBatchingManager.stop, "block timeout keep_for_next_session"),
    "OutputRouter.fail_and_deliver": (OutputRouter.fail_and_deliver, "state error"),
    "RequestState": (RequestState, "initial_tokens max_new_tokens"),
    "generate_batch": (getattr(LlamaForCausalLM, "generate_batch", None), "inputs generation_config"),
}

# Names of transformers that may be written nowhere but at the edge.
INSIDE = (
    "past_key_values cache_params get_seq_length is_croppable activate_past_recording is_linear _is_stateful "
    "_experts_implementation _attn_implementation _prepare_generation_config _eos_token_tensor _prefill _sample "
    "_update_model_kwargs_for_generation prepare_inputs_for_generation logits_indices _hf_peft_config_loaded "
    "revert_weight_conversion _get_tied_weight_keys get_gguf_hf_weights_map TENSOR_PROCESSORS _new_tokens_limit "
    "_from_model_config input_queue output_router batch_processor read_cache_limit _cached_continuous_batching_manager"
).split()
# Modules of transformers whose names are in its documentation.
DOCUMENTED = {"transformers", "transformers.generation", "transformers.utils"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_there_with_its_parameters(name: str) -> None:
    found, wanted = FUNCTIONS[name]
    assert found is not None, f"transformers {transformers.__version__} has no {name} any more: see {EDGE}"
    missing = set(wanted.split()) - set(inspect.signature(found).parameters)
    assert not missing, f"{name} of transformers {transformers.__version__} takes no {sorted(missing)}: see {EDGE}"


def test_the_cache_has_one_of_the_names_that_are_known() -> None:
    assert CACHE in ("cache", "past_key_values")
    model = LlamaForCausalLM(tiny_config("llama")).eval()
    assert internals.cache_argument(model) == CACHE
    with torch.no_grad():
        out = model(IDS, **{CACHE: DynamicCache(config=model.config)}, use_cache=True)
    cache = internals.cache_of(out)
    assert isinstance(cache, DynamicCache) and internals.cached_tokens(cache) == 4
    assert internals.cache_of({CACHE: cache}) is cache and internals.cache_of({}) is None


def test_a_recurrent_family_takes_its_cache_under_a_name_that_is_known() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    name = internals.cache_argument(MambaForCausalLM(config))
    assert name in ("cache", "cache_params")


def test_a_cache_says_whether_it_can_forget() -> None:
    cache = DynamicCache()
    for attribute in ("is_croppable", "activate_past_recording", "is_linear", "get_seq_length"):
        assert hasattr(cache, attribute), f"a cache of transformers has no {attribute} any more: see {EDGE}"
    assert internals.can_crop(cache)
    cache.update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2), 0)
    assert isinstance(cache.layers[0], DynamicLayer)
    internals.crop(cache, 2)
    assert internals.cached_tokens(cache) == 3, "crop with a negative number no longer takes off from the end"
    assert not internals.convolves(cache)


def test_generation_hands_over_what_the_loop_needs() -> None:
    model = LlamaForCausalLM(tiny_config("llama")).eval()
    seen: dict[str, Any] = {}

    def look(model: Any, input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
        seen.update(given)
        return input_ids

    model.generate(IDS, max_new_tokens=3, eos_token_id=[7, 8], do_sample=True, top_k=7, custom_generate=look)
    assert isinstance(seen["logits_processor"], LogitsProcessorList)
    assert isinstance(seen["stopping_criteria"], StoppingCriteriaList)
    assert isinstance(internals.cache_of(seen), DynamicCache)
    assert internals.end_tokens(seen["generation_config"]) == {7, 8}
    assert seen["generation_config"].max_length == IDS.shape[1] + 3


def test_a_static_cache_is_told_from_others() -> None:
    config = tiny_config("llama")
    assert not isinstance(DynamicCache(config=config), StaticCache)


def test_configs_say_how_experts_and_attention_are_computed() -> None:
    config = tiny_config("mixtral")
    assert internals.experts_implementation(config) in (None, "eager", "grouped_mm", "batched_mm")
    internals.set_experts_implementation(config, "eager")
    assert internals.experts_implementation(config) == "eager"
    model = LlamaForCausalLM(tiny_config("llama"))
    assert internals.attention_implementation(model.config) == "sdpa"


def test_experts_go_through_one_registry() -> None:
    registry = moe.ALL_EXPERTS_FUNCTIONS
    assert {"register", "get_interface"} <= set(dir(registry))
    assert isinstance(internals.ALL_ATTENTION_FUNCTIONS, AttentionInterface)
    assert {"eager", "sdpa", "flash_attention_2", "flex_attention"} <= set(internals.attention_names())


def test_a_family_says_whether_it_keeps_a_state() -> None:
    assert not internals.is_stateful(LlamaForCausalLM(tiny_config("llama")))
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    assert internals.is_stateful(MambaForCausalLM(config))


def test_tied_names_and_published_names() -> None:
    config = tiny_config("gemma")
    model = transformers.GemmaForCausalLM(config)
    assert any(re.search(pattern, "lm_head.weight") for pattern in internals.tied_names(model))
    state = {"model.norm.weight": torch.zeros(1)}
    assert internals.as_published(model, state).keys() == state.keys()


# -- the one place


def _imports(path: Path) -> list[str]:
    """Modules of transformers that a file imports from."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            found.append(node.module or "")
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "transformers"]
    return found


@pytest.mark.parametrize("path", [path for path in SOURCES if path != EDGE], ids=lambda path: path.stem)
def test_nothing_else_reaches_inside(path: Path) -> None:
    undocumented = set(_imports(path)) - DOCUMENTED
    assert not undocumented, f"{path} imports from {undocumented}: only {EDGE} may"
    tree = ast.parse(path.read_text())
    words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    words |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    assert not words & set(INSIDE), f"{path} names {sorted(words & set(INSIDE))} of transformers: only {EDGE} may"


def test_the_installed_version_is_in_the_supported_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [each for each in project["dependencies"] if re.match(r"transformers\b", each)]
    assert transformers.__version__ in SpecifierSet(wanted.removeprefix("transformers")), wanted
