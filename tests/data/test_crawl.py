import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from herdkern.data.crawl import CrawlConfig, crawl, crawl_site
from herdkern.data.pydoc_pages import is_served
from herdkern.data.pydoc_site import PydocSite
from herdkern.data.sources import read_records

PAGES = {
    "/": '<a href="/b#part">b</a><a href="c?x=1">c</a><a href="http://other.localhost/">x</a><a href="mailto:x">m</a>',
    "/b": '<base href="/deep/"><a href="d">d</a><a href="/missing">gone</a><a href="/">up</a>',
    "/c?x=1": '<a href="/moved">moved</a><a href="/slow">slow</a><a href="http://[bad">bad</a>',
    "/deep/d": "<p>the end</p>",
    "/target": "<p>moved here</p>",
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/drop":
            self.close_connection = True
            return
        if self.path == "/slow":
            time.sleep(0.2)
        status = 200 if self.path in PAGES or self.path in ("/slow", "/big") else 301 if self.path == "/moved" else 404
        body = b"x" * 5000 if self.path == "/big" else PAGES.get(self.path, "none").encode()
        self.send_response_only(status)
        if status == 301:
            self.send_header("Location", "/target")
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield ("127.0.0.1", httpd.server_address[1])
    httpd.shutdown()
    httpd.server_close()


def urls_of(folder):
    bad = []
    records = [r for path in sorted(folder.glob("*.warc.gz")) for r in read_records(path, on_bad=bad.append)]
    return [r.url for r in records], bad


def test_follows_links_of_the_host_breadth_first(server, tmp_path):
    counters = crawl("http://site.localhost/", tmp_path, CrawlConfig(), connect_to=server)
    assert counters["status"] == {"200": 6, "301": 1, "404": 1}
    urls, bad = urls_of(tmp_path)
    names = ["", "b", "c?x=1", "deep/d", "slow", "target"]
    assert urls == [f"http://site.localhost/{name}" for name in names]
    assert [b.reason for b in bad] == ["http_status", "http_status"]


def test_two_crawls_give_the_same_bytes(server, tmp_path):
    for name, processes in (("one", 1), ("two", 4)):
        (tmp_path / name).mkdir()
        config = CrawlConfig(pages_per_file=3, num_processes=processes)
        crawl("http://site.localhost/", tmp_path / name, config, connect_to=server)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == ["crawl-00000.warc.gz", "crawl-00001.warc.gz", "crawl-00002.warc.gz"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_page_limit_and_progress(server, tmp_path):
    seen = []
    config = CrawlConfig(max_pages=3)
    crawl("http://site.localhost/", tmp_path, config, connect_to=server, progress=lambda *p: seen.append(p))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len(urls_of(tmp_path)[0]) == 3


def test_large_page_is_cut_and_marked(server, tmp_path):
    crawl("http://site.localhost/big", tmp_path, CrawlConfig(max_page_bytes=1000), connect_to=server)
    assert [b.reason for b in urls_of(tmp_path)[1]] == ["truncated_page"]


def test_no_answer_is_an_error(server, tmp_path):
    with pytest.raises(RuntimeError, match="must answer, got"):
        crawl("http://site.localhost/drop", tmp_path, CrawlConfig(), connect_to=server)
    with pytest.raises(RuntimeError, match="must answer, got"):
        crawl("http://site.localhost/", tmp_path, CrawlConfig(), connect_to=("127.0.0.1", 1))


def test_only_loopback(tmp_path):
    with pytest.raises(ValueError, match="must be on loopback"):
        crawl("http://example.com/", tmp_path, CrawlConfig())
    with pytest.raises(ValueError, match="max_pages must be positive, got 0"):
        CrawlConfig(max_pages=0)


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("os", True),
        ("os.path", True),
        ("email.mime.text", True),
        ("zstandard", True),
        ("torch", False),
        ("antigravity", False),
        ("this", False),
        ("idlelib.run", False),
        ("test.support", False),
        ("unittest.test", False),
        ("zstandard.__main__", False),
        ("__future__", True),
        ("__main__", False),
        ("xml.etree.cElementTree", True),
    ],
)
def test_modules_that_are_served(name, served):
    assert is_served(name, frozenset(["zstandard"])) is served


@pytest.fixture(scope="module")
def site():
    with PydocSite(("zstandard", "no_such_package"), num_processes=1, page_seconds=20) as pages:
        yield pages


def test_site_serves_real_pages(site):
    status, page = site.page("/")
    assert status == 200
    for link in (b'"json.html"', b'"topics.html"', b'"zstandard.html"'):
        assert link in page
    assert b'"antigravity.html"' not in page
    status, page = site.page("/json.html")
    assert status == 200
    assert b"JavaScript" in page
    assert b'<a href="json.decoder.html">' in page
    assert site.page("/topic?key=assert")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/nothing.html",
        "/antigravity.html",
        "/getfile?key=/etc/passwd",
        "/topic",
        "/search?key=x",
        "/../../etc/passwd",
        "/%00",
    ],
)
def test_site_refuses_the_rest(site, path):
    assert site.page(path)[0] == 404


def test_pages_show_nothing_of_the_environment(site, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    with PydocSite((), num_processes=1) as fresh:
        for path in ("/os.html", "/posix.html"):
            page = fresh.page(path)[1]
            assert b"MY_SECRET" not in page
            assert str(os.environ.get("HOME")).encode() not in page.partition(b"environ</strong>")[2][:300]


def test_page_does_not_depend_on_pages_before_it(site):
    with PydocSite(("zstandard",), num_processes=1, page_seconds=20) as fresh:
        for path in ("/configparser.html", "/ftplib.html", "/sys.html"):  # hold addresses and the list of modules
            assert fresh.page(path)[1].splitlines() == site.page(path)[1].splitlines()


def test_hanging_module_times_out_and_the_next_page_comes(tmp_path, monkeypatch):
    (tmp_path / "hangs_forever.py").write_text("import time\ntime.sleep(1000)\n")
    (tmp_path / "kills_itself.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    (tmp_path / "speaks_up.py").write_text("'''Speaks.'''\nprint('noise ' * 10000)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    packages = ("hangs_forever_not", "speaks_up")
    with PydocSite(packages, num_processes=1, page_seconds=2) as pages:
        assert pages.page("/speaks_up.html")[0] == 200
        assert b"Speaks." in pages.page("/speaks_up.html")[1]
    with PydocSite(("kills_itself",), num_processes=1, page_seconds=2) as pages:
        assert pages.page("/os.html")[0] == 500  # the package is imported first, and takes the process along


def test_crawl_of_the_site_is_the_same_again_after_a_kill(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom herdkern.data.crawl import CrawlConfig, crawl_site\n"
        "print(crawl_site([], Path(sys.argv[1]), CrawlConfig(max_pages=40, pages_per_file=8, packages=('zstandard',))))"
    )
    folder = tmp_path / "killed"
    folder.mkdir()
    child = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    while child.poll() is None and not (folder / "crawl-00001.warc.gz").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, stdout=subprocess.PIPE)
    counters = crawl_site([], tmp_path / "whole", CrawlConfig(max_pages=40, pages_per_file=8, packages=("zstandard",)))
    assert counters["docs_out"] == 40
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    for path in folder.glob("*.warc.gz"):  # what had its name before the kill is whole
        assert gzip.decompress(path.read_bytes())
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
