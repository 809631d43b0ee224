"""PyTorch Distributed Checkpoints: what ``.metadata`` says of the tensors, and where in a record of a ``.distcp`` file
the elements of a part of a tensor lie. Pure functions over bytes, which are hostile: `load_inert` reads the pickles.

``.metadata`` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. A record is what ``torch.save`` makes of
one part: a zip archive without compression, whose ``data.pkl`` describes a tensor and whose ``data/0`` is its storage.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from reprlib import repr as shortened
from typing import Any, Final, NamedTuple

from rv_distributed.checkpoint.dtypes import DTYPES, item_bytes
from rv_distributed.checkpoint.header import HeaderError, tensor_bytes
from rv_distributed.checkpoint.inert import Inert, Named, PickleError, load_inert

METADATA_FILE: Final = ".metadata"
#: Of a record's first and last bytes, that hold all of it but the elements.
ENDS_BYTES: Final = 4096
_MAX_DIMENSIONS: Final = 64

_OF_METADATA: Final = "torch.distributed.checkpoint.metadata."
_TENSOR: Final = _OF_METADATA + "TensorStorageMetadata"
_BYTES: Final = _OF_METADATA + "BytesStorageMetadata"
_INFO: Final = "torch.distributed.checkpoint.filesystem._StorageInfo"
_CLASSES: Final = (
    *(_OF_METADATA + name for name in ("Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorProperties")),
    *(_OF_METADATA + name for name in ("_MEM_FORMAT_ENCODING", "StorageMeta")),
    *(_TENSOR, _BYTES, _INFO, "torch.serialization._get_layout"),
    *("pathlib.PosixPath", "pathlib._local.PosixPath", "pathlib.WindowsPath", "pathlib._local.WindowsPath"),
)
#: torch's dtypes, by their names in headers of safetensors; those that have none there are refused by name.
_DTYPES: Final = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "complex128": "complex128",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
_VALUES: Final = {"torch.Size": tuple, "collections.OrderedDict": Named} | {
    f"torch.{name}": dtype for name, dtype in _DTYPES.items()
}
_STORAGES: Final = {
    "Bool": "BOOL",
    "Byte": "U8",
    "Char": "I8",
    "Short": "I16",
    "Int": "I32",
    "Long": "I64",
    "Half": "F16",
    "BFloat16": "BF16",
    "Float": "F32",
    "Double": "F64",
    "ComplexFloat": "C64",
}
_REBUILD: Final = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_ANY_STORAGE: Final = "any"
_RECORD_VALUES: Final = (
    _VALUES
    | {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()}
    | {"torch.storage.UntypedStorage": _ANY_STORAGE}
)
#: Keys of nested state dicts under which models are saved.
_MODEL_KEYS: Final = frozenset({"model", "state_dict", "model_state_dict", "module"})
_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")


class DistributedFormatError(ValueError):
    """Something is not what PyTorch writes. ``tensor`` is the one at fault, if it is one."""

    def __init__(self, what: str, tensor: str | None = None) -> None:
        super().__init__(what, tensor)
        self.what, self.tensor = what, tensor


class Record(NamedTuple):
    """Where a part of a tensor was saved."""

    file: str
    offset: int
    length: int
    """Bytes of the whole archive."""
    starts: tuple[int, ...]
    """Index of the part's first element, by dimension."""
    sizes: tuple[int, ...]


class SavedTensor(NamedTuple):
    """A tensor, by its records: without those of no elements."""

    dtype: str
    shape: tuple[int, ...]
    records: tuple[Record, ...]


class Saved(NamedTuple):
    """What ``.metadata`` says."""

    tensors: dict[str, SavedTensor]
    """Of the model, by the names that it gives them."""
    others: tuple[str, ...]
    """Names of the tensors that are not the model's, such as an optimizer's."""


def parse_metadata(raw: bytes) -> Saved:
    """The model in a ``.metadata``. Raises DistributedFormatError."""
    try:
        metadata = load_inert(raw, _CLASSES, _VALUES)
    except PickleError as error:
        raise DistributedFormatError(str(error)) from None
    if not isinstance(metadata, Inert) or metadata.name != _OF_METADATA + "Metadata":
        raise DistributedFormatError("is no metadata of a distributed checkpoint")
    entries, places = _dict(metadata.field("state_dict_metadata")), _dict(metadata.field("storage_data"))
    infos: dict[tuple[str, tuple[int, ...] | None], Any] = {}
    for index, info in places.items():
        if isinstance(index, Inert) and isinstance(index.field("fqn"), str):
            offset = index.field("offset")
            infos[index.field("fqn"), None if offset is None else _sizes(offset, index.field("fqn"))] = info
    named = {name: entry for name, entry in entries.items() if _is(entry, _TENSOR)}
    if not all(isinstance(name, str) and isinstance(entry, Inert) for name, entry in entries.items()):
        raise DistributedFormatError("is no metadata of a distributed checkpoint")
    names = _model_names(named, metadata.field("planner_data"))
    tensors = {own: _tensor(name, named[name], infos) for name, own in names.items()}
    return Saved(tensors, tuple(name for name in named if name not in names))


