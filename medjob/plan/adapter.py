"""The parameters of a saved adapter."""

from __future__ import annotations

import json
from pathlib import Path

from medjob.config.base import ADAPTER_CONFIG
from medjob.config.train import LoraParams


def adapter_params(folder: Path) -> LoraParams:
    """The parameters of a saved adapter, as far as they determine its size and its training."""
    values = json.loads((folder / ADAPTER_CONFIG).read_text())
    rows = values.get("trainable_token_indices") or {}
    return LoraParams(
        r=values["r"],
        lora_alpha=values["lora_alpha"],
        lora_dropout=values["lora_dropout"],
        target_modules=values["target_modules"],
        layers_to_transform=values.get("layers_to_transform"),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
        use_rslora=values.get("use_rslora", False),
        use_dora=values.get("use_dora", False),
        init_lora_weights=values.get("init_lora_weights", True),
        modules_to_save=values.get("modules_to_save"),
        trainable_token_indices=next(iter(rows.values()), None),
    )
