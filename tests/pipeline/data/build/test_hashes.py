"""Perceptual hashes keep through codecs and sizes, differ between scenes, and are found within seven bits."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.build.hashes import SAME, HashIndex, SeenClips, common_hash, distances, frame_hashes, thinned
from pipeline.data.video import decode_video, encode_mp4
from tests.pipeline.data.build.footage import SCENES, scene

HASH = st.integers(0, 2**64 - 1)


def test_a_hash_keeps_through_a_codec_and_another_size_and_differs_between_scenes() -> None:
    found = {}
    for name in SCENES:
        frames = scene(name)[::6]
        hashes = frame_hashes(frames)
        small = decode_video(encode_mp4(frames, 4.0, near_lossless=False), len(frames), 90, 120)  # squeezed, too
        frames_again = decode_video(encode_mp4(frames, 4.0, near_lossless=False), len(frames), *frames.shape[1:3])
        assert np.diag(distances(hashes, frame_hashes(frames_again))).max() <= 2
        found[name] = hashes
        if abs(frames.shape[2] / frames.shape[1] - 120 / 90) < 0.01:
            assert np.diag(distances(hashes, frame_hashes(small))).max() <= SAME
    names = list(found)
    apart = [distances(found[a], found[b]).min() for i, a in enumerate(names) for b in names[:i]]
    assert min(apart) > 2 * SAME


def test_plain_pictures_have_no_hash() -> None:
    fade = np.stack([np.full((20, 30, 3), level, np.uint8) for level in (0, 90, 255)])
    assert len(frame_hashes(fade)) == 0
    assert common_hash(frame_hashes(fade)) == 0


def test_the_common_hash_is_the_bits_that_most_have() -> None:
    assert common_hash(np.asarray([0b1100, 0b0110, 0b0101], np.uint64)) == 0b0100
    assert common_hash(np.asarray([2**63 + 1], np.uint64)) == 2**63 + 1


@settings(max_examples=80, deadline=None)
@given(st.lists(HASH, min_size=1, max_size=20), HASH, st.sets(st.integers(0, 63), max_size=SAME))
def test_the_index_finds_what_a_comparison_with_all_finds(filed: list[int], other: int, flipped: set[int]) -> None:
    index = HashIndex()
    assert [index.add(value) for value in filed] == list(range(len(filed)))
    near = filed[0] ^ sum(1 << bit for bit in flipped)
    for value in (near, other):
        within = distances(filed, [value])[:, 0] <= SAME
        assert index.find(value) == set(np.flatnonzero(within).tolist())
    assert 0 in index.find(near)
    assert len(index) == len(filed)


def test_frames_that_show_the_same_are_thinned_out() -> None:
    assert thinned([0b0, 0b1, 0b11, 0b111, 0b111, 0b0]) == [0b0, 0b111, 0b0]


def test_clips_are_seen_again_in_part_and_among_others() -> None:
    generator = np.random.default_rng(0)
    clips = [[int(value) for value in generator.integers(0, 2**63, 20)] for _ in range(4)]
    seen = SeenClips()
    for key, clip in enumerate(clips[:3]):
        seen.add(key, clip)
    other = [int(value) for value in generator.integers(0, 2**63, 20)]
    assert seen.find(clips[3]) == set()
    assert seen.find(clips[1][8:12]) == {1}  # all of this one is in clip 1
    assert seen.find(clips[1][:6] + other) == {1}  # 6 of clip 1's 20 frames
    assert seen.find(clips[1][:5] + other) == set()
    assert seen.find([*clips[0][:7], *clips[2][:7]]) == {0, 2}
    assert seen.find([]) == set()
    few = SeenClips(most=4)
    few.add("a", clips[0])
    assert few.find([value ^ 0b1011 for value in clips[0]]) == {"a"} and few.find(clips[1]) == set()
