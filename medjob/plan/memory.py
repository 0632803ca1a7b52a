"""Memory of one training process: what it keeps throughout a step, plus the worst transient peak.

The tensors that are kept and copied follow transformers 5.23, PEFT 0.21, TRL 1.16 and torch 2.13.
tests/plan/test_memory.py compares the estimate with allocations measured on a CPU.
Terms that only exist on GPUs or under DeepSpeed are read from the source of DeepSpeed 0.19.8, or
assumed. Their comments say which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Literal, NamedTuple

from medjob.config.train import LoraParams, Method, Zero
from medjob.errors import ConfigError
from medjob.plan.shape import ModelShape, Stage

Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]
Device = Literal["cuda", "mps", "cpu"]
"""`cuda`: a GPU of NVIDIA. `mps`: the GPU of a Mac with Apple silicon."""

GIB = 2**30
_FLOAT32 = 4
_BOOL = 1

# Rows and columns of the tile of logits that TRL's fused head holds at once: TOKEN_CHUNK_SIZE in
# trl/kernels/chunked_logprob.py, and _CHUNKED_LOGPROB_CHUNK_SIZE in trl/trainer/utils.py.
HEAD_TILE = (4096, 32768)
# Copies that plain torch makes of a tile, in bytes per logit. Triton's kernel on a GPU makes none.
# _forward_tile: the logits, their distance from the maximum, its exponential; a mask of columns.
_TILE_FORWARD_COPIES = 3 * _FLOAT32 + _BOOL
# _backward_tile: two scaled copies of the logits, log p, p, the gradient, the targets one-hot, the
# difference of these and p; and the comparison that gives the one-hot targets.
_TILE_BACKWARD_COPIES = 7 * _FLOAT32 + _BOOL
# Backward pass of the model's last RMSNorm, in bytes per value of the hidden state: five float32
# copies, less two bytes that the head has freed by then.
_FINAL_NORM_BACKWARD = 5 * _FLOAT32 - 2
# Attention writes one float32 log-sum-exp per token and head (sdpa and FlashAttention).
_LOG_SUM_EXP = _FLOAT32
# Tensors as wide as the MLP that a block keeps: gate, gate after its activation, up.
_KEPT_MLP_TENSORS = 3
# Tensors as wide as the MLP in a forward pass without gradients: the same, and gate x up.
_FORWARD_MLP_TENSORS = 4
# Matrices of the size of a layer's weight that DoRA holds at once.
_DORA_COPIES = 4
# CUDA's context with cuBLAS' workspace, and NCCL's buffers if there are several processes. Assumed.
_CUDA_CONTEXT_BYTES = int(0.75 * GIB)
_NCCL_BUFFER_BYTES = GIB // 2
# Elements that ZeRO-3 may hold gathered: DeepSpeed's default of stage3_max_live_parameters.
_ZERO3_LIVE_ELEMENTS = 10**9
# Buckets for reducing gradients, each of hidden^2 elements: transformers' `auto` for DeepSpeed.
_DEEPSPEED_BUCKETS = 2
# Bytes of optimizer state per trained parameter. AdamW keeps two float32 moments. 8-bit moments
# have one float32 scale per 256 values (Dettmers et al. 2021). Adafactor keeps one float32 per row
# and per column of a matrix, 0.002 bytes per parameter at 4096 x 4096.
_OPTIMIZER_STATE_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256,
    "adafactor": 0.01,
}


class _BlockGradients(NamedTuple):
    """Gradients that exist at once in a block's backward pass, at its peak in `down_proj`."""

    mlp_tensors: int
    """Tensors as wide as the MLP, in the compute dtype."""
    hidden_bytes: int
    """Bytes per value of the hidden state."""


