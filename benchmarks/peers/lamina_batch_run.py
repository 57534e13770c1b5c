"""Lamina with many prompts at once, through transformers' own continuous batching:

python benchmarks/peers/lamina_batch_run.py .cache/bench/llama-3b --memory 3GB --sequences 32 --new-tokens 16
"""

from clock import TokenClock, parser, prompts, tell


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--memory", help="the budget; default: what Lamina finds free under the cap")
    given = arguments.parse_args()
    clock = TokenClock()

    from transformers import GenerationConfig

    from lamina import AutoModel

    model = AutoModel.from_pretrained(str(given.checkpoint), memory=given.memory)
    asked = prompts(given)
    with model.lamina:
        clock.ready()
        before = model.lamina.stats.passes
        config = GenerationConfig(max_new_tokens=given.new_tokens, do_sample=False, pad_token_id=0, eos_token_id=-1)
        answers = model.generate_batch(asked, config)
        found = {tuple(each.prompt_ids): each.generated_tokens for each in answers.values()}
        passes = model.lamina.stats.passes - before
        result = clock.batch_result("lamina", [found[tuple(ids)] for ids in asked], passes)
        stats = model.lamina.stats
    tell(result | {"peak_rss_bytes": stats.peak_rss_bytes, "bytes_read_per_pass": stats.bytes_read_per_pass})


if __name__ == "__main__":
    main()
