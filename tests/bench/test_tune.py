import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tests.kernels.resources import Layer, _steps, tiles_of
from triton.runtime import JITFunction
from triton.runtime.errors import OutOfResources

from nsa.bench import tune
from nsa.bench.shapes import SHAPES
from nsa.bench.split import KernelTime
from nsa.bench.tune import (
    ELSEWHERE,
    ON_HOPPER,
    TUNABLES,
    best_tile,
    difference,
    merged,
    using,
    write_table,
)
from nsa.ops.launch import tuned
from nsa.ops.launch.tuned import Tile

CPU = torch.device("cpu")
LIKE = {"key_dim": 128, "value_dim": 128, "group": 16}
RIGHT = torch.arange(6.0).view(2, 3)


@pytest.fixture
def table():
    """The launch table of an architecture that has none; what a test puts there goes again."""
    tuned.table.cache_clear()
    yield tuned.table("sm70")
    tuned.table.cache_clear()


USED = Tile(16, 16, 1, 1)


def try_tiles(monkeypatch, results, kernel="dq", used=9.0, like=LIKE):
    """``results``: milliseconds of the first tiles, or what running one raises or returns.

    ``used``: milliseconds of the tile in use.
    """
    tunable = TUNABLES[kernel]
    tunable = tunable._replace(tiles=tunable.tiles[: len(results)])
    monkeypatch.setitem(TUNABLES, kernel, tunable)
    outcomes = {USED: used, **dict(zip(map(Tile._make, tunable.tiles), results, strict=True))}
    tuned.table("sm70")[kernel] = [{**like, "tile": list(USED)}]
    if kernel == "block_scores":
        tuned.table("sm70")[kernel][0]["value_dim"] = 0
    monkeypatch.setattr(tuned, "capability", lambda _: 7)

    def outcome():
        return outcomes[Tile(*tuned.table("sm70")[kernel][0]["tile"])]

    def step():
        if isinstance(outcome(), Exception):
            raise outcome()
        return (outcome() if isinstance(outcome(), torch.Tensor) else RIGHT,)

    def profile(_call, _device):
        return [] if outcome() is None else [KernelTime(tunable.function, 1, outcome())]

    monkeypatch.setattr(tune, "kernel_times", profile)
    monkeypatch.setattr(tune, "device_name", lambda _: "a GPU")
    console = Console(file=io.StringIO(), width=200)
    best = best_tile(kernel, {tunable.step: step}, like, "sm70", CPU, console)
    return best, console.file.getvalue()


def test_the_fastest_right_tile_wins(monkeypatch, table):
    results = [3.0, OutOfResources(300, 227, "shared memory"), RIGHT * 2, 2.0, 5.0, 4.0]
    best, printed = try_tiles(monkeypatch, results)
    assert best["tile"] == list(TUNABLES["dq"].tiles[3])
    assert (best["ms"], best["gpu"]) == (2.0, "a GPU")
    assert {name: best[name] for name in LIKE} == LIKE
    assert "[16, 16, 1, 1] (in use): 9.00 ms" in printed
    assert "out of resource: shared memory" in printed
    assert "output 0 is off by 1.0e+00" in printed
    assert table["dq"] == [{**LIKE, "tile": list(USED)}]


@pytest.mark.parametrize(
    ("used", "kept"), [pytest.param(2.03, True, id="tie"), pytest.param(2.05, False, id="gain")]
)
def test_a_tie_keeps_the_tile_in_use(monkeypatch, table, used, kept):
    best, _ = try_tiles(monkeypatch, [3.0, 4.0, 2.0, 2.5, 5.0, 6.0], used=used)
    tile, milliseconds = (list(USED), used) if kept else (list(TUNABLES["dq"].tiles[2]), 2.0)
    assert (best["tile"], best["ms"]) == (tile, milliseconds)


def test_without_a_tile_that_runs_there_is_no_entry(monkeypatch, table):
    best, _ = try_tiles(monkeypatch, [RuntimeError("no")] * 6, used=RIGHT)
    assert best is None


def test_a_tile_that_the_profiler_misses_does_not_win(monkeypatch, table):
    best, printed = try_tiles(monkeypatch, [3.0, None, 4.0, 4.0, 5.0, 6.0])
    assert best["ms"] == 3.0
    assert "not seen by the profiler" in printed