# Counted from the code of the libraries, and checked by the measurements in
# tests/plan/test_memory.py. Under LoRA, `down_proj` has a gradient of its input from the base and
# one from the adapter. If PEFT casts that input to float32, the adapter's exists in both dtypes.
_FULL_GRADIENTS = _BlockGradients(mlp_tensors=2, hidden_bytes=8)
_LORA_GRADIENTS = _BlockGradients(mlp_tensors=2, hidden_bytes=2)
_CASTING_LORA_GRADIENTS = _BlockGradients(mlp_tensors=3, hidden_bytes=8)


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings of a training that determine its memory."""

    stage: Stage
    method: Method
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    lora: LoraParams = field(default_factory=LoraParams)
    zero: Zero = "none"
    world_size: int = 1
    micro_batch_size: int = 1
    """Rows (pairs for DPO) in one forward pass on one device."""
    max_length: int = 2048
    """Tokens per row. Every row is counted at this length."""
    checkpoint_every: int = 0
    """0: all activations are kept. n: blocks whose index is a multiple of n are recomputed
    (transformers' `every_n_layers`)."""
    attention: Attention = "sdpa"
    optim: str = "adamw_torch_fused"
    packing: bool = True
    """For SFT only. TRL concatenates all packed rows of a batch into one row."""
    evaluation_rows: int = 0
    """Minimum rows (pairs) in a validation batch, for micro-batches that have fewer. 0: no
    validation."""
    device: Device = "cuda"
    """Elsewhere than on CUDA there is no context, and plain torch computes the loss, with more
    copies."""

    @property
    def rows(self) -> int:
        """Rows in one forward pass. DPO runs chosen and rejected answers together."""
        return self.micro_batch_size * (2 if self.stage == "dpo" else 1)

    @property
    def tokens(self) -> int:
        """Tokens in one forward pass."""
        return self.rows * self.max_length

    @property
    def packed(self) -> bool:
        """Whether rows are concatenated."""
        return self.packing and self.stage == "sft"

    @property
    def has_mask(self) -> bool:
        """Whether attention gets a mask: for concatenated or padded rows. FlashAttention needs
        none."""
        return self.attention != "flash_attention_2" and (self.packed or self.rows > 1)

    @property
    def keeps_scores(self) -> bool:
        """Whether the attention scores of all pairs of tokens are kept. Assumed on a Mac, where
        torch's kernels that avoid this may be for inference only."""
        return self.attention == "eager" or self.device == "mps"

    @property
    def attention_pairs(self) -> int:
        """Query-key pairs of one head, which is the size of a mask."""
        return self.tokens**2 if self.packed else self.tokens * self.max_length

    @property
    def trains_all_weights(self) -> bool:
        """Whether the method trains the base model and not an adapter."""
        return self.method == "full"

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed runs the training. It casts the model and keeps float32 weights."""
        return self.zero != "none"

    @property
    def compute_bytes(self) -> int:
        """Bytes per value in the compute dtype."""
        return 4 if self.dtype == "float32" else 2

    @property
    def autocast(self) -> bool:
        """Whether trained weights are float32 and torch casts them for each use."""
        return not self.deepspeed and self.compute_bytes == 2

    @property
    def trained_bytes(self) -> int:
        """Bytes per trained weight, and per value of its gradient."""
        return self.compute_bytes if self.deepspeed else _FLOAT32

    @property
    def hidden_bytes(self) -> int:
        """Bytes per value of the hidden state between blocks. It has the dtype of the embedding and
        the norms."""
        trained = self.trains_all_weights or "embed_tokens" in self.lora.saved_names
        return self.trained_bytes if trained else self.compute_bytes

    @property
    def trains_tokens(self) -> bool:
        """Whether an adapter has trained rows of the embedding and of the head."""
        return not self.trains_all_weights and self.lora.trainable_token_indices is not None

    @property
    def allows_zero3(self) -> bool:
        """Whether ZeRO-3 can shard the base. PEFT 0.21 reads whole weights for DoRA and for trained
        tokens, and does not gather them."""
        return self.trains_all_weights or not (self.lora.use_dora or self.trains_tokens)

    def trains_head(self, tied: bool) -> bool:
        """Whether the weight of the head has a gradient."""
        saved = "embed_tokens" if tied else "lm_head"
        return self.trains_all_weights or self.trains_tokens or saved in self.lora.saved_names


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process at its peak."""

    parameters: float
    """The base model. Full fine-tuning with DPO has two."""
    quantization: float
    """Scales of 4-bit weights."""
    adapter: float
    """LoRA weights. With DPO, the reference's as well."""
    gradients: float
    optimizer: float
    """Moments, and the float32 weights of DeepSpeed."""
    activations: float
    """Tensors that the forward pass keeps for the backward pass."""
    logits: float
    """The loss: a tile of logits, and the gradients of the head's inputs."""
    transient: float
    """The most that exists for a moment on top of the above, with buckets and the device's
    context."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(value for _, value in self._parts())

    def table(self) -> list[tuple[str, float]]:
        """Return rows of (part, GiB), with the total last."""
        return [(name, value / GIB) for name, value in [*self._parts(), ("total", self.total)]]

    def _parts(self) -> list[tuple[str, float]]:
        return [(part.name, getattr(self, part.name)) for part in fields(self)]


def estimate(shape: ModelShape, setup: Setup) -> Memory:
    """Estimate the peak memory of one process that trains `shape`.

    Gradients count as held all the time, which is true from a step's second micro-batch on.

    Raises:
        ConfigError: full fine-tuning of a base that is stored in 4 bits, or a LoRA target that the
            model does not have.
    """
    if setup.trains_all_weights and shape.quantization:
        raise ConfigError(
            "run.method: a base that is stored in 4 bits cannot be trained in full",
            "--set run.method=qlora",
        )
    trained = shape.trained_parameters(setup.method, setup.lora)
    parameters, quantization = _base_model(shape, setup)
    held = Memory(
        parameters=parameters,
        quantization=quantization,
        adapter=_adapter(setup, trained),
        gradients=_gradients(setup, trained),
        optimizer=_optimizer(setup, trained),
        activations=_activations(shape, setup),
        logits=_loss(shape, setup),
        transient=0,
    )
    worst = max(_peaks_above_held(shape, setup, held, trained)) - held.logits
    return replace(held, transient=worst + _context_and_buckets(shape, setup))


def _base_model(shape: ModelShape, setup: Setup) -> tuple[float, float]:
    """Bytes of the base model's weights, and of the scales of those in 4 bits."""
    unit = setup.trained_bytes if setup.trains_all_weights else setup.compute_bytes
    weights, scales = shape.stored_bytes(unit, setup.method == "qlora")
    copies = 2 if setup.stage == "dpo" and setup.trains_all_weights else 1
    # ZeRO-3 shards parameters. GPTQ's weights are buffers, and scales are no parameters either.
    sharded = setup.zero == "zero3" and shape.quantization != "gptq"
    return weights * copies / (setup.world_size if sharded else 1), scales


def _adapter(setup: Setup, trained: int) -> float:
    if setup.trains_all_weights:
        return 0
    copies = 2 if setup.stage == "dpo" else 1
    autocast_copy = setup.compute_bytes if setup.autocast else 0
    per_weight = setup.trained_bytes * copies + autocast_copy
    return trained * per_weight / (setup.world_size if setup.zero == "zero3" else 1)


def _gradients(setup: Setup, trained: int) -> float:
    # DDP copies gradients into buckets.
    copies = 2 if setup.world_size > 1 and not setup.deepspeed else 1
    sharded = setup.zero in ("zero2", "zero3")
    return trained * setup.trained_bytes * copies / (setup.world_size if sharded else 1)


def _optimizer(setup: Setup, trained: int) -> float:
    per_weight = _OPTIMIZER_STATE_BYTES[setup.optim] + (_FLOAT32 if setup.deepspeed else 0)
    return trained * per_weight / (setup.world_size if setup.deepspeed else 1)


def _activations(shape: ModelShape, setup: Setup) -> float:
    """All that the forward pass keeps: the inputs of checkpointed blocks, everything inside the
    other blocks with autocast's copies of their weights, the last norm, and the mask."""
    checkpointed = shape.checkpointed_layers(setup.checkpoint_every)
    inputs = checkpointed * setup.tokens * shape.hidden * setup.hidden_bytes
    block = _block_activations(shape, setup) + _autocast_weights(shape, setup)
    mask = setup.attention_pairs * _BOOL if setup.has_mask else 0
    return (
        inputs
        + (shape.layers - checkpointed) * block
        + _final_norm_activations(shape, setup)
        + mask
        + _merged_head(shape, setup)
    )


def _merged_head(shape: ModelShape, setup: Setup) -> float:
    """The copy of the head's weight in which PEFT replaces the rows of trained tokens."""
    return shape.embedding_parameters * setup.compute_bytes if setup.trains_tokens else 0


def _final_norm_activations(shape: ModelShape, setup: Setup) -> float:
    """The last norm's input in float32, its output, and its output at the scored tokens. If the
    norm is trained, its normalised input too."""
    tensors = 3 if setup.trains_all_weights else 2
    return setup.tokens * shape.hidden * (_FLOAT32 + setup.hidden_bytes * tensors)


def _autocast_weights(shape: ModelShape, setup: Setup) -> float:
    """One block's weights as autocast casts and caches them."""
    if not (setup.trains_all_weights and setup.autocast):
        return 0
    return shape.linear_parameters / shape.layers * setup.compute_bytes


def _block_activations(shape: ModelShape, setup: Setup) -> float:
    """The tensors that one block keeps for its backward pass."""
    size = setup.compute_bytes
    query = shape.query_size
    key = shape.key_size
    # RMSNorm keeps its input in float32, and its normalised input if its weight is trained.
    norm_widths = shape.block_norms * shape.hidden + (query + key if shape.qk_norm else 0)
    norms = norm_widths * (_FLOAT32 + (setup.hidden_bytes if setup.trains_all_weights else 0))
    # With a mask, sdpa gets k and v repeated for each query head. Without, the v of a fused layer
    # keeps that layer's whole output alive.
    if setup.keeps_scores or setup.has_mask:
        keys_and_values = 2 * query
    else:
        keys_and_values = 2 * key + (query + key if shape.fused else 0)
    queries_and_output = 2 * query
    # bitsandbytes returns the dtype of its input.
    mlp_bytes = setup.hidden_bytes if setup.method == "qlora" else size
    mlp = mlp_bytes * _KEPT_MLP_TENSORS * shape.intermediate
    projections = size * (queries_and_output + keys_and_values)
    per_token = norms + projections + mlp + _linear_inputs(shape, setup)
    if setup.keeps_scores:
        return setup.tokens * per_token + _eager_softmax(shape, setup)
    # Each block converts the mask to the numbers that it adds to the scores.
    mask = setup.attention_pairs * size if setup.has_mask else 0
    return setup.tokens * (per_token + _LOG_SUM_EXP * shape.heads) + mask


def _eager_softmax(shape: ModelShape, setup: Setup) -> float:
    """The softmax in float32, and its 16-bit copy that is multiplied by v."""
    copy = setup.compute_bytes if setup.compute_bytes < _FLOAT32 else 0
    return setup.attention_pairs * shape.heads * (_FLOAT32 + copy)


def _linear_inputs(shape: ModelShape, setup: Setup) -> float:
    """Bytes per token that the trained linear layers of a block keep of their inputs, to compute
    the gradients of their weights."""
    size = setup.compute_bytes
    if setup.trains_all_weights:
        widths = {name: inputs for name, (inputs, _) in shape.linears.items()}
        # The input of o_proj is the output of attention, which is kept anyway.
        kept_here = [name for name in widths if name != "o_proj"]
        if setup.autocast:  # float32 inputs are cast once per layer
            return size * sum(widths[name] for name in kept_here)
        return size * sum(shape.read_widths(kept_here).values())
    adapted = shape.adapted(setup.lora.target_modules)
    input_widths = sum(shape.linears[name][0] for name in adapted)
    between_a_and_b = size * sum(setup.lora.rank_of(name) for name in adapted)
    if setup.lora.use_dora:  # the outputs of base and adapter, for the gradient of the magnitude
        between_a_and_b += 2 * _FLOAT32 * sum(shape.linears[name][1] for name in adapted)
    copies_input = _adapters_copy_their_input(shape, setup)
    if setup.lora.lora_dropout:
        # Each layer keeps its own copy after dropout, and a mask: of bytes on a GPU, of the dtype
        # of the copy on a CPU.
        cpu_mask = _FLOAT32 if copies_input else size
        mask = _BOOL if setup.device == "cuda" else cpu_mask
        return between_a_and_b + (size + mask) * input_widths
    if copies_input:
        return between_a_and_b + size * input_widths
    kept_here = [name for name in adapted if name != "o_proj"]
    return between_a_and_b + size * sum(shape.read_widths(kept_here).values())


def _adapters_copy_their_input(shape: ModelShape, setup: Setup) -> bool:
    """Whether PEFT casts each adapted layer's input to float32 and autocast casts it back. It does
    not over 4-bit weights on a GPU."""
    return setup.autocast and setup.method == "lora" and not shape.quantization


def _loss(shape: ModelShape, setup: Setup) -> float:
    """Backward pass of TRL's fused head: a tile of logits, and gradients in float32 that are then
    cast to the dtype of the hidden state and, if trained, of the head's weight."""
    hidden_gradient = setup.tokens * shape.hidden * (_FLOAT32 + setup.hidden_bytes)
    weight_gradient = 0
    if setup.trains_head(shape.tied):
        cast = 0 if setup.autocast else setup.compute_bytes
        weight_gradient = shape.vocab * shape.hidden * (_FLOAT32 + cast)
    return _logits_tile(shape, setup, _TILE_BACKWARD_COPIES) + hidden_gradient + weight_gradient


def _logits_tile(shape: ModelShape, setup: Setup, copies: int) -> float:
    """A tile of logits, as if all tokens were scored. `copies`: further bytes per logit on a
    CPU."""
    max_rows, columns = HEAD_TILE
    per_row = columns * setup.compute_bytes
    if setup.device != "cuda":
        per_row += min(columns, shape.vocab) * copies
    return min(setup.tokens, max_rows) * per_row


def _peaks_above_held(
    shape: ModelShape, setup: Setup, held: Memory, trained: int
) -> Iterator[float]:
    """Bytes above those held (without the loss) at each moment that may be the peak."""
    yield held.logits
    block_cast = _autocast_weights(shape, setup)
    # The loss in the forward pass, before autocast's cache is emptied.
    checkpointed_cast = shape.checkpointed_layers(setup.checkpoint_every) * block_cast
    yield checkpointed_cast + _logits_tile(shape, setup, _TILE_FORWARD_COPIES)
    yield setup.tokens * shape.hidden * _FINAL_NORM_BACKWARD
    yield _block_backward(shape, setup) - _final_norm_activations(shape, setup)
    yield _dora_weights(shape, setup)
    yield _embedding_gradient(shape, setup) - held.activations
    if setup.stage == "dpo":
        yield _forward_without_gradients(shape, setup) + shape.layers * block_cast
    if setup.evaluation_rows:
        yield _validation(shape, setup) + shape.layers * block_cast - held.activations
    yield _optimizer_step(setup, trained) - held.activations
    if setup.zero == "zero3" and held.quantization and shape.quantization != "gptq":
        # Each rank loads the whole 4-bit base before ZeRO-3 shards it.
        rest_of_base = held.parameters * (setup.world_size - 1)
        yield rest_of_base - held.gradients - held.optimizer - held.activations


def _dora_weights(shape: ModelShape, setup: Setup) -> float:
    """DoRA measures the adapted weight of a layer in each forward pass: the base's and the
    adapter's weight, their sum and a copy, and the identity matrix that PEFT multiplies A and B
    with."""
    if setup.trains_all_weights or not setup.lora.use_dora:
        return 0
    widths = [shape.linears[name] for name in shape.adapted(setup.lora.target_modules)]
    return max(_FLOAT32 * (_DORA_COPIES * a * b + a * a) for a, b in widths)


def _embedding_gradient(shape: ModelShape, setup: Setup) -> float:
    """The gradient of the whole embedding, before it is added to that of earlier micro-batches or
    the rows of trained tokens are taken from it."""
    if setup.trains_tokens:
        return shape.embedding_parameters * setup.compute_bytes
    saved = not setup.trains_all_weights and "embed_tokens" in setup.lora.saved_names
    return shape.embedding_parameters * setup.trained_bytes if saved else 0


def _validation(shape: ModelShape, setup: Setup) -> float:
    rows = max(setup.evaluation_rows, setup.micro_batch_size)
    validation = replace(setup, micro_batch_size=rows, packing=False)
    mask = validation.attention_pairs * _BOOL if validation.has_mask else 0
    return _forward_without_gradients(shape, validation) + mask


def _optimizer_step(setup: Setup, trained: int) -> float:
    """DeepSpeed copies gradients to float32. `adamw_torch` makes one more copy of a moment."""
    copied = setup.deepspeed or setup.optim == "adamw_torch"
    per_weight = _FLOAT32 if copied else 0
    return per_weight * trained / (setup.world_size if setup.deepspeed else 1)


def _forward_without_gradients(shape: ModelShape, setup: Setup) -> float:
    """The peak of a forward pass that keeps nothing: in the MLP of a block, or in the loss."""
    size = setup.compute_bytes
    float32_inputs = 2 if _adapters_copy_their_input(shape, setup) else 1
    mlp = setup.tokens * (
        _FORWARD_MLP_TENSORS * size * shape.intermediate + float32_inputs * _FLOAT32 * shape.hidden
    )
    mask = setup.attention_pairs * size if setup.has_mask else 0
    return max(mlp + mask, _logits_tile(shape, setup, _TILE_FORWARD_COPIES))


def _block_backward(shape: ModelShape, setup: Setup) -> float:
    """The last block's backward pass: its recomputed activations, and the gradients inside it."""
    size = setup.compute_bytes
    last_block = shape.layers - 1
    recomputed = 0.0
    if setup.checkpoint_every and last_block % setup.checkpoint_every == 0:
        recomputed = _block_activations(shape, setup) + _autocast_weights(shape, setup)
    largest_weight = max(inputs * outputs for inputs, outputs in shape.linears.values())
    softmax = _eager_softmax_gradients(shape, setup) if setup.keeps_scores else 0.0
    if setup.trains_all_weights:
        weight_gradient = largest_weight * (size + (_FLOAT32 if setup.autocast else 0))
        gradients = _block_gradients(shape, setup, _FULL_GRADIENTS) + weight_gradient
        return recomputed + max(gradients, softmax)
    casts = _adapters_copy_their_input(shape, setup)
    gradients = _block_gradients(
        shape, setup, _CASTING_LORA_GRADIENTS if casts else _LORA_GRADIENTS
    )
    dequantized = 0
    if setup.method == "qlora" or shape.quantization:
        # A 16-bit copy of a weight, and the gradients of its layer's input and output.
        gradients_of_layer = setup.tokens * size * (shape.intermediate + shape.hidden)
        dequantized = largest_weight * size + gradients_of_layer
    return recomputed + max(gradients, dequantized, softmax, _dora_weights(shape, setup))


def _block_gradients(shape: ModelShape, setup: Setup, alive: _BlockGradients) -> float:
    mlp = alive.mlp_tensors * setup.compute_bytes * shape.intermediate
    return setup.tokens * (mlp + alive.hidden_bytes * shape.hidden)


def _eager_softmax_gradients(shape: ModelShape, setup: Setup) -> float:
    """Two gradients of the softmax in float32 and one in the compute dtype. The MLP's tensors are
    freed by then."""
    size = setup.compute_bytes
    softmax = setup.attention_pairs * shape.heads * (2 * _FLOAT32 + size)
    return softmax - _KEPT_MLP_TENSORS * setup.tokens * size * shape.intermediate


def _context_and_buckets(shape: ModelShape, setup: Setup) -> float:
    """The device's context, the buckets of DeepSpeed, and the weights that ZeRO-3 gathers."""
    context = 0
    if setup.device == "cuda":
        context = _CUDA_CONTEXT_BYTES + (_NCCL_BUFFER_BYTES if setup.world_size > 1 else 0)
    buckets = 0
    if setup.deepspeed:
        buckets = _DEEPSPEED_BUCKETS * shape.hidden**2 * setup.compute_bytes
    if setup.zero == "zero3":
        four_bit = setup.method == "qlora" or shape.quantization
        # Two 4-bit weights share an element of one byte.
        elements = shape.linear_parameters // 2 if four_bit else shape.linear_parameters
        element_bytes = 1 if four_bit else setup.compute_bytes
        buckets += min(elements, _ZERO3_LIVE_ELEMENTS) * element_bytes
    return context + buckets
