"""What runs of each family of transformers, found by running it, and docs/models.md made of what was found.

    python scripts/models_table.py --run --transformers-tests DIR   # what docs/models.jsonl lacks, then the page
    python scripts/models_table.py --run --only llava bert          # these again
    python scripts/models_table.py                                  # the page alone, of the results there are
    python scripts/models_table.py --check                          # changes nothing; 1 where the page says else

Tiny random checkpoints in float32 come from tests/helpers, and for what they lack from the tests of a checkout of
transformers (DIR holds `tests/` and `utils/`; without it such families are listed as not made). Each check is a
process of its own with a limit of time: one that dies or hangs loses its cells alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "models.jsonl", ROOT / "docs" / "models.md"
LIMIT = 120.0  # seconds of a check
CONTEXT = 1024  # tokens: those that come with transformers' tests are some hundred
MOST = 20_000_000  # numbers of a tiny model
NEW_TOKENS = 4
DRAFTED_TOKENS = 16
TASKS = (  # in this order: a class that serves two is shown with the first one
    ("image-text-to-text", "IMAGE_TEXT_TO_TEXT"), ("multimodal", "MULTIMODAL_LM"),
    ("speech-to-text", "SPEECH_SEQ_2_SEQ"), ("seq2seq", "SEQ_TO_SEQ_CAUSAL_LM"), ("causal", "CAUSAL_LM"),
    ("sequence classification", "SEQUENCE_CLASSIFICATION"), ("token classification", "TOKEN_CLASSIFICATION"),
    ("question answering", "QUESTION_ANSWERING"), ("text encoding", "TEXT_ENCODING"),
)  # fmt: skip
COLUMNS = ("text", "image", "audio", "generate", "experts", "draft", "batched", "adapters", "trained")
IMAGE = ("pixel_values", "flattened_patches", "image_")
AUDIO = ("input_features", "input_values", "audio_", "speech_")
EQUAL, NOT_ASKED, YES = "equal", "-", "yes"
MORE = "equal with more memory"
GOOD = (EQUAL, MORE, NOT_ASKED, YES, "on demand", "refused streaming, trains in memory", "trains (nothing streams)")


HEAD = """# Which models run, and what of them

Made by `scripts/models_table.py` out of `docs/models.jsonl`, where each line is what a run found. To run it again:

```bash
git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers /tmp/transformers
pip install -e '.[dev]' parameterized datasets timm librosa scipy sentencepiece   # what its tests import
python scripts/models_table.py --run --again --transformers-tests /tmp/transformers
```

Run from {first} to {last} with {versions}. Linux, two cores, no accelerator. transformers' tests were those of a 5.16
development version, the newest to be had there: `pip install` could not give tests of 5.24, which are no part of the
package.

