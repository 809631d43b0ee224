"""Opening a checkpoint: headers, index and small files are read and checked; weights are not.

Called by the API for every input before the planner runs. All problems of one checkpoint are raised
together, as one InputError.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

from blake3 import blake3

from rv_distributed.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rv_distributed.checkpoint.distributed import METADATA_FILE
from rv_distributed.checkpoint.foreign import foreign, is_megatron
from rv_distributed.checkpoint.header import (
    LENGTH_BYTES,
    Header,
    HeaderError,
    header_bytes,
    parse_header,
)
from rv_distributed.checkpoint.index import INDEX_FILE, SINGLE_FILE, IndexFormatError, missing_shards, parse_index
from rv_distributed.checkpoint.manifest import MANIFEST_FILE
from rv_distributed.checkpoint.model import Checkpoint, FileState, Tensor
from rv_distributed.checkpoint.sidecars import why_left_out
from rv_distributed.checkpoint.uris import join
from rv_distributed.errors import InputError, Problem, UsageError
from rv_distributed.opening_distributed import open_distributed
from rv_distributed.small_files import CHECK_ACCESS, read_bounded, read_tokenizer, tie_warnings
from rv_distributed.storage import Folder, PosixFolder, open_folder
from rv_distributed.storage.objects import PARALLEL_READS
from rv_distributed.storage.posix import is_text
from rv_distributed.storage.same import same_bytes

#: One read fetches most headers whole.
_FIRST_READ_BYTES: Final = 256 * 1024
_SAMPLE_BYTES: Final = 64 * 1024
#: Of files that are missing.
_MAX_NAMED: Final = 5
_DOWNLOAD_AGAIN: Final = "Download the file again."
_RELINK: Final = "Download the file again, or remove the link."
_OTHER_FORMATS: Final = (
    (
        (".bin", ".pt", ".pth", ".ckpt", ".pkl"),
        "pickled PyTorch weights",
        "A pickle can run code, so none is read; convert other formats first: transformers' from_pretrained and "
        "save_pretrained write safetensors.",
    ),
    (
        (".gguf",),
        "GGUF weights",
        "Give the model that they were made from, or convert them first: transformers' from_pretrained(FOLDER, "
        "gguf_file=NAME) and save_pretrained write safetensors.",
    ),
    (
        (".h5", ".msgpack", ".npz", ".onnx"),
        "weights in another format",
        "Convert them first: transformers' from_pretrained (with from_tf or from_flax) and save_pretrained write "
        "safetensors.",
    ),
)
_COMMIT: Final = re.compile(r"(?:/snapshots/|^hf://[^@]+@)([0-9a-f]{40})(?:/|$)")


def open_checkpoint(uri: str | os.PathLike[str], *, tokenizer: bool = False) -> Checkpoint:
    """Read everything but the weights of the checkpoint in a folder, a bucket or a repository of the Hub, or of a base
    with an adapter: ``BASE+ADAPTER``. With ``tokenizer``, the files that tell its tokens are among that.

    ``open_checkpoint(uri).tensors[name]`` gives a tensor's dtype, shape, file and byte range.

    Raises InputError with every problem found: missing, truncated or malformed shards, an index that
    does not fit its shards, unreadable files.
    """
    pair = _base_and_adapter(os.fspath(uri))
    if pair is None:
        return _open(uri, tokenizer=tokenizer)
    parts: list[Checkpoint] = []
    problems: list[Problem] = []
    for part, is_adapter in zip(pair, (False, True), strict=True):
        try:
            parts.append(_open(part, is_adapter=is_adapter, tokenizer=tokenizer and not is_adapter))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    base, adapter = parts
    return replace(base, adapter=adapter, warnings=base.warnings + adapter.warnings)


def _base_and_adapter(uri: str) -> tuple[str, str] | None:
    """The two folders that ``BASE+ADAPTER`` names; None for a folder, whatever is in its name."""
    splits = [(uri[:place], uri[place + 1 :]) for place, letter in enumerate(uri) if letter == "+"]
    splits = [(base, adapter) for base, adapter in splits if base and adapter]
    if not splits or _is_folder(uri):
        return None
    return next((split for split in splits if all(map(_is_folder, split))), splits[0])


def _is_folder(uri: str) -> bool:
    try:
        return bool(open_folder(uri).files())
    except (InputError, UsageError):
        return False


def _open(uri: str | os.PathLike[str], *, is_adapter: bool = False, tokenizer: bool = False) -> Checkpoint:
    folder = open_folder(uri)
    files = {file.name: file for file in folder.files()}
    problems: list[Problem] = [
        Problem(folder.uri, f"holds a file whose name is not UTF-8: {name!r}", "Rename the file.")
        for name in files
        if not is_text(name)
    ]
    problems += _unreachable(folder) if isinstance(folder, PosixFolder) else []
    warnings: list[str] = []
    digest = blake3()
    has_shards = any(name.endswith(".safetensors") and "/" not in name for name in files)
    if METADATA_FILE in files and not has_shards and not is_megatron(files) and not is_adapter:
        distributed = open_distributed(folder, files, problems)
        tensors, weight_files = distributed.tensors, distributed.files
        digest.update(distributed.digest)
        warnings += distributed.warnings
    else:
        weight_map: dict[str, str] | None = None
        if is_adapter:
            weight_files = _adapter_weights(folder, files, problems)
        else:
            weight_map, weight_files = _choose_shards(folder, files, problems, warnings)
        tensors = _load_shards(folder, weight_files, digest, problems)
        if weight_map is not None and not problems:
            problems += _check_index(folder, weight_map, tensors)
    # An adapter that is opened as a model is said to be one where it is used as one.
    is_adapter = is_adapter or [file.name for file in weight_files] == [ADAPTER_WEIGHTS]
    config_file = ADAPTER_CONFIG if is_adapter else "config.json"
    config = _read_json(folder, files, config_file, problems)
    if is_adapter and config is not None:
        # It says by how much the factors' product counts.
        digest.update(json.dumps(config, sort_keys=True).encode())
    manifest = _read_json(folder, files, MANIFEST_FILE, problems)
    tells = read_tokenizer(folder, files, problems) if tokenizer else None
    if not problems:
        try:
            warnings += tie_warnings(folder, config or {}, tensors)
        except OSError as error:
            problems.append(Problem(folder.uri, f"cannot be read: {error.strerror or error}", CHECK_ACCESS))
    if problems:
        raise InputError(problems)
    revision = _COMMIT.search(folder.uri)
    return Checkpoint(
        uri=folder.uri,
        tensors=tensors,
        weight_files=tuple(weight_files),
        sidecars=tuple(file for name, file in files.items() if not why_left_out(name)),
        config=config or {},
        fingerprint="blake3:" + digest.hexdigest(),
        revision=revision.group(1) if revision else None,
        manifest=manifest,
        warnings=tuple(warnings),
        left_out=tuple(
            (name, why)
            for name, file in files.items()
            if (why := why_left_out(name)) and file not in weight_files and name != INDEX_FILE
        ),
        tokenizer=tells,
    )


def _load_shards(
    folder: Folder, shards: Sequence[FileState], digest: blake3, problems: list[Problem]
) -> dict[str, Tensor]:
    """The tensors of all shards; ``digest`` takes their headers in, and a sample of each."""

    def load(file: FileState) -> tuple[Header, int, bytes] | Problem:
        return _load_header(folder, file)

    tensors: dict[str, Tensor] = {}
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        for file, loaded in zip(shards, pool.map(load, shards), strict=True):
            if isinstance(loaded, Problem):
                problems.append(loaded)
                continue
            header, data_start, sample = loaded
            digest.update(sample)
            for name, entry in header.entries.items():
                if name in tensors:
                    what = f"stands in two shards, {tensors[name].file} and {file.name}"
                    problems.append(Problem(folder.uri, what, "Remove the shard that is not part of the model.", name))
                tensors[name] = Tensor(
                    entry.dtype, entry.shape, file.name, data_start + entry.start, data_start + entry.stop
                )
    return tensors


def _choose_shards(
    folder: Folder, files: dict[str, FileState], problems: list[Problem], warnings: list[str]
) -> tuple[dict[str, str] | None, list[FileState]]:
    """The index, if there is one, and the shards that make up the model."""
    present = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    if INDEX_FILE not in files:
        if SINGLE_FILE in files:
            present = [SINGLE_FILE]
        elif not present:
            problems.append(_other_format(folder, files))
        elif missing := list(missing_shards(present)):
            more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
            what = f"lacks {', '.join(missing[:_MAX_NAMED])}{more}: its other shards' names count them"
            problems.append(Problem(folder.uri, what, "Download what is missing, and the index, if there is one."))
        return None, [files[name] for name in present]
    where = folder.path(INDEX_FILE)
    try:
        weight_map = parse_index(read_bounded(folder, files[INDEX_FILE]))
    except IndexFormatError as error:
        problems.append(Problem(where, str(error), _DOWNLOAD_AGAIN))
        return None, []
    except OSError as error:
        problems.append(Problem(where, f"cannot be read: {error.strerror or error}", CHECK_ACCESS))
        return None, []
    named = sorted(set(weight_map.values()))
    for name in named:
        if name not in files:
            what = f"names the shard {name}, which is missing"
            problems.append(Problem(where, what, "Download the shard, or correct the index."))
    stray = sorted(set(present) - set(named))
    if SINGLE_FILE in stray:
        what = "stands beside an index that does not name it, and transformers would load it instead of the shards"
        problems.append(Problem(folder.path(SINGLE_FILE), what, "Remove the index, or this file."))
    elif stray:
        warnings.append(f"{folder.uri}: the index does not name {', '.join(stray)}: not read")
    return weight_map, [files[name] for name in named if name in files]


def _adapter_weights(folder: Folder, files: dict[str, FileState], problems: list[Problem]) -> list[FileState]:
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        if name not in files:
            what = f"holds no {name}, which a LoRA adapter has"
            problems.append(Problem(folder.uri, what, "Save the adapter with PEFT's save_pretrained, as safetensors."))
    return [files[ADAPTER_WEIGHTS]] if ADAPTER_WEIGHTS in files else []


def _unreachable(folder: PosixFolder) -> list[Problem]:
    """What stands where a file of the model should be: links that lead nowhere, and folders."""
    problems = [
        Problem(folder.path(name), f"is a link to {leads_to}, where no file can be reached", _RELINK)
        for name, leads_to in folder.broken_links().items()
        if not why_left_out(name) or name.endswith((".safetensors", INDEX_FILE, MANIFEST_FILE))
    ]
    expected = (INDEX_FILE, SINGLE_FILE, "config.json", MANIFEST_FILE)
    is_folder = "is a folder, but the model's file of this name is wanted"
    return problems + [
        Problem(folder.path(name), is_folder, _DOWNLOAD_AGAIN) for name in expected if os.path.isdir(folder.path(name))
    ]


def _other_format(folder: Folder, files: dict[str, FileState]) -> Problem:
    known = foreign(files)
    if known is not None:
        remedy = known.remedy.replace("FOLDER", folder.uri)
        return Problem(folder.uri, f"holds {known.kind} ({known.file}) and no safetensors files", remedy)
    for suffixes, kind, remedy in _OTHER_FORMATS:
        found = next((name for name in files if name.endswith(suffixes)), None)
        if found:
            return Problem(folder.uri, f"holds {kind} ({found}) and no safetensors files", remedy)
    remedy = "Give a folder with model.safetensors or an index and its shards; convert other formats first."
    return Problem(folder.uri, "holds no safetensors files", remedy)


def _load_header(folder: Folder, file: FileState) -> tuple[Header, int, bytes] | Problem:
    where = folder.path(file.name)
    try:
        first = folder.read(file.name, 0, _FIRST_READ_BYTES)
        if first.startswith(b"version https://git-lfs"):
            what = "is a Git LFS pointer, not the weights themselves"
            return Problem(where, what, "Run 'git lfs pull' in the repository.")
        length = header_bytes(first, file_bytes=file.size)
        data_start = LENGTH_BYTES + length
        raw = first[LENGTH_BYTES:data_start]
        if len(raw) < length:
            raw += folder.read(file.name, len(first), data_start)
        header = parse_header(raw, data_bytes=file.size - data_start)
        middle = (data_start + file.size) // 2
        data = folder.read(file.name, middle, middle + _SAMPLE_BYTES)
    except HeaderError as error:
        return Problem(where, error.what, _DOWNLOAD_AGAIN, error.tensor)
    except OSError as error:
        return Problem(where, f"cannot be read: {error.strerror or error}", CHECK_ACCESS)
    return header, data_start, blake3(f"{file.name}\0{file.size}\0".encode()).update(raw).update(data).digest()


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints have the same files of weights, byte for byte, and so have their adapters.

    Other fingerprints tell them apart at once; only those with the same one are read, up to the first difference.
    Raises OSError.
    """
    return len(one.folders) == len(other.folders) and all(map(_same_files, one.folders, other.folders))


