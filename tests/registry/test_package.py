"""A real bundle, registered, loaded and served; here and in a process that knows nothing of the checkout."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from PIL import Image

from dfu_mlflow.config import RunConfig
from dfu_mlflow.sampling import Sampler
from registry.package import REQUIREMENTS, ROOT, RegisteredSampler, register_sampler

CONFIG = RunConfig()

CLEAN_PROGRAM = """
import sys, json
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1], model_config={"model": "here/1"})
answer = model.predict(pandas.DataFrame({"phase": ["I", "R"], "seed": [3, 4]}), params={"num_inference_steps": 2})
import dfu_mlflow
print(json.dumps({"code": dfu_mlflow.__file__, "rows": answer.to_dict("records")}))
"""


def pictures(images: pd.Series) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in images]


def outside_the_checkout() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def test_version_carries_alias_figures_and_run(registered: RegisteredSampler, run_id: str) -> None:
    version = MlflowClient().get_model_version_by_alias("dfu-sampler", "challenger")
    assert (version.name, int(version.version)) == (registered.name, registered.version)
    assert version.run_id == run_id
    assert float(version.tags["eval/kid"]) == 0.25
    assert version.tags["metric_identity"] == "efficientnet_lite0:abc"
    assert mlflow.get_run(run_id).info.status == "FINISHED"


def test_a_second_one_takes_the_alias(registered: RegisteredSampler, bundle: Path, run_id: str) -> None:
    other = CONFIG.model_copy(update={"registry": CONFIG.registry.model_copy(update={"name": "twice"})})
    first, second = (register_sampler(bundle, other, run_id, {}, {}) for _ in range(2))
    assert (first.version, second.version) == (1, 2)
    assert int(MlflowClient().get_model_version_by_alias("twice", "challenger").version) == 2


def test_loaded_model_draws_what_the_sampler_draws(registered: RegisteredSampler, bundle: Path, run_id: str) -> None:
    model = mlflow.pyfunc.load_model(registered.uri)
    answer = model.predict(pd.DataFrame({"phase": ["P", "I"]}), params={"seed": 11})
    expected = Sampler.load(bundle, "cpu").draw(["P", "I"], [11, 12])
    np.testing.assert_array_equal(np.stack(pictures(answer["image"])), expected)
    assert answer["model"].tolist() == [f"run {run_id}"] * 2
    repeated = model.predict(pd.DataFrame({"phase": ["I"], "seed": [12]}))
    assert repeated["image"][0] == answer["image"][1], "a picture depends on label, seed and settings alone"


def test_signature_tells_the_bundles_defaults(registered: RegisteredSampler) -> None:
    info = mlflow.models.get_model_info(registered.uri)
    assert info.signature.inputs.input_names() == ["phase", "seed"]
    assert info.signature.inputs.required_input_names() == ["phase"]
    assert info.signature.outputs.input_names() == ["image", "phase", "seed", "model"]
    assert {param.name: param.default for param in info.signature.params} == {
        "seed": 0,
        "guidance_scale": 2.0,
        "num_inference_steps": 3,
    }


def test_code_travels_without_weights(registered: RegisteredSampler) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(registered.uri))
    code = [path for path in (folder / "code").rglob("*") if path.is_file()]
    assert folder / "code" / "dfu_mlflow" / "sampling.py" in code
    assert {path.suffix for path in code} <= {".py", ".yaml"}
    pins = (folder / "requirements.txt").read_text().split()
    assert {pin.split("==")[0] for pin in pins} == set(REQUIREMENTS)


def test_every_package_that_drawing_imports_is_required() -> None:
    names = {"PIL": "pillow", "yaml": "pyyaml"}
    seen: set[str] = set()
    third_party: set[str] = set()
    waiting = ["registry.sampler"]
    while waiting:
        module = waiting.pop()
        path = ROOT.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module in seen or not path.is_file():
            continue
        seen.add(module)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in found:
                if name.split(".")[0] in ("dfu_mlflow", "registry"):
                    waiting += [name, name.split(".")[0]]
                elif name.split(".")[0] not in sys.stdlib_module_names:
                    third_party.add(names.get(name.split(".")[0], name.split(".")[0]))
    assert "dfu_mlflow.conditioning" in seen
    assert third_party <= set(REQUIREMENTS)


@pytest.mark.slow
def test_model_loads_in_a_clean_process(registered: RegisteredSampler, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLEAN_PROGRAM, registered.uri],
        cwd=tmp_path,
        env=outside_the_checkout(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert not Path(answer["code"]).is_relative_to(ROOT), "the packages came from the model, not from the checkout"
    assert [(row["phase"], row["seed"], row["model"]) for row in answer["rows"]] == [
        ("I", 3, "here/1"),
        ("R", 4, "here/1"),
    ]


@pytest.mark.slow
def test_model_is_served(
    registered: RegisteredSampler, tmp_path: Path, wait_for: Callable[[str, subprocess.Popen[bytes]], None]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{registered.name}@challenger"]
    server = subprocess.Popen(
        [*command, "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)],
        cwd=tmp_path,
        env=dict(outside_the_checkout(), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", server)
        status, body = post(f"http://127.0.0.1:{port}/invocations", {"phase": ["R"]}, {"seed": 5})
        assert status == 200, body
        (row,) = json.loads(body)["predictions"]
        assert (row["phase"], row["seed"]) == ("R", 5)
        assert pictures(pd.Series([row["image"]]))[0].shape == (16, 16, 3)
        with ThreadPoolExecutor(6) as clients:
            ask = partial(post, f"http://127.0.0.1:{port}/invocations", {"phase": ["R"]})
            answers = list(clients.map(ask, [{"seed": seed % 3} for seed in range(12)]))
        assert {status for status, _ in answers} == {200}, "requests at once"
        images = [json.loads(body)["predictions"][0]["image"] for _, body in answers]
        assert images == images[:3] * 4
        assert len(set(images)) == 3
        status, body = post(f"http://127.0.0.1:{port}/invocations", {"phase": ["X"]}, {})
        assert status == 400
        assert "this model draws I, P, R" in body
    finally:
        server.terminate()
        server.wait(timeout=60)


def post(url: str, columns: dict[str, list[str]], params: dict[str, int]) -> tuple[int, str]:
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    body = {"dataframe_split": {"columns": list(columns), "data": rows}, "params": params}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
