"""Where a stage's resumable state is kept: one file of whole tensors, or a folder that all processes write parts of.

Both hold the weights, the optimizers' moments, the averages, the random number generator, the data's position and
what the guard knows, and both name the step they were taken after.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from .checkpoints import NotSaved, load_meta, load_state, replacing, save_state
from .world import World

META_FILE = "meta.json"
_PARTIAL = ".partial"

#: Given a stored tensor's name, dtype and shape, the tensor to read it into: a part of it where weights are sharded.
Allocate = Callable[[str, torch.dtype, torch.Size], Tensor]


class Store(Protocol):
    def meta(self) -> dict[str, Any] | None:
        """What was saved beside the last whole checkpoint's tensors, if there is one."""
        ...

    def load(self, allocate: Allocate) -> dict[str, Tensor]:
        """The tensors of the checkpoint that `meta` described."""
        ...

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """All processes call it. Raises NotSaved in all of them, and the last checkpoint stays."""
        ...

    def poll(self) -> None:
        """Called after every step: what was written meanwhile may count."""
        ...

    def finish(self) -> None:
        """Return once every checkpoint is whole."""
        ...


class FileStore:
    """One safetensors file, written by the first process."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world

    def meta(self) -> dict[str, Any] | None:
        return load_meta(self.path) if self.path.is_file() else None

    def load(self, allocate: Allocate) -> dict[str, Tensor]:
        return load_state(self.path)[0]

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        error = ""
        if self.world.rank == 0:
            try:
                save_state(self.path, tensors, meta)
            except NotSaved as e:
                error = str(e)
        if error := self.world.agree(error):
            raise NotSaved(error)

    def poll(self) -> None:
        pass

    def finish(self) -> None:
        pass


class FolderStore:
    """A folder ``NUMBER-STAGE-STEP`` of safetensors files, one from each process, read by any number of processes.

    It is written under a name that ends in ``.partial`` and renamed when all files are on the disk, so a folder
    without that ending is whole. The last one is kept until the next is.

    Args:
        folder: where the folders are.
        asynchronous: write while the next steps run; the weights are copied before `save` returns.
    """

    def __init__(self, folder: Path, world: World, asynchronous: bool = False) -> None:
        self.folder, self.world, self.asynchronous = folder, world, asynchronous
        self._writing: tuple[Path, Future[Any]] | None = None
        self._found = folder

    def _whole(self) -> list[Path]:
        """Finished checkpoints, the newest last."""
        found = [p for p in self.folder.glob("*-*-*") if p.suffix != _PARTIAL] if self.folder.is_dir() else []
        return sorted(found, key=_serial)

    def meta(self) -> dict[str, Any] | None:
        self.world.wait()  # nobody writes any more
        (name, *_) = self.world.gather([p.name for p in self._whole()[-1:]] or [""])
        if not name:
            return None
        self._found = self.folder / name
        try:
            meta: dict[str, Any] = json.loads((self._found / META_FILE).read_text())
            int(meta["step"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"training state: {self._found / META_FILE} cannot be read: {e}") from e
        return meta

    def load(self, allocate: Allocate) -> dict[str, Tensor]:
        reader = HuggingFaceStorageReader(str(self._found))
        tensors = {}
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)  # safetensors hold nothing else
            tensors[name] = allocate(name, stored.properties.dtype, stored.size)
        alone = self.world.size == 1
        if error := _run(lambda: dcp.load(tensors, storage_reader=reader, no_dist=alone)).exception():
            raise ValueError(f"training state: {self._found} cannot be read: {_one_line(error)}") from error
        return tensors

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.finish()
        serial = self.world.gather([_serial(p) for p in self._whole()[-1:]] or [0])[0] + 1
        path = self.folder / f"{serial:06d}-{meta['stage']}-{meta['step']:08d}"
        partial, alone, error = _partial(path), self.world.size == 1, ""
        if self.world.rank == 0:
            try:
                self._prepare(partial, meta)
            except OSError as e:
                error = _one_line(e)
        if error := self.world.agree(error):
            self._refuse(path, error)
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        if self.asynchronous and not alone:
            # The steps go on in these very tensors, and staging leaves those on the CPU where they are.
            tensors = {k: v.detach().clone() for k, v in tensors.items()}
            began = dcp.async_save(tensors, storage_writer=writer, process_group=self.world.saving)
            future = began.upload_completion if isinstance(began, AsyncSaveResponse) else began
            self._writing = (path, future)
        else:
            self._writing = (path, _run(lambda: dcp.save(tensors, storage_writer=writer, no_dist=alone)))
            self.finish()

    def poll(self) -> None:
        # All processes have written when the first one's `dcp.save` returns: it waits for them.
        if self._writing and self.world.rank == 0 and self._writing[1].done() and not self._writing[1].exception():
            self._publish(self._writing[0])

    def finish(self) -> None:
        if self._writing is None:
            return
        (path, future) = self._writing
        error = future.exception()  # waits
        if why := self.world.agree(_one_line(error) if error else ""):
            self._writing = None
            self._refuse(path, why)
        self.poll()
        self._writing = None
        self.world.wait()

    def _refuse(self, path: Path, why: str) -> None:
        if self.world.rank == 0:
            shutil.rmtree(_partial(path), ignore_errors=True)  # gives a full disk its room back
        kept = self._whole()
        last = f"{kept[-1].name} before it is kept" if kept else "there is none before it"
        raise NotSaved(f"checkpoint: {path} could not be written ({why}); {last}")

    def _prepare(self, partial: Path, meta: dict[str, Any]) -> None:
        for rest in self.folder.glob(f"*{_PARTIAL}"):
            shutil.rmtree(rest)
        partial.mkdir(parents=True)
        with replacing(partial / META_FILE) as temporary:
            temporary.write_text(json.dumps(meta))

    def _publish(self, path: Path) -> None:
        """All parts are on the disk: the checkpoint gets its name, and those before it go."""
        if path.is_dir():
            return  # `poll` was here
        before = self._whole()
        os.rename(_partial(path), path)
        for old in before:
            # Out of sight first: a half-deleted folder must not pass for a whole one.
            os.rename(old, _partial(old))
            shutil.rmtree(_partial(old))


def _partial(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)


def _serial(path: Path) -> int:
    """Checkpoints are numbered through all stages."""
    number = path.name.split("-")[0]
    return int(number) if number.isdigit() else -1


def _run(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is in one process
            future.set_result(work())
    except (Exception, CheckpointException) as e:  # the latter is no Exception
        future.set_exception(e)
    return future


def _one_line(error: BaseException) -> str:
    """The cause that a checkpoint's many wrappings carry."""
    if isinstance(error, CheckpointException) and error.failures:  # of every process, by its number
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
