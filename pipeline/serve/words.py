"""What the playground says, in each of its languages. Gradio takes the browser's language; the answers follow its request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """All texts of the page in one language."""

    title: str
    video: str
    questions: str
    one_a_line: str
    settings: str
    seed: str
    steps: str
    guidance: str
    ask: str
    cancel: str
    examples: str
    compare: str
    served: str
    before: str
    no_video: str
    busy: str
    queued: str
    thinking: str
    drawing: str
    done: str
    failed: str
    cancelled: str
    input: str
    next: str
    sheet: str


ENGLISH = Words(
    title="## What happens next?\nShow a clip, ask a question, and get the answer as a video.",
    video="Your clip",
    questions="Your questions",
    one_a_line="One a line: several are answered side by side.",
    settings="Seed, steps, guidance",
    seed="seed",
    steps="steps",
    guidance="guidance",
    ask="Ask",
    cancel="Cancel",
    examples="Clips that the pair has not learnt from",
    compare="Ask the pair before training too",
    served="this pair",
    before="before training",
    no_video="There is no clip yet: drop one, record one, or choose an example.",
    busy="As many clips wait as may; ask again in {seconds} s.",
    queued="waiting",
    thinking="thinking …",
    drawing="drawing …",
    done="done",
    failed="no answer",
    cancelled="cancelled",
    input="your clip",
    next="what comes next",
    sheet="contact sheet",
)
CHINESE = Words(
    title="## 接下来会发生什么？\n上传一段视频，提出问题，答案也是一段视频。",
    video="你的视频",
    questions="你的问题",
    one_a_line="每行一个问题，答案并排显示。",
    settings="种子、步数、引导强度",
    seed="种子",
    steps="步数",
    guidance="引导强度",
    ask="提问",
    cancel="取消",
    examples="模型没有学过的视频",
    compare="同时询问训练前的模型",
    served="当前模型",
    before="训练前",
    no_video="还没有视频：请上传、录制，或选择一个示例。",
    busy="排队已满，请在 {seconds} 秒后再试。",
    queued="排队中",
    thinking="思考中…",
    drawing="绘制中…",
    done="完成",
    failed="没有答案",
    cancelled="已取消",
    input="你的视频",
    next="接下来",
    sheet="拼图",
)
LANGUAGES = {"en": ENGLISH, "zh-CN": CHINESE}


def words_for(accepted: str) -> Words:
    """Return the language that a browser asks for first (its header ``Accept-Language``): Chinese, or else English."""
    return CHINESE if accepted.strip().lower().startswith("zh") else ENGLISH