Each line is a tiny random checkpoint of the class in float32, from `tests/helpers` or from transformers' own tests.
*Text*, *image*, *audio*: a pass with that input at the smallest budget that Lamina asks for; *generate*: four greedy
tokens, with the image or the sound where there is one. `equal`: to plain transformers, to the last bit (experts as its
`eager` computes them). *Experts*: read when they are routed to, or with their layers. *Draft*: one that is right at
four tokens of five, each of them verified, leaves the tokens as they come without one. *Batched*: `generate_batch`,
three texts. *Adapters*: `load_adapter` with a LoRA on all linears, and on experts where PEFT puts it there. *Trained*:
a backward pass is refused where weights stream, and gives plain transformers' gradients where all is in memory.
`plain fails`: plain transformers cannot do it either, with these inputs. `-`: there is no such thing, or it was not
asked for. What is not as it should be has its reason below.
"""


class Row(NamedTuple):
    """A line of the page: a family, what it is for, and the class that does it."""

    family: str
    task: str
    kind: str


Cells = dict[str, str]


def rows() -> list[Row]:
    """Every family of the mappings of `TASKS`, each class once."""
    from transformers.models.auto import modeling_auto

    found: dict[tuple[str, str], Row] = {}
    for task, mapping in TASKS:
        for family, kinds in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            kind = kinds if isinstance(kinds, str) else kinds[0]
            found.setdefault((family, kind), Row(family, task, kind))
    return list(found.values())


# -- a tiny checkpoint and its inputs


def make(row: Row, folder: Path) -> dict[str, Any]:
    """Write a checkpoint and `inputs.pt`; says where it is from, and its class."""
    import torch

    from helpers import families, multimodal, testers

    source = "tests/helpers"
    if row.kind in multimodal.CASES:
        multimodal.write_case(row.kind, folder)
        text = multimodal.text_of(row.kind)
        whole = multimodal.whole_of(row.kind) if multimodal.CASES[row.kind].more else {}
        kind = row.kind
    elif row.task == "causal" and row.family in {*families.FAMILIES, *families.MORE_FAMILIES}:
        model = families.tiny_model(row.family)
        model.save_pretrained(folder)
        text, whole, kind = {"input_ids": families.input_ids(model.config, 9)}, {}, type(model).__name__
    else:
        text, kind = {"input_ids": torch.arange(3, 12)[None]}, row.kind
        try:
            model, whole = testers.made(row.kind)
            source = "transformers' tests"
        except Exception as error:  # of any class: these tests may be of another version
            model, whole, source = _of_config(row, error), {}, "a tiny config, text alone"
        model.save_pretrained(folder)
    torch.save({"text": text, "whole": whole}, folder / "inputs.pt")
    return {"source": source, "class": kind}


def _of_config(row: Row, why: Exception) -> Any:
    """A model of a family's config with tiny sizes.

    Raises:
        Exception: `why`, where there is none, or none that is tiny.
    """
    import torch
    import transformers

    from helpers import families, testers

    try:
        kind: Any = getattr(transformers, row.kind)
        config = families.tiny_config(row.family)
        with torch.device("meta"):
            numbers = kind(config).num_parameters()
    except Exception as error:
        raise testers.NoTester(f"{line(why)}; of its config with tiny sizes: {line(error)}") from error
    if numbers > MOST:
        raise testers.NoTester(f"{line(why)}; its config with tiny sizes has {numbers:,} numbers")
    torch.manual_seed(0)
    return kind(config).eval()


# -- the checks, each in a process of its own


class Tiny:
    """A checkpoint as plain transformers and as Lamina at its smallest budget."""

    def __init__(self, folder: Path) -> None:
        import torch

        self.folder = folder
        self.inputs: dict[str, dict[str, Any]] = torch.load(folder / "inputs.pt")
        self.name = json.loads((folder / "config.json").read_text())["architectures"][0]

    def plain(self) -> Any:
        import transformers

        model = getattr(transformers, self.name).from_pretrained(self.folder).eval()
        if any(model.get_experts_implementation().values()):
            model.set_experts_implementation("eager")  # as Lamina chooses
        return model

    def minimum(self, draft: str | None = None) -> int:
        """Bytes; found once for all checks."""
        from lamina import AutoModel, BudgetError

        known = self.folder / f"minimum-{draft}"
        if known.exists():
            return int(known.read_text())

        options = {"device": "cpu", "context": CONTEXT, "draft": draft}
        try:
            AutoModel.from_pretrained(str(self.folder), memory=1, **options)
        except BudgetError as error:
            known.write_text(str(error.minimum_bytes))
            return error.minimum_bytes
        raise AssertionError("one byte was enough")

    def streamed(self, more: int = 0, draft: str | None = None) -> Any:
        """Lamina's, with so many bytes beyond the minimum."""
        from lamina import AutoModel

        memory = self.minimum(draft) + more
        return AutoModel.from_pretrained(str(self.folder), memory=memory, device="cpu", context=CONTEXT, draft=draft)

    def first(self, model: Any, which: str) -> Any:
        """The first output of a pass over the text alone or over all inputs: logits, or hidden states."""
        import torch

        torch.manual_seed(0)
        outputs = model(**{name: tensor.clone() for name, tensor in self.inputs[which].items()})
        for name in ("logits", "last_hidden_state", "prediction_logits"):
            if getattr(outputs, name, None) is not None:
                return getattr(outputs, name)
        return outputs[0]

    def pass_of(self, model: Any, which: str) -> Any:
        """The same without a gradient."""
        import torch

        with torch.no_grad():
            return self.first(model, which)

    def answer(self, model: Any, which: str, new: int = NEW_TOKENS, **more: Any) -> Any:
        """Greedy tokens of `generate`."""
        import torch

        torch.manual_seed(0)
        given = {name: tensor.clone() for name, tensor in self.inputs[which].items() if not _of_training(name)}
        out = model.generate(**given, max_new_tokens=new, min_new_tokens=new, do_sample=False, **more)
        return getattr(out, "sequences", out)

    def runs(self, model: Any, does: Callable[[Any, str], Any]) -> str:
        """The inputs that a model can do something with.

        Raises:
            Exception: what it raises with all of them, where it can with neither.
        """
        try:
            does(model, "text")
            return "text"
        except Exception:
            if not self.inputs["whole"]:
                raise
        does(model, "whole")
        return "whole"


