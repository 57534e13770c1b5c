"""GGUF headers as the `gguf` package reads them, and blocks with the bits that it unpacks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from helpers.gguf_files import FAMILIES, blocks, field, header, llama3_divisors, tensor, write_model
from lamina.checkpoint.choose import find_gguf
from lamina.checkpoint.gguf import BLOCK_TYPES, open_gguf
from lamina.codec import codec_for, native
from lamina.codec.gguf_blocks import register_all
from lamina.errors import CheckpointError, UnsupportedError
from lamina.hf.building.gguf import load_gguf

KINDS = [name for name, _, _ in BLOCK_TYPES.values()]
WITH_KERNELS = [name for name in KINDS if not name.startswith(("TQ", "NV"))]


@pytest.fixture(autouse=True)
def registered() -> None:
    register_all()


@pytest.fixture(params=["kernels", "torch"])
def either(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the kernels in C and without."""
    if request.param == "kernels":
        if native.missing():
            pytest.skip(native.missing())
        yield
        return
    with native.switched_off():
        yield


@pytest.mark.parametrize("number", BLOCK_TYPES)
def test_block_sizes_are_those_of_the_package(number: int) -> None:
    name, elements, nbytes = BLOCK_TYPES[number]
    kind = gguf.GGMLQuantizationType(number)
    assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (elements, nbytes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("either")
def test_blocks_are_unpacked_to_the_bits_of_the_package(name: str, dtype: torch.dtype) -> None:
    kind = gguf.GGMLQuantizationType[name]
    rows, columns = 37, 3 * gguf.GGML_QUANT_SIZES[kind][0]
    raw = blocks(kind, (rows, columns), 1)
    wanted = torch.from_numpy(gguf.quants.dequantize(raw, kind)).to(dtype)
    out = torch.full((rows, columns), 7.0, dtype=dtype)
    codec_for(f"gguf.{name}").unpack(torch.from_numpy(raw), rows, columns, out)
    assert wanted.isfinite().all() and wanted.unique().numel() > 4
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("name", WITH_KERNELS)
@pytest.mark.usefixtures("either")
def test_blocks_of_any_bytes_at_any_address_are_unpacked(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    memory = torch.randint(0, 256, (1 + 64 * nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    panels = memory[1:].view(16, 4 * nbytes)
    with np.errstate(all="ignore"):
        wanted = torch.from_numpy(gguf.quants.dequantize(panels.numpy().copy(), kind))
    out = torch.empty(16, 4 * elements)
    codec_for(f"gguf.{name}").unpack(panels, 16, 4 * elements, out)
    assert torch.equal(out.nan_to_num(nan=5.0), wanted.nan_to_num(nan=5.0))


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
@pytest.mark.usefixtures("either")
def test_more_rows_than_are_unpacked_at_once_are_all_unpacked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.codec.gguf_blocks.CHUNK", 512)
    kind = gguf.GGMLQuantizationType[name]
    raw = blocks(kind, (5, 768), 2)
    out = torch.empty(5, 768)
    codec_for(f"gguf.{name}").unpack(torch.from_numpy(raw), 5, 768, out)
    assert torch.equal(out, torch.from_numpy(gguf.quants.dequantize(raw, kind)))


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_products_are_those_of_the_unpacked_rows(name: str) -> None:
    if native.missing():
        pytest.skip(native.missing())
    kind = gguf.GGMLQuantizationType[name]
    columns = 256 + 3 * gguf.GGML_QUANT_SIZES[kind][0]
    raw = blocks(kind, (37, columns), 4)
    weights = torch.from_numpy(gguf.quants.dequantize(raw, kind)).double()
    codec, panels = codec_for(f"gguf.{name}"), torch.from_numpy(raw)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        x = torch.randn(5, columns).to(dtype)
        out = torch.zeros(5, 40, dtype=dtype)[:, 1:38]
        assert codec.linear(x, panels, 37, out)
        wanted, most = x.double() @ weights.T, x.double().abs() @ weights.abs().T
        assert ((out.double() - wanted).abs() <= tolerance * most).all()
        alone = torch.empty(1, 20, dtype=dtype)
        assert codec.linear(x[3:4].contiguous(), panels[6:26], 20, alone)
        assert torch.equal(alone[0], out[3, 6:26])


def test_many_tokens_are_left_to_torch() -> None:
    panels = torch.zeros(4, 34, dtype=torch.uint8)
    assert not codec_for("gguf.Q8_0").linear(torch.zeros(9, 32), panels, 4, torch.empty(9, 4))
    panels = torch.zeros(4, 66, dtype=torch.uint8)
    assert not codec_for("gguf.TQ2_0").linear(torch.zeros(1, 256), panels, 4, torch.empty(1, 4))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("shape", [(3, 34), (4, 33), (4, 68)])
def test_panels_of_another_size_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(CheckpointError, match=r"4 rows of 32 columns in gguf\.Q8_0 are 4 panels of 34 bytes, here are"):
        codec_for("gguf.Q8_0").unpack(torch.zeros(shape, dtype=torch.uint8), 4, 32, torch.empty(4, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_elements_come_from_any_address(dtype: torch.dtype) -> None:
    values = torch.randn(3, 8).to(dtype)
    memory = torch.cat([torch.zeros(1, dtype=torch.uint8), values.view(torch.uint8).flatten()])
    out = torch.empty(3, 8, dtype=torch.float32)
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    codec_for(f"gguf.{name}").unpack(memory[1:].view(3, -1), 3, 8, out)
    assert torch.equal(out, values.float())


def test_a_header_says_what_the_package_reads(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen2moe", ("Q4_K", "F16", "Q8_0"))
    file, reader = open_gguf(path), gguf.GGUFReader(path)
    assert len(file.checkpoint.tensors) == len(reader.tensors) > 20
    for wanted in reader.tensors:
        entry = file.checkpoint.tensors[wanted.name]
        assert entry.shape == tuple(reversed(wanted.shape.tolist()))
        assert (entry.extent.offset, entry.extent.length) == (wanted.data_offset, wanted.n_bytes)
        stored = entry.encoding.codec.removeprefix("gguf.") if entry.encoding else entry.dtype
        assert stored == wanted.tensor_type.name
        if entry.encoding:
            rows = int(np.prod(entry.shape[:-1]))
            assert (entry.encoding.panel_rows, entry.encoding.panel_bytes * rows) == (1, wanted.n_bytes)
    for key, wanted_field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        value = wanted_field.contents()
        assert file.fields[key].value == (len(value) if isinstance(value, list) else value)
    assert file.get("qwen2moe.expert_count") == 4
    assert file.get("tokenizer.ggml.tokens") is None  # an array


def test_scalars_arrays_and_alignment_of_version_two(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    fields = [field("general.architecture", "llama"), field("general.alignment", 64)]
    raw = header(fields, [tensor("a", [3], 0, 0), tensor("b", [2, 3], 1, 64)], version=2, alignment=64)
    path.write_bytes(raw + bytes(64 + 12))
    file = open_gguf(path)
    a, b = file.checkpoint.tensors["a"], file.checkpoint.tensors["b"]
    assert (a.shape, a.extent.offset, a.extent.length, a.dtype) == ((3,), len(raw), 12, "F32")
    assert (b.shape, b.extent.offset, b.extent.length, b.dtype) == ((3, 2), len(raw) + 64, 12, "F16")
    assert file.checkpoint.nbytes == 24


def split(folder: Path, count: int = 2) -> list[Path]:
    paths = [folder / f"big-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        fields = [field("split.count", count), field("general.architecture", "llama")]
        path.write_bytes(header(fields, [tensor(f"t{number}", [8], 0, 0)]) + bytes(32))
    return paths


def test_any_part_of_a_split_model_stands_for_all(tmp_path: Path) -> None:
    paths = split(tmp_path)
    for path in paths:
        file = open_gguf(path)
        assert set(file.checkpoint.tensors) == {"t0", "t1"}
        assert file.checkpoint.files == tuple(map(str, paths))
        assert file.path == str(paths[0])
        assert set(file.checkpoint.fingerprints) == set(map(str, paths))


def test_a_folder_means_its_only_gguf_model(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None
    paths = split(tmp_path)
    assert find_gguf(tmp_path) == str(paths[0])
    (tmp_path / "mmproj-model.gguf").touch()
    assert find_gguf(tmp_path) == str(paths[0])
    assert find_gguf(paths[1]) == str(paths[1])
    assert find_gguf(tmp_path / "absent.gguf") is None
    (tmp_path / "other.gguf").touch()
    with pytest.raises(UnsupportedError, match=r"holds 2 GGUF models and .* as in .*:big-00001-of-00002\.gguf'"):
        find_gguf(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert find_gguf(tmp_path) is None


def test_sizes_that_transformers_leaves_at_a_default_come_from_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen2moe", ("Q8_0",))
    config = load_gguf(path, {}).config
    assert config.moe_intermediate_size == FAMILIES["qwen2moe"]["expert_feed_forward_length"] == 256
    assert config.shared_expert_intermediate_size == 512
    assert load_gguf(write_model(tmp_path / "3", "qwen3"), {}).config.head_dim == 64


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [(("Q4_K", "F32"), torch.bfloat16), (("F16", "F32"), torch.float16), (("BF16",), torch.bfloat16),
     (("F32",), torch.float32), (("F16", "Q8_0"), torch.bfloat16)],
)  # fmt: skip
def test_the_dtype_is_the_files_own_or_the_one_asked_for(
    kinds: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    path = write_model(tmp_path, "qwen2", kinds)
    assert load_gguf(path, {}).config.dtype == dtype
    assert load_gguf(path, {"dtype": "auto"}).config.dtype == dtype
    assert load_gguf(path, {"dtype": torch.float64}).config.dtype == torch.float64


def test_only_the_queries_and_keys_of_llama_have_an_order(tmp_path: Path) -> None:
    model = load_gguf(write_model(tmp_path, "llama", ("Q8_0", "F16")), {})
    assert set(model.checkpoint.row_orders) == {f"blk.{i}.attn_{w}.weight" for i in range(2) for w in "qk"}
    assert model.checkpoint.row_orders["blk.0.attn_q.weight"][:4] == (0, 2, 4, 6)
    assert all(model.checkpoint.tensors[name].encoding for name in model.checkpoint.row_orders)


def test_an_answer_ends_at_any_token_that_ends_a_turn(tmp_path: Path) -> None:
    model = load_gguf(write_model(tmp_path, "llama"), {})
    assert model.stops == (2, 3)
    assert model.generation_config().eos_token_id == [2, 3]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_the_tokenizer_is_transformers_own(family: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, family)
    tokenizer, wanted = (
        load_gguf(path, {}).load_tokenizer(),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name),
    )
    assert type(tokenizer) is type(wanted)
    assert tokenizer("a!&!!z") == wanted("a!&!!z")
    assert tokenizer.special_tokens_map == wanted.special_tokens_map


def test_reading_a_model_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "model", "llama")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    load_gguf(path, {})
    assert os.listdir(tmp_path) == ["model"]


def rotations(path: Path) -> dict[str, object]:
    rope: dict[str, object] = load_gguf(path, {}).config.rope_parameters
    return rope


def test_llama_3_divides_its_frequencies(tmp_path: Path) -> None:
    divisors = llama3_divisors(32.0)
    assert 1 < sorted(divisors)[-3] <= 32 and (divisors == 1).any()
    rope = rotations(write_model(tmp_path, "llama", extra={"rope_freqs.weight": divisors}))
    assert rope["rope_type"] == "llama3" and rope["factor"] == 32.0 and rope["rope_theta"] == 10000.0
    others = np.linspace(1, 3, 32, dtype=np.float32)
    rope = rotations(write_model(tmp_path, "llama", extra={"rope_freqs.weight": others}))
    assert rope["rope_type"] == "longrope" and rope["long_factor"] == others.tolist() and rope["attention_factor"] == 1
    assert rotations(write_model(tmp_path, "llama", extra={"rope_freqs.weight": np.ones(32, np.float32)})) == {
        "rope_type": "default",
        "rope_theta": 10000.0,
    }


def test_other_rotations_are_the_files(tmp_path: Path) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    rope = rotations(write_model(tmp_path, "qwen2", more=yarn))
    assert rope["rope_type"] == "yarn" and rope["factor"] == 4.0 and rope["original_max_position_embeddings"] == 32
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    rope = rotations(write_model(tmp_path, "gemma3", more=linear))
    assert rope["full_attention"]["rope_type"] == "linear" and rope["full_attention"]["factor"] == 8.0  # type: ignore[index]
    assert rope["sliding_attention"]["rope_type"] == "default"  # type: ignore[index]
    factors = np.linspace(1, 2, 24, dtype=np.float32)
    extra = {"rope_factors_short.weight": factors, "rope_factors_long.weight": 2 * factors}
    more = {
        "rope.dimension_count": 48,
        "rope.scaling.attn_factor": 1.5,
        "rope.scaling.original_context_length": 32,
    }
    rope = rotations(write_model(tmp_path, "phi3", more=more, extra=extra))
    assert rope["rope_type"] == "longrope" and rope["partial_rotary_factor"] == 0.75
    assert rope["long_factor"] == (2 * factors).tolist() and rope["short_factor"] == factors.tolist()
    assert rope["attention_factor"] == 1.5 and rope["original_max_position_embeddings"] == 32


def test_the_largest_gemmas_scale_by_their_width(tmp_path: Path) -> None:
    assert load_gguf(write_model(tmp_path, "gemma2"), {}).config.query_pre_attn_scalar == 256
    assert load_gguf(write_model(tmp_path, "gemma2", more={"block_count": 46}), {}).config.query_pre_attn_scalar == 64
