import matplotlib
import pytest

from nsa.bench.plot import plot


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
