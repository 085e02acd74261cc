"""One file a check; `dfu_mlflow.diagnosis.catalogue` lists them."""
