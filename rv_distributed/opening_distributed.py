"""Opening a folder that PyTorch Distributed Checkpoint wrote: ``.metadata``, and of each part of the model's tensors
the few bytes around its elements. Called by `open_checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from blake3 import blake3

from rv_distributed.checkpoint.distributed import (
    ENDS_BYTES,
    METADATA_FILE,
    DistributedFormatError,
    Ends,
    Record,
    SavedTensor,
    first_element,
    parse_metadata,
)
from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.checkpoint.model import FileState, Tensor
from rv_distributed.checkpoint.sources import Box, Gathered
from rv_distributed.errors import MAX_REPORTED, Problem
from rv_distributed.storage import Folder
from rv_distributed.storage.objects import PARALLEL_READS
from rv_distributed.units import plural

_MAX_METADATA_BYTES: Final = 1_000_000_000
_SAMPLE_BYTES: Final = 64 * 1024
_SAVE_AGAIN: Final = "Save the checkpoint again, or convert it: transformers' save_pretrained writes safetensors."


class Distributed(NamedTuple):
    """What was found."""

    tensors: dict[str, Tensor]
    files: list[FileState]
    """``.metadata``, and the files that hold the tensors."""
    digest: bytes
    """Of names, sizes, ``.metadata`` and a sample of each file."""
    warnings: list[str]


def open_distributed(folder: Folder, files: Mapping[str, FileState], problems: list[Problem]) -> Distributed:
    """Read all but the elements of a folder with a ``.metadata``; adds to ``problems`` what is wrong."""
    where = folder.path(METADATA_FILE)
    found = Distributed({}, [files[METADATA_FILE]], b"", [])
    try:
        if files[METADATA_FILE].size > _MAX_METADATA_BYTES:
            raise OSError(f"has {files[METADATA_FILE].size} bytes, more than it needs")
        raw = folder.read(METADATA_FILE)
        saved = parse_metadata(raw)
    except DistributedFormatError as error:
        problems.append(Problem(where, error.what, _SAVE_AGAIN, error.tensor))
        return found
    except OSError as error:
        problems.append(Problem(where, f"cannot be read: {error.strerror or error}", "Check its storage."))
        return found
    if not saved.tensors:
        problems.append(Problem(where, "holds no tensors of a model", _SAVE_AGAIN))
    if saved.others:
        count = plural(len(saved.others), "tensor")
        found.warnings.append(f"{folder.uri}: {count} of no model, such as {saved.others[0]}: not read")
    parts = [(name, tensor, record) for name, tensor in saved.tensors.items() for record in tensor.records]

    def locate(part: tuple[str, SavedTensor, Record]) -> int | Problem:
        return _locate(folder, files, *part)

    wrong: list[Problem] = []
    boxes: dict[str, list[Box]] = {name: [] for name in saved.tensors}
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        for (name, _, record), place in zip(parts, pool.map(locate, parts), strict=True):
            if isinstance(place, Problem):
                wrong.append(place)
            else:
                boxes[name].append(Box(folder.path(record.file), place, record.starts, record.sizes))
    if len(wrong) > MAX_REPORTED:
        more = f"has {len(wrong) - MAX_REPORTED} more parts with such problems"
        wrong[MAX_REPORTED:] = [Problem(where, more, "Correct the ones above first.")]
    problems += wrong
    if problems:
        return found
    for name, tensor in saved.tensors.items():
        found.tensors[name] = _as_tensor(tensor, boxes[name])
    used = sorted({record.file for _, _, record in parts})
    found.files.extend(files[file] for file in used)
    return found._replace(digest=_digest(folder, raw, [files[file] for file in used], problems))


def _locate(
    folder: Folder, files: Mapping[str, FileState], name: str, tensor: SavedTensor, record: Record
) -> int | Problem:
    """Where in its file the first element of a part lies."""
    file, offset, length, *_ = record
    where = folder.path(METADATA_FILE)
    if file not in files:
        return Problem(where, f"says that {file} holds a part of it, which is missing", "Copy the whole folder.", name)
    if offset + length > files[file].size:
        what = f"says that {file} holds a part of it at {offset} to {offset + length}; it has {files[file].size} bytes"
        return Problem(where, what, "Copy the whole folder again.", name)
    try:
        head = folder.read(file, offset, offset + min(ENDS_BYTES, length))
        tail = folder.read(file, offset + max(0, length - ENDS_BYTES), offset + length)
        return offset + first_element(Ends(length, head, tail), tensor, record)
    except DistributedFormatError as error:
        at = f"{folder.path(file)}, bytes {offset} to {offset + length}"
        return Problem(at, error.what, _SAVE_AGAIN, name)
    except OSError as error:
        return Problem(folder.path(file), f"cannot be read: {error.strerror or error}", "Check its storage.", name)


def _as_tensor(saved: SavedTensor, boxes: list[Box]) -> Tensor:
    if len(boxes) == 1:
        (record,) = saved.records
        stop = boxes[0].offset + item_bytes(saved.dtype) * Tensor(saved.dtype, saved.shape, "", 0, 0).elements
        return Tensor(saved.dtype, saved.shape, record.file, boxes[0].offset, stop)
    nbytes = item_bytes(saved.dtype) * Tensor(saved.dtype, saved.shape, "", 0, 0).elements
    source = Gathered(saved.dtype, saved.shape, tuple(boxes)) if boxes else None
    return Tensor(saved.dtype, saved.shape, METADATA_FILE, 0, nbytes, source)


def _digest(folder: Folder, metadata: bytes, used: list[FileState], problems: list[Problem]) -> bytes:
    digest = blake3(metadata)
    for file in used:
        middle = file.size // 2
        try:
            digest.update(f"{file.name}\0{file.size}\0".encode())
            digest.update(folder.read(file.name, middle, middle + _SAMPLE_BYTES))
        except OSError as error:
            what = f"cannot be read: {error.strerror or error}"
            problems.append(Problem(folder.path(file.name), what, "Check its storage."))
    return digest.digest()
