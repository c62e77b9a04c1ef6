"""The page on transformers runs, block by block, where its extras are installed."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from synergen_ext.generation.pipeline import Pipeline

PAGE = Path(__file__).resolve().parents[1] / "docs" / "transformers.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 8
    names: dict[str, Any] = {}
    for block in blocks:
        if "from peft" not in block or find_spec("peft"):
            exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "apples.png").is_file()
    assert names["again"].dtype == torch.bfloat16 and names["again"].config._attn_implementation == "eager"
    assert set(Pipeline.from_pretrained("mine").model.state_dict()) == set(names["again"].model.state_dict())