def _model_names(saved: Iterable[str], planner_data: object) -> dict[str, str]:
    """The model's own names of its tensors, by those that they are saved under.

    A nested state dict is flattened when it is saved, and ``planner_data`` tells how. The model is what lies under one
    of `_MODEL_KEYS`, or what is not nested, as torchtitan saves it.
    """
    paths = planner_data if isinstance(planner_data, dict) else {}
    nested = {name: _path(paths.get(name), name) for name in saved}
    roots: dict[tuple[str, ...], dict[str, str]] = {}
    for name, path in nested.items():
        depth = next((depth for depth, key in enumerate(path[:-1], 1) if key in _MODEL_KEYS), 0)
        if depth or len(path) == 1:
            roots.setdefault(path[:depth], {})[name] = ".".join(path[depth:])
    models = {root: names for root, names in roots.items() if root}
    if len(models) > 1:
        found = ", ".join(".".join(root) for root in models)
        raise DistributedFormatError(f"holds several models ({found}), and none can be told to be the one")
    if models:
        return next(iter(models.values()))
    return roots.get((), {}) or {name: name for name in nested}


def _path(path: object, name: str) -> tuple[str, ...]:
    if path is None:
        return (name,)
    if not isinstance(path, tuple) or not path or not all(isinstance(key, str | int) for key in path):
        raise DistributedFormatError("has a path in the nested state that is none", name)
    return tuple(map(str, path))


def _tensor(name: str, entry: Inert, infos: Mapping[tuple[str, tuple[int, ...] | None], Any]) -> SavedTensor:
    properties = entry.field("properties")
    state = properties.state if isinstance(properties, Inert) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, str):
        raise DistributedFormatError("has no dtype", name)
    if dtype not in DTYPES:
        raise DistributedFormatError(f"has the dtype {dtype}, which safetensors has not", name)
    shape = _sizes(entry.field("size"), name)
    try:
        tensor_bytes(dtype, shape)
    except HeaderError as error:
        raise DistributedFormatError(error.what, name) from None
    chunks = entry.field("chunks")
    records = []
    for chunk in chunks if isinstance(chunks, list) else []:
        starts, sizes = (
            _sizes(chunk.field(of) if isinstance(chunk, Inert) else None, name) for of in ("offsets", "sizes")
        )
        if math.prod(sizes):
            # Plain tensors have been saved without an offset, too.
            info = infos.get((name, starts)) or infos.get((name, None))
            records.append(Record(*_place(info, name), starts, sizes))
    records.sort(key=lambda record: record.starts)
    if not _covers(shape, records):
        raise DistributedFormatError(f"has parts that do not make up its shape, {list(shape)}", name)
    return SavedTensor(dtype, shape, tuple(records))


