"""The memory of one training process: what it holds, and what the worst moment of a step adds.

What is kept and copied follows transformers 5.23, PEFT 0.21, TRL 1.16 and torch 2.13, and tests/plan/test_memory.py measures it on a CPU.
What only GPUs and DeepSpeed have is read from their sources (DeepSpeed 0.19.8) or assumed, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from medjob.config.train import LoraParams, Method, Zero
from medjob.errors import ConfigError
from medjob.plan.shape import ModelShape, Stage

GIB = 2**30
# Rows and columns of the logits that TRL's fused head holds at once: trl/kernels/chunked_logprob.py, _CHUNKED_LOGPROB_CHUNK_SIZE.
HEAD_TILE = (4096, 32768)
# CUDA's context with cuBLAS' workspace, and NCCL's buffers where there are peers: assumed.
_CONTEXT, _PEERS = int(0.75 * GIB), GIB // 2
# Elements that ZeRO-3 may hold gathered (stage3_max_live_parameters' default).
_LIVE_ELEMENTS = 10**9
# Bytes of optimizer state for a parameter; 8-bit states have a float32 scale for 256 values (Dettmers et al. 2021).
_STATE = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256,
    "adafactor": 0.01,
}


@dataclass(frozen=True, slots=True)
class Setup:
    """What of a run file and of its resources decides on memory."""

    stage: Stage
    method: Method
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    lora: LoraParams = field(default_factory=LoraParams)
    zero: Zero = "none"
    world_size: int = 1
    micro_batch_size: int = 1
    """Rows (pairs for DPO) of one forward pass on one device."""
    max_length: int = 2048
    """Tokens of a row: every row is counted as that long."""
    checkpoint_every: int = 0
    """0: all activations are kept; n: blocks whose index is a multiple of n are recomputed (transformers' `every_n_layers`)."""
    attention: Literal["sdpa", "flash", "eager"] = "sdpa"
    optim: str = "adamw_torch_fused"
    packing: bool = True
    """SFT only: TRL lays all packed rows of a batch end to end, as one row."""
    evaluation_rows: int = 0
    """Rows (pairs) of a validation batch where the micro-batch has fewer; 0: no validation."""
    device: Literal["cuda", "cpu"] = "cuda"
    """On a CPU the loss folds its logits in plain torch, with more copies, and there is no context."""

    @property
    def rows(self) -> int:
        """Rows of one forward pass: DPO runs chosen and rejected answers together."""
        return self.micro_batch_size * (2 if self.stage == "dpo" else 1)

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.rows * self.max_length

    @property
    def packed(self) -> bool:
        """Whether rows are laid end to end."""
        return self.packing and self.stage == "sft"

    @property
    def scores(self) -> int:
        """Query-key pairs of one head, where attention gets a mask: rows laid end to end, or padded to one another's length."""
        return self.tokens**2 if self.packed else self.tokens * self.max_length

    @property
    def masked(self) -> bool:
        """Whether it does; flash attention needs none."""
        return self.attention != "flash" and (self.packed or self.rows > 1)

    @property
    def full(self) -> bool:
        """Whether all weights are trained."""
        return self.method == "full"

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed trains: it casts the module itself, and holds float32 weights of its own."""
        return self.zero != "none"

    @property
    def element(self) -> int:
        """Bytes of a number that is computed with."""
        return 4 if self.dtype == "float32" else 2

    @property
    def autocast(self) -> bool:
        """Whether trained weights are float32, and cast for each use."""
        return not self.deepspeed and self.element == 2

    @property
    def trained(self) -> int:
        """Bytes of a trained weight, and of its gradient."""
        return self.element if self.deepspeed else 4

    @property
    def residual(self) -> int:
        """Bytes of a number between two blocks, which is what the weights beside it are (embedding, norms)."""
        return self.trained if self.full else self.element


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process at its peak."""

    parameters: float
    """The base model; in DPO with `full` there are two."""
    quantization: float
    """Constants of 4-bit weights."""
    adapter: float
    """LoRA weights; in DPO the reference's too."""
    gradients: float
    optimizer: float
    """Moments, and DeepSpeed's float32 weights."""
    activations: float
    """What the forward pass keeps for the backward pass."""
    logits: float
    """The loss: a tile of logits, and the gradients of its inputs."""
    working: float
    """What the worst moment takes beyond the above; buckets; the device's context."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(value for _, value in self._parts())

    def table(self) -> list[tuple[str, float]]:
        """(what, GiB), the total last."""
        return [(name, value / GIB) for name, value in [*self._parts(), ("total", self.total)]]

    def _parts(self) -> list[tuple[str, float]]:
        return [(part.name, getattr(self, part.name)) for part in fields(self)]


def estimate(shape: ModelShape, setup: Setup) -> Memory:
    """Peak memory of one process that trains `shape`. Gradients count as held all the time, as they are from a step's second micro-batch on.

    Raises:
        ConfigError: a base in 4 bits that is to be trained in full; a module that the model does not have.
    """
    if setup.full and shape.quantization:
        raise ConfigError(
            "run.method: a base that is stored in 4 bits cannot be trained in full",
            "--set run.method=qlora",
        )
    weights, constants = shape.stored_bytes(setup.residual, setup.method == "qlora")
    trained = shape.trained_parameters(setup.method, setup.lora.r, setup.lora.target_modules)
    models = 2 if setup.stage == "dpo" else 1
    cached = setup.element if setup.autocast else 0  # autocast's copy of the adapter
    ranks = setup.world_size
    copies = 2 if ranks > 1 and not setup.deepspeed else 1  # DDP copies gradients into buckets
    held = Memory(
        # ZeRO-3 shards weights, but GPTQ's are buffers, and constants neither
        parameters=weights
        * (models if setup.full else 1)
        / (ranks if setup.zero == "zero3" and shape.quantization != "gptq" else 1),
        quantization=constants,
        adapter=0
        if setup.full
        else trained * (setup.trained * models + cached) / (ranks if setup.zero == "zero3" else 1),
        gradients=trained
        * setup.trained
        * copies
        / (ranks if setup.zero in ("zero2", "zero3") else 1),
        optimizer=trained
        * (_STATE[setup.optim] + (4 if setup.deepspeed else 0))
        / (ranks if setup.deepspeed else 1),
        activations=_kept(shape, setup),
        logits=_loss(shape, setup),
        working=0,
    )
    return replace(
        held,
        working=max(_moments(shape, setup, held, trained)) - held.logits + _constant(shape, setup),
    )


def _kept(shape: ModelShape, setup: Setup) -> float:
    """Inputs of checkpointed blocks, all that the others keep with their weights as autocast cast them, and the model's end."""
    checkpointed = shape.checkpointed_layers(setup.checkpoint_every)
    inputs = checkpointed * setup.tokens * shape.hidden * setup.residual
    mask = setup.scores if setup.masked else 0
    return (
        inputs
        + (shape.layers - checkpointed) * (_block(shape, setup) + _cast(shape, setup))
        + _end(shape, setup)
        + mask
    )


def _end(shape: ModelShape, setup: Setup) -> float:
    """The last norm's input (float32; with `full` normalised too), its output, and that without what is not scored."""
    return setup.tokens * shape.hidden * (4 + setup.residual * (3 if setup.full else 2))


def _cast(shape: ModelShape, setup: Setup) -> float:
    """One block's weights as autocast casts and caches them."""
    return (
        shape.linear_parameters / shape.layers * setup.element
        if setup.full and setup.autocast
        else 0
    )


def _block(shape: ModelShape, setup: Setup) -> float:
    """What one block keeps for its backward pass."""
    size, query, key = setup.element, shape.query_size, shape.key_size
    # RMSNorm keeps its input in float32, and what it normalised where its weight is trained.
    norms = shape.block_norms * shape.hidden + (query + key if shape.qk_norm else 0)
    # With a mask, sdpa gets k and v copied for each query head; without, a fused layer's v keeps all of that layer's output.
    repeated = setup.attention == "eager" or setup.masked
    pair = 2 * query if repeated else 2 * key + (query + key if shape.fused else 0)
    # q, k, v, attention's output, and of the MLP: gate, gate after its activation, up.
    per_token = norms * (4 + (setup.residual if setup.full else 0)) + size * (
        2 * query + pair + 3 * shape.intermediate
    )
    if setup.attention == "eager":  # softmax in float32, and as it is multiplied by v
        return setup.tokens * (per_token + _inputs(shape, setup)) + setup.scores * shape.heads * (
            6 if size == 2 else 4
        )
    mask = (
        setup.scores * size if setup.masked else 0
    )  # made into numbers to add, anew in each block
    return setup.tokens * (per_token + _inputs(shape, setup) + 4 * shape.heads) + mask


def _inputs(shape: ModelShape, setup: Setup) -> float:
    """What trained linear layers of a block keep of their inputs for their weights' gradients, for each token."""
    size, adapted = (
        setup.element,
        tuple(shape.linears) if setup.full else shape.adapted(setup.lora.target_modules),
    )
    widths = {name: shape.linears[name][0] for name in adapted}
    ranks = 0 if setup.full else size * setup.lora.r * len(adapted)
    if (
        setup.lora.lora_dropout and not setup.full
    ):  # each its own dropped-out copy, and a mask: of bytes, or on a CPU of what it masks
        mask = 1 if setup.device == "cuda" else 4 if _casts(shape, setup) else size
        return ranks + (size + mask) * sum(widths.values())
    if _casts(shape, setup):
        return ranks + size * sum(widths.values())
    read = [
        name for name in adapted if name != "o_proj"
    ]  # that reads attention's output, which is kept anyway
    if setup.full and setup.autocast:  # float32 inputs are cast anew for each layer
        return size * sum(widths[name] for name in read)
    return ranks + size * sum(shape.read_widths(read).values())


def _casts(shape: ModelShape, setup: Setup) -> bool:
    """Whether each adapted layer makes its own copy: PEFT casts to float32 and autocast back, but not over 4-bit weights on a GPU."""
    return setup.autocast and setup.method == "lora" and not shape.quantization


def _loss(shape: ModelShape, setup: Setup) -> float:
    """The backward pass of TRL's fused head: a tile, and float32 gradients of its input and, trained, of its weight."""
    weight = (
        shape.vocab * shape.hidden * (4 if setup.autocast else 4 + setup.element)
        if setup.full
        else 0
    )
    return _tile(shape, setup, 29) + setup.tokens * shape.hidden * (4 + setup.residual) + weight


def _tile(shape: ModelShape, setup: Setup, folded: int) -> float:
    """A tile of logits, all tokens counted as scored; in plain torch its fold takes `folded` bytes a number besides: copies in float32."""
    rows, columns = min(setup.tokens, HEAD_TILE[0]), HEAD_TILE[1]
    return rows * (
        columns * setup.element
        + (min(columns, shape.vocab) * folded if setup.device == "cpu" else 0)
    )


def _moments(shape: ModelShape, setup: Setup, held: Memory, trained: int) -> Iterator[float]:
    """What moments that may be the worst take beyond what is held (but for the loss)."""
    yield held.logits
    cast = _cast(shape, setup)
    yield shape.checkpointed_layers(setup.checkpoint_every) * cast + _tile(
        shape, setup, 13
    )  # before autocast's cache is emptied
    yield (
        setup.tokens * shape.hidden * 18
    )  # the last norm's backward pass: five float32 copies, less what the head has freed
    yield _block_backward(shape, setup) - _end(shape, setup)
    if setup.stage == "dpo":
        yield _forward(shape, setup) + shape.layers * cast
    if setup.evaluation_rows:
        validation = replace(
            setup,
            micro_batch_size=max(setup.evaluation_rows, setup.micro_batch_size),
            packing=False,
        )
        mask = validation.scores if validation.masked else 0
        yield _forward(shape, validation) + mask + shape.layers * cast - held.activations
    step = (
        4 if setup.deepspeed or setup.optim == "adamw_torch" else 0
    )  # gradients in float32; one more copy of a moment
    yield step * trained / (setup.world_size if setup.deepspeed else 1) - held.activations
    if setup.zero == "zero3" and held.quantization and shape.quantization != "gptq":
        # Each rank loads the whole 4-bit base before it is sharded.
        yield (
            held.parameters * (setup.world_size - 1)
            - held.gradients
            - held.optimizer
            - held.activations
        )


def _forward(shape: ModelShape, setup: Setup) -> float:
    """A forward pass that keeps nothing: the MLP of a block, or the loss."""
    block = setup.tokens * (
        4 * setup.element * shape.intermediate + (8 if _casts(shape, setup) else 4) * shape.hidden
    )
    return max(
        block + (setup.scores * setup.element if setup.masked else 0), _tile(shape, setup, 13)
    )


def _block_backward(shape: ModelShape, setup: Setup) -> float:
    """The last block's backward pass: what it recomputes, and gradients inside it."""
    size, every, tokens = setup.element, setup.checkpoint_every, setup.tokens
    again = (
        _block(shape, setup) + _cast(shape, setup)
        if every and (shape.layers - 1) % every == 0
        else 0
    )
    largest = max(a * b for a, b in shape.linears.values())
    eager = 0.0
    if (
        setup.attention == "eager"
    ):  # softmax's gradients in float32; the MLP's tensors are gone by then
        eager = setup.scores * shape.heads * (8 + size) - 3 * tokens * size * shape.intermediate
    if setup.full:
        gradients = tokens * (2 * size * shape.intermediate + 8 * shape.hidden) + largest * (
            size + (4 if setup.autocast else 0)
        )
        return again + max(gradients, eager)
    # Gradients of what down_proj reads, from the base and from the adapter; through float32 where PEFT casts.
    copies, rest = (3, 8) if _casts(shape, setup) else (2, 2)
    gradients = tokens * (copies * size * shape.intermediate + rest * shape.hidden)
    four_bit = setup.method == "qlora" or shape.quantization
    dequantised = (
        largest * size + tokens * size * (shape.intermediate + shape.hidden) if four_bit else 0
    )
    return again + max(gradients, dequantised, eager)


def _constant(shape: ModelShape, setup: Setup) -> float:
    """The device's context, and DeepSpeed's buckets: two to reduce (hidden^2 elements, transformers' `auto`), and what ZeRO-3 gathers."""
    context = 0 if setup.device == "cpu" else _CONTEXT + (_PEERS if setup.world_size > 1 else 0)
    buckets = 2 * shape.hidden**2 * setup.element if setup.deepspeed else 0
    if setup.zero == "zero3":
        four_bit = (
            setup.method == "qlora" or shape.quantization
        )  # two weights an element, of a byte
        elements, size = (
            (shape.linear_parameters // 2, 1)
            if four_bit
            else (shape.linear_parameters, setup.element)
        )
        buckets += min(elements, _LIVE_ELEMENTS) * size
    return context + buckets
