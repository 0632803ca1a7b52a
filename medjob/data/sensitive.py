"""Whether text of the rows may be shown: in reports, logs and messages.

`prepare` writes it into its artifact, so every later stage knows it without a field in its key.
"""

from __future__ import annotations

import json
from pathlib import Path

STATISTICS = "statistics.json"


def may_be_shown(prepared: Path) -> bool:
    """Whether reports may show rows of the artifact of `prepare`: not if `run.prepare.sensitive` is
    true."""
    statistics = json.loads((prepared / STATISTICS).read_text(encoding="utf-8"))
    return not statistics.get("sensitive", False)
