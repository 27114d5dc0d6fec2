"""When a sign becomes an alarm and when that ends: thresholds, patience, drifts, and a state that a checkpoint can hold."""

import json

import pytest

from rewards.alarms import AlarmSettings, AlarmState, judge, watch

OFF = AlarmSettings(patience=1, first_steps=3)
HEALTHY = {"motion_ratio": 1.0, "copy_excess": 0.02, "sharpness_ratio": 1.4, "saturation_shift": 0.02}


def run(values: list[dict[str, float]], settings: AlarmSettings, state: AlarmState | None = None, first: int = 0):
    """Watch ``values`` as the steps from ``first`` on; returns the state and what began and ended at which step."""
    state, told = state or AlarmState(), []
    for step, signs in enumerate(values, start=first):
        watched = watch(state, step, signs, settings)
        state = watched.state
        told += [(step, "on", name) for name in watched.began] + [(step, "off", name) for name in watched.ended]
    return state, told


def test_an_alarm_is_told_when_it_begins_and_when_it_ends_and_not_between() -> None:
    frozen = HEALTHY | {"motion_ratio": 0.05}
    steps = [HEALTHY] * 2 + [frozen] * 5 + [HEALTHY] * 4
    assert run(steps, OFF)[1] == [(2, "on", "motion"), (7, "off", "motion")]
    assert run(steps, OFF.model_copy(update={"patience": 3}))[1] == [(4, "on", "motion"), (9, "off", "motion")]
    flapping = [frozen, HEALTHY] * 5
    assert run(flapping, OFF.model_copy(update={"patience": 2}))[1] == [], "a step that is off now and then is no alarm"


def test_drifts_are_judged_against_the_runs_own_first_steps() -> None:
    soft = {"sharpness_ratio": 0.1, "saturation_shift": -0.3, "completion_tokens": 20.0, "entropy": 1.0}
    assert run([soft] * 8, OFF)[1] == [], "what the pair brought along is no drift"
    drift = {"sharpness_ratio": 0.45, "saturation_shift": -0.15, "completion_tokens": 31.0, "entropy": 0.05}
    told = run([soft] * 3 + [drift], OFF)[1]
    assert told == [(3, "on", name) for name in ("entropy", "length", "saturation", "sharpness")]
    assert run([soft] * 2 + [drift], OFF)[1] == [], "the first steps are what the others are judged by"
    state, _ = run([{"entropy": e} for e in (1.0, 2.0, 3.0)], OFF)
    assert (
        "is 0.05 times that of the run's first steps" in judge({"entropy": 0.1}, OFF, first={"entropy": 2.0})["entropy"]
    )
    assert state.first == {"entropy": (1.0, 2.0, 3.0)}


def test_a_component_without_variance_is_an_alarm_after_its_own_patience() -> None:
    """A judge that always says 10: on from the third step in a row, over after ``patience`` steps of which it tells answers apart."""
    settings = AlarmSettings(patience=1, constant_after=3, stop_after=2)
    state, told, lasting = AlarmState(), [], []
    for step, spread in enumerate((0.0, 0.0, 0.3, 0.0, 1e-12, 0.0, 0.0, 0.3)):
        watched = watch(state, step, {}, settings, spreads={"judge": spread, "clip_v": 0.1})
        state = AlarmState.from_json(json.loads(json.dumps(watched.state.to_json())))
        told += [(step, "on", name) for name in watched.began] + [(step, "off", name) for name in watched.ended]
        lasting += [step] * bool(watched.lasting)
    assert told == [(5, "on", "constant.judge"), (7, "off", "constant.judge")]
    assert lasting == [5, 6], "a run is not stopped for what is no alarm yet"
    off = settings.model_copy(update={"constant_after": None})
    assert judge({}, off, spreads={"judge": 0.0}) == {}
    assert (
        "judge has been the same for all answers of 3 steps"
        in judge({}, settings, spreads={"judge": 0.0})["constant.judge"]
    )


def test_without_first_steps_ground_truth_is_the_base() -> None:
    assert judge(HEALTHY, OFF) == {}
    found = judge({"sharpness_ratio": 0.1, "saturation_shift": -0.3, "completion_tokens": 900.0}, OFF)
    assert sorted(found) == ["saturation", "sharpness"]
    assert found["saturation"] == "saturation: colours are -0.30 in saturation against ground truth (alarm beyond ±0.1)"
    assert found["sharpness"].endswith("as sharp as ground truth (alarm outside 0.25–4)")


def test_null_turns_an_alarm_off_and_what_is_missing_or_not_finite_raises_none() -> None:
    frozen = {"motion_ratio": 0.0}
    assert judge(frozen, OFF.model_copy(update={"motion_below": None})) == {} != judge(frozen, OFF)
    assert run([{}, {"motion_ratio": float("nan")}], OFF)[1] == []
    assert run([frozen, {}], OFF)[1] == [(0, "on", "motion"), (1, "off", "motion")]


@pytest.mark.parametrize("cut", [1, 2, 4, 6, 8])
def test_a_run_that_was_cut_anywhere_raises_the_same_alarms(cut: int) -> None:
    odd = {"motion_ratio": 0.1, "entropy": 0.01, "completion_tokens": 80.0}
    steps = [{"motion_ratio": 1.0, "entropy": 0.1 + i / 30, "completion_tokens": 20.0 + i / 7} for i in range(5)]
    steps += [odd] * 3 + steps[:3]
    settings = OFF.model_copy(update={"patience": 2, "first_steps": 4})
    whole, told = run(steps, settings)
    before, first_half = run(steps[:cut], settings)
    stored = json.loads(json.dumps(before.to_json(), allow_nan=False))
    after, second_half = run(steps[cut:], settings, AlarmState.from_json(stored), first=cut)
    assert first_half + second_half == told and after == whole
    assert len(told) == 6, "three alarms begin and end"


