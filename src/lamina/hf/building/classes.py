"""Which class a checkpoint's model has: the one that it names, else the one that transformers maps its config to."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from lamina.errors import UnsupportedError
from lamina.hf.internals import silent

FAILS = (("Llama4ForConditionalGeneration", "5.24"),)
"""Classes of which every pass fails, and in which minor version of transformers."""

TASKS = (  # of a config whose checkpoint names no class that transformers has, in this order
    "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq", "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering", "AutoModelForMaskedLM", "AutoModelForCTC", "AutoModelForAudioClassification",
    "AutoModel",
)  # fmt: skip


def model_class(
    config: PreTrainedConfig, trust_remote_code: bool = False, code_revision: str | None = None
) -> type[PreTrainedModel]:
    """The class of a config.

    Args:
        config: as the checkpoint has it; `architectures` names the class.
        trust_remote_code: take the class from code that the checkpoint brings.
        code_revision: of that code.

    Raises:
        UnsupportedError: transformers has none, or it needs a package that is not there.
        ValueError: the config cannot be used, as transformers says it.
    """
    remote = dict(getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    try:
        if not remote and (named := _named(config)) is not None:
            return named
        return _mapped(config, remote, code_revision)
    except ImportError as error:
        text = " ".join(str(error).split())
        raise UnsupportedError(f"{config.model_type} needs a package that is not installed: {text[:300]}") from error


def _named(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that a config names, if it is one of transformers for such a config."""
    names = config.architectures
    name = names[0] if isinstance(names, list | tuple) and names else None
    found: Any = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not inspect.isclass(found) or not issubclass(found, PreTrainedModel) or _fails(found.__name__):
        return None
    kind: Any = found
    kinds = {*type(config).__mro__, *(config.sub_configs or {}).values()} - {PreTrainedConfig, object}
    whole = kind.forward is not torch.nn.Module.forward
    return kind if whole and kind.config_class in kinds else None


def _fails(name: str) -> bool:
    """Whether every pass of a class fails in the installed transformers."""
    return any(name == kind and transformers.__version__.startswith(version) for kind, version in FAILS)


def text_alone(model: PreTrainedModel, tensors: Iterable[str]) -> str | None:
    """What a user has to know where the text model stands for one with images, whose class fails; else None.

    Args:
        model: as it was built.
        tensors: names of the checkpoint's tensors.
    """
    for kind, version in FAILS:
        stands = type(model).__name__ == kind.replace("ForConditionalGeneration", "ForCausalLM")
        if _fails(kind) and stands and any("vision_model." in name for name in tensors):
            return f"every pass of {kind} fails in transformers {version}: the text model is loaded, without images"
    return None


def _mapped(config: PreTrainedConfig, remote: dict[str, Any], code_revision: str | None) -> type[PreTrainedModel]:
    """The class of the first task that transformers, or the checkpoint's own code, has one for."""
    own = sorted(
        (task for task in remote if task.startswith("AutoModel")), key=lambda task: _rank(config, remote, task)
    )
    code = {"code_revision": code_revision} if code_revision and remote else {}
    for task in dict.fromkeys((*own, *TASKS)):
        kind: Any = getattr(transformers, task, None)
        if kind is None:
            continue
        try:
            with torch.device("meta"), silent():
                return type(kind.from_config(config, trust_remote_code=bool(remote), **code))
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
    raise UnsupportedError(f"transformers {transformers.__version__} has no model for {config.model_type}")


def _rank(config: PreTrainedConfig, remote: dict[str, Any], task: str) -> tuple[bool, int]:
    """Before others what gives the class that the config names, then in the order of `TASKS`."""
    names = [str(name) for name in config.architectures or ()] if isinstance(config.architectures, list) else []
    value = remote[task]
    classes = [str(each).rpartition(".")[2] for each in (value if isinstance(value, list | tuple) else [value])]
    return not set(classes) & set(names), TASKS.index(task) if task in TASKS else len(TASKS)
