"""What goes over the wire of a transfer from S3 to S3: bytes against the fewest that would do, requests, memory.

The server is moto's, on loopback, and a proxy counts in front of it: times say nothing here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import measure
import shapes
from suite import Bench, Figure, Goal

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers.proxy import proxy_to
from servers.stores import BUCKET, S3_SECRETS, moto, s3_client

from rv_distributed.verification import verify

_ROW = "wire"


def measure_wire(bench: Bench, shape: shapes.DataSet, program: str) -> list[Figure]:
    """One transfer of ``shape`` with ``program``, which is rv."""
    triple = bench.triple(shape)
    with moto() as server, proxy_to(server.port) as proxy:
        roles = {"target": triple.base, "donor": triple.grpo, "reference": triple.sft}
        client = s3_client(server.port)
        for role, folder in roles.items():
            for path in folder.iterdir():
                client.upload_file(str(path), BUCKET, f"in/{role}/{path.name}")
        inputs = [text for role in roles for text in (f"--{role}", server.uri(f"in/{role}", proxy.port))]
        out = server.uri("out", proxy.port)
        command = [program, "transfer", *inputs, "--out", out, "--runtime", "local", "--max-shard-size", "500MB"]
        env = {**os.environ, **S3_SECRETS}
        ran = measure.run(command, memory=True, env=env)
        sent, received, requests = proxy.sent(), proxy.received(), len(proxy.seen)
        os.environ.update(S3_SECRETS)
        verify(server.uri("out"))
    bench.verified.append(_ROW)
    read, written = 3 * shape.nbytes, shape.nbytes
    moved = (sent + received) / 1e9
    # Of a toy, headers and samples are much.
    goal = Goal("≤", 1.01, "×") if bench.size.name != "toy" else None
    detail = f"{shape.name}, S3 to S3, local runtime"
    return [
        Figure(_ROW, "bytes read over the wire, over those of the weights", received / read, "×", goal, detail, {}),
        Figure(_ROW, "bytes written over the wire, over those of the weights", sent / written, "×", goal, detail, {}),
        Figure(_ROW, "requests for a gigabyte that is moved", requests / moved, "", None, detail, {}),
        Figure(_ROW, "peak memory of it", ran.peak_pss_bytes / 1e6, "MB", Goal("≤", 800, "MB"), detail, {}),
    ]
