"""If this fails, a remote checkpoint is fetched twice, wrongly, or not at all."""

import functools
import http.server
from pathlib import Path
import shutil
import threading
from typing import ClassVar

import pytest

from openpi_ar.checkpoints import remote
from openpi_ar.checkpoints.load import load_model
from openpi_ar.errors import UserError
from tests.format_fixtures import GOLDEN, HEADS, TORCH, assert_equal, golden, params, refused


class Handler(http.server.SimpleHTTPRequestHandler):
    """A web server that knows ranges and remembers what it was asked for."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().do_GET()
        data, start = path.read_bytes(), 0
        spec = self.headers.get("Range")
        if spec:
            first, _, last = spec.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(data)
        else:
            end = len(data)
        body = data[start:end]
        type(self).asked.append(f"{path.name} {start}")
        self.send_response(206 if spec else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if spec:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(body)
        return None


@pytest.fixture
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("www")
    shutil.copytree(TORCH, folder / "ckpt")
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        Handler.asked = []
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()


def test_http_is_cached_and_resumed(server, tmp_path, monkeypatch):
    url, folder = server
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    whole = (folder / "ckpt" / "model.safetensors").read_bytes()
    target = tmp_path / url.removeprefix("http://").replace(":", "_") / "ckpt" / "model.safetensors"
    target.parent.mkdir(parents=True)
    Path(f"{target}.partial").write_bytes(whole[:100_000])  # an interrupted try
    local = remote.local_copy(f"{url}/ckpt/model.safetensors")
    assert local == target
    assert local.read_bytes() == whole
    assert "model.safetensors 0" not in Handler.asked[-1:]
    assert any(int(line.split()[1]) >= 100_000 for line in Handler.asked)
    count = len(Handler.asked)
    assert remote.local_copy(f"{url}/ckpt/model.safetensors") == local
    assert len(Handler.asked) == count  # from the cache
    assert_equal(params(load_model(local, HEADS)), params(golden(TORCH)))


def test_a_directory_of_links_is_a_checkpoint(server, tmp_path, monkeypatch):
    url, _ = server
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    assert_equal(
        params(load_model(f"{url}/ckpt", HEADS)),
        params(golden(TORCH)),
    )
    assert not list(tmp_path.rglob("*.partial"))


def test_file_addresses_and_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))
    loaded = load_model(f"file://{GOLDEN / 'pi05'}")
    assert_equal(params(loaded), params(golden(GOLDEN / "pi05")))
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_unreachable_addresses(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    err = refused(capsys, "inspect", "http://127.0.0.1:9/none/model.safetensors")
    assert "cannot be downloaded" in err
    assert "expected a local path, a hub id or an address" in refused(capsys, "inspect", "ftp://x/y")


def test_a_cache_that_cannot_be_written_is_said_before_the_download(monkeypatch):
    monkeypatch.setenv("OPENPI_DATA_HOME", "/proc/nowhere")
    with pytest.raises(
        UserError, match=r"/proc/nowhere/x/y cannot be written: .*: set OPENPI_DATA_HOME to a directory"
    ):
        remote.local_copy("https://x/y/z")
