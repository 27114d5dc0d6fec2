"""Every metric's name, unit and meaning, in one place; ``docs/metrics.md`` is written from it.

``make docs`` writes it; a test holds the file to it. A name that is not declared here
is refused by the tracker (strict mode, used in tests) or logged with a warning. ``<…>`` in a name stands for any part.
This module declares names; it measures nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them where ``name`` holds ``<placeholders>``."""

    name: str
    unit: str  # "1" for a plain number, "ratio" for 0…1
    meaning: str
    reading: str  # what to look for

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names that this entry declares."""
        parts = re.split(r"<[a-z_]+>", self.name)
        return re.compile(r"[A-Za-z0-9_.:\- ]+".join(re.escape(part) for part in parts))


@dataclass(frozen=True)
class Family:
    """Metrics that are read together."""

    title: str
    about: str
    metrics: tuple[Metric, ...]


# The entries are kept dense, so that they read as the tables they become.
# fmt: off
ROLLOUT = Family(
    "Rollouts and rewards",
    "Over the trajectories that one step learns from. Rewards are training rewards: judge a run by `eval/`.",
    (
        Metric("reward/total_mean", "1", "Weighted sum of the components, mean over all trajectories.",
               "Rises while the policy learns; rising while an alarm moves is reward hacking."),
        Metric("reward/total_std", "1", "Standard deviation of the total over all trajectories of the step.",
               "Near 0: nothing to choose between, so nothing to learn."),
        Metric("reward/<component>_mean", "1", "One component before its weight, mean over all trajectories.",
               "Shows which component drives the total."),
        Metric("reward/<component>_std", "1", "Standard deviation of one component.",
               "A component with a much larger spread than the others decides the advantages."),
        Metric("advantage/zero_std_ratio", "ratio", "Groups whose rewards are all equal; they carry no gradient.",
               "Above 0.5 most of the rollout is wasted: raise the temperature or the group size, or take harder "
               "samples."),
        Metric("rollout/groups", "groups", "Groups that the step learns from.",
               "Below prompts_per_step: see dropped_groups."),
        Metric("rollout/dropped_groups", "groups", "Groups left out: sample quarantined, or too few scored members.",
               "Should be 0; each one shrinks the batch."),
        Metric("rollout/refill_draws", "groups",
               "Groups sampled in addition, in place of those without a gradient (rollout.max_refills).",
               "Near max_refills: most samples are too easy or too hard, and what is sampled is mostly wasted."),
        Metric("rollout/refilled_groups", "groups", "Groups without a gradient that a refill replaced.",
               "zero_std_ratio and dropped_groups count what is left after it."),
        Metric("rollout/failed_members", "trajectories",
               "Trajectories that left their group because a worker refused them.",
               "Should be 0; the reasons are in the log, and the run stops above rollout.max_failed_ratio."),
        Metric("rollout/completion_tokens_mean", "tokens", "Length of the sampled completions, end token included.",
               "A steady climb without reward is length hacking; a fall towards 1 is collapse."),
        Metric("rollout/truncated_ratio", "ratio", "Completions cut off by max_tokens.",
               "Above 0.05 raise max_tokens: a cut answer has no closing tag and scores 0 on format."),
        Metric("rollout/format_rate", "ratio", "Completions from which a caption could be read.",
               "Should approach 1 within a few steps."),
        Metric("rollout/unique_caption_ratio", "ratio",
               "Different captions per group, divided by its size, mean over groups.",
               "Falls as the policy decides; near 1/G there is nothing left to compare."),
        Metric("rollout/staleness_mean", "versions",
               "Weights versions between the learner and the worker that sampled.",
               "0 in synchronous runs, at most max_staleness × updates otherwise."),
    ),
)

STAGE2 = Family(
    "Anchors and the SDE (stage 2)",
    "The frozen thinker's captions, and where the flow is sampled as an SDE.",
    (
        Metric("anchor/kept", "captions", "Anchor captions of the step that pass the ROUGE-L filter.",
               "Equals prompts_per_step; fewer, and the filter starves the step."),
        Metric("anchor/kept_ratio", "ratio", "Anchor captions that pass the ROUGE-L filter.",
               "Low: stage 1 has not learnt enough for this threshold."),
        Metric("anchor/failed", "captions", "Samples about which the thinker could not be asked, or whose "
               "anchor caption could not be compared with ground truth.",
               "Should be 0; the reasons are in the log, and the run stops above rollout.max_failed_ratio."),
        Metric("anchor/rouge_l", "ratio", "ROUGE-L of the anchor captions against ground truth, before the filter.",
               "Constant up to sampling: the thinker is frozen."),
        Metric("sde/window_start", "step", "First denoising step of the stochastic, trained window; with sde.window_per: prompt the "
               "mean over the batch's groups.", "Moves as sde.window_schedule says."),
    ),
)

LEARNER = Family(
    "Learner",
    "One update of the learner group; sums and means are over all ranks.",
    (
        Metric("learner/loss", "1", "The objective's loss plus β·KL, mean over the optimizer steps of the batch.",
               "Near 0 and noisy by construction (grpo): it is no measure of progress."),
        Metric("learner/kl", "nats",
               "Distance to the reference policy: grpo.kl_estimator per token (stage 1), closed form per denoising step "
               "(stage 2); mean square of the velocities' difference with nft and awm.",
               "Grows slowly; a jump means the step was too large."),
        Metric("learner/entropy", "nats", "Mean entropy of the token distribution (stage 1).",
               "A quick fall to 0 ends exploration."),
        Metric("learner/ratio", "1", "Mean of π_new/π_old over trained tokens or steps.",
               "Stays within a few clip ranges of 1."),
        Metric("learner/ratio_max_dev", "nats", "Largest |log ratio| before anything was updated: the ratio gate.",
               "Exactly 0 in fp32; checked every grpo.gate_every steps with old_logprobs=learner, and the run stops above clip_low/5."),
        Metric("learner/velocity_dev", "ratio",
               "Largest ‖v − v_worker‖/‖v_worker‖ of a clip before anything was updated: the velocity gate of nft and awm.",
               "Float noise, 1e-6 in fp32; 0 where the gate was not due. The run stops above 1e-3 (fp32) or 0.1 (bf16)."),
        Metric("learner/velocity_gap", "1",
               "Mean square of v − v_old, the learner's velocity less that of the weights that sampled (nft, awm).",
               "Grows within a batch's updates; where it keeps growing over batches, lower the learning rate."),
        Metric("learner/good_share", "ratio", "Mean of r, the share with which a clip counts as good (nft).",
               "0.5 by construction, where no advantage is beyond advantage_max."),
        Metric("learner/clip_frac", "ratio", "Tokens or steps whose ratio left the clip range.",
               "0 with one update per batch; above 0.3 lower the learning rate."),
        Metric("learner/clip_frac_low", "ratio", "The part of clip_frac below 1 − clip_low.", "As clip_frac."),
        Metric("learner/clip_frac_high", "ratio", "The part of clip_frac above 1 + clip_high.", "As clip_frac."),
        Metric("learner/truncated_frac", "ratio", "Steps whose importance weight was cut at importance_cap (old_logprobs=rollout).",
               "Above 0.1 engine and learner disagree too much: use old_logprobs=learner."),
        Metric("learner/bounded_frac", "ratio",
               "Tokens or steps of which a log-ratio (to the old policy, the engine or the reference) was cut to ±20 nats "
               "before exp.",
               "Should be 0; above it the two policies have nothing in common there: stale weights, or too large a step."),
        Metric("learner/grad_norm", "1", "Global gradient norm before clipping.",
               "Steady; spikes go with bad batches."),
        Metric("learner/lr", "1", "Learning rate of the update.", "Follows optim.schedule."),
        Metric("learner/skipped", "steps", "Optimizer steps skipped so far because loss or gradient was not finite.",
               "Should be 0; the run stops above optim.max_skipped_steps."),
        Metric("learner/steps", "count", "Tokens (stage 1) or denoising steps (stage 2) that were trained on.",
               "The size of the batch."),
        Metric("learner/applied", "steps", "Optimizer steps of this batch that were applied.",
               "Equals updates unless one was skipped."),
        Metric("learner/updates", "steps", "Optimizer steps planned for this batch.",
               "updates_per_batch × epochs_per_batch of the objective."),
        Metric("learner/empty_batches", "count", "1 for a step without any usable group.",
               "Should never appear."),
        Metric("learner/restarts", "restarts",
               "Times that the stage lost its learner group and went on with a new one, since the start of the process.",
               "Should be 0; the stage's tag `vans.restart` says why. The run stops above learner.max_restarts."),
        Metric("learner/logp_diff_mean", "nats",
               "Mean |learner log-probability − sampler's|, over tokens or denoising steps.",
               "Numerics of two engines: 1e-6 in fp32, 1e-3…1e-2 in bf16. A jump means stale weights."),
        Metric("learner/logp_diff_max", "nats", "The largest such difference.",
               "As the mean, some ten times larger."),
        Metric("learner/prompt_hit_ratio", "ratio",
               "Completions whose prompt (question, processed frames) the rank had processed already (stage 1).",
               "1 − 1/g, where g is a group's members on one rank: each video is processed once per rank."),
        Metric("learner/<policy>/<metric>", "as named",
               "Any of these for one of two learners (training: all_in_one).", "As above."),
        Metric("learner/logp_diff_t<step>", "nats", "The same at one denoising step (stage 2).",
               "Largest where the noise is smallest."),
        Metric("learner/logp_diff_p<position>", "nats",
               "The same at the completion tokens from this position to the next one listed: 0, 1, 2, 4, 8, … (stage 1).",
               "Flat; high from 0 on the prompts differ, climbing with the position the engine's cache or positions do."),
    ),
)

ALARMS = Family(
    "Reward-hacking alarms",
    "Means over the rendered clips of a step, each relative to ground truth. They are watched, never rewarded. When "
    "one of them, or one of `rollout/format_rate`, `rollout/completion_tokens_mean`, `learner/entropy`, "
    "`anchor/kept_ratio` and `advantage/zero_std_ratio`, is an alarm is set in the `alarms` section of the "
    "configuration and told in [rewards](rewards.md#alarms).",
    (
        Metric("alarm/on", "alarms", "Alarms that are on after the step.",
               "Should be 0; the stage's tags `alarm.<name>` say which, since when and why."),
        Metric("alarm/motion_ratio", "1",
               "Motion (mean |frame difference| over the changes above 8 grey levels) divided by ground truth's.",
               "1 is right; towards 0 the artist freezes the video, the collapse known without CLIPScore."),
        Metric("alarm/copy", "cosine", "CLIP similarity of the clip to the last input frame.",
               "Read with copy_excess."),
        Metric("alarm/copy_excess", "cosine", "That similarity minus ground truth's own.",
               "Towards 1 the artist copies its input instead of answering."),
        Metric("alarm/sharpness_ratio", "1", "Sharpness divided by ground truth's.",
               "1 is right; far above 1 is texture that pleases CLIP."),
        Metric("alarm/saturation_shift", "1", "Mean saturation (0…1) minus ground truth's.",
               "0 is right; drift in one direction is a colour hack."),
        Metric("alarm/caption_truncated", "ratio", "Captions longer than CLIP's text limit.",
               "Above 0: CLIP judges only the beginning."),
        Metric("alarm/corr_<a>_<b>", "−1…1",
               "Pearson correlation of two reward components over the step's trajectories.",
               "Towards −1 one component is bought with the other."),
    ),
)

POOLS = Family(
    "Worker pools",
    "`<pool>` is vlm, vdm, reward, or embed where there is one. The pool whose queue_wait_s grows is the one to give workers to.",
    (
        Metric("pool/<pool>/ready", "workers", "Workers that can serve now, with the current weights.",
               "Below target for long: workers fail to start."),
        Metric("pool/<pool>/target", "workers", "Workers that the pool should have.",
               "What was configured or scaled to."),
        Metric("pool/<pool>/queue_len", "requests", "Requests waiting for a worker when the step ended.",
               "0 in synchronous runs."),
        Metric("pool/<pool>/oldest_wait_s", "s", "How long the oldest waiting request has waited when the step ended.",
               "0 in synchronous runs; what the autoscaler looks at, more often than once a step."),
        Metric("pool/<pool>/inflight", "requests", "Requests inside workers when the step ended.",
               "0 in synchronous runs."),
        Metric("pool/<pool>/done", "requests", "Requests answered since the start.", "Grows steadily."),
        Metric("pool/<pool>/requests_per_min", "1/min", "Requests answered in the last minute.",
               "The pool's throughput; it grows with workers as long as the pool is the bottleneck."),
        Metric("pool/<pool>/queue_wait_s", "s", "From submission to dispatch, moving average.",
               "The bottleneck's is the longest."),
        Metric("pool/<pool>/service_s", "s", "From dispatch to answer of one call, moving average.",
               "What a worker needs; the planner reads it."),
        Metric("pool/<pool>/queue_wait_total_s", "s", "Sum of all queue waits since the start.",
               "Divide by done for the mean."),
        Metric("pool/<pool>/service_total_s", "s", "Sum of all calls' times since the start.",
               "Worker seconds spent."),
        Metric("pool/<pool>/batch_mean", "requests", "Requests per call.",
               "Far below max_batch: batches do not fill."),
        Metric("pool/<pool>/busy_ratio", "ratio", "Share of workers with a call under way, over about 30 s.",
               "Near 1 add workers, near 0 take some away."),
        Metric("pool/<pool>/busy_total_s", "s", "Seconds that workers had a call under way, summed over workers, since the start.",
               "`profile/` has it step by step."),
        Metric("pool/<pool>/worker_total_s", "s", "Seconds that workers lived, summed over workers, since the start.",
               "What is not busy is idle."),
        Metric("pool/<pool>/version", "version", "Weights version that the pool serves.",
               "Follows the learner in the trained pool, stays in the frozen one."),
        Metric("pool/<pool>/retries", "requests",
               "Requests sent again after an infrastructure failure, since the start.",
               "Should be 0; they cost time, not samples."),
        Metric("pool/<pool>/restarts", "workers", "Workers replaced since the start.",
               "Should be 0; the run stops above max_restarts within an hour."),
    ),
)

CACHES = Family(
    "Made once",
    "What frozen models make of a sample is kept: embeddings and latents by the embed pool's side in the driver, or by each VDM "
    "worker without that pool; vision features inside vLLM. Counted since the start, over the workers that live.",
    (
        Metric("cache/captions", "captions", "Captions embedded, the negative prompt included.",
               "With an embed pool each distinct caption once; without one at most once per VDM worker."),
        Metric("cache/caption_hit_ratio", "ratio", "Embeddings that were asked for and not made.",
               "Stage 2 and evaluation ask for the same captions again; in stage 1 near 0, where most are new."),
        Metric("cache/references", "clips", "Samples whose reference frames were encoded by the VAE.",
               "With an embed pool each sample once; without one at most once per VDM worker."),
        Metric("cache/reference_hit_ratio", "ratio", "Reference latents that were asked for and not made.",
               "1 − 1/G within a group, higher when samples return; lower: raise pools.embed.cache_mib."),
        Metric("cache/videos", "videos", "Videos that went through the VLM's vision tower in vLLM.",
               "One per group and engine: its members share the features."),
        Metric("cache/video_hit_ratio", "ratio", "Completions that needed no pass of the vision tower of their own.",
               "1 − 1/G or more; lower: vLLM's cache of multi-modal inputs is off or too small."),
    ),
)

SPENDING = Family(
    "Spent by rewards",
    "What a reward that asks another model counts (`judge`): since the start, over its workers that live.",
    (
        Metric("spend/<pool>/asks", "asks", "Questions that were put to the judge.",
               "`samples` for each drawn answer, twice as many against the truth; more: answers are asked for again."),
        Metric("spend/<pool>/failed", "asks", "Asks without a verdict: no answer, a refusal, another form.",
               "Their answers leave their groups: see rollout/failed_members."),
        Metric("spend/<pool>/tokens_in", "tokens", "Tokens of the prompts, pictures included.", "Fewer frames, fewer tokens."),
        Metric("spend/<pool>/tokens_out", "tokens", "Tokens of the answers.", "Near max_tokens: answers are cut."),
        Metric("spend/<pool>/cost", "1", "Price of the tokens by `price_in` and `price_out`.", "In whatever money these are."),
    ),
)

REST = Family(
    "Data and time",
    "Seconds are wall seconds of the driver.",
    (
        Metric("data/quarantined", "rows", "Rows that could not be decoded, since the start.",
               "The reasons are in the quarantine table; the run stops above data.max_quarantine_ratio."),
        Metric("time/step_s", "s", "One step: waiting for its rollout, update and publication.", "1/throughput."),
        Metric("time/rollout_s", "s", "From drawing the step's samples to its last score.",
               "The larger part; see the pools for where it goes."),
        Metric("time/wait_s", "s", "How long the learner waited for the rollout.",
               "Near rollout_s when synchronous, near 0 when staleness hides it."),
        Metric("time/update_s", "s", "The learner group's update.", "Scales with ranks."),
        Metric("time/rest_s", "s", "Pools that share GPUs with the learner give up their memory (pools.<pool>.rest).",
               "The price of sharing, beside the slower first requests of the next rollout."),
        Metric("time/publish_s", "s", "New weights from the learner into every worker of the pool.",
               "Seconds; grows with full weights."),
        Metric("time/evaluate_s", "s", "The held-out evaluation after the step's publication; 0 where none was due.",
               "In `time/step_s` and `time/rollout_s` of its own step it is not; in `profile/step_s` it is."),
        Metric("checkpoint/failed", "checkpoints",
               "Checkpoints that could not be written, since the start; logged from the first one on.",
               "Make room: the run stops after checkpoint.max_failures in a row."),
        Metric("checkpoint/mirror_failed", "checkpoints",
               "Checkpoints that could not be sent to checkpoint.mirror, since the start; logged from the first one on.",
               "Look at the store: the run stops after checkpoint.max_failures in a row."),
        Metric("tracking/spooled", "records",
               "Tracking records kept in the local spool because the store could not be reached.",
               "Returns to 0 when the store is back."),
        Metric("tracking/rollouts_lost", "steps",
               "Steps whose rollouts are not stored (tracking.rollouts), since the start; logged from the first one on.",
               "Make room, or store fewer clips: the reason is in the log. Nothing of the training is lost."),
    ),
)

PROFILE = Family(
    "Where a step's time went",
    "From the end of the step before to the end of this one; `vans profile RUN` shows them. `<pool>` as above.",
    (
        Metric("profile/<pool>/busy_s", "s", "Seconds with a call under way, summed over the pool's workers.",
               "Divided by its workers the least that the step could take with this pool."),
        Metric("profile/<pool>/idle_s", "s", "Seconds without a call, summed over the pool's workers.",
               "What could be given to another pool."),
        Metric("profile/<pool>/wait_s", "s", "Seconds that requests waited for a worker, summed over requests.",
               "The bottleneck's is the largest."),
        Metric("profile/step_s", "s", "The step with all that belongs to it: tracking and checkpoint, too.", "1/throughput."),
        Metric("profile/lower_bound_s", "s",
               "The busiest pool's seconds of work divided by its workers, and the update and publication, which come after it "
               "(max_staleness 0) or beside it.",
               "What a perfect schedule of the same work would take."),
        Metric("profile/gap_s", "s", "profile/step_s minus profile/lower_bound_s.",
               "Near 0: more hardware, or less work, is what helps."),
        Metric("profile/gap_ratio", "ratio", "The gap as a share of the step.",
               "Above 0.3 the step waits for stragglers, start-up or the driver."),
    ),
)

SPEED = Family(
    "Speed",
    "`<party>` is vlm, vdm or learner: all its workers or ranks together, over the seconds in which they were at work; idle time is in "
    "`profile/`. Of samplers all work between two steps counts, evaluations and refills too. What is not known has no metric: without "
    "a GPU, or with a card that `cluster/hardware.py` does not list, there is no `mfu`.",
    (
        Metric("speed/<party>/tokens_per_s", "tokens/s", "Tokens sampled (vlm), or learnt from (learner of the thinker).",
               "Falls with longer prompts and videos; compare runs of one shape."),
        Metric("speed/<party>/latents_per_s", "latents/s",
               "Latents, one for each clip and denoising step: integrated (vdm), or learnt from (learner of the artist).",
               "Falls with more pixels and frames; compare runs of one shape."),
        Metric("speed/<party>/flops_per_s", "FLOP/s",
               "Model operations: matrix products, convolutions, attention. What is computed a second time is not counted twice: "
               "activations, a prompt that several answers share.",
               "As `vans plan` counts them, so both can be compared."),
        Metric("speed/<party>/mfu", "ratio",
               "`flops_per_s` divided by the peak of all its GPUs in its dtype (data sheets, dense; a shared GPU counts whole; an H100 "
               "is taken for an SXM one).",
               "`vans plan` assumes 0.4; far below, look at batch sizes (max_batch, learner.micro_batch) first."),
        Metric("speed/learner/<policy>/<figure>", "as named",
               "Any of these for one of two learners (training: all_in_one).", "As above."),
    ),
)

SFT = Family(
    "Supervised fine-tuning",
    "What `vans sft` logs every few optimizer steps.",
    (
        Metric("sft/loss", "nats or 1",
               "Mean loss since the last line: nats per answer token (vlm), squared velocity error (vdm).",
               "Falls, then flattens: converged."),
        Metric("sft/lr", "1", "Learning rate.", "Warm-up, then a cosine to 0."),
        Metric("sft/grad_norm", "1", "Global gradient norm before clipping.", "Steady; spikes go with bad batches."),
        Metric("sft/skipped", "steps", "Steps skipped so far because the gradient was not finite.", "Should be 0."),
        Metric("sft/quarantined", "rows", "Rows that could not be decoded, over all ranks.", "Should be 0."),
        Metric("sft/samples_per_s", "1/s", "Samples trained on per second, over all ranks.", "The speed."),
    ),
)

EVAL = Family(
    "Evaluation",
    "On held-out samples, by `vans evaluate` or at the end of a stage. In MLflow the name may carry the system: "
    "`eval/<system>/<metric>`.",
    (
        Metric("eval/<metric>", "as named",
               "ROUGE-L, BLEU, CLIP-V, CLIP-T, Fréchet distance (named after its extractor), follow, drawable, "
               "format.",
               "The figures that count; higher is better except for Fréchet distances."),
        Metric("eval/<system>/<metric>", "as named", "The same for one of several systems.",
               "Compare systems on the same samples only."),
    ),
)

HELD_OUT = Family(
    "Evaluation while a run trains",
    "On the fixed subset of data.val that `evaluate.every` asks. The step is the number of steps done, so 0 is before the first.",
    (
        Metric("evaluate/<metric>", "as named", "A figure of `vans evaluate`'s table over the subset, diagnostics included.",
               "The curve to choose by; the subset is small, so look at the trend."),
        Metric("evaluate/best", "as evaluate.metric", "The stage's best value of evaluate.metric so far.",
               "Flat for long: the stage has learnt what it will, or its settings are wrong."),
        Metric("evaluate/since_best", "evaluations", "Evaluations of the stage since its best.",
               "At evaluate.stop_if_not_better the stage ends."),
    ),
)

# fmt: on

FAMILIES = (ROLLOUT, STAGE2, LEARNER, ALARMS, POOLS, CACHES, SPENDING, REST, PROFILE, SPEED, SFT, EVAL, HELD_OUT)


@cache
def find(name: str) -> Metric | None:
    """Return the entry that declares ``name``, the most literal one first; None where no entry does."""
    matching = [m for family in FAMILIES for m in family.metrics if m.pattern.fullmatch(name)]
    return min(matching, key=lambda metric: metric.name.count("<"), default=None)


def glossary() -> str:
    """Return ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "What a run logs to MLflow: name, unit, meaning, and how to read it. Written by",
        "`make docs` from `pipeline/tracking/metrics.py`, and held to it by a test.",
        "`<…>` stands for any part of a name; a ratio lies in 0…1.",
    ]
    for family in FAMILIES:
        lines += [
            "",
            f"## {family.title}",
            "",
            family.about,
            "",
            "| metric | unit | meaning | how to read it |",
            "|---|---|---|---|",
        ]
        for metric in family.metrics:
            cells = (f"`{metric.name}`", metric.unit, metric.meaning, metric.reading)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(glossary(), end="")
