"""What is compared: the workloads, the models and the engines, each a row of a table. `compare.py` runs them.

Not a script, and standard library only.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import lamina_cli
from capped import run_capped
from report import HERE, MeasuringError, make_checkpoint, need_disk, parse_size


@dataclass(frozen=True)
class Workload:
    """One question put to every engine."""

    about: str
    models: tuple[str, ...]
    caps: tuple[str, ...]
    engines: tuple[str, ...]
    figure: str = "seconds_per_token"  # what engines are compared by
    prompt_tokens: int = 16
    new_tokens: int = 8
    sequences: int = 1
    warm: bool = False  # leave the page cache as it is
    on_device: bool = False  # the cap is of the accelerator's memory


STREAMING = ("lamina", "llama_cpp", "accelerate_disk", "airllm")
WORKLOADS = {
    "dense": Workload(
        "decoding a dense model under a cap",
        ("3b",),
        ("1/3", "1/2", "5/6", "none"),
        (*STREAMING, "ollm", "llama_cpp_nommap", "transformers"),
    ),
    "moe": Workload(
        "decoding a mixture of experts under a cap",
        ("mixtral-12gb", "qwen3moe-11gb"),
        ("1/3",),
        (*STREAMING, "airllm_457"),
    ),
    "stores": Workload(
        "fewer bytes: Lamina's stores beside llama.cpp's file of like size, half of it given",
        ("3b-8bit", "3b-4bit", "3b-lossless"),
        ("1/2",),
        ("lamina", "llama_cpp"),
    ),
    "prefill": Workload(
        "the first token after a prompt of 2,048",
        ("3b",),
        ("1/2",),
        (*STREAMING, "ollm"),
        figure="time_to_first_token_seconds",
        prompt_tokens=2048,
        new_tokens=2,
    ),
    "batch": Workload(
        "32 prompts at once",
        ("3b",),
        ("1/2",),
        ("lamina", "llama_cpp", "accelerate_disk"),
        new_tokens=16,
        sequences=32,
    ),
    "startup": Workload(
        "from the start of the process to the end of an answer of one token",
        ("3b",),
        ("1/2",),
        (*STREAMING, "ollm"),
        figure="wall_seconds",
        new_tokens=1,
    ),
    "fits": Workload(
        "decoding where everything fits, nothing dropped from the page cache",
        ("3b",),
        ("none",),
        ("lamina", "transformers", "llama_cpp"),
        new_tokens=25,
        warm=True,
    ),
    "gpu": Workload(
        "decoding on a GPU under a cap of its memory",
        ("3b", "70b"),
        ("1/3", "2GB"),
        ("lamina", "accelerate_disk", "airllm"),
        on_device=True,
    ),
}

LLAMAS = {"tiny": "tiny", "3b": "llama-3b", "7b": "llama-7b", "8b": "llama-8b", "70b": "llama-70b"}
MIXTURES = ("mixtral-tiny", "qwen3moe-tiny", "mixtral-12gb", "qwen3moe-11gb", "mixtral-8x7b", "qwen3-30b")
SPARSE = ("70b",)
STORES = {"8bit": "Q8_0", "4bit": "Q4_0", "lossless": "BF16"}  # Lamina's compression, and llama.cpp's nearest type
SHARE_OF_BF16 = {"Q8_0": 0.54, "Q4_0": 0.30}


@dataclass(frozen=True)
class Model:
    """One set of weights, and each engine's copy of it below the folder `bench`."""

    name: str
    bench: Path
    compression: str | None  # Lamina reads a store of it, llama.cpp the nearest type of its own

    @property
    def shape(self) -> str:
        return self.name.removesuffix(f"-{self.compression}")

    @property
    def checkpoint(self) -> Path:
        return self.bench / LLAMAS.get(self.shape, self.shape)

    @property
    def for_lamina(self) -> Path:
        return self._sibling(f"-{self.compression}") if self.compression else self.checkpoint

    @property
    def bf16_gguf(self) -> Path:
        return self._sibling(".gguf")

    @property
    def quantized(self) -> str:
        return STORES[self.compression] if self.compression else "BF16"

    @property
    def gguf(self) -> Path:
        return self.bf16_gguf if self.quantized == "BF16" else self._sibling(f".{self.quantized.lower()}.gguf")

    @property
    def airllm_split(self) -> Path:
        return self._sibling("-airllm")

    @property
    def nbytes(self) -> int:
        """What a share of the model is a share of: the checkpoint's bytes, or those of llama.cpp's smaller file."""
        return self.gguf.stat().st_size if self.compression else weight_bytes(self.checkpoint)

    def _sibling(self, ending: str) -> Path:
        return self.checkpoint.with_name(self.checkpoint.name + ending)


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def model_named(name: str, bench: Path) -> Model:
    """The model of a name such as `3b`, `mixtral-12gb` or `3b-8bit`."""
    compression = next((each for each in STORES if name.endswith(f"-{each}")), None)
    model = Model(name, bench, compression)
    if model.shape not in LLAMAS and model.shape not in MIXTURES:
        known = ", ".join((*LLAMAS, *MIXTURES))
        raise MeasuringError(
            f"no model named {name!r}: wanted one of {known}, or one of them with -{' or -'.join(STORES)}"
        )
    return model


