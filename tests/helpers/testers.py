"""Tiny checkpoints out of transformers' own tests, which have a small config and inputs for nearly every class.

A checkout of transformers is needed: its tests are no part of the package. The tests may be older or newer than what
is installed; names that they import and that are not there are stood in for. This module knows nothing of Lamina.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import types
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.testing_utils
from transformers import PreTrainedModel

MISSING = re.compile(r"cannot import name '(\w+)' from '([\w.]+)'")
MOST_MISSING = 12  # names that are stood in for, before a module of tests is given up
DEFAULTS = "_TEXT_MODEL_TESTER_DEFAULTS"


class NoTester(Exception):
    """transformers' tests have nothing to make a class with."""


def use(checkout: Path) -> None:
    """Let `made` import the tests of a checkout of transformers."""
    sys.path[:0] = [str(checkout), str(checkout / "utils")]
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[name]
    hub: Any = types.ModuleType("fetch_hub_objects_for_ci")
    hub.url_to_local_path = lambda url, *_, **__: url
    sys.modules["fetch_hub_objects_for_ci"] = hub
    utilities: Any = transformers.testing_utils
    if not hasattr(utilities, DEFAULTS):
        setattr(utilities, DEFAULTS, _defaults(checkout / "src" / "transformers" / "testing_utils.py"))


def _defaults(file: Path) -> Any:
    """The value of `DEFAULTS` in a file of the checkout; nothing where it has none."""
    for node in ast.parse(file.read_text()).body if file.exists() else ():
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == DEFAULTS for t in node.targets):
            return ast.literal_eval(node.value)
    return {}


def made(name: str, seed: int = 0) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model of a class in evaluation mode, and the tensors of one pass.

    Args:
        name: of the class, in `transformers`.

    Raises:
        NoTester: no test of the checkout makes one.
    """
    kind: Any = getattr(transformers, name, None)
    if kind is None:
        raise NoTester(f"transformers {transformers.__version__} has no {name}")
    why = "no test names it"
    for case in _cases(kind):
        try:
            case.setUp()
            tester = getattr(case, "model_tester", None)
            if tester is None or name not in [each.__name__ for each in getattr(case, "all_model_classes", None) or ()]:
                continue
            config, inputs = tester.prepare_config_and_inputs_for_common()
        except Exception as error:  # of any class: it is other people's test
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        if hasattr(case, "_prepare_for_class"):
            inputs = case._prepare_for_class(inputs, kind)
        return _model(kind, config, seed), {key: v for key, v in inputs.items() if isinstance(v, torch.Tensor)}
    raise NoTester(why)


def _cases(kind: type) -> Iterator[Any]:
    """The cases of the module of tests that a class has."""
    *_, package, module = kind.__module__.split(".")
    tests = _imported(f"tests.models.{package}.test_modeling_{module.removeprefix('modeling_')}")
    for _, case in inspect.getmembers(tests, inspect.isclass):
        if case.__module__ == tests.__name__ and issubclass(case, unittest.TestCase):
            yield case(methodName="setUp")


def _imported(name: str) -> types.ModuleType:
    """A module; what it imports of others and they lack becomes a decorator that does nothing."""
    for _ in range(MOST_MISSING):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise NoTester(f"no module {error.name}") from error
        except ImportError as error:
            lacking = MISSING.match(str(error))
            if lacking is None:
                raise
            setattr(importlib.import_module(lacking[2]), lacking[1], _decorator)
    raise NoTester(f"{name} imports more than {MOST_MISSING} names that are not there")


def _decorator(*given: Any, **_: Any) -> Any:
    return given[0] if given and callable(given[0]) else lambda function: function


@torch.no_grad()
def _model(kind: Any, config: Any, seed: int) -> PreTrainedModel:
    """Seeded; matrices that start at zero, of which nothing would show, are made random."""
    torch.manual_seed(seed)
    model: PreTrainedModel = kind(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point() and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model
