"""ROUGE-L and BLEU, for English and Chinese. Similarity to one reference, not correctness."""

from __future__ import annotations

from rouge_score import rouge_scorer
from sacrebleu.metrics.bleu import BLEU

from medjob.data.text import words


class _Words:
    """rouge_score's own tokenizer drops everything but Latin letters: identical Chinese texts score 0."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


_rouge = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())
_bleu = BLEU(
    effective_order=True, tokenize="none"
)  # texts come in words already; effective order, as one sentence is scored at a time


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, in [0, 1]."""
    return float(_rouge.score(reference, answer)["rougeL"].fmeasure)


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU over words, in [0, 1]."""
    if not words(answer):
        return 0.0
    return (
        float(_bleu.sentence_score(" ".join(words(answer)), [" ".join(words(reference))]).score)
        / 100
    )
