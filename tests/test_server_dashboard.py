"""The dashboard in a real browser: what it shows without a key on the metrics port, and with one on the clients' port."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from helpers_server import Gateway, StartGateway, complete, gateways, write_export

from server.auth import hash_key

KEY = "admin-secret-key"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("dashboard")
    (folder / "keys.toml").write_text(f'[keys.root]\nsha256 = "{hash_key(KEY)}"\nadmin = true\n')
    with gateways(folder) as start:
        yield started(start, folder)


def started(start: StartGateway, folder: Path) -> Gateway:
    model = write_export(folder / "restored", served_limit=256)
    gateway = start(model=str(model), api_keys=str(folder / "keys.toml"), metrics_port=0).until_ready()
    for _ in range(5):
        complete(gateway, KEY, stream=True, script={"tokens": 5, "gap_s": 0.02})
    return gateway


def metrics_url(gateway: Gateway) -> str:
    return str(re.findall(r"listening on (\S+), metrics", gateway.stdout)[0])


def page_after_scripts(url: str, folder: Path) -> str:
    """Text of the page after six seconds of its own time."""
    if BROWSER is None:
        pytest.skip("needs chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=6000", f"--user-data-dir={folder}"]
    done = subprocess.run([BROWSER, *options, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    return re.sub(r"<script>.*</script>", "", done.stdout, flags=re.DOTALL)


def test_the_metrics_port_shows_everything_without_a_key(gateway: Gateway, tmp_path: Path) -> None:
    page = page_after_scripts(f"{metrics_url(gateway)}/dashboard", tmp_path)
    assert '<h1 id="model">restored</h1>' in page
    assert ">ready</span>" in page
    assert "KV reserved of 1,024 tokens" in page
    assert re.search(r"TTFT, short lane, median</span><b>\d+ ms", page)
    assert re.search(r"ITL, median</span><b>[2-9]\d ms", page)
    for cell in ("33.3", "29.9", "0.75", "256 tokens", "base", "default, 1 tokens"):
        assert f"<td>{cell}</td>" in page


def test_the_clients_port_shows_nothing_before_a_key_is_typed(gateway: Gateway, tmp_path: Path) -> None:
    page = page_after_scripts(f"{gateway.url}/dashboard", tmp_path)
    assert '<form id="ask">' in page
    assert "no API key was sent" in page
    assert "KV reserved" not in page


def test_the_page_may_load_nothing_and_talk_to_nobody_else(gateway: Gateway) -> None:
    response = httpx.get(f"{gateway.url}/dashboard")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert not re.search(r"https?://|src=", response.text)
