"""A process that loads tiny models with mutated files, one after the other, and says of each what became of it.

Run as `python config_worker.py FOLDER KIND SEED COUNT FAMILY...`; prints a JSON line before and one after each case.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WRONG: tuple[Any, ...] = (
    None, True, False, "x", "", "4", -1, 0, 1, 3, 7, 64, 4096, 200_000, 10**9, 2**31, 2**62, 10**40, 1.5, -0.5, 1e300,
    float("nan"), float("inf"), [], {}, [[[1]]], [1, 2], ["x"], {"x": 1}, {"": None},
)  # fmt: skip
FIELDS = """num_labels id2label text_config rope_scaling rope_parameters quantization_config architectures auto_map
    layer_types model_type torch_dtype dtype per_layer_config attn_implementation experts_implementation use_cache
    tie_word_embeddings output_attentions output_hidden_states problem_type is_encoder_decoder name_or_path
    chunk_size_feed_forward sliding_window head_dim max_position_embeddings transformers_version return_dict
    num_hidden_layers hidden_size vocab_size num_attention_heads attribute_map sub_configs _name_or_path""".split()
GENERATION: Mapping[str, Any] = {
    "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 2,
    "pad_token_id": 0, "bos_token_id": 1, "max_length": 30, "num_beams": 1, "num_return_sequences": 1,
    "no_repeat_ngram_size": 0, "min_new_tokens": 0, "use_cache": True, "cache_implementation": None,
    "stop_strings": None, "bad_words_ids": None, "suppress_tokens": None, "forced_eos_token_id": None,
    "length_penalty": 1.0, "early_stopping": False, "typical_p": 1.0, "min_p": None, "penalty_alpha": None,
    "watermarking_config": None, "guidance_scale": None, "output_attentions": False, "sequence_bias": None,
    "transformers_version": "5.23.0", "exponential_decay_length_penalty": None, "compile_config": None,
    "prompt_lookup_num_tokens": None, "max_time": None, "return_dict_in_generate": False, "output_scores": False,
    "assistant_confidence_threshold": None, "decoder_start_token_id": None, "custom_generate": None,
}  # fmt: skip


def mutated(fields: Mapping[str, Any], more: list[str], rng: random.Random) -> tuple[str, bytes]:
    """What was done to a JSON object, and its bytes."""
    whole = json.loads(json.dumps(fields))
    if rng.random() < 0.06:
        return damaged(json.dumps(whole), rng)
    part, at = whole, ""
    while True:
        name = rng.choice([*part, *(more if part is whole and rng.random() < 0.3 else [])] or ["x"])
        if isinstance(part.get(name), dict) and part[name] and rng.random() < 0.8:
            part, at = part[name], f"{at}{name}."
            continue
        break
    old, how = part.get(name), rng.random()
    if how < 0.08:
        part.pop(name, None)
        return f"{at}{name} deleted", json.dumps(whole).encode()
    if how < 0.12:
        text = json.dumps(whole)
        return f"{name} twice", f"{text[:-1]}, {json.dumps(name)}: {json.dumps(rng.choice(WRONG))}}}".encode()
    values = list(WRONG)
    if isinstance(old, int | float) and not isinstance(old, bool):
        values += [old + 1, old - 1, -old, old * 2, old * 1000, old // 2, str(old), [old], old / 3] * 2
    if isinstance(old, list) and old:
        values += [old[1:], old + old, old[::-1], [None] * len(old), [old]] * 3
    part[name] = rng.choice(values)
    return f"{at}{name} = {str(part[name])[:60]} (was {str(old)[:30]})", json.dumps(whole).encode()


def damaged(text: str, rng: random.Random) -> tuple[str, bytes]:
    raw = text.encode()
    ways: dict[str, Callable[[], bytes]] = {
        "cut": lambda: raw[: rng.randrange(len(raw))],
        "deep": lambda: b"[" * 200_000,
        "deep object": lambda: raw[:-1] + b', "x": ' + b'{"x": ' * 900 + b"1" + b"}" * 901,
        "deep list": lambda: raw[:-1] + b', "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        "not UTF-8": lambda: raw.replace(b"e", b"\xff", 1),
        "list": lambda: b"[" + raw + b"]",
        "number": lambda: b"7",
        "null": lambda: b"null",
        "empty": lambda: b"",
        "digits": lambda: raw[:-1] + b', "hidden_size": ' + b"9" * 5000 + b"}",
    }
    way = rng.choice(sorted(ways))
    return way, ways[way]()


def config_case(folder: Path, rng: random.Random) -> tuple[str, Callable[[], Any]]:
    """A model whose config, or now and then its generation config, is not as it was."""
    fields = json.loads((folder / "config.json").read_bytes())
    if rng.random() < 0.2:
        what, raw = mutated(GENERATION, [], rng)
        file = folder / "generation_config.json"
    else:
        what, raw = mutated(fields, FIELDS, rng)
        file = folder / "config.json"
    file.write_bytes(raw)
    planned = rng.random() < 0.3
    return f"{file.name}: {what}", lambda: use(folder, planned)


def use(folder: Path, planned: bool) -> None:
    """Plan now and then, load, one forward, one short answer."""
    import torch

    import lamina

    if planned:
        lamina.plan_model(str(folder), memory="900MB", device="cpu", context=32)
    model = lamina.AutoModel.from_pretrained(str(folder), memory="900MB", device="cpu", context=32)
    try:
        ids = torch.tensor([[3, 5, 9, 7]])
        with torch.no_grad():
            model(input_ids=ids)
        model.generate(ids, max_new_tokens=2)
    finally:
        model.lamina.close()


def tokenizer_case(folder: Path, rng: random.Random) -> tuple[str, Callable[[], Any]]:
    """A tokenizer one of whose files is not as it was."""
    file = folder / rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    what, raw = mutated(json.loads(file.read_bytes()), ["chat_template", "added_tokens_decoder", "auto_map"], rng)
    file.write_bytes(raw)

    def use_tokenizer() -> None:
        from lamina.hf.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(str(folder), False)
        tokenizer.decode(tokenizer("hello world")["input_ids"])

    return f"{file.name}: {what}", use_tokenizer


def peak_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    root, kind, seed, count, *families = sys.argv[1:]
    warnings.simplefilter("ignore")
    import lamina
    import lamina.runtime.load as loading
    from lamina.runtime import rates

    # how quick this machine is decides nothing here
    loading.measure = lambda engine, *_: rates._hardware(engine.weights.schedule, {}, None, engine.device)
    make = {"config": config_case, "tokenizer": tokenizer_case}[kind]
    for number in range(int(seed), int(seed) + int(count)):
        rng = random.Random(number)
        original, folder = Path(root) / rng.choice(families), Path(root) / f"case-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in original.iterdir():
            if file.suffix == ".safetensors":
                (folder / file.name).symlink_to(file)
            else:
                shutil.copy(file, folder)
        what, run = make(folder, rng)
        print(json.dumps({"seed": number, "case": f"{original.name} {what}"}), flush=True)
        said = ""
        try:
            run()
            kind = "fine"
        except lamina.LaminaError as error:
            kind, said = "refused", f"{type(error).__name__}: {error}"
        except BaseException as error:
            at = traceback.extract_tb(error.__traceback__)
            ours = next((frame for frame in reversed(at) if "lamina" in frame.filename), at[-1])
            kind, said = "escaped", f"{type(error).__name__}: {str(error)[:200]} [{ours.filename}:{ours.lineno}]"
        print(json.dumps({"kind": kind, "said": said, "peak": peak_bytes()}), flush=True)


if __name__ == "__main__":
    main()
