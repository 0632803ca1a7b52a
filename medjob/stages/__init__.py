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
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
    logging.ERROR
)  # a kernel that it looks for, and does without
_NO_EVENTS = {
    "DeepSpeed": "Setting accelerator to CPU",  # which is what the machine has
    "accelerate.accelerator": "Gradient accumulation steps mismatch",  # DeepSpeed accumulates, as transformers told it to
    "transformers.trainer_callback": "EarlyStoppingCallback without load_best_model_at_end",  # the best one is found by train/
}
for _logger, _text in _NO_EVENTS.items():
    logging.getLogger(_logger).addFilter(lambda record, text=_text: text not in record.getMessage())  # type: ignore[misc]
