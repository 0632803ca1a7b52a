"""Small tokenizers in the manner of well-known model families, with chat templates of our own that behave like theirs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_CORPUS = [
    "A man of 45 years has chest pain in the left arm. Thinking: it is an infarction.",
    "Final Response: call for help. The answer is A. Score: 1 2 3 4 5",
    "You are a careful doctor. Rest helps against a cold, 38.5 degrees.",
    *(f"The answer is {letter}." for letter in "ABCDEFGHIJ"),
]

_CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
_DEFAULT_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}"
    + _CHATML
)
_LLAMA_3 = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
_LLAMA_2 = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}"
    "{%- set messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- endif -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + m['content'] + ' ' + eos_token }}{%- endif -%}{%- endfor -%}"
)
# The empty thought is only before the last answer; earlier answers lose their thoughts.
_QWEN_3 = (
    "{%- for m in messages -%}{%- set content = m['content'] -%}{%- set thought = '' -%}"
    "{%- if m['role'] == 'assistant' and '</think>' in content -%}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' and loop.last -%}{{ '<think>\n' + thought + '\n</think>\n\n' }}{%- endif -%}"
    "{{ content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
_GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- for m in messages -%}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
# The system message goes into the last user turn, and a blank precedes an answer.
_MISTRAL = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] + '\n\n' -%}"
    "{%- set messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- endif -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}"
    "{{ '[INST] ' + (system if loop.index0 >= messages | length - 2 and loop.index0 == (messages | selectattr('role', 'equalto', 'user') | list | length - 1) * 2 else '') + m['content'] + '[/INST]' }}"
    "{%- else -%}{{ ' ' + m['content'] + eos_token }}{%- endif -%}{%- endfor -%}"
)
_PHI_4 = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|im_sep|>' }}{%- endif -%}"
)
# Drops all thoughts, and opens one in the generation prompt.
_R1 = (
    "{{ bos_token }}{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{ m['content'] }}"
    "{%- elif m['role'] == 'user' -%}{{ '<｜User｜>' + m['content'] }}"
    "{%- else -%}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Family:
    """How a family's tokenizer is made, and what its template does."""

    make: Callable[["Family"], Any]
    template: str | None
    eos: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    """Tokens that are added but not declared as special."""
    bos: str | None = None
    adds_bos: bool = False
    """Whether the tokenizer itself puts the begin token before a text."""
    end: str = ""
    """The special token that ends an answer."""
    takes_system: bool = True
    like_trl: bool = True
    """Whether TRL's own tokenisation of prompt and completion can be compared."""

    def tokenizer(self) -> Any:
        """Make the tokenizer."""
        return self.make(self)


def _wrapped(backend: Any, family: Family) -> Any:
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if family.adds_bos:
        bos = (family.bos or "", backend.token_to_id(family.bos))
        backend.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=family.eos,
        bos_token=family.bos,
        pad_token=family.eos,
        model_max_length=2048,
    )
    fast.add_tokens([AddedToken(name, special=False, normalized=False) for name in family.added])
    fast.chat_template = family.template
    return fast


def _byte_level(family: Family) -> Any:
    """Byte-level BPE, as in GPT-2, Llama 3, Qwen, Phi-4 and SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(family.special), initial_alphabet=alphabet
    )
    backend.train_from_iterator(_CORPUS * 9, trainer)
    return _wrapped(backend, family)


def _sentencepiece(prepend: bool) -> Callable[[Family], Any]:
    """BPE with byte fallback and a mark for the blank. Llama 2 puts the mark before every text, Gemma does not."""

    def make(family: Family) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="always"),
                pre_tokenizers.Punctuation("isolated"),
                pre_tokenizers.Split("\n", "isolated"),
            ]
        )
        special = ["<unk>", *family.special, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=["▁"]
        )
        backend.train_from_iterator(_CORPUS * 9, trainer)
        backend.pre_tokenizer = None
        blanks = normalizers.Replace(" ", "▁")
        backend.normalizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prepend else blanks
        )
        tail = [decoders.Strip(" ", 1, 0)] if prepend else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
        )
        return _wrapped(backend, family)

    return make


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama-3": Family(
        _byte_level,
        _LLAMA_3,
        eos="<|eot_id|>",
        special=(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"),
            *("<|end_header_id|>", "<|eot_id|>"),
        ),
        bos="<|begin_of_text|>",
        adds_bos=True,
        end="<|eot_id|>",
    ),
    "llama-2": Family(
        _sentencepiece(prepend=True),
        _LLAMA_2,
        eos="</s>",
        special=("<s>", "</s>"),
        bos="<s>",
        adds_bos=True,
        end="</s>",
    ),
    "qwen2.5": Family(
        _byte_level, _DEFAULT_SYSTEM, eos="<|endoftext|>", special=_IM, end="<|im_end|>"
    ),
    "qwen3": Family(
        _byte_level,
        _QWEN_3,
        eos="<|im_end|>",
        special=_IM,
        added=("<think>", "</think>"),
        end="<|im_end|>",
    ),
    "gemma": Family(
        _sentencepiece(prepend=False),
        _GEMMA,
        eos="<eos>",
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        adds_bos=True,
        end="<end_of_turn>",
        takes_system=False,
    ),
    "mistral": Family(
        _sentencepiece(prepend=True),
        _MISTRAL,
        eos="</s>",
        special=("<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        adds_bos=True,
        end="</s>",
    ),
    "phi-4": Family(
        _byte_level,
        _PHI_4,
        eos="<|im_end|>",
        special=(*_IM, "<|im_sep|>"),
        bos="<|endoftext|>",
        end="<|im_end|>",
    ),
    "deepseek-r1-distill": Family(
        _byte_level,
        _R1,
        eos="<｜end▁of▁sentence｜>",
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        added=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>",
        adds_bos=True,
        end="<｜end▁of▁sentence｜>",
        like_trl=False,
    ),
    "smollm2": Family(
        _byte_level,
        _DEFAULT_SYSTEM,
        eos="<|im_end|>",
        special=_IM,
        bos="<|im_start|>",
        end="<|im_end|>",
    ),
    "gpt-2": Family(
        _byte_level, None, eos="<|endoftext|>", special=("<|endoftext|>",), bos="<|endoftext|>"
    ),
}
CHAT_FAMILIES = {name: family for name, family in FAMILIES.items() if family.template}
