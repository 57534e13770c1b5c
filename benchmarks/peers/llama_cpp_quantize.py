"""llama.cpp's own quantizer on a BF16 GGUF file:

DIR/llama_cpp/bin/python benchmarks/peers/llama_cpp_quantize.py llama-3b.gguf llama-3b.q8_0.gguf Q8_0
"""

import argparse
import os


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("source")
    arguments.add_argument("to")
    arguments.add_argument("type", choices=("Q8_0", "Q4_0"))
    given = arguments.parse_args()

    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{given.type}")
    settings.nthread = os.cpu_count()
    if code := llama_cpp.llama_model_quantize(given.source.encode(), (given.to + ".part").encode(), settings):
        raise SystemExit(f"llama_model_quantize gave {code}")
    os.replace(given.to + ".part", given.to)


if __name__ == "__main__":
    main()
