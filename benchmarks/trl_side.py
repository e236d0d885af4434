"""TRL's side of `language.py`: `python trl_side.py CASE FOLDER`, one step per line read; needs an interpreter with TRL.

No gradient checkpointing (TRL's default has it), the fused AdamW, float32 on the CPU, no logging, no reference where
none is needed; generation by `generate` of transformers with its default cache.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from language_cases import BETA, CASES, EXAMPLES, LEARNING_RATE, MAX_NORM, Case, Parts, answer, asked, digits, examples

MANY = 100_000


class Asked(TrainerCallback):
    """Between steps, waits until the next is asked for. A step reaches from there to the end of the next one."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.tokens = 0
        self.begun = 0.0

    def _wait(self, control: Any) -> None:
        control.should_training_stop = not asked()
        self.tokens = 0
        self.parts.clear()
        self.begun = time.process_time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        step = time.process_time() - self.begun
        generated = {"generate": 0.0, "reward": 0.0, **self.parts.seconds}
        answer(step=step, learn=step - sum(generated.values()), tokens=self.tokens, **self.parts.seconds)
        self._wait(control)


def settings(case: Case, size: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": size,
        "max_steps": MANY,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_NORM,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "dataloader_pin_memory": False,
        "dataloader_num_workers": 0,
        "seed": 0,
    }


def trainer_of(case: Case, folder: str, watch: Asked, parts: Parts) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    size = case.prompts * case.group
    shared = {
        "model": model,
        "train_dataset": Dataset.from_list(examples(case, EXAMPLES)),
        "processing_class": tokenizer,
        "callbacks": [watch],
    }
    common = settings(case, size)
    if case.method != "grpo":
        trainer: Any
        if case.method == "sft":
            trainer = trl.SFTTrainer(args=trl.SFTConfig(**common), **shared)
        else:
            reference = copy.deepcopy(model)
            trainer = trl.DPOTrainer(args=trl.DPOConfig(beta=BETA, **common), ref_model=reference, **shared)
        count_learnt(trainer, watch)
        return trainer
    config = trl.GRPOConfig(
        num_generations=case.group,
        max_completion_length=case.limit,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        generation_kwargs=None if case.ragged else {"min_new_tokens": case.limit},
        **common,
    )
    trainer = trl.GRPOTrainer(args=config, reward_funcs=digits, **shared)
    calculate = trainer._calculate_rewards

    def counted(inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
        watch.tokens += sum(map(len, ids))
        return calculate(inputs, prompts, completions, ids)

    trainer._calculate_rewards = counted
    parts.watch(trainer, "_generate", "generate")
    parts.watch(trainer, "_calculate_rewards", "reward")
    return trainer


def count_learnt(trainer: Any, watch: Asked) -> None:
    """Count the tokens of the answers in what the loss is given."""
    loss = trainer.compute_loss

    def counted(model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        learnt = inputs["completion_mask"] == 1 if "completion_mask" in inputs else inputs["labels"] != -100
        watch.tokens += int(learnt.sum())
        return loss(model, inputs, *given, **named)

    trainer.compute_loss = counted


def main() -> None:
    torch.set_num_threads(1)
    case, parts = CASES[sys.argv[1]], Parts()
    watch = Asked(parts)
    trainer_of(case, sys.argv[2], watch, parts).train()


if __name__ == "__main__":
    main()
