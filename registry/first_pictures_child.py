"""Program of `registry.clean_process`: load a model, draw a picture of each class, print how much each varies.

It imports nothing of the project: the packages must come out of the model.
"""

from __future__ import annotations

import base64
import io
import json
import sys


def main(uri: str, steps: int, most: int) -> None:
    import mlflow
    import numpy as np
    import pandas as pd
    from PIL import Image

    flavor = mlflow.models.get_model_info(uri).flavors["python_function"]
    if "python_model" in flavor and not str(flavor.get("model_code_path", "")).endswith(".py"):
        sys.exit(f"its {flavor['python_model']} is a pickle, which runs whatever it holds: it is not opened")
    model = mlflow.pyfunc.load_model(uri)
    classes = list(model.unwrap_python_model().sampler.classes)[: most or None]
    rows = pd.DataFrame({"phase": classes, "seed": range(len(classes))})
    answers = model.predict(rows, params={"num_inference_steps": steps})
    pictures = (np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in answers["image"])
    print(json.dumps({label: float(picture.std()) for label, picture in zip(classes, pictures, strict=True)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
