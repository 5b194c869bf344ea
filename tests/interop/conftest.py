"""Settings that the peers read when they are imported, hence here."""

import os

# On a machine of two cores gptqmodel gives its CPU pool one worker and then asks it for two.
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
# Nothing here needs the hub, and a test that reached for it would hang where there is none.
os.environ["HF_HUB_OFFLINE"] = "1"
# gptqmodel compiles its layers: seconds a model, and it would need a C++ compiler.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
