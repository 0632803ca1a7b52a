"""The stages: one file per stage, with `run(context) -> metrics`.

Importing this package silences third-party progress bars and logs, because medjob has its own.
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
# transformers 5.23 uses its own deprecated properties, and DeepSpeed 0.19 deprecated functions of
# torch 2.13.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
# bitsandbytes logs an optional kernel that is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Log records that do not concern the user, by logger.
_IRRELEVANT = {
    "DeepSpeed": "Setting accelerator to CPU",
    # DeepSpeed accumulates the gradients, as transformers configured it.
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
    # medjob.train finds the best checkpoint itself.
    "transformers.trainer_callback": "EarlyStoppingCallback without load_best_model_at_end",
}


def _drop_records_with(text: str, logger: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: text not in record.getMessage())


for _logger, _text in _IRRELEVANT.items():
    _drop_records_with(_text, _logger)