def cap_of(text: str, nbytes: int) -> int | None:
    """Bytes: `"1/3"` is a share of the model, `"3GB"` a size, `"none"` no cap."""
    if text == "none":
        return None
    try:
        return int(nbytes * Fraction(text)) if "/" in text else parse_size(text)
    except (ValueError, ZeroDivisionError):
        raise MeasuringError(f"no cap {text!r}: wanted a share such as 1/3, a size such as 3GB, or none") from None


@dataclass(frozen=True)
class Case:
    """A workload on a model under a cap, as one engine is asked to run it."""

    workload: Workload
    model: Model
    cap: int | None
    new_tokens: int

    @property
    def host_cap(self) -> int | None:
        return None if self.workload.on_device else self.cap


@dataclass(frozen=True)
class Engine:
    """How an engine is started.

    Attributes:
        environment: folder under --peers; "" is this interpreter.
        script: below peers/.
        arguments: its own, from a case: several where it is tried again when killed for memory.
        needs: its copy of the weights: `checkpoint`, `store`, `gguf` or `split`.
        slow: has its own number of rounds and tokens.
        whole: runs only where nothing is capped: everything is in memory.
        capped: runs only under a cap.
        fallback: this interpreter may stand in for the environment.
    """

    environment: str
    script: str
    arguments: Callable[[Case], list[list[str]]]
    needs: str = "checkpoint"
    slow: bool = False
    whole: bool = False
    capped: bool = False
    fallback: bool = False

    def python(self, peers: Path) -> str | None:
        """The interpreter; None where peers.sh has not made the environment."""
        own = peers / self.environment / "bin" / "python"
        if self.environment and own.exists():
            return str(own.absolute())
        return sys.executable if self.fallback or not self.environment else None

    def runs_in(self, case: Case) -> bool:
        return not (self.whole and case.cap is not None) and not (self.capped and case.cap is None)

    def commands(self, python: str, case: Case) -> list[list[str]]:
        """Every way it is tried, best first."""
        script = "lamina_batch_run.py" if case.workload.sequences > 1 and self is ENGINES["lamina"] else self.script
        folder = case.model.for_lamina if self.needs == "store" else case.model.checkpoint
        asked = ["--prompt-tokens", str(case.workload.prompt_tokens), "--new-tokens", str(case.new_tokens)]
        many = ["--sequences", str(case.workload.sequences)] if case.workload.sequences > 1 else []
        start = [python, str(HERE / "peers" / script), str(folder), *asked, *many]
        return [start + more for more in self.arguments(case)]