def _of_training(name: str) -> bool:
    return name == "labels" or name.startswith("decoder_")


def line(error: BaseException) -> str:
    """An exception in one line, without what differs from run to run."""
    return re.sub(r"/\S*/(tiny\w*)/", "", f"{type(error).__name__}: {' '.join(str(error).split())[:220]}")


def compared(plain: Any, streamed: Any, does: Callable[[Any], Any]) -> str:
    """Whether two models do the same, to the last bit."""
    import torch

    try:
        wanted = does(plain)
    except Exception as error:
        return f"plain fails: {line(error)}"
    found = does(streamed)
    if wanted.shape != found.shape:
        return f"differs: shape {tuple(found.shape)} for {tuple(wanted.shape)}"
    if torch.equal(found, wanted):
        return EQUAL
    if bool((found.isnan() == wanted.isnan()).all()) and torch.equal(found.nan_to_num(), wanted.nan_to_num()):
        return EQUAL
    return f"differs: by {(found.float() - wanted.float()).abs().max().item():.3g}"


def check_answers(tiny: Tiny) -> dict[str, Any]:
    """Text, image, audio and generate; and what streams of it."""
    from lamina import BudgetError

    plain, streamed = tiny.plain(), tiny.streamed()
    plan = streamed.lamina.plan
    asked = {"text": lambda model: tiny.pass_of(model, "text")}
    for column, names in (("image", IMAGE), ("audio", AUDIO)):
        if any(name.startswith(names) for name in tiny.inputs["whole"]):
            asked[column] = lambda model: tiny.pass_of(model, "whole")
    if plain.can_generate():
        which = "whole" if tiny.inputs["whole"] else "text"
        asked["generate"] = lambda model: tiny.answer(model, which)
    cells: dict[str, Any] = {}
    for column, does in asked.items():
        try:
            cells[column] = compared(plain, streamed, does)
        except BudgetError as error:  # refused, with what it needs: beyond what the config says an input takes
            found = compared(plain, tiny.streamed(1 << 30), does)
            cells[column] = f"{MORE}: {line(error)}" if found == EQUAL else found
        except Exception as error:
            cells[column] = f"fails: {line(error)}"
    if plan.expert_count:
        cells["experts"] = "on demand"
    elif _has_experts(plain):
        cells["experts"] = "with their layers"
    return {**cells, "streams": plan.streams, "fallbacks": list(plan.fallbacks)}


def _has_experts(model: Any) -> bool:
    return any(type(module).__name__.endswith(("Experts", "MoE")) for module in model.modules())


def check_draft(tiny: Tiny) -> Cells:
    """A draft that is right at four tokens of five changes none of the tokens that come without it."""
    from helpers.always import Always
    from helpers.wavering import Wavering
    from lamina.speculative.decoder import MOST

    plain = tiny.plain()
    if not plain.can_generate():
        return {}
    every = tiny.inputs["whole"]
    tiny.inputs["whole"] = {name: tensor[:1] for name, tensor in every.items()}  # a draft is for one text at a time
    try:
        try:
            which = tiny.runs(plain, lambda model, which: tiny.answer(model, which, 1))
        except Exception:  # where images are no rows of theirs
            tiny.inputs["whole"] = every
            which = tiny.runs(plain, lambda model, which: tiny.answer(model, which, 1))
    except Exception as error:
        return {"draft": f"plain fails: {line(error)}"}
    model = tiny.streamed(draft="lookup")
    wanted = tiny.answer(model, which, DRAFTED_TOKENS, draft=None)
    if len(wanted) == 1 and wanted.ndim == 2:  # in the place of a lookup, which might find nothing
        oracle = Wavering([max(token, 1) for token in wanted[0].tolist()])
        model.lamina.decoder._drafts["lookup"] = oracle, Always(MOST, None, 0.0, must=True)
    found = tiny.answer(model, which, DRAFTED_TOKENS)
    stats = model.lamina.stats
    if found.tolist() != wanted.tolist():
        return {"draft": "differs: other tokens than without a draft"}
    if stats.draft != "lookup" or not stats.drafted_tokens:
        return {"draft": f"no: {stats.draft_reason}" if stats.draft != "lookup" else "nothing proposed"}
    return {"draft": YES}


