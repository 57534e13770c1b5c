"""An in-memory double of `lamina.api` for the command line: a byte is a token, and the answer is known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lamina.errors import RequestError


@dataclass(frozen=True)
class Stats:
    passes: int = 3
    bytes_read: int = 3_000_000
    new_tokens: int = 3
    tokens_per_pass: float = 1.0
    seconds_per_token: float = 0.5
    seconds_waiting_for_disk: float = 0.25
    peak_rss_bytes: int = 612_000_000
    memory_budget_bytes: int = 640_000_000
    resident_bytes: int = 1_000_000
    bytes_read_per_pass: int = 1_000_000
    read_bytes_per_second: float = float("nan")
    pass_bytes_done: int = 500_000
    pass_bytes_expected: int = 1_000_000
    in_pass: bool = True


class NoTokenizer:
    """Says that there is none when it is first used, not before."""

    def __getattr__(self, name: str) -> Any:
        raise RequestError("m has no tokenizer")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise RequestError("m has no tokenizer")


class Inputs(dict[str, Any]):
    def to(self, device: str) -> Inputs:
        assert device == "cpu"
        return self


class Tokenizer:
    def __init__(self, chat_template: str | None = "{{ messages }}") -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, return_tensors: str) -> Inputs:
        assert return_tensors == "pt"
        return Inputs(input_ids=np.array([list(text.encode())]))

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> Inputs:
        return self("|".join(f"{m['role']}:{m['content']}" for m in messages), return_tensors="pt")


class Processor:
    """Puts a picture's size beside the text: what a model that sees is given."""

    image_token = "<image>"
    image_processor = "one"

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template
        self.tokenizer = Tokenizer(chat_template)

    def __call__(self, *, text: str, images: list[Any] | None = None, return_tensors: str) -> Inputs:
        inputs = self.tokenizer(text, return_tensors=return_tensors)
        if images:
            inputs["pixel_values"] = [list(image.size) for image in images]
        return inputs

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> Inputs:
        parts = [(m["role"], part) for m in messages for part in m["content"]]
        images = [part["image"] for _, part in parts if part["type"] == "image"]
        text = "|".join(f"{role}:{part.get('text', self.image_token)}" for role, part in parts)
        return self(text=text, images=images, return_tensors="pt")


class Stream:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.stats = Stats()
        self.plan = {
            "memory_budget_bytes": 640_000_000,
            "model_bytes": 269_000_000,
            "resident_bytes": 1_000_000,
            "bytes_read_per_pass": 268_000_000,
            "predicted_seconds_per_token": 0.25,
        }
        self.closed = False

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


@dataclass
class Model:
    answer: str = " Paris."
    tokenizer: Any = field(default_factory=Tokenizer)
    processor: Any = None
    before_token: Callable[[int], None] = lambda index: None
    device: str = "cpu"
    prompts: list[str] = field(default_factory=list)
    generate_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lamina = Stream(self)

    def generate(self, *, input_ids: Any, streamer: Any, max_new_tokens: int, **kwargs: Any) -> None:
        self.generate_kwargs = {"max_new_tokens": max_new_tokens, **kwargs}
        self.prompts.append(bytes(input_ids[0].tolist()).decode())
        streamer.put(input_ids)
        for index, token in enumerate(self.answer.encode()[:max_new_tokens]):
            self.before_token(index)
            streamer.put(np.array([token]))
            if any(stop(input_ids, None) for stop in kwargs["stopping_criteria"] or []):
                break
        streamer.end()


class Seeing(Model):
    """A model with eyes."""

    def forward(self, input_ids: Any, pixel_values: Any = None) -> None: ...


PROFILE = {
    "steps": 3,
    "seconds_per_step": 0.5,
    "profiled_seconds_per_step": 0.6,
    "seconds": {
        "waiting_for_disk": 0.4,
        "decoding": 0.0,
        "copying": 0.0,
        "computing": 0.09,
        "lamina_python": 0.002,
        "model_python": 0.005,
        "between_passes": 0.003,
    },
    "shares": {
        "waiting_for_disk": 0.8,
        "decoding": 0.0,
        "copying": 0.0,
        "computing": 0.18,
        "lamina_python": 0.004,
        "model_python": 0.01,
        "between_passes": 0.006,
    },
    "python_seconds_per_pass": 0.007,
    "python_share_of_pass": 0.0141,
    "lamina_python_by_call": {"pump": 0.001, "finish": 0.0005, "acquire": 0.0003, "hook": 0.0002},
    "disk": {
        "busy_share": 0.98,
        "reads_in_flight": 7.5,
        "bytes_per_second_busy": 1.5e9,
        "bytes_per_step": 735_000_000,
        "idle_seconds": 0.01,
        "idle_ring_full_seconds": 0.008,
    },
    "trace": {"file": "/t/trace.json", "bytes": 2_000_000, "operations_dropped": 5, "dropped_below_seconds": 2e-6},
}


@dataclass
class Library:
    """Stands for the module `lamina.api`: `opened` holds what each call was given."""

    model: Model = field(default_factory=Model)
    error: BaseException | None = None
    opened: list[dict[str, Any]] = field(default_factory=list)

    @property
    def AutoModel(self) -> Library:
        return self

    def from_pretrained(self, model: str, *, progress: Any, **kwargs: Any) -> Model:
        self._called(model=model, **kwargs)
        progress("load", 1, 2)
        return self.model

    def plan_model(self, model: str, *, progress: Any = None, **kwargs: Any) -> dict[str, Any]:
        self._called(model=model, **kwargs)
        return {"model_bytes": 269_000_000, "minimum_memory_bytes": 400_000_000, "units": 30, "kv_cache_bytes": 1}

    def bench_model(self, model: str, *, progress: Any = None, **kwargs: Any) -> dict[str, Any]:
        self._called(model=model, **kwargs)
        result = {"seconds_per_token": 0.5, "disk_fraction": 0.97, "read_bytes_per_second": 1.2e9, "tokens": [1, 2]}
        return {**result, "profile": PROFILE} if kwargs.get("profile") else result

    def _called(self, **kwargs: Any) -> None:
        self.opened.append(kwargs)
        print("a library prints to stdout")
        if self.error is not None:
            raise self.error