@pytest.mark.parametrize(
    ("registers", "problem"),
    [pytest.param(4, None, id="few"), pytest.param(5, "spills 20 bytes a thread", id="many")],
)
def test_a_tile_that_spills_is_no_candidate(monkeypatch, registers, problem):
    """Of another kernel that the step starts, spills do not count."""

    def run(self, **arguments):
        return SimpleNamespace(n_spills=registers if self.__name__ == "dq_kernel" else 99)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(tune, "kernel_times", lambda *_: [KernelTime("dq_kernel", 1, 2.0)])

    def step():
        for name in ("dq_kernel", "other_kernel"):
            JITFunction.run(SimpleNamespace(__name__=name), x=1)
        return (RIGHT,)

    assert tune.measure(step, (RIGHT,), "dq_kernel", CPU) == (problem or 2.0)
    assert JITFunction.run is run


def test_scores_have_no_values(monkeypatch, table):
    best, _ = try_tiles(monkeypatch, [1.0, 2.0, 3.0, 4.0, 5.0], kernel="block_scores")
    assert best["value_dim"] == 0


def test_tiles_that_the_launches_make_one_are_tried_once(monkeypatch, table):
    # A token has one row, and 64 bits stand for as many tokens at most: 128 rows become 64.
    results = [3.0, 3.0, 2.0, 4.0, 4.0, 1.0]
    best, printed = try_tiles(monkeypatch, results, like={**LIKE, "group": 1})
    assert best["tile"] == [64, 64, 8, 2]
    assert len(printed.splitlines()) == 6
    assert "128, 64, 8, 2" not in printed


@pytest.mark.parametrize(
    ("started", "reason"),
    [
        pytest.param(["hopper_dq_kernel"], ": hopper_dq_kernel takes them", id="hopper"),
        pytest.param(["all_blocks_kernel"], "", id="short"),
    ],
)
def test_a_kernel_that_is_not_started_is_skipped(monkeypatch, tmp_path, table, started, reason):
    calls = []

    def profile(call, _device):
        calls.append(call)
        return [KernelTime(name, 1, 1.0) for name in started]

    def nothing():
        raise AssertionError("ran a step")

    steps = dict.fromkeys(("compressed", "select", "tokens", "backward"), nothing)
    monkeypatch.setattr(tune, "kernel_times", profile)
    monkeypatch.setattr(tune, "problem", lambda *_: (steps, LIKE))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    console = Console(file=io.StringIO(), width=200)
    output = tmp_path / "table.json"
    written = tune.tune(
        ["tiny"], ["dq"], seq_len=64, device=torch.device("cuda"), console=console, output=output
    )
    assert written is None
    assert not output.exists()
    assert calls == [nothing]
    printed = console.file.getvalue().rstrip("\n")
    assert printed == f"dq {LIKE}: not started on these sizes{reason}"


def started_on(shape, capability):
    """Kernels that training a layer of a shape starts, as the launches themselves choose."""
    heads, dims = (shape.num_heads, shape.num_kv_heads), (shape.key_dim, shape.value_dim)
    layer = Layer(heads=heads, dims=dims, seq_len=32768, config=shape.config)
    with tiles_of(capability):
        steps = _steps(layer)
    return {item.kernel.__name__ for name in ("forward", "backward") for item in steps[name]}


@pytest.mark.parametrize(
    ("shapes", "capability"),
    [pytest.param(ON_HOPPER, 90, id="hopper"), pytest.param(ELSEWHERE, 80, id="elsewhere")],
)
def test_default_shapes_start_every_kernel_of_the_table(shapes, capability):
    functions = {tunable.function for tunable in TUNABLES.values()}
    started = [started_on(SHAPES[name], capability) & functions for name in shapes]
    assert all(started)
    assert set().union(*started) == functions


def test_a_kernel_of_hopper_is_named_as_it_is_started():
    started = started_on(SHAPES["paper-d128"], 90)
    for tunable in TUNABLES.values():
        assert tunable.function not in started
        assert tunable.hopper in started


