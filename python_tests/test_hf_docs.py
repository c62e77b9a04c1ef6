"""The page on transformers runs, block by block, where its extras are installed."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from synergen_ext.generation.pipeline import Pipeline
from synergen_ext.model import SynerGenVL

PAGE = Path(__file__).resolve().parents[1] / "docs" / "transformers.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 8
    names: dict[str, Any] = {}
    for block in blocks:
        if "import Trainer" in block:
            continue  # the test below runs it
        if "from peft" not in block or find_spec("peft"):
            exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "apples.png").is_file()
    assert names["again"].dtype == torch.bfloat16 and names["again"].config._attn_implementation == "eager"
    assert set(Pipeline.from_pretrained("mine").model.state_dict()) == set(names["again"].model.state_dict())
    if find_spec("peft"):
        merged = Pipeline.from_pretrained("merged").model
        assert set(merged.state_dict()) == set(Pipeline.from_pretrained("mine").model.state_dict())


def test_the_trainers_example_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="needs the extra trainer")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"pictures": [Image.new("RGB", (96, 96), c) for c in ("red", "green")]}
    for block in (blocks[0], next(b for b in blocks if "import Trainer" in b)):
        exec(compile(block, str(PAGE), "exec"), names)
    losses = names["losses"]
    assert len(losses) == 3 and losses[2] < losses[0]
    trained = SynerGenVL.from_pretrained("trained").state_dict()
    shipped = SynerGenVL.from_pretrained(names["folder"]).state_dict()
    assert set(trained) == set(shipped)
    changed = [n for n, w in trained.items() if not torch.equal(w, shipped[n].to(w.dtype))]
    assert any("feed_forward.vision" in n for n in changed) and any("unfolding_head" in n for n in changed)