def check_batched(tiny: Tiny) -> Cells:
    """Three prompts of three lengths through `generate_batch`."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    plain = tiny.plain()
    if not plain.can_generate() or plain.config.is_encoder_decoder:
        return {}
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1)
    room = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)

    def answers(model: Any) -> Any:
        prompts = [list(range(3, 3 + length)) for length in (4, 3, 7)]
        got = model.generate_batch(prompts, config, continuous_batching_config=room)
        return {tuple(one.prompt_ids): (one.generated_tokens, one.error) for one in got.values()}

    try:
        wanted = answers(plain)
        failed = len(wanted) < 3 or any(error or len(tokens) != 5 for tokens, error in wanted.values())
        if failed:
            errors = [str(error) for _, error in wanted.values() if error]
            return {"batched": f"plain fails: {' '.join(str(errors[:1]).split())[:200] if errors else 'no answers'}"}
    except Exception as error:
        return {"batched": f"plain fails: {line(error)}"}
    found = answers(tiny.streamed(64 << 20))
    return {"batched": EQUAL if found == wanted else f"differs: {str(found)[:120]} for {str(wanted)[:120]}"}


def check_adapters(tiny: Tiny) -> Cells:
    """A LoRA of two ranks on every linear, loaded with `model.load_adapter`; where experts fail, on attention."""
    plain = tiny.plain()
    excluded = ["out_proj", "conv1d"] if "mamba" in plain.config.model_type else None
    try:
        found = _adapted(tiny, plain, excluded)
    except Exception as error:
        if not _has_experts(plain):
            raise
        rest = _adapted(tiny, tiny.plain(), "experts")
        found = f"not on experts: {line(error)}" if rest == EQUAL else f"fails: {line(error)}"
    return {"adapters": found}


def _adapted(tiny: Tiny, plain: Any, excluded: list[str] | str | None) -> str:
    """A LoRA on all linears but some; on those of attention alone, where `excluded` is "experts"."""
    import torch
    from peft import LoraConfig, get_peft_model

    folder = str(tiny.folder / f"adapter-{excluded == 'experts'}")
    try:
        which = tiny.runs(plain, tiny.pass_of)
        base = tiny.pass_of(plain, which)
        torch.manual_seed(0)
        targets: Any = "all-linear"
        if excluded == "experts":
            names = [name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)]
            targets, excluded = [name for name in names if re.search("(attn|attention)(?!.*gate)", name)], None
        lora = LoraConfig(r=2, target_modules=targets, exclude_modules=excluded, init_lora_weights=False)
        get_peft_model(tiny.plain(), lora).save_pretrained(folder)
        torch.manual_seed(0)  # of what the adapter's file is not found to have: pi0 renames it in vain
        plain.load_adapter(folder)
        if torch.equal(tiny.pass_of(plain, which), base):
            return "plain fails: an adapter changes nothing"
    except Exception as error:
        return f"plain fails: {line(error)}"
    streamed = tiny.streamed()
    torch.manual_seed(0)
    streamed.load_adapter(folder)
    return compared(plain, streamed, lambda model: tiny.pass_of(model, which))


def check_trained(tiny: Tiny) -> Cells:
    """A backward pass: refused where weights stream, and the gradients of plain transformers where all is in memory."""
    import torch

    from lamina import UnsupportedError

    def gradients(model: Any) -> dict[str, Any]:
        tiny.first(model, which).float().pow(2).mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    try:
        plain = tiny.plain()
        which = tiny.runs(plain, tiny.pass_of)
        wanted = gradients(plain)
    except Exception as error:
        return {"trained": f"plain fails: {line(error)}"}
    streamed, refused = tiny.streamed(), False
    if streams := streamed.lamina.plan.streams:
        try:
            gradients(streamed)
        except UnsupportedError:
            refused = True
    found = gradients(tiny.streamed(2 << 30))
    if wanted.keys() != found.keys():
        return {"trained": f"differs: {len(found)} gradients for {len(wanted)}"}
    off = [name for name in wanted if not torch.equal(wanted[name].nan_to_num(), found[name].nan_to_num())]
    if off:
        return {"trained": f"differs: the gradient of {off[0]} and {len(off) - 1} others"}
    if streams and not refused:
        return {"trained": "not refused: a gradient came while weights streamed"}
    return {"trained": GOOD[5] if streams else GOOD[6]}


CHECKS: Mapping[str, Callable[[Tiny], Any]] = {
    "text": check_answers,
    "draft": check_draft,
    "batched": check_batched,
    "adapters": check_adapters,
    "trained": check_trained,
}
"""By the first column that each one fills."""


def apart(work: Callable[[], Any], limit: float) -> tuple[Any, str | None]:
    """What a function gives in a process of its own, or why it gives nothing."""
    here, there = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            there.send((work(), None))
        except BaseException as error:
            there.send((None, line(error)))
        os._exit(0)  # threads that a check left behind are not waited for

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    there.close()
    try:
        if here.poll(limit):
            return here.recv()
        return None, f"took more than {limit:.0f} s"
    except EOFError:
        process.join()
        return None, f"died, exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def found_of(row: Row, limit: float, today: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """All that is found of a family."""
    from helpers.judge import steady, traced_once

    found: dict[str, Any] = {**row._asdict(), "date": today, "versions": dict(versions)}
    with tempfile.TemporaryDirectory(prefix="tiny") as name:
        made, why = apart(lambda: make(row, Path(name)), limit)
        if why is not None:
            return {**found, "not_made": why}
        cells: Cells = {}
        more: dict[str, Any] = {"streams": None, "fallbacks": []}
        for column, check in CHECKS.items():

            def checked(check: Callable[[Tiny], Any] = check) -> Any:
                with steady(), traced_once():
                    return check(Tiny(Path(name)))

            got, why = apart(checked, limit)
            got = got if why is None else {column: f"fails: {why}"}
            more |= {key: got.pop(key) for key in tuple(more) if key in got}
            cells |= got
            if why is not None and column == "text":
                break  # it is not loaded at all
    return {**found, **made, "cells": cells, **more}


def run(arguments: argparse.Namespace) -> None:
    """Append what is not there yet to the results."""
    import peft
    import torch
    import transformers

    import lamina

    sys.path[:0] = [str(ROOT / "tests")]
    from helpers import judge, multimodal, testers

    ready = (lamina.AutoModel, judge, multimodal, transformers.PreTrainedModel, transformers.LlamaForCausalLM)
    assert all(ready)  # imported before any process is forked off

    torch.set_num_threads(1)
    if arguments.transformers_tests is not None:
        testers.use(arguments.transformers_tests.resolve())
    versions = {each.__name__: each.__version__ for each in (lamina, transformers, torch, peft)}
    there = {(each["family"], each["kind"]) for each in read(RESULTS)}
    with RESULTS.open("a") as file:  # the page says what is still to come
        for row in rows():
            if (row.family, row.kind) not in there:
                file.write(json.dumps({**row._asdict(), "not_run": True}) + "\n")
    for row in _wanted(arguments):
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        found = found_of(row, arguments.limit, today, versions)
        with RESULTS.open("a") as file:
            file.write(json.dumps(found, ensure_ascii=False) + "\n")
        said = json.dumps(found.get("cells", found.get("not_made")), ensure_ascii=False)
        print(row.family, row.kind, said, flush=True)


def _wanted(arguments: argparse.Namespace) -> list[Row]:
    """What is to be run: the share of this process in what was asked for, or else is not there yet."""
    results = [] if arguments.again or arguments.only else read(RESULTS)
    known = {(each["family"], each["kind"]) for each in results if "not_run" not in each}
    asked = [row for row in rows() if _asked_for(row, arguments) and (row.family, row.kind) not in known]
    share, shares = map(int, arguments.share.split("/"))
    return asked[share - 1 :: shares]


def _asked_for(row: Row, arguments: argparse.Namespace) -> bool:
    named = not arguments.only or bool({row.family, row.kind} & set(arguments.only))
    return named and row.task in (arguments.task or [row.task])


# -- the results and the page


def read(file: Path) -> list[dict[str, Any]]:
    """The results, the last one of each class of a family, in order."""
    lines = file.read_text().splitlines() if file.exists() else []
    found = {(each["family"], each["kind"]): each for each in map(json.loads, lines)}
    order = {task: place for place, (task, _) in enumerate(TASKS)}
    return sorted(found.values(), key=lambda each: (order[each["task"]], each["family"], each["kind"]))


def page(results: list[dict[str, Any]]) -> str:
    """docs/models.md."""
    ran = [each for each in results if "not_run" not in each]
    made = [each for each in ran if "cells" in each]
    parts = (_head(ran), _counts(made), _tables(made), _notes(made), _not_made(ran), _not_run(results))
    return "\n".join(line for part in parts for line in part) + "\n"


def _head(results: list[dict[str, Any]]) -> list[str]:
    dates = sorted({each["date"] for each in results}) or ["never"]
    versions = sorted({", ".join(f"{name} {text}" for name, text in each["versions"].items()) for each in results})
    return [HEAD.format(first=dates[0], last=dates[-1], versions="; ".join(versions))]


def _counts(made: list[dict[str, Any]]) -> list[str]:
    """How often each thing was found, by column."""
    streams = sum(bool(each["streams"]) for each in made)
    lines = [
        "## Counts",
        "",
        f"{len(made)} classes. {streams} of them stream at their smallest budget; of the others all fits in that.",
        "",
        "| column | asked | as it should be | plain fails | no draft | else |",
        "|---|---|---|---|---|---|",
    ]
    for column in COLUMNS:
        words = [word(cell(each, column)) for each in made if cell(each, column) != NOT_ASKED]
        good, plain, no = (sum(w in group for w in words) for group in (GOOD, ("plain fails",), ("no",)))
        lines.append(f"| {column} | {len(words)} | {good} | {plain} | {no} | {len(words) - good - plain - no} |")
    return [*lines, ""]


def cell(each: Mapping[str, Any], column: str) -> str:
    """What was found; what takes a sound or an image and no text alone was not asked for that."""
    cells = each["cells"]
    found: str = cells.get(column, NOT_ASKED)
    alone = column == "text" and EQUAL in (cells.get("image"), cells.get("audio")) and found.startswith("plain fails")
    return NOT_ASKED if alone else found


def word(found: str) -> str:
    """What the table shows of it: the reason stands below."""
    return found.partition(":")[0]


def _tables(made: list[dict[str, Any]]) -> list[str]:
    lines = []
    for task, _ in TASKS:
        of_task = [each for each in made if each["task"] == task]
        if not of_task:
            continue
        lines += [f"## {task.capitalize()}", "", f"| family | class | {' | '.join(COLUMNS)} |", "|---" * 11 + "|"]
        for each in of_task:
            cells = [word(cell(each, column)) for column in COLUMNS]
            lines.append(f"| {each['family']} | {each['class']} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _notes(made: list[dict[str, Any]]) -> list[str]:
    """Each reason once, with the families that it is one of; where plain transformers fails, last."""
    reasons: dict[tuple[bool, str, str], list[str]] = {}
    for each in made:
        for column in COLUMNS:
            found = cell(each, column)
            if ":" in found:
                key = found.startswith("plain fails"), column, found
                reasons.setdefault(key, []).append(f"{each['family']} ({each['class']})")
    lines = ["## Reasons", ""]
    for (_, column, found), families in sorted(reasons.items()):
        lines.append(f"- *{column}*, {_quoted(found)}: {', '.join(families)}")
    return [*lines, ""]


def _quoted(text: str) -> str:
    """Text of an error within a page: nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


