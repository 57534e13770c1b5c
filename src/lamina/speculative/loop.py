"""One generation: draft, verify in one pass, keep what the target would have said by itself.

After a pass over k drafted tokens the target's own choice is made at every position in turn, with the processors,
criteria and random numbers that plain decoding would use there; the first choice that differs from the draft ends it.
So every token that comes out is the target's, a streamer and the stopping criteria see one token at a time, and an end
(a stop string, the end of the text, the longest length) inside a draft is an end.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lamina.hf import internals
from lamina.hf.decoding import custom_generate
from lamina.hf.decoding.exact_rows import one_row
from lamina.hf.names import GenerationConfig, LogitsProcessorList, StaticCache, StoppingCriteriaList
from lamina.runtime.stats import SpeculationStats
from lamina.speculative.draft import Draft, Proposal
from lamina.speculative.draft_length import DraftLength
from lamina.speculative.sampling import Greedy, Preview, Sampled, choice_for

MOST_EVER = 1 << 30  # tokens of a draft


class Speculation:
    """Decodes with a draft: what is given to `generate` as `custom_generate`.

    Args:
        draft: proposes.
        draft_length: says how many tokens to draft.
        stats: what happened, for the statistics.
        exact: verify with the kernels of one row: the same bits as one token a pass.
        streamer: of the call.
        turn: held while a draft computes. A draft beside a pass of another thread would have each of torch's products
            wait for a core that the other one has, which takes many times as long as one after the other.
    """

    def __init__(
        self,
        draft: Draft,
        draft_length: DraftLength,
        stats: SpeculationStats,
        exact: bool = False,
        streamer: Any = None,
        turn: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.draft, self.draft_length, self.stats, self.exact, self.streamer = (
            draft,
            draft_length,
            stats,
            exact,
            streamer,
        )
        self.turn = turn or nullcontext()

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """See `transformers.GenerationMixin.generate`."""
        why = why_not_here(input_ids, kwargs)
        if why is not None:
            self.stats.off(why)
            return internals.sample(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=self.streamer,
                **kwargs,
            )
        text = Text(input_ids, logits_processor, stopping_criteria, generation_config, self.streamer)
        try:
            return self._decode(model, text, generation_config, kwargs)
        finally:
            text.choice.close()

    def _decode(self, model: Any, text: Text, config: GenerationConfig, kwargs: dict[str, Any]) -> Any:
        outputs = internals.prefill(model, text.ids, config, kwargs)
        kwargs = internals.advance(model, outputs, kwargs, 1)
        text.take(outputs.logits[:, -1:])
        cache = internals.cache_of(outputs)
        del outputs
        why = why_not_back(model, cache)
        if why is None and not text.done:
            internals.record_past(cache)
            with self.turn:
                began = time.perf_counter()
                why = self.draft.begin(text.tokens[:-1], cache)
                self.stats.began(time.perf_counter() - began)
        if why is not None:
            self.stats.off(why)
        while not text.done:
            kwargs = self._cycle(model, text, kwargs, drafting=why is None)
        return text.result(internals.cache_of(kwargs))

    def _cycle(self, model: Any, text: Text, kwargs: dict[str, Any], drafting: bool) -> dict[str, Any]:
        """Draft, verify, keep; the cache holds all but the last token before and after."""
        began = time.perf_counter()
        proposal, drafting_seconds = self._propose(text) if drafting else (Proposal(), 0.0)
        drafted = time.perf_counter()
        tokens = proposal.tokens
        ids = text.ids
        if tokens:
            ids = torch.cat([ids, ids.new_tensor([tokens])], dim=-1)
        rows = len(tokens) + 1
        mode: AbstractContextManager[None] = nullcontext()
        if self.exact and rows > 1:
            mode = one_row(rows, text.ids.device)
        with mode:
            outputs = custom_generate.verify(model, ids, rows, kwargs)
        ended = time.perf_counter()
        kept, accepted = text.follow(tokens, outputs.logits[:, -rows:])
        if drafting:
            internals.crop(internals.cache_of(outputs), rows - kept)
        kwargs = internals.advance(model, outputs, kwargs, kept)
        if drafting:
            # a text that ends within a draft says nothing of the rest of it
            confidence = proposal.confidence[:accepted] if text.done and accepted == kept else proposal.confidence
            self.draft_length.saw(confidence, accepted, drafting_seconds, ended - drafted)
        self.stats.cycle(len(tokens), accepted, kept, drafted - began, ended - began)
        return kwargs

    def _propose(self, text: Text) -> tuple[Proposal, float]:
        """What is to be verified, and the seconds it took; none where the draft was paused or had nothing to say."""
        most = min(self.draft_length.begins(), text.room - 1)
        if most < 1:
            self.stats.paused += 1
            return Proposal(), 0.0
        pick = Preview(text.processors, text.choice, text.ids, text.vocabulary)
        with self.turn:
            began = time.perf_counter()
            proposal = self.draft.propose(text.tokens, most, self.draft_length.go_on, pick)
            seconds = time.perf_counter() - began if proposal.tokens else 0.0
        self.draft_length.times.saw_draft(len(proposal.tokens), seconds)
        end = next((i + 1 for i, token in enumerate(proposal.tokens) if token in text.ends), MOST_EVER)
        count = min(self.draft_length.worth(proposal.confidence), end)  # what follows the end of a text is not wanted
        if not proposal.tokens:
            self.stats.silent += 1
        elif not count:
            self.stats.paused += 1
        return Proposal(proposal.tokens[:count], proposal.confidence[:count]), seconds


class Text:
    """The text as it grows: what is chosen next, and when it is done.

    Attributes:
        ids: shape (1, tokens); `tokens` the same as a list.
        done: the last token was the last one.
        vocabulary: scores that the model gives for a token.
        ends: tokens that end a text.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any,
    ) -> None:
        self.ids, self.tokens = ids, ids[0].tolist()
        self.processors, self.criteria, self.streamer = processors, criteria, streamer
        self.choice: Greedy | Sampled = choice_for(bool(config.do_sample), ids)
        self.done = False
        self.vocabulary = 0
        self.ends = internals.end_tokens(config)
        self._longest = int(config.max_length)
        self._as_dict = bool(config.return_dict_in_generate)
        self._scores: list[torch.Tensor] | None = [] if self._as_dict and config.output_scores else None
        self._logits: list[torch.Tensor] | None = [] if self._as_dict and config.output_logits else None

    @property
    def room(self) -> int:
        """Tokens until the longest length."""
        return self._longest - self.ids.shape[1]

    def take(self, logits: torch.Tensor) -> int:
        """Choose the next token from logits of shape (1, 1, vocabulary)."""
        self.vocabulary = logits.shape[-1]
        raw = logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self.processors(self.ids, raw)
        if self._scores is not None:
            self._scores.append(scores)
        if self._logits is not None:
            self._logits.append(raw)
        chosen = self.choice.take(scores)
        self.ids = torch.cat([self.ids, chosen[:, None]], dim=-1)
        self.tokens.append(int(chosen))
        if self.streamer is not None:
            self.streamer.put(chosen.cpu())
        scored = None if self._scores is None else tuple(self._scores)
        self.done = bool(self.criteria(self.ids, scored).all())
        return int(self.tokens[-1])

    def follow(self, draft: list[int], logits: torch.Tensor) -> tuple[int, int]:
        """Choose tokens as long as the draft is right, and the one after.

        Args:
            logits: shape (1, len(draft) + 1, vocabulary).

        Returns:
            How many tokens came, and how many of the draft's were right.
        """
        for i, guess in enumerate(draft):
            token = self.take(logits[:, i : i + 1])
            if token != guess:
                return i + 1, i
            if self.done:
                return i + 1, i + 1
        self.take(logits[:, -1:])
        return len(draft) + 1, len(draft)

    def result(self, cache: Any) -> Any:
        """What `generate` gives."""
        if self.streamer is not None:
            self.streamer.end()
        if not self._as_dict:
            return self.ids
        scores = None if self._scores is None else tuple(self._scores)
        logits = None if self._logits is None else tuple(self._logits)
        return internals.generated(self.ids, scores, logits, cache)


def why_not_here(ids: torch.Tensor, kwargs: dict[str, Any]) -> str | None:
    """Why this call decodes one token a pass."""
    if ids.dim() != 2 or ids.shape[0] != 1:
        return "several sequences at once share a pass already"
    if ids.shape[1] == 0 or kwargs.get("inputs_embeds") is not None:
        return "the prompt is embeddings, not tokens"
    if isinstance(internals.cache_of(kwargs), StaticCache):
        return "a static cache cannot forget what was not accepted"
    if internals.cache_of(kwargs) is None:
        return "this family keeps no cache that can forget what was not accepted"
    return None


def why_not_back(model: Any, cache: Any) -> str | None:
    """Why a draft cannot be verified, or what a pass added to a cache not taken back; known once a pass was made."""
    if internals.takes_one_token(model):
        return "this family takes one token beside its cache"
    if internals.is_stateful(model) or not internals.can_crop(cache):
        return "this family keeps a state that cannot forget what was not accepted"
    return None