def _place(info: object, name: str) -> tuple[str, int, int]:
    if not isinstance(info, Inert) or info.name != _INFO:
        raise DistributedFormatError("has a part that is saved nowhere", name)
    if info.field("transform_descriptors"):
        raise DistributedFormatError("is saved through a transformation, such as compression", name)
    file, offset, length = (info.field(of) for of in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not _is_natural(offset) or not _is_natural(length):
        raise DistributedFormatError("has a part whose place is none", name)
    return file, offset, length


def _covers(shape: Sequence[int], records: Sequence[Record]) -> bool:
    """Whether parts make up a whole, each element in one: they are all cut at the same places along each dimension, and
    there is one in each cell of that grid."""
    if not math.prod(shape):
        return not records
    cuts = []
    for dimension, size in enumerate(shape):
        starts = sorted({record.starts[dimension] for record in records if len(record.starts) > dimension})
        cuts.append(dict(zip(starts, [*starts[1:], size], strict=False)))
        if starts[:1] != [0]:
            return False
    for record in records:
        if len(record.starts) != len(shape) or len(record.sizes) != len(shape):
            return False
        ends = [ends[start] for ends, start in zip(cuts, record.starts, strict=True)]
        if any(start + size != end for start, size, end in zip(record.starts, record.sizes, ends, strict=True)):
            return False
    cells = math.prod(len(ends) for ends in cuts)
    return len(records) == cells == len({record.starts for record in records})


def first_element(ends: Ends, tensor: SavedTensor, record: Record) -> int:
    """Where in a record the first element of its part lies, in bytes from the record's first.

    Raises DistributedFormatError when the record is not of the part that ``.metadata`` says, or is laid out otherwise.
    """
    try:
        with zipfile.ZipFile(ends) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            pickled, data = members["data.pkl"], members["data/0"]
            if len(members) != len(archive.infolist()):
                raise DistributedFormatError("holds two files of one name")
            if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in members.values()):
                raise DistributedFormatError("is compressed or encrypted")
            if pickled.file_size > ENDS_BYTES:
                raise DistributedFormatError(f"describes its tensor in {pickled.file_size} bytes")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise DistributedFormatError("was saved on a machine of another byte order")
            description = load_inert(archive.read(pickled), _REBUILD, _RECORD_VALUES)
        ends.seek(data.header_offset)
        signature, of_name, of_extra = _LOCAL_HEADER.unpack(ends.read(_LOCAL_HEADER.size))
    except DistributedFormatError:
        raise
    except Exception as error:  # whatever goes wrong in a hostile archive
        raise DistributedFormatError(f"is not what torch.save writes: {error!r:.200}") from None
    start = data.header_offset + _LOCAL_HEADER.size + int(of_name) + int(of_extra)
    first, count = _described(description, tensor, record)
    item = item_bytes(tensor.dtype)
    if signature != b"PK\3\4" or data.file_size != count * item or start + data.file_size > record.length:
        raise DistributedFormatError(f"has {data.file_size} bytes of elements at {start}, not {count * item}")
    return start + first * item


def _described(description: object, tensor: SavedTensor, record: Record) -> tuple[int, int]:
    """The first element of a tensor in its storage, and the elements of the storage."""
    if not isinstance(description, Inert) or description.name not in _REBUILD or len(description.args) < 4:
        raise DistributedFormatError("does not hold a plain tensor")
    storage, first, sizes, strides = description.args[:4]
    if not isinstance(storage, tuple) or len(storage) != 5 or not _is_natural(storage[4]) or not _is_natural(first):
        raise DistributedFormatError("does not hold a plain tensor")
    dtype, count = storage[1], storage[4]
    if dtype == _ANY_STORAGE:
        # Then the count is in bytes, and the dtype stands at the end.
        dtype = description.args[6] if len(description.args) > 6 else None
        count = count // item_bytes(tensor.dtype)
    if dtype != tensor.dtype or sizes != record.sizes:
        what = f"holds {shortened(dtype)} of shape {shortened(sizes)}, not {tensor.dtype} of shape {list(record.sizes)}"
        raise DistributedFormatError(what)
    contiguous = [math.prod(record.sizes[dimension + 1 :]) for dimension in range(len(record.sizes))]
    apart = [(s, c) for s, c, size in zip(strides, contiguous, sizes, strict=False) if size > 1]
    if not isinstance(strides, tuple) or len(strides) != len(sizes) or any(s != c for s, c in apart):
        raise DistributedFormatError(f"is not contiguous: its strides are {shortened(strides)}")
    if first + math.prod(record.sizes) > count:
        raise DistributedFormatError(f"is a view beyond its storage of {count} elements")
    return first, count


class Ends(io.RawIOBase):
    """A record of which only the first and the last bytes are there: reading others is an error."""

    def __init__(self, length: int, head: bytes, tail: bytes) -> None:
        super().__init__()
        self._length, self._head, self._tail, self._at = length, head, tail, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise OSError("a place before the first byte")
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        start = self._at
        stop = self._length if size is None or size < 0 else min(start + size, self._length)
        self._at = max(start, stop)
        if stop <= len(self._head):
            return self._head[start:stop]
        behind = self._length - len(self._tail)
        if start < behind:
            raise OSError(f"bytes {start} to {stop}, in the middle of its elements")
        return self._tail[start - behind : stop - behind]


def _is(entry: object, name: str) -> bool:
    return isinstance(entry, Inert) and entry.name == name


def _dict(value: object) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise DistributedFormatError("is no metadata of a distributed checkpoint")
    return value


def _is_natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _sizes(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS or not all(map(_is_natural, value)):
        raise DistributedFormatError(f"has sizes that are none: {shortened(value)}", name)
    return value
