"""The VLM's prompt: one text format shared by SFT, the learner and the engine.

Responsible for: messages, the rendered chat text with exactly one video, and whether a tokenizer can write what is asked for.
Not responsible for: the wording and the tags (``actors.vlm.settings``), reading answers (``rewards.format``), tokens and pixels
(``actors.vlm.inputs``), sampling (``actors.vlm.engine``), loading a processor (``actors.vlm.loading``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.failures import BadSampleError
from actors.vlm.settings import PROMPT, PromptSection
from cluster.errors import ConfigError


def build_messages(question: str, prompt: PromptSection = PROMPT) -> list[dict[str, Any]]:
    """Return the chat messages for one video and one ``question``: system, then the video followed by the question."""
    return [
        {"role": "system", "content": [{"type": "text", "text": prompt.system_text}]},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]},
    ]


def load_tokenizer(folder: str | Path) -> Any:
    """Return the model's tokenizer alone, for :func:`check_text`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def check_text(tokenizer: Any, text: str, what: str) -> None:
    """Raise BadSampleError where ``text``, called ``what`` in the message, is empty, no Unicode, or spells a special token.

    The tokenizer would read the characters ``<|im_end|>`` as the token itself.
    """
    if not text.strip():
        raise BadSampleError(f"the {what} is empty")
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise BadSampleError(f"the {what} is not Unicode text: {text[:120]!r}")
    for token in special_tokens(tokenizer):
        if token in text:
            raise BadSampleError(f"the {what} contains the special token {token!r}: {text[:120]!r}")


def check_prompt(tokenizer: Any, prompt: PromptSection) -> None:
    """Raise ConfigError where ``tokenizer`` cannot write a tag of ``prompt``, or would read its system text as something else.

    A tag must survive being encoded and read back as the engine reads a completion: without special tokens.
    """
    for number, tag in enumerate(prompt.answers.tags):
        read = decoded(tokenizer, tokenizer(tag, add_special_tokens=False)["input_ids"])
        if read != tag:
            key = ("think_tag", "answer_tag")[number // 2]
            raise ConfigError(
                f"models.prompt.{key}={getattr(prompt, key)!r}: the model's tokenizer cannot write {tag!r}, which it reads back as "
                f"{read!r}; choose a tag of letters that it has, and that is no special token"
            )
    try:
        check_text(tokenizer, prompt.system_text, "system text")
    except BadSampleError as error:
        raise ConfigError(f"models.prompt.system: {error}") from error


def decoded(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Return the text of a completion: the tokenizer's own decoding, without special tokens and without clean-up of spaces."""
    return str(tokenizer.backend_tokenizer.decode(list(token_ids), skip_special_tokens=True))


def render_prompt(processor: Any, question: str, prompt: PromptSection = PROMPT) -> str:
    """Return the chat text up to where the assistant begins, with the processor's ``video_token`` exactly once.

    Processor and vLLM both expand it to the video's own number of tokens.

    Raises:
        BadSampleError: the question is empty, or spells a special token (it would be read as one).
        ValueError: the model's chat template doesn't write one video token.
    """
    check_text(processor.tokenizer, question, "question")
    for token in placeholders(processor):
        if token in question:  # of some tokenizers these are no special tokens
            raise BadSampleError(
                f"the question contains {token!r}, which would be read as a picture: {question[:120]!r}"
            )
    messages = build_messages(question, prompt)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    count = text.count(processor.video_token)
    if count != 1:
        raise ValueError(
            f"the model's chat template must write {processor.video_token} once for a video, but it wrote it {count} times: "
            f"{text[:300]!r}"
        )
    return str(text)


def placeholders(processor: Any) -> list[str]:
    """Return the texts that ``processor`` reads as a picture or a video."""
    found = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video"))
    return [token for token in found if token]


def placeholder_ids(processor: Any) -> set[int]:
    """Return the ids of :func:`placeholders`; one that is no token has none."""
    vocabulary = processor.tokenizer.get_vocab()
    return {int(vocabulary[token]) for token in placeholders(processor) if token in vocabulary}


def special_tokens(tokenizer: Any) -> list[str]:
    """Return the texts of ``tokenizer``'s special tokens, in id order."""
    return [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]


def banned_token_ids(processor: Any, vocab_size: int) -> list[int]:
    """Return the ids that must not be sampled: special tokens except EOS, placeholders, and embedding rows beyond the tokenizer.

    A sampled ``<|video_pad|>`` would be taken for a piece of the video when the learner reads the completion. Engine
    and learner lower the logits of the same ids by the same :data:`BAN_BIAS`, so their log-probabilities agree.
    """
    tokenizer = processor.tokenizer
    special = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {int(i) for i in tokenizer.all_special_ids}
    special |= placeholder_ids(processor)
    special |= set(range(len(tokenizer), vocab_size))
    special.discard(int(tokenizer.eos_token_id))
    return sorted(i for i in special if i < vocab_size)


BAN_BIAS = -1.0e4
"""Added to banned logits: exp(-1e4) is exactly 0 in float32, and unlike -inf it makes no NaN in an entropy."""
