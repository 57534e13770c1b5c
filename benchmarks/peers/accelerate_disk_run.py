"""transformers with accelerate's disk offload: what does not fit in --cpu-memory stays in the checkpoint's own files.

    DIR/accelerate/bin/python benchmarks/peers/accelerate_disk_run.py .cache/bench/llama-3b --cpu-memory 1GB

--plain loads everything into memory instead: the yardstick for a model that fits.
"""

import tempfile

import torch
from clock import TokenClock, ids_of, parser, tell
from transformers import AutoModelForCausalLM


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--cpu-memory", default="1GB", help="for weights that stay in memory; accelerate's max_memory"
    )
    arguments.add_argument("--plain", action="store_true", help="no offload: plain transformers, all in memory")
    given = arguments.parse_args()
    clock = TokenClock()
    budget = int(given.cpu_memory) if given.cpu_memory.isdigit() else given.cpu_memory  # as accelerate takes it
    with tempfile.TemporaryDirectory() as folder:
        placed = {} if given.plain else {"device_map": "auto", "max_memory": {"cpu": budget}}
        if placed:
            placed["offload_folder"] = folder
        model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype="auto", **placed)
        model.eval()
        where = list(getattr(model, "hf_device_map", {}).values())
        clock.ready()
        model.generate(
            torch.tensor([ids_of(given.prompt_ids)]),
            min_new_tokens=given.new_tokens,
            max_new_tokens=given.new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
    kept = {place: where.count(place) for place in dict.fromkeys(where)}
    tell(clock.result("transformers" if given.plain else "accelerate_disk", modules=kept))


if __name__ == "__main__":
    main()
