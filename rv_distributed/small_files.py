"""What the small files beside the weights tell, and a look at the weights that a config makes a claim about.

`open_checkpoint` calls these; the command line reads its own ``--key-mapping`` here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from rv_distributed.checkpoint.bare_names import embedding_and_head
from rv_distributed.checkpoint.config import stated, vocab_size
from rv_distributed.checkpoint.key_mapping import KeyRule, parse_key_mapping
from rv_distributed.checkpoint.model import FileState, Tensor
from rv_distributed.checkpoint.vocabulary import vocabulary_files
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


def read_tokenizer(folder: Folder, files: Mapping[str, FileState], problems: list[Problem]) -> dict[str, bytes]:
    """The files that tell the token of every id. One that cannot be read becomes a problem."""
    found = {}
    for name in vocabulary_files(files):
        try:
            found[name] = read_bounded(folder, files[name])
        except OSError as error:
            what = f"cannot be read: {error.strerror or error}"
            problems.append(Problem(folder.path(name), what, CHECK_ACCESS))
    return found


def tie_warnings(folder: Folder, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Whether head and embedding differ although the config says that they are tied, as far as a sample tells.

    Raises OSError.
    """
    if stated(config, "tie_word_embeddings") is not True:
        return
    found = embedding_and_head(tensors, vocab_size(config))
    if len(found) != 2:
        return
    (name, one), (other_name, other) = found.items()
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
