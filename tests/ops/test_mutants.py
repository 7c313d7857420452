"""Wrong versions that the checks must reject, each one edit away from the right code.

The same check passes on the code as it is and fails on the mutant. A mutant whose text is no longer
found fails too, so that it follows the code it mutates.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tests import cases
from tests.cases import Case

from nsa import ops

PLAIN = Case(name="", lengths=(37,), dtype=torch.float64)
# At 39 tokens block 1 to 3 are free for the last query, so ties and forced blocks show.
TIED = Case(name="", lengths=(39,), dtype=torch.float64, spread=0.0)


@dataclass(frozen=True)
class Mutant:
    """In a function of ``nsa.reference``, ``old`` becomes ``new``; ``check`` must notice."""

    module: str
    function: str
    old: str
    new: str
    check: Callable[[], None]

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts the mutated function in the place of the original."""
        # By import_module, since the package re-exports functions under their modules' names.
        module = importlib.import_module(f"nsa.reference.{self.module}")
        source = inspect.getsource(getattr(module, self.function))
        assert source.count(self.old) == 1, f"{self.function} no longer contains {self.old!r} once"
        names = dict(vars(module))
        exec(source.replace(self.old, self.new), names)
        monkeypatch.setattr(module, self.function, names[self.function])


def _check(operation: str, case: Case) -> Callable[[], None]:
    check = getattr(cases, f"check_{operation}")
    return functools.partial(check, getattr(ops, operation), case)


SELECT = _check("select_blocks", PLAIN)
MUTANTS = {
    "eq9-literal-0-based": Mutant(
        # i = (l'/d) j - m - r instead of + m - r: three strides too early at these sizes.
        "select_blocks",
        "block_scores",
        "before = config.compress_block_size // config.compress_stride - 1",
        "before = config.compress_block_size // config.compress_stride - 1 + per_block - 1",
        SELECT,
    ),
    "eq9-one-stride-early": Mutant(
        "select_blocks",
        "block_scores",
        "before = config.compress_block_size // config.compress_stride - 1",
        "before = config.compress_block_size // config.compress_stride",
        SELECT,
    ),
    "eq9-one-stride-late": Mutant(
        "select_blocks",
        "block_scores",
        "before = config.compress_block_size // config.compress_stride - 1",
        "before = config.compress_block_size // config.compress_stride - 2",
        SELECT,
    ),
    "eq9-unweighted": Mutant(
        "select_blocks", "block_scores", "scores += weight *", "scores += bool(weight) *", SELECT
    ),
    "eq10-one-head-only": Mutant(
        "select_blocks",
        "block_scores",
        "probabilities(logits, row_lse).sum(3)",
        "probabilities(logits, row_lse)[:, :, :, 0]",
        SELECT,
    ),
    "future-block-chosen": Mutant(
        "select_blocks",
        "top_blocks",
        "future = blocks > own_block",
        "future = blocks > own_block + 1",
        SELECT,
    ),
    "local-block-not-forced": Mutant(
        "select_blocks",
        "top_blocks",
        "blocks > own_block - config.num_local_blocks",
        "blocks > own_block",
        SELECT,
    ),
    "initial-block-not-forced": Mutant(
        "select_blocks",
        "top_blocks",
        "(blocks < config.num_init_blocks) | ",
        "",
        SELECT,
    ),
    "ties-to-the-higher-block": Mutant(
        "select_blocks",
        "top_blocks",
        "torch.sort(scores, dim",
        "torch.sort(scores + 1e-9 * blocks, dim",
        _check("select_blocks", TIED),
    ),
    "future-token-in-a-chosen-block": Mutant(
        "selected_attention",
        "selected_keys",
        "(torch.arange(hi, device=k.device) <= positions)",
        "(torch.arange(hi, device=k.device) <= positions + 1)",
        _check("selected_attention", PLAIN),
    ),
    "unused-slot-is-the-last-block": Mutant(
        "selected_attention",
        "selected_keys",
        "torch.where(chosen < 0, num_blocks, chosen)",
        "torch.where(chosen < 0, num_blocks - 1, chosen)",
        _check("selected_attention", PLAIN),
    ),
    "window-of-w-plus-1": Mutant(
        "window_attention",
        "window_keys",
        "keys > positions - window_size",
        "keys >= positions - window_size",
        _check("window_attention", PLAIN),
    ),
    "window-without-the-query": Mutant(
        "window_attention",
        "window_keys",
        "keys <= positions)",
        "keys < positions)",
        _check("window_attention", PLAIN),
    ),
    "compressed-block-one-token-early": Mutant(
        "compressed_attention",
        "compressed_keys",
        "block_ends <= positions[:, None]",
        "block_ends <= positions[:, None] + 1",
        _check("compressed_attention", PLAIN),
    ),
    "compressed-block-one-token-late": Mutant(
        "compressed_attention",
        "compressed_keys",
        "block_ends <= positions[:, None]",
        "block_ends < positions[:, None]",
        _check("compressed_attention", PLAIN),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_is_caught(mutant, monkeypatch):
    mutant.check()
    mutant.apply(monkeypatch)
    with pytest.raises(AssertionError):
        mutant.check()


@pytest.mark.parametrize("name", ["eq9-one-stride-early", "window-of-w-plus-1"])
def test_a_mutant_shows_in_the_whole(name, monkeypatch):
    mutant, whole = MUTANTS[name], _check("nsa_attention", PLAIN)
    whole()
    mutant.apply(monkeypatch)
    with pytest.raises(AssertionError):
        whole()
