"""The store keeps what it promised, within every caller's share, and never shows one caller what is another's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from audio import Pcm
from server.media.store import OVERHEAD_BYTES, AudioStore, ClipTooLargeError, StoreFullError

SHARE = 4 * OVERHEAD_BYTES
SCOPES = st.sampled_from(["one", "two"])


def pcm(size: int, value: int = 0) -> Pcm:
    return Pcm(np.full(size, value / 100, np.float32))


class StoreMachine(RuleBasedStateMachine):
    """Against a plain model: a list of what was promised."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.store = AudioStore(2 * SHARE, 100, num_scopes=lambda: 2, clock=lambda: self.now)
        self.promised: dict[tuple[str, str], tuple[Pcm, float]] = {}

    def _used(self, scope: str, but: str = "") -> int:
        return sum(
            clip.samples.nbytes + OVERHEAD_BYTES
            for (owner, audio_id), (clip, expires_at) in self.promised.items()
            if owner == scope and expires_at > self.now and audio_id != but
        )

    @rule(scope=SCOPES, size=st.integers(1, 4000), value=st.integers(0, 3), ttl=st.none() | st.integers(1, 200))
    def put(self, scope: str, size: int, value: int, ttl: float | None) -> None:
        clip = pcm(size, value)
        needed = clip.samples.nbytes + OVERHEAD_BYTES
        try:
            audio = self.store.put(scope, clip, "a.wav", 7, ttl)
        except ClipTooLargeError:
            assert needed > SHARE
        except StoreFullError:
            assert self._used(scope) + needed > SHARE
        else:
            assert audio.expires_at == self.now + min(ttl or 100, 100)
            assert self._used(scope, audio.audio_id) + needed <= SHARE
            self.promised[scope, audio.audio_id] = (clip, audio.expires_at)

    @rule(seconds=st.integers(1, 60))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(scope=SCOPES, data=st.data())
    def delete(self, scope: str, data: st.DataObject) -> None:
        if not self.promised:
            return
        index = data.draw(st.integers(0, len(self.promised) - 1))
        owner, audio_id = list(self.promised)[index]
        is_there = owner == scope and self.promised[owner, audio_id][1] > self.now
        assert self.store.delete(scope, audio_id) == is_there
        if is_there:
            del self.promised[owner, audio_id]

    @invariant()
    def what_was_promised_is_there_for_its_owner_alone(self) -> None:
        for (owner, audio_id), (clip, expires_at) in self.promised.items():
            found = self.store.get(owner, audio_id)
            assert (found is not None) == (expires_at > self.now)
            assert found is None or found.pcm == clip
            assert self.store.get("two" if owner == "one" else "one", audio_id) is None

    @invariant()
    def shares_hold(self) -> None:
        for scope in ("one", "two"):
            listed = self.store.list(scope)
            assert self.store.num_held_bytes(scope) == self._used(scope) <= SHARE
            assert [audio.created_at for audio in listed] == sorted(audio.created_at for audio in listed)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_ids_depend_on_content_scope_and_process() -> None:
    store, other = AudioStore(1 << 20, 100), AudioStore(1 << 20, 100)
    first = store.put("one", pcm(10), "a", 1).audio_id
    assert store.put("one", pcm(10), "b", 1).audio_id == first
    ids = {first, store.put("one", pcm(11), "a", 1).audio_id, store.put("two", pcm(10), "a", 1).audio_id,
           other.put("one", pcm(10), "a", 1).audio_id}  # fmt: skip
    assert len(ids) == 4


def test_no_memory_no_uploads() -> None:
    with pytest.raises(ClipTooLargeError):
        AudioStore(0, 100).put("one", pcm(1), "a", 1)
