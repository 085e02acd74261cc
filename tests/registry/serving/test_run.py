"""What the `serve` entry point refuses before it listens."""

from __future__ import annotations

import socket

import pytest

from dfu_mlflow import entry
from dfu_mlflow.config.serving import ServeSection
from entrypoints.serve import main
from registry.serving.run import TOKEN, read_token


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "models:/dfu-sampler@nobody"], "--model models:/dfu-sampler@nobody cannot be loaded"),
        (["--model", "models:/nothing/1"], "--model models:/nothing/1 cannot be loaded"),
        (["--model", "a/folder"], "--model a/folder: give models:/NAME@ALIAS"),
        (["--serve.host", "0.0.0.0"], "set DFU_TOKEN, or say --serve.allow_anonymous true"),
        (["--serve.host", "192.0.2.1", "--serve.allow_anonymous", "true"], "--serve.host 192.0.2.1"),
        (["--serve.port", "70000"], "--serve.port"),
        (["--serve.max_images", "100"], "--serve.max_images 100 never fits --serve.queue_length 64"),
        (["--serve.batch", "4"], "did you mean --serve.batch_size"),
        (["--serve.timeout_s", "-1"], "--serve.timeout_s"),
    ],
)
def test_what_cannot_be_served_is_told(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    if "--serve.port" not in arguments:
        arguments = [*arguments, "--serve.port", "0"]
    assert entry.run(main, arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_taken_port_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert entry.run(main, ["--serve.port", str(port)]) == 2
    assert f"--serve.port {port} cannot be listened on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example")),
    ],
)
def test_other_machines_need_a_token(host: str, loopback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ServeSection(host=host)
    assert limits.loopback == loopback
    monkeypatch.setenv(TOKEN, "secret")
    assert read_token(limits) == "secret"
    assert read_token(ServeSection(host=host, allow_anonymous=True)) == "secret"
