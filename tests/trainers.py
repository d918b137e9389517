"""What other people's trainers need: short settings, examples, and a tokenizer of numbers."""

import pytest
from tiny_models import VOCAB_SIZE, tokens

# transformers and PEFT call functions that transformers itself has deprecated
THEIR_WARNINGS = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def examples(count: int = 8):
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": tokens(count, 12).tolist(), "labels": tokens(count, 12).tolist()})


def settings(folder, **changes) -> dict:
    """Arguments of TrainingArguments and SFTConfig: every step is logged, nothing is saved."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | changes


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def number_tokenizer():
    """Every token is a number, and every number below the vocabulary's size a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB_SIZE)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0")