def _same_files(one: Checkpoint, other: Checkpoint) -> bool:
    if one.uri == other.uri:
        return True
    return one.fingerprint == other.fingerprint and all(
        same_bytes(join(one.uri, file.name), join(other.uri, file.name), file.size) for file in one.weight_files
    )


def _check_index(folder: Folder, weight_map: dict[str, str], tensors: dict[str, Tensor]) -> list[Problem]:
    where, problems = folder.path(INDEX_FILE), []
    remedy = "The index and the shards come from different versions of the model: download both again."
    for name, shard in weight_map.items():
        if name not in tensors:
            problems.append(Problem(where, f"says that {shard} holds it, but it does not", remedy, name))
        elif tensors[name].file != shard:
            problems.append(Problem(where, f"says {shard}, but {tensors[name].file} holds it", remedy, name))
    return problems + [
        Problem(where, f"does not name it, but {tensors[name].file} holds it", remedy, name)
        for name in tensors
        if name not in weight_map
    ]


def _read_json(
    folder: Folder, files: dict[str, FileState], name: str, problems: list[Problem]
) -> dict[str, Any] | None:
    if name not in files:
        return None
    try:
        document = json.loads(read_bounded(folder, files[name]))
    except OSError as error:
        problems.append(Problem(folder.path(name), f"cannot be read: {error.strerror or error}", CHECK_ACCESS))
        return None
    except (ValueError, RecursionError) as error:
        problems.append(Problem(folder.path(name), f"is not readable JSON: {error}", _DOWNLOAD_AGAIN))
        return None
    if not isinstance(document, dict):
        problems.append(Problem(folder.path(name), "is not a JSON object", _DOWNLOAD_AGAIN))
        return None
    return document
