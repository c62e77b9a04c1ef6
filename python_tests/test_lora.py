"""LoRA through peft: names that exist, a base that stays as it is, and a merged checkpoint that says the same."""

import re

import pytest
import torch
from cases import random_model
from hf_cases import wrapped
from torch import nn

from synergen_ext.hf.lora import TARGETS, lora_targets, save_merged
from synergen_ext.model import SynerGenConfig, SynerGenVL

peft = pytest.importorskip("peft", reason="needs the extra lora")


def batch_of(config):
    row = [5, 6, 7, config.boi_id] + [config.image_id] * config.image_tokens + [config.eoi_id, 9]
    ids = torch.tensor([row, row])
    labels = ids.clone()
    pictures = torch.arange(2 * 32).view(2, *config.image_grid) % config.codebook_size
    return dict(input_ids=ids, labels=labels, image_ids=pictures, paint=torch.tensor([True, False]))


def tuned_model(parts=(), **changes):
    model = wrapped(random_model(SynerGenConfig.preset("tiny", **changes)))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=lora_targets(*parts)))


@pytest.mark.parametrize(("part", "count"), [("attention", 2 * 4), ("head", 2 * 4), ("image", 2)])
def test_every_target_is_a_linear_layer_of_the_model(part, count):
    model = wrapped(random_model())
    found = [m for name, m in model.named_modules() if re.fullmatch(TARGETS[part], name)]
    assert len(found) == count and all(isinstance(m, nn.Linear) for m in found)
    named = set(re.search(r"\(([^()]*)\)$", TARGETS[part])[1].split("|"))
    assert {n.rpartition(".")[2] for n, _ in model.named_modules() if re.fullmatch(TARGETS[part], n)} == named
    tuned = tuned_model([part])
    assert sum("lora_A" in n and n.endswith("weight") for n, _ in tuned.named_parameters()) == count


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="lora_targets: part must be one of attention, head, image, got 'experts'"):
        lora_targets("experts")


@pytest.mark.parametrize("bias", [False, True])
def test_a_step_changes_the_adapters_alone(bias):
    tuned = tuned_model(attention_bias=bias).train()
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):  # B begins at zero, so A moves from the second step on
        optimizer.zero_grad()
        tuned(**batch_of(tuned.base_model.model.model.config)).loss.backward()
        optimizer.step()
    for name, p in tuned.named_parameters():
        assert ("lora_" in name) == (not torch.equal(p, before[name])), name
        assert ("lora_" in name) == p.requires_grad


def test_merged_is_a_plain_checkpoint_with_the_same_logits(tmp_path):
    tuned = tuned_model()
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    inner = tuned.base_model.model.model
    batch = batch_of(inner.config)
    tuned.eval()
    with torch.no_grad():
        plain = tuned.disable_adapter()
        with plain:
            untouched = tuned(**batch)
        before = tuned(**batch)
    names = set(wrapped(random_model()).model.state_dict())
    merged = save_merged(tuned, tmp_path / "merged")
    with torch.no_grad():
        after = merged(**batch)
    assert not torch.allclose(untouched.logits, before.logits, atol=1e-3)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-5, atol=1e-6)
    again = SynerGenVL.from_pretrained(tmp_path / "merged")
    assert set(again.state_dict()) == names and not [n for n in names if "lora" in n]
    with torch.no_grad():
        losses = again(batch["input_ids"], batch["labels"].masked_fill(batch["labels"] == again.config.image_id, -100),
                       batch["image_ids"], batch["paint"])  # fmt: skip
    torch.testing.assert_close(losses.total, after.loss, rtol=1e-4, atol=1e-5)
