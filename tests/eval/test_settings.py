from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nsa.eval.settings import EvalSettings, NeedleSettings, PerplexitySettings, TaskSettings


def test_nothing_given_is_the_defaults():
    made = EvalSettings.from_overrides([])
    assert made == EvalSettings(
        perplexity=PerplexitySettings(), needle=NeedleSettings(), tasks=TaskSettings()
    )


def test_values_are_yaml_and_the_last_one_wins():
    made = EvalSettings.from_overrides(
        [
            "needle.lengths=[1024, 4096]",
            "needle.num_samples=3",
            " needle.num_samples = 4",
            "needle.num_keys=2",
            "perplexity.max_tokens=100",
            "perplexity.max_tokens=null",
            "tasks.num_fewshot=0",
        ]
    )
    assert made.needle == NeedleSettings(lengths=(1024, 4096), num_samples=4, num_keys=(2,))
    assert made.perplexity.max_tokens is None
    assert made.tasks.num_fewshot == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("needle.samples=3", r"--set needle\.samples: unknown key\. Known: .*needle\.num_samples"),
        ("samples=3", "--set samples: unknown key"),
        ("needle.num_samples", "--set: expected section.key=value, such as"),
        ("needle.num_samples=[1", "the value is not YAML"),
        ("needle.num_samples=many", "needle.num_samples: expected a whole number, got 'many'"),
        ("needle.num_samples=1.5", "expected a whole number, got 1.5"),
        ("needle.num_samples=true", "expected a whole number, got True"),
        ("needle.num_samples=null", "expected a whole number, got None"),
        ("needle.depths=[]", r"expected whole numbers, such as needle.depths=\[1, 2\], got \[\]"),
        ("needle.lengths=1,2", "expected whole numbers, such as"),
        ("needle.num_samples=0", "needle.num_samples: expected at least 1, got 0"),
        ("needle.num_digits=0", "needle.num_digits: expected at least 1, got 0"),
        ("needle.batch_size=0", "needle.batch_size: expected at least 1, got 0"),
        ("needle.lengths=[0]", "needle.lengths: expected at least 1, got 0"),
        ("needle.num_keys=[0]", "needle.num_keys: expected at least 1, got 0"),
        ("needle.depths=[-1]", "needle.depths: expected at least 0, got -1"),
        ("needle.depths=[101]", r"needle.depths: expected percentages, got \[101\]"),
        ("needle.depths=[5, 5]", r"needle.depths: expected different values, got \[5, 5\]"),
        ("perplexity.max_tokens=1", "perplexity.max_tokens: expected at least 2, got 1"),
        ("perplexity.bin_edges=[0, 5]", "perplexity.bin_edges: expected at least 1, got 0"),
        ("tasks.num_fewshot=-1", "tasks.num_fewshot: expected at least 0, got -1"),
        ("tasks.batch_size=0", "tasks.batch_size: expected at least 1, got 0"),
    ],
)
def test_bad_overrides(override: str, message: str):
    with pytest.raises(ValueError, match=message):
        EvalSettings.from_overrides([override])


def test_every_key_is_documented():
    text = Path(__file__, "../../../docs/evaluation.md").resolve().read_text(encoding="utf-8")
    settings = EvalSettings()
    for section in dataclasses.fields(settings):
        for field in dataclasses.fields(getattr(settings, section.name)):
            assert f"| `{section.name}.{field.name}` |" in text
