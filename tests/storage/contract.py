"""What every storage must do, as test classes that each storage's tests subclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from rv_distributed.errors import InputError
from rv_distributed.storage import Folder, open_folder, open_reader, open_store, open_writer
from rv_distributed.storage.objects import PART_BYTES, REQUEST_BYTES
from rv_distributed.storage.protocols import ObjectStore
from rv_distributed.storage.ranges import ALIGNMENT

CONTENT = np.random.default_rng(7).bytes(300_001)
LARGE = np.random.default_rng(8).bytes(REQUEST_BYTES + 12_345)
FILES = {"config.json": b"{}", "empty": b"", "model.safetensors": CONTENT, "code/model.py": b"pass"}
#: Pages, so that direct I/O can be tried too.
RANGES = [(0, 1), (0, 300_001), (1, 4095), (4095, 4098), (4096, 8192), (299_999, 300_001), (7, 299_000)]
Place = Callable[[str, Mapping[str, bytes]], str]


def read(path: str, start: int, stop: int) -> bytes:
    """A range, as workers read it."""
    buffer = memoryview(bytearray(stop - start + 2 * ALIGNMENT))
    at = (start % ALIGNMENT) + 1  # never fit for direct I/O, which wants memory of its own
    with closing(open_reader(path)) as reader:
        reader.read(buffer, at, start, stop - start)
    return bytes(buffer[at : at + stop - start])


class FolderContract:
    """Reading. A subclass has a fixture ``place``, which puts files into a new folder and returns its URI."""

    @pytest.fixture
    def folder(self, place: Place) -> Folder:
        return open_folder(place("checkpoint", FILES))

    def test_files_are_listed_by_name_with_their_sizes(self, folder: Folder) -> None:
        assert [(file.name, file.size) for file in folder.files()] == sorted(
            (name, len(content)) for name, content in FILES.items()
        )

    def test_files_are_read_whole_and_in_part(self, folder: Folder) -> None:
        for name, content in FILES.items():
            assert folder.read(name) == content
            assert folder.read(name, 1) == content[1:]
            assert folder.read(name, 1, 3) == content[1:3]

    def test_a_range_behind_the_end_is_short(self, folder: Folder) -> None:
        assert folder.read("model.safetensors", 300_000, 400_000) == CONTENT[300_000:]
        assert folder.read("model.safetensors", 300_001, 400_000) == b""
        assert folder.read("model.safetensors", 400_000, 400_001) == b""

    @pytest.mark.parametrize(("start", "stop"), RANGES)
    def test_workers_read_ranges_at_odd_offsets(self, folder: Folder, start: int, stop: int) -> None:
        assert read(folder.path("model.safetensors"), start, stop) == CONTENT[start:stop]

    def test_a_worker_is_told_when_a_file_is_too_short(self, folder: Folder) -> None:
        with pytest.raises(OSError, match=r"ends at byte 300001") as failed:
            read(folder.path("model.safetensors"), 299_000, 300_002)
        assert str(failed.value.filename).endswith(folder.path("model.safetensors")[-20:])

    def test_many_readers_at_once_get_their_own_bytes(self, place: Place) -> None:
        path = open_folder(place("large", {"large": LARGE})).path("large")
        starts = range(0, len(LARGE), 1_300_000)
        with ThreadPoolExecutor(8) as pool:
            parts = pool.map(lambda start: read(path, start, min(start + 1_300_000, len(LARGE))), starts)
            assert b"".join(parts) == LARGE
        assert read(path, 3, len(LARGE)) == LARGE[3:]

    def test_what_is_missing_is_named(self, folder: Folder) -> None:
        with pytest.raises(FileNotFoundError) as missing:
            folder.read("nothing")
        assert "nothing" in str(missing.value.filename)
        with pytest.raises(FileNotFoundError):
            read(folder.path("nothing"), 0, 1)
        assert folder.states(["config.json", "nothing"]).keys() == {"config.json"}

    def test_states_are_those_of_the_listing(self, folder: Folder) -> None:
        states = {file.name: file.state for file in folder.files()}
        assert folder.states(FILES) == states
        assert all(states.values())


class StoreContract(FolderContract):
    """Reading and writing of an object store. A subclass has a fixture ``root`` with the URI of an empty folder."""

    @pytest.fixture
    def place(self, root: str) -> Place:
        def put(name: str, files: Mapping[str, bytes]) -> str:
            folder, _, options = root.partition("?")
            uri = f"{folder}/{name}?{options}" if options else f"{folder}/{name}"
            store, prefix = open_store(uri)
            for file, content in files.items():
                store.put(f"{prefix}/{file}", content)
            return uri

        return put

    @pytest.fixture
    def store(self, root: str) -> ObjectStore:
        return open_store(root)[0]

    def key(self, root: str, name: str) -> str:
        return f"{open_store(root)[1]}/{name}"

    def test_a_folder_without_objects_does_not_exist(self, root: str) -> None:
        with pytest.raises(InputError, match=r"does not exist, or holds no objects"):
            open_folder(root).files()

    def test_a_state_is_that_of_the_content(self, place: Place) -> None:
        folder = open_folder(place("checkpoint", {"a": b"1"}))
        before = folder.states(["a"])
        place("checkpoint", {"a": b"2"})
        assert folder.states(["a"]) != before

    @pytest.mark.parametrize("nbytes", [1, PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES, 6 * PART_BYTES + 4097])
    def test_shards_are_streamed_in_chunks_of_any_size(self, root: str, nbytes: int) -> None:
        content = np.random.default_rng(nbytes).bytes(nbytes)
        with closing(open_writer(root, "shard", nbytes)) as writer:
            for start in range(0, nbytes, 3_000_017):
                writer.write(memoryview(content)[start : start + 3_000_017], start)
            state = writer.finish()
        folder = open_folder(root)
        assert folder.read("shard") == content
        assert folder.states(["shard"]) == {"shard": state}

    @pytest.mark.parametrize("nbytes", [100, PART_BYTES + 100, 6 * PART_BYTES])
    def test_what_is_not_finished_leaves_nothing(self, root: str, store: ObjectStore, nbytes: int) -> None:
        with closing(open_writer(root, "shard", nbytes + 1)) as writer:
            writer.write(memoryview(bytes(nbytes)), 0)
        assert list(store.list(self.key(root, ""))) == []
        assert store.abort_uploads(self.key(root, "")) == 0

    def test_parts_that_do_not_follow_each_other_are_refused(self, root: str) -> None:
        with closing(open_writer(root, "shard", 10)) as writer:
            writer.write(memoryview(b"12345"), 0)
            with pytest.raises(ValueError, match=r"byte 6 of .* came instead of byte 5"):
                writer.write(memoryview(b"7890"), 6)
            with pytest.raises(ValueError, match="has 5 bytes of 10"):
                writer.finish()

    def test_an_object_is_made_once(self, root: str, store: ObjectStore) -> None:
        key = self.key(root, "mark")
        store.put(key, b"first", only_new=True)
        with pytest.raises(FileExistsError):
            store.put(key, b"second", only_new=True)
        assert open_folder(root).read("mark") == b"first"
        store.put(key, b"third")
        assert open_folder(root).read("mark") == b"third"

    def test_a_listing_knows_folders_from_names_that_begin_alike(self, root: str, store: ObjectStore) -> None:
        for name in ("model/a", "model/b/c", "model-2/a", "models"):
            store.put(self.key(root, name), b"x")
        skip = len(self.key(root, ""))
        assert sorted(found.key[skip:] for found in store.list(self.key(root, "model/"))) == ["model/a", "model/b/c"]

    def test_removing_what_is_gone_is_no_error(self, root: str, store: ObjectStore) -> None:
        store.put(self.key(root, "a"), b"x")
        store.delete([self.key(root, "a"), self.key(root, "b")])
        store.delete([])
        assert list(store.list(self.key(root, ""))) == []
