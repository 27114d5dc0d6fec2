"""What the models are asked, in English and Chinese. Pure text; the forms of the answers are ``schemas``."""

from __future__ import annotations

SYSTEM = {
    "en": "You prepare data for a model that learns to foresee events in videos. Be literal, say only what can be seen or is "
    "told here, and answer with one JSON object of the asked form. Write every text in English.",
    "zh": "你在为一个学习预见视频中事件的模型准备数据。请如实描述，只说看得到的或这里写明的内容，"
    "并且只用一个符合要求的 JSON 对象回答。所有文字都用中文书写。",
}

DESCRIBE = {
    "en": """This clip is said to show one step of a task{topic}. The note on it says: {label}

Judge and describe it:
- full_screen: true if the scene fills the picture; false for an inset picture, a split screen, borders, a slide or a title
  card.
- clean: true if no caption, logo, sticker or graphic covers a part that matters, and one action can be followed.
- action: the one action that is done, as a short command of at most twelve words.
- start, end: the seconds, counted from the clip's beginning, between which that action is best seen; {shortest:g} to
  {longest:g} seconds apart where the clip is that long.
- description: two or three sentences on who does what, with which things, where, and what has changed at the end.""",
    "zh": """据说这段视频展示了一项任务{topic}的一个步骤。对它的说明是：{label}

请判断并描述：
- full_screen：画面被场景占满时为 true；画中画、分屏、黑边、幻灯片或标题卡时为 false。
- clean：没有字幕、标志、贴纸或图形遮住重要部分，并且能看清一个动作时为 true。
- action：所做的那一个动作，用不超过二十个字的简短祈使句。
- start、end：从视频开头算起，最能看清该动作的起止秒数；视频足够长时两者相隔 {shortest:g} 到 {longest:g} 秒。
- description：用两三句话说明谁在做什么、用什么东西、在哪里，以及最后有什么变化。""",
}

QUESTION = {
    "en": """Two steps of one task{topic}, one after the other.
Step now: {first}
What its video shows: {first_description}
Step after it: {second}
What its video shows: {second_description}
{skipped}
Write:
- question: what a person who has just watched the first step would ask to see the next one. It may name the task and the
  goal. It must not describe what is seen in the first video, and must not tell the step that follows.{skipped_rule}
- reasoning: two to four sentences that lead from the first step and common knowledge to the next one. The writer has seen the
  first video only, so nothing is said as if the next one were known.
- caption: one or two sentences in the present tense on what the next step's video shows: the doer, the action, the things,
  the place.""",
    "zh": """同一项任务{topic}中先后相接的两个步骤。
当前步骤：{first}
它的视频内容：{first_description}
下一步骤：{second}
它的视频内容：{second_description}
{skipped}
请写出：
- question：刚看完第一个步骤的人为了看到下一步会提的问题。可以说出任务和目标，但不得描述第一个视频里看到的内容，
  也不得说出接下来的步骤。{skipped_rule}
- reasoning：用二到四句话，从第一个步骤和常识推到下一步。写的人只看过第一个视频，因此不能像已经知道后面的内容那样写。
- caption：用一两句话以现在时描述下一步的视频内容：做动作的人、动作、物品和地点。""",
}
SKIPPED = {
    "en": "Steps that are done in between and have no video: {steps}",
    "zh": "两步之间已完成但没有视频的步骤：{steps}",
}
SKIPPED_RULE = {
    "en": " It tells that the steps in between are done already.",
    "zh": "问题中要说明中间的步骤已经完成。",
}

WHAT_IF = {
    "en": """You see two shots of one video; the second comes after the first.

1. visual_tie: what they visibly share: place, subject, view, time (the same moment or light), motion, or none. visual_why:
   one sentence.
2. logical_tie: how the second follows from the first: order (a later part of one course of events), cause, change (of a
   thing's state), or none. logical_why: one sentence.
3. questions: empty if either tie is none. Otherwise {count} at most, each with another supposition:
   - question: a "what if" about the first shot, to which the event of the second is the natural answer. It describes neither
     of the shots, and does not tell what happens.
   - reasoning: two to four sentences that lead from the first shot and the supposition to the event. The writer knows the
     first shot only.
   - caption: one or two sentences in the present tense on what the second shot shows.""",
    "zh": """你看到同一个视频的两个镜头，第二个在第一个之后。

1. visual_tie：两者看得见的共同点：place（地点）、subject（主体）、view（视角）、time（同一时刻或光线）、motion（运动）或
  none。visual_why：一句话。
2. logical_tie：第二个镜头怎样承接第一个：order（同一过程的后续）、cause（因果）、change（状态变化）或 none。logical_why：一句话。
3. questions：任一联系为 none 时留空；否则最多 {count} 个，各用不同的假设：
   - question：针对第一个镜头的“如果……会怎样”，第二个镜头中的事件是其自然的答案。既不描述任何一个镜头，也不说出会发生什么。
   - reasoning：用二到四句话，从第一个镜头和该假设推到这一事件。写的人只知道第一个镜头。
   - caption：用一两句话以现在时描述第二个镜头的内容。""",
}

REVIEW = {
    "en": """A learner sees the first clip and the question, and is to foresee what the second clip shows.
Question: {question}
Reasoning: {reasoning}
Caption of the second clip: {caption}

Judge strictly:
- gives_away: the question tells or strongly hints at what the second clip shows.
- several_answers: quite different events would answer the question just as well.
- mentions_target: the reasoning speaks of the second clip, or knows what only it shows.
- caption_mismatch: the caption says something that the second clip does not show, or leaves out its main event.
- why: one sentence; empty if nothing is wrong.""",
    "zh": """学习者看到第一段视频和问题，要预见第二段视频的内容。
问题：{question}
推理：{reasoning}
第二段视频的描述：{caption}

请严格判断：
- gives_away：问题说出或明显暗示了第二段视频的内容。
- several_answers：很不相同的事件也同样能回答这个问题。
- mentions_target：推理提到了第二段视频，或知道只有它才展示的内容。
- caption_mismatch：描述说了第二段视频没有的内容，或漏掉了主要事件。
- why：一句话；没有问题则留空。""",
}

REWRITE = {
    "en": """A learner sees the first clip and the question, and is to foresee what the second clip shows. This wording has faults:
Question: {question}
Reasoning: {reasoning}
Caption of the second clip: {caption}
Faults: {faults}

Write question, reasoning and caption anew without these faults. The question tells nothing of the second clip and has one
natural answer; the
reasoning knows the first clip only; the caption says what the second clip shows.""",
    "zh": """学习者看到第一段视频和问题，要预见第二段视频的内容。下面的文字有缺陷：
问题：{question}
推理：{reasoning}
第二段视频的描述：{caption}
缺陷：{faults}

请重写 question、reasoning 和 caption，去掉这些缺陷。问题不透露第二段视频的内容，并且只有一个自然的答案；
推理只知道第一段视频；描述说明第二段视频的内容。""",
}

CLIP = {"en": "The clip", "zh": "视频"}
FIRST = {"en": "First clip", "zh": "第一段视频"}
SECOND = {"en": "Second clip", "zh": "第二段视频"}
TOPIC = {"en": " ({topic})", "zh": "（{topic}）"}
NO_LABEL = {"en": "(nothing)", "zh": "（无）"}
JOIN = {"en": "; ", "zh": "；"}


def topic_of(topic: str, language: str) -> str:
    """Return the task's name in brackets, empty where there is none."""
    return TOPIC[language].format(topic=topic) if topic else ""
