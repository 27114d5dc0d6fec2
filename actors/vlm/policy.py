"""The VLM policy: log-probabilities of completions, the supervised loss, LoRA, and export. No Ray here.

Responsible for: what a completion's log-probability *is* (same prompt, same banned tokens, same temperature as the
sampler in ``actors.vlm.engine``). Not responsible for: sampling, optimisation or sharding (``actors.learner``), rewards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from actors.failures import BadSampleError
from actors.learner.objectives.grpo import kl_estimate
from actors.policy.lora import adapter_config, adapters_disabled, has_lora, peft_names
from actors.policy.protocol import PolicyOutput, SupervisedLoss
from actors.policy.settings import LoraSection
from actors.records import Experience, VlmExperience
from actors.vlm.adapter import inject
from actors.vlm.inputs import EncodedPrompt, PromptEncoder
from actors.vlm.loading import language_model, load_model, model_units
from actors.vlm.prompt import BAN_BIAS, banned_token_ids, check_prompt, check_text
from actors.vlm.rows import VlmBatch, join
from actors.vlm.settings import PROMPT, PromptSection
from actors.weights.files import write_folder


class VlmPolicy:
    """A vision-language model as a policy over answer tokens (``actors.policy.protocol.Trainable``).

    ``temperature`` divides the logits of :meth:`forward`, as it does in the sampler: the policy that is optimised is the
    one that was sampled from. ``engine_dtype`` is the sampler's dtype, on which the prompt's positions depend, whatever
    this policy computes in. With ``shared_prompts`` a batch reads a prompt once for all its completions
    (``actors.vlm.rows``).
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        temperature: float = 1.0,
        engine_dtype: str = "float32",
        cache_size: int = 64,
        shared_prompts: bool = True,
        prompt: PromptSection = PROMPT,
        device: str = "cpu",
    ):
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: log-probabilities need a temperature > 0 (the rollout's)")
        self.module = model
        check_prompt(processor.tokenizer, prompt)
        self.processor, self.prompt = processor, prompt
        self.temperature = temperature
        self.device = torch.device(device)
        inner: Any = model
        self.fsdp_units = model_units(inner)
        text = inner.config.get_text_config()
        # A mask that says who may be attended to would switch a sliding window off.
        windowed = getattr(language_model(inner), "has_sliding_layers", False)
        others = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
        self.shared_prompts = shared_prompts and not windowed and not others
        self.eos_token_id = int(processor.tokenizer.eos_token_id)
        vocab_size = int(text.vocab_size)
        self.max_positions = int(text.max_position_embeddings)
        self.banned_ids = banned_token_ids(processor, vocab_size)
        self._bias = torch.zeros(vocab_size, device=self.device)
        self._bias[self.banned_ids] = BAN_BIAS
        self._prompts = PromptEncoder(processor, inner.config, cache_size, engine_dtype, prompt)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "float32",
        lora: LoraSection | None = None,
        seed: int = 0,
        adapter: str | Path | None = None,
        device: str = "cpu",
        temperature: float = 1.0,
        engine_dtype: str = "float32",
        cache_size: int = 64,
        shared_prompts: bool = True,
        prompt: PromptSection = PROMPT,
    ) -> VlmPolicy:
        """Load a transformers folder (or hub name).

        With ``lora`` only the adapter trains, whose first values ``seed`` draws; ``adapter`` is a PEFT folder to start from.

        Raises:
            CheckpointError: the folder is missing or cannot be trained here, or the adapter doesn't fit it.
            ConfigError: the tokenizer cannot write what ``prompt`` asks for.
        """
        model, processor = load_model(path, dtype)
        if lora is not None or adapter is not None:
            inject(model, lora, adapter, seed)
        model.eval().to(device)
        return cls(
            model,
            processor,
            temperature=temperature,
            engine_dtype=engine_dtype,
            cache_size=cache_size,
            shared_prompts=shared_prompts,
            prompt=prompt,
            device=device,
        )

    # --- batches ---

    def collate(self, items: Sequence[Experience]) -> VlmBatch:
        """Return the completions of ``items`` joined with their prompts, on the policy's device.

        Raises:
            BadSampleError: an empty completion, or frames or a question that cannot be used.
        """
        prompts, completions = [], []
        for item in items:
            if not isinstance(item, VlmExperience):
                raise TypeError(f"VlmPolicy reads VlmExperience, got {type(item).__name__}")
            if len(item.token_ids) == 0:
                raise BadSampleError(f"completion {item.index} of sample {item.sample_id!r} is empty")
            prompts.append(item.asked)
            completions.append(torch.from_numpy(np.asarray(item.token_ids, dtype=np.int64)))
        return self._join(self._prompts.encode(prompts), completions)

    def counters(self) -> dict[str, float]:
        """Return how many prompts (question and video) were processed, and how many were asked for, since the start."""
        return {"prompts": float(self._prompts.made), "prompts_asked": float(self._prompts.asked)}

    def rollout_logprobs(self, items: Sequence[Experience]) -> Tensor:
        """Return the engine's log-probabilities, (B, T) float32, 0 in the padding."""
        rows = [torch.from_numpy(np.array(i.rollout_logprobs, dtype=np.float32)) for i in items]  # type: ignore[union-attr]
        return pad_sequence(rows, batch_first=True).to(self.device)

    def _join(self, prompts: list[EncodedPrompt], completions: list[Tensor]) -> VlmBatch:
        return join(prompts, completions, share=self.shared_prompts, device=self.device)

    # --- policy ---

    def forward(self, batch: VlmBatch) -> PolicyOutput:
        """Return fp32 log-probabilities (B, T) of the completions at the sampling temperature, and entropies."""
        return self._logprobs(batch, self.temperature)

    def _logprobs(self, batch: VlmBatch, temperature: float) -> PolicyOutput:
        kept = self.module(**batch.model_inputs).logits  # (R, K, V)
        # As in the sampler: bias first, then temperature, then one normalisation over the vocabulary.
        logits = (kept[batch.rows[:, None], batch.predictors].float() + self._bias) / temperature  # (B, T, V)
        total = torch.logsumexp(logits, dim=-1)
        chosen = logits.gather(-1, batch.tokens[..., None]).squeeze(-1)
        zero = torch.zeros((), device=self.device)
        logprobs = torch.where(batch.mask, chosen - total, zero)
        with torch.no_grad():
            probabilities = torch.exp(logits - total[..., None])
            entropy = torch.where(batch.mask, total - (probabilities * logits).sum(dim=-1), zero)
        return PolicyOutput(logprobs=logprobs, mask=batch.mask, entropy=entropy)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the adapter is disabled, so that :meth:`forward` runs the base model.

        Raises:
            ValueError: the policy has no adapter; a full-weights reference is a frozen copy, which the learner keeps.
        """
        with adapters_disabled(self.module):
            yield

    def kl(self, out: PolicyOutput, ref: PolicyOutput, estimator: str | None = None) -> Tensor:
        """Return an estimate of KL(current || reference) per token, (B, T); ``estimator`` k1, k2 or k3 (the default)."""
        estimate = kl_estimate(out.logprobs, ref.logprobs, estimator or "k3")
        return torch.where(out.mask, estimate, torch.zeros((), device=self.device))

    # --- supervised ---

    def sft_loss(self, batch: Sequence[tuple[Any, ...]]) -> SupervisedLoss:
        """Return the negative log-likelihood of the answers (EOS included), summed over their tokens, at temperature 1.

        Args:
            batch: (:class:`VideoQuestion`, answer text) pairs.

        Returns:
            The sum in nats, the number of tokens, and metrics: ``loss`` and ``entropy`` in nats per token, ``tokens``.
        """
        prompts = self._prompts.encode([asked for asked, _ in batch])
        joined = self._join(prompts, [self.answer_tokens(answer) for _, answer in batch])
        out = self._logprobs(joined, 1.0)
        tokens = int(joined.mask.sum())
        total = -out.logprobs.sum()
        assert out.entropy is not None
        metrics = {
            "loss": float(total.detach()) / tokens,
            "tokens": float(tokens),
            "entropy": float(out.entropy.sum()) / tokens,
        }
        return SupervisedLoss(total, tokens, metrics)

    def check_example(self, question: str, answer: str) -> None:
        """Raise BadSampleError where :meth:`sft_loss` cannot take the pair, or would teach what no reward accepts.

        That is text that spells a special token, an answer that is not well formed (``prompt.answers``), and more tokens than the
        model has positions.
        """
        tokenizer = self.processor.tokenizer
        check_text(tokenizer, question, "question")
        if not self.prompt.answers.reward(answer):
            raise BadSampleError(f"the answer is not {self.prompt.answers}: {answer[:120]!r}")
        length = len(self.answer_tokens(answer)) + len(tokenizer(question)["input_ids"])
        if length > self.max_positions:
            raise BadSampleError(
                f"question and answer have {length} tokens; the model has {self.max_positions} positions"
            )

    def answer_tokens(self, answer: str) -> Tensor:
        """Return the token ids (L,) of an answer text and the EOS that ends it."""
        ids = self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        banned = set(self.banned_ids) & set(ids)
        if banned or self.eos_token_id in ids:
            raise BadSampleError(f"the answer contains special tokens: {answer[:120]!r}")
        return torch.tensor([*ids, self.eos_token_id], dtype=torch.long)

    # --- weights ---

    @property
    def adapter_config(self) -> dict[str, Any]:
        """The adapter's configuration as PEFT writes it; empty without LoRA."""
        return adapter_config(self.module) if has_lora(self.module) else {}

    def adapter_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the adapter under PEFT's file names (``base_model.model.….lora_A.weight``) on the CPU.

        ``state`` is ``module``'s gathered state dict; None reads ``module``, which then must not be sharded.
        """
        named = peft_names(self.module.state_dict() if state is None else state)
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named.items()}

    def export(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a PEFT adapter folder (LoRA) or a whole model folder with its processor, safetensors only."""
        folder = Path(folder)
        if has_lora(self.module):
            write_folder(folder, self.adapter_config, self.adapter_state(state))
            return
        module: Any = self.module
        module.save_pretrained(folder, state_dict=dict(module.state_dict() if state is None else state))
        self.processor.save_pretrained(folder)
