import time

import pytest
import torch

from nsa.bench.timing import as_graph, peak_memory_bytes, time_call

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
