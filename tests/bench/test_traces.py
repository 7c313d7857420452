import json

import pytest
import torch
from safetensors.torch import save_file
from tests.disk import full_disk
from tests.models.small import small_model
from tests.models.tokenizer import character_tokenizer

from nsa.bench import traces
from nsa.bench.operations import OPERATIONS
from nsa.bench.run import Plan, measure
from nsa.bench.workloads import make_tensors, run_compress

CPU = torch.device("cpu")
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely. " * 4


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "model"
    model.save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trace(folder):
    output = folder.parent / "layer1.safetensors"
    text = folder / "text.txt"
    traces.capture(folder, text, output, device=CPU, layer=1, max_tokens=200)
    return output


def test_the_operations_on_a_trace_are_what_the_layer_computed(model, folder, trace):
    ids = torch.tensor([character_tokenizer()(TEXT)["input_ids"][:200]])
    attention = model.model.layers[1].self_attn
    found = []
    handle = attention.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    shape = traces.shape(trace)
    tensors = make_tensors(shape, 200, f"trace:{trace}", torch.float32, CPU)
    (o,) = OPERATIONS["pipeline"].run(tensors, shape.config, "reference")
    torch.testing.assert_close(o.flatten(-2), found[0])


def test_the_shape_is_the_models(model, trace):
    shape = traces.shape(trace)
    assert shape.name == "layer1"
    assert (shape.num_heads, shape.num_kv_heads) == (4, 2)
    assert (shape.key_dim, shape.value_dim) == (8, 6)
    assert shape.seq_lens == (200,)
    assert shape.config == model.model.layers[1].self_attn.config


def test_a_shorter_length_is_the_start(trace):
    shape = traces.shape(trace)
    whole, part = (
        make_tensors(shape, length, f"trace:{trace}", torch.bfloat16, CPU) for length in (200, 90)
    )
    assert part["q"].dtype == torch.bfloat16
    assert torch.equal(part["v_win"], whole["v_win"][:, :90])
    assert torch.equal(part["w1_k"], whole["w1_k"])
    k_whole, k_part = (run_compress(x, shape.config, "reference")[0] for x in (whole, part))
    assert torch.equal(k_part, k_whole[:, : k_part.shape[1]])


def test_measuring_a_trace_reports_its_overlap_and_hides_its_path(trace):
    plan = Plan(
        device=CPU, workloads=(f"trace:{trace}",), operations=("selected_attention",), quick=True
    )
    rows = list(measure(plan, plan.cases()))
    assert len(rows) == 4
    for row in rows:
        assert (row["workload"], row["shape"], row["seq_len"]) == ("trace", "layer1", 200)
        assert 0 < row["overlap"] <= 1
        assert row["num_kv_heads"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"layer": 2}, "layer: expected one of 2 NSA layers", id="layer"),
        pytest.param({"max_tokens": 7}, "at least one compressed block = 8 tokens", id="short"),
        pytest.param({"output": "x.pt"}, r"output: expected \.safetensors, got 'x\.pt'", id="name"),
    ],
)
def test_bad_input_is_refused(folder, tmp_path, changes, message):
    asked = {"output": "x.safetensors", "layer": 0, "max_tokens": 100} | changes
    asked["output"] = tmp_path / asked["output"]
    with pytest.raises(ValueError, match=message):
        traces.capture(folder, folder / "text.txt", device=CPU, **asked)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_file(folder, tmp_path):
    output = tmp_path / "x.safetensors"
    with pytest.raises(OSError, match=r"too large.*x\.safetensors"), full_disk(20_000):
        traces.capture(folder, folder / "text.txt", output, device=CPU, layer=0, max_tokens=100)
    assert not list(tmp_path.iterdir())


def test_another_compressor_is_refused(folder, tmp_path):
    small_model(compressor="mean").save_pretrained(tmp_path / "mean")
    character_tokenizer().save_pretrained(tmp_path / "mean")
    with pytest.raises(ValueError, match="model: expected mlp compressors, got mean"):
        traces.capture(
            tmp_path / "mean",
            folder / "text.txt",
            tmp_path / "x.safetensors",
            device=CPU,
            layer=0,
            max_tokens=100,
        )


def test_more_tokens_than_the_trace_has_are_refused(trace):
    with pytest.raises(ValueError, match=r"layer1\.safetensors: expected 201 tokens, got 200"):
        traces.tensors(trace, 201, torch.float32, CPU)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        pytest.param(None, "got other tensors", id="weights"),
        pytest.param({"config": json.dumps({})}, "got other tensors", id="no-queries"),
    ],
)
def test_files_that_are_no_traces_are_refused(tmp_path, metadata, message):
    path = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(2)}, path, metadata)
    with pytest.raises(ValueError, match=message):
        traces.shape(path)


def test_a_broken_file_is_refused(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="expected a trace of `nsa bench trace`, got"):
        traces.shape(path)
