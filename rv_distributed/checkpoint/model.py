"""What is known of a checkpoint from its headers, index and small files alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rv_distributed.checkpoint.sources import Operand, Source
from rv_distributed.checkpoint.uris import join


class Tensor(NamedTuple):
    """Where one tensor lies: ``file[start:stop]`` holds its elements in row-major order, or ``source`` says more."""

    dtype: str
    """safetensors name, for instance ``BF16``."""
    shape: tuple[int, ...]
    file: str
    """File name inside the checkpoint."""
    start: int
    """Byte offset in the file."""
    stop: int
    source: Source | None = None
    """Where its elements come from, when that is not one range of a file of the checkpoint. Then ``file`` is the one
    that tells where they are, and ``stop - start`` is how many bytes they take as they are stored."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class FileState(NamedTuple):
    """One file of a checkpoint. ``state`` changes whenever the file is replaced or written to."""

    name: str
    """Relative to the checkpoint, with ``/`` between folders."""
    size: int
    """Bytes."""
    state: str
    """Opaque: modification time and inode, or an etag."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint, opened: everything but its weights has been read."""

    uri: str
    """As resolved: an absolute path or a URI; on the Hub, with the commit."""
    tensors: Mapping[str, Tensor]
    """All tensors, in the order of the shards and of the data in them."""
    weight_files: tuple[FileState, ...]
    """The safetensors files that hold the tensors, in the order of ``tensors``."""
    sidecars: tuple[FileState, ...]
    """The other files that belong to the model: config, tokenizer, licence, code."""
    config: Mapping[str, Any]
    """config.json, or empty."""
    fingerprint: str
    """BLAKE3 over names, sizes and headers of the weight files and 64 KiB from the middle of each one's
    data. Tells checkpoints of one family apart, wherever they lie; it is no proof of equal weights."""
    revision: str | None
    """The commit, where the path or the Hub tells it."""
    manifest: Mapping[str, Any] | None
    """rv_manifest.json, if this is an output of ours."""
    warnings: tuple[str, ...]
    """What was odd but harmless, such as a shard that no index names."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Files that are no part of the model, each with the reason. Of version control and caches, nothing is named."""
    tokenizer: Mapping[str, bytes] | None = None
    """The content of the files that tell the token of every id; empty when none does, None when nobody asked."""
    adapter: Checkpoint | None = None
    """A LoRA adapter that its values are to be taken with: its tensors are the factors, its config is
    adapter_config.json."""

    @property
    def name(self) -> str:
        """What it was opened as."""
        return self.uri if self.adapter is None else f"{self.uri}+{self.adapter.uri}"

    @property
    def folders(self) -> tuple[Checkpoint, ...]:
        """Itself and its adapter."""
        return (self,) if self.adapter is None else (self, self.adapter)

    def path(self, name: str) -> str:
        """One of its files, by its name inside."""
        return join(self.uri, name)

    def stored(self, tensor: Tensor) -> Operand:
        """The bytes of a tensor that lies in one range of a file."""
        return Operand(self.path(tensor.file), tensor.start, tensor.dtype)

    def source(self, tensor: Tensor) -> Source:
        """Where the elements of one of its tensors come from."""
        return tensor.source or self.stored(tensor)

    @property
    def parameters(self) -> int:
        """Elements in all tensors."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.stop - tensor.start for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Elements by dtype, most first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += tensor.elements
        return dict(counts.most_common())


def all_folders(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Checkpoints and their adapters."""
    return [folder for checkpoint in checkpoints for folder in checkpoint.folders]
