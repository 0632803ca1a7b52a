"""A model of 0.1 M parameters that has learned to end its answers.

Without an end, no answer would be complete, and the judge could build no preference pairs.
"""

from __future__ import annotations

from pathlib import Path

from tests.support.tiny_model import make_tiny_model

STEPS = 200


def make_trained_model(folder: Path, rows: list[dict[str, str]]) -> Path:
    """Train the tiny model on the questions and answers of `rows` for some seconds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tiny_model(folder)
    torch.manual_seed(0)
    torch.set_num_threads(
        1
    )  # the cluster needs CPU time too, and two threads would wait for each other
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chats = [
        [
            {"role": "user", "content": row["Question"]},
            {"role": "assistant", "content": row["Response"]},
        ]
        for row in rows
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        chosen = torch.randperm(len(texts))[:16]
        loss = model(
            input_ids=batch["input_ids"][chosen],
            attention_mask=batch["attention_mask"][chosen],
            labels=labels[chosen],
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
