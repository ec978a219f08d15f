"""Who may ask: the token, the Host, the page itself; and which files there are."""

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from foveola.explorer.app import PAGE_FILES, application
from foveola.explorer.explore import LOOPBACK
from foveola.explorer.guard import Guard, is_loopback
from foveola.explorer.session import Session
from tests.explorer.conftest import TOKEN

ADDRESSES = (
    "/",
    "/state",
    "/rows/images",
    "/page/main.js",
    "/thumbnail/0",
    "/image/0",
    "/about/0",
    "/nothing",
)


@pytest.fixture
def stranger(session: Session) -> TestClient:
    """A browser that has not opened the page."""
    return TestClient(application(session, TOKEN, LOOPBACK), base_url="http://127.0.0.1:8000")


@pytest.mark.parametrize("path", ADDRESSES)
def test_nothing_without_the_token(stranger: TestClient, path: str) -> None:
    for token in (None, "", "wrong", TOKEN[:-1], TOKEN + "x", "ü"):
        answer = stranger.get(path, params={} if token is None else {"token": token})
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers
    assert stranger.get(path, headers={"cookie": "foveola=wrong"}).status_code == 403
    if path != "/":  # the token opens the page alone
        assert stranger.get(path, params={"token": TOKEN}).status_code == 403
    assert stranger.post("/ask", json={"image": 0}).status_code == 403


def test_the_token_becomes_a_cookie_that_scripts_and_other_sites_do_not_have(stranger: TestClient) -> None:
    answer = stranger.get("/", params={"token": TOKEN})
    assert answer.status_code == 200
    assert answer.headers["set-cookie"] == f"foveola={TOKEN}; Path=/; HttpOnly; SameSite=Strict"
    assert stranger.get("/state").status_code == 200
    assert "set-cookie" not in stranger.get("/").headers


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.7:8000", "",
    "[::1",    "localhost@evil.example:80", "evil.example#localhost",
])  # fmt: skip
def test_a_foreign_host_is_refused_also_with_the_token(stranger: TestClient, host: str) -> None:
    answer = stranger.get("/", params={"token": TOKEN}, headers={"host": host})
    assert answer.status_code == 400
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8000", "127.1.2.3"])
def test_loopback_names_are_known_at_any_port(stranger: TestClient, host: str) -> None:
    assert stranger.get("/", params={"token": TOKEN}, headers={"host": host}).status_code == 200


def test_elsewhere_addresses_and_the_own_name_are_known(session: Session) -> None:
    open_to_all = TestClient(application(session, TOKEN, "0.0.0.0"))
    for host, status in (("10.0.0.7:80", 200), ("localhost", 200), ("evil.example", 400)):
        assert open_to_all.get("/", params={"token": TOKEN}, headers={"host": host}).status_code == status
    assert Guard(lambda *_: None, TOKEN, "my.machine")._is_ours("my.machine:80")  # type: ignore[arg-type]
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "my.machine")] == [
        True
    ] * 3 + [
        False,
        False,
    ]


def test_a_page_of_another_site_may_not_ask(client: TestClient) -> None:
    asked = {"image": 0}
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:8000", 200)):
        assert client.post("/ask", json=asked, headers={"origin": origin}).status_code == status


@pytest.mark.parametrize("path", [
    "/page/../guard.py", "/page/..%2fguard.py", "/page/%2e%2e/guard.py", "/page//etc/passwd",
    "/page/%2fetc%2fpasswd",
    "/page/secret.txt", "/thumbnail/../../etc/passwd", "/thumbnail/-1", "/thumbnail/1.5",
    "/image/cats%2f04.png", "/etc/passwd", "/docs", "/openapi.json",
])  # fmt: skip
def test_files_are_those_of_the_page_and_images_go_by_index(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert b"import" not in answer.content


def test_answers_bind_the_page_to_itself(client: TestClient) -> None:
    for path in ("/", "/state", "/page/main.js", "/thumbnail/0", "/nothing"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    for method in ("PUT", "DELETE", "PATCH"):
        assert client.request(method, "/state").status_code == 405


def test_the_page_asks_no_other_machine_and_parses_no_text_as_html() -> None:
    for path in PAGE_FILES.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|//cdn|@import", text), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), (
            path.name
        )
        assert len(text.splitlines()) < 400, path.name
    assert {path.suffix for path in Path(PAGE_FILES).iterdir()} == {".html", ".css", ".js"}
