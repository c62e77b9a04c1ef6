"""The common model tests of transformers itself, on our class.

They are not in its wheel, but in its source package:

    pip download --no-deps --no-binary transformers transformers==5.23.0 && tar xzf transformers-5.23.0.tar.gz
    pip install parameterized
    TRANSFORMERS_SOURCE=transformers-5.23.0 pytest python_tests/test_hf_common.py

Without that they are skipped. Its tests of `generate` and of exporters are in no package.
"""

import os
import sys
import types
import unittest

import pytest
import torch
from cases import image_batch, picture_ids, text_ids
from hf_cases import hf_config

from synergen_ext.hf import SynerGenVLForConditionalGeneration
from synergen_ext.model import SynerGenConfig

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("TRANSFORMERS_SOURCE does not name a source package of transformers", allow_module_level=True)
pytest.importorskip("parameterized")


def common() -> type:
    """`ModelTesterMixin`; the two classes that it imports from files outside the package are empty here."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [os.path.join(os.path.abspath(SOURCE), "tests")]
    sys.modules[package.__name__] = package
    for folder, file, name in (
        ("exporters", "test_export", "ExportTesterMixin"),
        ("generation", "test_utils", "GenerationTesterMixin"),
    ):
        parent, module = (types.ModuleType(f"transformers_tests.{n}") for n in (folder, f"{folder}.{file}"))
        parent.__path__ = []
        setattr(module, name, type(name, (), {}))
        sys.modules[parent.__name__], sys.modules[module.__name__] = parent, module
    import transformers_tests.test_modeling_common as theirs

    return theirs


THEIRS = common()


class Tester:
    """What the mixin asks a model's own tester for."""

    is_training = True
    batch_size = 3

    def __init__(self, pictures: bool) -> None:
        self.c = c = SynerGenConfig.preset("tiny")
        self.pictures = pictures
        self.seq_length = 7 + len(picture_ids(c)) * pictures
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = c.hidden_size, c.num_layers, c.num_heads
        self.vocab_size = c.vocab_size

    def get_config(self):
        return hf_config(self.c)

    def prepare_config_and_inputs_for_common(self):
        c, n = self.c, self.batch_size
        rows = [[*text_ids(c, 3, i), *picture_ids(c) * self.pictures, *text_ids(c, 4, n + i)] for i in range(n)]
        inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.ones(n, self.seq_length, dtype=torch.long)}
        if self.pictures:
            inputs["image_ids"] = image_batch(c, n)
        return self.get_config(), inputs


class Common(THEIRS.ModelTesterMixin, THEIRS.GenerationTesterMixin):
    all_model_classes = (SynerGenVLForConditionalGeneration,)
    pictures = False
    leave_out: dict[str, str] = {}

    def setUp(self) -> None:
        self.model_tester = Tester(self.pictures)
        for name, reason in self.leave_out.items():
            if self._testMethodName == name or (name.endswith("_") and self._testMethodName.startswith(name)):
                self.skipTest(reason)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:  # which class gets labels, and which, is a list of transformers' own
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            if self.pictures:
                inputs["paint"] = torch.ones(len(inputs["image_ids"]), dtype=torch.bool)
        return inputs


class TestText(Common, unittest.TestCase):
    test_all_params_have_gradient = False  # those that read and write pictures have none in a batch of text


class TestPictures(Common, unittest.TestCase):
    pictures = True
    leave_out = {
        "test_eager_matches_sdpa_inference_": "gives the model input_ids alone, without the pictures in them",
        "test_inputs_embeds": "looks the placeholder of pictures up in the table of text, where it has no row",
        "test_resize_tokens_embeddings": "cuts ids to the smaller table, the placeholder of pictures too",
        "test_resize_embeddings_untied": "cuts ids to the smaller table, the placeholder of pictures too",
    }
