"""Mistakes to plant in the CUDA kernels, a file for each source in csrc/cuda; tools/cuda_mutants.py plants them."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


@dataclass(frozen=True)
class Mutant:
    """One piece of source to be replaced by another."""

    number: int
    file: str
    before: str
    after: str
    which: int  # of the places where `before` stands
    unit: str  # the source to compile: the file itself, or one that includes it
    op: str  # the tests that must find it are those with this word in their names

    @property
    def name(self) -> str:
        stem, kind = self.file.split(".")
        twin = kind != "cu" and (KERNELS / f"{stem}.cu").is_file()  # linear_cross_entropy.cu, and its header
        return f"{self.file if twin else stem}:{self.number}"

    def text(self) -> str:
        """The file with the mistake in it."""
        text = (KERNELS / self.file).read_text()
        parts = text.split(self.before)
        if len(parts) <= self.which + 1:
            raise ValueError(f"mutant {self.name}: {self.file} has no {self.before!r} number {self.which + 1}")
        head, tail = self.before.join(parts[: self.which + 1]), self.before.join(parts[self.which + 1 :])
        return head + self.after + tail


def planted(file: str, unit: str = "") -> tuple[list[Mutant], Callable[..., None]]:
    """A list for the mistakes in one file, and a function that adds to it: `add(before, after)`. For a header, `unit`
    names a source that includes it; a single mistake may name another."""
    found: list[Mutant] = []
    default = unit or file

    def add(before: str, after: str = "", which: int = 0, unit: str = default) -> None:
        op = unit.removesuffix(".cu").removesuffix("_backward")
        found.append(Mutant(len(found) + 1, file, before, after, which, unit, op))

    return found, add


def every() -> list[Mutant]:
    """All mistakes, by file."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [mutant for name in names for mutant in importlib.import_module(f"{__name__}.{name}").MUTANTS]
