import time
import weakref

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nsa.bench.timing import as_graph, kept_memory_bytes, peak_memory_bytes, time_call
from nsa.config import NSAConfig
from nsa.ops import nsa_attention

CPU = torch.device("cpu")


def test_quantiles_are_those_of_the_calls():
    pauses = iter([0.0] + [0.002, 0.004, 0.030] * 20)
    times = time_call(lambda: time.sleep(next(pauses)), CPU, repeat_ms=100)
    assert 2 <= times.p20_ms <= times.p50_ms <= times.p80_ms
    assert 4 <= times.p50_ms < 25


def test_the_warm_up_is_not_counted():
    pauses = iter([0.2] + [0.001] * 1000)
    assert time_call(lambda: time.sleep(next(pauses)), CPU, repeat_ms=10).p80_ms < 100


def test_slow_calls_run_five_times():
    calls = []
    time_call(lambda: calls.append(time.sleep(0.01)), CPU, repeat_ms=1)
    assert len(calls) == 1 + 5


def test_slow_calls_run_five_times_on_a_gpu(monkeypatch):
    asked = []

    def do_bench(call, *, warmup, rep, quantiles):
        asked.append(rep)
        return quantiles

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    time_call(lambda: time.sleep(0.05), torch.device("cuda"), repeat_ms=1)
    time_call(lambda: None, torch.device("cuda"), repeat_ms=200)
    assert asked[0] >= 5 * 50
    assert asked[1] == 200


@pytest.mark.gpu
def test_a_graph_does_what_the_call_does():
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.zeros(3, device="cuda")
        call = as_graph(lambda: x.add_(1))
        before = x.clone()
        call()
        call()
    torch.cuda.synchronize()
    assert torch.equal(x, before + 2)


def test_peak_memory_is_what_a_call_needs_on_top():
    held = torch.ones(16 << 20)
    peak = peak_memory_bytes(lambda: held * 2 + held * 3, CPU)
    if peak is not None:
        assert 2 * held.nbytes <= peak < 4 * held.nbytes
        assert peak_memory_bytes(lambda: held[0] + 1, CPU) < held.nbytes / 2


def test_kept_memory_counts_storages_once_and_whole():
    x = torch.ones(2, 1000, requires_grad=True)

    def product():
        return (x[0] * x[1],)  # both factors are saved; they lie in one storage

    assert kept_memory_bytes(product) == x.nbytes + x[0].nbytes
    # The output of exp is also what its backward needs.
    assert kept_memory_bytes(lambda: (x.exp(),)) == x.nbytes
    # Neither the input of a sum nor what has no gradient is kept.
    assert kept_memory_bytes(lambda: (x.sum(),)) == 4
    assert kept_memory_bytes(lambda: (x.detach().exp().sum(),)) == 4


def test_what_was_kept_is_given_back():
    x = torch.ones(3, requires_grad=True)
    outputs = []

    def forward():
        o = x.exp().exp()
        outputs.append(weakref.ref(o))
        return (o,)

    assert kept_memory_bytes(forward) == 2 * x.nbytes
    assert outputs[0]() is None


def test_dense_attention_keeps_inputs_output_and_log_sum_exps():
    q, k, v = (torch.randn(1, 4, 100, 16, requires_grad=True) for _ in range(3))
    kept = kept_memory_bytes(lambda: (scaled_dot_product_attention(q, k, v, is_causal=True),))
    assert kept == 4 * q.nbytes + 4 * 100 * q.itemsize


@pytest.mark.parametrize("shared", [True, False], ids=["shared-kv", "own-kv"])
def test_sparse_attention_keeps_what_its_backward_names(shared):
    config = NSAConfig.tiny()
    q, gates = torch.randn(1, 100, 4, 16), torch.rand(1, 100, 4, 3)
    k, v, k_win, v_win = (torch.randn(1, 100, 2, 16) for _ in range(4))
    k_cmp, v_cmp = (torch.randn(1, config.num_compressed(100), 2, 16) for _ in range(2))
    tensors = (q, k_cmp, v_cmp, k, v, *((k, v) if shared else (k_win, v_win)), gates)
    for x in tensors:
        x.requires_grad_()
    inputs = sum({x.data_ptr(): x.nbytes for x in tensors}.values())
    lists = 100 * 2 * config.num_selected_blocks * 4 + 3 * 100 * 4 * q.itemsize
    for recompute, outputs in ((True, 1), (False, 4)):

        def forward(recompute=recompute):
            return (nsa_attention(*tensors, config=config, recompute=recompute),)

        assert kept_memory_bytes(forward) == inputs + lists + outputs * q.nbytes
