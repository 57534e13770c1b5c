"""Two models mean the same by a token, or a draft is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config

from lamina.errors import RequestError
from lamina.speculative.vocabulary import check_same_tokens

WORDS = {word: i for i, word in enumerate(["<s>", "</s>", *(f"w{i}" for i in range(18))])}


def described(
    folder: Path, vocabulary: dict[str, int] | None, added: dict[str, int] | None = None, size: int = 20
) -> Any:
    """As much of a described model as is looked at: its folder, with a tokenizer or without, and its config."""
    folder.mkdir()
    if vocabulary is not None:
        extra = [{"content": token, "id": number, "special": True} for token, number in (added or {}).items()]
        content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": extra}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    request = SimpleNamespace(gguf=None, folder=str(folder), options={}, trust_remote_code=False)
    return SimpleNamespace(request=request, model=SimpleNamespace(config=LlamaConfig(vocab_size=size)))


def refusal(target: Any, draft: Any) -> str:
    with pytest.raises(RequestError) as caught:
        check_same_tokens(target, draft, "small/model")
    text = str(caught.value)
    assert "\n" not in text
    assert "small/model" in text
    return text


@pytest.fixture
def target(tmp_path: Path) -> Any:
    return described(tmp_path / "target", WORDS)


def test_the_same(tmp_path: Path, target: Any) -> None:
    check_same_tokens(target, described(tmp_path / "draft", dict(reversed(WORDS.items()))), "small/model")


def test_one_may_have_special_tokens_that_the_other_lacks(tmp_path: Path, target: Any) -> None:
    more = described(tmp_path / "draft", WORDS, {"<tool>": 20, "</tool>": 21}, size=32)
    check_same_tokens(target, more, "small/model")
    check_same_tokens(more, target, "small/model")


def test_special_tokens_may_be_in_the_vocabulary_or_beside_it(tmp_path: Path, target: Any) -> None:
    rest = {token: number for token, number in WORDS.items() if number > 1}
    with_special = described(tmp_path / "draft", rest, {"<s>": 0, "</s>": 1})
    check_same_tokens(target, with_special, "small/model")


def test_padded_tables_do_not_matter(tmp_path: Path, target: Any) -> None:
    check_same_tokens(target, described(tmp_path / "draft", WORDS, size=64), "small/model")


def test_another_vocabulary(tmp_path: Path, target: Any) -> None:
    text = refusal(target, described(tmp_path / "draft", {f"x{i}": i for i in range(20)}))
    assert "token 0 is 'x0' there and '<s>' here" in text
    assert "20 and 20 of them, 0 alike" in text
    assert "'self' or 'lookup'" in text


def test_the_same_words_with_other_numbers(tmp_path: Path, target: Any) -> None:
    swapped = WORDS | {"w3": WORDS["w4"], "w4": WORDS["w3"]}
    assert "is 'w4' there and 'w3' here" in refusal(target, described(tmp_path / "draft", swapped))


def test_one_number_with_two_meanings(tmp_path: Path, target: Any) -> None:
    """A special token in the place of a word: the draft would propose it for that word."""
    changed = {token: number for token, number in WORDS.items() if token != "w17"}
    assert "token 19 is '<tool>'" in refusal(target, described(tmp_path / "draft", changed, {"<tool>": 19}))


def test_a_word_with_a_number_that_nobody_else_has(tmp_path: Path, target: Any) -> None:
    """The draft would propose a number that the model knows nothing of."""
    assert "19 alike" in refusal(target, described(tmp_path / "draft", WORDS | {"w3": 30}, size=32))


def test_too_few_of_them(tmp_path: Path, target: Any) -> None:
    few = {token: number for token, number in WORDS.items() if number < 12}
    assert "12 and 20 of them, 12 alike" in refusal(target, described(tmp_path / "draft", few))


def test_no_tokenizer_on_either_side(tmp_path: Path) -> None:
    target = described(tmp_path / "target", None)
    check_same_tokens(target, described(tmp_path / "same", None), "small/model")
    assert "has 24 tokens and the model 20" in refusal(target, described(tmp_path / "other", None, size=24))


def test_a_tokenizer_on_one_side_only(tmp_path: Path, target: Any) -> None:
    bare = described(tmp_path / "bare", None)
    assert f"no tokenizer in {tmp_path / 'bare'}" in refusal(target, bare)
    assert f"no tokenizer in {tmp_path / 'bare'}" in refusal(bare, target)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": null}', '{"model": {"type": "WordLevel"}}'])
def test_a_damaged_tokenizer_is_none(tmp_path: Path, target: Any, content: str) -> None:
    draft = described(tmp_path / "draft", None)
    (tmp_path / "draft" / "tokenizer.json").write_text(content)
    assert "no tokenizer" in refusal(target, draft)


def test_a_vocabulary_as_a_list_of_words_and_scores(tmp_path: Path, target: Any) -> None:
    """Unigram tokenizers write theirs so: a token's number is its place, not its score."""
    draft = described(tmp_path / "draft", None)
    words = [[word, 0.0] for word in WORDS]
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": words, "byte_fallback": False}
    empty = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"))
    whole = {"version": "1.0", "model": unigram, "added_tokens": [], **empty}
    (tmp_path / "draft" / "tokenizer.json").write_text(json.dumps(whole))
    (tmp_path / "draft" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    check_same_tokens(target, draft, "small/model")


def test_a_subfolder_is_looked_into(tmp_path: Path, target: Any) -> None:
    draft = described(tmp_path / "draft", {"other": 0})
    below = described(tmp_path / "draft" / "below", WORDS)
    below.request.folder, below.request.options = draft.request.folder, {"subfolder": "below"}
    check_same_tokens(target, below, "small/model")


def test_a_tokenizer_of_nothing_but_special_tokens_is_none(tmp_path: Path, target: Any) -> None:
    """Which transformers makes for some families where a folder has none: two of them would always be alike."""
    bare = [described(tmp_path / f"bare{size}", None, size=size) for size in (20, 24)]
    for each in bare:
        Qwen2Config(vocab_size=20).save_pretrained(each.request.folder)
    assert "has 24 tokens and the model 20" in refusal(*bare)
    assert "no tokenizer" in refusal(target, bare[0])
