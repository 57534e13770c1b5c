#!/usr/bin/env bash
# Makes the environments of the peers that Lamina is measured against:
#
#     benchmarks/peers.sh DIR [airllm|accelerate|transformers_457|llama_cpp ...]      (default: all of them)
#
# DIR/<name>/bin/python then runs benchmarks/peers/*_run.py. One environment each, because the peers pin different
# versions of the same packages; transformers_457 is for AirLLM on mixtures of experts, which transformers 5 broke for it,
# and for oLLM. torch goes in first and by version: named without one, a later package would pull the newest build with
# several GB of CUDA. To be sure of the CPU build, point pip at PyTorch's own CPU index (PIP_EXTRA_INDEX_URL).
# llama-cpp-python is compiled for this very CPU: about ten minutes on two cores. Each of the others takes 1 GB of disk.
set -euo pipefail

dir=${1:?usage: peers.sh DIR [airllm|accelerate|transformers_457|llama_cpp ...]}
shift
peers=("$@")
[ ${#peers[@]} -gt 0 ] || peers=(airllm accelerate transformers_457 llama_cpp)
python=${PYTHON:-python3}
torch=torch==2.13.0

environment() { # NAME: a fresh virtual environment unless there is one
    [ -x "$dir/$1/bin/python" ] || "$python" -m venv "$dir/$1"
    "$dir/$1/bin/python" -m pip install --quiet --upgrade pip
}

install() { # NAME PACKAGE...
    local name=$1
    shift
    nice "$dir/$name/bin/python" -m pip install --quiet "$@"
}

mkdir -p "$dir"
for peer in "${peers[@]}"; do
    echo "peers.sh: $peer into $dir/$peer" >&2
    environment "$peer"
    case $peer in
    airllm)
        install airllm "$torch"
        # Its own requirements would do, but resolve them in one go with the transformers that it is measured with.
        install airllm "$torch" airllm==4.0.0 transformers==5.23.0 accelerate==1.15.0
        ;;
    accelerate)
        install accelerate "$torch"
        install accelerate "$torch" transformers==5.23.0 accelerate==1.15.0
        ;;
    transformers_457)
        install transformers_457 "$torch"
        install transformers_457 "$torch" airllm==4.0.0 transformers==4.57.6 accelerate==1.15.0
        # oLLM asks for flash-attn, which cannot be built without CUDA and which its Llama does without.
        install transformers_457 --no-deps ollm==1.0.3 peft==0.21.2
        ;;
    llama_cpp)
        CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF}" \
            install llama_cpp --no-binary llama-cpp-python llama-cpp-python==0.3.36
        ;;
    *)
        echo "peers.sh: no peer named '$peer' (airllm, accelerate, transformers_457, llama_cpp)" >&2
        exit 2
        ;;
    esac
    "$dir/$peer/bin/python" -m pip list 2>/dev/null | grep -iE '^(torch|transformers|accelerate|airllm|ollm|llama_cpp_python) ' >&2
done
