"""A learned reward: a transformers sequence classifier that reads a conversation and says how good its reply is.

`"model:PATH"` in a run's rewards names its folder. The first logit is the reward, as TRL has it. Knows nothing of the
policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..r1.errors import UserError

_BATCH = 16  # replies that are read together


class RewardModel:
    """A reward with weights, loaded once, on the CPU or a GPU."""

    def __init__(self, folder: str) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(
                f"a reward model needs torch and transformers: {error}", "pip install 'stillhouse[train]'"
            ) from None
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"there is no reward model in {folder}", "a folder with config.json, weights and tokenizer")
        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
        except Exception as error:  # whatever comes to their mind
            words = str(error).strip().split("\n", 1)[0]
            raise UserError(f"the reward model in {folder} cannot be loaded: {words}") from None
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().requires_grad_(False).to(device)
        self._tokenizer = tokenizer

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """One number a reply."""
        import torch

        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        rewards: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(texts), _BATCH):
                read = self._tokenizer(texts[start : start + _BATCH], return_tensors="pt", padding=True)
                logits = self._model(**read.to(self._model.device)).logits  # (R, labels)
                rewards += logits[:, 0].float().tolist()
        return rewards

    def _text(self, prompt: Any, completion: Any) -> str:
        """What the model is to read: through its own chat template where it has one."""
        if isinstance(prompt, str):
            if not self._tokenizer.chat_template:
                return prompt + completion
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        else:
            turns = [*map(dict, prompt), *completion]
        if self._tokenizer.chat_template:
            return self._tokenizer.apply_chat_template(turns, tokenize=False)
        return "\n\n".join(turn["content"] for turn in turns)
