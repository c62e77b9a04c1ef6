"""The model behind the interfaces of transformers: config, model, processor. Classes are loaded when they are named.

`synergen_ext.integrations.transformers.register()` makes them known to `AutoConfig`, `AutoProcessor` and
`AutoModelForImageTextToText`; without it they are used by their own names.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration import SynerGenVLConfig
    from .image_processing import SynerGenVLImageProcessor
    from .modeling import SynerGenVLForConditionalGeneration
    from .processing import SynerGenVLProcessor

__all__ = [
    "SynerGenVLConfig",
    "SynerGenVLForConditionalGeneration",
    "SynerGenVLImageProcessor",
    "SynerGenVLProcessor",
    "register",
]

_HOMES = {
    "SynerGenVLConfig": "configuration",
    "SynerGenVLForConditionalGeneration": "modeling",
    "SynerGenVLImageProcessor": "image_processing",
    "SynerGenVLProcessor": "processing",
}


def register() -> None:
    """Make our classes known to the Auto classes of transformers. Calling it again changes nothing."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
        PreTrainedTokenizerFast,
    )

    from .configuration import SynerGenVLConfig
    from .image_processing import SynerGenVLImageProcessor
    from .modeling import SynerGenVLForConditionalGeneration
    from .processing import SynerGenVLProcessor

    AutoConfig.register(SynerGenVLConfig.model_type, SynerGenVLConfig, exist_ok=True)
    AutoModelForImageTextToText.register(SynerGenVLConfig, SynerGenVLForConditionalGeneration, exist_ok=True)
    with suppress(ImportError):  # early 5.x wants torchvision even to be told of a class that does not
        AutoImageProcessor.register(
            SynerGenVLConfig, slow_image_processor_class=SynerGenVLImageProcessor, exist_ok=True
        )
    AutoTokenizer.register(SynerGenVLConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
    AutoProcessor.register(SynerGenVLConfig, SynerGenVLProcessor, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
