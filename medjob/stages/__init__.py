"""One file a stage: `run(context) -> metrics`.

Importing this package, which happens just before a stage is, sets the libraries' manners: our own progress and log take
the place of theirs.
"""

from __future__ import annotations

import logging
import os
import warnings

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars follow it too
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# transformers 5.23 calls its own deprecated properties, DeepSpeed 0.19 deprecated functions of torch 2.13.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
# Not an event on a machine without a GPU: DeepSpeed's choice of a CPU, and a kernel that bitsandbytes looks for.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
# DeepSpeed is the one that accumulates, as transformers told it to.
logging.getLogger("accelerate.accelerator").addFilter(lambda record: "Gradient accumulation steps mismatch" not in record.getMessage())
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
