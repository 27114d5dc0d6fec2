"""Tokenizers of the tiny models, made from the toy world's language alone.

Responsible for three fast tokenizers that ``AutoTokenizer`` loads from a folder: byte-level BPE with Qwen's special tokens
(VLM), and whole words for the UMT5 and CLIP text encoders. No network, no downloaded vocabulary.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data.toy.language import LANGUAGES, caption_words, grammar_corpus, longest_first

QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""Qwen's chat format, without tools and default system text."""


_FORMAT_WORDS = [
    "system user assistant",
    "<0.0 seconds> <1.5 seconds> <12.8 seconds>",
    "You answer a question about a video with the next event. Write <think> your reasoning </think> <ans> one sentence </ans>",
    "<think> </think><ans> </ans>",
]

_PADDING, _UNKNOWN = "<pad>", "<unk>"


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over both grammars (about 850 tokens), with Qwen's special tokens; any UTF-8 text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [line for language in LANGUAGES for line in grammar_corpus(language)]
    tokenizer.train_from_iterator(corpus + _FORMAT_WORDS * 50 + _number_lines(), trainer)
    # Specials come last, as in Qwen's own vocabulary.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        additional_special_tokens=QWEN_SPECIAL,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _number_lines() -> list[str]:
    return [f"<{tenths / 10:.1f} seconds>" for tenths in range(100)]


def word_tokenizer(*, max_length: int, clip: bool) -> PreTrainedTokenizerFast:
    """Whole-word tokenizer over the words that captions and CLIP's texts hold: lower-cased; unknown words become ``<unk>``.

    English words stand between spaces. Chinese text is cut at the wordings it holds, the longest first.

    ``clip=True`` frames a text in begin and end tokens and makes the end token the highest id, which CLIP pools at.
    ``clip=False`` ends it with ``</s>`` as UMT5 does, pad id 0.
    """
    chinese = caption_words("zh")
    words = [*caption_words("en"), *chinese]
    specials = [_PADDING, _UNKNOWN] + ([] if clip else ["</s>"])
    vocabulary = specials + words + (["<start>", "<end>"] if clip else [])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    cut = "|".join(longest_first(chinese))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated"), pre_tokenizers.Whitespace()]
    )
    if clip:
        ends = [("<start>", vocabulary.index("<start>")), ("<end>", vocabulary.index("<end>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
        names = {"bos_token": "<start>", "eos_token": "<end>"}
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", vocabulary.index("</s>"))]
        )
        names = {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PADDING, unk_token=_UNKNOWN, model_max_length=max_length, **names
    )
