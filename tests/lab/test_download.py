"""Downloads from a real web server on this machine, which breaks off when told to."""

import hashlib
import http.server
import threading

import pytest

from normally.lab import download
from normally.lab.download import Source

CONTENT = bytes(range(256)) * 2000
SUM = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT under any path and honours `Range`, once it has broken off at `stop`."""

    stop = None
    asked: list[str | None]

    def do_GET(self):
        wanted = self.headers.get("Range")
        type(self).asked.append(wanted)
        if "absent" in self.path:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        stop, type(self).stop = self.stop, None
        self.wfile.write(CONTENT[start:stop])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMALLY_CACHE", str(tmp_path))
    handler = type("OwnHandler", (Handler,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}/"
        server.handler = handler
        yield server
        server.shutdown()


def test_a_file_is_fetched_once_and_checked(server):
    source = Source([server.url], {"a.gz": SUM}, 1)
    assert not download.complete("set", source)
    place = download.fetch("set", source)
    assert (place / "a.gz").read_bytes() == CONTENT
    assert download.complete("set", source)
    download.fetch("set", source)
    assert server.handler.asked == [None]
    assert [path.name for path in place.iterdir()] == ["a.gz"]


def test_a_broken_download_continues_where_it_was(server):
    source = Source([server.url], {"a.gz": SUM}, 1)
    server.handler.stop = 70_000
    with pytest.raises(ConnectionError, match=r"a\.gz of set could not be downloaded.*is kept"):
        download.fetch("set", source)
    assert not download.complete("set", source)
    place = download.fetch("set", source)
    assert (place / "a.gz").read_bytes() == CONTENT
    assert server.handler.asked[1].startswith("bytes=")
    assert server.handler.asked[1] != "bytes=0-"


def test_a_part_that_is_wrong_is_found_and_thrown_away(server):
    source = Source([server.url], {"a.gz": SUM}, 1)
    download.folder("set").mkdir()
    part = download.folder("set") / "a.gz.part"
    part.write_bytes(b"rubbish")
    with pytest.raises(ConnectionError):
        download.fetch("set", source)
    assert list(download.folder("set").iterdir()) == []
    assert (download.fetch("set", source) / "a.gz").read_bytes() == CONTENT


def test_a_whole_part_needs_nothing_more(server):
    source = Source([server.url], {"a.gz": SUM}, 1)
    download.folder("set").mkdir()
    (download.folder("set") / "a.gz.part").write_bytes(CONTENT)
    assert (download.fetch("set", source) / "a.gz").read_bytes() == CONTENT


def test_the_next_mirror_is_asked_when_one_fails(server):
    source = Source([server.url + "absent/", server.url], {"a.gz": SUM}, 1)
    assert (download.fetch("set", source) / "a.gz").is_file()


def test_without_any_mirror_the_message_says_what_to_do(server):
    source = Source([server.url + "absent/"], {"a.gz": SUM}, 1)
    with pytest.raises(ConnectionError, match=r"404.*set NORMALLY_DATA to it, or use --data"):
        download.fetch("set", source)
