"""Short encoder runs that are replayed: the clips' rows are those of an eager run of the same shape, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.assembly
import engine.loading
from engine.cuda_graphs import CudaCapture
from engine.encoder_graphs import MAX_CLIPS, SIZES, EncoderGraphs
from model.attention import select_backend
from model.clip_pack import PackedClips, PackShape, Samples, encoder_lens, lay_out
from model.config import Qwen2AudioConfig, num_audio_tokens
from model.loader import load_model
from model.qwen2_audio import Qwen2Audio
from tests.engine.test_cuda_graphs import build
from tests.engine.test_overlap import AUDIO, SHORT, assert_same, run
from tests.graph_tape import DeviceBackend, TapeCapture
from tests.reference import Prompt, noise

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
RUNS = [[1.27], [1.28], [1.29], [0.3, 0.3, 0.31], [0.01], [0.02, 2.0], [4 * 0.5], [10.0], [10.24], [5.0, 0.02, 5.0],
        [1.0, 1.0, 1.0, 1.0], [0.5]]  # fmt: skip
"""Seconds of each clip: at and round the sizes, with clips that have no token at all, growing and shrinking."""


def clips_of(seconds: list[float]) -> list[Samples]:
    return [noise(max(1, int(16_000 * s)), seed=k) for k, s in enumerate(seconds)]


@pytest.fixture(scope="module")
def tiny(gqa_folder: Path) -> Qwen2Audio:
    config = Qwen2AudioConfig.from_folder(gqa_folder)
    return load_model(gqa_folder, config, DeviceBackend(), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def on_cpu(tiny: Qwen2Audio) -> EncoderGraphs:
    graphs = EncoderGraphs(tiny, TapeCapture())
    graphs.capture()
    return graphs


def graphs_on(device: str, on_cpu: EncoderGraphs, folder: Path) -> EncoderGraphs:
    if device == "cpu":
        return on_cpu
    backend, reason = select_backend("auto", torch.device(device))
    assert backend.supports_graphs, reason
    config = Qwen2AudioConfig.from_folder(folder)
    model = load_model(folder, config, backend, torch.bfloat16, torch.device(device))
    graphs = EncoderGraphs(model, CudaCapture(model.device))
    graphs.capture()
    return graphs


@torch.inference_mode()
def eager(model: Qwen2Audio, clips: list[Samples], size: int) -> torch.Tensor:
    """The run without a graph, with the same room. -> [A, C]."""
    shape = PackShape.roomy(MAX_CLIPS, size)
    signal, index = (torch.from_numpy(array).to(model.device) for array in lay_out(clips, shape))
    pack = PackedClips.view(signal, index, shape, (size,) * shape.num_clips)
    return model.encode_mel(model.mel(pack), pack)


@devices
def test_a_replay_equals_the_eager_run(on_cpu: EncoderGraphs, gqa_folder: Path, device: str) -> None:
    graphs = graphs_on(device, on_cpu, gqa_folder)
    for seconds in RUNS:
        clips = clips_of(seconds)
        assert graphs.takes(clips)
        with torch.inference_mode():
            rows = graphs.encode(clips)
            near = graphs._model.encode_audio(clips)
        assert [len(part) for part in rows] == [num_audio_tokens(len(clip)) for clip in clips]
        size = next(size for size in SIZES if size >= sum(encoder_lens(clips)))
        together = torch.cat(rows)
        assert torch.equal(together, eager(graphs._model, clips, size)[: len(together)])
        if len(together):
            tolerance = 1e-5 if device == "cpu" else 3e-2
            alone = torch.cat(near)
            assert (together - alone).abs().max() <= tolerance * alone.abs().max()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60_000), min_size=0, max_size=MAX_CLIPS), st.sampled_from(SIZES))
def test_room_holds_every_index(lengths: list[int], size: int) -> None:
    """Whatever is left over points into the arrays, and belongs to the last clip alone."""
    clips = [np.ones(length, dtype=np.float32) for length in lengths]
    lens = encoder_lens(clips)
    if sum(lens) > size:
        return
    shape = PackShape.roomy(MAX_CLIPS, size)
    signal, index = lay_out(clips, shape)
    pack = PackedClips.view(torch.from_numpy(signal), torch.from_numpy(index), shape, (size,) * shape.num_clips)
    num_frames = 1 + (len(signal) - 400) // 160
    assert 0 <= int(pack.frame_of_column.min()) <= int(pack.frame_of_column.max()) < num_frames
    last = int(pack.clip_of_column.max())
    assert 0 <= int(pack.clip_of_column.min()) <= last <= MAX_CLIPS
    assert last == MAX_CLIPS or sum(lens) == size, "what is left over belongs to nobody's clip"
    assert int(pack.pool_index.max()) + 1 < size
    assert int(pack.frame_index.max()) <= (shape.num_columns - 3) // 2
    assert int(pack.positions.max()) < 1500
    assert pack.metadata.starts is not None
    starts = pack.metadata.starts.tolist()
    assert starts == [0, *np.cumsum(lens).tolist(), *[sum(lens)] * (MAX_CLIPS - len(lens)), size]


def test_long_or_many_clips_are_left_to_eager_runs(on_cpu: EncoderGraphs) -> None:
    assert not on_cpu.takes(clips_of([10.3]))
    assert not on_cpu.takes(clips_of([0.1] * (MAX_CLIPS + 1)))
    assert on_cpu.takes(clips_of([0.1] * MAX_CLIPS))


def test_a_broken_clip_spoils_neither_its_neighbour_nor_the_next_run(on_cpu: EncoderGraphs) -> None:
    good, bad = clips_of([1.0, 0.5])
    bad[77] = float("nan")
    with torch.inference_mode():
        expected = on_cpu.encode([good, noise(8000)])[0].clone()
        together, broken = (rows.clone() for rows in on_cpu.encode([good, bad]))
        again = on_cpu.encode([good, noise(8000)])[0]
    assert torch.equal(together, expected)
    assert not broken.isfinite().all()
    assert torch.equal(again, expected)


def test_answers_about_clips_are_the_same(gqa_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips that are encoded one after the other do not overwrite each other; long ones run eagerly between them."""
    prompts = {f"clip {k}": Prompt.of(5, noise(n, seed=k), 6, 7) for k, n in enumerate((9000, 200_000, 16_000, 500))}
    requests = [prompt.request(name, max_tokens=8) for name, prompt in prompts.items()]
    requests += [AUDIO.request("audio", max_tokens=8), SHORT.request("text", max_tokens=8)]
    expected = run(build(gqa_folder, attention_backend="reference", max_model_len=512), requests)
    capture = TapeCapture()
    monkeypatch.setattr(engine.assembly, "graph_capture", lambda *args: (capture, ""))
    monkeypatch.setattr(engine.loading, "select_backend", lambda *args, **_: (DeviceBackend(), "for tests"))
    core = build(gqa_folder, max_model_len=512, async_scheduling=True)
    assert f"{len(SIZES)} of encoder runs, up to 10 s of audio" in core.info.cuda_graphs
    answers = {}
    for request in requests:
        answers |= run(core, [request])
    assert_same(answers, expected)
    assert sum(tape.num_replays for tape in capture.tapes[-len(SIZES) :]) > 0
