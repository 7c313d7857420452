"""Small files in the formats that the local tasks read."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

CHOICES = {"query": "What sails", "choices": ["a ship", "the moon", "men", "old"], "gold": 0}

ITEMS: dict[str, list[dict[str, Any]]] = {
    "lambada_openai_test": [
        {"context": "The old ship sails under the", "target": "moon"},
        {"context": "Call the captain of the white", "target": "whale"},
    ],
    "arc_easy_test": [CHOICES, {**CHOICES, "gold": 3, "choices": ["a", "b", "c", "sea", "e"]}],
    "arc_easy_validation": [{**CHOICES, "query": "Solved", "gold": 1}],
    "arc_challenge_validation": [CHOICES],
    "hellaswag_val_subset": [CHOICES],
    "piqa_valid": [{**CHOICES, "choices": ["sing", "sail"]}],
    "winogrande_xl_validation": [
        {"sentence": "The whale met the ship and _ sang.", "choices": ["whale", "ship"], "gold": 1}
    ],
    "commonsenseqa_validation": [{**CHOICES, "choices": ["a", "b", "c", "d", "e"]}],
    "boolq_validation": [{"passage": "Old men sing.", "question": "do men sing", "answer": True}],
    "mmlu_test": [
        {**CHOICES, "subject": subject, "gold": gold}
        for subject, gold in (("deep_sea", 0), ("deep_sea", 1), ("moon", 2))
    ],
    "mmlu_dev": [
        {**CHOICES, "query": f"Solved {subject}", "subject": subject}
        for subject in ("deep_sea", "moon")
    ],
    "gsm8k_test": [{"question": "Two ships and two?", "answer": "2 + 2 = 4.\n#### 4"}],
    "gsm8k_train": [
        {"question": f"{n} ships and one?", "answer": f"#### {n + 1}"} for n in range(6)
    ],
}


def write_task_files(folder: Path) -> Path:
    """All files, half of them compressed."""
    for index, (name, items) in enumerate(ITEMS.items()):
        data = "".join(json.dumps(item) + "\n" for item in items).encode()
        if index % 2:
            (folder / f"{name}.jsonl").write_bytes(data)
        else:
            (folder / f"{name}.jsonl.xz").write_bytes(lzma.compress(data))
    return folder
