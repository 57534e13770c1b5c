"""The command line over a double of the library: what reaches it, what comes out, and with which exit code."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import lamina
from helpers.cli_double import Library, Model, NoTokenizer, Tokenizer
from lamina.cli import library as engine
from lamina.cli import options
from lamina.cli.main import main
from lamina.errors import BudgetError, CheckpointError, LaminaError, ReadError, RequestError, UnsupportedError


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    double = Library()
    monkeypatch.setattr(engine, "library", lambda options: double)
    monkeypatch.setattr(engine, "token_inputs", lambda model, ids: {"input_ids": np.array([ids])})
    return double


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: str, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return call


def one_line(result: Result) -> str:
    """The error line, once it is sure that there is only one and nothing else."""
    lines = [line for line in result.err.splitlines() if line != "a library prints to stdout"]
    assert len(lines) == 1 and lines[0].startswith("lamina: "), result.err
    assert "Traceback" not in result.err
    return lines[0]


def test_run_writes_the_continuation_to_stdout_and_the_summary_to_stderr(run: Run, library: Library) -> None:
    result = run("run", "m", "The capital of France is", "--memory", "640MB")
    assert result.code == 0
    assert result.out.endswith(" Paris.\n")
    assert library.model.prompts == ["The capital of France is"]
    assert library.opened == [{"model": "m", "memory": 640_000_000}]
    assert "7 tokens · 0.5 s/token" in result.err
    assert "peak 612 MB of 640 MB" in result.err
    assert library.model.lamina.closed


def test_json_makes_stdout_one_object(run: Run, library: Library) -> None:
    result = run("run", "m", "Hi", "--json")
    answer = json.loads(result.out)
    assert answer["text"] == " Paris."
    assert answer["tokens"] == list(b" Paris.")
    assert answer["stats"]["peak_rss_bytes"] == 612_000_000
    assert answer["stats"]["read_bytes_per_second"] is None, "NaN is not JSON"
    assert "a library prints to stdout" in result.err


@pytest.mark.parametrize("command", ["plan", "bench"])
def test_plan_and_bench_print_a_table_or_one_object(run: Run, library: Library, command: str) -> None:
    table = run(command, "m")
    assert table.code == 0
    assert len(table.out.splitlines()) >= 3
    parsed = json.loads(run(command, "m", "--json").out)
    assert parsed.keys() >= ({"model_bytes"} if command == "plan" else {"disk_fraction"})


def test_bench_hands_on_what_to_generate(run: Run, library: Library) -> None:
    run("bench", "m", "--prompt-ids", "5,6", "--new-tokens", "3")
    assert library.opened == [{"model": "m", "prompt_tokens": 16, "new_tokens": 3, "prompt_ids": [5, 6]}]


def test_bench_profile_says_where_the_time_goes_and_where_the_trace_is(run: Run, library: Library) -> None:
    table = run("bench", "m", "--profile", "--trace", "t.json").out
    asked = {"profile": True, "trace": "t.json"}
    assert library.opened == [{"model": "m", "prompt_tokens": 16, "new_tokens": 8, "prompt_ids": None, **asked}]
    rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in table.splitlines() if "  " in line.strip())
    assert rows["waiting for the disk"] == "0.4 s  80.0%"
    assert rows["lamina's Python"] == "0.002 s  0.4%  (pump 0.001 s, finish 0.0005 s, acquire 0.0003 s, ...)"
    assert rows["Python of a pass"] == "0.007 s  1.4%"
    assert rows["disk at work"] == "98%"
    assert rows["read at, while at work"] == "1.50 GB/s"
    assert "trace: /t/trace.json (2.00 MB, 5 operations below 2 microseconds left out)" in table
    assert "https://ui.perfetto.dev" in table
    as_json = run("bench", "m", "--profile", "--json")
    assert json.loads(as_json.out)["profile"]["seconds"]["waiting_for_disk"] == 0.4
    assert "trace: /t/trace.json" in as_json.err
    assert "trace" not in run("bench", "m", "--profile", "--json", "--quiet").err


def test_every_option_reaches_from_pretrained_under_its_own_name(run: Run, library: Library) -> None:
    options = {
        "device_memory": "2GiB",
        "device": "cpu",
        "context": "512",
        "compression": "8bit",
        "draft": "none",
        "dtype": "float32",
        "attn_implementation": "eager",
        "revision": "v1",
        "gguf_file": "a.gguf",
        "cache_dir": "/c",
        "token": "t",
    }
    flat = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    assert run("run", "m", "Hi", *flat, "--offline", "--trust-remote-code").code == 0
    wanted: dict[str, Any] = {**options, "device_memory": 2 * 2**30, "context": 512}
    assert library.opened == [{"model": "m", **wanted, "local_files_only": True, "trust_remote_code": True}]


def test_sampling_is_off_until_asked_for(run: Run, library: Library) -> None:
    run("run", "m", "Hi")
    assert library.model.generate_kwargs["do_sample"] is False
    assert library.model.generate_kwargs["temperature"] is None
    run("run", "m", "Hi", "--temperature", "0")
    assert library.model.generate_kwargs["do_sample"] is False
    run("run", "m", "Hi", "--temperature", "0.7", "--top-k", "5")
    assert library.model.generate_kwargs.items() >= {"do_sample": True, "temperature": 0.7, "top_k": 5}.items()
    assert "top_p" not in library.model.generate_kwargs


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_the_prompt_comes_from_a_pipe(run: Run, library: Library, arguments: tuple[str, ...]) -> None:
    assert run("run", "m", *arguments, stdin="two\nlines\n").code == 0
    assert library.model.prompts == ["two\nlines"]


def test_without_a_prompt_a_terminal_is_not_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.StringIO()
    stdin.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(SystemExit, match="2"):
        main(["run", "m"])
    assert "no prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "m", ""),
        ("run", "m"),
        ("run", "m", "Hi", "--prompt-ids", "1"),
        ("run", "m", "--prompt-ids", ""),
        ("run", "m", "--prompt-ids", "1,,2"),
        ("run", "m", "--prompt-ids", "1,x"),
        ("run", "m", "--prompt-ids", "-1"),
        ("run", "m", "--prompt-ids", "1", "--chat"),
        ("bench", "m", "--prompt-ids", "1;2"),
        ("bench", "m", "--trace", "t.json"),
        ("run", "m", "Hi", "--memory", "4XB"),
        ("plan", "m", "--device-memory", "0"),
        ("plan", "m", "--memory", "4"),
        ("bench", "m", "--memory", "nan"),
        ("run", "m", "Hi", "--dtype", "int3"),
        ("run", "m", "Hi", "--compression", "9bit"),
        ("plan", "m", "--compression", "9bit"),
        ("run", "m", "Hi", "--threads", "9999"),
        ("chat", "m", "--threads", "9999"),
        ("plan", "m", "--threads", "9999"),
        ("bench", "m", "--threads", "9999"),
        ("split", "m", "--threads", "9999"),
        ("split", "m", "--compression", "9bit"),
        ("split", "m", "--to", __file__),
        ("run", "m", "Hi", "--cache-dir", __file__),
        ("split", "m", "--cache-dir", __file__),
        ("run", "m", "Hi", "--seed", "-1"),
        ("run", "m", "Hi", "--seed", str(2**64)),
        ("run", "m", "Hi", "--temperature", "nan"),
        ("run", "m", "Hi", "--temperature", "1e-300"),
        ("run", "", "Hi"),
        ("plan", ""),
        ("verify", ""),
        ("split", "m", "--to", ""),
        ("bench", "m", "--new-tokens", "1"),
        ("chat", "m", "--top-p", "nan"),
        ("run", "m", "Hi", "--temperature", "inf"),
        ("run", "m", "Hi", "--context", str(10**12)),
        ("run", "m", "Hi", "--max-new-tokens", str(10**12)),
        ("bench", "m", "--prompt-tokens", str(10**12)),
        ("bench", "m", "--new-tokens", str(10**12)),
        ("run", "m", "--prompt-ids", "1," + "9" * 5000),
        ("bench", "m", "--profile", "--trace", "/no/such/folder/t.json"),
        ("bench", "m", "--profile", "--trace", "/"),
        ("run", "m", "bytes that are not text: \udcff"),
        ("chat", "m", "--system", "\udcff"),
        ("run", "m", "Hi", "--max-new-tokens", "0"),
        ("run", "m", "Hi", "--temperature", "-1"),
        ("run", "m", "Hi", "--threads", "few"),
        ("run", "m", "Hi", "--no-such-option"),
        ("run",),
        ("no-such-command",),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(run: Run, library: Library, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert len(one_line(result)) < 300
    assert library.opened == [], "it is answered before anything is opened"


@pytest.mark.parametrize("command", [("run", "m", "Hi"), ("chat", "m"), ("plan", "m"), ("bench", "m"), ("split", "m")])
def test_four_threads_a_processor_are_the_most(
    run: Run, library: Library, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    result = run(*command, "--threads", "9")
    assert result.code == 2
    assert one_line(result) == "lamina: --threads 9 is too many for the 2 processors here: give at most 8"
    options.check_threads(8)


def test_bytes_that_are_not_text_are_refused_as_a_prompt(
    library: Library, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff\xfe"), errors="surrogateescape"))
    with pytest.raises(SystemExit, match="2"):
        main(["run", "m"])
    line = "lamina: the prompt on standard input is not UTF-8 text: byte 3 of 4 is 0xff\n"
    assert capsys.readouterr().err == line
    assert library.opened == []


@pytest.mark.parametrize("config", [{"vocab_size": 100}, {"text_config": {"vocab_size": 100}}])
@pytest.mark.parametrize("command", ["run", "bench"])
def test_a_token_that_the_model_does_not_have_is_refused_before_it_is_opened(
    run: Run, library: Library, tmp_path: Path, command: str, config: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run(command, str(tmp_path), "--prompt-ids", "1,2,99999999")
    assert result.code == 2
    assert one_line(result).endswith("--prompt-ids: this model has no token 99999999, its tokens are 0 to 99")
    assert library.opened == []
    assert run(command, str(tmp_path), "--prompt-ids", "1,2,99").code == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("no"), 2),
        (UnsupportedError("compression='8bit' is not there yet"), 2),
        (BudgetError("needs 400 MB", minimum_bytes=400), 2),
        (LaminaError("no"), 1),
        (CheckpointError("header\nof two lines"), 1),
        (ReadError("the disk is gone"), 1),
        (ValueError("a bug"), 1),
        (AssertionError(), 1),
        (MemoryError(), 1),
    ],
)
@pytest.mark.parametrize("command", [("run", "m", "Hi"), ("run", "m", "Hi", "--json"), ("plan", "m"), ("bench", "m")])
def test_an_error_is_one_line_and_its_exit_code(
    run: Run, library: Library, error: Exception, code: int, command: tuple[str, ...]
) -> None:
    library.error = error
    result = run(*command)
    assert result.code == code
    assert " ".join(str(error).split()) in one_line(result)
    assert "--debug" in result.err or isinstance(error, LaminaError)


def test_debug_shows_the_traceback(run: Run, library: Library) -> None:
    library.error = ReadError("the disk is gone")
    result = run("run", "m", "Hi", "--debug")
    assert result.code == 1
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1] == "lamina: the disk is gone"


def test_ctrl_c_is_one_line_and_exit_130(run: Run, library: Library) -> None:
    def press(index: int) -> None:
        if index == 2:
            raise KeyboardInterrupt

    library.model.before_token = press
    result = run("run", "m", "Hi")
    assert result.code == 130
    assert result.err.splitlines()[-1] == "lamina: interrupted"
    assert library.model.lamina.closed


def test_token_ids_need_no_tokenizer(run: Run, library: Library) -> None:
    library.model = Model(answer="ab", tokenizer=NoTokenizer())
    result = run("run", "m", "--prompt-ids", "65,66", "--quiet")
    assert result.out.splitlines()[-1] == "97,98"
    answer = json.loads(run("run", "m", "--prompt-ids", "65,66", "--json").out)
    assert answer["text"] is None
    assert answer["tokens"] == [97, 98]
    assert library.model.prompts == ["AB", "AB"]


def test_a_text_prompt_needs_one(run: Run, library: Library) -> None:
    library.model = Model(tokenizer=NoTokenizer())
    result = run("run", "m", "Hi")
    assert result.code == 2
    assert "no tokenizer" in one_line(result)


def test_the_chat_template_is_applied_only_when_asked_for(run: Run, library: Library) -> None:
    run("run", "m", "Hi", "--chat")
    run("run", "m", "Hi")
    assert library.model.prompts == ["user:Hi", "Hi"]


def test_chat_without_a_template_is_a_wrong_request(run: Run, library: Library) -> None:
    library.model = Model(tokenizer=Tokenizer(chat_template=None))
    for command in (["run", "m", "Hi", "--chat"], ["chat", "m"]):
        result = run(*command)
        assert result.code == 2
        assert "no chat template" in result.err


@pytest.mark.parametrize("command", [("run", "m", "Hi"), ("run", "m", "Hi", "--json"), ("plan", "m"), ("bench", "m")])
def test_a_stdout_that_nobody_reads_is_no_failure(
    run: Run, library: Library, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        result = run(*command, "--quiet")
    assert result.code == 0
    assert result.err.replace("a library prints to stdout\n", "") == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a file that is always full")
@pytest.mark.parametrize("command", [("run", "m", "Hi"), ("run", "m", "Hi", "--json"), ("plan", "m"), ("bench", "m")])
def test_a_full_disk_under_stdout_is_one_line_and_exit_1(
    run: Run, library: Library, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        result = run(*command, "--quiet")
    assert result.code == 1
    assert one_line(result) == "lamina: cannot write the result: No space left on device"


def test_quiet_leaves_stderr_empty(run: Run, library: Library) -> None:
    assert run("run", "m", "Hi", "--quiet", "--json").err == "a library prints to stdout\n"


def test_no_arguments_show_the_help(run: Run) -> None:
    result = run()
    assert result.code == 0
    assert "Commands:" in result.out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["run", "--help"], 0),
        (["chat", "--help"], 0),
        (["plan", "--help"], 0),
        (["bench", "--help"], 0),
        (["run"], 2),
        (["run", "m", "Hi", "--memory", "nonsense"], 2),
        (["run", "m", "--prompt-ids", "x"], 2),
    ],
)
def test_help_and_mistakes_are_answered_without_torch(arguments: list[str], code: int) -> None:
    script = (
        "import sys\n"
        "from lamina.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print({'torch', 'transformers', 'numpy', 'huggingface_hub', 'rich'} & set(sys.modules))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(lamina.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


def test_every_command_shows_examples(run: Run) -> None:
    for command in ("run", "chat", "plan", "bench", "split", "verify"):
        help_text = run(command, "--help").out
        assert help_text.count(f"  lamina {command} ") >= 2, command
    everything = run("--help").out
    assert everything.count("  lamina ") >= 3
    assert "..." not in everything.partition("Commands:")[2], "each command's line is whole"


def test_a_command_that_is_nearly_right_is_named(run: Run) -> None:
    assert "'chat'" in one_line(run("chta", "m"))
    assert "--memory" in one_line(run("run", "m", "Hi", "--memroy", "4GB"))
