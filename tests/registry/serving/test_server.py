"""Pictures over HTTP: the same as without it, whoever else asks; and nothing that is sent ends the server."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dfu_mlflow.sampling import Sampler

from .conftest import Answer, Running, Serving, decoded

LONG = 100
"""Steps that take the small model about a second."""


@pytest.fixture(scope="module")
def sampler(bundle: Path) -> Sampler:
    return Sampler.load(bundle, "cpu")


def test_asked_alone_a_picture_is_the_samplers_bit_for_bit(server: Running, sampler: Sampler) -> None:
    for seed, phase in enumerate("IPR"):
        answer = server.draw(phase, seed, guidance_scale=4.0, num_inference_steps=5)
        assert answer.status == 200, answer.body
        np.testing.assert_array_equal(answer.pictures, sampler.draw([phase], [seed], 4.0, 5))
        assert {key: answer.json["rows"][0][key] for key in ("phase", "seed", "model")} == {
            "phase": phase,
            "seed": seed,
            "model": "dfu-sampler/1",
        }


def test_32_clients_at_once_get_the_pictures_they_would_get_alone(serving: Serving, sampler: Sampler) -> None:
    wanted = [("IPR"[number % 3], number, (2.0, 3.0, 4.5, 8.0)[number % 4]) for number in range(64)]
    with serving(queue_length=64) as server, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda asked: server.draw(*asked[:2], guidance_scale=asked[2]), wanted))
        batches = server.ask("GET", "/metrics").body.decode()
    assert [answer.status for answer in answers] == [200] * len(wanted)
    alone = np.concatenate([sampler.draw([phase], [seed], guidance) for phase, seed, guidance in wanted])
    apart = np.abs(np.concatenate([answer.pictures for answer in answers]).astype(int) - alone)
    assert apart.max() <= 1
    assert (apart.max(axis=-1) > 0).mean() <= 0.001
    drawn = next(line for line in batches.splitlines() if line.startswith("dfu_batch_pictures_count"))
    assert float(drawn.split()[1]) < len(wanted) / 2, "requests were not batched"


def test_rows_are_answered_in_their_order(server: Running, sampler: Sampler) -> None:
    rows = [{"phase": "R"}, {"phase": "I", "seed": 50, "count": 2}, {"phase": "P"}]
    answer = server.post({"rows": rows, "params": {"seed": 7}})
    found = [(row["phase"], row["seed"]) for row in answer.json["rows"]]
    assert found == [("R", 7), ("I", 50), ("I", 51), ("P", 10)]
    np.testing.assert_array_equal(answer.pictures, sampler.draw(*map(list, zip(*found, strict=True))))


def test_a_single_picture_comes_as_png_where_one_is_asked_for(server: Running, sampler: Sampler) -> None:
    answer = server.post({"rows": [{"phase": "P", "seed": 9}]}, Accept="image/png")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    assert (answer.headers["x-dfu-seed"], answer.headers["x-dfu-model"]) == ("9", "dfu-sampler/1")
    np.testing.assert_array_equal(decoded(answer.body), sampler.draw(["P"], [9])[0])
    assert server.post({"rows": [{"phase": "P", "count": 2}]}, Accept="image/png").status == 422


@pytest.mark.parametrize(
    "shape",
    [
        {"dataframe_records": [{"phase": "I", "seed": 3}]},
        {"dataframe_split": {"columns": ["phase", "seed"], "data": [["I", 3]]}},
        {"inputs": [{"phase": "I", "seed": 3}]},
        {"instances": [{"phase": "I", "seed": 3}], "params": {"seed": 1}},
    ],
)
def test_mlflows_own_shapes_are_understood(server: Running, shape: dict[str, object]) -> None:
    answer = server.post(shape, "/invocations")
    assert answer.status == 200, answer.body
    (row,) = answer.json["predictions"]
    assert row == server.draw("I", 3).json["rows"][0]


BAD = {
    "malformed JSON": (b'{"rows": [', 400, "not JSON"),
    "nested without end": (b"[" * 60_000, 400, ""),
    "a number of 5000 digits": (b'{"rows": [{"phase": "I", "seed": ' + b"9" * 5000 + b"}]}", 400, ""),
    "not text": (b"\xff\xfe\x00", 400, ""),
    "nothing": (b"", 422, ""),
    "no rows": (b'{"rows": []}', 422, "rows: list should have at least 1"),
    "unknown phase": (b'{"rows": [{"phase": "X"}]}', 422, "phase X is unknown: I, P, R can be drawn"),
    "a prompt as phase": (b'{"rows": [{"phase": "' + b"x" * 50_000 + b'"}]}', 422, "is unknown"),
    "10^9 pictures": (b'{"rows": [{"phase": "I", "count": 1000000000}]}', 422, "1000000000 pictures: .* at most 16"),
    "many rows": (b'{"rows": [' + b",".join([b'{"phase": "I"}'] * 2000) + b"]}", 422, "2000 pictures"),
    "no steps": (
        b'{"rows": [{"phase": "I"}], "params": {"num_inference_steps": 0}}',
        422,
        "greater than or equal to 1",
    ),
    "negative steps": (
        b'{"rows": [{"phase": "I"}], "params": {"num_inference_steps": -5}}',
        422,
        "steps: input should",
    ),
    "10^9 steps": (b'{"rows": [{"phase": "I"}], "params": {"num_inference_steps": 1000000000}}', 422, "at most 100"),
    "guidance without value": (b'{"rows": [{"phase": "I"}], "params": {"guidance_scale": NaN}}', 422, "finite"),
    "negative guidance": (b'{"rows": [{"phase": "I"}], "params": {"guidance_scale": -1}}', 422, "guidance_scale: "),
    "endless guidance": (b'{"rows": [{"phase": "I"}], "params": {"guidance_scale": 1e300}}', 422, "at most 50"),
    "negative seed": (b'{"rows": [{"phase": "I", "seed": -1}]}', 422, "rows.0.seed: "),
    "seed of 64 bits": (b'{"rows": [{"phase": "I", "seed": 9223372036854775808}]}', 422, "rows.0.seed: "),
    "an unknown key": (b'{"rows": [{"phase": "I"}], "prompt": "a cat"}', 422, "prompt: extra inputs"),
    "1 MB prompt": (b'{"prompt": "' + b"x" * 1_000_000 + b'"}', 413, "longer than 65536 bytes"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("path", ["/v1/images", "/invocations"])
def test_bad_requests_get_a_sentence_and_the_server_lives(server: Running, case: str, path: str) -> None:
    body, status, sentence = BAD[case]
    if path == "/invocations":
        body = body.replace(b'"rows"', b'"inputs"')
        sentence = sentence.replace("rows.0", "inputs.0")
    answer = server.ask("POST", path, body, Content_Type="application/json")
    assert answer.status == status, answer.body[:500]
    if path == "/v1/images":
        assert set(answer.json) == {"error"}
        assert re.search(sentence, answer.json["error"]), answer.json
    assert b"Traceback" not in answer.body
    assert len(answer.body) < 2000
    assert server.draw("I", 1, num_inference_steps=1).status == 200


def test_what_is_not_there_is_said_so(server: Running) -> None:
    assert (server.ask("GET", "/v2").status, server.ask("GET", "/v1/images").status) == (404, 405)
    assert server.ask("POST", "/v1/images", b"rows=1", Content_Type="text/plain").status == 422
    assert server.post({"rows": [{"phase": "I"}]}, Host="evil.example").status == 400, "another site's name"


def test_a_chunked_body_is_cut_off_too(server: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", "/v1/images", iter([b"x" * 40_000] * 3), encode_chunked=True)
        assert connection.getresponse().status == 413
    finally:
        connection.close()


def test_a_body_that_does_not_come_is_not_waited_for(serving: Serving) -> None:
    with serving(body_timeout_s=0.3) as server, socket.create_connection(("127.0.0.1", server.port), 30) as line:
        line.sendall(b"POST /v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert line.recv(100).startswith(b"HTTP/1.1 408")


def test_a_full_queue_says_when_to_ask_again(serving: Serving) -> None:
    with serving(queue_length=4, max_images=4, batch_size=1) as server, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: server.draw("I", seed, num_inference_steps=20), range(12)))
        refused = [answer for answer in answers if answer.status == 429]
        assert {answer.status for answer in answers} == {200, 429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert all("pictures are waiting already" in answer.json["error"] for answer in refused)
        assert server.draw("I", 1).status == 200


def test_a_timeout_stops_the_work_between_steps(serving: Serving) -> None:
    with serving(timeout_s=1.0, max_steps=1000) as server:
        answer = server.draw("I", 1, num_inference_steps=1000)
        assert (answer.status, answer.json["error"][:19]) == (504, "not drawn within 1 ")
        assert server.draw("I", 2, num_inference_steps=1).status == 200, "the batch was drawn to its end"
        assert server.service.meters.stopped._value.get() == 1


def test_a_client_that_leaves_stops_the_work(serving: Serving) -> None:
    with serving(max_steps=1000) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        body = b'{"rows": [{"phase": "I"}], "params": {"num_inference_steps": 1000}}'
        connection.request("POST", "/v1/images", body, {"Content-Type": "application/json"})
        time.sleep(0.2)
        connection.close()
        deadline_s = time.monotonic() + 20
        while not server.service.meters.stopped._value.get():
            assert time.monotonic() < deadline_s, "the batch went on for nobody"
            time.sleep(0.01)
        assert server.draw("I", 2, num_inference_steps=1).status == 200


def test_a_token_is_wanted_where_one_is_set(serving: Serving) -> None:
    rows = {"rows": [{"phase": "I"}]}
    with serving(token="secret") as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer "},
        ):
            answer = server.post(rows, **headers)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert "DFU_TOKEN" in answer.json["error"]
        assert server.post(rows, Authorization="Bearer secret").status == 200
        closed = [path for path in ("/v1/model", "/metrics", "/invocations") if server.ask("GET", path).status == 401]
        assert closed == ["/v1/model", "/metrics", "/invocations"]
        opened = ("/", "/health", "/ping", "/ready", "/docs", "/openapi.json")
        assert [server.ask("GET", path).status for path in opened] == [200] * 6


def test_what_programs_read_about_the_server(server: Running) -> None:
    answer = server.ask("GET", "/v1/model").json
    assert (answer["model"], answer["phases"]) == ("dfu-sampler/1", ["I", "P", "R"])
    assert answer["defaults"] == {"guidance_scale": 2.0, "num_inference_steps": 3}
    server.draw("I", 1)
    meters = server.ask("GET", "/metrics").body.decode()
    for line in ('dfu_requests_total{status="200"}', 'dfu_model{model="dfu-sampler/1"} 1.0', "dfu_queue_pictures 0.0"):
        assert line in meters
    paths = server.ask("GET", "/openapi.json").json["paths"]
    assert {"/v1/images", "/v1/model", "/invocations", "/metrics", "/health", "/ready"} <= set(paths)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_elsewhere(server: Running, path: str) -> None:
    answer = server.ask("GET", path)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", answer.body.decode())


def test_an_end_while_clients_wait_leaves_nobody_hanging(serving: Serving) -> None:
    answers: list[Answer] = []
    with serving(max_steps=1000, batch_size=1) as server:
        clients = [
            threading.Thread(target=lambda seed=seed: answers.append(server.draw("I", seed, num_inference_steps=LONG)))
            for seed in range(3)
        ]
        for client in clients:
            client.start()
        while server.service.batcher.waiting < 2:
            time.sleep(0.01)
    for client in clients:
        client.join(timeout=30)
    assert len(answers) == 3
    assert {answer.status for answer in answers} <= {200, 503}