def _not_made(results: list[dict[str, Any]]) -> list[str]:
    missing = [each for each in results if "not_made" in each]
    lines = [f"- {each['family']} ({each['kind']}, {each['task']}): {_quoted(each['not_made'])}" for each in missing]
    return ["## No tiny checkpoint could be made", "", *(lines or ["None."])]


def _not_run(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for task, _ in TASKS:
        families = [each["family"] for each in results if "not_run" in each and each["task"] == task]
        lines += [f"- {task}: {', '.join(families)}"] if families else []
    return ["", "## Not run yet", "", *(lines or ["None."])]


def main(arguments: Iterable[str]) -> int:
    """Run what is asked for, and write or compare the page; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run what the results lack")
    parser.add_argument("--again", action="store_true", help="run all of it")
    parser.add_argument("--only", nargs="+", help="families or classes, run again")
    parser.add_argument("--task", nargs="+", choices=[task for task, _ in TASKS])
    parser.add_argument("--transformers-tests", type=Path, help="a checkout of transformers")
    parser.add_argument("--share", default="1/1", help="2/3: the second of three processes that share the work")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one check")
    parser.add_argument("--check", action="store_true", help="compare the page with the results")
    given = parser.parse_args(list(arguments))
    if given.run:
        run(given)
    wanted = page(read(RESULTS))
    if given.check:
        same = PAGE.exists() and PAGE.read_text() == wanted
        if not same:
            print("docs/models.md shows other results than docs/models.jsonl has: run python scripts/models_table.py")
        return int(not same)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
