"""moto's S3 server on loopback, in a process of its own, that tests can stop and start again."""

from __future__ import annotations

import re
import subprocess
import sys
import threading

from pipeline.support.location import Uri, open_store, opened


class S3Server:
    """Not running until ``start``; after ``stop`` its buckets are gone, and ``start`` listens on the same port."""

    def __init__(self) -> None:
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def endpoint(self) -> str:
        """The server's address, as AWS_ENDPOINT_URL takes it."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout is not None
        seen = []
        for line in self._process.stdout:
            seen.append(line)
            if found := re.search(r"Running on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                threading.Thread(target=self._process.stdout.read, daemon=True).start()
                return
        raise RuntimeError(f"moto's server did not start:\n{''.join(seen)}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None
        open_store.cache_clear()

    def uri(self, path: str, *more: str) -> str:
        """Return the URI of ``path``, which begins with a bucket, at this server."""
        query = (f"endpoint_override=127.0.0.1:{self.port}", "scheme=http", "region=us-east-1", *more)
        return f"s3://{path}?{'&'.join(query)}"

    def bucket(self, name: str) -> Uri:
        """Make the bucket ``name``, and return its URI."""
        base, _, query = self.uri(name).partition("?")
        store, path = opened(Uri(base, f"{query}&allow_bucket_creation=true"))
        store.create_dir(path)
        return Uri(base, query)
