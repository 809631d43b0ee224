"""What the small files beside the weights tell, and a look at the weights that a config makes a claim about.

`open_checkpoint` calls these; the command line reads its own ``--key-mapping`` here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from rv_distributed.checkpoint.config import stated, vocab_size
from rv_distributed.checkpoint.key_mapping import KeyRule, parse_key_mapping
from rv_distributed.checkpoint.model import FileState, Tensor
from rv_distributed.checkpoint.vocabulary import VocabularyError, parse_vocabulary, vocabulary_files
from rv_distributed.errors import InputError, Problem
from rv_distributed.storage import Folder

_MAX_BYTES: Final = 100_000_000
#: As much of two tensors is compared as tells in a moment whether one was trained apart from the other.
_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 4 * 1024
CHECK_ACCESS: Final = "Check its permissions and its storage."


def read_bounded(folder: Folder, file: FileState) -> bytes:
    """A small file. Raises OSError, also when it is not small."""
    if file.size > _MAX_BYTES:
        raise OSError(f"has {file.size} bytes, more than any such file needs")
    return folder.read(file.name)


def read_vocabulary(folder: Folder, files: Mapping[str, FileState], problems: list[Problem]) -> dict[int, str] | None:
    """The token of every id; None when no file tells. What is wrong with one that should becomes a problem."""
    names = vocabulary_files(files)
    try:
        return parse_vocabulary({name: read_bounded(folder, files[name]) for name in names}) if names else None
    except VocabularyError as error:
        problems.append(Problem(folder.path(error.file), error.what, "Download the file again."))
    except OSError as error:
        where = folder.path(names[0])
        problems.append(Problem(where, f"cannot be read: {error.strerror or error}", CHECK_ACCESS))
    return None


def tie_warnings(folder: Folder, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Whether head and embedding differ although the config says that they are tied, as far as a sample tells.

    Raises OSError.
    """
    if stated(config, "tie_word_embeddings") is not True:
        return
    rows = vocab_size(config)
    found = [(name, tensor) for name, tensor in tensors.items() if len(tensor.shape) == 2 and tensor.shape[0] == rows]
    if len(found) != 2:
        return
    (name, one), (other_name, other) = found
    if (one.dtype, one.shape) != (other.dtype, other.shape) or one.source is not None or other.source is not None:
        return
    for number in range(_SAMPLES):
        at = (one.stop - one.start) * number // _SAMPLES
        samples = [folder.read(t.file, t.start + at, min(t.start + at + _SAMPLE_BYTES, t.stop)) for t in (one, other)]
        if samples[0] != samples[1]:
            yield (
                f"{folder.uri}: config.json says that head and embedding are tied, but {name!r} and {other_name!r} "
                "differ: each is taken as it is stored"
            )
            return


def read_key_mapping(path: str) -> tuple[KeyRule, ...]:
    """The rules in a file, for `PlanOptions.key_mapping`. Raises InputError with every line that is none."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES)
    except OSError as error:
        raise InputError([Problem(path, f"cannot be read: {error.strerror}", "Give a file of rules.")]) from error
    return parse_key_mapping(path, raw)
