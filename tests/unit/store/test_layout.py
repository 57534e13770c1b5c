"""Where the tensors of a store lie in its files, and which codec the head gets: from sizes alone."""

from __future__ import annotations

from pathlib import Path

from lamina.store import recipe
from lamina.store import shards as layout
from lamina.store.shards import Run, Stored, file_nbytes, header_of, make_files


def test_4bit_gives_the_head_what_the_share_leaves() -> None:
    def runs(head_rows: int) -> list[Run]:
        linear = Stored("linear", "BF16", (4096, 4096), "q4", 1, recipe.AFFINE["q4"].panel_bytes(4096))
        return [Run("layer", (linear,)), Run("", (Stored("head", "BF16", (head_rows, 4096), "q8", 1, 1),))]

    use = recipe._Use("head", ("head",), recipe.Role.HEAD, ())
    for rows, expected in ((64, "q8"), (1024, "q5"), (8192, "q4")):
        fitted = recipe._fit_head(runs(rows), {"head": ("q8", 1)}, [use])
        whole = sum(run.nbytes for run in fitted)
        assert fitted[1].tensors[0].codec == expected, rows
        assert expected == "q4" or whole <= recipe.FOUR_BIT_SHARE * 2 * 4096 * (4096 + rows)


def test_large_runs_begin_at_aligned_bytes_and_small_ones_where_torch_can_see_them() -> None:
    def run(name: str, rows: int, dtype: str = "BF16", codec: str = "plain") -> Run:
        return Run("layer", (Stored(name, dtype, (rows, 1001), codec, 1 if codec != "plain" else 0, 77),))

    runs = [run("a", 3), run("b", 999, codec="q8"), run("c", 500), run("d", 1, "F32")]
    prefix, places = header_of(make_files(runs, padded=True)[0])
    assert len(prefix) % layout.ALIGNMENT == 0
    assert places["b"][0] % layout.ALIGNMENT == places["c"][0] % layout.ALIGNMENT == 0
    assert places["a"][0] % 8 == places["d"][0] % 8 == 0
    runs = [run("a", 3), run("d", 3, "F32"), run("e", 4096)]
    _, places = header_of(make_files(runs, padded=False)[0])
    assert set(places) == {"a", "d", "e"} and places["e"][0] == 0
    assert places["d"][0] % 4 == places["a"][0] % 2 == 0


def test_the_size_of_a_file_is_that_of_its_layout(tmp_path: Path) -> None:
    run = Run("", (Stored("x", "BF16", (7, 33)),))
    (file,) = make_files([run], padded=True)
    assert file_nbytes(file) == layout.ALIGNMENT + 7 * 33 * 2
