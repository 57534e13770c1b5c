"""transformers with accelerate's disk offload: what does not fit in --cpu-memory stays in the checkpoint's own files.

    DIR/accelerate/bin/python benchmarks/peers/accelerate_disk_run.py .cache/bench/llama-3b --cpu-memory 1GB

--plain loads everything into memory instead: the yardstick for a model that fits. --sequences answers many prompts of
one length in one `generate`. --device-memory keeps that many bytes of weights on the first GPU as well.
"""

import tempfile

import torch
from clock import TokenClock, parser, prompts, tell
from transformers import AutoModelForCausalLM


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--cpu-memory", default="1GB", help="for weights that stay in memory; accelerate's max_memory"
    )
    arguments.add_argument("--device-memory", type=int, help="the same, on the first GPU")
    arguments.add_argument("--plain", action="store_true", help="no offload: plain transformers, all in memory")
    given = arguments.parse_args()
    clock = TokenClock()
    budget = int(given.cpu_memory) if given.cpu_memory.isdigit() else given.cpu_memory  # as accelerate takes it
    with tempfile.TemporaryDirectory() as folder:
        placed = {} if given.plain else {"device_map": "auto", "max_memory": {"cpu": budget}, "offload_folder": folder}
        if given.device_memory:
            placed["max_memory"] = {0: given.device_memory, "cpu": budget}
        model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype="auto", **placed)
        model.eval()
        where = list(map(str, getattr(model, "hf_device_map", {}).values()))
        many = given.sequences > 1
        clock.ready()
        ids = torch.tensor(prompts(given), device=model.device if model.device.type != "meta" else "cpu")
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=given.new_tokens,
            max_new_tokens=given.new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=None if many else clock,
        )
    name = "transformers" if given.plain else "accelerate_disk"
    if many:
        tell(clock.batch_result(name, out[:, given.prompt_tokens :].tolist(), given.new_tokens))
    else:
        tell(clock.result(name, modules={place: where.count(place) for place in dict.fromkeys(where)}))


if __name__ == "__main__":
    main()
