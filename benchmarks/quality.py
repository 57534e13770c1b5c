"""What fewer bits cost: perplexity of stores and of formats beside the same model in bf16.

    python benchmarks/quality.py MODEL --formats q8 q4,lm_head=q6
    python benchmarks/quality.py MODEL --stores STORE ...
    python benchmarks/quality.py MODEL --rescaled --formats nf4,all q4,embed_tokens=q8

MODEL is a folder with a plain checkpoint in bf16, a STORE one that `lamina split --compression` wrote of it. A format
is tried without a file: each weight is replaced by what it gives back. Formats are q4, q5, q6 and q8, Lamina's own
codecs, and AirLLM's two: nf4 is bitsandbytes' NF4 in blocks of 64, int8 its 8 bits in blocks of 2,048. One format for
all matrices, then `PATTERN=FORMAT` for tensors whose name has the pattern in it; the last that fits wins; `all` gives
the format to norms and biases as well.

The texts are 4,096 tokens each of this interpreter's own files, so they need no download and are the same for the same
version of Python: prose is the paragraphs of `pydoc_data.topics`, code is textwrap, heapq, shlex and queue. Windows of
1,024 tokens. `ppl` is exp of the mean loss; the change comes with the standard error of the paired difference. `kl` is
the mean divergence from the bf16 model at every fourth token, which tells close formats apart where ppl cannot.

`--rescaled` is for checkpoints that came out of 4-bit files, whose weights lie on a grid that a 4-bit format only has
to find again. Channels are scaled by random factors (log-normal, sigma 0.2, seeded) and their inverse goes into the
norm, the values or the products before them: the same function, with no grid in it. `--fp32` computes in fp32, without
the noise of bf16 activations (kl 0.002 on a small model).
"""

import argparse
import json
import pydoc_data.topics
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import MeasuringError, record, run_main, stamp, table, versions
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

CHUNK_ELEMENTS = 1 << 21
KL_STRIDE = 4
LOSS_ROWS = 256
MODULES = ("textwrap", "heapq", "shlex", "queue")
Weights = Callable[[str], torch.Tensor]
Format = tuple[Callable[[torch.Tensor], torch.Tensor] | None, Callable[[int], float]]
"""Unpacked from encoded rows of fp32 (None: as they are), and the bits a weight for a number of columns."""


@dataclass
class Seen:
    """What a model said about a text: loss of each token, log probabilities of every fourth, kl to a reference."""

    losses: torch.Tensor
    kept: list[torch.Tensor]
    kl: float | None = None


def prose() -> str:
    """Paragraphs of Python's reference, joined to lines; no tables, grammar or examples."""
    paragraphs = []
    for _, topic in sorted(pydoc_data.topics.topics.items()):
        for paragraph in topic.split("\n\n"):
            lines = paragraph.strip("\n").split("\n")
            indented = any(line.startswith("   ") for line in lines)
            if not indented and "::=" not in paragraph and len(paragraph.strip()) >= 200:
                paragraphs.append(" ".join(line.strip() for line in lines))
    return "\n\n".join(paragraphs)


def code() -> str:
    library = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join((library / f"{name}.py").read_text() for name in MODULES)


def windows(tokenizer: Any, text: str, tokens: int, window: int) -> torch.Tensor:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    if len(ids) < tokens or tokens % window:
        raise MeasuringError(f"a text of {len(ids)} tokens has no {tokens} in windows of {window}: ask for fewer")
    return torch.tensor(ids).view(-1, window)


@torch.inference_mode()
def see(model: Any, ids: torch.Tensor, reference: Seen | None = None) -> Seen:
    losses, kept, kl = [], [], []
    for window in ids:
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        for start in range(0, len(window), LOSS_ROWS):
            said = F.log_softmax(logits[start : start + LOSS_ROWS].float(), -1)
            next_ids = window[start + 1 : start + LOSS_ROWS + 1, None]
            losses.append(-said[: len(next_ids)].gather(1, next_ids)[:, 0])
            some = said[::KL_STRIDE]
            if reference is None:
                kept.append(some.half())
            else:
                wanted = reference.kept[len(kl)].float()
                kl.append((wanted.exp() * (wanted - some)).sum(-1))
        del logits
    return Seen(torch.cat(losses), kept, torch.cat(kl).mean().item() if kl else None)


def compared(seen: Seen, base: Seen) -> dict[str, float | None]:
    change = seen.losses - base.losses
    return {
        "ppl": seen.losses.mean().exp().item(),
        "change_percent": 100 * (change.mean().exp().item() - 1),
        "standard_error_percent": 100 * change.std().item() / len(change) ** 0.5,
        "kl": seen.kl,
    }


def rescaled(weights: Weights, config: Any, sigma: float = 0.2) -> dict[str, torch.Tensor]:
    """Llama's and Qwen2's matrices with other channel scales and the same products; the tables stay."""
    dice = torch.Generator().manual_seed(1)
    out: dict[str, torch.Tensor] = {}
    kv, repeat = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def factors(count: int) -> torch.Tensor:
        return torch.exp(torch.randn(count, generator=dice) * sigma)

    def scale(name: str, by: torch.Tensor) -> None:
        out[name] = (out[name] if name in out else weights(name).float()) * by

    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        for norm, users in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            by = factors(config.hidden_size)
            scale(f"{at}{norm}.weight", 1 / by)
            for user in users:
                scale(f"{at}{user}.weight", by)
        by = factors(kv * head)
        scale(f"{at}self_attn.v_proj.weight", 1 / by[:, None])
        if config.model_type == "qwen2":
            scale(f"{at}self_attn.v_proj.bias", 1 / by)
        scale(f"{at}self_attn.o_proj.weight", by.view(kv, 1, head).expand(kv, repeat, head).flatten())
        by = factors(config.intermediate_size)
        scale(f"{at}mlp.up_proj.weight", 1 / by[:, None])
        scale(f"{at}mlp.down_proj.weight", by)
    return {name: weight.bfloat16() for name, weight in out.items()}


