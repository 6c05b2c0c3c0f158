# SPDX-License-Identifier: MIT
"""A Hugging Face Trainer run that can be interrupted: ranks and P as they were, a new head, too."""

import sys
from pathlib import Path

import safetensors.torch
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent))
from aira import aira_state_dict, apply_aira, load_aira  # noqa: E402


def train(base, data, batches, output="run", steps=300, save_steps=100, **options):
    """base: a model's name or folder; data: a tokenised dataset; batches: a few dicts of tensors;
    options: those of apply_aira.  Call it again after an interruption: it goes on.
    """
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    start, checkpoint = Path(output, "start.pt"), get_last_checkpoint(output)
    if checkpoint:
        load_aira(model, torch.load(start))
    else:
        apply_aira(
            model,
            lambda: [model(**batch).logits.sum() for batch in batches],
            also_train="classifier",
            **options,
        )
        torch.save(aira_state_dict(model), start)
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": steps // 10}
    arguments = TrainingArguments(
        output, max_steps=steps, save_steps=save_steps, learning_rate=1e-3, **schedule
    )
    Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=checkpoint)
    torch.save(aira_state_dict(model), Path(output, "adapter.pt"))
    return model


def adapter_of(checkpoint, base_model, output="run"):
    """The adapter of a Trainer's checkpoint, which holds the whole adapted model."""
    load_aira(base_model, torch.load(Path(output, "start.pt")))
    safetensors.torch.load_model(base_model, Path(checkpoint, "model.safetensors"))
    return aira_state_dict(base_model)
