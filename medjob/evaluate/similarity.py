"""ROUGE-L and BLEU for texts in any script.

They measure similarity to one reference, not correctness. Signs are words: "+8" is not "-8".
"""

from __future__ import annotations

from rouge_score import rouge_scorer
from sacrebleu.metrics.bleu import BLEU

from medjob.data.text import words


class _Words:
    """Tokenizer for rouge_score. Its default drops all letters but Latin ones, so identical Chinese
    texts score 0."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


_rouge = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())
# The texts are split into words already. Effective order suits single sentences.
_bleu = BLEU(effective_order=True, tokenize="none")


def rouge_l(answer: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of words, in [0, 1]."""
    return float(_rouge.score(reference, answer)["rougeL"].fmeasure)


def bleu(answer: str, reference: str) -> float:
    """Return the sentence BLEU over words, in [0, 1]."""
    answer_words = words(answer)
    if not answer_words:
        return 0.0
    score = _bleu.sentence_score(" ".join(answer_words), [" ".join(words(reference))]).score
    return float(score) / 100