@pytest.mark.parametrize(
    ("got", "expected", "problem"),
    [
        pytest.param(RIGHT, RIGHT * 1.01, None, id="rounding"),
        pytest.param(RIGHT, RIGHT * 1.1, "output 0 is off by 9.1e-02", id="off"),
        pytest.param(RIGHT / 0, RIGHT, "output 0 is finite elsewhere", id="nan"),
        pytest.param(
            torch.tensor([1, 2, 3, 4]),
            torch.tensor([1, 2, 3, 5]),
            "output 0 agrees in 75.0% of entries only",
            id="choice",
        ),
    ],
)
def test_results_are_compared_with_those_of_the_tile_in_use(got, expected, problem):
    assert difference((got,), (expected,)) == problem


def test_minus_infinity_in_the_same_place_is_no_difference():
    lse = torch.tensor([-torch.inf, 1.0])
    assert difference((lse,), (lse.clone(),)) is None


def test_the_launches_read_the_entry_in_use(table):
    entry = {**LIKE, "tile": [1, 2, 3, 4]}
    with using("sm70", "dq", entry):
        assert tuned.table("sm70")["dq"] == [entry]
    assert "dq" not in table
    table["dq"] = before = [{**LIKE, "tile": [5, 6, 7, 8]}]
    with pytest.raises(ZeroDivisionError), using("sm70", "dq", entry):
        raise ZeroDivisionError
    assert table["dq"] is before


def test_an_entry_replaces_that_of_its_sizes():
    other = {**LIKE, "group": 8, "tile": [1, 1, 1, 1]}
    old = {**LIKE, "tile": [2, 2, 2, 2]}
    wide = {**LIKE, "key_dim": 256, "tile": [3, 3, 3, 3]}
    new = {**LIKE, "tile": [4, 4, 4, 4]}
    assert merged([old, other, wide], new) == [wide, other, new]


@pytest.mark.parametrize(
    ("group", "found"),
    [
        pytest.param(1, Tile(16, 2, 2, 2), id="smaller"),
        pytest.param(2, Tile(16, 2, 2, 2), id="measured"),
        pytest.param(4, Tile(32, 8, 8, 8), id="between"),
        pytest.param(16, Tile(32, 8, 8, 8), id="larger"),
        pytest.param(32, Tile(32, 8, 8, 8), id="as-many-as-rows"),
        pytest.param(64, Tile(64, 32, 4, 2), id="more-than-rows"),
    ],
)
def test_other_groups_take_the_tile_of_the_nearest_that_has_rows_for_them(
    monkeypatch, table, group, found
):
    """Past every tile it is the safe one. Narrower widths have tiles of their own."""
    monkeypatch.setattr(tuned, "capability", lambda _: 7)
    table["dq"] = [
        {**LIKE, "key_dim": 64, "group": 4, "tile": [64, 1, 1, 1]},
        {**LIKE, "group": 2, "tile": [16, 2, 2, 2]},
        {**LIKE, "group": 8, "tile": [32, 8, 8, 8]},
    ]
    half = torch.empty(1, dtype=torch.bfloat16)
    assert tuned.tile("dq", {"GP": group, "DKP": 128, "DVP": 128}, half) == found


@pytest.mark.parametrize(
    ("widths", "group", "found"),
    [
        pytest.param((128, 64), 1, Tile(16, 1, 1, 1), id="next-wider"),
        pytest.param((16, 16), 1, Tile(16, 1, 1, 1), id="far-narrower"),
        pytest.param((128, 128), 16, Tile(16, 1, 1, 1), id="measured"),
        pytest.param((128, 256), 16, Tile(16, 3, 3, 3), id="wider-values"),
        pytest.param((256, 32), 16, Tile(16, 2, 2, 2), id="wider-keys"),
        pytest.param((16, 16), 32, Tile(64, 3, 3, 3), id="wider-with-rows-for-the-group"),
        pytest.param((512, 16), 16, Tile(16, 16, 4, 1), id="wider-than-any"),
    ],
)
def test_widths_that_were_not_measured_take_the_tile_of_wider_ones(
    monkeypatch, table, widths, group, found
):
    monkeypatch.setattr(tuned, "capability", lambda _: 7)
    table["dq"] = [
        {"key_dim": 256, "value_dim": 256, "group": 1, "tile": [64, 3, 3, 3]},
        {"key_dim": 256, "value_dim": 256, "group": 16, "tile": [16, 3, 3, 3]},
        {"key_dim": 256, "value_dim": 128, "group": 16, "tile": [16, 2, 2, 2]},
        {"key_dim": 128, "value_dim": 128, "group": 16, "tile": [16, 1, 1, 1]},
    ]
    half = torch.empty(1, dtype=torch.bfloat16)
    sizes = {"GP": group, "DKP": widths[0], "DVP": widths[1]}
    assert tuned.tile("dq", sizes, half) == found