def _lamina(case: Case) -> list[list[str]]:
    startup = ["--startup"] if case.workload.figure == "wall_seconds" else []
    if case.workload.on_device:
        return [[*startup, "--device", "cuda", "--device-memory", str(case.cap)]]
    return [[*startup, *(["--memory", str(case.cap)] if case.cap else [])]]


def _llama_cpp(case: Case) -> list[list[str]]:
    start = ["--gguf", str(case.model.gguf)]
    return [start, [*start, "--no-repack"]]  # some types are repacked for the processor, in memory, whatever the cap


def _accelerate(case: Case) -> list[list[str]]:
    if case.workload.on_device:
        return [["--device-memory", str((case.cap or 0) // share), "--cpu-memory", str(2 * 10**9)] for share in (2, 4)]
    return [["--cpu-memory", str((case.cap or 0) // share)] for share in (3, 6)]


def _airllm(case: Case) -> list[list[str]]:
    return [["--split", str(case.model.airllm_split), *(["--device", "cuda:0"] if case.workload.on_device else [])]]


ENGINES = {
    "lamina": Engine("", "lamina_run.py", _lamina, needs="store"),
    "llama_cpp": Engine("llama_cpp", "llama_cpp_run.py", _llama_cpp, needs="gguf"),
    "llama_cpp_nommap": Engine(
        "llama_cpp", "llama_cpp_run.py", lambda case: [["--gguf", str(case.model.gguf), "--no-mmap"]], needs="gguf"
    ),
    "accelerate_disk": Engine("accelerate", "accelerate_disk_run.py", _accelerate, capped=True, fallback=True),
    "transformers": Engine(
        "accelerate", "accelerate_disk_run.py", lambda case: [["--plain"]], whole=True, fallback=True
    ),
    "airllm": Engine("airllm", "airllm_run.py", _airllm, needs="split", slow=True),
    "airllm_457": Engine("transformers_457", "airllm_run.py", _airllm, needs="split", slow=True),
    "ollm": Engine("transformers_457", "ollm_run.py", lambda case: [[]]),
}


def prepare(engine: Engine, python: str, model: Model) -> None:
    """Write the copy of the weights that an engine reads, unless it is there. None of it is measured.

    Raises:
        MeasuringError: the disk has no room for it, or the engine cannot make it.
    """
    plain = weight_bytes(model.checkpoint)
    if engine.needs == "store" and model.compression:
        asked = lamina_cli.command(
            "split", model.checkpoint, "--to", model.for_lamina, "--compression", model.compression, "--quiet"
        )
        _make("lamina split", asked)
    elif engine.needs == "gguf" and not model.gguf.exists():
        make_base(model, gguf=True)
        if model.gguf != model.bf16_gguf:
            need_disk(model.gguf, int(plain * SHARE_OF_BF16[model.quantized]), model.gguf.name)
            script = str(HERE / "peers" / "llama_cpp_quantize.py")
            _make("llama.cpp's quantizer", [python, script, str(model.bf16_gguf), str(model.gguf), model.quantized])
    elif engine.needs == "split":
        done = sum(file.stat().st_size for file in model.airllm_split.rglob("*") if file.is_file())
        need_disk(model.airllm_split, plain - done, "AirLLM's copy")
        script = str(HERE / "peers" / engine.script)
        split = [python, script, str(model.checkpoint), "--split", str(model.airllm_split), "--prepare"]
        _make("AirLLM's copying", split)


def make_base(model: Model, gguf: bool = False) -> None:
    """The checkpoint itself, and its BF16 copy for llama.cpp where asked."""
    script = "moe_checkpoints.py" if model.shape in MIXTURES else "checkpoints.py"
    make_checkpoint(model.checkpoint, model.shape, sparse=model.shape in SPARSE, gguf=gguf, script=script)


def _make(what: str, command: list[str]) -> None:
    if failure := run_capped(command, drop=False).failure:
        raise MeasuringError(f"{what} failed: {failure}")


def has_gpu() -> bool:
    """Whether torch sees one; in a process of its own, for these scripts stay small."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
