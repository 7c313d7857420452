import io
import re

import pytest
import torch
from rich.console import Console

import nsa
from nsa.bench import environment
from nsa.bench.operations import OPERATIONS, Operation

CPU = torch.device("cpu")


def test_provenance_says_which_code_ran_where():
    made = environment.provenance(CPU)
    assert made["torch"] == torch.__version__
    assert made["nsa"] == nsa.__version__
    assert made["device"]
    assert made["driver"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", str(made["time"]))
    if made["commit"] is not None:
        assert re.fullmatch(r"[0-9a-f]{40}", str(made["commit"]))
        assert isinstance(made["dirty"], bool)


def test_an_installed_package_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(nsa, "__file__", str(tmp_path / "nsa" / "__init__.py"))
    made = environment.provenance(CPU)
    assert made["commit"] is None
    assert made["dirty"] is None


def test_on_the_cpu_every_operation_runs_the_reference(monkeypatch):
    monkeypatch.delenv("NSA_BACKEND", raising=False)
    routes = {route.operation: route for route in environment.routes(CPU)}
    ours = {name for name, entry in OPERATIONS.items() if entry.run}
    assert set(routes) == ours - {"pipeline", "recompute_pipeline", "shared_pipeline"}
    assert {route.forward for route in routes.values()} == {"reference"}
    assert routes["window_attention"].backward == "reference"
    assert routes["select_blocks"].backward == ""
    assert routes["window_attention"].why == "tensors on cpu"


def test_a_forced_backend_is_the_reason(monkeypatch):
    monkeypatch.setenv("NSA_BACKEND", "reference")
    routes = {route.operation: route for route in environment.routes(CPU)}
    assert routes["window_attention"].why == "NSA_BACKEND=reference"


def test_an_operation_without_a_kernel_says_so_itself(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("window_attention: there is no GPU kernel for it yet.")

    monkeypatch.setitem(OPERATIONS, "window_attention", Operation(reads=(), run=refuse))
    routes = {route.operation: route for route in environment.routes(CPU)}
    found = routes["window_attention"]
    assert (found.forward, found.backward) == ("none", "none")
    assert "there is no GPU kernel for it yet" in found.why
    assert routes["select_blocks"].forward == "reference"


def test_a_missing_backward_leaves_the_forward(monkeypatch):
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError("window_attention: there is no GPU kernel for it yet.")

    entry = Operation(reads=("q",), leaves=("q",), run=lambda x, *_: (NoBackward.apply(x["q"]),))
    monkeypatch.setitem(OPERATIONS, "window_attention", entry)
    found = {route.operation: route for route in environment.routes(CPU)}["window_attention"]
    assert (found.forward, found.backward) == ("reference", "none")


@pytest.mark.parametrize("backend", [None, "reference"], ids=["unset", "forced"])
def test_show_prints_versions_device_routes_and_variables(monkeypatch, backend):
    monkeypatch.delenv("NSA_BACKEND", raising=False)
    if backend:
        monkeypatch.setenv("NSA_BACKEND", backend)
    console = Console(file=io.StringIO(), width=120)
    environment.show(console, CPU)
    text = console.file.getvalue()
    for part in (torch.__version__, "selected_attention", "nsa_decode", "NSA_BACKEND", "cpu ("):
        assert part in text
    assert (backend or "not set") in text