def test_a_tile_without_rows_for_the_group_is_not_the_nearest(monkeypatch, table):
    monkeypatch.setattr(tuned, "capability", lambda _: 7)
    table["dq"] = [
        {**LIKE, "group": 1, "tile": [64, 1, 1, 1]},
        {**LIKE, "group": 8, "tile": [16, 8, 8, 8]},
    ]
    half = torch.empty(1, dtype=torch.bfloat16)
    assert tuned.tile("dq", {"GP": 16, "DKP": 128, "DVP": 128}, half) == Tile(16, 8, 8, 8)
    assert tuned.tile("dq", {"GP": 32, "DKP": 128, "DVP": 128}, half) == Tile(64, 1, 1, 1)


def test_the_written_table_comes_back_one_entry_a_line(tmp_path):
    entries = {"dq": [{**LIKE, "tile": [64, 64, 4, 2]}, {**LIKE, "group": 1, "tile": [1, 2, 3, 4]}]}
    path = tmp_path / "tuned" / "sm90.json"
    write_table(path, entries)
    assert json.loads(path.read_text()) == entries
    assert sum('"tile"' in line for line in path.read_text().splitlines()) == 2
    assert [file.name for file in path.parent.iterdir()] == ["sm90.json"]


def test_every_kernel_of_the_table_is_tuned():
    assert set(tuned.table("sm90")) <= set(TUNABLES)
    for entries in tuned.table("sm90").values():
        for entry in entries:
            assert {"key_dim", "value_dim", "group", "tile", "ms", "gpu", "triton"} == set(entry)
            assert len(Tile(*entry["tile"])) == 4


@pytest.mark.parametrize(
    ("shapes", "kernels", "message"),
    [
        pytest.param(["big"], [], "shape: expected one of tiny, .*, got 'big'", id="shape"),
        pytest.param(["tiny"], ["dk"], "kernel: expected one of .*, got 'dk'", id="kernel"),
        pytest.param(["tiny"], [], "device: expected a GPU, got cpu", id="device"),
    ],
)
def test_bad_input_is_refused(shapes, kernels, message):
    with pytest.raises(ValueError, match=message):
        tune.tune(shapes, kernels, seq_len=64, device=CPU, console=Console())


@pytest.mark.gpu
def test_tuning_a_small_layer_writes_its_entries(tmp_path):
    path = tmp_path / "table.json"
    console = Console(file=io.StringIO(), width=200)
    tune.tune(
        ["tiny"],
        ["compressed_attention_fwd", "block_scores"],
        seq_len=512,
        device=torch.device("cuda"),
        console=console,
        output=path,
    )
    written = json.loads(path.read_text())
    for kernel in ("compressed_attention_fwd", "block_scores"):
        assert any(entry["key_dim"] == 32 and "ms" in entry for entry in written[kernel])


@pytest.mark.gpu
def test_a_layer_of_hoppers_own_kernels_is_skipped(tmp_path):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("other GPUs start the kernels of the table")
    path = tmp_path / "table.json"
    console = Console(file=io.StringIO(), width=200)
    device = torch.device("cuda")
    written = tune.tune(["100m"], [], seq_len=4096, device=device, console=console, output=path)
    assert written is None
    assert not path.exists()
    assert console.file.getvalue().count("not started on these sizes: hopper_") == len(TUNABLES)


def test_sizes_without_a_measured_tile_are_logged_once(caplog):
    half = torch.empty(0, dtype=torch.float16)
    caplog.set_level("INFO", logger=tuned.__name__)
    for group in (3, 3, 5):
        tuned.tile("dq", {"GP": group, "DKP": 1024, "DVP": 512}, half)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        f"dq: no measured tile for widths 1024 and 512, groups of {group} and torch.float16"
        for group in (3, 5)
    ]
