"""A GPTQ-Int4 base, quantized here by rounding to the nearest code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from medjob.errors import ConfigError
from medjob.train.gptq import FOLDER, gptq_config
from tests.support.tiny_model import make_tiny_model

GROUP = 32


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack eight 4-bit codes of the first axis into one int32, the first in the lowest bits."""
    words = codes.to(torch.int64).reshape(-1, 8, codes.shape[1]) << (4 * torch.arange(8)).view(
        1, 8, 1
    )
    return words.sum(1).to(torch.uint32).view(torch.int32)


def make_gptq_model(folder: Path) -> Path:
    make_tiny_model(folder, hidden=64)
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value.half()
            continue
        weight, stem = value.float().T, name.removesuffix(".weight")
        groups = torch.arange(len(weight)) // GROUP
        scale = (
            (weight.reshape(-1, GROUP, weight.shape[1]).abs().amax(1) / 7.5).clamp_min(1e-5).half()
        )
        codes = ((weight / scale.float()[groups]).round() + 8).clamp(0, 15)
        tensors[f"{stem}.qweight"] = pack(codes)
        tensors[f"{stem}.qzeros"] = pack(
            torch.full_like(scale, 7).T.float()
        ).T.contiguous()  # GPTQ stores zero points minus one
        tensors[f"{stem}.scales"] = scale
        tensors[f"{stem}.g_idx"] = groups.int()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_missing_gptq_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medjob.train.gptq.FOLDER", tmp_path / "none")
    with pytest.raises(ConfigError, match="is GPTQ-quantized, which needs optimum and") as caught:
        gptq_config("a-model")
    assert "make gptq" in caught.value.hint


def test_other_bases_are_trained_without_gptqmodel(tmp_path: Path) -> None:
    """PEFT would import it for every adapter."""
    script = """
import importlib.util, sys
from pathlib import Path
from medjob.sources.locations import Location
from medjob.train.model import ModelSpec, load_model
from peft import LoraConfig, get_peft_model
spec = ModelSpec(Location("tiny", sys.argv[1]), load_in_4bit=False, dtype="float32")
get_peft_model(load_model(spec), LoraConfig())
print(importlib.util.find_spec("gptqmodel"))
"""
    make_tiny_model(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["None"], done.stderr[-3000:]


COMPARE = """
import sys, torch
from pathlib import Path
from medjob.config import load_run_file
from medjob.stages.export import _merge
from medjob.sources.locations import locate
from medjob.train.model import ModelSpec, load_model, load_policy
run_file, adapter = load_run_file([Path(sys.argv[1])]), Path(sys.argv[2])
spec = ModelSpec.base_of(run_file.run, locate(run_file.run.base_model, {}, Path(sys.argv[3])))
ids = torch.arange(5, 85).reshape(2, 40)
def logits(model):
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids).logits.double(), -1)
base, policy, merged = logits(load_model(spec)), logits(load_policy(spec, adapter)), logits(_merge(spec, adapter))
print(*((policy.exp() * (policy - other)).sum(-1).mean().item() for other in (merged, base)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.exists(), reason="`make gptq` installs the packages")
def test_lora_on_a_gptq_base_trains_and_merges(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["run"] |= {
        "base_model": str(make_gptq_model(tmp_path / "gptq")),
        "method": "qlora",
        "export": {"source": "sft"},
    }
    tree["run"]["sft"] |= {"learning_rate": 1e-2}
    tree["resources"]["sft"] = tree["resources"]["sft"] | {"gpus": 2, "microBatchSize": 1}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    for verb in ("fetch", "prepare", "sft", "export"):
        done = subprocess.run(
            [sys.executable, "-m", "medjob", verb, "-f", file],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    exported = next((tmp_path / "store").glob("t/export/*/data/1/config.json"))
    assert "quantization_config" not in json.loads(exported.read_text())
    adapter = next((tmp_path / "store").glob("t/sft/*/data/1"))
    compare = [sys.executable, "-c", COMPARE, file, adapter, tmp_path]
    done = subprocess.run(compare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    to_merged, to_base = map(float, done.stdout.split()[-2:])
    assert abs(to_merged) < 1e-5
    assert to_base > 1e-4  # the adapter changes the output