def test_lasting_counts_the_same_alarm_in_a_row() -> None:
    settings = OFF.model_copy(update={"stop_after": 3})
    frozen, copied = {"motion_ratio": 0.1}, {"copy_excess": 0.9}
    state, lasting = AlarmState(), []
    for step, signs in enumerate([frozen, frozen, copied, frozen, copied | frozen, frozen]):
        watched = watch(state, step, signs, settings)
        state = watched.state
        lasting.append(sorted(watched.lasting))
    assert lasting == [[], [], [], [], [], ["motion"]]
    state, _ = run([frozen] * 9, OFF)
    assert watch(state, 9, frozen, OFF).lasting == {}, "off by default"


@pytest.mark.parametrize(
    ("sign", "within", "beyond"),
    [
        ("motion_ratio", 0.2, 0.2 - 1e-9),
        ("copy_excess", 0.1, 0.1 + 1e-9),
        ("saturation_shift", 0.1, 0.1 + 1e-9),
        ("saturation_shift", -0.1, -0.1 - 1e-9),
        ("format_rate", 0.5, 0.5 - 1e-9),
        ("anchors_kept_ratio", 0.2, 0.2 - 1e-9),
        ("zero_std_ratio", 0.75, 0.75 + 1e-9),
    ],
)
def test_a_threshold_itself_is_no_alarm(sign: str, within: float, beyond: float) -> None:
    assert judge({sign: within}, OFF) == {} and len(judge({sign: beyond}, OFF)) == 1
    assert judge({}, OFF, {("a", "b"): -0.5}) == {}
    assert list(judge({}, OFF, {("a", "b"): -0.5 - 1e-9})) == ["correlation.a.b"]
    assert judge({}, OFF.model_copy(update={"correlation_below": None}), {("a", "b"): -1.0}) == {}


def test_a_ratio_of_next_to_nothing_is_none() -> None:
    """Both sides have 0.001 added: a base of 0 divides nothing, and two values near 0 are alike."""
    found = judge({"entropy": 0.0}, OFF, first={"entropy": 0.0})
    assert found == {} and judge({"entropy": 0.0025}, OFF, first={"entropy": 0.0}) != {}  # 3.5 times


def test_patience_counts_steps_in_a_row_at_either_end() -> None:
    settings = OFF.model_copy(update={"patience": 3})
    frozen = HEALTHY | {"motion_ratio": 0.05}
    assert run([frozen] * 2 + [HEALTHY] + [frozen] * 2, settings)[1] == []  # the count begins anew
    on = [frozen] * 3
    assert run(on + [HEALTHY] * 2 + [frozen] + [HEALTHY] * 2, settings)[1] == [(2, "on", "motion")]  # at this end too
    assert run(on + [HEALTHY] * 3, settings)[1] == [(2, "on", "motion"), (5, "off", "motion")]


def test_only_the_first_steps_are_the_base() -> None:
    steps = [{"entropy": e} for e in (1.0, 1.0, 1.0, 100.0, 100.0)]
    state, told = run(steps, OFF)
    assert state.first == {"entropy": (1.0, 1.0, 1.0)} and told == [(3, "on", "entropy")]
    late, _ = run([{}, {"entropy": 2.0}, {"entropy": float("inf")}, {"entropy": 4.0}], OFF)
    assert late.first == {"entropy": (2.0, 4.0)}  # of the sign's own first values


def test_the_words_name_the_side_that_was_left() -> None:
    words = {
        "motion": judge({"motion_ratio": 0.0}, OFF)["motion"],
        "copy": judge({"copy_excess": 0.5}, OFF)["copy"],
        "saturation": judge({"saturation_shift": 0.5}, OFF)["saturation"],
        "sharpness": judge({"sharpness_ratio": 9.0}, OFF)["sharpness"],
    }
    ends = {"motion": "(alarm below 0.2)", "copy": "(alarm above 0.1)", "saturation": "(alarm beyond ±0.1)"}
    ends["sharpness"] = "(alarm outside 0.25–4)"
    assert all(words[name].endswith(end) for name, end in ends.items())


def test_an_alarm_lasts_from_the_step_that_completes_its_row() -> None:
    settings = OFF.model_copy(update={"stop_after": 2})
    state = AlarmState()
    lasting = []
    for step in range(3):
        watched = watch(state, step, {"motion_ratio": 0.0}, settings)
        state = watched.state
        lasting.append(list(watched.lasting))
    assert lasting == [[], ["motion"], ["motion"]] and state.on == {"motion": 0}


def test_a_quiet_step_breaks_the_row_that_stops_a_run_though_the_alarm_stands() -> None:
    settings = OFF.model_copy(update={"patience": 2, "stop_after": 3})
    frozen, state, lasting = {"motion_ratio": 0.0}, AlarmState(), []
    for step, signs in enumerate([frozen, frozen, HEALTHY, frozen, frozen, frozen]):
        watched = watch(state, step, signs, settings)
        state = watched.state
        lasting.append(bool(watched.lasting))
        assert not watched.ended
    assert lasting == [False] * 5 + [True] and state.on == {"motion": 1}
