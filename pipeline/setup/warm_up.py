"""Imports the heavy libraries once, so that their byte code is on disk before several workers start side by side.

Run by ``make setup`` as a file, after an install without pip's own compilation: that compiles tens of thousands of
files one by one, of which this project reads a tenth. Prints nothing; a library that cannot be imported is an error
with the library's own traceback, at set-up rather than in a worker.
"""

import importlib
import os
import subprocess
import sys

# Two halves of similar weight, imported side by side.
HALVES = (
    (
        "vllm",
        "vllm.v1.engine.async_llm",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.qwen3_vl",
        "vllm.lora.layers",
        "vllm.model_executor.model_loader.default_loader",
    ),
    (
        "ray.data",
        "ray.train.torch",
        "ray.util.state",
        "mlflow.store.tracking.sqlalchemy_store",
        "mlflow.data",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch._dynamo",
        "torch.optim",
        "torchvision.transforms.v2",
        "transformers.models.qwen3_vl.modeling_qwen3_vl",
        "transformers.models.qwen3_vl.processing_qwen3_vl",
        "transformers.models.umt5.modeling_umt5",
        "transformers.models.clip.modeling_clip",
        "transformers.models.clip.processing_clip",
        "diffusers.pipelines.wan.pipeline_wan",
        "peft",
        "av",
        "matplotlib.pyplot",
        "rouge_score.rouge_scorer",
        "sacrebleu",
        "scipy.linalg",
        "typer",
        "pytest",
    ),
)


def main(argv: list[str]) -> int:
    """Import one half, named by its number; without a number start both halves and wait for them."""
    if argv:
        for name in HALVES[int(argv[0])]:
            importlib.import_module(name)
        return 0
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    halves = [
        subprocess.Popen([sys.executable, __file__, str(number)], env=environment, stderr=subprocess.PIPE, text=True)
        for number in range(len(HALVES))
    ]
    status = 0
    for half in halves:
        _, errors = half.communicate()
        if half.returncode:
            print(errors, file=sys.stderr)
            status = half.returncode
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
