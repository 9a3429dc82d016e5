"""The command `app`: what it refuses; that it serves this machine alone, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
from cnnfast.__main__ import main
from cnnfast.tasks import app

ROOT = Path(__file__).resolve().parents[2]


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else found(name))
    assert main(["app"]) == 1
    assert said(capsys) == ["error: app needs gradio: pip install gradio"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--port", "65536"], "error: --port 65536: expected 1 to 65535"),
        (["--device", "tpu"], "error: --device tpu"),
        (["--device", "meta"], "error: --device meta"),
    ],
)
def test_what_cannot_be_asked_for(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "PACKAGES", {})
    assert main(["app", *arguments]) == 2
    (error,) = said(capsys)
    assert error.startswith(line)


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(app, "PACKAGES", {})
    with socket.socket() as taken:
        taken.bind((app.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 1
    (error,) = said(capsys)
    assert error.startswith(f"error: port {port} of 127.0.0.1 cannot be had (") and "--port" in error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((app.HOST, 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_this_machine_and_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    port = free_port()
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        # What would open it to others, were it listened to.
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_SHARE": "True",
        "http_proxy": "http://127.0.0.1:9",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "cnnfast", "app", "--port", str(port), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
        assert re.fullmatch(r"cnnfast-app-\w+", *(p.name for p in tmp_path.iterdir()))
        assert listening(port) == {"127.0.0.1"}
        page = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with page.open(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'self' ") and "http" not in policy
        elsewhere = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": "example.org"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            page.open(elsewhere, timeout=30)
    finally:
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + how, err
    assert (out, err) == ("", "")
    assert list(tmp_path.iterdir()) == []


def listening(port: int) -> set[str]:
    """Addresses of this machine at which something listens on the port (Linux)."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if os.path.exists(table):
            for line in Path(table).read_text().splitlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                host, number = local.split(":")
                if int(number, 16) == port and state == "0A":
                    found.add(".".join(str(n) for n in reversed(bytes.fromhex(host))) if len(host) == 8 else host)
    return found or {app.HOST}
