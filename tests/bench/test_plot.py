import matplotlib
import pytest
from tests.disk import full_disk

from nsa.bench.plot import plot, plot_speedup


def rows(**changes):
    return [
        {
            "device": "a machine",
            "dtype": "float32",
            "shape": "tiny",
            "operation": operation,
            "mode": "forward",
            "provider": provider,
            "compressor": None,
            "workload": "random",
            "seq_len": seq_len,
            "p20_ms": seq_len / 2,
            "p50_ms": seq_len,
            "p80_ms": seq_len * 2,
            "time": "today",
        }
        | changes
        for operation in ("window_attention", "pipeline")
        for provider in ("reference", "sdpa")
        for seq_len in (256, 512)
    ]


def test_the_picture_names_operations_providers_and_lengths(tmp_path):
    output = tmp_path / "ops.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot(rows(), output)
    text = output.read_text()
    for part in (
        "window_attention forward",
        "pipeline forward",
        "sdpa, random",
        "512",
        "a machine",
    ):
        assert part in text
    assert [path.name for path in tmp_path.iterdir()] == ["ops.svg"]


@pytest.mark.parametrize(
    ("given", "name", "message"),
    [
        pytest.param([], "a.svg", "expected one device, dtype and shape, got no rows", id="none"),
        pytest.param(
            rows() + rows(dtype="bfloat16"),
            "a.svg",
            "expected one device, dtype and shape, got .*bfloat16.*Choose with --device-name",
            id="two-dtypes",
        ),
        pytest.param(
            rows(), "a.gif", r"output: expected \.svg, \.png or \.pdf, got 'a\.gif'", id="gif"
        ),
    ],
)
def test_bad_input_is_refused(tmp_path, given, name, message):
    with pytest.raises(ValueError, match=message):
        plot(given, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.svg", "a.png", "a.pdf"])
def test_a_full_disk_names_the_file(tmp_path, name):
    with pytest.raises(OSError, match=rf"too large: '.*{name}'"), full_disk():
        plot(rows(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def layers():
    """The layer and dense attention at two lengths, another at one, and groups of two widths."""
    sizes = [("paper", 1024, 16), ("paper", 2048, 16), ("million", 4096, 16)]
    sizes += [("group-1", 2048, 1), ("group-8", 2048, 8), ("wide-group-1", 2048, 1)]
    common = {
        "device": "a machine",
        "dtype": "float32",
        "mode": "forward",
        "workload": "local",
        "time": "today",
    }
    made = []
    for shape, seq_len, group in sizes:
        where = {**common, "shape": shape, "seq_len": seq_len}
        where |= {"num_heads": 32, "num_kv_heads": 32 // group}
        where |= {"key_dim": 192 if shape.startswith("wide") else 128, "value_dim": 128}
        ours = {"operation": "pipeline", "provider": "kernel", "compressor": "mlp", "p50_ms": 1.0}
        dense = {"operation": "dense_attention", "provider": "cudnn", "compressor": None}
        made += [where | ours, where | dense | {"p50_ms": 3.0}]
    return made


def test_the_speedup_picture_has_a_panel_for_lengths_and_one_for_groups(tmp_path):
    output = tmp_path / "speedup.svg"
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nsa"}):
        plot_speedup(layers(), output)
        text = output.read_text()
        plot_speedup(layers(), output)
        assert output.read_text() == text
    for part in (
        "Speed-up over dense attention, a machine, float32",
        "mlp, local (kernel) forward",
        "tokens",
        "query heads that share keys",
        "widths 128 and 128, mlp, local (kernel) forward",
        "widths 192 and 128, mlp, local (kernel) forward",
        "2,048",
    ):
        assert part in text
    assert "4,096" not in text  # The only length of its shape.


def test_a_speedup_picture_of_one_length_has_points(tmp_path):
    output = tmp_path / "speedup.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_speedup([row for row in layers() if row["seq_len"] == 4096], output)
    assert "4,096" in output.read_text()


@pytest.mark.parametrize(
    ("given", "name", "message"),
    [
        pytest.param(rows(), "a.svg", "expected the pipeline beside dense attention", id="none"),
        pytest.param(
            layers() + [row | {"dtype": "float16"} for row in layers()],
            "a.svg",
            "expected .* one device and dtype, got .*float16",
            id="two-dtypes",
        ),
        pytest.param(layers(), "a.gif", r"output: expected \.svg, \.png or \.pdf", id="gif"),
    ],
)
def test_a_speedup_picture_of_bad_input_is_refused(tmp_path, given, name, message):
    with pytest.raises(ValueError, match=message):
        plot_speedup(given, tmp_path / name)
    assert not list(tmp_path.iterdir())