def weights_of(folder: Path) -> tuple[list[str], Weights]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        opened = safe_open(path, "pt")
        found.update(dict.fromkeys(opened.keys(), opened))
    if not found:
        raise MeasuringError(f"{folder} holds no safetensors: give the folder of a plain checkpoint")
    return list(found), lambda name: found[name].get_tensor(name)


def format_named(name: str) -> Format:
    """The format of that name; MeasuringError where there is none."""
    if name == "bf16":
        return None, lambda _columns: 16.0
    if name == "nf4":
        return nf4, lambda _columns: 4 + 32 / 64
    if name == "int8":
        return int8, lambda _columns: 8 + 32 / 2048
    if re.fullmatch(r"q[4568]", name):
        return lamina_codec(int(name[1]))
    raise MeasuringError(f"there is no format {name!r}: there are q4, q5, q6, q8, nf4, int8 and bf16")


def lamina_codec(bits: int) -> Format:
    from lamina.codec import affine

    codec = affine.Affine(bits)

    def again(rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(rows)
        codec.unpack(codec.encode(rows), rows.shape[0], rows.shape[1], out)
        return out

    return again, lambda columns: 8 * codec.panel_bytes(columns) / columns


def nf4(rows: torch.Tensor) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(rows.contiguous(), blocksize=64, quant_type="nf4")
    return bnb.dequantize_4bit(packed, state).view(rows.shape)


def int8(rows: torch.Tensor) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    return bnb.dequantize_blockwise(*bnb.quantize_blockwise(rows.contiguous(), blocksize=2048))


def format_for(name: str, dims: int, rules: list[str]) -> str:
    chosen = rules[0] if dims > 1 or "all" in rules[1:] else "bf16"
    for rule in rules[1:]:
        pattern, _, wanted = rule.partition("=")
        if wanted and re.search(pattern, name):
            chosen = wanted
    return chosen


def put(model: Any, names: list[str], weights: Weights, spec: str) -> tuple[float, float]:
    """Replace every weight by what its format gives back: share of bf16, and seconds of encoding and unpacking."""
    parameters, bits, elements, started = dict(model.named_parameters()), 0.0, 0, time.perf_counter()
    for name in names:
        weight = weights(name)
        again, size = format_named(format_for(name, weight.dim(), spec.split(",")))
        rows, into = weight.view(-1, weight.shape[-1]), parameters[name].data
        bits, elements = bits + rows.numel() * size(rows.shape[1]), elements + rows.numel()
        step = max(1, CHUNK_ELEMENTS // rows.shape[1] // 256) * 256
        for at in range(0, len(rows), step):
            part = rows[at : at + step]
            unpacked = part if again is None else again(part.float()).bfloat16()
            into.view(rows.shape)[at : at + step].copy_(unpacked)
    return bits / elements / 16, time.perf_counter() - started


def runs(given: argparse.Namespace, texts: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """bf16 first, then each format and each store against it."""
    names, weights = weights_of(given.model)
    dtype = torch.float32 if given.fp32 else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).eval()
    if given.rescaled:
        changed, plain = rescaled(weights, model.config), weights
        weights = lambda name: changed[name] if name in changed else plain(name)  # noqa: E731
    put(model, names, weights, "bf16")
    base = {text: see(model, ids) for text, ids in texts.items()}
    yield {"what": "bf16", "share": 1.0} | {text: compared(seen, seen) for text, seen in base.items()}
    for spec in given.formats:
        share, spent = put(model, names, weights, spec)
        found = {text: compared(see(model, ids, base[text]), base[text]) for text, ids in texts.items()}
        yield {"what": spec, "share": share, "encode_decode_seconds": spent} | found
    del model
    plain_bytes = nbytes(given.model)
    for store in given.stores:
        import lamina

        with lamina.AutoModel.from_pretrained(store, memory=given.memory).lamina as opened:
            found = {text: compared(see(opened.model, ids, base[text]), base[text]) for text, ids in texts.items()}
        yield {"what": store.name, "share": nbytes(store) / plain_bytes} | found


def nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def row(run: dict[str, Any], texts: dict[str, torch.Tensor]) -> list[str]:
    cells = [run["what"], f"{run['share']:.3f}"]
    for text in texts:
        one = run[text]
        cells += [f"{one['ppl']:.3f}", f"{one['change_percent']:+.2f} ±{one['standard_error_percent']:.2f}"]
        cells.append("-" if one["kl"] is None else f"{one['kl']:.4f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--formats", nargs="*", default=[])
    parser.add_argument("--stores", nargs="*", type=Path, default=[])
    parser.add_argument("--rescaled", action="store_true")
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--memory", help="of the stores' models: all that is free unless given")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=1024)
    given = parser.parse_args()
    if given.stores and given.rescaled:
        raise MeasuringError("a store holds the weights of MODEL as they are: --stores goes without --rescaled")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = {
        name: windows(tokenizer, text, given.tokens, given.window)
        for name, text in (("prose", prose()), ("code", code()))
    }
    about = {"model": given.model.name, "rescaled": given.rescaled, "fp32": given.fp32, "versions": versions()}
    line: dict[str, Any] = {}
    rows = []
    for run in runs(given, texts):
        line = stamp() | about | run
        record("quality", line)
        rows.append(row(run, texts))
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    head = ["what", "share", *(f"{text} {part}" for text in texts for part in ("ppl", "change %", "kl"))]
    print(table(rows, head))
    print(json.dumps(line))


if __name__ == "__main__":
    run_main(main)
